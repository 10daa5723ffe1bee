"""The trainer's own options, and the host's in every way to compute the gradient."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import FORMS, config
from conftest import build
from datasets import Dataset
from tolerances import assert_equal
from torch import Tensor
from torch.func import jvp
from training import GRADIENTS, first_batch_of, logged, loss_and_gradients, tangents
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers import trainer as host_module

from tangent_peft import TangentDPOConfig, TangentDPOTrainer


SGD = {"optim": "sgd", "learning_rate": 0.3}  # Adam would divide rounding errors by themselves


def trainer_with(make_trainer: Callable[..., Any], gradient: str, form: str = "shared", **options: Any) -> Any:
    """A trainer whose gradient is computed in one of the ways of `GRADIENTS`."""
    chosen, own = GRADIENTS[gradient]
    return make_trainer(peft_config=config(form, gradient=chosen), **{**own, **options})


# ---- linearized log-probs --------------------------------------------------------------------------------------------


def log_probs_loss(trainer: TangentDPOTrainer, batch: dict[str, Any]) -> Tensor:
    """DPO's sigmoid loss on log p₀ + J·τ, from plain logits: nothing of TRL's and nothing of our head."""
    mask = batch["completion_mask"][:, 1:].bool()
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    policy = trainer.model(**tokens).logits[:, :-1]
    with trainer.model.disable_adapter(), torch.no_grad():
        primal = trainer.model(**tokens).logits[:, :-1]
    _, change = jvp(lambda z: z.log_softmax(-1), (primal,), (policy - primal,))
    margins = (change.gather(2, batch["input_ids"][:, 1:, None])[..., 0] * mask).sum(1)
    chosen, rejected = margins.chunk(2)
    return -torch.nn.functional.logsigmoid(trainer.beta * (chosen - rejected)).mean()


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("gradient", ["recorded", "replay"])
@pytest.mark.parametrize("form", FORMS)
def test_linearized_log_probs_equal_plain_logits(
    form: str, gradient: str, precompute: bool, make_trainer: Callable[..., Any]
) -> None:
    options = {"linearized": "log_probs", "precompute_ref_log_probs": precompute}
    trainer = trainer_with(make_trainer, gradient, form, **options)
    loss, gradients = loss_and_gradients(trainer, trainer.compute_loss)
    expected, reference = loss_and_gradients(trainer, lambda _, batch: log_probs_loss(trainer, batch))
    assert_equal(loss, expected)
    assert gradients.keys() == reference.keys()
    for name, value in reference.items():
        assert_equal(gradients[name], value)


def midpoint_excess(trainer: TangentDPOTrainer, pairs: int, size: float) -> list[float]:
    """L((τ₁ + τ₂)/2) − (L(τ₁) + L(τ₂))/2 relative to the latter, for random pairs of large τ."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    batch, excess = first_batch_of(trainer), []

    def loss_at(point: list[Tensor]) -> float:
        for parameter, value in zip(parameters, point, strict=True):
            parameter.data = value
        return float(trainer.compute_loss(trainer.model, dict(batch)))

    with torch.no_grad():
        for _ in range(pairs):
            ends = [[size * torch.randn_like(p) for p in parameters] for _ in range(2)]
            middle = [(a + b) / 2 for a, b in zip(*ends, strict=True)]
            mean = sum(map(loss_at, ends)) / 2
            excess.append((loss_at(middle) - mean) / mean)
    return excess


def test_loss_is_convex_in_linearized_log_probs_only(
    make_trainer: Callable[..., Any], pairs: list[dict[str, Any]]
) -> None:
    """The chosen answers are the short ones: the log-sum-exp of the others makes the margin of logits convex."""
    data = Dataset.from_list([{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs])
    excess = {}
    for linearized in ("log_probs", "logits"):
        options = {"linearized": linearized, "per_device_train_batch_size": 1, "gradient_checkpointing": False}
        trainer = make_trainer(peft_config=config(), train_dataset=data, **options)
        excess[linearized] = midpoint_excess(trainer, pairs=24, size=0.5)
    assert max(excess["log_probs"]) <= 1e-5
    assert max(excess["logits"]) > 1e-2


def test_log_probs_train(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(peft_config=config("shared", init_weights=True), linearized="log_probs", max_steps=6)
    trainer.train()
    losses = list(logged(trainer, "loss").values())
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]


def test_log_probs_need_a_frozen_base(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(peft_config=config("shared", modules_to_save=["norm"]), linearized="log_probs")
    with pytest.raises(ValueError, match="modules_to_save"):
        trainer.train()


def test_refused_options(tmp_path: Path) -> None:
    def make(**options: Any) -> TangentDPOConfig:
        return TangentDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)

    for option in ({"loss_type": ["sigmoid", "sft"]}, {"loss_type": "sft"}, {"use_weighting": True}):
        make(**option)
        with pytest.raises(ValueError, match=r"(sft|use_weighting).*no distribution"):
            make(linearized="log_probs", **option)
    with pytest.raises(ValueError, match="'logprobs'"):
        make(linearized="logprobs")
    for option in ("max_kl", "max_norm"):
        for limit in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{option}.*{limit}"):
                make(**{option: limit})
    with pytest.raises(ValueError, match=r"adjoint_check_steps.*-1"):
        make(adjoint_check_steps=-1)
    with pytest.raises(ValueError, match=r"linearity_gap_steps.*0"):
        make(linearity_gap_steps=0)


# ---- the ways to compute the gradient --------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({}, 5e-5),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, 5e-5),
    "bf16 autocast": ({"bf16": True}, 2e-2),
    "bf16 base": ({}, 2e-2),
    "fp16 base": ({}, 2e-2),
}
BASES = {"bf16 base": torch.bfloat16, "fp16 base": torch.float16}


