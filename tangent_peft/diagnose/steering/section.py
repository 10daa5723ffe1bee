"""D-STEER as one call: vectors from some prompts, judged on others.

Prompts are split by a hash of their text and a seed, so that a prompt never is on both sides, in whatever order it is
given and however often it occurs, among the prompts or in a pair. A row that is given twice counts once: left out of a
mean, it would still be in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from tangent_peft.diagnose.prompts import answer_batches, check_answers, prompt_batches
from tangent_peft.diagnose.result import Diagnosis, Table, Verdict
from tangent_peft.diagnose.states import ModelState, check_comparable
from tangent_peft.diagnose.steering.measure import ShiftOptions, steering_vectors
from tangent_peft.diagnose.steering.shift import SteeringShift
from tangent_peft.diagnose.steering.sweep import SteeringEffect
from tangent_peft.diagnose.steering.trial import EffectOptions, steering_effect
from tangent_peft.diagnose.steering.vectors import SteeringVectors
from tangent_peft.evaluate.chats import messages
from tangent_peft.evaluate.pairs import ANSWERS, Pair
from tangent_peft.evaluate.preferences import check_pairs
from tangent_peft.evaluate.scorers import Prompt


Position = Literal["prompt", "answer"]
POSITIONS: dict[Position, str] = {"prompt": "last prompt token", "answer": "mean over the chosen answer"}


@dataclass(frozen=True)
class SteeringOptions:
    """How `diagnose_steering` proceeds.

    Attributes:
        positions: where δ is taken; the paper's formula has the prompt.
        steer_with: the position whose vectors are tried out. They are tried on answers, where those of prompts can be
            of quite another length.
        held_out: share of the prompts that vectors are judged on.
        seed: of the split.
        max_prompts: at most so many prompts make a vector, and at most half as many judge it.
        max_answers: the same for answers, which are longer.
        max_pairs: at most so many pairs are read to see what it does.
        batch_size: rows of a batch.
        shift: thresholds of `steering_vectors`.
        effect: λ, layers and sizes of `steering_effect`.
    """

    positions: tuple[Position, ...] = ("prompt", "answer")
    steer_with: Position = "answer"
    held_out: float = 0.25
    seed: int = 0
    max_prompts: int = 64
    max_answers: int = 32
    max_pairs: int = 16
    batch_size: int = 8
    shift: ShiftOptions = field(default_factory=ShiftOptions)
    effect: EffectOptions = field(default_factory=EffectOptions)

    def __post_init__(self) -> None:
        if not self.positions or set(self.positions) - set(POSITIONS) or self.steer_with not in self.positions:
            raise ValueError(
                f"`positions` holds some of {sorted(POSITIONS)}, and `steer_with` is one of them; found "
                f"{self.positions} and {self.steer_with!r}."
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"`held_out` is a share between 0 and 1; found {self.held_out}.")
        if min(self.max_prompts, self.max_answers, self.max_pairs, self.batch_size) < 1:
            raise ValueError("`max_prompts`, `max_answers`, `max_pairs` and `batch_size` are positive numbers.")


@dataclass(frozen=True)
class SteeringDiagnosis(Diagnosis):
    """Result of `diagnose_steering`.

    Attributes:
        shifts: what the shift is like, by position.
        effect: what the vectors do.
        vectors: the vectors, by position; saved by `save_vectors`, not in the JSON file.
        settings: split, seed and sizes.
    """

    title: ClassVar[str] = "D-STEER: steering vectors"

    shifts: dict[str, SteeringShift]
    effect: SteeringEffect
    vectors: dict[str, SteeringVectors]
    settings: dict[str, Any]

    def tables(self) -> list[Table]:
        """Those of each position, and of the effect."""
        return [table for part in self._parts() for table in part.tables()]

    def verdicts(self) -> list[Verdict]:
        """Those of each position, which they name, and of the effect."""
        found = [
            Verdict(verdict.finding, f"{POSITIONS[position].capitalize()}: {verdict.text}")  # type: ignore[index]
            for position, shift in self.shifts.items()
            for verdict in shift.verdicts()
        ]
        return [*found, *self.effect.verdicts()]

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws the pictures of each position, and of the effect."""
        return [path for part in self._parts() for path in part.plot(folder)]

    def to_dict(self) -> dict[str, Any]:
        """The numbers; the vectors are tensors, and left to `save_vectors`."""
        parts = {position: shift.to_dict() for position, shift in self.shifts.items()}
        return {"shifts": parts, "effect": self.effect.to_dict(), "settings": dict(self.settings)}

    def save_vectors(self, folder: str | Path) -> list[Path]:
        """Writes the vectors of each position as `steering_POSITION.safetensors`.

        Raises:
            OSError: if one can not be written.
        """
        paths = [Path(folder) / f"steering_{position}.safetensors" for position in self.vectors]
        for path, vectors in zip(paths, self.vectors.values(), strict=True):
            vectors.save(path)
        return paths

    def _parts(self) -> list[Diagnosis]:
        return [*self.shifts.values(), self.effect]


