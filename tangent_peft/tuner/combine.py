"""LoRA's `add_weighted_adapter` for axes: every combination type acts on ΔW itself, never on factors.

linear                                   Σ wᵢ ΔWᵢ, exact, in the forms that `stored.py` tells
cat                                      the same ΔW, with the factors of all axes side by side
svd                                      the best approximation of the same ΔW at rank `svd_rank`
ties, dare_ties, dare_linear,            `peft.utils.merge_utils` on the ΔWᵢ of each layer: dense
magnitude_prune
the same with _svd                       its best approximation at rank `svd_rank`

Signs and magnitudes of the entries of ΔW = B·A are not those of the entries of B. Pruning B, as PEFT's LoRA does,
prunes something else; what is pruned here is ΔW, also for axes that share one projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties
from torch import Tensor

from tangent_peft.tuner.axes import check_weights, tangent_layers
from tangent_peft.tuner.decompose import decompose
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.stored import add_axis, check_sources, common_seed, concatenated, summed
from tangent_peft.tuner.weights import TangentFactors


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs

CombinationType = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
MajoritySign = Literal["total", "frequency"]
SVD_DRIVERS = ("gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True)
class Combination:
    """How ΔWᵢ become one ΔW; the arguments of `add_weighted_adapter` that say so.

    Raises:
        ValueError: for an unknown type, a value out of range, one that is missing, or one that the type does not use.
    """

    kind: CombinationType
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: MajoritySign = "total"

    def __post_init__(self) -> None:
        if self.kind not in get_args(CombinationType):
            raise ValueError(f"`combination_type` is one of {list(get_args(CombinationType))}, found {self.kind!r}.")
        if self.majority_sign_method not in get_args(MajoritySign):
            found = self.majority_sign_method
            raise ValueError(f"`majority_sign_method` is one of {list(get_args(MajoritySign))}, found {found!r}.")
        if self.prunes and not (_is_number(self.density) and 0.0 < self.density <= 1.0):  # type: ignore[operator]
            raise ValueError(
                f"combination_type={self.kind!r} needs `density`, the share of entries of each ΔW to keep, above 0 and "
                f"at most 1; found {self.density!r}."
            )
        if self.svd_rank is not None and (type(self.svd_rank) is not int or self.svd_rank < 1):
            raise ValueError(
                f"`svd_rank` is a positive integer, or None for the largest rank of the axes; found {self.svd_rank!r}."
            )
        if self.svd_clamp is not None and not (_is_number(self.svd_clamp) and 0.0 < self.svd_clamp <= 1.0):
            raise ValueError(f"`svd_clamp` is a quantile above 0 and at most 1, or None; found {self.svd_clamp!r}.")
        if self.svd_driver is not None and self.svd_driver not in SVD_DRIVERS:
            raise ValueError(f"`svd_driver` is one of {list(SVD_DRIVERS)}, or None; found {self.svd_driver!r}.")
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        unused = [] if self.decomposes else ["svd_rank", "svd_clamp", "svd_driver"]
        unused += [] if self.prunes else ["density"]
        given: dict[str, object] = {name: vars(self)[name] for name in unused if vars(self)[name] is not None}
        if self.majority_sign_method != "total" and not self.elects:
            given["majority_sign_method"] = self.majority_sign_method
        if given:
            raise ValueError(
                f"combination_type={self.kind!r} does not use {given}. Leave that out, or choose a type that does: "
                "'…svd' has a rank; 'ties', 'dare_…' and 'magnitude_prune' a density; 'ties' and 'dare_ties' elect "
                "signs."
            )

    @property
    def rule(self) -> str:
        """The type without its decomposition."""
        return self.kind.removesuffix("_svd")

    @property
    def decomposes(self) -> bool:
        """Whether the result is brought to a rank by an SVD."""
        return self.kind.endswith("svd")

    @property
    def prunes(self) -> bool:
        """Whether entries of the ΔWᵢ are left out."""
        return self.rule not in ("linear", "cat", "svd")

    @property
    def elects(self) -> bool:
        """Whether a majority sign is elected."""
        return self.rule.endswith("ties")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def add_weighted(
    tuner: AxisVerbs, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, how: Combination
) -> None:
    """Adds the combination of axes as a new axis; see `AxisVerbs.add_weighted_adapter`."""
    chosen = check_weights(tuner, _by_name(adapters, weights))
    check_sources(tuner, list(chosen), adapter_name)
    with torch.no_grad():
        tangents, seed = _combined(tuner, chosen, how)
    add_axis(tuner, adapter_name, tangents, list(chosen), seed)


def _combined(
    tuner: AxisVerbs, weights: Mapping[str, float], how: Combination
) -> tuple[dict[str, TangentFactors], int | None]:
    """ΔW by layer name, and the seed of the shared projection that its factors have in common, if they do."""
    seed = None if how.prunes or how.kind == "cat" else common_seed(tuner, weights)
    rank = _rank(tuner, weights, how) if how.decomposes else None
    tangents = {}
    for layer, present in _present(tuner, weights):
        full = _at_layer(layer, present, how)
        tangents[layer.layer_name] = full if rank is None else truncated(full, rank, how)
        if tangents[layer.layer_name] is not full:
            seed = None  # its A is another one
    return tangents, seed


def _at_layer(layer: TangentLayer, weights: Mapping[str, float], how: Combination) -> TangentFactors:
    if how.prunes:
        return _merged(layer, weights, how)
    return concatenated(layer, weights) if how.kind == "cat" else summed(layer, weights)


def _by_name(adapters: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    if isinstance(adapters, str) or isinstance(weights, (str, Mapping)):
        raise ValueError(f"`adapters` and `weights` are lists, found {adapters!r} and {weights!r}.")
    names, values = list(adapters), list(weights)
    if len(names) != len(values):
        raise ValueError(
            f"{len(names)} axes {names} and {len(values)} weights {values}: give one weight for each axis."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Axes {twice} are named twice in `adapters={names}`. Give each one the sum of its weights.")
    return dict(zip(names, values, strict=True))


def _present(tuner: AxisVerbs, weights: Mapping[str, float]) -> list[tuple[TangentLayer, dict[str, float]]]:
    """The layers that carry one of the axes, with the weights of those they carry."""
    found = []
    for layer in tangent_layers(tuner.model):
        present = {name: weight for name, weight in weights.items() if name in layer.tangent_r}
        if present:
            found.append((layer, present))
    return found


def _merged(layer: TangentLayer, weights: Mapping[str, float], how: Combination) -> TangentFactors:
    """The rule of `merge_utils` on the ΔWᵢ of one layer; of fused experts, on all of them together.

    An axis that does not wrap the layer has ΔW = 0 there, which no rule counts: it is left out.
    """
    deltas = [layer.delta(name, 1.0) for name in weights]
    dtype = reduce(torch.promote_types, (delta.dtype for delta in deltas), torch.float32)
    deltas = [delta.to(dtype) for delta in deltas]
    scales = torch.tensor(list(weights.values()), dtype=dtype, device=deltas[0].device)
    density = float(how.density)  # type: ignore[arg-type]  # checked
    if how.rule in ("ties", "magnitude_prune") and int(density * deltas[0].numel()) < 1:
        raise ValueError(
            f"density={density} keeps none of the {deltas[0].numel()} entries of layer {layer.layer_name!r}, whose "
            "tangent would be lost. Raise `density`."
        )
    if how.rule == "ties":
        return TangentFactors(dense=ties(deltas, scales, density, how.majority_sign_method))
    if how.rule == "dare_ties":
        return TangentFactors(dense=dare_ties(deltas, scales, density, how.majority_sign_method))
    rule = {"dare_linear": dare_linear, "magnitude_prune": magnitude_prune}[how.rule]
    return TangentFactors(dense=rule(deltas, scales, density))


# ---- truncation ------------------------------------------------------------------------------------------------------


def _rank(tuner: AxisVerbs, weights: Mapping[str, float], how: Combination) -> int:
    """The rank asked for, or the largest of the axes.

    Raises:
        ValueError: if it is above the size of a layer, or not given for dense axes.
    """
    layers = _present(tuner, weights)
    if how.svd_rank is None:
        ranks = [layer.tangent_r[name] for layer, present in layers for name in present]
        known = [r for r in ranks if r is not None]
        if len(known) < len(ranks):
            dense = [name for name in weights if tuner.peft_config[name].r is None]
            raise ValueError(f"Axes {dense} are dense and give no rank. Name one: `svd_rank=16`, for example.")
        return max(known)
    for layer, _ in layers:
        if how.svd_rank > min(layer.in_features, layer.out_features):
            raise ValueError(
                f"svd_rank={how.svd_rank} is above the rank that a matrix of layer {layer.layer_name!r} can have, "
                f"({layer.out_features}, {layer.in_features}). Lower it."
            )
    return how.svd_rank


def truncated(factors: TangentFactors, rank: int, how: Combination) -> TangentFactors:
    """The best approximation of ΔW of at most `rank` (Eckart and Young); of fused experts, of each one.

    Factors of that rank or less are returned as they are, unless they are to be clamped.
    """
    if how.svd_driver is not None and (device := factors.device).type != "cuda":
        raise ValueError(
            f"svd_driver={how.svd_driver!r} is a choice of cuSOLVER's, for tensors on CUDA; these are on {device}. "
            "Leave it out."
        )
    if how.svd_clamp is not None:  # of the singular vectors
        return _clamped(*decompose(TangentFactors(dense=factors.product()), rank, how.svd_driver), how.svd_clamp)
    if factors.a is not None and factors.a.shape[-2] <= rank:
        return factors
    b, a = decompose(factors, rank, how.svd_driver)
    return TangentFactors(b=b, a=a)


def _clamped(b: Tensor, a: Tensor, quantile: float) -> TangentFactors:
    """Clamped as LoRA's are: to ± that quantile of the entries of both factors."""
    entries = torch.cat([b.flatten(), a.flatten()]).cpu().numpy()  # torch.quantile takes 2²⁴ entries at most
    bound = float(np.quantile(entries, quantile))
    if not math.isfinite(bound) or bound <= 0.0:
        raise ValueError(
            f"svd_clamp={quantile}: that quantile of the factors' entries is {bound:.3g}, and clamping to it would "
            "leave nothing. Choose one nearer to 1, such as 0.99."
        )
    return TangentFactors(b=b.clamp(-bound, bound), a=a.clamp(-bound, bound))
