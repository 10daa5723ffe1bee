"""The linearity gap: its definition, and that it is of first order in λ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import tangent_model
from conftest import batch
from peft import get_peft_model
from transformers import PreTrainedModel

from tangent_peft import TangentConfig
from tangent_peft.diagnose import linearity_gap


def test_definition_and_order(tiny_llama: Callable[[], PreTrainedModel]) -> None:
    model = get_peft_model(tiny_llama().double(), TangentConfig(num_layers=2, init_weights=False)).double()
    inputs = batch("left")
    model.combine_axes({"default": 0.01})
    measured = linearity_gap(model, [inputs, batch("right")])
    assert measured.weights == {"default": 0.01}
    assert measured.tokens == 2 * int(inputs["attention_mask"].sum())
    one = linearity_gap(model, [inputs])
    model.eval()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        linear = model(**inputs).logits[real]
        with model.disable_adapter():
            base = model(**inputs).logits[real]
        with model.linearized(False):
            merged = model(**inputs).logits[real]
    assert one.gap == pytest.approx(float((merged - linear).norm() / (linear - base).norm()), rel=1e-6)
    assert one.effect == pytest.approx(float((linear - base).norm() / base.norm()), rel=1e-6)
    with model.axes(default=0.005):
        assert linearity_gap(model, [inputs]).gap == pytest.approx(one.gap / 2, rel=0.05)
    with model.axes({}):
        assert linearity_gap(model, [inputs]).gap == 0.0
    assert "linearity gap" in str(one)


def test_needs_axes(tiny_llama: Callable[[], PreTrainedModel]) -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        linearity_gap(tiny_llama(), [])


def test_disabled_adapters_have_no_gap() -> None:
    model = tangent_model()
    with model.disable_adapter(), pytest.raises(ValueError, match="Adapters are disabled"):
        linearity_gap(model, [batch()])
