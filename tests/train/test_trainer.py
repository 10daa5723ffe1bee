"""TangentDPOTrainer against the two-forward computation, and everything a DPO user expects of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMS, config
from conftest import build
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tolerances import assert_equal
from torch import Tensor
from training import first_batch_of, loss_and_gradients
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from tangent_peft import TangentConfig, TangentDPOConfig, TangentDPOTrainer


LOSSES = [
    *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
    *("discopop", "sft", "sigmoid_norm"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    **{loss: {"loss_type": [loss]} for loss in LOSSES},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "multi": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "ld_alpha": {"ld_alpha": 0.5},
    "use_weighting": {"use_weighting": True},
    "precompute": {"precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", ["dense", "shared"])
def test_every_loss_equals_two_forwards(form: str, options: str, make_trainer: Callable[..., Any]) -> None:
    """The reference from the primal of the same forward, or from a forward of its own with the axis off."""
    trainer = make_trainer(peft_config=config(form), **OPTIONS[options])
    loss, gradients = loss_and_gradients(trainer, trainer.compute_loss)
    trainer._metrics["train"].clear()
    expected_loss, expected = loss_and_gradients(trainer, lambda m, i: DPOTrainer.compute_loss(trainer, m, i))
    assert_equal(loss, expected_loss)
    assert set(gradients) == set(expected) and any("lm_head" in name for name in gradients)
    tolerance = 1e-4 if options == "discopop" else 1e-5  # it divides log-ratios by 0.05
    for name, gradient in gradients.items():
        assert_equal(gradient, expected[name], tolerance if gradient.abs().max() > 1e-6 else 1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", [True, False])
def test_sigmoid_loss_equals_plain_logits(form: str, head: bool, make_trainer: Callable[..., Any]) -> None:
    """Nothing of TRL's: log-probs from `model(...).logits` of the linearized and of the base model."""
    trainer = make_trainer(peft_config=config(form, lm_head=head))
    loss, gradients = loss_and_gradients(trainer, trainer.compute_loss)
    trainer.model.zero_grad()
    batch = first_batch_of(trainer)
    mask = batch["completion_mask"][:, 1:].bool()

    def sequence_logps() -> Tensor:
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        return (picked * mask).sum(1)

    with trainer.model.disable_adapter(), torch.no_grad():
        reference = sequence_logps()
    chosen, rejected = (sequence_logps() - reference).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean()
    expected.backward()
    assert_equal(loss, expected)
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            assert_equal(gradients[name], parameter.grad)


def test_one_backbone_forward_per_step(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(peft_config=TangentConfig(num_layers=2))
    calls = []
    backbone = trainer.model.get_base_model().model
    backbone.register_forward_pre_hook(lambda *unused: calls.append(1))
    trainer.train()
    assert len(calls) == 3


@pytest.mark.parametrize("form", FORMS)
def test_training_lowers_the_loss_and_keeps_the_adjoint_identity(form: str, make_trainer: Callable[..., Any]) -> None:
    """⟨τ, ∂L/∂τ⟩ = dL(f₀ + s·Jτ)/ds at s = 1, at every step; the right side knows only log-probs at two more s."""
    trainer = make_trainer(
        peft_config=TangentConfig(num_layers=2, task_type="CAUSAL_LM", **FORMS[form]), max_steps=6, learning_rate=1e-2
    )
    errors = []
    compute = trainer.compute_loss

    def checked(model: PeftModel, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = compute(model, inputs, *args, **kwargs)
        if loss.requires_grad and trainer.state.global_step > 0:
            errors.append(adjoint_error(trainer, loss, inputs))
        return loss

    trainer.compute_loss = checked
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "tangent_" not in name}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]
    assert len(errors) == 5 and max(errors) <= 1e-4
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), f"{name} of the frozen base has moved"


def adjoint_error(trainer: TangentDPOTrainer, loss: Tensor, inputs: dict[str, Any]) -> float:
    """Relative difference of ⟨τ, ∂L/∂τ⟩ and ⟨∂L/∂z, z − z₀⟩, with the logits z from plain forwards."""
    model = trainer.model
    # A trained projection is bilinear: Jτ is linear in B alone.
    tangents = [p for n, p in model.named_parameters() if p.requires_grad and ".tangent_A." not in n]
    gradients = torch.autograd.grad(loss, tangents, retain_graph=True)
    left = float(sum((p.detach() * g).sum() for p, g in zip(tangents, gradients, strict=True)))
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    mask = inputs["completion_mask"][:, 1:].bool()
    with torch.no_grad():
        policy = model(**batch).logits[:, :-1]
        with model.disable_adapter():
            primal = model(**batch).logits[:, :-1]
    z = policy.requires_grad_()

    def logps(logits: Tensor) -> Tensor:
        return (logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0] * mask).sum(1)

    chosen, rejected = (logps(z) - logps(primal)).chunk(2)
    (cotangent,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean(), z)
    right = float((cotangent * (z.detach() - primal)).sum())
    return abs(left - right) / max(abs(right), 1e-8)


