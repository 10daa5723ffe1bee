"""The profile of gap and KL, against torch.func over the unmodified network and against networks solved by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cases import deltas, in_float64, tangent_model
from conftest import TINY, batch, build, enlarge
from linear_toys import curvature, ids, toy
from oracle import linearized
from peft import PeftModel
from strong_axes import two_axes
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from tangent_peft.diagnose import linearity_gap, linearity_profile
from tangent_peft.diagnose.linearity import mix_logits
from tangent_peft.diagnose.prompts import TokenBatch


def kl(log_p: Tensor, log_q: Tensor) -> float:
    """Mean KL, written out."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    """A tiny Llama with one strong low-rank axis in float64."""
    model = tangent_model("llama", "shared", axis="help")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tangent_B" in name:
                parameter.mul_(3.0)
    return in_float64(model, monkeypatch)


@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_torch_func(exact: PeftModel, side: str) -> None:
    inputs = batch(side)
    real = inputs["attention_mask"].bool()
    change = deltas(exact)
    network = build("llama").double()
    base, linear = (x[real].detach() for x in linearized(network, change, **inputs))
    profile = linearity_profile(exact, [inputs], weights=[-0.5, 1.0, 0.0])
    for point in profile.points:
        moved = base + point.weight * (linear - base)
        with exact.axes(help=point.weight), exact.linearized(False), torch.no_grad():
            merged = exact(**inputs).logits[real]
        log_merged, log_linear, log_base = (x.log_softmax(-1) for x in (merged, moved, base))
        if not point.weight:
            assert point.gap == point.gap_log_probs == point.effect == 0.0
            assert max(point.kl, point.kl_linearized, point.kl_apart) == 0.0 and math.isnan(point.rounding)
            continue
        gap = float((merged - moved).norm() / (moved - base).norm())
        log_gap = float((log_merged - log_linear).norm() / (log_linear - log_base).norm())
        assert point.gap == pytest.approx(gap, rel=1e-6)
        assert point.gap_log_probs == pytest.approx(log_gap, rel=1e-6)
        assert point.effect == pytest.approx(float((moved - base).norm() / base.norm()), rel=1e-6)
        assert point.kl == pytest.approx(kl(log_merged, log_base), rel=1e-6)
        assert point.kl_linearized == pytest.approx(kl(log_linear, log_base), rel=1e-6)
        assert point.kl_apart == pytest.approx(kl(log_merged, log_linear), rel=1e-6)
    assert profile.tokens == int(real.sum()) and profile.dtype == "float64"


def test_is_the_linearity_gap_of_each_mix() -> None:
    """That of `linearity_gap`; the active mix is the same afterwards, and so is what trains."""
    model = two_axes(build("llama"))
    model.train()
    model.set_adapter("verb")
    trains = [parameter.requires_grad for parameter in model.parameters()]
    profile = linearity_profile(model, [batch("left"), batch("right")], weights=[-2.0, 1.0, 4.0])
    assert model.axis_weights == {"verb": 1.0} and model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert profile.axes == ["help", "verb"]
    for point in profile.points:
        if abs(point.weight) <= 3:
            with model.axes({point.axis: point.weight}):
                expected = linearity_gap(model, [batch("left"), batch("right")])
            assert point.gap == pytest.approx(expected.gap, rel=1e-4)
            assert point.effect == pytest.approx(expected.effect, rel=1e-4)


def test_a_network_of_second_degree() -> None:
    """gap(λ) = c |λ|, exactly."""
    model = toy(["first", "second"])
    profile = linearity_profile(model, [ids()], weights=[-3.0, -0.25, 0.01, 2.0])
    assert [p.gap for p in profile.points] == pytest.approx([abs(p.weight) * curvature(model) for p in profile.points])


def test_a_linear_network_has_no_gap() -> None:
    model = toy(["second"])
    profile = linearity_profile(model, [ids()], weights=[-3.0, 3.0])
    assert max(p.gap for p in profile.points) < 1e-12 and max(p.gap_log_probs for p in profile.points) < 1e-12
    assert max(p.kl_apart for p in profile.points) < 1e-20 and min(p.kl for p in profile.points) > 0
    assert [v.finding for v in profile.verdicts()] == ["fine"]


def test_positions_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that names its positions; rows run a few at a time, or in one batch, are the same."""
    model, inputs = two_axes(build("llama")), batch("right")
    keep = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    keep[0, 4:7] = keep[2, 2] = True
    named = linearity_profile(model, [TokenBatch(inputs, keep)], ["help"], [1.0])
    with torch.no_grad(), model.axes(help=1.0):
        linear = model(**inputs).logits[keep]
        with model.linearized(False):
            merged = model(**inputs).logits[keep]
    with torch.no_grad(), model.disable_adapter():
        base = model(**inputs).logits[keep]
    assert named.tokens == 4
    assert named.points[0].gap == pytest.approx(float((merged - linear).norm() / (linear - base).norm()), rel=1e-4)
    whole = linearity_profile(model, [inputs], ["help"], [1.0]).points[0]
    monkeypatch.setattr(mix_logits, "PART_ENTRIES", 1)
    alone = linearity_profile(model, [inputs], ["help"], [1.0]).points[0]
    for name in ("gap", "gap_log_probs", "effect", "kl", "kl_linearized", "kl_apart"):
        assert vars(alone)[name] == pytest.approx(vars(whole)[name], rel=1e-4)
    empty = TokenBatch({name: x[:1] for name, x in inputs.items()}, torch.zeros(1, 10, dtype=torch.bool))
    again = linearity_profile(model, [empty, TokenBatch(inputs, keep)], ["help"], [1.0])
    assert again.tokens == 4 and again.points[0].gap == pytest.approx(named.points[0].gap, rel=1e-4)


