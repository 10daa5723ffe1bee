"""`AxisVerbs`: what axes add to PEFT's verbs, each in a file of its own: λ, the evaluation, algebra, exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from tangent_peft.tuner import algebra, axes, combine, rows, stored
from tangent_peft.tuner.combine import CombinationType, MajoritySign
from tangent_peft.tuner.config import TangentConfig
from tangent_peft.tuner.export.calibration import CalibrationData
from tangent_peft.tuner.export.lora import Head, LoraOptions
from tangent_peft.tuner.export.lora import export_lora as write_lora
from tangent_peft.tuner.export.merged import MergedOptions, chosen_mix
from tangent_peft.tuner.export.merged import export_merged as write_merged
from tangent_peft.tuner.export.record import LoraExport, MergedExport
from tangent_peft.tuner.export.servers import Server
from tangent_peft.tuner.export.tokenizer import Tokenizer
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

        A λ outside of the axis's stored safe range (`tangent_peft.diagnose.store_safe_range`), or else beyond
        |λ| = 3, is warned of.

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

    # ---- algebra -----------------------------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: CombinationType = "linear",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
    ) -> None:
        """Stores a combination of axes as a new axis, frozen and not activated. LoRA's method, exact in ΔW.

        Every type acts on the ΔWᵢ of each layer, whatever the forms, ranks, projections and layers of the axes; an
        axis that does not wrap a layer has ΔW = 0 there. LoRA's own `linear` combines the factors, which is not linear
        in ΔW (for the weights 1 and −1 it is wrong by its own size).

        Args:
            adapters: names of the axes, each one once.
            weights: as many numbers, of either sign.
            adapter_name: name of the new axis.
            combination_type: which ΔW is stored.
                `"linear"` (the default; LoRA's is `"svd"`): Σ wᵢ ΔWᵢ exactly. Of axes that share one projection at
                their rank; else at the sum of the ranks, at most that of the matrix; dense if one of the axes is.
                `"cat"`: the same ΔW, always at the sum of the ranks; dense if one of the axes is.
                `"svd"`: its best approximation of at most `svd_rank`, layer by layer.
                `"ties"` (arXiv 2306.01708), `"dare_ties"`, `"dare_linear"` (arXiv 2311.03099), `"magnitude_prune"`: as
                `peft.utils.merge_utils` computes them from ΔWᵢ and wᵢ; dense, also for low-rank axes: entries of
                B·A are pruned, not those of B. As there, signs are elected before the weights apply, and DARE draws
                from torch's random numbers (`torch.manual_seed` fixes them).
                The same with `"_svd"`: its best approximation of at most `svd_rank`.
            svd_rank: rank for the types that end in `svd`; `None`: the largest of the axes.
            svd_clamp: for these types, quantile to which the entries of both factors are clamped; `None`: not.
            svd_full_matrices: taken for LoRA's signature. The reduced SVD is computed either way: what is kept is the
                same, and the full one of an output head would not fit into memory.
            svd_driver: cuSOLVER's, `"gesvd"`, `"gesvdj"` or `"gesvda"`, for tensors on CUDA.
            density: share of the entries of each ΔWᵢ to keep, above 0 and at most 1, for the types that prune.
            majority_sign_method: `"total"` or `"frequency"`, for the types with `ties`.

        Raises:
            ValueError: for an unknown axis, a weight that is not finite, lists of different lengths, a name that
                is taken, an unknown type, an option that the type lacks or does not use, `svd_rank` above the size of a
                layer or missing for dense axes, axes of both kinds (`linearize`), one that keeps modules of its
                own, a tangent that is not finite or sharded, a merged model.
        """
        how = combine.Combination(
            combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method=majority_sign_method
        )
        combine.add_weighted(self, adapters, weights, adapter_name, how)

    def axis_norm(self, axis: str) -> float:
        """‖τ‖ at λ = 1; see `tangent_peft.tuner.algebra.axis_norm`."""
        return algebra.axis_norm(self.model, axis)

    def axis_inner(self, first: str, second: str) -> float:
        """⟨τ₁, τ₂⟩ at λ = 1; see `tangent_peft.tuner.algebra.axis_inner`."""
        return algebra.axis_inner(self.model, first, second)

    def axis_gram(self, names: Sequence[str] | None = None, cosine: bool = False) -> Tensor:
        """All ⟨τᵢ, τⱼ⟩ (K, K) of these axes or of all, or cosines; see `tangent_peft.tuner.algebra.axis_gram`."""
        return algebra.axis_gram(self.model, list(self.peft_config) if names is None else names, cosine)

    def orthogonalize_axis(self, name: str, against: str | Sequence[str], adapter_name: str) -> dict[str, float]:
        """Stores what is left of an axis without its components along others: τ − Σ cⱼ τⱼ, orthogonal to every τⱼ.

        The c solve the least-squares problem min ‖τ − Σ cⱼ τⱼ‖ over all layers. Orthogonal means in the weights, by the
        inner product of `axis_inner`; what two axes do to the answers may overlap all the same. The form of the new
        axis is that of a mix: axes that share one projection keep their rank.

        Args:
            name: the axis to project; it stays as it is.
            against: one axis or several; they need not be orthogonal to each other.
            adapter_name: name of the new axis, frozen and not activated.

        Returns:
            The mix that was stored, λ by axis: 1 for `name` and −cⱼ for the others.

        Raises:
            ValueError: as `add_weighted_adapter`; and for axes in `against` that are linearly dependent, which are
                named, or an axis that lies in their span.
        """
        stored.check_sources(self, [name, *([against] if isinstance(against, str) else against)], adapter_name)
        weights = algebra.orthogonal_weights(self.model, name, against)
        stored.store_mix(self, weights, adapter_name)
        return weights

    # ---- exports -----------------------------------------------------------------------------------------------

    def export_merged(
        self,
        path: str | Path,
        weights: Mapping[str, float] | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        calibration: CalibrationData = True,
    ) -> MergedExport:
        """Saves the network at θ(λ) as an ordinary transformers model; the model in memory is not changed.

        The folder holds safetensors in the base's dtype, config, generation config, tokenizer, a model card and
        `tangent_peft.json`. It appears complete or not at all. A quantized base is written dequantized, in the dtype of
        its config: the very base that the axes were run on, plus their τ, without quantizing again.

        Args:
            path: folder to write.
            weights: λ by axis; `None` exports the active mix.
            tokenizer: tokenizer or processor to save beside the model; `None`: the one saved with the base, if it lies
                on this machine.
            max_shard_size: largest size of one weight file.
            overwrite: replace an earlier export in `path`; no other folder is ever replaced, nor one that holds files
                which the export did not write, or the base model of the axes.
            calibration: batches of model inputs to measure the linearity gap on; `True`: a short sample of the base
                model itself (4 rows of 32 tokens); `False`: not measured, for models on which that is too slow.

        Returns:
            What was written, with the gap (warned of over the limit of the axes' safe ranges, or over 0.5) and what
            rounding to the base's dtype left of the mix (`rounding`, warned of where much is lost); it prints, and has
            a `push_to_hub`.

        Raises:
            ValueError: if the base is not a transformers model, adapters are disabled or merged, an axis keeps extra
                modules (`modules_to_save`), a quantized layer can not be dequantized, or `calibration` has no tokens.
            FileExistsError: if `path` is a file, or a folder with content that may not be replaced.
        """
        options = MergedOptions(tokenizer, max_shard_size, overwrite, calibration)
        return write_merged(self, Path(path).absolute(), chosen_mix(self, weights), options)

    def export_lora(
        self,
        path: str | Path,
        weights: Mapping[str, float] | None = None,
        rank: int | float | None = None,
        *,
        head: Head = "keep",
        server: Server | None = None,
        overwrite: bool = False,
        calibration: CalibrationData = True,
    ) -> LoraExport:
        """Saves θ(λ) − θ₀ as a plain LoRA that stock PEFT and LoRA servers load without this package.

        Args:
            path: folder to write.
            weights: λ by axis; `None` exports the active mix.
            rank: rank of the LoRA, or a share of the energy ‖ΔW‖² that every layer keeps at least, such as 0.95, as in
                `peft.convert_to_lora`. `None`: the rank of the mix, exact, for low-rank axes; 16 for dense ones. A
                smaller rank is the best approximation, by SVD. All layers get the same rank, padded with zeros.
            head: what becomes of a tangent on the head or on the input embedding. `"keep"`: factors in the LoRA.
                `"merge"`: a base model with that tangent in its weights, at this λ, is saved in `path/base`, and the
                LoRA belongs on it. `"refuse"`: an error.
            server: makes the LoRA ready for `"vllm"` (pads to a rank it serves), `"sglang"` or `"llama.cpp"`, and
                refuses what that server would refuse or skip. `None`: stock PEFT.
            overwrite: as of `export_merged`.
            calibration: as of `export_merged`.

        On a head or embedding that are tied to each other a kept tangent is right as an adapter, but stock PEFT's
        `merge_and_unload` adds it to the other one as well; a warning says so, and `head="merge"` has no such limit.

        Returns:
            What was written: rank, relative error, gap (warned of as by `export_merged`); it prints, with vLLM's
            flags, and has a `push_to_hub`.

        Raises:
            ValueError: for an empty mix, adapters that are disabled or merged, a rank that is none, an axis that keeps
                extra modules, a rank or a layer that the server does not take, `head="refuse"` with such a tangent, or
                `calibration` without tokens.
            FileExistsError: as of `export_merged`.
        """
        options = LoraOptions(rank, head, server, overwrite, calibration)
        return write_lora(self, Path(path).absolute(), chosen_mix(self, weights), options)
