"""The sections of a diagnosis: what each asks, what it needs, and how it is made of what was loaded.

One small function per section, each giving the parts of its section as names and calls that nothing has run yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import Any, Literal, TypeAlias

from tangent_peft.cli.diagnose_data import Data
from tangent_peft.cli.diagnose_subject import Loaded, Subject
from tangent_peft.diagnose.activations import decoder_blocks
from tangent_peft.diagnose.geometry.axes import axis_geometry
from tangent_peft.diagnose.interference.measure import InterferenceSettings, axis_interference
from tangent_peft.diagnose.linearity.additivity import additivity
from tangent_peft.diagnose.linearity.profile import WEIGHTS, linearity_profile
from tangent_peft.diagnose.linearity.safe_range import safe_range
from tangent_peft.diagnose.prompts import TokenBatch, answer_batches, prompt_batches
from tangent_peft.diagnose.result import Diagnosis
from tangent_peft.diagnose.spinal.options import SpinalOptions
from tangent_peft.diagnose.spinal.score import spinal_score
from tangent_peft.diagnose.stages.forgetting import Forgetting
from tangent_peft.diagnose.states import ModelState
from tangent_peft.diagnose.steering.measure import ShiftOptions, steering_vectors
from tangent_peft.diagnose.steering.section import POSITIONS, SteeringOptions, diagnose_steering, split_rows
from tangent_peft.diagnose.steering.trial import EffectOptions
from tangent_peft.evaluate.pairs import Pair


Task: TypeAlias = tuple[str, Callable[[], Diagnosis]]
Need: TypeAlias = Literal["models", "axes", "two axes", "pairs", "sequential"]


# Rows that a section reads at most, at an effort of 1: what its time goes with. Whole forwards are few in the cheap
# sections, and one for each λ, cell of a grid, or random direction in the others.
LINEARITY_ROWS, ADDITIVITY_ROWS, SPINAL_ROWS, STEERED_PAIRS = 4, 4, 8, 10
COMPARED_PROMPTS, COMPARED_ANSWERS, LENS_TOKENS = 48, 32, 128
ADDITIVITY_GRID = (-1.5, -1.0, 0.0, 1.0, 1.5)
DEPTHS = (0.5, 0.625, 0.75, 0.875, 1.0)  # shares of the depth at which shifts of two axes are compared


@dataclass(frozen=True)
class How:
    """How everything is measured.

    Attributes:
        limit: linearity gap at which λ stops being safe.
        weights: λ at which the gap is measured; empty for the usual ones.
        seed: of permutations and random controls.
        batch_size: rows of a forward.
        effort: how many times as many rows each section reads as by default.
    """

    limit: float = 0.5
    weights: tuple[float, ...] = ()
    seed: int = 0
    batch_size: int = 8
    effort: int = 1


@dataclass(frozen=True)
class Inputs:
    """Everything that a section is made of.

    Attributes:
        subject: what is diagnosed.
        loaded: it, in memory; `None` if only the result of a sequential training is.
        data: prompts and pairs.
        how: numbers.
        stages: what sequential trainings were found to forget, by what they are.
    """

    subject: Subject
    loaded: Loaded | None
    data: Data
    how: How
    stages: Mapping[str, Forgetting]

    @property
    def models(self) -> Loaded:
        """What was loaded.

        Raises:
            ValueError: if nothing was.
        """
        if self.loaded is None:
            raise ValueError("No model was loaded. Give folders of saved axes, or a checkpoint.")
        return self.loaded

    @property
    def model(self) -> Any:
        """The model with the tangent axes."""
        return self.models.base.model


@dataclass(frozen=True)
class Kind:
    """A section that can be made.

    Attributes:
        key: its name on the command line.
        title: its heading.
        about: what it asks.
        needs: what it can not do without.
        tasks: its parts.
    """

    key: str
    title: str
    about: str
    needs: tuple[Need, ...]
    tasks: Callable[[Inputs], Sequence[Task]]

    def missing(self, subject: Subject, data: Data, stages: Mapping[str, Forgetting]) -> str:
        """What it needs and is not given, as the end of a sentence; empty if nothing."""
        given: dict[Need, tuple[bool, str]] = {
            "models": (bool(subject.base), "needs saved axes, or a checkpoint and its base"),
            "axes": (bool(subject.axes), "needs tangent axes"),
            "two axes": (len(subject.axes) > 1, "needs two tangent axes"),
            "pairs": (bool(data.pairs), "needs --pairs"),
            "sequential": (bool(stages), "needs --sequential with a result of `tangent-peft sequential`"),
        }
        return next((reason for need in self.needs for there, reason in [given[need]] if not there), "")


# ---- what is read ----------------------------------------------------------------------------------------------------


def _token_batches(inputs: Inputs, rows: int) -> list[TokenBatch]:
    """The chosen answers of some pairs of each axis, or the prompts, as tokens; kept: what predicts answers, or all."""
    models, size = inputs.models, inputs.how.batch_size
    pairs = _mixed(inputs.data)[:rows]
    if pairs:
        return list(answer_batches(models.tokenizer, pairs, size, models.base.device, keep="predicting"))
    return list(prompt_batches(models.tokenizer, inputs.data.prompts[:rows], size, models.base.device, keep="all"))


def _mixed(data: Data) -> list[Pair]:
    """The pairs of all axes in turns, so that the first few are of each; one that several have is there once."""
    turns = chain.from_iterable(zip_longest(*data.pairs.values()))
    return list({json.dumps(pair, sort_keys=True, default=str): pair for pair in turns if pair is not None}.values())


def _pairs_of(inputs: Inputs, name: str) -> Sequence[Pair]:
    """Those of an axis; for an axis without, and for a checkpoint, all of them."""
    return inputs.data.pairs.get(name) or _mixed(inputs.data)


# ---- the sections ----------------------------------------------------------------------------------------------------


def _linearity(inputs: Inputs) -> list[Task]:
    def profile() -> Diagnosis:
        weights = inputs.how.weights or WEIGHTS
        batches = _token_batches(inputs, LINEARITY_ROWS * inputs.how.effort)
        return linearity_profile(inputs.model, batches, list(inputs.subject.axes), weights, inputs.how.limit)

    def within(axis: str) -> Diagnosis:
        batches = _token_batches(inputs, LINEARITY_ROWS * inputs.how.effort)
        return safe_range(inputs.model, batches, axis, inputs.how.limit)

    return [("gap", profile), *((f"safe range of {axis}", partial(within, axis)) for axis in inputs.subject.axes)]


def _additivity(inputs: Inputs) -> list[Task]:
    def measured() -> Diagnosis:
        batches = _token_batches(inputs, ADDITIVITY_ROWS * inputs.how.effort)
        return additivity(inputs.model, batches, list(inputs.subject.axes), ADDITIVITY_GRID)

    return [("", measured)]


def _geometry(inputs: Inputs) -> list[Task]:
    return [("", lambda: axis_geometry(inputs.model, list(inputs.subject.axes)))]


def _interference(inputs: Inputs) -> list[Task]:
    def compared(position: Literal["prompt", "answer"], data: Sequence[Any]) -> Diagnosis:
        depth = len(decoder_blocks(inputs.models.base.root))
        settings = InterferenceSettings(
            layers=tuple(sorted({max(1, round(share * depth)) for share in DEPTHS})),
            position=position,
            seed=inputs.how.seed,
            batch_size=inputs.how.batch_size,
        )
        axes = list(inputs.subject.axes)
        return axis_interference(inputs.model, inputs.models.tokenizer, data, axes, settings)

    prompts = inputs.data.prompts[: COMPARED_PROMPTS * inputs.how.effort]
    found: list[Task] = [("last token of the prompts", partial(compared, "prompt", prompts))]
    pairs = _mixed(inputs.data)[: COMPARED_ANSWERS * inputs.how.effort]
    return [*found, ("mean over the answers", partial(compared, "answer", pairs))] if pairs else found


def _steering(inputs: Inputs) -> list[Task]:
    models, how = inputs.models, inputs.how

    def steered(name: str, tuned: ModelState) -> Diagnosis:
        options = SteeringOptions(
            seed=how.seed,
            max_pairs=STEERED_PAIRS * how.effort,
            batch_size=how.batch_size,
            shift=ShiftOptions(seed=how.seed),
            effect=EffectOptions(seed=how.seed),
        )
        pairs, prompts = _pairs_of(inputs, name), inputs.data.prompts
        if pairs:
            return diagnose_steering(models.base, tuned, models.tokenizer, prompts, pairs, options)
        parts = split_rows("prompt", prompts, options)
        made = [prompt_batches(models.tokenizer, part, how.batch_size, models.base.device) for part in parts]
        return steering_vectors(models.base, tuned, made[0], POSITIONS["prompt"], made[1], options.shift)[1]

    return [(_at_one(inputs, name), partial(steered, name, tuned)) for name, tuned in models.tuned.items()]


def _spinal(inputs: Inputs) -> list[Task]:
    models = inputs.models
    rows = SPINAL_ROWS * inputs.how.effort
    options = SpinalOptions(lens_tokens=LENS_TOKENS * inputs.how.effort, gradient_pairs=rows, seed=inputs.how.seed)

    def traced(name: str, tuned: ModelState) -> Diagnosis:
        pairs = _pairs_of(inputs, name)[:rows]
        if pairs:
            return spinal_score(models.base, tuned, models.tokenizer, pairs=pairs, options=options)
        prompts = inputs.data.prompts[:rows]
        return spinal_score(models.base, tuned, models.tokenizer, prompts=prompts, options=options)

    return [(_at_one(inputs, name), partial(traced, name, tuned)) for name, tuned in models.tuned.items()]


def _forgetting(inputs: Inputs) -> list[Task]:
    return [(name, partial(_given, found)) for name, found in inputs.stages.items()]


def _given(found: Diagnosis) -> Diagnosis:
    return found


def _at_one(inputs: Inputs, name: str) -> str:
    return f"{name} at λ = 1" if inputs.subject.axes else name


_KINDS = [
    Kind(
        "linearity",
        "Linearity",
        "How far is the ordinary network at the weights θ₀ + λτ, which merging and exporting give, from the "
        "linearized model that was trained; and up to which λ is that little?",
        ("axes",),
        _linearity,
    ),
    Kind(
        "additivity",
        "Additivity",
        "Does a mix of two axes, as weights, do what both do by themselves?",
        ("two axes",),
        _additivity,
    ),
    Kind(
        "geometry",
        "Geometry of the axes",
        "Where do the axes lie, of which rank are they, and do they point the same way?",
        ("axes",),
        _geometry,
    ),
    Kind(
        "interference",
        "Interference",
        "Do two axes move the hidden states of the same prompts in the same way?",
        ("two axes",),
        _interference,
    ),
    Kind(
        "steering",
        "Steering vectors (D-STEER)",
        "Is what training did to the hidden states one vector, and does that vector do what training did?",
        ("models",),
        _steering,
    ),
    Kind(
        "spinal",
        "Depth (SPINAL)",
        "In which layers did training change how the hidden states contract and how predictions move?",
        ("models",),
        _spinal,
    ),
    Kind(
        "forgetting",
        "Forgetting over stages",
        "What did each further stage of DPO do to the objectives of the stages before it?",
        ("sequential",),
        _forgetting,
    ),
]
SECTIONS: dict[str, Kind] = {kind.key: kind for kind in _KINDS}
