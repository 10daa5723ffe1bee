"""Whether stock PEFT makes of a LoRA what it says: found out before it is written, on a copy without weights.

Two things stand between a correct file and a correct model. PEFT rewrites adapters of some architectures as it loads
them and refuses others (Mamba): in mixtures of experts it takes shared experts, and the dense layers of other blocks,
for routed ones, as these were named in transformers 4. And a module that reads a layer's weight, instead of calling the
layer, never sees what a LoRA adds to that layer's output.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel

from tangent_peft.forward import evaluating
from tangent_peft.tuner.axes import preserved, switch
from tangent_peft.tuner.guard import WeightRead
from tangent_peft.tuner.layer import TangentLayer


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs

_REMEDY = "Use `export_merged`, which has no such limit, or train axes without a tangent there (`exclude_modules`)."


def loadable(model: nn.Module, config: LoraConfig, state: Mapping[str, Tensor]) -> LoraConfig:
    """The configuration with which stock PEFT loads a LoRA as it is, found by loading it onto the meta device.

    That is the one given, or the same with the layers that PEFT takes for experts named by their parameter
    (`target_parameters`), which it leaves alone.

    Raises:
        ValueError: if PEFT refuses the LoRA, or puts its tensors elsewhere, either way.
    """
    if not isinstance(model, PreTrainedModel):
        return config
    lost = _lost(model, config, state)
    if lost and "quantization_config" not in vars(model.config):  # PEFT wraps no packed parameter
        by_parameter = _named_by_parameter(config)
        if not _lost(model, by_parameter, state):
            return by_parameter
    if lost:
        raise ValueError(
            f"Stock PEFT rewrites a LoRA of this mix as it loads it on a {type(model).__name__}: {len(lost)} tensors "
            f"do not arrive, for example {lost[0]!r}. It takes their layers for experts, as transformers 4 named "
            f"these. {_REMEDY}"
        )
    return config


def _named_by_parameter(config: LoraConfig) -> LoraConfig:
    """With layers that are called as experts once were among `target_parameters`."""
    renamed = {name for names in _MOE_TARGET_MODULE_MAPPING.values() for name in names}
    modules = set(config.target_modules or ())
    moved = {name for name in modules if name.rpartition(".")[2] in renamed}
    parameters = [*(config.target_parameters or ()), *(f"{name}.weight" for name in moved)]
    return dataclasses.replace(config, target_modules=sorted(modules - moved), target_parameters=sorted(parameters))


def _lost(model: PreTrainedModel, config: LoraConfig, state: Mapping[str, Tensor]) -> list[str]:
    """The tensors that stock PEFT moves or loses, of those in the file and those it looks for.

    Raises:
        ValueError: if it refuses the LoRA.
    """
    settings, kind = copy.deepcopy(model.config), type(model)
    vars(settings).pop("quantization_config", None)
    with torch.device("meta"):
        shell = kind(settings)
    try:
        found, wanted = _loaded(shell, copy.deepcopy(config), state)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"Stock PEFT refuses a LoRA of this mix on a {kind.__name__}: {error} {_REMEDY}") from error
    names = sorted({*found, *wanted, *state})
    return [name for name in names if name not in wanted or not _same(found.get(name), state.get(name))]


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

    A model that needs more than token ids is warned of, not refused.

    Raises:
        ValueError: naming such a layer.
    """
    model: Any = tuner.model
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        return
    inputs = {"input_ids": torch.ones(1, 2, dtype=torch.long, device=model.device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    guarded = [(layer, layer.tangent_guarded) for layer in layers]
    with preserved(tuner), tuner.linearized(False), evaluating(model):
        switch(tuner, dict.fromkeys(weights, 1.0))
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
        except Exception as error:
            warnings.warn(
                f"A {type(model).__name__} does not run on two token ids alone ({type(error).__name__}: {error}), so "
                "whether it calls all layers of this LoRA, or reads the weights of some, was not checked. Compare the "
                "LoRA in stock PEFT with `model.linearized(False)` before you serve it.",
                stacklevel=7,
            )
        finally:
            for layer, before in guarded:
                layer.tangent_guarded = before