def diagnose_steering(
    base: ModelState,
    tuned: ModelState,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    options: SteeringOptions = SteeringOptions(),
) -> SteeringDiagnosis:
    """Measures v⋆ at the last token of prompts and over answers, and what it does on prompts it was not made from.

    Args:
        base: the model before, for example `ModelState.base(model)`.
        tuned: the model after: a mix of axes, or another checkpoint with the same tokenizer.
        tokenizer: of both; see `check_same_tokenizer`.
        prompts: at least a few dozen.
        pairs: preference pairs; their prompts may be among `prompts`.
        options: positions, split, sizes.

    Raises:
        ValueError: for models that differ in architecture, no pairs, one that lacks a part or has an empty answer, or a
            split that leaves too little on a side.
    """
    check_comparable(base, tuned)
    check_pairs(pairs, options.batch_size)
    lacking = [index for index, pair in enumerate(pairs) if not {"prompt", *ANSWERS} <= set(pair)]
    if lacking:
        raise ValueError(
            f"Pair {lacking[0]} lacks one of `prompt`, `chosen` and `rejected`: {sorted(pairs[lacking[0]])}."
        )
    check_answers(pairs)
    vectors: dict[str, SteeringVectors] = {}
    shifts: dict[str, SteeringShift] = {}
    used: set[str] = set()
    for position in options.positions:
        parts = split_rows(position, prompts if position == "prompt" else pairs, options)
        made = [_batches(position, tokenizer, part, base, options) for part in parts]
        vectors[position], shifts[position] = steering_vectors(
            base, tuned, made[0], POSITIONS[position], made[1], options.shift
        )
        if position == options.steer_with:
            used = set(_keys(position, parts[0]))
    new = [pair for pair, key in _distinct("answer", pairs, options) if key not in used]
    if not new:
        raise ValueError(
            "The prompt of each pair was used to make the vectors, so none is left to judge them on. Give other pairs, "
            "or a larger `held_out`."
        )
    kept = [prompt for prompt, key in _distinct("prompt", prompts, options) if key not in used][: options.max_pairs]
    effect = steering_effect(
        base, tuned, vectors[options.steer_with], tokenizer, new[: options.max_pairs], kept, options.effect
    )
    kept_options = ("steer_with", "held_out", "seed", "max_prompts", "max_answers", "max_pairs", "batch_size")
    settings = {name: vars(options)[name] for name in kept_options}
    return SteeringDiagnosis(shifts, effect, vectors, {**settings, "prompts": len(prompts), "pairs": len(pairs)})


def _batches(
    position: Position,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Any],
    base: ModelState,
    options: SteeringOptions,
) -> Iterable[Any]:
    if position == "prompt":
        return prompt_batches(tokenizer, rows, options.batch_size, base.device)
    return answer_batches(tokenizer, rows, options.batch_size, base.device)


def split_rows(
    position: Position, rows: Sequence[Any], options: SteeringOptions = SteeringOptions()
) -> tuple[list[Any], list[Any]]:
    """The rows that vectors are made from, and others, of other prompts, that they are judged on.

    Args:
        position: `"prompt"` for prompts, `"answer"` for pairs.
        rows: in any order; one that is given several times is taken once.
        options: share that is held out, seed, and how many rows are taken at most.

    Raises:
        ValueError: for a prompt that is none, or a split that leaves less than two rows to make vectors from.
    """
    different = _distinct(position, rows, options)
    keys = list(dict.fromkeys(key for _, key in different))
    held = set(keys[: max(round(options.held_out * len(keys)), 1)])
    most = options.max_prompts if position == "prompt" else options.max_answers
    fitted = [row for row, key in different if key not in held][:most]
    if len(fitted) < 2:
        raise ValueError(
            f"The split leaves {len(fitted)} of {len(different)} rows to make vectors of {POSITIONS[position]!r} from; "
            "they take at least two, better 32. Give more prompts and pairs, or a smaller `held_out`."
        )
    return fitted, [row for row, key in different if key in held][: max(most // 2, 1)]


def _distinct(position: Position, rows: Sequence[Any], options: SteeringOptions) -> list[tuple[Any, str]]:
    """Each different row once, with its prompt's key, in the order of the hashes of prompts."""
    found: dict[tuple[str, str], Any] = {}
    for row, key in zip(rows, _keys(position, rows), strict=True):
        found[key, "" if position == "prompt" else json.dumps(row, sort_keys=True, default=str)] = row

    def place(entry: tuple[str, str]) -> tuple[bytes, str]:
        return hashlib.sha256(f"{options.seed} {entry[0]}".encode()).digest(), entry[1]

    return [(found[entry], entry[0]) for entry in sorted(found, key=place)]


def _keys(position: Position, rows: Sequence[Any]) -> list[str]:
    """What tells one prompt from another: its messages; a text is a user's message."""
    prompts = rows if position == "prompt" else [row["prompt"] for row in rows]
    return [json.dumps(messages(prompt, index), sort_keys=True) for index, prompt in enumerate(prompts)]
