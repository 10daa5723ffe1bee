"""What watches a training: limits on KL and norm that stop it, and a loss that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import config
from conftest import build
from datasets import Dataset
from torch import Tensor
from training import logged
from transformers import PreTrainedModel

from tangent_peft import TangentDPOTrainer
from tangent_peft.train.budget import BudgetCallback


# ---- limits ----------------------------------------------------------------------------------------------------------


def growing(make_trainer: Callable[..., Any], **options: Any) -> TangentDPOTrainer:
    """A training that moves away from the base at every step."""
    axis = config("shared", init_weights=True)
    return make_trainer(peft_config=axis, axis="verb", max_steps=6, learning_rate=1e-2, **options)


@pytest.mark.parametrize(
    ("option", "metric", "name"), [("max_norm", "norm", "norm"), ("max_kl", "kl", "KL to the base")]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_stops_after_the_first_step_over_the_limit(
    accumulation: int,
    option: str,
    metric: str,
    name: str,
    make_trainer: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The limit lies between the values that a free run logs at steps 2 and 3."""
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    free = growing(make_trainer, **options)
    free.train()
    values = logged(free, f"{metric}/verb")
    assert free.state.global_step == 6 and values[1] < values[2] < values[3]
    limit = (values[2] + values[3]) / 2
    trainer = growing(make_trainer, **{option: limit}, **options)
    trainer.train()
    assert trainer.state.global_step == 3
    assert logged(trainer, f"{metric}/verb")[3] > limit
    assert f"Training of axis 'verb' stops at step 3: its {name} is" in caplog.text


