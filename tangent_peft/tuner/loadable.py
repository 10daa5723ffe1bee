"""Whether stock PEFT makes of a LoRA what it says: found out before it is written, on a copy without weights.

Two things stand between a correct file and a correct model. PEFT rewrites adapters of some architectures as it loads
them (mixtures of experts, whose layers had other names in transformers 4) and refuses others (Mamba). And a module that
reads a layer's weight, instead of calling the layer, never sees what a LoRA adds to that layer's output.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from tangent_peft.tuner.axes import preserved, switch
from tangent_peft.tuner.guard import WeightRead
from tangent_peft.tuner.layer import TangentLayer


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs

_REMEDY = "Use `export_merged`, which has no such limit, or train axes without a tangent there (`exclude_modules`)."


def check_loads(model: nn.Module, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Loads a LoRA with stock PEFT onto the model's architecture, on the meta device, and compares every tensor.

    Raises:
        ValueError: if PEFT refuses it, or puts its tensors elsewhere.
    """
    if not isinstance(model, PreTrainedModel):
        return
    settings, kind = copy.deepcopy(model.config), type(model).__name__
    vars(settings).pop("quantization_config", None)
    with torch.device("meta"):
        shell = type(model)(settings)
    try:
        found, wanted = _loaded(shell, copy.deepcopy(config), state)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"Stock PEFT refuses a LoRA of this mix on a {kind}: {error} {_REMEDY}") from error
    names = sorted({*found, *wanted, *state})
    wrong = [name for name in names if name not in wanted or not _same(found.get(name), state.get(name))]
    if wrong:
        raise ValueError(
            f"Stock PEFT rewrites a LoRA of this mix as it loads it on a {kind}: {len(wrong)} of {len(names)} tensors "
            f"do not arrive, for example {wrong[0]!r}. It takes their layers for experts, as transformers 4 named "
            f"these. {_REMEDY}"
        )


def _loaded(shell: nn.Module, config: LoraConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """What PEFT makes of the tensors of a file before it puts them into the model, and the names that it looks for."""
    found: dict[str, Tensor] = {}
    with warnings.catch_warnings(action="ignore"):
        model: Any = get_peft_model(shell, config, low_cpu_mem_usage=True)
        model.load_state_dict = lambda values, **options: found.update(values)  # a model on meta would drop them
        set_peft_model_state_dict(model, dict(state), low_cpu_mem_usage=True)
    wanted = {name for name, _ in model.named_parameters() if ".lora_" in name}
    return {name.replace(".default", ""): x for name, x in found.items()}, {n.replace(".default", "") for n in wanted}


def _same(found: Tensor | None, written: Tensor | None) -> bool:
    return found is not None and written is not None and torch.equal(found, written)


@torch.no_grad()
def check_called(tuner: AxisVerbs, weights: Mapping[str, float], layers: Collection[TangentLayer]) -> None:
    """Runs two tokens through the model and refuses layers of which the weight is read instead of the layer called.

    Args:
        tuner: the wrapped model.
        weights: the mix.
        layers: those that the LoRA has factors for.

    Raises:
        ValueError: naming such a layer.
    """
    model: Any = tuner.model
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        return
    inputs = {"input_ids": torch.ones(1, 2, dtype=torch.long, device=model.device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    guarded, was_training = [(layer, layer.tangent_guarded) for layer in layers], model.training
    with preserved(tuner), tuner.linearized(False):
        tuner.tangent_live.rows = None
        switch(tuner, dict.fromkeys(weights, 1.0))
        model.eval()
        try:
            for layer, _ in guarded:
                layer.tangent_guarded = True
            model(**inputs, use_cache=False)
        except WeightRead as error:
            name = re.search("weight of '([^']+)'", str(error))
            raise ValueError(
                f"A {type(model).__name__} reads the weight of {name and name[1]!r} instead of calling the layer, so a "
                f"LoRA on it would be lost. {_REMEDY}"
            ) from error
        finally:
            for layer, before in guarded:
                layer.tangent_guarded = before
            model.train(was_training)
