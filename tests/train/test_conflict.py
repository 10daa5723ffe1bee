"""The conflict-aware trainers: gradients against torch.autograd on the raw logits, planted conflicts, the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import SHORT_RUN, build
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torchjd.aggregation import PCGrad
from training import logged
from trl import DPOConfig, DPOTrainer

from tangent_peft import TangentConfig
from tangent_peft.evaluate.pairs import pair_batch
from tangent_peft.train.conflict import (
    ConflictAwareDPOConfig,
    ConflictAwareDPOTrainer,
    ConflictAwareTangentDPOConfig,
    ConflictAwareTangentDPOTrainer,
)


BETA = SHORT_RUN["beta"]
KINDS = ("lora", "tangent")


def swapped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same pairs, the other answer chosen."""
    return [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]


def adapted(kind: str, shaken: bool) -> Any:
    """A tiny model with an adapter, at the base or away from it."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(1)
    model = get_peft_model(build("llama"), lora if kind == "lora" else TangentConfig(task_type="CAUSAL_LM", r=4))
    if shaken:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any, pairs: list[dict[str, Any]]) -> Callable[..., Any]:
    """Makes a trainer of one step on all pairs; every option can be replaced."""

    def make(kind: str = "lora", shaken: bool = False, previous: Any = None, model: Any = None, **options: Any) -> Any:
        config, trainer = {
            "lora": (ConflictAwareDPOConfig, ConflictAwareDPOTrainer),
            "tangent": (ConflictAwareTangentDPOConfig, ConflictAwareTangentDPOTrainer),
        }[kind]
        own = {"per_device_train_batch_size": len(pairs), "max_steps": 1, "conflict_steps": 1, "warmup_steps": 0}
        args = config(**{**SHORT_RUN, **own, "output_dir": str(tmp_path / "run"), "learning_rate": 1e-3, **options})
        return trainer(
            model=adapted(kind, shaken) if model is None else model,
            args=args,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            previous_datasets={name: Dataset.from_list(rows) for name, rows in (previous or {}).items()},
        )

    return make


def by_autograd(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[float, Tensor]:
    """Loss and gradient of DPO against the base, from the logits of a model that TRL never saw."""
    batch = pair_batch(tokenizer, rows)
    ids, answer = batch["input_ids"], batch.pop("completion_mask")[:, 1:]

    def logps() -> Tensor:
        logits = model(**batch).logits[:, :-1].log_softmax(-1)
        return (logits.gather(2, ids[:, 1:, None])[..., 0] * answer).sum(1)

    with torch.no_grad(), model.disable_adapter():
        reference = logps()
    chosen, rejected = (logps() - reference).chunk(2)
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    return float(loss.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / a.double().norm() / b.double().norm())


# ---- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cosine_is_that_of_autograd_on_the_whole_batches(kind: str, make: Any, tokenizer: Any, pairs: Any) -> None:
    others = swapped(pairs[:3]) + pairs[3:6]
    trainer = make(kind, shaken=True, previous={"help": others}, conflict_batch_size=6)
    model = adapted(kind, shaken=True)
    _, stage = by_autograd(model, tokenizer, pairs)
    _, previous = by_autograd(model, tokenizer, others)
    trainer.train()
    assert trainer.conflicts[0].cosine == pytest.approx(cosine(stage, previous), abs=2e-4)
    assert logged(trainer, "conflict/cosine_help")[1] == pytest.approx(cosine(stage, previous), abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_opposed_objectives_have_cosine_minus_one(kind: str, make: Any, pairs: Any) -> None:
    """At the base m = 0, so swapping the answers of all pairs turns the gradient around."""
    trainer = make(kind, previous={"against": swapped(pairs), "same": pairs})
    trainer.train()
    found = {one.previous: one for one in trainer.conflicts}
    assert found["against"].cosine == pytest.approx(-1.0, abs=1e-5)
    assert found["same"].cosine == pytest.approx(1.0, abs=1e-5)


def test_agreement_is_of_the_two_halves(make: Any, tokenizer: Any, pairs: Any) -> None:
    trainer = make(previous={"help": pairs[:2]}, conflict_batch_size=2)
    model = adapted("lora", shaken=False)
    halves = [by_autograd(model, tokenizer, [row])[1] for row in pairs[:2]]
    trainer.train()
    assert trainer.conflicts[0].agreement == pytest.approx(cosine(*halves), abs=1e-4)


def test_accumulated_steps_are_measured_as_one(make: Any, pairs: Any) -> None:
    whole = make(shaken=True, previous={"help": pairs[:4]}, conflict_batch_size=4)
    parts = make(
        shaken=True,
        previous={"help": pairs[:4]},
        conflict_batch_size=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    for trainer in (whole, parts):
        trainer.train()
    assert len(parts.conflicts) == 1
    assert parts.conflicts[0].cosine == pytest.approx(whole.conflicts[0].cosine, abs=1e-5)


def test_every_k_steps(make: Any, pairs: Any) -> None:
    trainer = make(previous={"a": pairs, "b": pairs}, conflict_steps=2, max_steps=5, per_device_train_batch_size=2)
    trainer.train()
    assert [(one.step, one.previous) for one in trainer.conflicts] == [(s, n) for s in (0, 2, 4) for n in "ab"]


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_leaves_the_training_as_it_is(kind: str, make: Any, pairs: Any) -> None:
    runs = []
    for previous in (None, {"help": swapped(pairs)}):
        options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = make(kind, previous=previous, disable_dropout=False, **options)
        trainer.train()
        kept = [
            {k: v for k, v in entry.items() if not k.startswith("conflict/")} for entry in trainer.state.log_history
        ]
        runs.append(([p.detach() for p in trainer.model.parameters()], kept[:-1]))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("kind", KINDS)
def test_movement_is_logged(kind: str, make: Any) -> None:
    trainer = make(kind, shaken=True, max_steps=2)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    found = trainer.movement()
    assert logged(trainer, "movement/moved")[2] == pytest.approx(found.moved)
    assert logged(trainer, "movement/relative")[2] == pytest.approx(found.moved / found.norm_before)
    if kind == "tangent":  # A is orthonormal, so distances are those of B
        after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        square = sum(float((b - a).double().square().sum()) for a, b in zip(before, after, strict=True))
        assert found.moved == pytest.approx(math.sqrt(square), rel=1e-5)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_stage_refers_to_the_base(kind: str, precomputed: bool, make: Any, tokenizer: Any, pairs: Any) -> None:
    trainer = make(kind, shaken=True, previous={"help": pairs}, precompute_ref_log_probs=precomputed)
    loss, _ = by_autograd(adapted(kind, shaken=True), tokenizer, pairs)
    assert "ref" not in trainer.model.peft_config
    trainer.train()
    assert logged(trainer, "loss")[1] == pytest.approx(loss, abs=1e-4)
    assert abs(loss - math.log(2)) > 1e-3
    assert trainer.conflicts[0].cosine == pytest.approx(1.0, abs=1e-4)  # the same pairs, so the same reference


def test_trl_itself_would_refer_to_the_first_stage(tmp_path: Path, tokenizer: Any, pairs: Any) -> None:
    """Why the trainer keeps TRL from seeing a PeftModel: its clone makes every later stage begin at log 2."""
    args = DPOConfig(**{**SHORT_RUN, "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "max_steps": 1})
    data = Dataset.from_list(pairs)
    trainer = DPOTrainer(model=adapted("lora", shaken=True), args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert logged(trainer, "loss")[1] == pytest.approx(math.log(2), abs=1e-4)


def test_what_is_not_the_base_is_not_taken_for_the_reference(make: Any) -> None:
    def lora(family: str, **options: Any) -> Any:
        return get_peft_model(build(family), LoraConfig(task_type="CAUSAL_LM", r=2, **options))

    cloned = adapted("lora", shaken=True)  # as `trl.DPOTrainer` leaves a model
    cloned.add_adapter("ref", cloned.peft_config["default"])
    several = adapted("lora", shaken=True)
    several.add_adapter("second", several.peft_config["default"])
    several.base_model.set_adapter(["default", "second"])
    opened = adapted("lora", shaken=True)
    opened.get_base_model().model.norm.weight.requires_grad_(True)
    for model, message in (
        (cloned, "an adapter named 'ref'"),
        (several, "\\['default', 'second'\\] are active"),
        (opened, "1 parameters outside the adapter 'default' train, for example '.*norm.weight'"),
        (lora("gpt2", target_modules=["c_attn"], bias="all", fan_in_fan_out=True), "outside the adapter 'default'"),
        (lora("llama", target_modules=["q_proj"], init_lora_weights="pissa"), "`init_lora_weights='pissa'`"),
    ):
        with pytest.raises(ValueError, match=message):
            make(model=model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_no_number_names_the_objective(
    kind: str, make: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves the step's own gradients where they were."""
    trainer, losses = make(kind, shaken=True, previous={"help": pairs}), iter((1.0, math.nan))
    compute = DPOTrainer.compute_loss
    monkeypatch.setattr(DPOTrainer, "compute_loss", lambda *args, **kwargs: compute(*args, **kwargs) * next(losses))
    with pytest.raises(FloatingPointError, match=r"On held-out pairs \[0, .*\] of the previous objective 'help'.* nan"):
        trainer.train()
    assert any(p.grad is not None and bool(p.grad.any()) for p in trainer.model.parameters())


