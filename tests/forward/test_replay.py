"""The replayed gradient against the recorded one (itself held to the oracle) and against the oracle, in every mode."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from cases import FORMS, in_float64, logits, tangent_layers, tangent_model
from conftest import batch
from peft import PeftModel, get_peft_model
from tolerances import assert_equal
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tangent_peft import TangentConfig
from tangent_peft.forward import LinearizedForward


def trained(name: str = "llama", form: str = "dense", mode: str = "recorded", **options: Any) -> PeftModel:
    """A tiny model in train mode without dropout; `mode` says how the gradient is computed."""
    torch.manual_seed(3)
    chosen = "auto" if mode.startswith("checkpoint") else mode
    model = tangent_model(name, form, gradient=chosen, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if mode.startswith("checkpoint"):
        kwargs = {"use_reentrant": mode == "checkpoint-reentrant"}
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model.train()


def gradients(model: PeftModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The logits and the gradient of every parameter that trains, for a fixed random cotangent."""
    real = inputs["attention_mask"].bool()
    logits = model(**inputs).logits[real]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    logits.backward(weight)
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


MODES = ["replay", "checkpoint", "checkpoint-reentrant"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_replayed_equals_recorded(
    name: str, form: str, mode: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {**batch("left"), "use_cache": False}
    found = {}
    for chosen in ("recorded", mode):
        model = in_float64(trained(name, form, chosen), monkeypatch)
        model.get_base_model().set_attn_implementation(attention)
        found[chosen] = gradients(model, inputs)
    assert found["recorded"].keys() == found[mode].keys()
    for key, expected in found["recorded"].items():
        assert_equal(found[mode][key], expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_gradients_the_tangents_stay(name: str, mode: str) -> None:
    """Torch's reentrant kind would drop them."""
    inputs = {**batch("left"), "use_cache": False}
    real = inputs["attention_mask"].bool()
    model = trained(name, "dense", mode)
    expected = logits(model.eval(), **inputs)[real]
    assert_equal(logits(model.train(), **inputs)[real], expected)
    with model.linearized(False):  # the host's own checkpointing
        model(**inputs).logits[real].sum().backward()
    assert_equal(logits(model, **inputs)[real], expected)


def test_replay_keeps_what_enters_a_block_only() -> None:
    """Bytes that autograd holds for the blocks: (T, D) each, recorded several times as much."""
    held = {}
    inputs = {**batch("right"), "use_cache": False}
    for mode in ("recorded", "replay"):
        model, found = trained("llama", "shared", mode, lm_head=False), {}
        parameters = {p.data_ptr() for p in model.parameters()}

        def pack(x: Tensor, found: dict[int, int] = found, parameters: set[int] = parameters) -> Tensor:
            if x.data_ptr() not in parameters:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**inputs)
        held[mode] = sum(found.values())
    assert held["replay"] < 0.3 * held["recorded"], held


@pytest.mark.parametrize("mode", ["recorded", *MODES])
def test_activations_can_be_offloaded(mode: str) -> None:
    inputs = {**batch("right"), "use_cache": False}
    expected = gradients(trained("llama", "dense", mode), inputs)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(trained("llama", "dense", mode), inputs)
    for key, value in expected.items():
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("mode", ["recorded", *MODES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pure", [True, False])
def test_half_precision(mode: str, dtype: torch.dtype, pure: bool) -> None:
    """Autocast, or a base in half precision; the tangents stay in float32."""
    inputs = {**batch("right"), "use_cache": False}
    expected = gradients(trained("llama", "dense", "recorded"), inputs)
    model = trained("llama", "dense", mode)
    for parameter in model.parameters():
        if pure and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    with torch.autocast("cpu", dtype, enabled=not pure):
        found = gradients(model, inputs)
    for key, value in expected.items():
        if key != "logits":
            assert found[key].dtype == torch.float32
            error = float((found[key] - value).norm() / value.norm())
            assert error < 4e-2, (key, error)


def test_every_other_block_checkpointed() -> None:
    inputs = {**batch("right"), "use_cache": False}
    expected = gradients(trained("llama"), inputs)
    model = trained("llama", mode="auto")
    model.get_base_model().activation_checkpointing_enable(every_n_layers=2)
    found = gradients(model, inputs)
    for key, value in expected.items():
        assert_equal(found[key], value)


def test_functions_of_the_gradient() -> None:
    """`torch.autograd.grad`, and two backward passes through one graph."""
    inputs = {**batch("right"), "use_cache": False}
    model = trained("llama", "dense", "replay")
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(**inputs).logits.square().mean()
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_primal_that_trains_is_recorded() -> None:
    """With a norm below the blocks training, the gradient of both equals the recorded one's."""
    inputs, found = {**batch("right"), "use_cache": False}, {}
    for mode in ("recorded", "replay"):
        model = trained("llama", "dense", mode)
        model.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)
        found[mode] = gradients(model, inputs)
    for key, value in found["recorded"].items():
        assert_equal(found["replay"][key], value)


@pytest.mark.parametrize("mode", ["recorded", *MODES])
def test_dropout_is_refused(mode: str) -> None:
    inputs = {**batch("right"), "use_cache": False}
    model = trained("gpt2", "dense", mode)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    with pytest.raises(ValueError, match=r"random numbers.*dropout|Attention dropout"):
        model(**inputs)
    model.eval()(**inputs)


def test_contradictions_are_refused() -> None:
    inputs = {**batch("right"), "use_cache": False}
    model = trained("llama", "dense", "recorded")
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="keeps the activations"):
        model(**inputs)
    model = trained("llama", "dense", "checkpoint")
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func = lambda function, *args: function(*args)
    with pytest.raises(ValueError, match="activation_offloading"):
        model(**inputs)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model = get_peft_model(net, TangentConfig(target_modules=["0"], gradient="replay", init_weights=False))
    with pytest.raises(ValueError, match="nothing to replay"):
        model(torch.randn(2, 4))
    with pytest.raises(ValueError, match="'record'"):
        TangentConfig(gradient="record")  # type: ignore[arg-type]
    model = trained("llama", "dense", "replay")
    model.add_adapter("other", TangentConfig(task_type="CAUSAL_LM", num_layers=2, gradient="recorded"))
    model.combine_axes({"default": 1.0, "other": 1.0})
    with pytest.raises(ValueError, match="one pass can not do both"):
        model(**inputs)


# ---- what a replay can not see ---------------------------------------------------------------------------------------


def weigh(model: PeftModel, scale: float) -> None:
    """λ of the axis, which goes on training; `combine_axes` would freeze it."""
    for layer in tangent_layers(model):
        layer.tangent_scaling["default"] = scale


def test_a_mix_that_changes_before_backward_is_refused() -> None:
    inputs = {**batch("right"), "use_cache": False}
    model = trained("llama", "dense", "replay")
    loss = model(**inputs).logits.sum()
    weigh(model, 2.0)
    with pytest.raises(RuntimeError, match="before they change"):
        loss.backward()
    loss = model(**inputs).logits.sum()
    with model.linearized(False), pytest.raises(RuntimeError, match="before they change"):
        loss.backward()


@pytest.mark.parametrize("scale", [2.0, -0.5])
def test_any_weight(scale: float) -> None:
    inputs, found = {**batch("right"), "use_cache": False}, {}
    for mode in ("recorded", "replay"):
        model = trained("llama", "trained", mode)
        weigh(model, scale)
        found[mode] = gradients(model, inputs)
    for key, value in found["recorded"].items():
        assert_equal(found["replay"][key], value)


def test_parameters_that_are_swapped_are_refused() -> None:
    inputs = {**batch("right"), "use_cache": False}
    model = trained("llama", "dense", "replay")
    other = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    loss = torch.func.functional_call(model, other, kwargs=inputs).logits.sum()
    with pytest.raises(RuntimeError, match=r"functional_call.*gradient='recorded'"):
        loss.backward()


def test_tensors_out_of_the_middle_of_a_block_are_refused() -> None:
    inputs = {**batch("right"), "use_cache": False}
    model = trained("llama", "dense", "replay")
    model.get_base_model().set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"output_attentions=True.*gradient='recorded'"):
        model(**inputs, output_attentions=True)


def test_state_shared_by_blocks_is_refused_or_recorded() -> None:
    """As in Gemma 4, whose blocks hand keys and values to each other."""
    inputs = {**batch("right"), "use_cache": False}
    expected = gradients(trained("llama"), inputs)
    model = trained("llama", "dense", "replay")
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer hands tensors.*UserDict"):
        model(**inputs, shared_kv_states=UserDict())
    model = trained("llama")
    installed = LinearizedForward.installed(model.get_base_model())
    with installed.replayed():  # what a check asks for gives way
        found = gradients(model, {**inputs, "shared_kv_states": UserDict()})
    for key, value in expected.items():
        assert_equal(found[key], value)


def test_inputs_changed_in_place_are_noticed() -> None:
    """As autograd does where it records."""
    inputs = {**batch("right"), "use_cache": False}
    model = trained("llama", "dense", "replay")
    entered: list[Tensor] = []
    block = model.get_base_model().model.layers[1]
    block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    loss = model(**inputs).logits.sum()
    with torch.no_grad():
        entered[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_outputs_of_wrapped_layers_can_be_changed_in_place() -> None:
    inputs, found = {**batch("right"), "use_cache": False}, {}
    for mode in ("recorded", "replay"):
        model = trained("llama", "dense", mode)
        for layer in model.get_base_model().model.layers:
            layer.mlp.gate_proj.register_forward_hook(lambda module, args, output: output.mul_(2))
        found[mode] = gradients(model, inputs)
    for key, value in found["recorded"].items():
        assert_equal(found["replay"][key], value)


def test_hooks_for_saved_tensors_stay_out_of_the_replay() -> None:
    inputs, packed = {**batch("right"), "use_cache": False}, []
    model = trained("llama", "dense", "replay", lm_head=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
        loss = model(**inputs).logits.sum()
        forward = len(packed)
        loss.backward()
    assert forward > 0 and len(packed) == forward


def test_input_gradients_for_checkpointing_change_nothing() -> None:
    """`enable_input_require_grads` is meant for torch's reentrant kind."""
    inputs = {**batch("right"), "use_cache": False}
    model = trained("llama", "dense", "checkpoint")
    model.get_base_model().enable_input_require_grads()
    expected = gradients(trained("llama"), inputs)
    seen: list[bool] = []
    model.get_base_model().model.layers[1].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].requires_grad)
    )
    found = gradients(model, inputs)
    assert seen == [False]
    for key, value in expected.items():
        assert_equal(found[key], value)


def test_blocks_that_train_inside_a_model_in_eval_mode() -> None:
    """transformers asks each block for its mode, not the model."""
    inputs = {**batch("right"), "use_cache": False}

    def gradients(model: PeftModel) -> list[torch.Tensor]:
        model.zero_grad()
        model(**inputs).logits.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model = tangent_model()
    expected = gradients(model)
    base = model.get_base_model()
    base.gradient_checkpointing_enable()
    base.model.layers.train()
    found = gradients(model)
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert_equal(left, right)
