"""The geometry of axes against ΔW formed in the test: inner products, norms, cosines, projections off other axes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from cases import FORMS, config, in_float64, logits, tangent_layers, tangent_model
from conftest import batch, build
from moe import build_moe
from oracle import linearized
from peft import PeftModel, get_peft_model
from tolerances import TOLERANCE, assert_equal
from torch import Tensor

from tangent_peft import TangentConfig
from tangent_peft.tuner import axis_gram, axis_inner, axis_norm, weights
from tangent_peft.tuner.weights import TangentFactors


INPUTS = batch("left")
DOUBLE = TOLERANCE[torch.float64]
AXES: dict[str, TangentConfig] = {
    "shared": config("shared"),
    "twin": config("shared"),
    "rank 2": config("shared", r=2),
    "seed 7": config("shared", projection_seed=7),
    "one block": config("shared", num_layers=1, lm_head=False),
    "trained": config("trained"),
    "dense": config("dense"),
    "dense, q": config("dense", target_modules=["q_proj"], lm_head=False),
}


def all_axes(name: str = "llama") -> PeftModel:
    """One axis of every kind, each with its own random τ."""
    first, *others = AXES
    model = get_peft_model(build(name), copy.deepcopy(AXES[first]), adapter_name=first).eval()
    for other in others:
        model.add_adapter(other, copy.deepcopy(AXES[other]))
    return model


def family(kind: str) -> PeftModel:
    """Axes `shared`, `trained` and `dense` on experts, on an embedding with its padding, and on Conv1D."""
    base = build_moe("qwen3_moe") if kind == "experts" else build("gpt2" if kind == "conv1d" else "llama")
    options: dict[str, Any] = {
        "experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
        "conv1d": {},
    }[kind]
    model = get_peft_model(base, config("shared", **options), adapter_name="shared").eval()
    for other in ("trained", "dense"):
        model.add_adapter(other, config(other, **options))
    return model


def tau(model: PeftModel, axis: str) -> Tensor:
    """All entries of ΔW as one vector in float64; zero at layers that the axis does not wrap."""
    parts = []
    for layer in tangent_layers(model):
        shape = (*layer.leading, layer.out_features, layer.in_features)
        delta = torch.zeros(shape, dtype=torch.float64)
        if axis in layer.tangent_delta:
            delta += layer.tangent_delta[axis].weight.detach()
        elif axis in layer.tangent_B:
            a = layer.projection(axis, delta.device).detach().double()
            delta += layer.tangent_B[axis].weight.detach().double() @ a
        parts.append(delta.flatten())
    return torch.cat(parts)


def gram_of(model: PeftModel, names: list[str]) -> Tensor:
    vectors = torch.stack([tau(model, name) for name in names])
    return vectors @ vectors.T


# ---- inner products ------------------------------------------------------------------------------------------------


def test_inner_products_of_every_pair_of_forms() -> None:
    model = all_axes()
    names = list(AXES)
    expected = gram_of(model, names)
    found = model.axis_gram()
    assert found.dtype == torch.float64 and found.shape == (len(names), len(names))
    assert_equal(found, expected, DOUBLE)
    assert torch.equal(found, found.T)
    for (i, first), (j, second) in itertools.product(enumerate(names), repeat=2):
        inner = model.axis_inner(first, second)
        assert inner == pytest.approx(float(expected[i, j]), abs=DOUBLE * float(expected.abs().max()))
        assert axis_inner(model, second, first) == pytest.approx(inner, rel=1e-9)
        assert abs(inner) <= model.axis_norm(first) * model.axis_norm(second) * (1 + 1e-12)
    assert [axis_norm(model, name) ** 2 for name in names] == pytest.approx(expected.diagonal().tolist(), rel=DOUBLE)
    cosines = axis_gram(model, ["dense", "shared"], cosine=True)
    assert cosines.diagonal().tolist() == pytest.approx([1.0, 1.0])
    inner = model.axis_inner("dense", "shared") / model.axis_norm("dense") / model.axis_norm("shared")
    assert float(cosines[0, 1]) == pytest.approx(inner)


@pytest.mark.parametrize("kind", ["experts", "embedding", "conv1d"])
def test_inner_products_on_other_layers(kind: str) -> None:
    model = family(kind)
    names = ["shared", "trained", "dense"]
    assert_equal(model.axis_gram(names), gram_of(model, names), DOUBLE)


def test_of_one_shared_projection_it_is_that_of_b() -> None:
    model = all_axes()
    pairs = [
        [layer.tangent_B[axis].weight.detach().double() for axis in ("shared", "twin")]
        for layer in tangent_layers(model)
    ]
    expected = sum(float((first * second).sum()) for first, second in pairs)
    scale = model.axis_norm("shared") * model.axis_norm("twin")
    assert model.axis_inner("shared", "twin") == pytest.approx(expected, abs=scale * TOLERANCE[torch.float32])


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_the_inner_product_is_bilinear(first: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = tangent_model("llama", first, axis="one").double()
    model.add_adapter("two", config("shared"))
    model.add_adapter("three", config("dense", num_layers=1))
    model = model.double()
    s, t = torch.randn(2).tolist()
    model.combine_axes({"one": s, "two": t}, "mix")
    expected = s * model.axis_inner("one", "three") + t * model.axis_inner("two", "three")
    scale = model.axis_norm("mix") * model.axis_norm("three")
    assert model.axis_inner("mix", "three") == pytest.approx(expected, abs=DOUBLE * scale)
    model.combine_axes({"one": s}, "scaled")
    assert model.axis_norm("scaled") == pytest.approx(abs(s) * model.axis_norm("one"), rel=DOUBLE)


def test_layers_that_only_one_axis_wraps_add_nothing() -> None:
    model = tangent_model("llama", "dense", axis="q", target_modules=["q_proj"], lm_head=False)
    model.add_adapter("k", config("shared", target_modules=["k_proj"], lm_head=False))
    assert model.axis_inner("q", "k") == 0.0
    weights = model.orthogonalize_axis("q", "k", "rest")
    assert weights == {"q": 1.0, "k": 0.0}


def test_large_layers_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("experts")
    expected = model.axis_gram()
    monkeypatch.setattr(weights, "DOUBLE_ENTRIES", 1000)
    assert_equal(model.axis_gram(), expected, 1e-14)
    x = TangentFactors(dense=torch.randn(5, 3))
    assert float(x.square_norm()) == pytest.approx(float(x.dense.double().square().sum()), rel=1e-14)


def test_it_is_of_the_axes_whatever_is_active() -> None:
    model = all_axes()
    expected = model.axis_gram()
    model.combine_axes({"shared": 2.0, "dense": -0.5})
    assert torch.equal(model.axis_gram(), expected)
    with model.disable_adapter(), model.linearized(False):
        assert torch.equal(model.axis_gram(), expected)


def test_in_half_precision_it_is_that_of_what_is_stored() -> None:
    model = all_axes().bfloat16()
    names = ["shared", "trained", "dense"]
    parts = []
    for name in names:
        deltas = []
        for layer in tangent_layers(model):
            factors = layer.factors(name, 1.0)
            low = factors.dense is None
            deltas.append((factors.b.double() @ factors.a.double() if low else factors.dense.double()).flatten())
        parts.append(torch.cat(deltas).detach())
    expected = torch.stack(parts) @ torch.stack(parts).T
    assert_equal(model.axis_gram(names), expected, DOUBLE)


# ---- projections -----------------------------------------------------------------------------------------------------


def dependent_model(form: str) -> PeftModel:
    """Axes that overlap: three = four + 0.8 one − 0.5 two, stored in float64."""
    model = tangent_model("llama", form, axis="one")
    model.add_adapter("two", config("shared" if form == "shared" else "dense", num_layers=1))
    model.add_adapter("four", config(form))
    model = model.double()
    model.combine_axes({"one": 0.8, "two": -0.5, "four": 1.0}, "three")
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("against", [["one"], ["one", "two"], ["two", "one"], "two"])
def test_what_is_left_is_orthogonal(form: str, against: Any) -> None:
    model = dependent_model(form)
    others = [against] if isinstance(against, str) else against
    weights = model.orthogonalize_axis("three", against, "rest")
    assert list(weights) == ["three", *others] and weights["three"] == 1.0
    for other in others:
        scale = model.axis_norm("three") * model.axis_norm(other)
        assert abs(model.axis_inner("rest", other)) <= DOUBLE * scale
        assert abs(model.axis_inner("three", other)) > 0.05 * scale
    # By least squares on the vectors themselves.
    matrix = torch.stack([tau(model, other) for other in others], dim=1)
    solution = torch.linalg.lstsq(matrix, tau(model, "three")[:, None]).solution[:, 0]
    assert [-weights[other] for other in others] == pytest.approx(solution.tolist(), rel=1e-7, abs=1e-9)
    assert_equal(tau(model, "rest"), tau(model, "three") - matrix @ solution, DOUBLE)
    removed = model.axis_norm("three") ** 2 - model.axis_norm("rest") ** 2
    assert removed == pytest.approx(float((matrix @ solution).square().sum()), rel=1e-7)
    assert model.axis_weights == {"one": 1.0}
    if form == "shared":
        assert all(layer.tangent_r["rest"] in (4, None) for layer in tangent_layers(model) if "rest" in layer.tangent_r)
        assert model.peft_config["rest"].projection == "shared"


@pytest.mark.parametrize("kind", ["experts", "embedding", "conv1d"])
def test_projections_on_other_layers(kind: str) -> None:
    model = family(kind)
    model.combine_axes({"shared": 1.0, "trained": 0.5, "dense": 0.3}, "mix")
    model.orthogonalize_axis("mix", ["shared", "dense"], "rest")
    for other in ("shared", "dense"):
        scale = model.axis_norm("mix") * model.axis_norm(other)
        assert abs(model.axis_inner("rest", other)) <= TOLERANCE[torch.float32] * scale
        assert abs(model.axis_inner("mix", other)) > 0.05 * scale


def test_the_effect_of_what_is_left_is_the_mix_of_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """f_lin is linear in τ, so f_lin(rest) − f₀ = f_lin(three) − f₀ − Σ cⱼ (f_lin(τⱼ) − f₀), each by the oracle."""
    model = in_float64(dependent_model("shared"), monkeypatch)
    weights = model.orthogonalize_axis("three", ["one", "two"], "rest")
    base = build("llama").double()
    total: Any = 0.0
    for name, weight in weights.items():
        parts = {
            layer.weight_name: layer._layout(layer.delta(name, 1.0)).detach()
            for layer in tangent_layers(model)
            if name in layer.tangent_r
        }
        f0, f = linearized(base, parts, **INPUTS)
        total = total + weight * (f - f0)
    model.set_adapter("rest")
    real = INPUTS["attention_mask"].bool()
    assert_equal(logits(model, **INPUTS)[real], (f0 + total)[real])


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_unknown_axes_and_names_given_twice() -> None:
    model = all_axes()
    with pytest.raises(ValueError, match=r"Unknown axis 'nobody'.*dense"):
        model.axis_norm("nobody")
    with pytest.raises(ValueError, match=r"Unknown axis 'nobody'"):
        model.axis_inner("dense", "nobody")
    with pytest.raises(ValueError, match=r"Unknown axis 'nobody'"):
        model.orthogonalize_axis("dense", ["nobody"], "rest")
    for against in ([], ["dense"], ["shared", "shared"], ["shared", "dense"]):
        with pytest.raises(ValueError, match="axes other than 'dense' itself"):
            model.orthogonalize_axis("dense", against, "rest")
    with pytest.raises(ValueError, match="'twin' exists already"):
        model.orthogonalize_axis("dense", "shared", "twin")
    assert list(model.peft_config) == list(AXES)


def test_axes_that_are_linearly_dependent_are_named() -> None:
    model = all_axes()
    model.combine_axes({"shared": 0.5, "dense": -1.0}, "mix")
    with pytest.raises(ValueError, match=r"Axes \['shared', 'dense', 'mix'\] are linearly dependent"):
        model.orthogonalize_axis("trained", ["shared", "twin", "dense", "mix"], "rest")
    with pytest.raises(ValueError, match=r"'mix' lies in the span of \['shared', 'dense'\]"):
        model.orthogonalize_axis("mix", ["shared", "dense"], "rest")
    model.combine_axes({"shared": -2.0}, "opposite")
    with pytest.raises(ValueError, match=r"'opposite' lies in the span"):
        model.orthogonalize_axis("opposite", "shared", "rest")
    assert "rest" not in model.peft_config


def test_an_axis_that_is_zero_has_no_direction() -> None:
    model = all_axes()
    model.add_adapter("new", TangentConfig(task_type="CAUSAL_LM", r=4))
    assert model.axis_norm("new") == 0.0 and model.axis_inner("new", "dense") == 0.0
    with pytest.raises(ValueError, match=r"Axes \['new'\] have τ = 0"):
        model.axis_gram(cosine=True)
    for name, against in (("new", "dense"), ("dense", ["shared", "new"])):
        with pytest.raises(ValueError, match=r"Axes \['new'\] have τ = 0"):
            model.orthogonalize_axis(name, against, "rest")


def test_a_tangent_that_is_not_finite() -> None:
    model = all_axes()
    tangent_layers(model)[-1].tangent_B["twin"].weight.data[0, 0] = float("nan")
    assert model.axis_inner("shared", "dense") != 0.0
    assert model.axis_norm("twin") != model.axis_norm("twin")
    with pytest.raises(ValueError, match=r"Axis 'twin' has a tangent with NaN"):
        model.axis_inner("shared", "twin")
    with pytest.raises(ValueError, match=r"Axis 'twin' has a tangent with NaN.*lm_head"):
        model.orthogonalize_axis("shared", "twin", "rest")
    with pytest.raises(ValueError, match=r"Axis 'twin' has a tangent with NaN.*lm_head"):
        model.combine_axes({"shared": 1.0, "twin": 1.0}, "mix")
    assert list(model.peft_config) == list(AXES)
