"""D-STEER as one call: vectors from some prompts, judged on others.

Prompts are split by a hash of their text and a seed, so that a prompt never is on both sides, in whatever order it is
given and however often it occurs, among the prompts or in a pair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from tangent_peft.diagnose.prompts import answer_batches, prompt_batches
from tangent_peft.diagnose.result import Diagnosis, Table, Verdict
from tangent_peft.diagnose.states import ModelState, check_comparable
from tangent_peft.diagnose.steering.measure import ShiftOptions, steering_vectors
from tangent_peft.diagnose.steering.shift import SteeringShift
from tangent_peft.diagnose.steering.sweep import SteeringEffect
from tangent_peft.diagnose.steering.trial import EffectOptions, steering_effect
from tangent_peft.diagnose.steering.vectors import SteeringVectors
from tangent_peft.evaluate.chats import messages
from tangent_peft.evaluate.pairs import Pair
from tangent_peft.evaluate.scorers import Prompt


Position = Literal["prompt", "answer"]
POSITIONS: dict[Position, str] = {"prompt": "last prompt token", "answer": "mean over the chosen answer"}


@dataclass(frozen=True)
class SteeringOptions:
    """How `diagnose_steering` proceeds.

    Attributes:
        positions: where δ is taken; the paper's formula has the prompt.
        steer_with: the position whose vectors are tried out. They are tried on answers, where those of prompts can be
            of quite another length: on SmolLM2 they are three times as long.
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
        ValueError: for models that differ in architecture, or a split that leaves too little on a side.
    """
    check_comparable(base, tuned)
    vectors: dict[str, SteeringVectors] = {}
    shifts: dict[str, SteeringShift] = {}
    used: set[str] = set()
    for position in options.positions:
        rows: Sequence[Any] = prompts if position == "prompt" else pairs
        keys = _keys(rows) if position == "prompt" else _keys([pair["prompt"] for pair in pairs])
        held = _held_out(keys, options)
        most = options.max_prompts if position == "prompt" else options.max_answers
        fitted = [index for index, key in enumerate(keys) if key not in held][:most]
        judged = [index for index, key in enumerate(keys) if key in held][: max(most // 2, 1)]
        if len(fitted) < 2:
            raise ValueError(
                f"The split leaves {len(fitted)} of {len(keys)} rows to make vectors of {POSITIONS[position]!r} from; "
                "they take at least two, better 32. Give more prompts and pairs, or a smaller `held_out`."
            )
        made = [_batches(position, tokenizer, [rows[i] for i in part], base, options) for part in (fitted, judged)]
        vectors[position], shifts[position] = steering_vectors(
            base, tuned, made[0], POSITIONS[position], made[1], options.shift
        )
        if position == options.steer_with:
            used = {keys[index] for index in fitted}
    new = [pair for pair, key in zip(pairs, _keys([p["prompt"] for p in pairs]), strict=True) if key not in used]
    if not new:
        raise ValueError(
            "The prompt of each pair was used to make the vectors, so none is left to judge them on. Give other pairs, "
            "or a larger `held_out`."
        )
    unseen = [prompt for prompt, key in zip(prompts, _keys(prompts), strict=True) if key not in used]
    kept = unseen[: options.max_pairs]
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
    if not rows:
        return ()
    if position == "prompt":
        return prompt_batches(tokenizer, rows, options.batch_size, base.device)
    return answer_batches(tokenizer, rows, options.batch_size, base.device)


def _keys(prompts: Sequence[Prompt]) -> list[str]:
    """What tells one prompt from another: its messages; a text is a user's message."""
    return [json.dumps(messages(prompt, index), sort_keys=True) for index, prompt in enumerate(prompts)]


def _held_out(keys: Sequence[str], options: SteeringOptions) -> set[str]:
    """The share of the different prompts that come first in the order of their hashes, at least one."""
    different = sorted(set(keys), key=lambda key: hashlib.sha256(f"{options.seed} {key}".encode()).digest())
    return set(different[: max(round(options.held_out * len(different)), 1)])
