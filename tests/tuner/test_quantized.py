"""Tangents on quantized layers: against the oracle of the dequantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import config, deltas, logits, tangent_layers
from conftest import batch
from oracle import gradient, linearized
from peft import PeftModel, get_peft_model
from quantization import SCHEMES, dequantized, quantized
from tolerances import assert_equal, relative_error


EXACT = ["nf4", "nf4_double", "nf4_storage", "fp4", "torchao_int8", "torchao_int4", "hqq"]
ROUNDS_ITS_INPUT = ["int8", "torchao_dynamic"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def wrapped(base: Any, form: str = "shared", **options: Any) -> PeftModel:
    return get_peft_model(base, config(form, **options)).eval()


def gradients(model: PeftModel, cotangent: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
    """∂⟨cotangent, f_lin⟩/∂ΔW by the weight's name, of a dense axis."""
    model.zero_grad()
    (model(**inputs, use_cache=False).logits * cotangent).sum().backward()
    return {f"{x.layer_name}.weight": x.tangent_delta["default"].weight.grad.clone() for x in tangent_layers(model)}


@pytest.mark.parametrize("scheme", EXACT)
@pytest.mark.parametrize("targets", [None, ["q_proj"]], ids=["all", "q_proj"])
def test_logits_and_gradient_are_those_of_the_dequantized_model(path: Path, scheme: str, targets: Any) -> None:
    base = quantized(path, scheme, "qwen2")
    twin = dequantized(base)
    model, inputs = wrapped(base, "dense", target_modules=targets), batch("left")
    tau = deltas(model)
    real = inputs["attention_mask"].bool()
    assert_equal(logits(model, **inputs)[real], linearized(twin, tau, **inputs)[1][real], 1e-5)
    cotangent = torch.randn(*inputs["input_ids"].shape, 300) * inputs["attention_mask"][..., None]
    expected = gradient(twin, tau, cotangent, **inputs)
    for mode in ("recorded", "replay"):
        for layer in tangent_layers(model):
            layer.tangent_gradient["default"] = mode
        found = gradients(model.train(), cotangent, **inputs)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert_equal(value, expected[name], 1e-4)


def test_every_scheme_is_covered() -> None:
    assert {*EXACT, *ROUNDS_ITS_INPUT} == {*SCHEMES, "hqq"}
    assert relative_error(torch.ones(1), torch.ones(1)) == 0.0
