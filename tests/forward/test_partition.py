"""The log-sum-exp of many mixes against the plain sum in float64, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tangent_peft.forward import partition
from tangent_peft.forward.partition import log_partition


V, N = 6000, 5
TOLERANCE = 5e-6


def _logits(axes: int, rate: float = 0.7, dtype: torch.dtype = torch.float32, tokens: int = N) -> Tensor:
    """As a language model's: few entries near the largest, and rates that differ more for some entries."""
    z = torch.randn(tokens, axes + 1, V, dtype=torch.float64)
    z[:, 0] = z[:, 0] * 3.0 - 4.0 * torch.rand(tokens, V, dtype=torch.float64)
    z[:, 1:] *= rate * (1 + (torch.rand(tokens, 1, V, dtype=torch.float64) > 0.99))
    z[:, 0, 0] = z[:, 0].amax(1) + 2.0
    return z.to(dtype)


def _mixes(points: int, axes: int, reach: float = 3.0) -> Tensor:
    return (torch.rand(points, axes, dtype=torch.float64) * 2 - 1) * reach


def _expected(z: Tensor, mixes: Tensor) -> Tensor:
    logits = z[:, 0].double() + torch.einsum("mk,nkv->mnv", mixes, z[:, 1:].double())
    return logits.logsumexp(-1)


@pytest.mark.parametrize(("axes", "points"), [(1, 300), (2, 100), (2, 500), (3, 1500), (4, 40)])
@pytest.mark.parametrize("reach", [0.5, 3.0])
def test_equals_the_plain_sum(axes: int, points: int, reach: float) -> None:
    z, mixes = _logits(axes), _mixes(points, axes, reach)
    found = log_partition(z, mixes, TOLERANCE)
    assert found.values.dtype == torch.float64
    assert (found.values - _expected(z, mixes)).abs().max() < TOLERANCE
    assert found.deviation < TOLERANCE
    if axes < 4:
        assert found.plain < 0.2 * len(mixes) * N, "most of it is interpolated"
    else:
        assert found.plain == len(mixes) * N


def test_tokens_that_miss_the_tolerance_are_refined() -> None:
    z = _logits(2)
    z[1, 1:] *= 6.0  # the tail changes hands all over the box
    mixes = _mixes(1000, 2)
    found = log_partition(z, mixes, TOLERANCE)
    assert (found.values - _expected(z, mixes)).abs().max() < 2 * TOLERANCE  # float32 of logits beyond 50
    exact = log_partition(z.double(), mixes[:200], 1e-12)
    assert (exact.values - _expected(z, mixes[:200])).abs().max() < 1e-11


@pytest.mark.parametrize("size", [40.0, 300.0])
def test_logits_beyond_the_range_of_float32(size: float) -> None:
    z = _logits(2, rate=0.3)
    z[0, 1, :50] += size  # e^{3·size} has no float32
    z[2, 2, 7] -= size
    mixes = _mixes(200, 2)
    found = log_partition(z, mixes, TOLERANCE)
    expected = _expected(z, mixes)
    assert found.values.isfinite().all()
    assert ((found.values - expected).abs() / expected.abs().clamp(min=10)).max() < 1e-6


def test_a_rough_tail_is_never_accepted() -> None:
    """Many entries at almost one height, whose rates point everywhere: no head to speak of."""
    z = torch.zeros(1, 3, 50_000)
    z[0, 1:] = torch.randn(2, 50_000) * 2.5
    mixes = _mixes(400, 2)
    found = log_partition(z, mixes, TOLERANCE)
    assert (found.values - _expected(z, mixes)).abs().max() < TOLERANCE


def test_axes_that_do_not_vary_and_mixes_that_coincide() -> None:
    z, mixes = _logits(2), _mixes(400, 2)
    mixes[:, 1] = -0.7
    found = log_partition(z, mixes, TOLERANCE)
    assert (found.values - _expected(z, mixes)).abs().max() < TOLERANCE
    assert found.plain == 0
    same = torch.full((300, 2), 0.3, dtype=torch.float64)
    assert (log_partition(z, same, TOLERANCE).values - _expected(z, same)).abs().max() < TOLERANCE


def test_a_small_vocabulary_and_few_mixes_are_summed_plainly() -> None:
    z, mixes = _logits(2), _mixes(1000, 2)
    few = log_partition(z, mixes[:3], TOLERANCE)
    small = log_partition(z[..., :500], mixes, TOLERANCE)
    assert few.plain == 3 * N and small.plain == 1000 * N
    assert (small.values - _expected(z[..., :500], mixes)).abs().max() < TOLERANCE


def test_soft_capped_logits_are_summed_plainly() -> None:
    z, mixes = _logits(2), _mixes(300, 2)
    found = log_partition(z, mixes, TOLERANCE, softcap=5.0)
    logits = z[:, 0].double() + torch.einsum("mk,nkv->mnv", mixes, z[:, 1:].double())
    assert (found.values - (5.0 * torch.tanh(logits / 5.0)).logsumexp(-1)).abs().max() < TOLERANCE
    assert found.plain == 300 * N


def test_values_that_are_not_finite_come_through() -> None:
    z, mixes = _logits(2), _mixes(300, 2)
    z[1, 1, 3] = math.nan
    found = log_partition(z, mixes, TOLERANCE).values
    assert found[:, 1].isnan().all()
    assert found[:, [0, 2, 3, 4]].isfinite().all()


class Allocations(TorchDispatchMode):
    """The size in entries of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_memory_does_not_grow_with_the_mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "BLOCK_CPU", 2**14)
    z = _logits(2)
    sizes = []
    for points in (300, 3000):
        with Allocations() as counted:
            log_partition(z, _mixes(points, 2), TOLERANCE)
        sizes.append(counted.largest)
    assert sizes[0] < 24**2 * V, sizes  # nothing is of the size of the vocabulary at every point of the grid
    assert sizes[1] < 3000 * 24**2 + 1, sizes  # the interpolation matrix (M, J); and no (M, N, V), which has 9e7


def test_the_grid_interpolates_exactly_what_it_can() -> None:
    """A polynomial of the grid's degree, at λ on and between its points."""
    mixes = _mixes(50, 2, 1.5)
    box = partition._Box.around(mixes)
    grid = partition._Grid(box, 8, mixes)

    def polynomial(x: Tensor) -> Tensor:
        return (x[:, 0] ** 5 - x[:, 0] * x[:, 1] ** 4 + 0.3)[None]

    values = polynomial(grid.offsets)
    found = values @ grid.interpolation.mT
    assert (found - polynomial(mixes - box.middle)).abs().max() < 1e-12
    assert grid.remainder(polynomial(grid.offsets * 0))[0] < 1e-12 < grid.remainder(values)[0]


@pytest.mark.parametrize("axes", [1, 2])
def test_heavy_tails_are_estimated_honestly(axes: int) -> None:
    """In float64, so that all of the error is that of the interpolation: it converges slowly here."""
    ranks = torch.arange(1, 7001, dtype=torch.float64).log().expand(3, 1, -1)
    z = torch.cat([-0.5 * ranks, 0.4 * torch.distributions.StudentT(3.7).sample((3, axes, 7000)).double()], 1)
    mixes = _mixes(300, axes, 2.9)
    found = log_partition(z, mixes, TOLERANCE)
    assert (found.values - _expected(z, mixes)).abs().max() < TOLERANCE
