"""Attention past transformers' interface: modules that call PyTorch's kernel themselves, and PyTorch's own layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import deltas, tangent_layers
from peft import PeftModel, get_peft_model
from tolerances import assert_equal
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_peft import TangentConfig


SIZE, HEADS = 8, 2


class Attention(nn.Module):
    """Causal attention as it is written outside of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


class Pooling(nn.Module):
    """`nn.MultiheadAttention` with a learned query, as vision models pool, in a residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.probe = nn.Parameter(torch.randn(1, 1, SIZE))
        self.attention = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0])


def encoder(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETWORKS: dict[str, tuple[Any, list[str]]] = {
    "kernel": (lambda: nn.Sequential(Attention(), Attention()), ["qkv", "o"]),
    "encoder": (encoder, ["linear1", "linear2"]),
    "encoder_norm_first": (lambda: encoder(norm_first=True), ["linear1", "linear2"]),
    "encoder_projected": (encoder, ["linear1", "linear2", "out_proj"]),
    "pooling": (Pooling, ["first", "out_proj", "last"]),
}


def network(name: str) -> tuple[PeftModel, nn.Module]:
    """The wrapped network and the stock one, in float64."""
    torch.manual_seed(0)
    make, targets = NETWORKS[name]
    stock = make().double()
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    axis = TangentConfig(target_modules=targets, init_weights=False, lm_head=False)
    model = get_peft_model(copy.deepcopy(stock), axis).double()
    assert all(any(f".{target}" in f".{layer.layer_name}" for layer in tangent_layers(model)) for target in targets)
    return model, stock


@pytest.mark.parametrize("name", NETWORKS)
def test_value_and_gradient_equal_torch_func(name: str) -> None:
    model, stock = network(name)
    x, taus = torch.randn(2, 5, SIZE).double(), deltas(model)
    weights = {name: p.detach() for name, p in stock.named_parameters()}
    moving = {name: weights.pop(name) for name in taus}

    def value(part: dict[str, Tensor]) -> Tensor:
        return functional_call(stock, {**weights, **part}, (x,))

    with sdpa_kernel(SDPBackend.MATH):  # which torch.func can differentiate
        base, change = jvp(value, (moving,), (taus,))
        cotangent = torch.randn_like(base)
        expected = vjp(value, moving)[1](cotangent)[0]
    assert change.norm() > 1e-3 * base.norm()
    with torch.no_grad():  # where PyTorch would take its fused layers
        assert_equal(model.eval()(x), base + change)
    assert torch.backends.mha.get_fastpath_enabled()
    found = model.train()(x)
    assert_equal(found, base + change)
    found.backward(cotangent)
    for layer in tangent_layers(model):
        assert_equal(layer.tangent_delta["default"].weight.grad, expected[layer.weight_name])
    with model.disable_adapter():
        assert_equal(model(x), base)


def test_the_fused_layers_of_pytorch_are_on_again_after_an_error() -> None:
    model, _ = network("encoder")
    with pytest.raises(AssertionError, match="embedding dimension"):
        model(torch.randn(2, 5, SIZE + 1).double())
    assert torch.backends.mha.get_fastpath_enabled()
