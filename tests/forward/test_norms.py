"""Norms by rule against the same norms differentiated by torch, and which classes are taken for norms."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import pytest
import torch
from cases import deltas, tangent_model
from conftest import batch
from oracle import InFloat64, linearized
from tolerances import TOLERANCE, assert_equal
from torch import Tensor, nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from tangent_peft.forward import dual, split
from tangent_peft.forward.level import close_pass, open_pass
from tangent_peft.forward.norms import derive_norms, is_norm, norm_rule


SIZE = 12
NORMS: dict[str, Any] = {
    "llama": LlamaRMSNorm,
    "qwen3": Qwen3RMSNorm,
    "gemma2": Gemma2RMSNorm,
    "gpt_oss": GptOssRMSNorm,
    "layer norm": nn.LayerNorm,
    "without a gain": functools.partial(nn.LayerNorm, elementwise_affine=False),
    "without a bias": functools.partial(nn.LayerNorm, bias=False),
}


def make(name: str) -> nn.Module:
    norm = NORMS[name](SIZE, eps=1e-2).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.normal_()
    return norm


def derived(norm: nn.Module, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent, by the rule if there is one."""
    opened = open_pass(norm, "mix")
    try:
        derive_norms(opened)
        return split(norm(dual(x, dx)))
    finally:
        close_pass(opened)


@pytest.mark.parametrize("name", NORMS)
def test_against_torch(name: str) -> None:
    with InFloat64():
        norm = make(name)
        x, dx = torch.randn(2, 2, 3, SIZE)
        assert is_norm(norm)
        expected, tangent = torch.func.jvp(norm, (x,), (dx,))
        y, dy = derived(norm, x, dx)
    assert torch.equal(y, expected) and dy is not None
    assert_equal(dy, tangent)
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORMS)
def test_precision(name: str, dtype: torch.dtype) -> None:
    """The tangent has the dtype of the value, which is the module's own, and the accuracy of that dtype."""
    norm = make(name).to(dtype)
    x, dx = torch.randn(2, 2, 3, SIZE, dtype=dtype)
    y, dy = derived(norm, x, dx)
    assert torch.equal(y, norm(x)) and dy is not None and dy.dtype == y.dtype
    with InFloat64():
        _, expected = torch.func.jvp(norm.double(), (x.double(),), (dx.double(),))
    assert_equal(dy, expected.to(dtype), TOLERANCE.get(dtype, 5e-3))


@pytest.mark.parametrize("name", NORMS)
def test_gradient(name: str) -> None:
    """The rule is made of operations that autograd records, for the gradient of the tangent."""
    with InFloat64():
        norm = make(name)
        x, dx, weight = torch.randn(3, 2, 3, SIZE)
        dx.requires_grad_()
        _, dy = derived(norm, x, dx)
        assert dy is not None
        (found,) = torch.autograd.grad((dy * weight).sum(), dx)
        expected = torch.func.vjp(norm, x)[1](weight)[0]
    assert_equal(found, expected)


def test_what_is_not_known_is_left_to_torch() -> None:
    class Scaled(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    class Shifted(Gemma2RMSNorm):
        def _norm(self, x: Tensor) -> Tensor:
            return x - 1

    assert norm_rule(LlamaRMSNorm) is norm_rule(Qwen3RMSNorm) is not None
    for kind in (Scaled, Shifted, T5LayerNorm, ConvNextLayerNorm, nn.Linear, nn.Module):
        assert norm_rule(kind) is None, kind
    assert not is_norm(nn.LayerNorm((3, SIZE)))
    norm = Scaled(SIZE).requires_grad_(False)
    x, dx = torch.randn(2, 2, 3, SIZE)
    assert_equal(derived(norm, x, dx)[1], torch.func.jvp(norm, (x,), (dx,))[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["module", "class"])
def test_a_forward_that_someone_replaced(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two passes of one model: the rule is for the code that runs now."""
    model = tangent_model("llama", "dense")
    inputs = batch(rows=1)
    with torch.no_grad():
        before = model(**inputs).logits

    def doubled(self: Any, hidden_states: Tensor) -> Tensor:
        return 2 * self.weight * hidden_states / hidden_states.norm(dim=-1, keepdim=True)

    base = model.get_base_model()
    norm = base.model.layers[-1].input_layernorm
    if where == "class":
        monkeypatch.setattr(LlamaRMSNorm, "forward", doubled)
    else:
        norm.forward = MethodType(doubled, norm)
    with torch.no_grad():
        found = model(**inputs).logits
    assert not torch.allclose(found, before)
    tangents = deltas(model)
    assert ("forward" in vars(norm)) == (where == "module")
    assert_equal(found, linearized(model.unload(), tangents, **inputs)[1])
