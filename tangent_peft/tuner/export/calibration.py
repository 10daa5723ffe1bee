"""The linearity gap that an export states, and the tokens it is measured on where the user gives none.

These are written by the base model itself, with a fixed seed: no tokenizer and no network is needed, and the text is
what the model finds likely. A gap on your own prompts says more; give them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tangent_peft.forward import evaluating
from tangent_peft.tuner.algebra import axis_norm
from tangent_peft.tuner.axes import preserved, switch
from tangent_peft.tuner.linearity import GAP_LIMIT, LinearityGap, linearity_gap
from tangent_peft.tuner.safe_range import is_of_this_tangent, range_of


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs

ROWS, LENGTH, SEED = 4, 32, 0

#: Batches of model inputs; True: a sample of the base itself; False: the gap is not measured.
CalibrationData: TypeAlias = Iterable[Mapping[str, Tensor]] | bool


@dataclass(frozen=True)
class Calibration:
    """The gap of a mix, and where it comes from.

    Attributes:
        gap: `None` if it was not measured.
        source: which tokens it was measured on, or why it was not.
    """

    gap: LinearityGap | None
    source: str

    def __str__(self) -> str:
        if self.gap is None:
            return f"linearity gap not measured: {self.source}"
        return (
            f"linearity gap {self.gap.gap:.3f}, effect {self.gap.effect:.3f} ({self.gap.tokens} tokens, {self.source})"
        )


def calibrate(tuner: AxisVerbs, weights: Mapping[str, float], data: CalibrationData) -> Calibration:
    """Measures the linearity gap of a mix; the active mix is the same afterwards.

    Args:
        tuner: the wrapped model.
        weights: λ by axis.
        data: batches of model inputs as `linearity_gap` takes them; or whether to measure on a sample of the base,
            which costs `LENGTH` decoding steps and three forwards of `ROWS × LENGTH` tokens.

    Raises:
        ValueError: if `data` has no tokens.
    """
    additive = sorted(name for name in weights if not tuner.peft_config[name].linearize)
    if data is False:
        return Calibration(None, "calibration=False was given")
    if additive:
        return Calibration(None, f"axes {additive} add their weights (linearize=False), there is nothing linearized")
    if not any(weights.values()):
        return Calibration(None, "the mix is the base model")
    source = "given by the user"
    if data is True:
        reason = unsampled(tuner.model)
        if reason is not None:
            return Calibration(None, f"{reason}; give batches as `calibration`")
        data, source = [base_sample(tuner)], f"sampled from the base model, seed {SEED}"
    with _at(tuner, weights):
        return Calibration(linearity_gap(tuner, data), source)


def warn_of_gap(tuner: AxisVerbs, calibration: Calibration, stacklevel: int) -> None:
    """Warns of a mix whose measured gap is over the limit of its axes' safe ranges, by default `GAP_LIMIT`.

    That each axis is within its own range says nothing of their mix, which is what was measured. An axis that is not
    the one its range was measured on is warned of as well.

    Args:
        tuner: the wrapped model.
        calibration: of the mix.
        stacklevel: of `warnings.warn`.
    """
    if calibration.gap is None:
        return
    weights, gap = calibration.gap.weights, calibration.gap.gap
    used = [name for name, weight in weights.items() if weight]
    ranges = {name: stored for name in used if (stored := range_of(tuner, name)) is not None}
    for name, stored in ranges.items():
        norm = axis_norm(tuner.model, name)
        if not is_of_this_tangent(stored, norm):
            warnings.warn(
                f"The safe range of axis {name!r} was measured when ‖τ‖ was {stored.norm:.4g}; it is {norm:.4g} now, "
                "so the axis has changed since. Measure it again (`tangent_peft.diagnose.safe_range`) and store it.",
                stacklevel=stacklevel,
            )
    limits = [stored.limit for stored in ranges.values() if stored.measure == "logits"]
    limit = min(limits, default=GAP_LIMIT)
    if gap <= limit:
        return
    root: Any = tuner.model
    dtype = next(parameter.dtype for parameter in root.parameters() if parameter.is_floating_point())
    rounded = f" It was measured in {dtype}, of whose rounding it may be a part." if dtype.itemsize < 4 else ""
    whose = "that the axes' safe ranges are for" if limits else "up to which merging is taken to be safe"
    warnings.warn(
        f"The linearity gap of the exported mix {weights} is {gap:.2f}, over the limit of {limit:g} {whose}: the "
        "network at these weights is another model than the linearized one that was trained, also where each axis is "
        f"within its own range. Lower the λ, or judge the exported model on its own.{rounded}",
        stacklevel=stacklevel,
    )


@contextmanager
def _at(tuner: AxisVerbs, weights: Mapping[str, float]) -> Iterator[None]:
    """One mix for all rows, also inside a block that gives each row its own; λ has been checked."""
    with preserved(tuner):
        switch(tuner, weights)
        yield


def unsampled(model: torch.nn.Module) -> str | None:
    """Why no text can be sampled from a model; `None` if it can."""
    if not isinstance(model, PreTrainedModel):
        return f"a {type(model).__name__} is no transformers model that could be sampled from"
    if model.config.is_encoder_decoder or not model.can_generate():
        return f"a {type(model).__name__} writes no text from token ids alone"
    return None


@torch.no_grad()
def base_sample(tuner: AxisVerbs) -> dict[str, Tensor]:
    """Token ids (ROWS, LENGTH) drawn from the base model at temperature 1, the same at every call.

    Special tokens that its configuration names (end, padding, images, …) are not drawn.
    """
    model: Any = tuner.model
    start, special = _special_tokens(model)
    ids = torch.full((ROWS, 1), start, device=model.device)
    device = model.device
    others = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with _at(tuner, {}), torch.random.fork_rng(**others), evaluating(model):
        torch.manual_seed(SEED)
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), **_SAMPLING, suppress_tokens=special or None)
    return {"input_ids": ids}


# All that a model's own generation config might say otherwise.
_SAMPLING: dict[str, Any] = {
    "min_new_tokens": LENGTH - 1,
    "max_new_tokens": LENGTH - 1,
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
}


def _special_tokens(model: PreTrainedModel) -> tuple[int, list[int]]:
    """The token a text begins with, and those that stand for something else than text."""
    settings = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    named = {key: value for key, value in settings.items() if key.endswith(("_token_id", "_token_index"))}
    known = range(model.config.get_text_config().vocab_size)  # a tiny model may keep the ids of a large one's config
    flat = {key: [value] if isinstance(value, int) else list(value or []) for key, value in named.items()}
    flat = {key: [token for token in tokens if token in known] for key, tokens in flat.items()}
    first = next((flat[key][0] for key in ("bos_token_id", "eos_token_id") if flat.get(key)), 0)
    return first, sorted({token for tokens in flat.values() for token in tokens})
