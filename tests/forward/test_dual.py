"""Opening and closing the level: what is refused, what is left behind, what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import config, logits, tangent_model
from conftest import batch, build, make_llama
from peft import get_peft_model
from tolerances import assert_equal
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import LlamaForSequenceClassification

from tangent_peft import TangentConfig
from tangent_peft.forward import LinearizedForward, current_pass, level, split
from tangent_peft.tuner.rows import RowForward


INPUTS = batch("right")


def works(model: nn.Module, expected: Tensor) -> None:
    """The model is in order: no pass, no level, no leftover."""
    assert current_pass() is None
    with forward_ad.dual_level():
        pass  # raises if one is open
    assert torch.equal(logits(model, **INPUTS), expected)


def test_a_surrounding_level_is_refused() -> None:
    model = tangent_model()
    expected = logits(model, **INPUTS)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=r"linearized\(False\)"):
            model(**INPUTS)
        with model.linearized(False):
            model(**INPUTS)
        with model.disable_adapter():
            model(**INPUTS)
    works(model, expected)


def test_a_linearized_model_inside_another() -> None:
    outer, inner = tangent_model("llama"), tangent_model("gpt2")
    expected = logits(outer, **INPUTS)
    handle = outer.get_base_model().model.layers[0].register_forward_hook(lambda *_: inner(**INPUTS) and None)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM is running and calls GPT2LMHeadModel"):
        outer(**INPUTS)
    with inner.linearized(False):
        assert torch.equal(logits(outer, **INPUTS), expected)
    handle.remove()
    works(outer, expected)
    logits(inner, **INPUTS)


def test_a_part_of_the_model_is_refused() -> None:
    model = tangent_model()
    expected = logits(model, **INPUTS)
    backbone = model.get_base_model().model
    with pytest.raises(RuntimeError, match=r"whole model.*linearized\(False\)"):
        backbone(**INPUTS)
    with model.disable_adapter():
        assert torch.equal(backbone(**INPUTS).last_hidden_state, build("llama").model(**INPUTS).last_hidden_state)
    works(model, expected)


@pytest.mark.parametrize("where", ["model.layers.0", "model.layers.2", "model.norm", "lm_head", ""])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_leaves_no_level_open(where: str, error: type[BaseException]) -> None:
    model = tangent_model()
    expected = logits(model, **INPUTS)

    def fail(*_: Any) -> None:
        raise error

    handle = model.get_base_model().get_submodule(where).register_forward_hook(fail)
    with pytest.raises(error):
        model(**INPUTS)
    handle.remove()
    if error is KeyboardInterrupt:  # PyTorch runs no hooks after it; the next call of any wrapped model tidies up
        with model.disable_adapter():
            assert torch.equal(logits(model, **INPUTS), logits(build("llama"), **INPUTS))
    works(model, expected)
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_an_interrupted_model_does_not_disturb_another() -> None:
    broken, model = tangent_model("llama"), tangent_model("gpt2")
    expected = logits(model, **INPUTS)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    broken.get_base_model().model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        broken(**INPUTS)
    assert torch.equal(logits(model, **INPUTS), expected)
    assert broken.get_base_model().config._attn_implementation == "sdpa"


def test_an_interrupt_leaves_the_modes_of_autograd_alone() -> None:
    model = tangent_model()
    expected = logits(model, **INPUTS)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().model.norm.register_forward_hook(interrupt)
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        model(**INPUTS)
    handle.remove()
    assert model(**INPUTS).logits.requires_grad
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    works(model, expected)


def test_a_forward_that_waits_for_another_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level, "TURN_TIMEOUT_S", 0.2)
    outer, inner = tangent_model("llama"), tangent_model("gpt2")
    expected, found = logits(outer, **INPUTS), []

    def meanwhile(*_: Any) -> None:
        with ThreadPoolExecutor(1, "other") as pool:
            found.append(pool.submit(inner, **INPUTS).exception())

    handle = outer.get_base_model().model.layers[1].register_forward_hook(meanwhile)
    assert torch.equal(logits(outer, **INPUTS), expected)
    assert isinstance(found[0], RuntimeError)
    assert "'other_0' calls the linearized GPT2LMHeadModel while thread 'MainThread'" in str(found[0])
    handle.remove()
    works(outer, expected)


def test_threads_take_turns() -> None:
    first, second = tangent_model("llama"), tangent_model("gpt2")
    expected = {model: logits(model, **INPUTS) for model in (first, second)}
    with ThreadPoolExecutor(3) as pool:
        calls = [(model, pool.submit(logits, model, **INPUTS)) for model in (first, first, second) * 6]
    assert all(torch.equal(call.result(), expected[model]) for model, call in calls)
    works(first, expected[first])


def test_a_thread_without_tangents_does_not_wait() -> None:
    """Nor does it see the pass: its key/value cache stays an ordinary one."""
    model, base, found = tangent_model("llama"), build("gpt2"), []
    expected, plain = logits(model, **INPUTS), logits(base, **INPUTS)

    def meanwhile(*_: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(base, **INPUTS, use_cache=True).result())

    handle = model.get_base_model().model.layers[1].register_forward_hook(meanwhile)
    assert torch.equal(logits(model, **INPUTS), expected)
    handle.remove()
    assert torch.equal(found[0].logits, plain)
    assert "tangent_mix" not in vars(found[0].past_key_values)


def test_a_waiting_thread_closes_an_interrupted_pass() -> None:
    broken, model = tangent_model("llama"), tangent_model("gpt2")
    expected = logits(model, **INPUTS)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    broken.get_base_model().model.norm.register_forward_hook(interrupt)
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        broken(**INPUTS)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model, **INPUTS).result(), expected)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# ---- compiled code -----------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_layers_run_as_they_are_written() -> None:
    model = tangent_model()
    expected = logits(model, **INPUTS)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager")
    works(model, expected)
    with model.disable_adapter():
        assert_equal(logits(model, **INPUTS), logits(build("llama"), **INPUTS))


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("what", ["model", "call"])
def test_a_compiled_root_is_refused(what: str) -> None:
    model = tangent_model()
    expected = logits(model, **INPUTS)
    base = model.get_base_model()
    compiled: Any = torch.compile(model if what == "model" else base.__call__, backend="eager")
    with torch.no_grad():
        with model.disable_adapter():  # the compiled base must not serve the axis later
            assert_equal(compiled(**INPUTS).logits, logits(build("llama"), **INPUTS))
        with pytest.raises(RuntimeError, match=r"LlamaForCausalLM.*torch\.compile.*disable_compile"):
            compiled(**INPUTS)
    works(model, expected)


def test_bad_arguments_leave_no_level_open() -> None:
    model = tangent_model()
    expected = logits(model, **INPUTS)
    for wrong in ({"input_ids": torch.full((1, 3), 10**6)}, {"nonsense": 1}, {}):
        with pytest.raises((IndexError, TypeError, ValueError)):
            model(**wrong)
        works(model, expected)


def test_linearized_and_additive_axes_do_not_mix() -> None:
    model = tangent_model("llama")
    model.add_adapter("additive", config(linearize=False))
    other = tangent_model("llama", num_layers=1)
    other.add_adapter("additive", config(linearize=False, layers_to_transform=[0], lm_head=False))
    for mixed in (model, other):  # at one layer, and at different ones
        with mixed.axes(default=1.0, additive=1.0):
            with pytest.raises(ValueError, match=r"linearize.*linearized\(False\)"):
                mixed(**INPUTS)
            for flag in (False, True):
                with mixed.linearized(flag):
                    mixed(**INPUTS)
        assert current_pass() is None
        with mixed.axes(default=1.0, additive=0.0):  # at λ = 0 there is nothing to mix
            mixed(**INPUTS)


# ---- what comes out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tuple_output(name: str) -> None:
    model = tangent_model(name)
    expected = model(**INPUTS)
    found = model(**INPUTS, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], expected.logits)
    labels = INPUTS["input_ids"]
    assert torch.equal(model(**INPUTS, labels=labels, return_dict=False)[0], model(**INPUTS, labels=labels).loss)


def plain_tensors(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return split(tree)[1] is None
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return all(plain_tensors(value) for value in values)


@pytest.mark.parametrize("lm_head", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_hidden_states_are_plain_and_linear(name: str, lm_head: bool) -> None:
    model = tangent_model(name, lm_head=lm_head)
    states = []
    for weight in (0.0, 1.0, -2.0):
        with model.axes(default=weight), torch.no_grad():
            output = model(**INPUTS, output_hidden_states=True)
        assert plain_tensors(output)
        states.append(output.hidden_states)
    assert len(states[0]) == 4
    for index, (base, one, two) in enumerate(zip(*states, strict=True)):
        if index < 2:  # below the first tangent
            assert torch.equal(base, one) and torch.equal(base, two)
        else:
            assert_equal(two - base, -2 * (one - base), 1e-4)  # a difference of rounded values


def test_hidden_states_are_those_of_the_pass() -> None:
    """The joined last hidden state through the head without a tangent is the joined logits."""
    model = tangent_model("qwen3", lm_head=False)
    output = model(**INPUTS, output_hidden_states=True)
    head = model.get_base_model().lm_head
    assert_equal(head(output.hidden_states[-1]), output.logits)


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    settings = make_llama().config
    settings.num_labels = 3
    return LlamaForSequenceClassification(settings).eval()


def test_sequence_classification() -> None:
    model = get_peft_model(classifier(), TangentConfig(task_type="SEQ_CLS", init_weights=False, num_layers=2))
    labels = torch.tensor([0, 2, 1])
    output = model(**INPUTS, labels=labels)
    assert_equal(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    output.loss.backward()
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in name for name in training)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in training.values())


def test_classification_equals_the_expansion() -> None:
    """Of the second order in the size of τ: logits(θ₀ + sτ) − f_lin(sτ)."""
    model = get_peft_model(
        classifier().double(), TangentConfig(task_type="SEQ_CLS", init_weights=False, num_layers=2)
    ).eval()
    model.double()
    gaps = []
    for factor in (1e-2, 0.5):  # of τ itself: the trained score has no λ
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "tangent_" in name:
                    parameter.mul_(factor)
        linear = logits(model, **INPUTS)
        with model.base_model.linearized(False):
            gaps.append(float((logits(model, **INPUTS) - linear).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.1)


class Nested(nn.Module):
    """Returns its result at several depths."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.linear(x)
        pair = torch.max(y, dim=-1)  # a named tuple
        return {"a": (y, [y * 2, {"b": y.tanh()}]), "c": pair, "d": 3, "e": None, "f": y.argmax(-1)}


