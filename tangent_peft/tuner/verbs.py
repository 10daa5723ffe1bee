"""`AxisVerbs`: what axes add to PEFT's verbs, each in a file of its own: λ, the choice of evaluation, the exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedTokenizerBase

from tangent_peft.tuner import axes, export, rows, stored
from tangent_peft.tuner.config import TangentConfig
from tangent_peft.tuner.live import LiveMix


class AxisVerbs(BaseTuner):
    """Abstract: the verbs of a model with axes. `TangentModel` says how its layers are wrapped."""

    peft_config: dict[str, TangentConfig]  # type: ignore[assignment]  # PEFT lets no other method in beside it
    tangent_live: LiveMix  # shared with all layers

    # ---- axes --------------------------------------------------------------------------------------------------

    def combine_axes(self, weights: Mapping[str, float], adapter_name: str | None = None) -> None:
        """Mixes axes by number: θ(λ) = θ₀ + Σ λᵢ τᵢ (TS-DPO).

        Args:
            weights: λ by axis name; axes not named are off, and `{}` is the base model.
            adapter_name: without it the mix is active from now on and no weight is touched. With it the mix is stored
                as a new adapter of that name (at λ = 1, not activated): of the same rank for shared projections, of the
                sum of the ranks for trained ones, dense if one of the axes is.

        Raises:
            ValueError: for an unknown axis, a λ that is not finite, a name that is taken, a merged model.
        """
        if adapter_name is None:
            axes.activate(self, weights)
        else:
            stored.store(self, weights, adapter_name)

    @property
    def axis_weights(self) -> dict[str, float]:
        """λ of the active axes; empty while adapters are disabled."""
        return axes.active_weights(self)

    @contextmanager
    def axes(
        self, weights: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None, /, **named: float
    ) -> Iterator[None]:
        """Mixes axes for the duration of a `with` block: `with model.axes(help=1.0, verb=-0.5):`.

        Args:
            weights: λ by axis name; or a list of such mixes, one for every row of the batches inside the block, as
                `model(..., axis_weights=[...])` and `model.generate(..., axis_weights=[...])` take it for one call.
            **named: λ by axis name, in place of `weights` or beside a mapping.

        Raises:
            ValueError: as `combine_axes`, and for an axis given twice, by mapping and by keyword.
            TypeError: for anything but a mapping or a list of mappings, or keywords beside a list.
        """
        if weights is not None and not isinstance(weights, Mapping):
            if named:
                raise TypeError(f"Axes {sorted(named)} are given as keywords beside a list of mixes; put them into it.")
            with rows.mixed_rows(self, weights):
                yield
            return
        twice = sorted(set(weights or {}) & set(named))
        if twice:
            raise ValueError(f"Axes {twice} are given twice, in the mapping and as keywords. Give each one λ.")
        with axes.preserved(self):
            axes.activate(self, {**(weights or {}), **named})
            yield

    @contextmanager
    def linearized(self, flag: bool = True) -> Iterator[None]:
        """Chooses the evaluation for the duration of a `with` block, whatever the adapters' configuration says.

        Args:
            flag: `True`: f_lin. `False`: the ordinary network at the weights θ(λ), without merging them.
        """
        live = self.tangent_live
        before, live.forced = live.forced, flag
        try:
            yield
        finally:
            live.forced = before

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`; with `axis_weights=[{…}, …]` each row, and all its beams, has its own mix."""
        model: Any = self.model
        with rows.repeated_rows(self, args, kwargs):
            return model.generate(*args, **{name: value for name, value in kwargs.items() if name != rows.KEYWORD})

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by `PeftModel` around forward and `generate`, with their arguments."""
        with rows.rows_of_call(self, kwargs):
            yield

    # ---- exports -----------------------------------------------------------------------------------------------

    def export_merged(
        self,
        path: str | Path,
        weights: Mapping[str, float] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Saves the ordinary network at θ(λ); see `tangent_peft.tuner.export.export_merged`."""
        export.export_merged(self, Path(path), weights, tokenizer)

    def export_lora(
        self, path: str | Path, weights: Mapping[str, float] | None = None, rank: int | None = None
    ) -> export.LoraExport:
        """Saves θ(λ) − θ₀ as a plain LoRA; see `tangent_peft.tuner.export.export_lora`."""
        return export.export_lora(self, Path(path), weights, rank)
