"""ΔW as a product B·A: exactly where it is one, by SVD where it is dense or a smaller rank is wanted.

Knows no files and no LoRA. An energy share is cut as PEFT's `convert_to_lora` cuts it, with its function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from peft.tuners.lora.conversion import _find_cutoff_index
from torch import Tensor

from tangent_peft.tuner.weights import TangentFactors


DENSE_RANK = 16  # of a dense ΔW, where no rank is given

Rank: TypeAlias = int | float | None
Pair: TypeAlias = tuple[Tensor, Tensor]  # B (…, out, r) and A (…, r, in)


def check_rank(rank: Rank) -> None:
    """Raises a `ValueError` for what is neither a positive integer, a share between 0 and 1, nor `None`."""
    count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0.0 < rank < 1.0
    if not (rank is None or count or share):
        raise ValueError(
            "`rank` is a positive integer, a share of the energy ‖ΔW‖² between 0 and 1 such as 0.95, or None for the "
            f"rank of the mix; found {rank!r}."
        )


def shared_rank(layers: Iterable[TangentFactors], rank: Rank) -> int | None:
    """A rank for all layers in place of an energy share: the smallest at which each of them keeps that share.

    Servers differ in whether they follow a rank per layer, so one rank is used for all; see `pad`.
    """
    if not isinstance(rank, float):
        return rank
    kept = 1
    for factors in layers:
        s = torch.linalg.svdvals(_core(factors))
        for row in s.reshape(-1, s.shape[-1]):
            kept = max(kept, min(_find_cutoff_index(row, rank), len(row)))
    return kept


def decompose(factors: TangentFactors, rank: int | None, driver: str | None = None) -> Pair:
    """(B, A) with B·A = ΔW (…, out, in), of at most `rank` columns each; the best approximation of a higher rank.

    Args:
        factors: one layer's tangent.
        rank: `None`: its own, and `DENSE_RANK` of a dense one.
        driver: of cuSOLVER's SVD, for tensors on CUDA.
    """
    if factors.a is not None and factors.b is not None:
        own = factors.a.shape[-2]
        if rank is None or rank >= own:
            return factors.b, factors.a
        # ΔW = B·A with A = L·Q, so the singular values of B·L are those of ΔW.
        q = torch.linalg.qr(at_least_single(factors.a).mT)[0]
        u, s, vh = torch.linalg.svd(_core(factors), full_matrices=False, driver=driver)
        return u[..., :rank] * s[..., None, :rank], vh[..., :rank, :] @ q.mT
    dense = _core(factors)
    kept = min(DENSE_RANK if rank is None else rank, *dense.shape[-2:])
    u, s, vh = torch.linalg.svd(dense, full_matrices=False, driver=driver)
    return u[..., :kept] * s[..., None, :kept], vh[..., :kept, :]


def _core(factors: TangentFactors) -> Tensor:
    """A matrix with the singular values of ΔW: itself, or the small B·L of a product."""
    if factors.dense is not None:
        return at_least_single(factors.dense)
    assert factors.a is not None and factors.b is not None
    triangle = torch.linalg.qr(at_least_single(factors.a).mT, mode="r")[1]
    return at_least_single(factors.b) @ triangle.mT


def at_least_single(value: Tensor) -> Tensor:
    """In float32, where it is of half precision: torch decomposes no such matrices."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def pad(pair: Pair, rank: int) -> Pair:
    """The same product at a higher rank: zero columns of B, zero rows of A."""
    b, a = pair
    missing = rank - a.shape[-2]
    return (F.pad(b, (0, missing)), F.pad(a, (0, 0, 0, missing))) if missing else pair


def squared_errors(mixed: Mapping[str, TangentFactors], pairs: Mapping[str, Pair]) -> dict[str, tuple[float, float]]:
    """‖ΔW − B·A‖² and ‖ΔW‖² by layer, Frobenius; the first is 0 where the pair is the tangent's own."""
    errors = {}
    for name, factors in mixed.items():
        if factors.a is not None and pairs[name][1] is factors.a:
            errors[name] = (0.0, float(factors.square_norm()))
            continue
        delta = at_least_single(factors.product())
        b, a = pairs[name]
        errors[name] = (float((delta - b @ a).square().sum()), float(delta.square().sum()))
    return errors


def relative(missed: float, total: float) -> float:
    """‖ΔW − B·A‖ / ‖ΔW‖ from the squares; 0 for a tangent that is zero."""
    return (missed / total) ** 0.5 if total else 0.0
