"""TS-DPO on a quantized base, as QLoRA scripts do it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import config, logits, tangent_layers
from conftest import batch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from quantization import SCHEMES, dequantized, plain, quantized, with_quantized_head
from tolerances import assert_equal
from training import logged, loss_and_gradients, tangents
from transformers import PreTrainedModel

from tangent_peft import TangentConfig


AXIS = {"task_type": "CAUSAL_LM", "r": 4, "num_layers": 2}
RUN = {"max_steps": 10, "learning_rate": 5e-3, "adjoint_check_steps": 1}


@pytest.mark.parametrize(
    ("scheme", "checkpointing"), [("nf4", False), ("nf4", True), ("int8", True), ("torchao_int8", False)]
)
def test_ten_steps_reduce_the_loss(
    tmp_path: Path, make_trainer: Callable[..., Any], scheme: str, checkpointing: bool
) -> None:
    base = prepare_model_for_kbit_training(quantized(tmp_path, scheme), use_gradient_checkpointing=checkpointing)
    trainer = make_trainer(base, TangentConfig(**AXIS), gradient_checkpointing=checkpointing, **RUN)
    packed = {name: p.clone() for name, p in base.named_parameters() if not p.is_floating_point()}
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[1] == pytest.approx(0.6931, abs=1e-3) and losses[10] < 0.5 * losses[1]
    assert max(logged(trainer, "adjoint_error/default").values()) < 1e-5
    for name, value in packed.items():
        assert torch.equal(base.get_parameter(name), value), name


def test_a_model_by_name_with_a_quantization_config_as_in_trl(tmp_path: Path, make_trainer: Callable[..., Any]) -> None:
    plain().save_pretrained(tmp_path / "base")
    extra = {"quantization_config": SCHEMES["nf4"]()}
    trainer = make_trainer(str(tmp_path / "base"), TangentConfig(**AXIS), extra=extra, **RUN)
    assert {type(layer).__name__ for layer in tangent_layers(trainer.model)} == {"TangentQuantized", "TangentLinear"}
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[10] < 0.5 * losses[1]

    trainer.save_model(str(tmp_path / "axis"))
    inputs = batch("right")
    expected = logits(trainer.model.eval(), **inputs)
    loaded = PeftModel.from_pretrained(quantized(tmp_path, "nf4"), tmp_path / "axis")
    assert_equal(logits(loaded, **inputs), expected)
    with pytest.warns(UserWarning, match="bnb 4bit nf4 there, full precision here"):
        deployed = PeftModel.from_pretrained(dequantized(quantized(tmp_path, "nf4")), tmp_path / "axis")
    assert_equal(logits(deployed, **inputs), expected)
    base = plain().bfloat16()  # the weights that were quantized
    with pytest.warns(UserWarning, match="bnb 4bit nf4 there, full precision here"):
        deployed = PeftModel.from_pretrained(base, tmp_path / "axis")
    assert torch.isfinite(logits(deployed, **inputs)).all()


def random_axis(base: PreTrainedModel) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(base, config("dense"))


def test_loss_and_gradients_are_those_of_the_dequantized_model(
    tmp_path: Path, make_trainer: Callable[..., Any]
) -> None:
    (loss, found), (expected, reference) = (
        loss_and_gradients(trainer, trainer.compute_loss)
        for trainer in (
            make_trainer(random_axis(quantized(tmp_path, "nf4")), learning_rate=1e-3),
            make_trainer(random_axis(dequantized(quantized(tmp_path, "nf4"))), learning_rate=1e-3),
        )
    )
    assert_equal(loss, expected)
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        assert_equal(found[name], gradient, 1e-4)


def test_an_axis_that_is_trained_further_keeps_its_digits(tmp_path: Path, make_trainer: Callable[..., Any]) -> None:
    """TRL's constructor rounds what trains to bfloat16 where the base is quantized."""
    model = get_peft_model(quantized(tmp_path, "nf4"), config("shared"))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    trainer = make_trainer(model)
    for found, expected in zip(tangents(trainer).values(), before, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_quantized_head_is_scored_by_its_dequantized_weight(tmp_path: Path, make_trainer: Callable[..., Any]) -> None:
    base = with_quantized_head(quantized(tmp_path, "nf4"))
    twin = dequantized(base)
    for options in ({}, {"lm_head": False}):
        axes = [get_peft_model(model, TangentConfig(**AXIS, **options)) for model in (base, twin)]
        losses = [logged_losses(make_trainer(axis, max_steps=2, learning_rate=1e-2)) for axis in axes]
        assert losses[0][2] == pytest.approx(losses[1][2], rel=1e-4) and losses[0][2] != losses[0][1]
        base, twin = (axis.unload() for axis in axes)


def logged_losses(trainer: Any) -> dict[int, float]:
    trainer.train()
    return logged(trainer, "loss")


def test_the_trunk_cache_works_on_a_quantized_base(tmp_path: Path, make_trainer: Callable[..., Any]) -> None:
    base = quantized(tmp_path, "nf4")
    curves = []
    for cache in (None, str(tmp_path / "cache")):
        trainer = make_trainer(base, TangentConfig(**AXIS), trunk_cache=cache, max_steps=3)
        trainer.train()
        curves.append(logged(trainer, "loss"))
        base = quantized(tmp_path, "nf4")
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