def test_nested_output() -> None:
    network, x = Nested(), torch.randn(5, 4)
    weight, bias = network.linear.weight.detach().clone(), network.linear.bias.detach().clone()
    model = get_peft_model(network, TangentConfig(target_modules=["linear"], init_weights=False))
    tau = model.get_base_model().linear.get_delta_weight("default").detach()
    found = model(x)
    base, change = x @ weight.T + bias, x @ tau.T
    assert plain_tensors(found)
    assert_equal(found["a"][0], base + change)
    assert_equal(found["a"][1][0], 2 * (base + change))
    assert_equal(found["a"][1][1]["b"], base.tanh() + (1 - base.tanh() ** 2) * change)
    index = base.argmax(-1, keepdim=True)
    assert_equal(found["c"].values, (base + change).gather(-1, index)[:, 0])
    assert torch.equal(found["c"].indices, index[:, 0]) and found["d"] == 3 and found["e"] is None


def test_a_loss_of_the_module_itself_is_refused() -> None:
    """Computed on dual values it would be the linearized loss, not the loss of the linearized logits."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.linear(x)
            return {"loss": y.square().mean(), "logits": y}

    model = get_peft_model(WithLoss(), TangentConfig(target_modules=["linear"], init_weights=False))
    with pytest.raises(NotImplementedError, match="without labels"):
        model(torch.randn(5, 4))
    assert current_pass() is None


def test_hooks_are_installed_once() -> None:
    model = tangent_model()
    model.add_adapter("other", config())
    base = model.get_base_model()
    assert len(base._forward_pre_hooks) == len(base._forward_hooks) == 2  # the pass, and the rows of its batch
    for kind in (LinearizedForward, RowForward):
        installed = kind.installed(base)
        assert installed is not None
        installed.remove()
        assert kind.installed(base) is None
    assert not base._forward_pre_hooks and not base._forward_hooks
