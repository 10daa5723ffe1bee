"""The logits of the base, of axes linearized and of mixes as weights, at the positions of interest, a part at a time.

Mixes share what they can: the frozen trunk below the first wrapped block runs once for a part of a batch. A part is as
many rows as have logits of a bounded size, so that many networks' logits of one part fit into memory side by side.
Letters: n positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tangent_peft.diagnose.prompts import TokenBatch
from tangent_peft.forward import evaluating
from tangent_peft.forward.trunk import Trunk
from tangent_peft.tuner.axes import (
    check_enabled,
    check_known,
    check_unmerged,
    preserved,
    refuse_saved_modules,
    switch,
    tangent_tuner,
)
from tangent_peft.tuner.hidden import TRUNK_INPUTS, trunk_of
from tangent_peft.tuner.linearity import real_positions
from tangent_peft.tuner.verbs import AxisVerbs


PART_ENTRIES = 2**23  # of the logits of a part, unless one row alone has more: 32 MiB in float32

#: Model inputs (`input_ids` (B, T), `attention_mask`) of which all real positions count, or a batch that names them.
Batch: TypeAlias = Mapping[str, Tensor] | TokenBatch


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, to be run under any mix; inside `MixLogits.ready`.

    Attributes:
        tuner: of the axes.
        inputs: of the model.
        keep: the positions of interest (B, T); `None`: all real ones.
        trunk: the part of the model below all axes, and what it gives for these rows; `None`: not cut.
    """

    tuner: AxisVerbs
    inputs: dict[str, Any]
    keep: Tensor | None
    trunk: tuple[Trunk, Tensor] | None

    def base(self) -> Tensor:
        """f(x; θ₀): logits (n, V) of the base, in at least float32."""
        return self._run({}, False)

    def weights(self, mix: Mapping[str, float]) -> Tensor:
        """f(x; θ₀ + Σ λᵢ τᵢ): those of the ordinary network at the weights θ(λ)."""
        return self._run(mix, False)

    def linearized(self, mix: Mapping[str, float]) -> Tensor:
        """f_lin = f(x; θ₀) + J Σ λᵢ τᵢ."""
        return self._run(mix, True)

    def _run(self, mix: Mapping[str, float], linearized: bool) -> Tensor:
        switch(self.tuner, mix)
        root: Any = self.tuner.model
        inputs, keep = dict(self.inputs), self.keep
        if keep is not None and not keep.all() and "logits_to_keep" in inspect.signature(root.forward).parameters:
            columns = keep.any(0).nonzero()[:, 0]
            inputs["logits_to_keep"], keep = columns, keep[:, columns]
        skipped = nullcontext() if self.trunk is None else self.trunk[0].skipped(self.trunk[1])
        with self.tuner.linearized(linearized), skipped:
            logits: Tensor = root(**inputs, use_cache=False).logits
        kept = logits[real_positions(self.inputs, logits) if keep is None else keep]
        kept = kept.reshape(-1, kept.shape[-1])
        return kept.to(torch.promote_types(kept.dtype, torch.float32))


class MixLogits:
    """Runs mixes of some axes of `model`, batch by batch.

    Args:
        model: a `PeftModel` with tangent axes.
        axes: those that will be run; all of the model by default.

    Attributes:
        axes: their names, in order.

    Raises:
        TypeError: if the model carries no tangent axes.
        ValueError: for an unknown axis, no axes, adapters that are disabled or merged, or an axis that keeps modules
            of its own, which have no λ.
    """

    def __init__(self, model: nn.Module, axes: Sequence[str] | None = None) -> None:
        self.tuner = tangent_tuner(model)
        self.axes = list(dict.fromkeys(self.tuner.peft_config if axes is None else axes))
        if not self.axes:
            raise ValueError("No axes are given to look at. Name at least one, as `axes=['help']`.")
        check_known(self.tuner, self.axes)
        check_enabled(self.tuner)
        check_unmerged(self.tuner)
        refuse_saved_modules(self.tuner, self.axes)
        self._trunk: Trunk | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """In which the model computes: that of its first weights."""
        root: Any = self.tuner.model
        return next(parameter.dtype for parameter in root.parameters() if parameter.is_floating_point())

    @property
    def dtype(self) -> str:
        """Its name, such as "float32"."""
        return str(self.torch_dtype).removeprefix("torch.")

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode without gradients for a `with` block; the active mix, and what trains, are the same afterwards."""
        with torch.no_grad(), preserved(self.tuner), evaluating(self.tuner.model):
            switch(self.tuner, dict.fromkeys(self.axes, 1.0))
            root = self.tuner.model
            with self.tuner.linearized(True):
                self._trunk = trunk_of(root) if isinstance(root, PreTrainedModel) else None
            yield

    def parts(self, batches: Iterable[Batch]) -> Iterator[Part]:
        """The parts of all batches, one after the other; inside `ready`.

        Raises:
            ValueError: if the batches hold no positions.
        """
        found = False
        for batch in batches:
            given = dict(batch.inputs if isinstance(batch, TokenBatch) else batch)
            keep = batch.keep if isinstance(batch, TokenBatch) else None
            for rows in self._slices(given, keep):
                inputs = given if rows == slice(None) else {name: value[rows] for name, value in given.items()}
                part = Part(self.tuner, inputs, None if keep is None else keep[rows], None)
                if not _positions(part):
                    continue
                found = True
                yield Part(self.tuner, inputs, part.keep, self._below(inputs))
        if not found:
            raise ValueError(
                "The batches hold no tokens to look at. Give at least one batch; one that can be gone through twice, "
                "such as a list, where several measurements share it."
            )

    def _below(self, inputs: Mapping[str, Any]) -> tuple[Trunk, Tensor] | None:
        if self._trunk is None or not set(inputs) <= TRUNK_INPUTS:
            return None
        return self._trunk, self._trunk.hidden_states(**inputs)

    def _slices(self, inputs: Mapping[str, Any], keep: Tensor | None) -> list[slice]:
        """Rows of a batch whose logits are a part; the whole batch where its rows can not be told apart."""
        ids, root = inputs.get("input_ids"), self.tuner.model
        known = isinstance(ids, Tensor) and ids.ndim == 2 and set(inputs) <= TRUNK_INPUTS
        if not isinstance(ids, Tensor) or not known or not isinstance(root, PreTrainedModel):
            return [slice(None)]
        columns = ids.shape[1] if keep is None else int(keep.any(0).sum())
        size = max(1, PART_ENTRIES // max(1, columns * int(root.config.get_text_config().vocab_size)))
        return [slice(start, start + size) for start in range(0, ids.shape[0], size)]


def _positions(part: Part) -> int:
    if part.keep is not None:
        return int(part.keep.sum())
    mask = part.inputs.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) else 1