# ---- projection ------------------------------------------------------------------------------------------------------

PLAIN_STEP: dict[str, Any] = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": 0.5,
    "max_grad_norm": 0.0,
}


def step_taken(trainer: Any) -> Tensor:
    """The gradient that the optimizer got, from the step of plain SGD that it made."""
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([((a - b) / 0.5).flatten() for a, b in zip(before, after, strict=True)]).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulated", [1, 4])
def test_projected_steps_are_those_of_torchjd(
    kind: str, accumulated: int, make: Any, tokenizer: Any, pairs: Any
) -> None:
    others = swapped(pairs[:6])
    trainer = make(
        kind,
        shaken=True,
        previous={"help": others},
        conflict_batch_size=6,
        project_conflicts=True,
        per_device_train_batch_size=len(pairs) // accumulated,
        gradient_accumulation_steps=accumulated,
        **PLAIN_STEP,
    )
    model = adapted(kind, shaken=True)
    stage, previous = (by_autograd(model, tokenizer, rows)[1].double() for rows in (pairs, others))
    assert stage @ previous < 0, "a conflict was planted"
    both = PCGrad()(torch.stack([stage, previous]))  # the sum of two projected gradients; ours is the first alone
    expected = both - (previous - (stage @ previous) / (stage @ stage) * stage)
    taken = step_taken(trainer).double()
    assert float((taken - expected).norm() / expected.norm()) < 5e-3
    assert abs(cosine(taken, previous)) < 5e-3
    assert trainer.conflicts[0].projected
    assert logged(trainer, "conflict/projected_help") == {1: 1.0}


