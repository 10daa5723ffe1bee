"""KL and Jensen–Shannon divergence from logits, against scipy in float64, also where they are tiny."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr

from tangent_peft.diagnose.linearity import divergence
from tangent_peft.diagnose.linearity.divergence import jensen_shannon, kl


def logits(
    scale: float, dtype: torch.dtype = torch.float32, vocabulary: int = 5000
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of logits (3, V) that are `scale` apart, and shifted against each other by a constant."""
    generator = torch.Generator().manual_seed(0)
    first = 3 * torch.randn(3, 5000, generator=generator, dtype=torch.float64)
    second = first + scale * torch.randn(3, 5000, generator=generator, dtype=torch.float64) + 1.5 * scale
    return first.to(dtype), second.to(dtype)


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.05, 0.3, 1.0, 10.0, 60.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
def test_equals_scipy(scale: float, dtype: torch.dtype, tolerance: float) -> None:
    first, second = logits(scale, dtype)
    p, q = (np.exp(log_softmax(x.double().numpy(), axis=-1)) for x in (first, second))
    exact = np.maximum(rel_entr(p, q) - p + q, 0).sum(-1)  # of terms that do not cancel
    assert kl(first, second).numpy() == pytest.approx(exact, rel=tolerance)
    # scipy takes the root of a sum that cancels, so of tiny ones it knows less than what is tested
    middle = (p + q) / 2
    exact = (rel_entr(p, middle) - p + middle + rel_entr(q, middle) - q + middle).sum(-1) / 2
    assert jensen_shannon(first, second).numpy() == pytest.approx(exact, rel=tolerance)
    if scale > 1e-3:
        assert np.sqrt(jensen_shannon(first, second).numpy()) == pytest.approx(
            jensenshannon(p, q, axis=1), rel=tolerance
        )


def test_tiny_divergences_of_float32_logits() -> None:
    """Of 1e-9 nats to 1e-3, which log-probs in float32, subtracted and summed, get wrong by their own size."""
    first, second = logits(1e-4)
    exact = jensen_shannon(first.double(), second.double())
    assert float(exact.max()) < 2e-9
    assert jensen_shannon(first, second).numpy() == pytest.approx(exact.numpy(), rel=1e-3)
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    naive = (log_p.exp() * (log_p - log_q)).sum(-1)
    wrong = (naive.double() / kl(first.double(), second.double()) - 1).abs().max()
    assert float(wrong) > 1.0


def test_second_order() -> None:
    """KL ≈ Var_p(δ)/2 and JSD ≈ Var_p(δ)/8 of a small change δ of the logits."""
    first, second = logits(1e-4, torch.float64)
    p, change = first.softmax(-1), second - first
    variance = (p * change.square()).sum(-1) - (p * change).sum(-1).square()
    assert kl(first, second).numpy() == pytest.approx((variance / 2).numpy(), rel=1e-3)
    assert jensen_shannon(first, second).numpy() == pytest.approx((variance / 8).numpy(), rel=1e-3)


def test_bounds_and_zeros() -> None:
    one = torch.tensor([[0.0, 200.0], [3.0, 3.0]])
    other = torch.tensor([[200.0, 0.0], [5.0, 5.0]])
    assert jensen_shannon(one, other).tolist() == pytest.approx([math.log(2), 0.0])
    assert kl(one, other).tolist() == pytest.approx([200.0, 0.0])
    assert jensen_shannon(one, one).tolist() == [0.0, 0.0] and kl(one, one).tolist() == [0.0, 0.0]
    assert jensen_shannon(one.half(), other.half()).dtype == torch.float64
    assert kl(one[:0], other[:0]).shape == (0,)
    broken = torch.tensor([[math.nan, 0.0], [math.inf, 0.0]])
    assert kl(broken, other).isnan().all() and jensen_shannon(broken, other).isnan().all()


def test_tiles_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = logits(1.0)
    whole = kl(first, second), jensen_shannon(first, second)
    monkeypatch.setattr(divergence, "TILE_ENTRIES", 1)
    assert torch.equal(kl(first, second), whole[0]) and torch.equal(jensen_shannon(first, second), whole[1])
