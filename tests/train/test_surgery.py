"""PCGrad against TorchJD's, and planted cosines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchjd.aggregation import PCGrad

from tangent_peft.train.surgery import add_gradients, gradient_gram, gram_cosine, pcgrad_coefficients


def split(vector: Tensor) -> list[Tensor]:
    """A gradient of two parameters, from a vector of 6."""
    return [vector[:4].view(2, 2).clone(), vector[4:].clone()]


def projected(vectors: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """The first of some vectors off the others, by the functions under test."""
    gradients = [split(vector) for vector in vectors]
    coefficients = pcgrad_coefficients(gradient_gram(gradients), order)
    add_gradients(gradients[0], gradients[1:], coefficients[1:].tolist())
    return torch.cat([tensor.flatten() for tensor in gradients[0]])


@pytest.mark.parametrize("angle", [10.0, 60.0, 90.0, 100.0, 170.0])
def test_a_planted_angle(angle: float) -> None:
    first, second = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    first[0], radians = 3.0, math.radians(angle)
    second[0], second[5] = 2 * math.cos(radians), 2 * math.sin(radians)
    gram = gradient_gram([split(first), split(second)])
    assert gram_cosine(gram, 0, 1) == pytest.approx(math.cos(radians), abs=1e-12)
    found = projected([first, second], [1])
    if angle <= 90:
        torch.testing.assert_close(found, first)
    else:  # what is left is orthogonal, and as long as the side of a right triangle
        assert float(found @ second) == pytest.approx(0.0, abs=1e-12)
        assert float(found.norm()) == pytest.approx(3 * math.sin(radians))


@pytest.mark.parametrize("seed", range(5))
def test_two_objectives_as_torchjd(seed: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(2, 6, dtype=torch.float64)
    b = b - (1.0 + a @ b / (a @ a)) * a  # in conflict with a
    expected = PCGrad()(torch.stack([a, b]))  # the sum of both, each projected off the other
    torch.testing.assert_close(projected([a, b], [1]) + projected([b, a], [1]), expected)


@pytest.mark.parametrize("seed", range(5))
def test_three_objectives_as_torchjd_in_its_order(seed: int) -> None:
    torch.manual_seed(seed)
    vectors = list(torch.randn(3, 6, dtype=torch.float64))
    vectors[2] = vectors[2] - 2 * vectors[0] - vectors[1]
    torch.manual_seed(seed)
    expected = PCGrad()(torch.stack(vectors))
    torch.manual_seed(seed)
    total = torch.zeros(6, dtype=torch.float64)
    for first in range(3):
        drawn = [j for j in torch.randperm(3).tolist() if j != first]  # TorchJD draws one order per objective
        total += projected([vectors[first], *(vectors[j] for j in drawn)], [1, 2])
    torch.testing.assert_close(total, expected)


def test_the_order_matters_for_several() -> None:
    torch.manual_seed(0)
    vectors = list(torch.randn(3, 6, dtype=torch.float64))
    vectors[0] = -vectors[1] - vectors[2]
    found = [projected(vectors, order) for order in itertools.permutations([1, 2])]
    assert not torch.allclose(*found)


def test_a_zero_gradient_conflicts_with_none() -> None:
    first, zero = torch.randn(6), torch.zeros(6)
    torch.testing.assert_close(projected([first, zero], [1]), first)
    assert math.isnan(gram_cosine(gradient_gram([split(first), split(zero)]), 0, 1))