def test_trains_the_named_axis_only(make_trainer: Callable[..., Any]) -> None:
    model = get_peft_model(build("llama"), config(), adapter_name="help")
    model.add_adapter("verb", TangentConfig(num_layers=2, r=4))
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = make_trainer(model=model, axis="verb")
    assert trainer.model is model and sorted(model.peft_config) == ["help", "verb"]
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".verb." in name for name in moved)
    assert model.axis_weights == {"verb": 1.0}


def test_axis_names_a_new_adapter(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer(peft_config=TangentConfig(num_layers=2, r=4), axis="verb")
    assert list(trainer.model.peft_config) == ["verb"]
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "verb" / "adapter_model.safetensors").is_file()


def test_default_learning_rate_depends_on_the_form(make_trainer: Callable[..., Any]) -> None:
    rates = {form: make_trainer(peft_config=config(form)).args.learning_rate for form in FORMS}
    assert len(set(rates.values())) == 3 and min(rates.values()) > 1e-6
    assert make_trainer(peft_config=config("dense"), learning_rate=3e-4).args.learning_rate == 3e-4


@pytest.mark.parametrize("kind", ["standard", "implicit prompt", "iterable"])
def test_dataset_formats(kind: str, make_trainer: Callable[..., Any], pairs: list[dict[str, Any]]) -> None:
    rows: list[dict[str, Any]] = pairs
    if kind == "standard":
        rows = [{key: row[key][0]["content"] for key in row} for row in pairs]
    if kind == "implicit prompt":
        rows = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in pairs]
    data = Dataset.from_list(rows)
    trainer = make_trainer(
        peft_config=TangentConfig(num_layers=2),
        train_dataset=data.to_iterable_dataset() if kind == "iterable" else data,
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_evaluation_metrics_and_prediction(make_trainer: Callable[..., Any], pairs: list[dict[str, Any]]) -> None:
    data = Dataset.from_list(pairs)
    trainer = make_trainer(
        peft_config=TangentConfig(num_layers=2), extra={"eval_dataset": data}, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    metrics = trainer.evaluate()
    names = {"eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen", "eval_entropy"}
    assert names <= set(metrics)
    assert {"loss", "rewards/chosen", "logits/chosen", "mean_token_accuracy"} <= set(trainer.state.log_history[0])
    with pytest.warns(FutureWarning, match="return_outputs"):
        assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == 2 * len(pairs)


def test_evaluation_follows_the_mix(make_trainer: Callable[..., Any], pairs: list[dict[str, Any]]) -> None:
    """At λ = 0 policy and reference are one model; as weights the reference is still the base."""
    trainer = make_trainer(peft_config=config("shared"), extra={"eval_dataset": Dataset.from_list(pairs)})
    with trainer.model.axes(default=0.0):
        assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    with trainer.model.linearized(False):
        assert trainer.evaluate()["eval_rewards/margins"] != pytest.approx(0.0, abs=1e-5)


def test_weights_evaluation_equals_plain_logits(make_trainer: Callable[..., Any]) -> None:
    """An axis with linearize=False (Task-Vector DPO) trains its tangent on the head as well."""
    trainer = make_trainer(peft_config=config("dense", linearize=False))
    _, gradients = loss_and_gradients(trainer, trainer.compute_loss)
    assert any("lm_head" in name for name in gradients)
    batch = first_batch_of(trainer)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    fused = trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs
    logits = trainer.model(**inputs).logits[:, :-1].log_softmax(-1)
    plain = logits.gather(2, batch["input_ids"][:, 1:, None])[..., 0] * (labels[:, 1:] != -100)
    assert_equal(fused, plain)


def test_gradient_accumulation_checkpoint_and_resume(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    options = {
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "axis": "verb",
    }
    axis = {"num_layers": 2, "r": 4, "task_type": "CAUSAL_LM"}
    trainer = make_trainer(peft_config=TangentConfig(**axis), **options)
    trainer.train()
    expected = {name: p.clone() for name, p in trainer.model.named_parameters() if "tangent_" in name}
    again = make_trainer(peft_config=TangentConfig(**axis), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, parameter in again.model.named_parameters():
        if name in expected:
            assert_equal(parameter, expected[name])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2602.01128" in card
    config_file = tmp_path / "run" / "checkpoint-2" / "verb" / "adapter_config.json"
    assert json.loads(config_file.read_text())["peft_type"] == "TANGENT"


def test_model_by_name(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "base"
    build("llama").save_pretrained(path)
    trainer = make_trainer(model=str(path), peft_config=TangentConfig(num_layers=2), axis="help")
    trainer.train()
    assert list(trainer.model.peft_config) == ["help"]


def test_bf16_autocast_trains(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(peft_config=TangentConfig(num_layers=2, r=4), bf16=True)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_explicit_reference_model(make_trainer: Callable[..., Any]) -> None:
    """For weights that are added; a linearized axis has its reference in itself."""
    reference: PreTrainedModel = build("llama")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*linearize=False"):
        make_trainer(peft_config=config(), extra={"ref_model": reference})
    trainer = make_trainer(peft_config=config(linearize=False), extra={"ref_model": reference})
    free = make_trainer(peft_config=config(linearize=False))
    free.model.load_state_dict(trainer.model.state_dict())
    loss, _ = loss_and_gradients(trainer, trainer.compute_loss)
    assert_equal(loss, loss_and_gradients(free, free.compute_loss)[0])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lm_head", [True, False])
def test_stock_trainer_refuses_a_tangent_on_the_head_alone(
    lm_head: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]
) -> None:
    args = DPOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=2
    )
    trainer = DPOTrainer(
        model=build("llama"),
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=TangentConfig(num_layers=2, task_type="CAUSAL_LM", lm_head=lm_head),
    )
    if not lm_head:
        trainer.train()
        return
    with pytest.raises(RuntimeError, match="TangentDPOTrainer"):
        trainer.train()


def test_bad_input(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    from peft import LoraConfig

    model = get_peft_model(build("llama"), config(), adapter_name="help")
    with pytest.raises(ValueError, match=r"axes \['help'\].*axis='verb'"):
        make_trainer(model=model, axis="verb")
    with pytest.raises(ValueError, match="add_adapter"):
        make_trainer(model=model, peft_config=config())
    with pytest.raises(ValueError, match="LoraConfig"):
        make_trainer(peft_config=LoraConfig())
    with pytest.raises(ValueError, match="LoraConfig"):
        make_trainer(model=get_peft_model(build("llama"), LoraConfig()))
    with pytest.raises(ValueError, match="'ref'"):
        make_trainer(model=get_peft_model(build("llama"), config(), adapter_name="ref"))
    for option in ("use_liger_kernel", "torch_compile"):
        with pytest.raises(ValueError, match=option):
            TangentDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{option: True})
    with pytest.raises(TypeError, match="TangentDPOConfig"):
        TangentDPOTrainer(model=build("llama"), args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False))  # type: ignore[arg-type]


def test_base_weights_must_stay_frozen(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(peft_config=config("dense"))
    trainer.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*frozen"):
        trainer.train()


# ---- found in review -------------------------------------------------------------------------------------------------


def test_reference_with_modules_to_save_is_the_base(make_trainer: Callable[..., Any]) -> None:
    """The primal of the pass holds the trained copy of the norm; the reference must not."""
    trainer = make_trainer(peft_config=config("shared", modules_to_save=["norm"]), learning_rate=1e-2)
    trainer.train()
    batch = first_batch_of(trainer)
    base = build("llama")
    with torch.no_grad():
        logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        expected = (picked * batch["completion_mask"][:, 1:]).sum(1).chunk(2)[0].mean()
        trainer._metrics["train"].clear()
        trainer.compute_loss(trainer.model.train(), batch)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    reference = metrics["logps/chosen"] - metrics["rewards/chosen"] / 0.5
    assert reference == pytest.approx(float(expected), rel=1e-5)


def test_arguments_are_not_changed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]
) -> None:
    args = TangentDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    data = Dataset.from_list(pairs)
    for form in ("dense", "shared"):
        trainer = TangentDPOTrainer(
            model=build("llama"), args=args, train_dataset=data, processing_class=tokenizer, peft_config=config(form)
        )
        assert trainer.args.learning_rate is not None
    assert args.learning_rate is None and args.axis is None


def test_best_checkpoint_of_a_named_axis_is_loaded(
    make_trainer: Callable[..., Any], pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    trainer = make_trainer(
        peft_config=TangentConfig(num_layers=2, r=4, task_type="CAUSAL_LM"),
        axis="verb",
        extra={"eval_dataset": Dataset.from_list(pairs)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e-2,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first step is the worst, so it is the "best"
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run" / "checkpoint-1" / "verb" / "adapter_model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        if ".tangent_B." in name:
            assert torch.equal(parameter, saved[name.replace(".verb.", ".")])
