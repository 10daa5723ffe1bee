"""What steering vectors do: base + λ v⋆ (interpolation) and tuned − λ v⋆ (inversion), on answers read token by token.

Beside each λ stand random directions of the same norm, which D-STEER (arXiv 2512.11838) does not have: what a vector
does that they do not is what it means. The pairs must be others than those that made the vectors; `diagnose_steering`
sees to that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tangent_peft.diagnose.activations import check_layer
from tangent_peft.diagnose.prompts import check_answers
from tangent_peft.diagnose.states import ModelState, check_comparable
from tangent_peft.diagnose.steering.greedy import GREEDY_METRICS, GreedyAnswers
from tangent_peft.diagnose.steering.hooks import steered
from tangent_peft.diagnose.steering.resume import Resumable
from tangent_peft.diagnose.steering.sweep import MODES, Mode, SteeringEffect, SteeringPoint
from tangent_peft.diagnose.steering.tokens import METRICS, Comparison, Reference, shortened
from tangent_peft.diagnose.steering.vectors import SteeringVectors
from tangent_peft.evaluate.pairs import Pair
from tangent_peft.evaluate.preferences import AnswerTokens, check_pairs
from tangent_peft.evaluate.scorers import Prompt


@dataclass(frozen=True)
class EffectOptions:
    """How the effect of steering is measured.

    Attributes:
        strengths: λ of both sweeps; 0 is always measured. The paper goes from −1 to 1.
        layers: which layers get their vector; `None`: the last one, as in the paper. Its code steers 27 to 31 of 32.
        control_seeds: number of random directions beside each λ.
        seed: of the first of them.
        preserve_norm: give h + λ v⋆ the norm of h; not for a linearized state.
        answer_tokens: how many tokens of each answer are read; `None`: all.
        batch_size: pairs of a batch.
        generate_tokens: length of greedy answers to the held-out prompts; 0: none are generated, which takes long.
    """

    strengths: tuple[float, ...] = (-1.0, 0.5, 1.0, 2.0)
    layers: tuple[int, ...] | None = None
    control_seeds: int = 3
    seed: int = 0
    preserve_norm: bool = False
    answer_tokens: int | None = 32
    batch_size: int = 4
    generate_tokens: int = 0

    def __post_init__(self) -> None:
        if self.control_seeds < 2:
            raise ValueError(f"`control_seeds` is at least 2, or there is no deviation; found {self.control_seeds}.")
        if not self.strengths or len(set(self.strengths)) != len(self.strengths):
            raise ValueError(f"`strengths` holds different λ, at least one; found {self.strengths}.")
        if self.generate_tokens < 0:
            raise ValueError(f"`generate_tokens` is 0 or a number of tokens; found {self.generate_tokens}.")


Key = tuple[Mode, float, int | None]  # the seed of a random direction; `None`: v⋆


@dataclass
class _Sweep:
    """What is run: the two states, and the shift of the hidden states for each condition."""

    base: ModelState
    tuned: ModelState
    vectors: SteeringVectors
    options: EffectOptions
    controls: dict[int, SteeringVectors] = field(default_factory=dict)

    def conditions(self, mode: Mode) -> Iterator[tuple[Key, dict[int, Tensor]]]:
        seeds = [None, *range(self.options.seed, self.options.seed + self.options.control_seeds)]
        for strength in self.options.strengths:
            for seed in seeds if strength else []:
                made = self.vectors if seed is None else self.controls.setdefault(seed, self.vectors.random(seed))
                sign = 1.0 if mode == "interpolation" else -1.0
                yield (mode, strength, seed), made.shifts(sign * strength, self.options.layers)

    def steered(self, root: PreTrainedModel, shifts: dict[int, Tensor]) -> AbstractContextManager[None]:
        return steered(root, shifts, preserve_norm=self.options.preserve_norm)


@torch.no_grad()
def steering_effect(
    base: ModelState,
    tuned: ModelState,
    vectors: SteeringVectors,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    prompts: Sequence[Prompt] = (),
    options: EffectOptions = EffectOptions(),
) -> SteeringEffect:
    """Steers both models along λ and compares them with both models unsteered.

    Args:
        base: the model before; it gets h + λ v⋆.
        tuned: the model after; it gets h − λ v⋆.
        vectors: of `steering_vectors`, from other prompts than these.
        tokenizer: of both models.
        pairs: held-out preference pairs, whose answers are read.
        prompts: held-out prompts, for greedy answers; needed if `generate_tokens` is set.
        options: λ, layers, controls, sizes.

    Raises:
        ValueError: for models that differ in architecture, vectors that do not fit, no pairs, an empty answer, or
            greedy answers without prompts.
        IndexError: for a layer out of range.
    """
    check_comparable(base, tuned)
    vectors.check(base.root)
    check_pairs(pairs, options.batch_size)
    check_answers(pairs)
    if options.generate_tokens and not prompts:
        raise ValueError(f"`generate_tokens` is {options.generate_tokens} and no prompts are given to answer.")
    sweep = _Sweep(base, tuned, vectors, options)
    found = {key: comparison.values() for key, comparison in _read(sweep, tokenizer, pairs).items()}
    if options.generate_tokens:
        for key, values in _generated(sweep, tokenizer, prompts).items():
            found[key] |= values
    layers = sorted(vectors.shifts(1.0, options.layers))
    settings = {
        "model": vectors.model,
        "dtype": str(tuned.root.dtype),
        "linearized": tuned.linearized,
        "layers": layers,
        "position of the vectors": vectors.position,
        "rows behind the vectors": vectors.count,
        "vectors_digest": vectors.digest,
        **{name: vars(options)[name] for name in ("control_seeds", "seed", "preserve_norm", "answer_tokens")},
        "generate_tokens": options.generate_tokens,
        "prompts": len(prompts),
    }
    starts: dict[str, dict[str, float]] = {mode: found[mode, 0.0, None] for mode in MODES}
    metrics = {**METRICS, **(GREEDY_METRICS if options.generate_tokens else {})}
    points = [_point(found, mode, strength, list(metrics), options) for mode in MODES for strength in options.strengths]
    kept = [point for point in points if point is not None]
    return SteeringEffect(base.name, tuned.name, len(pairs), layers, metrics, starts, kept, settings)


def _point(
    found: dict[Key, dict[str, float]], mode: Mode, strength: float, metrics: list[str], options: EffectOptions
) -> SteeringPoint | None:
    if not strength:
        return None
    seeds = range(options.seed, options.seed + options.control_seeds)
    controls = {name: [found[mode, strength, seed][name] for seed in seeds] for name in metrics}
    means = {name: statistics.fmean(values) for name, values in controls.items()}
    deviations = {name: statistics.stdev(values) for name, values in controls.items()}
    return SteeringPoint(mode, strength, found[mode, strength, None], controls, means, deviations)


def _read(sweep: _Sweep, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> dict[Key, Comparison]:
    """Each condition on each batch: one whole forward of either model, then what is above the steered layers."""
    found: dict[Key, Comparison] = {}
    options, size = sweep.options, sweep.options.batch_size
    lowest = min(check_layer(layer, sweep.vectors.blocks) for layer in sweep.vectors.shifts(1.0, options.layers))
    states: dict[Mode, ModelState] = {"interpolation": sweep.base, "inversion": sweep.tuned}
    resumable = {mode: Resumable(state.root, lowest) for mode, state in states.items()}
    for start in range(0, len(pairs), size):
        answers = AnswerTokens.of(tokenizer, pairs[start : start + size], sweep.base.device)
        answers = shortened(answers, options.answer_tokens)
        references = {}
        for mode, state in states.items():
            with state.active() as root:
                logits = resumable[mode].first(_logits(answers, root))
            references[mode] = Reference.of(logits, answers)
        both = references["interpolation"], references["inversion"]
        for mode, state in states.items():
            found.setdefault((mode, 0.0, None), Comparison()).add_reference(references[mode], answers, *both)
            with state.active() as root, resumable[mode].resumed():
                for key, shifts in sweep.conditions(mode):
                    with sweep.steered(root, shifts):
                        logits = answers.logits(root)
                    found.setdefault(key, Comparison()).add(logits, answers, *both)
    return found


def _logits(answers: AnswerTokens, root: Any) -> Callable[[], Tensor]:
    return lambda: answers.logits(root)


def _generated(
    sweep: _Sweep, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> dict[Key, dict[str, float]]:
    """Greedy answers of each condition, compared with those of both models unsteered."""
    greedy = GreedyAnswers(tokenizer, prompts, sweep.options.generate_tokens)
    states: dict[Mode, ModelState] = {"interpolation": sweep.base, "inversion": sweep.tuned}
    plain = {}
    for mode, state in states.items():
        with state.active():
            plain[mode] = greedy.of(state.model)
    both = plain["interpolation"], plain["inversion"]
    found: dict[Key, dict[str, float]] = {}
    for mode, state in states.items():
        found[mode, 0.0, None] = greedy.compare(plain[mode], *both)
        with state.active() as root:
            for key, shifts in sweep.conditions(mode):
                with sweep.steered(root, shifts):
                    found[key] = greedy.compare(greedy.of(state.model), *both)
    return found
