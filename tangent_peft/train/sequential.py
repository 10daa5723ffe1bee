"""Sequential DPO: one adapter trained on one objective after the other (arXiv 2606.19744).

The base is the reference at every stage; the adapter is a LoRA or a tangent axis. Each stage is a folder that appears
when it is complete: the adapter, and `stage.json` with the log, gradient conflicts, movement, and what the caller's
evaluation found. Each stage loads the base and the last stage's adapter anew, so a run that was stopped goes on as if
it had not been. The optimizer begins anew at every stage. Knows how to train; what to evaluate is the caller's.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from tangent_peft.train.conflict import (
    ConflictAware,
    ConflictAwareDPOConfig,
    ConflictAwareDPOTrainer,
    ConflictAwareTangentDPOConfig,
    ConflictAwareTangentDPOTrainer,
    MeasuredConflict,
)
from tangent_peft.tuner import TangentConfig
from tangent_peft.tuner.export.atomic import fresh_folder
from tangent_peft.tuner.movement import Movement


STAGE = "stage.json"
OWN_OPTIONS = {"output_dir", "axis"}
DEFAULTS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}

Load: TypeAlias = Callable[[], tuple[Any, PreTrainedTokenizerBase]]
Evaluate: TypeAlias = Callable[[Any, PreTrainedTokenizerBase, Sequence[str]], Any]


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        name: of its stage.
        train: its preference pairs, in TRL's formats.
        heldout: pairs that it is not trained on, on whose gradient later stages are measured; `None`: they are not.
    """

    name: str
    train: Dataset
    heldout: Dataset | None = None


@dataclass(frozen=True)
class SequentialSetup:
    """What all stages share.

    Attributes:
        load: loads the base model and its tokenizer, the same at every call.
        adapter: a `LoraConfig` or a `TangentConfig`.
        training: options of `ConflictAwareDPOConfig` or, for a tangent axis, `ConflictAwareTangentDPOConfig`; by
            default nothing is saved but the result. `project_conflicts` counts from the second stage on.
    """

    load: Load
    adapter: PeftConfig
    training: Mapping[str, Any]

    def __post_init__(self) -> None:
        if taken := OWN_OPTIONS & set(self.training):
            raise ValueError(f"`training` sets {sorted(taken)}, which the stages decide themselves. Leave them out.")

    @property
    def tangent(self) -> bool:
        """Whether the adapter is a tangent axis."""
        return isinstance(self.adapter, TangentConfig)


@dataclass(frozen=True)
class StageRecord:
    """What is known of a finished stage, as in its `stage.json`.

    Attributes:
        objective: what it trained.
        previous: the objectives before it, in order.
        folder: where its adapter lies.
        pairs: size of its data.
        seconds: of training.
        trained_parameters: their number.
        conflicts: gradient cosines with previous objectives.
        movement: of the adapter, from the beginning of the stage to its end; `None` where it has no factors of a ΔW.
        log: the trainer's.
        evaluation: what the caller's `evaluate` returned.
        inputs: digests of what went in.
    """

    objective: str
    previous: list[str]
    folder: str
    pairs: int
    seconds: float
    trained_parameters: int
    conflicts: list[MeasuredConflict]
    movement: Movement | None
    log: list[dict[str, Any]]
    evaluation: Any
    inputs: dict[str, str]

    @classmethod
    def read(cls, folder: str | Path) -> StageRecord:
        """Reads the record of a finished stage.

        Raises:
            FileNotFoundError: if the folder holds none.
            ValueError: if it is damaged.
        """
        path = Path(folder) / STAGE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no finished stage: there is no {STAGE} in it.")
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            moved = held.pop("movement")
            conflicts = [MeasuredConflict(**_with_nan(one)) for one in held.pop("conflicts")]
            movement = None if moved is None else Movement(**_with_nan(moved))
            return cls(**held, folder=str(folder), conflicts=conflicts, movement=movement)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}). Delete its folder, and run the stage again.") from None


# ---- running ---------------------------------------------------------------------------------------------------------


def run_orders(
    setup: SequentialSetup, objectives: Sequence[Objective], folder: str | Path, evaluate: Evaluate | None = None
) -> dict[str, list[StageRecord]]:
    """Runs the objectives in the given order and in the reverse one; see `run_stages`.

    Returns:
        The stages of each order, by its name, which is that of its folder: `"help-verb"`, `"verb-help"`.
    """
    orders = [list(objectives), list(reversed(objectives))]
    names = ["-".join(objective.name for objective in order) for order in orders]
    return {n: run_stages(setup, order, Path(folder) / n, evaluate) for n, order in zip(names, orders, strict=True)}