def test_what_does_not_conflict_is_left_alone(make: Any, pairs: Any) -> None:
    plain = step_taken(make(shaken=True, **PLAIN_STEP))
    trainer = make(shaken=True, previous={"help": pairs}, project_conflicts=True, **PLAIN_STEP)
    torch.testing.assert_close(step_taken(trainer), plain)
    assert not trainer.conflicts[0].projected


def test_clipping_sees_the_projected_gradient(make: Any, pairs: Any) -> None:
    """All of the gradient is in conflict, so its norm is 0 when it comes to clipping."""
    options = {**PLAIN_STEP, "max_grad_norm": 1.0}
    trainer = make(previous={"help": swapped(pairs)}, project_conflicts=True, **options)
    trainer.train()
    assert logged(trainer, "grad_norm")[1] < 1e-5


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_options(make: Any, pairs: Any) -> None:
    with pytest.raises(ValueError, match="`conflict_steps` is a number of steps, at least 1; found 0"):
        make(conflict_steps=0)
    with pytest.raises(ValueError, match="`conflict_batch_size` is 3"):
        make("tangent", conflict_batch_size=3)
    with pytest.raises(ValueError, match="`project_conflicts=True` without"):
        make(project_conflicts=True)
    with pytest.raises(ValueError, match="'help' has 5 held-out pairs"):
        make(previous={"help": pairs[:5]})


def test_bad_models(make: Any, tmp_path: Path, tokenizer: Any, pairs: Any) -> None:
    with pytest.raises(ValueError, match="trains an adapter"):
        base = build("llama")
        data = Dataset.from_list(pairs)
        args = ConflictAwareDPOConfig(**{**SHORT_RUN, "output_dir": str(tmp_path)})
        given = {"args": args, "train_dataset": data, "processing_class": tokenizer}
        ConflictAwareDPOTrainer(model=base, ref_model=build("llama"), **given)
    frozen = adapted("lora", shaken=True)
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        make(model=frozen)
    with pytest.raises(ValueError, match="`ref_model` is given"):
        ConflictAwareDPOTrainer(model=adapted("lora", True), ref_model=build("llama"), **given)
    with pytest.raises(TypeError, match="takes a ConflictAwareTangentDPOConfig"):
        ConflictAwareTangentDPOTrainer(model=adapted("tangent", True), **given)


def test_streamed_data_is_refused(make: Any, pairs: Any) -> None:
    trainer = make()
    with pytest.raises(ValueError, match="'help' has a IterableDataset"):
        trainer._prepared("help", Dataset.from_list(pairs).to_iterable_dataset())


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MULTI_GPU])
def test_engines_are_refused_by_name(kind: DistributedType, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", property(lambda self: kind))
    with pytest.raises(ValueError, match=f"engine {kind.value} is not supported by ConflictAwareDPOTrainer"):
        trainer._refuse_engines()
