"""What sharding engines need of a linearized pass, on stand-ins for them: hooks follow the tangent, weights are whole
where they are read. The engines themselves run in tests/train/test_distributed.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import tangent_layers, tangent_model
from conftest import batch
from tolerances import assert_equal
from torch import Tensor, nn

from tangent_peft.forward import call_within, is_sharded
from tangent_peft.forward.rules import _give_linear_jvp


def hook_as_zero3_does(model: nn.Module) -> dict[str, list[str]]:
    """Sends all that enters and leaves a module through identity Functions of its own, which note their backward."""
    passed: dict[str, list[str]] = {"pre_bwd_fn": [], "post_bwd_fn": []}

    def make(module: nn.Module, name: str, kind: str) -> Any:
        class Identity(torch.autograd.Function):
            @staticmethod
            def forward(x: Tensor) -> Tensor:
                return x.detach()

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                pass

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                passed[kind].append(name)
                return grad

        setattr(module, kind, Identity)
        return Identity

    for name, module in model.named_modules():
        before, after = make(module, name, "post_bwd_fn"), make(module, name, "pre_bwd_fn")

        def enter(module: nn.Module, args: Any, function: Any = before) -> Any:
            return tuple(function.apply(x) if isinstance(x, Tensor) else x for x in args)

        def leave(module: nn.Module, args: Any, output: Any, function: Any = after) -> Any:
            return function.apply(output) if isinstance(output, Tensor) else output

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    return passed


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(**batch()).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", ["dense", "shared", "trained"])
@pytest.mark.parametrize("gradient", ["recorded", "replay"])
def test_identity_functions_in_hooks_get_their_derivative(form: str, gradient: str) -> None:
    expected = gradients(tangent_model(form=form, gradient=gradient).train())
    model = tangent_model(form=form, gradient=gradient).train()
    passed = hook_as_zero3_does(model.get_base_model())
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_equal(found[name], expected[name])
    for names in passed.values():  # the second wrapped block, all of it, whichever way its gradient came
        assert {f"model.layers.2.mlp.{name}.base_layer" for name in ("up_proj", "gate_proj", "down_proj")} <= set(names)


def test_replayed_gradients_of_sharded_parameters_come_during_the_replay() -> None:
    expected = gradients(tangent_model(form="trained", gradient="replay").train())
    model = tangent_model(form="trained", gradient="replay").train()
    for parameter in model.parameters():
        parameter.ds_id = 0  # as DeepSpeed marks them
    found = gradients(model)
    for name in expected:
        assert_equal(found[name], expected[name])


def test_weights_are_read_inside_their_modules_call() -> None:
    """As engines do, the hooks bring the weight and take it away."""
    layer = nn.Linear(4, 3)
    weight, x = layer.weight.detach().clone(), torch.randn(2, 4)
    layer.weight.ds_id = 0
    layer.weight.data = torch.empty(0)
    layer.register_forward_pre_hook(lambda module, args: setattr(module.weight, "data", weight))
    layer.register_forward_hook(lambda module, args, out: setattr(module.weight, "data", torch.empty(0)))
    assert is_sharded(layer.weight)
    assert_equal(call_within([layer], lambda x: x @ layer.weight.mT, x), x @ weight.mT)
    assert layer.weight.numel() == 0
    assert_equal(layer(x), x @ weight.mT + layer.bias)  # its own forward is back


def test_call_within_asks_nothing_of_whole_weights() -> None:
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda *_: pytest.fail("the module was called"))
    assert_equal(call_within([layer], lambda x: 2 * x, torch.ones(2)), 2 * torch.ones(2))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_function_of_zero3_gets_its_derivative(bias: bool) -> None:
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return x @ weight.mT if bias is None else x @ weight.mT + bias

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[1])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad @ ctx.saved_tensors[0], None, None

    _give_linear_jvp(Linear)
    x, dx, w, b = (torch.randn(s) for s in ((2, 4), (2, 4), (3, 4), (3,)))
    dx.requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        y = Linear.apply(torch.autograd.forward_ad.make_dual(x, dx), w, *([b] if bias else []))
        dy = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert_equal(dy, dx @ w.mT)
    dy.sum().backward()
    assert_equal(dx.grad, torch.ones(2, 3) @ w)


def test_tying_reaches_the_base_layer() -> None:
    """`tie_weights` sets the wrapped head's weight; engines call it after they have replaced all parameters."""
    model = tangent_model()
    base = model.get_base_model()
    base.model.embed_tokens.weight = nn.Parameter(base.model.embed_tokens.weight.detach().clone())
    base.tie_weights()
    head = next(layer for layer in tangent_layers(model) if layer.layer_name == "lm_head")
    assert head.base_layer.weight is base.model.embed_tokens.weight