def trained_tangents(make_trainer: Callable[..., Any], gradient: str, form: str, setting: str) -> dict[str, Tensor]:
    """How far three steps move τ."""
    base = build("llama").to(BASES.get(setting, torch.float32))
    options = {**SETTINGS[setting][0], **SGD, "model": base}
    trainer = trainer_with(make_trainer, gradient, form, **options)
    before = tangents(trainer)
    trainer.train()
    assert trainer.state.global_step == 3
    return {name: value - before[name] for name, value in tangents(trainer).items()}


@pytest.mark.parametrize(
    ("form", "setting"), [*((form, "float32") for form in FORMS), *(("dense", name) for name in list(SETTINGS)[1:])]
)
def test_training_is_the_same_in_every_mode(form: str, setting: str, make_trainer: Callable[..., Any]) -> None:
    tolerance = SETTINGS[setting][1]
    expected = trained_tangents(make_trainer, "recorded", form, setting)
    assert all(step.dtype == torch.float32 and step.any() for step in expected.values())
    for gradient in list(GRADIENTS)[1:]:
        found = trained_tangents(make_trainer, gradient, form, setting)
        for name, step in expected.items():
            error = float((found[name] - step).norm() / step.norm())
            assert error <= tolerance, (gradient, name, error)


@pytest.mark.parametrize("gradient", ["recorded", "replay"])
def test_base_by_name_in_half_precision(gradient: str, make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """`model_init_kwargs` of a run that names its model."""
    build("llama").save_pretrained(tmp_path / "base")
    options = {"model": str(tmp_path / "base"), "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = trainer_with(make_trainer, gradient, **options)
    trainer.train()
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("gradient", ["recorded", "replay", "checkpoint"])
def test_activation_offloading(gradient: str, make_trainer: Callable[..., Any]) -> None:
    """TRL's own context needs an accelerator; this one keeps and gives back in the same way, at the same place."""
    found = []
    for offloading in (False, True):
        trainer = trainer_with(make_trainer, gradient, max_steps=2, **SGD)
        if offloading:
            assert isinstance(trainer.maybe_activation_offload_context, nullcontext)
            trainer.maybe_activation_offload_context = torch.autograd.graph.save_on_cpu()
        trainer.train()
        found.append(tangents(trainer))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)


@pytest.mark.parametrize("gradient", ["recorded", "replay"])
def test_active_dropout_is_refused(gradient: str, make_trainer: Callable[..., Any]) -> None:
    trainer = trainer_with(make_trainer, gradient, model=build("gpt2"), disable_dropout=False)
    with pytest.raises(ValueError, match=r"^Attention dropout 0\.1 "):
        trainer.train()
    for block in trainer.model.get_base_model().transformer.h:
        block.attn.attn_dropout.p = 0.0
    with pytest.raises(ValueError, match=r"^GPT2\w+ drew random numbers .*dropout.*disable_dropout=True"):
        trainer.train()
    trainer = trainer_with(make_trainer, gradient, model=build("gpt2"), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


# ---- a run in replay mode --------------------------------------------------------------------------------------------


def test_precomputed_reference_changes_nothing(make_trainer: Callable[..., Any]) -> None:
    found = []
    for precompute in (False, True):
        trainer = trainer_with(make_trainer, "replay", precompute_ref_log_probs=precompute, **SGD)
        trainer.train()
        found.append(tangents(trainer))
    for name, value in found[0].items():
        assert_equal(found[1][name], value)


def test_evaluation_and_prediction(make_trainer: Callable[..., Any], pairs: list[dict[str, Any]]) -> None:
    found = {}
    for gradient in ("recorded", "replay"):
        trainer = trainer_with(make_trainer, gradient, extra={"eval_dataset": Dataset.from_list(pairs)})
        metrics = trainer.evaluate()
        with pytest.warns(FutureWarning, match="return_outputs"):
            predictions = trainer.predict(trainer.eval_dataset).predictions
        found[gradient] = {**metrics, "predictions": float(abs(predictions).sum())}
    assert {"eval_loss", "eval_rewards/margins", "eval_kl/default"} <= found["recorded"].keys()
    for name, value in found["recorded"].items():
        if not name.endswith(("time", "per_second")):
            assert found["replay"][name] == pytest.approx(value, rel=1e-5), name


def test_resumes_in_replay_mode(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "axis": "verb", "adjoint_check_steps": 1}
    trainer = trainer_with(make_trainer, "replay", **options)
    trainer.train()
    again = trainer_with(make_trainer, "replay", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected = tangents(trainer)
    for name, value in tangents(again).items():
        assert_equal(value, expected[name], 1e-6)
    assert logged(again, "loss")[4] == pytest.approx(logged(trainer, "loss")[4], rel=1e-6)


@pytest.mark.parametrize("metric", ["eval_rewards/accuracies", "eval_loss"])
@pytest.mark.parametrize("axis", ["default", "verb"])
def test_early_stopping(
    axis: str, metric: str, make_trainer: Callable[..., Any], pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Nothing beats the first step by a threshold out of reach, so the run ends and that step's axis comes back."""
    from safetensors.torch import load_file

    callbacks = [EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)]
    trainer = trainer_with(
        make_trainer,
        "replay",
        axis=axis,
        max_steps=6,
        learning_rate=1e-2,
        eval_strategy="steps",
        save_strategy="steps",
        **{"eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": metric},
        extra={"eval_dataset": Dataset.from_list(pairs), "callbacks": callbacks},
    )
    trainer.train()
    assert trainer.state.global_step == 2
    best = Path(trainer.state.best_model_checkpoint) / ("" if axis == "default" else axis)
    saved = load_file(best / "adapter_model.safetensors")
    found = {name.replace(f".{axis}.", "."): value for name, value in tangents(trainer).items()}
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


class Listener(TrainerCallback):
    """Stands where a tracker would: receives what is logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_log_names(make_trainer: Callable[..., Any], pairs: list[dict[str, Any]]) -> None:
    """TRL's, and four of our own by axis; the gap and the adjoint error say nothing at τ = 0, the first step."""
    listener = Listener()
    trainer = make_trainer(
        peft_config=config("shared", init_weights=True),
        axis="verb",
        linearity_gap_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        extra={"eval_dataset": Dataset.from_list(pairs), "callbacks": [listener]},
    )
    trainer.train()
    steps = [logs for logs in listener.logs if "loss" in logs]
    stock = {"loss", "grad_norm", "learning_rate", "rewards/margins", "logps/chosen", "entropy", "logits/rejected"}
    assert all(stock | {"kl/verb", "norm/verb"} <= set(logs) for logs in steps)
    assert ["linearity_gap/verb" in logs for logs in steps] == [False, True, True]
    assert ["adjoint_error/verb" in logs for logs in steps] == [False, True, True]
    assert steps[0]["kl/verb"] == pytest.approx(0.0, abs=1e-6)
    assert steps[1]["kl/verb"] > 0 and 0 < steps[0]["norm/verb"] < steps[1]["norm/verb"]
    evaluations = [logs for logs in listener.logs if "eval_loss" in logs]
    assert evaluations and all(logs["eval_kl/verb"] > 0 and "eval_rewards/margins" in logs for logs in evaluations)


def test_logged_values_equal_plain_logits(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(peft_config=config("shared"))
    batch = first_batch_of(trainer)
    trainer.compute_loss(trainer.model.train(), dict(batch))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        policy = trainer.model(**inputs).logits[:, :-1].log_softmax(-1)
        with trainer.model.disable_adapter():
            primal = trainer.model(**inputs).logits[:, :-1].log_softmax(-1)
    kl = torch.nn.functional.kl_div(primal, policy, log_target=True, reduction="none").sum(-1)
    expected = float(kl[batch["completion_mask"][:, 1:].bool()].mean())
    assert trainer._metrics["train"]["kl/default"] == [pytest.approx(expected, rel=1e-4)]


class Hub:
    """Stands where `HfApi` would: keeps what is uploaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, name: str, **unused: Any) -> Any:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path: str, ignore_patterns: list[str], **unused: Any) -> Any:
        shutil.copytree(folder_path, self.folder, ignore=shutil.ignore_patterns(*ignore_patterns), dirs_exist_ok=True)
        return SimpleNamespace(is_done=lambda: True)


@pytest.mark.parametrize("axis", ["default", "verb"])
def test_push_to_hub(
    axis: str, make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "hf_api", lambda: Hub(tmp_path / "uploaded"))
    trainer = make_trainer(
        peft_config=config("shared"), axis=axis, push_to_hub=True, hub_model_id="me/axis", max_steps=1
    )
    trainer.train()
    trainer.push_to_hub()
    files = tmp_path / "uploaded" / ("" if axis == "default" else axis)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in files.iterdir()}
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert "2602.01128" in card and "import tangent_peft" in card
    assert f'from_pretrained("this-directory{"" if axis == "default" else "/verb"}")' in card


def test_trunk_cache_trains_as_without(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    found = []
    for cache in (None, str(tmp_path / "trunk")):
        trainer = trainer_with(make_trainer, "replay", trunk_cache=cache, num_train_epochs=2, max_steps=-1, **SGD)
        trainer.train()
        found.append(tangents(trainer))
    assert trainer.trunk_cache.hits == trainer.state.global_step == 4 and trainer.trunk_cache.misses == 0
    for name, value in found[0].items():
        assert_equal(found[1][name], value)