def test_kl_of_a_step_is_that_of_all_its_batches(
    make_trainer: Callable[..., Any], pairs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token counts alike; an evaluation in between is not a step."""
    found, expected = [], []
    extra = {"eval_dataset": Dataset.from_list(pairs[:3])}
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "max_kl": 1e6}
    trainer = growing(make_trainer, eval_strategy="steps", eval_steps=1, extra=extra, **options)
    (budget,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, BudgetCallback))
    read, limit = budget.limits["KL to the base"]
    budget.limits["KL to the base"] = (lambda: found.append(read()) or found[-1], limit)
    record, batches = trainer.watch.record_kl, []

    def recorded(kl: Tensor, step: int) -> None:
        batches.extend([kl] if trainer.model.training else [])
        record(kl, step)

    monkeypatch.setattr(trainer.watch, "record_kl", recorded)
    trainer.train()
    sizes = [3, 3, 2] * 2  # of eight pairs, the last step of an epoch has two
    for size in sizes:
        total, tokens = sum(batches[:size]).tolist()
        expected.append(total / tokens)
        del batches[:size]
    assert not batches and found == pytest.approx(expected)


@pytest.mark.parametrize("option", ["max_norm", "max_kl"])
def test_goes_on_below_the_limit(
    option: str, make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = growing(make_trainer, **{option: 1e6})
    trainer.train()
    assert trainer.state.global_step == 6 and "stops at step" not in caplog.text


# ---- losses that are not finite --------------------------------------------------------------------------------------


def poisoned(character: str, tokenizer: Any) -> PreTrainedModel:
    """A base that is undefined wherever one token stands: its input embeddings are its own."""
    (token,) = tokenizer(character, add_special_tokens=False)["input_ids"]
    base = build("qwen3")
    with torch.no_grad():
        base.get_input_embeddings().weight[token] = torch.nan
    return base


def with_character(pairs: list[dict[str, Any]], row: int, character: str, place: str) -> list[dict[str, Any]]:
    """The pairs, one of which begins its question or its chosen answer with `character`."""
    marked = [dict(pair) for pair in pairs]
    (message,) = marked[row][place]
    marked[row][place] = [{**message, "content": character + message["content"]}]
    return marked


@pytest.mark.parametrize("place", ["prompt", "chosen"])
@pytest.mark.parametrize("max_length", [None, 34])
@pytest.mark.parametrize("seed", [0, 1])
def test_names_the_row(
    seed: int,
    max_length: int | None,
    place: str,
    make_trainer: Callable[..., Any],
    tokenizer: Any,
    pairs: list[dict[str, Any]],
) -> None:
    """One row of eight is bad, rows come shuffled and one by one: the error comes at its turn and names it."""
    trainer = make_trainer(
        model=poisoned("~", tokenizer),
        peft_config=config("shared"),
        train_dataset=Dataset.from_list(with_character(pairs, 5, "~", place)),
        axis="verb",
        max_steps=8,
        seed=seed,
        per_device_train_batch_size=1,
        max_length=max_length,
    )
    lengths = [len(row["prompt_ids"] + row["chosen_ids"]) for row in trainer.train_dataset]
    assert len(lengths) == 8 and max(lengths) > 34
    with pytest.raises(FloatingPointError, match=r"loss is nan at step (\d) of axis 'verb', .* rows \[5\] ") as error:
        trainer.train()
    assert f"step {trainer.state.global_step} " in str(error.value)


def test_names_a_row_cut_at_its_start(
    make_trainer: Callable[..., Any], tokenizer: Any, pairs: list[dict[str, Any]]
) -> None:
    with pytest.warns(FutureWarning, match="keep_end"):
        trainer = make_trainer(
            model=poisoned("~", tokenizer),
            peft_config=config("shared"),
            train_dataset=Dataset.from_list(with_character(pairs, 5, "~", "chosen")),
            max_steps=8,
            per_device_train_batch_size=1,
            max_length=34,
            truncation_mode="keep_end",
        )
    with pytest.raises(FloatingPointError, match=r"rows \[5\] "):
        trainer.train()


def collated_rows(trainer: TangentDPOTrainer) -> list[list[int]]:
    """Fills with the rows of each batch, as the collator gets them: before anything is cut."""
    known = [(row["prompt_ids"], row["chosen_ids"]) for row in trainer.train_dataset]
    batches: list[list[int]] = []
    collate = trainer.data_collator

    def recorded(examples: list[dict[str, Any]]) -> Any:
        batches.append(sorted(known.index((row["prompt_ids"], row["chosen_ids"])) for row in examples))
        return collate(examples)

    trainer.data_collator = recorded
    return batches


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("max_length", [None, 34])
def test_a_tangent_that_is_not_finite_or_huge(
    max_length: int | None, value: float, make_trainer: Callable[..., Any]
) -> None:
    trainer = make_trainer(peft_config=config("shared"), max_length=max_length, per_device_train_batch_size=3)
    batches = collated_rows(trainer)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(value)
    with pytest.raises(FloatingPointError, match=r"at step 0 of axis 'default'.*`max_norm`") as error:
        trainer.train()
    assert f"rows {batches[0]} of the data set" in str(error.value)


def test_during_evaluation(make_trainer: Callable[..., Any], tokenizer: Any, pairs: list[dict[str, Any]]) -> None:
    """The rows are those of the evaluation's data."""
    data = Dataset.from_list(with_character(pairs, 2, "~", "prompt"))
    trainer = make_trainer(
        model=poisoned("~", tokenizer),
        peft_config=config("shared"),
        per_device_eval_batch_size=1,
        extra={"eval_dataset": {"good": Dataset.from_list(pairs), "bad": data}},
    )
    with pytest.raises(FloatingPointError, match=r"rows \[2\] of the data set"):
        trainer.evaluate()


def test_streamed_rows_have_no_number(
    make_trainer: Callable[..., Any], tokenizer: Any, pairs: list[dict[str, Any]]
) -> None:
    data = Dataset.from_list(with_character(pairs, 5, "~", "chosen")).to_iterable_dataset()
    trainer = make_trainer(model=poisoned("~", tokenizer), peft_config=config("shared"), train_dataset=data)
    with pytest.raises(FloatingPointError, match=r"at step 1 .*could not be found.*streamed"):
        trainer.train()