def test_rounding_is_told() -> None:
    """In bfloat16 a mix that does little is rounding, and the profile says so; in float32 it is not."""
    for dtype, findings in ((torch.float32, {"fine"}), (torch.bfloat16, {"unknown"})):
        model = tangent_model("llama", "shared", axis="help").to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "tangent_B" in name:
                    parameter.mul_(0.02)
        profile = linearity_profile(model, [batch()], weights=[-0.5, 0.5])
        assert {verdict.finding for verdict in profile.verdicts()} == findings, str(profile)
        assert ("rounding in bfloat16" in str(profile)) == (dtype == torch.bfloat16)


def test_an_axis_without_effect_and_one_without_numbers() -> None:
    model = tangent_model("llama", "dense", axis="help", init_weights=True)
    verdict = linearity_profile(model, [batch()], weights=[1.0]).verdicts()[0]
    assert verdict.finding == "unknown" and "changes no logit" in verdict.text
    model = tangent_model("llama", "dense", axis="help")
    profile = linearity_profile(model, [batch()], weights=[1.0, 1e38])
    assert "not finite at λ = 1e+38" in profile.verdicts()[0].text


def test_verdicts_table_files(tmp_path: Path) -> None:
    model = two_axes(build("llama"))
    profile = linearity_profile(model, [batch()], weights=[0.01, 1.0], limit=0.5)
    assert [verdict.finding for verdict in profile.verdicts()] == ["warning", "warning"]
    assert "over 0.5 at λ = 1" in str(profile) and "KL apart" in str(profile)
    profile.save(tmp_path / "profile.json")
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert saved["points"][1]["gap"] == profile.points[1].gap and saved["tokens"] == profile.tokens
    (picture,) = profile.plot(tmp_path / "figures")
    assert picture.stat().st_size > 1000 and picture.with_suffix(".svg").is_file()


def test_bad_input() -> None:
    model = two_axes(build("llama"))
    with pytest.raises(ValueError, match="Unknown axis 'kind'"):
        linearity_profile(model, [batch()], ["kind"])
    with pytest.raises(ValueError, match="finite numbers"):
        linearity_profile(model, [batch()], weights=[math.nan])
    with pytest.raises(ValueError, match="No λ are given"):
        linearity_profile(model, [batch()], weights=[])
    with pytest.raises(ValueError, match="No axes"):
        linearity_profile(model, [batch()], [])
    with pytest.raises(ValueError, match="hold no tokens"):
        linearity_profile(model, [])
    with pytest.raises(ValueError, match=r"`limit`.*-1"):
        linearity_profile(model, [batch()], limit=-1.0)
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        linearity_profile(build("llama"), [batch()])
    with model.disable_adapter(), pytest.raises(ValueError, match="Adapters are disabled"):
        linearity_profile(model, [batch()])


def capped_gemma() -> PeftModel:
    """A tiny Gemma 2 with two strong axes, whose logits are capped at 3."""
    options = {"head_dim": 8, "final_logit_softcapping": 3.0, "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    return two_axes(enlarge(Gemma2ForCausalLM(Gemma2Config(**TINY, num_hidden_layers=3, **options))))


def test_capped_logits() -> None:
    """c·tanh((f₀ + λJτ)/c) is not f₀ + λ times what it is at λ = 1: each λ is that of `linearity_gap`."""
    model = capped_gemma()
    for point in linearity_profile(model, [batch()], ["help"], [-2.0, 0.3, 2.0]).points:
        with model.axes(help=point.weight):
            expected = linearity_gap(model, [batch()])
        assert point.gap == pytest.approx(expected.gap, rel=1e-4)
        assert point.effect == pytest.approx(expected.effect, rel=1e-4)


def test_the_slope_is_not_rounded_away_in_bfloat16() -> None:
    """Jτ read off at λ = 1 is rounded to the size of f₀, and λ times that is what is missed at large λ."""
    model = tangent_model("llama", "shared", axis="help")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tangent_B" in name:
                parameter.mul_(0.1)
    (exact,) = linearity_profile(model, [batch()], weights=[3.0]).points
    (found,) = linearity_profile(model.to(torch.bfloat16), [batch()], weights=[3.0]).points
    with model.axes(help=3.0):
        direct = linearity_gap(model, [batch()]).gap
    assert exact.gap < found.gap < 1.02 * direct


def test_a_network_that_moves_where_the_linearized_model_does_not() -> None:
    """(W₁x)² at W₁ = 0: Jτ = 0, but the network is λ²(ΔW₁x)²."""
    model = toy(["first"], bend=torch.square)
    with torch.no_grad():
        model.get_base_model().first.get_base_layer().weight.zero_()
    profile = linearity_profile(model, [ids()], weights=[1.0])
    assert math.isinf(profile.points[0].gap) and profile.points[0].effect == 0.0
    assert profile.verdicts()[0].finding == "warning" and "network does change" in profile.verdicts()[0].text
