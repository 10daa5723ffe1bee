"""Fused experts: the grouped product's derivative, and mixtures of experts against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import config, deltas, in_float64, logits, tangent_layers
from conftest import batch
from moe import FAMILIES, build_moe
from oracle import gradient, linearized
from peft import PeftModel, get_peft_model
from tolerances import assert_equal
from torch import Tensor
from torch.autograd import forward_ad

from tangent_peft.forward.experts import NAME, grouped_product


# Llama-4's router is a linear layer that returns its choice as well. Jamba reads the weight of its `dt_proj`.
OPTIONS: dict[str, dict[str, Any]] = {"llama4_text": {"exclude_modules": r".*\.router"}}


def wrapped(family: str, gradient_mode: str = "recorded", **options: Any) -> PeftModel:
    chosen = {"num_layers": None, "gradient": gradient_mode, **OPTIONS.get(family, {}), **options}
    return get_peft_model(build_moe(family), config("dense", **chosen)).eval()


def oracle_model(family: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    base = build_moe(family)
    base.set_experts_implementation("eager")
    return in_float64(base, monkeypatch)


def tangent_gradients(model: PeftModel) -> dict[str, Tensor]:
    return {layer.weight_name: layer.tangent_delta["default"].weight.grad for layer in tangent_layers(model)}


@pytest.mark.parametrize("mode", ["recorded", "replay"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradient_equal_the_oracle(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 against float64, with the experts' default kernel: `_grouped_mm`."""
    model = wrapped(family, mode).train(mode == "replay")
    inputs: dict[str, Any] = {**batch("left"), "use_cache": False}
    real = inputs["attention_mask"].bool()
    found = model(**inputs).logits
    cotangent = torch.randn_like(found) * real[..., None]
    found.backward(cotangent)

    base, expected_deltas = oracle_model(family, monkeypatch), {k: v.double() for k, v in deltas(model).items()}
    inputs.pop("use_cache")
    base_logits, expected = linearized(base, expected_deltas, **inputs)
    assert_equal((found - base_logits)[real], (expected - base_logits)[real], 1e-5)
    reference, gradients = gradient(base, expected_deltas, cotangent.double(), **inputs), tangent_gradients(model)
    scale = max(float(g.detach().abs().max()) for g in reference.values())
    for name, expected_gradient in reference.items():
        assert float((gradients[name] - expected_gradient).detach().abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_every_plain_implementation_in_float64(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    model = in_float64(wrapped(family), monkeypatch)
    _, expected = linearized(oracle_model(family, monkeypatch), deltas(model), **inputs)
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert_equal(logits(model, **inputs)[real], expected[real])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bf16_and_the_primal_bit_for_bit(family: str) -> None:
    inputs = batch("left")
    real = inputs["attention_mask"].bool()
    expected = logits(wrapped(family), **inputs)
    base = logits(build_moe(family).bfloat16(), **inputs)
    model = wrapped(family).bfloat16()
    assert_equal(logits(model, **inputs)[real].float(), expected[real], 5e-2)
    with model.axes(default=0.0):
        assert torch.equal(logits(model, **inputs), base)
    primals: list[Tensor] = []
    head = model.get_base_model().lm_head.base_layer
    handle = head.register_forward_hook(lambda module, args, output: primals.append(output))
    logits(model, **inputs)
    handle.remove()
    assert torch.equal(primals[0][: len(base)], base)  # the tangent's rows are stacked below


def test_the_chosen_implementation_is_back_after_the_pass() -> None:
    model = wrapped("mixtral")
    seen: list[str] = []
    experts = model.get_base_model().model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda m, args: seen.append(m.config._experts_implementation))
    logits(model, **batch())
    handle.remove()
    assert seen == [NAME]
    assert model.config._experts_implementation == "grouped_mm"
    with pytest.raises((RuntimeError, IndexError)):
        logits(model, input_ids=torch.tensor([[10**6]]))
    assert model.config._experts_implementation == "grouped_mm"


def test_cached_generation_equals_uncached() -> None:
    model = wrapped("qwen3_moe")
    inputs = batch("left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        model.generate(**inputs, **options, use_cache=True), model.generate(**inputs, **options, use_cache=False)
    )


def test_an_opaque_kernel_is_refused_by_name() -> None:
    base = build_moe("mixtral")
    base.config._experts_implementation_internal = "sonicmoe"
    with pytest.raises(NotImplementedError, match=r"'sonicmoe'.*set_experts_implementation\('grouped_mm'\)"):
        get_peft_model(base, config("dense"))
    model = wrapped("mixtral")
    model.config._experts_implementation_internal = "deepgemm"
    with pytest.raises(NotImplementedError, match="'deepgemm'"):
        logits(model, **batch())


def test_a_load_balancing_loss_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"aux_loss.*without `output_router_logits`"):
        wrapped("mixtral")(**batch(), output_router_logits=True)


PRODUCTS = {"torch": torch._grouped_mm, "transformers": torch.ops.transformers.grouped_mm_fallback}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("transposed", [True, False])
def test_grouped_product_equals_the_loop(product: Any, transposed: bool) -> None:
    """Value, derivative in both arguments, and the gradient of the derivative."""
    x, dx = torch.randn(2, 7, 8).unbind()
    weight, dw = torch.randn(2, 3, 12, 8).unbind() if transposed else torch.randn(2, 3, 8, 12).unbind()
    dx, dw = dx.requires_grad_(), dw.requires_grad_()
    offsets = torch.tensor([3, 3, 7], dtype=torch.int32)

    def loop(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([x[:3] @ weight[0], x[3:] @ weight[2]])

    def layout(w: Tensor) -> Tensor:
        return w.mT if transposed else w

    with forward_ad.dual_level():
        y = grouped_product(product, forward_ad.make_dual(x, dx), layout(forward_ad.make_dual(weight, dw)), offsets)
        value, tangent = forward_ad.unpack_dual(y)
    assert_equal(value, loop(x, layout(weight)))
    expected = loop(dx, layout(weight)) + loop(x, layout(dw))
    assert_equal(tangent, expected)
    cotangent = torch.randn_like(expected)
    for found, reference in zip(
        torch.autograd.grad(tangent, (dx, dw), cotangent),
        torch.autograd.grad(expected, (dx, dw), cotangent),
        strict=True,
    ):
        assert_equal(found, reference)
