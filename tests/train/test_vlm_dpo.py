"""TRL's vision path: preference pairs about images through TangentDPOTrainer, against the two-forward computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import config
from conftest import SHORT_RUN
from datasets import Dataset
from peft import PeftModel
from tolerances import assert_equal, relative_error
from torch import Tensor
from training import GRADIENTS, first_batch_of, logged, loss_and_gradients, tangents
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer
from vision import IMAGE, PATCHES, build_vlm, processor, vision_batch, vision_pairs

from tangent_peft import TangentConfig, TangentDPOConfig, TangentDPOTrainer


FAMILIES = ["llava", "gemma3"]  # the second with `token_type_ids` and attention in both directions inside an image


@pytest.fixture
def vlm_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """Makes a trainer of three short steps on a tiny vision-language model and pairs about images."""

    def make(
        name: str = "llava", model: Any = None, peft_config: Any = None, collator: Any = None, **options: Any
    ) -> TangentDPOTrainer:
        arguments = {**SHORT_RUN, "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2}
        return TangentDPOTrainer(
            model=build_vlm(name) if model is None else model,
            args=TangentDPOConfig(**{**arguments, **options}),
            train_dataset=Dataset.from_list(vision_pairs()),
            eval_dataset=Dataset.from_list(vision_pairs(2)),
            processing_class=processor(name, tokenizer),
            data_collator=collator,
            peft_config=peft_config,
        )

    return make


@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        ("llava", "dense", {}),
        ("llava", "shared", {"ld_alpha": 0.5}),
        ("llava", "trained", {"loss_type": ["sigmoid", "sft"]}),
        ("gemma3", "shared", {}),
    ],
)
def test_loss_equals_two_forwards(
    name: str, form: str, options: dict[str, Any], vlm_trainer: Callable[..., Any]
) -> None:
    """The reference from the primal of the same forward, or from a forward of its own with the axis off."""
    trainer = vlm_trainer(name, peft_config=config(form), **options)
    loss, gradients = loss_and_gradients(trainer, trainer.compute_loss)
    trainer._metrics["train"].clear()
    expected_loss, expected = loss_and_gradients(trainer, lambda m, i: DPOTrainer.compute_loss(trainer, m, i))
    assert_equal(loss, expected_loss)
    assert set(gradients) == set(expected) and any("lm_head" in name for name in gradients)
    for name, gradient in gradients.items():
        assert_equal(gradient, expected[name], 5e-5)


def qwen_pair(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """As TRL's collator with Qwen's processor, which needs torchvision: patches, their grid, kinds of tokens."""
    batch = vision_batch("qwen2_5_vl")
    completion = torch.arange(batch["input_ids"].shape[1]) >= 9
    return {**batch, "completion_mask": completion * batch["attention_mask"]}


@pytest.mark.parametrize(
    ("name", "gradient"),
    [*(("llava", gradient) for gradient in GRADIENTS), ("gemma3", "checkpoint"), ("qwen", "replay")],
)
def test_loss_equals_plain_logits(name: str, gradient: str, vlm_trainer: Callable[..., Any]) -> None:
    """Nothing of TRL's but the batch: log-probs from the logits of the linearized and of the base model."""
    mode, options = GRADIENTS[gradient]
    if name == "qwen":
        options = {**options, "model": build_vlm("qwen2_5_vl"), "collator": qwen_pair}
    trainer = vlm_trainer("gemma3" if name == "gemma3" else "llava", peft_config=config(gradient=mode), **options)
    loss, gradients = loss_and_gradients(trainer, trainer.compute_loss)
    batch = first_batch_of(trainer)
    assert ((batch["input_ids"] == IMAGE).sum(1) == PATCHES).all() and len(batch["pixel_values"]) >= 4
    assert ("token_type_ids" in batch) == (name == "gemma3") and ("mm_token_type_ids" in batch) == (name == "qwen")
    mask = batch.pop("completion_mask")[:, 1:].bool()
    trainer.model.zero_grad()

    def sequence_logps() -> Tensor:
        log_probs = trainer.model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
        return (log_probs.gather(2, batch["input_ids"][:, 1:, None])[..., 0] * mask).sum(1)

    with trainer.model.disable_adapter(), torch.no_grad():
        reference = sequence_logps()
    chosen, rejected = (sequence_logps() - reference).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean()
    expected.backward()
    assert_equal(loss, expected)
    for parameter_name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            assert_equal(gradients[parameter_name], parameter.grad, 5e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_saves_and_loads(name: str, vlm_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """A few steps lower the loss with the adjoint identity checked at each, and the axis comes back from disk."""
    options = {"max_steps": 4, "learning_rate": 1e-2, "axis": "color"}
    options |= {
        "adjoint_check_steps": 1,
        "linearity_gap_steps": 2,
        "max_kl": 1e3,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    trainer = vlm_trainer(name, peft_config=TangentConfig(num_layers=2, task_type="CAUSAL_LM", r=4), **options)
    trainer.train()
    losses = list(logged(trainer, "loss").values())
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]
    assert max(logged(trainer, "adjoint_error/color").values()) <= 1e-4
    assert logged(trainer, "eval_loss") and logged(trainer, "kl/color")[4] > 0
    names = {name for name, moved in tangents(trainer).items() if moved.any()}
    assert names and all("vision" not in name and ".color." in name for name in names)
    trainer.save_model(str(tmp_path / "saved"))
    batch = first_batch_of(trainer)
    del batch["completion_mask"]
    loaded = PeftModel.from_pretrained(build_vlm(name), str(tmp_path / "saved" / "color"), adapter_name="color")
    with torch.no_grad():
        found, expected = (m.eval()(**batch).logits for m in (loaded, trainer.model))
        with loaded.disable_adapter():
            assert relative_error(found, loaded(**batch).logits) > 1e-3
    assert_equal(found, expected)


def test_the_linearity_gap_sees_the_images(vlm_trainer: Callable[..., Any]) -> None:
    """It is measured on the batch that trains, images included."""
    trainer = vlm_trainer(peft_config=config("dense", num_layers=1), linearity_gap_steps=1, max_steps=2)
    seen = []
    tower = trainer.model.get_base_model().model.vision_tower
    tower.register_forward_hook(lambda module, args, output: seen.append(module.training))
    trainer.train()
    assert seen[-4:] == [False] * 3 + [True]  # three forwards of the gap, one of the step
    assert logged(trainer, "linearity_gap/default")[2] > 0


def test_a_second_axis_trains_beside_the_first(vlm_trainer: Callable[..., Any]) -> None:
    """A model with axes comes in, and text and images of both are mixed by λ."""
    from peft import get_peft_model

    model = get_peft_model(build_vlm("llava"), config("shared"), adapter_name="first")
    model.add_adapter("second", TangentConfig(num_layers=2, r=4))
    before = {name: p.clone() for name, p in model.named_parameters() if ".first." in name}
    trainer = vlm_trainer(model=model, axis="second", learning_rate=1e-2)
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.combine_axes({"first": 0.5, "second": -1.0})
    batch = first_batch_of(trainer)
    del batch["completion_mask"]
    with torch.no_grad():
        assert torch.isfinite(model.eval()(**batch).logits).all()


def test_options_that_images_exclude_are_refused(vlm_trainer: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precompute_ref_log_probs"):
        vlm_trainer(peft_config=config("dense"), precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="keep_end"), pytest.warns(FutureWarning, match="keep_end"):
        vlm_trainer(peft_config=config("dense"), truncation_mode="keep_end", max_length=64)
    with pytest.raises(ValueError, match=r"trunk_cache=.*images"):
        vlm_trainer(peft_config=config("dense", num_layers=1), trunk_cache=str(tmp_path / "trunk"))
