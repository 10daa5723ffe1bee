"""The linearized logits and their gradient against the oracle, for every model, form of τ, attention and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FORMS, config, deltas, in_float64, tangent_model
from conftest import batch, build
from oracle import gradient, linearized
from peft import get_peft_model
from tolerances import TOLERANCE, assert_equal, relative_error
from torch import Tensor

from tangent_peft import TangentConfig


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_and_gradient_equal_the_oracle(
    name: str, form: str, attention: str, side: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tangent_model(name, form)
    model.get_base_model().set_attn_implementation(attention)
    base = build(name)
    if dtype == torch.float64:
        base, model = in_float64(base, monkeypatch), model.double()
    inputs = batch(side)
    real = inputs["attention_mask"].bool()

    expected_base, expected = linearized(base, deltas(model), **inputs)
    logits = model(**inputs).logits
    assert_equal(logits[real], expected[real])
    # The part the axis adds, not hidden behind the larger f₀.
    assert relative_error((logits - expected_base)[real], (expected - expected_base)[real]) <= 10 * TOLERANCE[dtype]

    cotangent = torch.randn_like(logits) * real[..., None]
    logits.backward(cotangent)
    reference = gradient(base, deltas(model), cotangent, **inputs)
    for key, layer in model.get_base_model().named_modules():
        if f"{key}.weight" not in reference:
            continue
        full = reference[f"{key}.weight"]
        full = full.mT if type(layer).__name__ == "TangentConv1D" else full
        if form == "dense":
            assert_equal(layer.tangent_delta["default"].weight.grad, full)
            continue
        b, a = layer.tangent_B["default"].weight, layer.projection("default", full.device).to(dtype)
        assert_equal(b.grad, full @ a.mT)
        if form == "trained":
            assert_equal(layer.tangent_A["default"].weight.grad, b.detach().mT @ full)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_primal_is_the_base_bit_for_bit(name: str) -> None:
    inputs = batch("left")
    expected = build(name)(**inputs).logits
    model = tangent_model(name, "dense")
    with model.axes(default=0.0):
        assert torch.equal(model(**inputs).logits, expected)
    with model.axes({}):
        assert torch.equal(model(**inputs).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)


def test_a_new_axis_starts_at_the_base() -> None:
    inputs = batch("right")
    base = build("llama")
    expected = base(**inputs).logits
    model = get_peft_model(base, TangentConfig(task_type="CAUSAL_LM", num_layers=2)).eval()
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("form", FORMS)
def test_linear_in_tau(form: str) -> None:
    model = tangent_model("llama", form)
    model.add_adapter("other", config(form, num_layers=3))
    inputs = batch("left")
    real = inputs["attention_mask"].bool()

    def effect(**weights: float) -> Tensor:
        with model.axes(weights), torch.no_grad():
            return (model(**inputs).logits - base)[real]

    with model.disable_adapter(), torch.no_grad():
        base = model(**inputs).logits
    assert_equal(effect(default=0.7, other=-1.3), 0.7 * effect(default=1) - 1.3 * effect(other=1))


def test_halving_tau_quarters_the_gap() -> None:
    """f(θ₀ + sτ) − f_lin(sτ) is of second order in s."""
    model = tangent_model("llama", "dense").double()
    inputs = batch("right")
    gaps = []
    for scale in (1e-2, 5e-3):
        with model.axes(default=scale), torch.no_grad():
            linear = model(**inputs).logits
            with model.linearized(False):
                gaps.append(float((model(**inputs).logits - linear).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.05)


def test_adjoint_identity() -> None:
    """⟨g, Jτ⟩ = ⟨τ, Jᵀg⟩."""
    model = tangent_model("qwen3", "dense")
    inputs = batch("left")
    logits = model(**inputs).logits
    with model.disable_adapter(), torch.no_grad():
        effect = logits.detach() - model(**inputs).logits
    real = inputs["attention_mask"][..., None]
    cotangent = torch.randn_like(logits) * real
    logits.backward(cotangent)
    tangents = [p for name, p in model.named_parameters() if "tangent_" in name]
    right = sum((p.detach() * p.grad).sum() for p in tangents)
    assert float((cotangent * effect).sum()) == pytest.approx(float(right), rel=1e-4)


def test_loss_is_the_cross_entropy_of_the_linearized_logits() -> None:
    model = tangent_model("llama", "dense")
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].reshape(-1, output.logits.shape[-1]), labels[:, 1:].reshape(-1)
    )
    assert_equal(output.loss, expected)
    output.loss.backward()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "train"])
def test_contexts_change_nothing(mode: str) -> None:
    model = tangent_model("llama", "dense")
    inputs = batch("left")
    expected = model(**inputs).logits
    if mode == "train":
        assert_equal(model.train()(**inputs).logits, expected)
        return
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]():
        found = model(**inputs).logits
    assert_equal(found, expected)


def test_autocast_and_half_precision() -> None:
    model = tangent_model("llama", "shared")
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[real]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**inputs).logits[real]
        logits.float().sum().backward()
    assert relative_error(logits, expected) <= TOLERANCE[torch.bfloat16]
    half = build("llama").to(torch.bfloat16)
    half = get_peft_model(half, TangentConfig(task_type="CAUSAL_LM", num_layers=2, **FORMS["shared"])).eval()
    half.load_state_dict(model.state_dict(), strict=False)
    tangents = [p for name, p in half.named_parameters() if "tangent_" in name]
    assert {p.dtype for p in tangents} == {torch.float32}
    assert relative_error(half(**inputs).logits[real], expected) <= 2 * TOLERANCE[torch.bfloat16]


def test_layers_below_the_first_tangent_run_no_derivative() -> None:
    from tangent_peft.forward import current_pass, split

    model = tangent_model("llama", "dense", num_layers=1)
    seen = {}

    def look(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            assert current_pass() is not None
            hidden = output[0] if isinstance(output, tuple) else output
            seen[index] = split(hidden)[1] is not None

        return hook

    for index, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_hook(look(index))
    model(**batch())
    assert seen == {0: False, 1: False, 2: True}


def test_trainable_module_below_the_tangent() -> None:
    """`modules_to_save` trains a weight through primal and tangent alike: the full second-order gradient is exact."""
    base = build("llama").double()
    model = get_peft_model(
        base, TangentConfig(num_layers=2, init_weights=False, modules_to_save=["model.norm"], task_type="CAUSAL_LM")
    ).double()
    inputs = batch("right")
    weight = model.get_base_model().model.norm.modules_to_save["default"].weight
    model(**inputs).logits.square().mean().backward()
    step, direction = 1e-6, torch.randn_like(weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            values.append(model(**inputs).logits.square().mean())
            weight.sub_(sign * step * direction)
    numeric = float(values[0] - values[1]) / (2 * step)
    assert float((weight.grad * direction).sum()) == pytest.approx(numeric, rel=1e-4)


def test_any_module() -> None:
    """Without a transformers model the tangent ends at the root's output."""
    network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    model = get_peft_model(network, TangentConfig(target_modules=["0", "2"], init_weights=False)).double()
    layers = model.get_base_model()
    tangents = {f"{i}.weight": layers[int(i)].get_delta_weight("default").detach() for i in "02"}
    tangents |= {f"{i}.bias": torch.zeros_like(weights[f"{i}.bias"]) for i in "02"}
    clean = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    value, tangent = torch.func.jvp(
        lambda w: torch.func.functional_call(clean, w, (x,)), (weights,), ({k: tangents[k] for k in weights},)
    )
    assert_equal(model(x), value + tangent)
