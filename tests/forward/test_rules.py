"""The rules for what torch or a host library can not differentiate, each against plain autograd."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from family_checks import linearize, padded
from tolerances import assert_equal, relative_error
from torch import Tensor
from torch.autograd.forward_ad import dual_level
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.bloom import modeling_bloom

from tangent_peft.forward import dual, split
from tangent_peft.forward.rules import FUNCTIONS, KERNELS, bloom_gelu
from tangent_peft.forward.sdpa import SdpaDerivative


BY_NAME = {family.name: family for family in FAMILIES}


def test_bloom_gelu() -> None:
    x, dx = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    plain = functools.partial(F.gelu, approximate="tanh")
    _, expected = torch.func.jvp(plain, (x,), (dx,))
    with dual_level():
        primal, tangent = split(bloom_gelu(dual(x, dx)))
        assert split(bloom_gelu(x))[1] is None
    assert torch.equal(primal, modeling_bloom.GeLUFunction.apply(x))
    assert_equal(tangent, expected, 1e-6)  # the host rounds its constants
    weight = torch.randn_like(tangent)
    (found,) = torch.autograd.grad((tangent * weight).sum(), dx)
    assert_equal(found, torch.func.vjp(plain, x)[1](weight)[0], 1e-6)


def test_rules_stand_in_for_the_time_of_a_pass() -> None:
    model, host = linearize(BY_NAME["bloom"]), modeling_bloom.GeLUFunction
    seen = []
    model.get_base_model().transformer.h[2].register_forward_hook(lambda *_: seen.append(modeling_bloom.GeLUFunction))
    model(**padded())
    assert seen == [FUNCTIONS[modeling_bloom.__name__, "GeLUFunction"]]
    with model.disable_adapter():
        model(**padded())
    assert seen[1] is host is modeling_bloom.GeLUFunction


def loses_tangents(original: Any) -> Any:
    """As a kernel of an optional package does, wrapped as transformers wraps those."""

    @functools.wraps(original)
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return original(*(split(x)[0] if isinstance(x, Tensor) else x for x in args), **kwargs)

    return kernel


@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_5_text", "lfm2", "olmo_hybrid"])
def test_optional_kernels_do_not_run_in_a_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linearize(BY_NAME[name])
    home = sys.modules[type(model.get_base_model()).__module__]
    kernels = KERNELS & vars(home).keys()
    assert kernels
    expected = model(**padded(), use_cache=False).logits
    generated = model.generate(**{key: x[:2] for key, x in padded().items()}, max_new_tokens=3)
    for kernel in kernels:
        monkeypatch.setattr(home, kernel, loses_tangents(vars(home)[kernel]))
    installed = {kernel: vars(home)[kernel] for kernel in kernels}
    assert torch.equal(model(**padded(), use_cache=False).logits, expected)
    again = model.generate(**{key: x[:2] for key, x in padded().items()}, max_new_tokens=3)
    assert torch.equal(again, generated)
    assert all(vars(home)[kernel] is value for kernel, value in installed.items())


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Plain attention; bias −∞-like where a key is hidden."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, dim=-1) @ v


@pytest.mark.parametrize("kind", ["causal", "bool", "additive", "per head", "2d"])
@pytest.mark.parametrize("keys", [4, 2, 1])
def test_attention_that_a_model_calls_itself(kind: str, keys: int) -> None:
    q, dq = torch.randn(2, 2, 4, 5, 6, dtype=torch.float64)
    (k, dk), (v, dv) = torch.randn(2, 2, 2, keys, 5, 6, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    bias = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~causal, -1e30)
    heads = torch.randn(2, 4, 1, 5, dtype=torch.float64)
    masks: dict[str, Any] = {
        "causal": (None, bias),
        "bool": (causal[None, None], bias),
        "additive": (bias[None, None], bias),
        "per head": (heads + bias, heads + bias),
        "2d": (causal, bias),
    }
    mask, plain = masks[kind]
    expected, tangent = torch.func.jvp(functools.partial(attention, bias=plain), (q, k, v), (dq, dk, dv))
    dq.requires_grad_()
    with dual_level(), SdpaDerivative():
        out = F.scaled_dot_product_attention(
            dual(q, dq), dual(k, dk), dual(v, dv), mask, is_causal=mask is None, enable_gqa=keys == 2
        )
        primal, found = split(out)
    assert_equal(primal, expected)
    assert_equal(found, tangent)
    weight = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((found * weight).sum(), dq)
    assert_equal(gradient, torch.func.vjp(lambda x: attention(x, k, v, plain), q)[1](weight)[0])


def test_rows_that_see_no_key_have_a_gradient() -> None:
    """PyTorch's own rule gives NaN there."""
    q, dq = torch.randn(2, 1, 2, 4, 6)
    dq.requires_grad_()
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2:, 2:] = True
    with dual_level(), SdpaDerivative():
        _, found = split(F.scaled_dot_product_attention(dual(q, dq), q, q, mask))
    assert found is not None
    found.sum().backward()
    assert found.isfinite().all() and dq.grad is not None and dq.grad.isfinite().all()
    assert (found[:, :, :2] == 0).all()


def test_what_its_rule_does_not_cover_is_refused() -> None:
    q = torch.randn(1, 2, 4, 6)
    with dual_level(), SdpaDerivative():
        x = dual(q, torch.randn_like(q))
        with pytest.raises(ValueError, match=r"dropout 0\.5"):
            F.scaled_dot_product_attention(x, q, q, dropout_p=0.5)
        with pytest.raises(NotImplementedError, match=r"shape \(2, 4, 6\).*attn_implementation='eager'"):
            F.scaled_dot_product_attention(dual(q[0], q[0]), q[0], q[0])
        bias = torch.randn(1, 2, 4, 4)
        with pytest.raises(NotImplementedError, match="mask that carries a tangent"):
            F.scaled_dot_product_attention(x, q, q, dual(bias, bias))
        ordinary = F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(ordinary, F.scaled_dot_product_attention(q, q, q))


def test_falcon_keeps_its_own_attention() -> None:
    """Its masks and its branch follow the name in the config, which a pass must leave as it is."""
    model = linearize(BY_NAME["falcon"])
    base, seen = model.get_base_model(), []
    base.transformer.h[2].register_forward_pre_hook(lambda *_: seen.append(base.config._attn_implementation))
    inputs = padded()
    with model.axes(default=1e-12):  # a pass, and f₀ beside nothing
        found = model(**inputs).logits
    with model.disable_adapter():
        expected = model(**inputs).logits
    assert seen == ["sdpa", "sdpa"]
    assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sinks_by_the_chunked_rule(name: str) -> None:
    """Their default is plain attention; behind the interface the same function goes through our rule."""
    model = linearize(BY_NAME[name])
    base: Any = model.get_base_model()
    expected = model(**padded()).logits
    home = vars(sys.modules[type(base).__module__])
    AttentionInterface.register("opaque", home["eager_attention_forward"])
    AttentionMaskInterface.register("opaque", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    base.config._attn_implementation_internal = "opaque"
    found = model(**padded()).logits
    real = padded()["attention_mask"].bool()
    assert_equal(found[real], expected[real])
    tangents = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(logits[real].square().sum(), tangents) for logits in (found, expected)]
    for left, right in zip(*gradients, strict=True):
        assert_equal(left, right, 3e-5)
