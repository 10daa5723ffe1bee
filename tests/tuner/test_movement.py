"""Movement in the space of ΔW, against products B·A that are formed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import build
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tangent_peft import TangentConfig
from tangent_peft.tuner.movement import adapter_deltas, movement
from tangent_peft.tuner.weights import TangentFactors


CONFIGS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]),
    "rslora with an embedding": LoraConfig(
        task_type="CAUSAL_LM", r=4, use_rslora=True, target_modules=["v_proj", "embed_tokens"]
    ),
    "shared": TangentConfig(task_type="CAUSAL_LM", num_layers=2, r=4),
    "trained": TangentConfig(task_type="CAUSAL_LM", num_layers=2, r=4, projection="trained"),
    "dense": TangentConfig(task_type="CAUSAL_LM", num_layers=1),
}


def shake(model: Any, size: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def materialized(model: Any) -> Tensor:
    """ΔW of all layers in a row, read off the weights of the merged model minus those of the base."""
    merged: Any = get_merged(model)
    base = build("llama").state_dict()
    return torch.cat([(merged[name] - base[name]).double().flatten() for name in base if name in merged])


def get_merged(model: Any) -> dict[str, Tensor]:
    import copy

    merged: dict[str, Tensor] = copy.deepcopy(model).merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize("name", CONFIGS)
def test_movement_is_that_of_merged_weights(name: str) -> None:
    base = build("llama")
    base.config.tie_word_embeddings = False  # a LoRA on the embedding alone
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    model = get_peft_model(base, CONFIGS[name])
    shake(model)
    before, first = adapter_deltas(model, "default"), materialized(model)
    shake(model, 0.1)
    after, second = adapter_deltas(model, "default"), materialized(model)
    found, step = movement(before, after), second - first
    assert found.norm_before == pytest.approx(float(first.norm()), rel=1e-4)
    assert found.norm_after == pytest.approx(float(second.norm()), rel=1e-4)
    assert found.moved == pytest.approx(float(step.norm()), rel=1e-4)
    assert found.relative == pytest.approx(float(step.norm() / first.norm()), rel=1e-4)
    assert found.cosine == pytest.approx(float(step @ first / step.norm() / first.norm()), abs=1e-4)


def test_a_turn_of_the_factors_is_no_movement() -> None:
    model: Any = get_peft_model(build("llama"), CONFIGS["lora"])
    model.double()
    shake(model)
    before = adapter_deltas(model, "default")
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(turn.mT @ parameter)
            if "lora_B" in name:
                parameter.copy_(parameter @ turn)
    assert movement(before, adapter_deltas(model, "default")).relative < 1e-7


def test_a_snapshot_stays_as_it_was() -> None:
    model = get_peft_model(build("llama"), CONFIGS["lora"])
    shake(model)
    before = adapter_deltas(model, "default")
    norm = movement(before, before).norm_before
    shake(model)
    assert movement(before, before).norm_before == norm


def test_from_nothing_there_is_no_direction() -> None:
    model = get_peft_model(build("llama"), CONFIGS["lora"])
    zero = adapter_deltas(model, "default")
    shake(model)
    found = movement(zero, adapter_deltas(model, "default"))
    assert found.moved == pytest.approx(found.norm_after)
    assert math.isnan(found.relative)
    assert math.isnan(found.cosine)


def test_what_has_no_factors_is_named() -> None:
    dora = LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=True, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="q_proj' is a DoraLinearVariant"):
        adapter_deltas(get_peft_model(build("llama"), dora), "default")
    lora = get_peft_model(build("llama"), CONFIGS["lora"])
    with pytest.raises(ValueError, match="no 'verb'"):
        adapter_deltas(lora, "verb")
    tangent = get_peft_model(build("llama"), CONFIGS["shared"])
    with pytest.raises(ValueError, match="not of the same layers"):
        movement(adapter_deltas(lora, "default"), adapter_deltas(tangent, "default"))


def test_factors_of_a_bfloat16_lora_are_scaled_in_float32() -> None:
    """rsLoRA scales by α/√r, which is no power of two."""
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=3, use_rslora=True, target_modules=["q_proj"])
    model = get_peft_model(build("llama").bfloat16(), config, autocast_adapter_dtype=False)
    shake(model)
    found = adapter_deltas(model, "default")
    for name, module in model.named_modules():
        if name in found:
            up: Any = module.lora_B["default"].weight
            assert up.dtype == torch.bfloat16
            torch.testing.assert_close(found[name].b, up.float() * (3 / math.sqrt(8)), rtol=1e-6, atol=0)


def test_a_step_lost_in_rounding_has_no_direction() -> None:
    model = get_peft_model(build("llama"), CONFIGS["lora"])
    shake(model)
    before = adapter_deltas(model, "default")
    after: dict[str, Any] = {}
    for name, x in before.items():
        assert x.b is not None
        after[name] = TangentFactors(b=x.b.double() * (1 + 1e-9), a=x.a)
    assert math.isnan(movement(before, after).cosine)
