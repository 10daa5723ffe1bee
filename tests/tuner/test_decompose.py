"""ΔW as B·A: against torch's SVD of ΔW itself, and against PEFT's own conversion to LoRA."""

from __future__ import annotations

import pytest
import torch
from cases import tangent_layers, tangent_model
from peft.tuners.lora.conversion import convert_to_lora
from tolerances import assert_equal
from torch import Tensor

from tangent_peft.tuner.decompose import check_rank, decompose, pad, relative, shared_rank, squared_errors
from tangent_peft.tuner.weights import TangentFactors


def factors(form: str, experts: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> TangentFactors:
    """ΔW (…, 12, 9): dense, or of rank 5."""
    if form == "dense":
        return TangentFactors(dense=torch.randn(*experts, 12, 9, dtype=dtype))
    return TangentFactors(b=torch.randn(*experts, 12, 5, dtype=dtype), a=torch.randn(5, 9, dtype=dtype))


@pytest.mark.parametrize("experts", [(), (3,)], ids=["layer", "experts"])
@pytest.mark.parametrize("rank", [1, 4, 5, 9, 20, None])
@pytest.mark.parametrize("form", ["dense", "low rank"])
def test_best_of_its_rank(form: str, rank: int | None, experts: tuple[int, ...]) -> None:
    """Eckart and Young: no product of this rank is closer than the truncated SVD of ΔW."""
    tangent = factors(form, experts)
    b, a = decompose(tangent, rank)
    kept = a.shape[-2]
    assert kept == min(16 if rank is None else rank, 9 if form == "dense" else 5)
    s = torch.linalg.svdvals(tangent.product())
    missed, total = squared_errors({"x": tangent}, {"x": (b, a)})["x"]
    assert missed == pytest.approx(float(s[..., kept:].square().sum()), rel=1e-9, abs=1e-18)
    assert total == pytest.approx(float(s.square().sum()), rel=1e-9)
    assert relative(missed, total) == pytest.approx((missed / total) ** 0.5)


def test_own_factors_are_kept_bit_for_bit() -> None:
    tangent = factors("low rank")
    assert decompose(tangent, None) == (tangent.b, tangent.a) == decompose(tangent, 7)
    assert squared_errors({"x": tangent}, {"x": decompose(tangent, None)})["x"][0] == 0.0
    assert relative(0.0, 0.0) == 0.0


@pytest.mark.parametrize("experts", [(), (3,)], ids=["layer", "experts"])
def test_padding_changes_nothing(experts: tuple[int, ...]) -> None:
    b, a = pad(decompose(factors("dense", experts), 4), 7)
    assert b.shape[-1] == a.shape[-2] == 7
    product = b[..., :4] @ a[..., :4, :]
    assert torch.equal(b @ a, product) or torch.allclose(b @ a, product, rtol=0, atol=1e-15)
    assert not b[..., 4:].any() and not a[..., 4:, :].any()


@pytest.mark.parametrize("form", ["dense", "low rank"])
def test_half_precision(form: str) -> None:
    """torch decomposes no half-precision matrices."""
    tangent = factors(form, dtype=torch.bfloat16)
    b, a = decompose(tangent, 2)
    assert b.dtype == torch.float32 and a.dtype == torch.float32


@pytest.mark.parametrize("share", [0.2, 0.7, 0.95])
@pytest.mark.parametrize("form", ["dense", "shared"])
def test_energy_is_cut_where_peft_cuts_it(form: str, share: float) -> None:
    """PEFT takes a rank for each layer, we take the highest of them for all."""
    model = tangent_model("qwen3", form)
    config, _ = convert_to_lora(model, share)
    tangents = [layer.factors("default", 1.0) for layer in tangent_layers(model)]
    with torch.no_grad():
        found = shared_rank(tangents, share)
    assert found == max([config.r, *config.rank_pattern.values()])
    for name, kept in config.rank_pattern.items():
        layer = next(layer for layer in tangent_layers(model) if layer.layer_name == name)
        with torch.no_grad():
            assert shared_rank([layer.factors("default", 1.0)], share) == kept


def test_products_are_those_of_peft() -> None:
    model = tangent_model("gpt2", "dense")
    _, state = convert_to_lora(model, 3)
    for layer in tangent_layers(model):
        with torch.no_grad():
            b, a = decompose(layer.factors("default", 1.0), 3)
        theirs: Tensor = (
            state[f"base_model.model.{layer.layer_name}.lora_B.weight"]
            @ state[f"base_model.model.{layer.layer_name}.lora_A.weight"]
        )
        assert_equal(b @ a, theirs, 1e-4)  # two SVDs in float32


def test_a_rank_is_no_share() -> None:
    assert shared_rank([factors("dense")], 4) == 4 and shared_rank([factors("dense")], None) is None
    assert shared_rank([TangentFactors(dense=torch.zeros(4, 4))], 0.9) == 1
    for rank in (None, 1, 512, 0.01, 0.99):
        check_rank(rank)
