"""Layers that automatic differentiation does not see through: the affine rule, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerances import assert_equal
from torch import Tensor, nn
from torch.autograd import forward_ad

from tangent_peft.forward.opaque import OpaqueLinear, check_unreadable, without_bias


class _Kernel(torch.autograd.Function):
    """W x + b without a forward derivative; `has_backward` says whether there is a backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        y = (x.float() @ layer.unpack().mT).to(x.dtype)
        y = y if layer.bias is None else y + layer.bias.to(x.dtype)
        if not layer.has_backward:
            ctx.mark_non_differentiable(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad.float() @ ctx.layer.unpack()).to(grad.dtype), None


class PackedLinear(nn.Module):
    """An int8 layer with a kernel of its own; `curved` makes it one that is not affine."""

    def __init__(self, bias: float = 1.0, has_backward: bool = True, curved: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = 16, 8
        self.has_backward, self.curved = has_backward, curved
        self.register_buffer("qweight", torch.randint(-127, 128, (8, 16), dtype=torch.int8))
        self.register_buffer("bias", bias * torch.randn(8) if bias else None)

    def unpack(self) -> Tensor:
        return self.qweight.float() / 100.0

    def forward(self, x: Tensor) -> Tensor:
        y = _Kernel.apply(x, self)
        return y * y.abs() if self.curved else y


def read(layer: nn.Module) -> Tensor:
    return layer.unpack()


def rule(layer: nn.Module, readable: bool) -> OpaqueLinear:
    return OpaqueLinear(layer, "mlp.up", read if readable else None, 16)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_both_derivatives(readable: bool, bias: float) -> None:
    layer = PackedLinear(bias)
    rule(layer, readable).register()
    x, dx, g = torch.randn(3, 5, 16), torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 5, 8)
    with forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, dx)))
    weight = layer.unpack()
    assert_equal(y, x @ weight.mT + (layer.bias if bias else 0.0))
    assert_equal(dy, dx @ weight.mT)
    assert_equal(torch.autograd.grad(dy, dx, g)[0], g @ weight)  # recorded: the tangent's own gradient
    x.requires_grad_()
    assert_equal(torch.autograd.grad(layer(x) * 1.0, x, g)[0], g @ weight)  # replayed: an ordinary backward


def test_a_kernel_without_a_forward_derivative_fails_by_itself() -> None:
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward mode AD|jvp"):
        PackedLinear()(forward_ad.make_dual(torch.randn(2, 16), torch.randn(2, 16)))


def test_a_layer_that_can_be_read_needs_no_backward_of_its_own() -> None:
    layer = PackedLinear(has_backward=False)
    rule(layer, True).register()
    x, g = torch.randn(4, 16, requires_grad=True), torch.randn(4, 8)
    y = layer(x)
    y += 1.0  # may be changed in place, as by the layer around it
    assert_equal(torch.autograd.grad(y, x, g)[0], g @ layer.unpack())


def test_a_layer_that_can_not_be_read_and_has_no_backward_is_refused_by_name() -> None:
    layer = PackedLinear(has_backward=False)
    opaque = rule(layer, False)
    check_unreadable([opaque], torch.float32, training=False)  # runs an axis
    with pytest.raises(ValueError, match=r"'mlp\.up', a PackedLinear, has no backward.*bitsandbytes"):
        check_unreadable([opaque], torch.float32, training=True)
    opaque.register()
    with pytest.raises(RuntimeError, match=r"'mlp\.up', a PackedLinear, has no backward"):
        layer(torch.randn(2, 16, requires_grad=True))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"has no backward"):
        layer(forward_ad.make_dual(torch.randn(2, 16), torch.randn(2, 16, requires_grad=True)))


def test_a_layer_that_is_not_affine_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'mlp\.up', a PackedLinear, is not affine.*What works"):
        check_unreadable([rule(PackedLinear(curved=True), False)], torch.float32, training=False)


def test_the_check_draws_no_random_numbers_and_tries_each_type_once() -> None:
    layers = [PackedLinear(), PackedLinear(curved=True)]  # of one type: the first speaks for it
    before = torch.get_rng_state()
    check_unreadable([rule(layer, False) for layer in layers], torch.float32, training=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("readable", [True, False])
def test_a_large_bias_in_half_precision_cancels_nothing(readable: bool) -> None:
    layer = PackedLinear(bias=300.0)
    layer.bias.data = layer.bias.bfloat16()
    v = 1e-3 * torch.randn(64, 16).bfloat16()
    expected = v.float() @ layer.unpack().mT
    assert not (layer(v) - layer.bias).any()  # base(ẋ) − b, as the rule is usually written, has lost all of W ẋ
    assert_equal(rule(layer, readable).linear_part(v), expected.bfloat16())


def test_the_bias_comes_back_after_an_exception() -> None:
    layer = PackedLinear()
    bias = layer.bias
    with pytest.raises(KeyError), without_bias(layer):
        assert layer.bias is None
        raise KeyError
    assert layer.bias is bias and "bias" in layer.state_dict()


def test_hooks_can_be_removed_and_copied() -> None:
    layer = PackedLinear()
    handles = rule(layer, True).register()
    clone = copy.deepcopy(layer)
    clone.qweight.zero_()
    x, dx = torch.randn(2, 16), torch.randn(2, 16)
    with forward_ad.dual_level():
        dy = forward_ad.unpack_dual(clone(forward_ad.make_dual(x, dx))).tangent
    assert dy.abs().max() == 0.0  # of the copy's weight, not the original's
    for handle in handles:
        handle.remove()
    assert not layer._forward_hooks and not layer._forward_pre_hooks
