"""Every mix from one pass per axis, against running the linearized model at each mix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import config, tangent_model
from conftest import batch, build, make_llama
from peft import PeftModel, get_peft_model
from tolerances import assert_equal
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from tangent_peft import TangentConfig
from tangent_peft.evaluate import axis_logprobs
from tangent_peft.forward.trunk import Trunk


MIXES = [{}, {"left": 1.0}, {"left": -0.5, "right": 2.0}, {"right": -3.0}]
TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def _two_axes(model: nn.Module, left: TangentConfig, right: TangentConfig) -> PeftModel:
    torch.manual_seed(1)
    wrapped = get_peft_model(model, left, adapter_name="left")
    wrapped.add_adapter("right", right)
    return wrapped.eval()


def _labeled(side: str = "right") -> dict[str, Tensor]:
    """A padded batch whose first three real tokens of each row are the prompt."""
    inputs = batch(side)
    places = inputs["attention_mask"].cumsum(1) * inputs["attention_mask"]
    return {**inputs, "labels": inputs["input_ids"].masked_fill(places <= 3, -100)}


@torch.no_grad()
def _by_running(model: PeftModel, inputs: dict[str, Tensor], mix: dict[str, float]) -> Tensor:
    """log π (B, T−1) of the labels, 0 elsewhere, by a forward of the linearized model."""
    labels = inputs["labels"][:, 1:]
    with model.axes(mix), model.linearized():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(labels == -100, 0.0)


def _check(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    scores = axis_logprobs(model, inputs)
    assert scores.axes == ("left", "right")
    expected = torch.stack([_by_running(model, inputs, mix) for mix in MIXES])
    assert_equal(scores.logps(MIXES).float(), expected.sum(2))
    mask = inputs["labels"][:, 1:] != -100
    assert_equal(scores.token_logps(MIXES).float(), expected[:, mask])
    assert scores.lengths.tolist() == mask.sum(1).tolist()
    assert_equal(scores.reference().float(), expected[0].sum(1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_equals_running_the_model(name: str, side: str) -> None:
    model = _two_axes(build(name), config("dense"), config("shared", lm_head=False))
    model.combine_axes({"left": 0.3})
    _check(model, _labeled(side))
    assert model.axis_weights == {"left": 0.3}


@pytest.mark.parametrize(("left", "right"), [("trained", "shared"), ("shared", "shared")])
def test_axes_on_different_layers(left: str, right: str) -> None:
    model = _two_axes(build("llama"), config(left, num_layers=1, lm_head=False), config(right, num_layers=2))
    _check(model, _labeled())


def test_axes_on_the_head_alone_and_on_all_layers() -> None:
    head = config("shared", target_modules=["lm_head"])
    _check(_two_axes(build("llama"), head, config("dense", num_layers=None)), _labeled())


def test_soft_cap() -> None:
    torch.manual_seed(0)
    base = Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=2.0))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(5.0)
    _check(_two_axes(base.eval(), config("dense"), config("shared")), _labeled())


def test_logits_that_are_scaled() -> None:
    torch.manual_seed(0)
    base = GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=0.25)).eval()
    _check(_two_axes(base, config("dense"), config("shared")), _labeled())


def test_a_large_vocabulary_and_many_mixes() -> None:
    """Where log-sum-exps are interpolated."""
    torch.manual_seed(0)
    options = {**TINY, "vocab_size": 8000}
    base = type(make_llama())(type(make_llama().config)(**options)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    model = _two_axes(base, config("shared"), config("shared"))
    inputs = _labeled()
    scores = axis_logprobs(model, inputs)
    mixes = (torch.rand(400, 2, dtype=torch.float64) * 2 - 1) * 3
    found = scores.score(mixes)
    assert found.plain < 0.5
    for index in (0, 100, 399):
        expected = _by_running(model, inputs, dict(zip(scores.axes, mixes[index].tolist(), strict=True))).sum(1)
        assert_equal(found.logps[index].float(), expected)
    exact = scores.logps(mixes[:20])  # so few are summed plainly
    assert_equal(found.logps[:20], exact, 1e-6)


def test_several_batches_and_a_completion_mask() -> None:
    model = _two_axes(build("llama"), config("dense"), config("shared"))
    inputs = _labeled()
    whole = axis_logprobs(model, inputs).logps(MIXES)
    masked = {name: x for name, x in inputs.items() if name != "labels"}
    masked["completion_mask"] = (inputs["labels"] != -100).long()

    def rows() -> Iterator[dict[str, Tensor]]:
        for row in range(3):
            yield {name: x[row : row + 1] for name, x in masked.items()}
        yield {**{name: x[:1] for name, x in masked.items()}, "completion_mask": torch.zeros(1, 10)}

    found = axis_logprobs(model, rows())
    assert found.lengths.tolist()[3] == 0
    assert_equal(found.logps(MIXES)[:, :3], whole, 1e-6)
    assert (found.logps(MIXES)[:, 3] == 0).all()


def test_axes_and_mixes_by_name() -> None:
    model = _two_axes(build("llama"), config("dense"), config("shared"))
    scores = axis_logprobs(model, _labeled(), axes=["right"])
    assert scores.axes == ("right",) and "right" in str(scores)
    assert_equal(scores.logps([{"right": 0.5}]), scores.logps(torch.tensor([[0.5]])), 0.0)
    assert_equal(scores.logps([[0.5]]), scores.derivatives({"right": 0.5}).value[None], 1e-6)


def test_derivatives_of_rows_are_those_of_their_log_probs() -> None:
    model = _two_axes(build("llama").double(), config("dense"), config("shared"))
    scores = axis_logprobs(model, _labeled())
    at, step = torch.tensor([0.4, -0.7], dtype=torch.float64), 1e-4
    moved = torch.eye(2, dtype=torch.float64) * step
    found = scores.derivatives(at)
    assert_equal(found.value, scores.logps(at[None])[0])
    slope = (scores.logps(at + moved) - scores.logps(at - moved)) / (2 * step)  # (K, B)
    assert_equal(found.gradient, slope.mT, 1e-6)
    bend = [(scores.derivatives(at + x).gradient - scores.derivatives(at - x).gradient) / (2 * step) for x in moved]
    assert_equal(found.hessian, torch.stack(bend, 2), 1e-6)


def test_the_trunk_runs_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _two_axes(build("llama"), config("dense"), config("shared"))
    calls = []
    original = Trunk.hidden_states
    monkeypatch.setattr(Trunk, "hidden_states", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    inputs = _labeled()
    axis_logprobs(model, inputs)
    probes = len(calls)
    calls.clear()
    axis_logprobs(model, [inputs] * 4)
    assert len(calls) == probes + 3


def test_weights_that_change_are_noticed() -> None:
    model = _two_axes(build("llama"), config("dense"), config("shared"))
    scores = axis_logprobs(model, _labeled())
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head").tangent_B["right"].weight.add_(1.0)
    with pytest.raises(ValueError, match="have changed"):
        scores.logps(MIXES)


def test_an_axis_that_is_not_linearized_is_scored_linearized() -> None:
    model = _two_axes(build("llama"), config("dense", linearize=False), config("shared", linearize=False))
    _check(model, _labeled())


class TestBadInput:
    def test_axes(self) -> None:
        model, inputs = _two_axes(build("llama"), config("dense"), config("shared")), _labeled()
        for axes, message in (
            (["up"], "Unknown axis 'up'"),
            ([], "No axes"),
            (["left", "left"], r"\['left'\] are named more than once"),
        ):
            with pytest.raises(ValueError, match=message):
                axis_logprobs(model, inputs, axes)
        with pytest.raises(TypeError, match="TangentConfig"):
            axis_logprobs(build("llama"), inputs)
        merged = tangent_model(lm_head=False)
        merged.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            axis_logprobs(merged, inputs)

    def test_batches(self) -> None:
        model, inputs = tangent_model(), _labeled()
        ids = inputs["input_ids"]
        for batches, message in (
            ([], "No token"),
            ({**inputs, "labels": torch.full_like(ids, -100)}, "No token"),
            ({"input_ids": ids}, "do not say what to score"),
            ({"labels": ids}, "no `input_ids`"),
            ({**inputs, "labels": ids[:, :4]}, r"labels \(3, 4\)"),
            ({**inputs, "labels": ids + 300}, "the head knows 0 to 299"),
        ):
            with pytest.raises(ValueError, match=message):
                axis_logprobs(model, batches)

    def test_mixes(self) -> None:
        scores = axis_logprobs(tangent_model(), _labeled())
        for mixes, message in (
            ([{"up": 1.0}], r"\['up'\]"),
            (torch.zeros(2, 3), r"\(2, 3\), expected \(M, 1\)"),
            (torch.zeros(0, 1), r"\(0, 1\)"),
            ([{"default": float("nan")}], "Mix 0"),
        ):
            with pytest.raises(ValueError, match=message):
                scores.logps(mixes)

    def test_models_whose_logits_are_something_else(self) -> None:
        model = tangent_model()
        head = model.get_submodule("base_model.model.lm_head")
        handle = head.register_forward_hook(lambda module, args, output: output * 1.5)
        with pytest.raises(TypeError, match="are not s·"):
            axis_logprobs(model, _labeled())
        handle.remove()
        axis_logprobs(model, _labeled())

    def test_saved_modules(self) -> None:
        model = tangent_model(modules_to_save=["norm"])
        with pytest.raises(ValueError, match="keeps its own copy"):
            axis_logprobs(model, _labeled())