def run_stages(
    setup: SequentialSetup, objectives: Sequence[Objective], folder: str | Path, evaluate: Evaluate | None = None
) -> list[StageRecord]:
    """Trains one adapter on one objective after the other; stages that are there already are not run again.

    Args:
        setup: what all stages share.
        objectives: in the order they are trained in.
        folder: gets one folder per stage, `1-help`, `2-verb`.
        evaluate: called with the model, its tokenizer and the names of all objectives after every stage, to score all
            of them; returns what JSON can hold.

    Returns:
        One record per stage.

    Raises:
        ValueError: for no objective, one that is named twice, or a folder that holds stages of other settings or data.
    """
    names = [objective.name for objective in objectives]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Each objective is a stage of its own name; found {names}.")
    records: list[StageRecord] = []
    for position in range(1, len(objectives) + 1):
        place = Path(folder) / f"{position}-{names[position - 1]}"
        start = records[-1].folder if records else None
        call = None if evaluate is None else lambda model, tokenizer: evaluate(model, tokenizer, names)
        records.append(run_stage(setup, objectives[:position], place, start, call))
    return records


def run_stage(
    setup: SequentialSetup,
    objectives: Sequence[Objective],
    folder: str | Path,
    start: str | Path | None = None,
    evaluate: Callable[[Any, PreTrainedTokenizerBase], Any] | None = None,
) -> StageRecord:
    """Trains one stage, or reads its record if it is there.

    Args:
        setup: what all stages share.
        objectives: those so far; the last one is trained.
        folder: of the stage.
        start: folder of the adapter that trains on; `None`: a new one.
        evaluate: called with the model and its tokenizer at the end.

    Raises:
        FileExistsError: if the folder holds something else.
        ValueError: if it holds a stage of other settings or data.
    """
    folder, inputs = Path(folder), _digests(setup, objectives, start)
    if (folder / STAGE).is_file():
        record = StageRecord.read(folder)
        if different := sorted(n for n in inputs | record.inputs if inputs.get(n) != record.inputs.get(n)):
            raise ValueError(
                f"{folder} holds a stage that was run with another {different[0]!r} ({len(different)} inputs differ). "
                "Choose another folder, or delete that one."
            )
        return record
    with fresh_folder(folder, overwrite=False, marker=STAGE) as unfinished:
        trainer = _trainer(setup, objectives, start, unfinished / "run")
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        model = trainer.model
        record = StageRecord(
            objective=objectives[-1].name,
            previous=[objective.name for objective in objectives[:-1]],
            folder=str(folder),
            pairs=len(objectives[-1].train),
            seconds=round(seconds, 1),
            trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            conflicts=trainer.conflicts,
            movement=trainer.movement(),
            log=trainer.state.log_history,
            evaluation=None if evaluate is None else evaluate(model.eval(), trainer.processing_class),
            inputs=inputs,
        )
        model.save_pretrained(unfinished)
        shutil.rmtree(unfinished / "run", ignore_errors=True)
        (unfinished / STAGE).write_text(_as_json(record), encoding="utf-8")
    return record


def _trainer(
    setup: SequentialSetup, objectives: Sequence[Objective], start: str | Path | None, folder: Path
) -> ConflictAware:
    options: dict[str, Any] = {**DEFAULTS, **setup.training, "output_dir": str(folder)}
    previous = {one.name: one.heldout for one in objectives[:-1] if one.heldout is not None}
    if len(objectives) == 1:
        options["project_conflicts"] = False
    given: dict[str, Any] = {"train_dataset": objectives[-1].train, "previous_datasets": previous}
    arguments = (ConflictAwareTangentDPOConfig if setup.tangent else ConflictAwareDPOConfig)(**options)
    set_seed(arguments.seed)
    model, given["processing_class"] = setup.load()
    if start is None:
        given["peft_config"] = setup.adapter
    else:
        model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    trainer: ConflictAware
    if setup.tangent:
        trainer = ConflictAwareTangentDPOTrainer(model=model, args=arguments, **given)
    else:
        trainer = ConflictAwareDPOTrainer(model=model, args=arguments, **given)
    trainer.remove_callback(PrinterCallback)  # the log is in the record
    return trainer


# ---- records ---------------------------------------------------------------------------------------------------------


def _digests(setup: SequentialSetup, objectives: Sequence[Objective], start: str | Path | None) -> dict[str, str]:
    """What tells apart stages: options, adapter, data, and the adapter that is trained on."""
    found = {f"training option {name}": repr(value) for name, value in sorted(setup.training.items())}
    found["adapter"] = _digest([json.dumps(setup.adapter.to_dict(), sort_keys=True, default=_plain)])
    found["order"] = " ".join(objective.name for objective in objectives)
    found["pairs"] = _digest(json.dumps(row, default=str) for row in objectives[-1].train)
    for one in objectives[:-1]:
        if one.heldout is not None:
            found[f"held-out pairs of {one.name}"] = _digest(json.dumps(row, default=str) for row in one.heldout)
    files = [] if start is None else sorted(Path(start).glob("adapter_model.*"))
    if start is not None and not files:
        raise FileNotFoundError(f"{start} holds no adapter to train on. Run the stage before it first.")
    if files:
        with files[0].open("rb") as stream:
            found["start"] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    return found


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def _as_json(record: StageRecord) -> str:
    held = {name: value for name, value in asdict(record).items() if name != "folder"}
    return json.dumps(_without_nan(held), indent=1, allow_nan=False)


def _without_nan(value: Any) -> Any:
    """A value with `None` for numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(held: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in held.items()}
