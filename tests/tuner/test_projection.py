"""The shared projection: orthonormal rows, a function of seed and name alone, untouched by casts."""

from __future__ import annotations

import pytest
import torch
from cases import config, tangent_layers, tangent_model
from tolerances import TOLERANCE, assert_equal

from tangent_peft.tuner.projection import shared_projection


@pytest.mark.parametrize(("r", "size"), [(1, 1), (1, 9), (4, 32), (32, 32), (16, 300)])
def test_rows_are_orthonormal(r: int, size: int) -> None:
    a = shared_projection(0, "model.layers.0.mlp.up_proj", r, size)
    assert a.shape == (r, size) and a.dtype == torch.float32
    assert_equal(a @ a.mT, torch.eye(r))


def test_a_function_of_seed_and_name() -> None:
    first = shared_projection(0, "a", 4, 32)
    torch.manual_seed(123)
    assert torch.equal(first, shared_projection(0, "a", 4, 32))
    for other in (shared_projection(1, "a", 4, 32), shared_projection(0, "b", 4, 32)):
        assert (first - other).abs().max() > 0.1


def test_too_high_a_rank() -> None:
    with pytest.raises(ValueError, match=r"'a' has 3 input features.*r = 4.*rank_pattern"):
        shared_projection(0, "a", 4, 3)


def test_casting_the_model_does_not_round_it() -> None:
    model = tangent_model("llama", "shared")
    device = torch.device("cpu")
    before = [layer.projection("default", device).clone() for layer in tangent_layers(model)]
    model.half().float().bfloat16().double()
    assert all(
        torch.equal(layer.projection("default", device), a)
        for layer, a in zip(tangent_layers(model), before, strict=True)
    )
    assert not any("projection" in name for name in model.state_dict())


def test_axes_share_it_and_inner_products_survive() -> None:
    """⟨τ₁, τ₂⟩ = ⟨B₁, B₂⟩."""
    model = tangent_model("gpt2", "shared")
    model.add_adapter("other", config("shared"))
    for layer in tangent_layers(model):
        assert layer.tangent_projection["default"] is layer.tangent_projection["other"]
        left, right = (layer.delta(name, 1.0).detach().double() for name in ("default", "other"))
        b_left, b_right = (layer.tangent_B[name].weight.detach().double() for name in ("default", "other"))
        expected = (b_left * b_right).sum()
        scale = float(left.norm() * right.norm())
        assert float((left * right).sum()) == pytest.approx(float(expected), abs=TOLERANCE[torch.float32] * scale)


def test_two_models_agree() -> None:
    first, second = tangent_model("llama", "shared"), tangent_model("llama", "trained")
    for one, two in zip(tangent_layers(first), tangent_layers(second), strict=True):
        assert torch.equal(one.tangent_projection["default"], two.tangent_A["default"].weight)  # where A starts
