"""W x + b and W ẋ by one product, for few rows and more, and the layers that use it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import logits, tangent_model
from conftest import batch
from tolerances import assert_equal

from tangent_peft.forward.products import COLUMNS, both_products, can_join_products


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 1), (1, 3), (COLUMNS, 1), (2, 3, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_both_products(bias: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, b = torch.randn(7, 5, dtype=dtype), torch.randn(7, dtype=dtype) if bias else None
    x, dx = torch.randn(2, *shape, 5, dtype=dtype)
    y, dy = both_products(weight, x, dx, b)
    assert_equal(y, F.linear(x, weight, b))
    assert_equal(dy, F.linear(dx, weight))
    assert y.is_contiguous() and y.untyped_storage().nbytes() == y.nbytes
    transposed = both_products(weight.mT.contiguous().mT, x, dx, b)
    assert_equal(transposed[0], y)
    assert_equal(transposed[1], dy)


def test_half_precision_with_a_bias_is_left_to_the_layer() -> None:
    """Its kernel adds the bias before it rounds, so the value would be another one."""
    weight, b = torch.randn(7, 5), torch.randn(7)
    assert can_join_products(weight, b) and can_join_products(weight.bfloat16(), None)
    assert not can_join_products(weight.bfloat16(), b.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert can_join_products(weight, None) and not can_join_products(weight, b)


def test_views() -> None:
    """Values and tangents that do not lie in memory as their shape says."""
    weight, x, dx = torch.randn(7, 5), torch.randn(5, 2, 3).permute(2, 1, 0), torch.randn(3, 1, 5).expand(3, 2, 5)
    y, dy = both_products(weight, x, dx)
    assert_equal(y, F.linear(x, weight))
    assert_equal(dy, F.linear(dx, weight))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_hook_on_a_base_layer_sees_the_primal_alone(name: str) -> None:
    """And a forward that someone gave to it is called, whatever the number of rows."""
    model = tangent_model(name, "dense")
    inputs: Any = {key: value[:1, :1] for key, value in batch().items()}
    expected = logits(model, **inputs)
    layer = next(m for n, m in model.named_modules() if n.endswith(("layers.2.mlp.up_proj", "h.2.mlp.c_fc")))
    shapes = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:-1]))
    assert_equal(logits(model, **inputs), expected)
    handle.remove()
    assert shapes == [(1, 1)]
    forward, calls = layer.base_layer.forward, []
    layer.base_layer.forward = lambda x: calls.append(x.shape) or forward(x)
    assert_equal(logits(model, **inputs), expected)
    assert calls
