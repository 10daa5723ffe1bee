"""The result of a comparison: every point, fronts, control and safety, as plain values in one JSON file.

Fronts are compared by `evaluate.pareto`, control by `evaluate.control`; which points belong together is decided here.
Draws nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tangent_peft.compare.scores import BASE, GAIN, METRICS, POLICY, Array, collapse, pair_scores, resampled
from tangent_peft.compare.scoring import HeldOut, held_out
from tangent_peft.compare.settings import Settings, mix_key
from tangent_peft.compare.sources import Scored, score, sources
from tangent_peft.compare.training import RECORD, trainings
from tangent_peft.evaluate.control import control_quality
from tangent_peft.evaluate.pareto import compare_fronts
from tangent_peft.evaluate.pareto_interval import hypervolume_interval
from tangent_peft.tuner.axes import SAFE_WEIGHT
from tangent_peft.tuner.files import write_text
from tangent_peft.tuner.linearity import GAP_LIMIT


FORMAT, VERSION = "tangent_peft comparison", 1
REFERENCE = BASE - 0.1  # the hypervolume's reference point in every score: a tenth below the base model
LIMITS = {"gap": GAP_LIMIT, "weight": SAFE_WEIGHT}  # from where a mix is flagged as unsafe
JUDGED = ("preference", POLICY)  # scores of control and safety; reward accuracy does not see how large λ is
CONTROL = 2.0  # |λ| up to which control is judged
REGIMES = {
    "convex": "mixes with λ ≥ 0 that add up to 1",
    "affine": "mixes that add up to 1",
    "all": "every mix that was scored",
}
TS_DPO = ("ts_dpo linearized", "ts_dpo merged")


@dataclass(frozen=True)
class ComparisonResult:
    """Result of `run_comparison`; plain values throughout.

    Attributes:
        settings: of the comparison.
        environment: device and versions.
        points: one entry for every seed, source and mix: its λ, mean scores and standard errors by metric and axis, and
            the linearity gap where it was measured.
        fronts: by metric and regime: indicators of every source for each seed, mean and standard deviation of the
            hypervolume over the seeds, and bootstrap intervals over pairs of the seeds' mean.
        control: by metric, source and axis, one entry per seed: Kendall τ, leakage, jumps along the axis's line.
        safety: of TS-DPO as weights: by metric, axis and sign of λ, one entry per seed: where it was flagged, where its
            score turned down.
        cosine: of the axes, by method, one matrix per seed.
        trainings: seconds, parameters and last losses.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    points: list[dict[str, Any]]
    fronts: dict[str, Any]
    control: dict[str, Any]
    safety: dict[str, Any]
    cosine: dict[str, Any]
    trainings: list[dict[str, Any]]

    def save(self, path: str | Path) -> None:
        """Writes the result as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, allow_nan=False)
        write_text(path, text)

    @classmethod
    def load(cls, path: str | Path) -> ComparisonResult:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else, or of another version.
        """
        held = read_document(path, FORMAT, VERSION)
        try:
            return cls(**held)
        except TypeError as error:
            raise ValueError(f"{path} is damaged: {error}. Run the comparison again.") from None


def read_document(path: str | Path, kind: str, version: int) -> dict[str, Any]:
    """The fields of a result that was saved as JSON, without its format and version.

    Args:
        path: the file.
        kind: the `format` it must have.
        version: the one that is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, or of another version.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no result of a comparison: it can not be read as JSON ({error}).") from None
    if not isinstance(held, dict) or held.pop("format", None) != kind:
        raise ValueError(f"{path} is no result of a comparison: its `format` is not {kind!r}.")
    if (found := held.pop("version", None)) != version:
        raise ValueError(f"{path} is of version {found!r}; this release reads version {version}.")
    return held


# ---- one source of one seed ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Items:
    """The scores of single pairs of one source and seed: by metric and axis, (M, n)."""

    mixes: list[dict[str, float]]
    scores: dict[str, dict[str, Array]]
    notes: dict[str, Any]

    def means(self, metric: str) -> Array:
        """Mean scores (M, K) of the mixes on the K axes."""
        return np.stack([scores.mean(1) for scores in self.scores[metric].values()], 1)

    def at(self, mixes: Sequence[Mapping[str, float]]) -> list[int]:
        """The rows of some mixes, those that are there."""
        places = {mix_key(mix): row for row, mix in enumerate(self.mixes)}
        return [places[mix_key(mix)] for mix in mixes if mix_key(mix) in places]

    def part(self, rows: Sequence[int]) -> Items:
        """Some of the mixes."""
        rows = list(rows)
        scores = {metric: {axis: x[rows] for axis, x in found.items()} for metric, found in self.scores.items()}
        return Items([self.mixes[row] for row in rows], scores, {})


def _items(scored: Scored, data: HeldOut, settings: Settings) -> Items:
    found = {axis: pair_scores(scored, data, axis, settings.beta) for axis in settings.axes}
    scores = {m: {axis: x[m] for axis, x in found.items()} for m in (*METRICS, POLICY, GAIN)}
    return Items(scored.mixes, scores, scored.notes)


def _all_items(settings: Settings) -> dict[str, list[Items]]:
    """By source, one entry per seed. DPO-Mixed has the models of Task-Vector DPO at its ends."""
    data = held_out(settings)
    found = {
        source: [_items(score(settings, seed, source), data, settings) for seed in settings.seeds]
        for source in sources(settings)
    }
    if "dpo_mixed" in found:
        ends = [{axis: 1.0} for axis in settings.axes]
        single = [items.part(items.at(ends)) for items in found["task_vectors"]]
        found["dpo_mixed"] = [_joined([own, end]) for own, end in zip(found["dpo_mixed"], single, strict=True)]
    return found


def _joined(parts: Sequence[Items]) -> Items:
    scores = {
        metric: {axis: np.concatenate([part.scores[metric][axis] for part in parts]) for axis in found}
        for metric, found in parts[0].scores.items()
    }
    return Items([mix for part in parts for mix in part.mixes], scores, {})


def _seed_mean(items: Sequence[Items]) -> Items:
    """Scores of single pairs, averaged over the seeds."""
    scores = {
        metric: {axis: np.mean([one.scores[metric][axis] for one in items], axis=0) for axis in found}
        for metric, found in items[0].scores.items()
    }
    return Items(items[0].mixes, scores, {})


# ---- putting it together ---------------------------------------------------------------------------------------------


def collect(settings: Settings, environment: Mapping[str, Any]) -> ComparisonResult:
    """Reads the scores of a finished run, and judges them."""
    found = _all_items(settings)
    cosine = {
        source: [one.notes["cosine"] for one in items] for source, items in found.items() if "cosine" in items[0].notes
    }
    records = [t.folder(settings) / RECORD for seed in settings.seeds for t in trainings(settings, seed)]
    return ComparisonResult(
        settings=settings.to_dict(),
        environment=dict(environment),
        points=list(_points(found, settings)),
        fronts={metric: {regime: _fronts(found, settings, metric, regime) for regime in REGIMES} for metric in METRICS},
        control={metric: _control(found, settings, metric) for metric in JUDGED},
        safety={metric: _safety(found, settings, metric) for metric in JUDGED} if set(TS_DPO) <= set(found) else {},
        cosine=cosine,
        trainings=[_record(path) for path in records],
    )


def _record(path: Path) -> dict[str, Any]:
    held = json.loads(path.read_text(encoding="utf-8"))
    held["losses"] = [float(entry["loss"]) for entry in held.pop("log") if "loss" in entry]
    return {"name": path.parent.name, **held}


def _points(found: Mapping[str, Sequence[Items]], settings: Settings) -> Iterator[dict[str, Any]]:
    gaps = [one.notes.get("gap", []) for one in found.get("ts_dpo linearized", [])]
    for source, seeds in found.items():
        for position, (seed, items) in enumerate(zip(settings.seeds, seeds, strict=True)):
            for row, mix in enumerate(items.mixes):
                point: dict[str, Any] = {"source": source, "seed": seed, "weights": mix}
                for metric, by_axis in items.scores.items():
                    point[metric] = {axis: round(float(x[row].mean()), 5) for axis, x in by_axis.items()}
                    point[f"{metric}_error"] = {axis: round(_error(x[row]), 5) for axis, x in by_axis.items()}
                if source in TS_DPO and gaps and gaps[position]:
                    point["gap"] = round(gaps[position][row], 4)
                yield point


def _error(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _regime(items: Items, settings: Settings, regime: str) -> Items:
    if regime == "all":
        return items
    blend = {mix_key(mix) for mix in [*settings.blend(), *settings.shares()]}
    rows = [row for row, mix in enumerate(items.mixes) if mix_key(mix) in blend]
    if regime == "convex":
        rows = [row for row in rows if min(items.mixes[row].values()) >= 0]
    return items.part(rows)


def _fronts(found: Mapping[str, Sequence[Items]], settings: Settings, metric: str, regime: str) -> dict[str, Any]:
    axes, reference = list(settings.axes), [REFERENCE] * len(settings.axes)
    parts = {source: [_regime(one, settings, regime) for one in seeds] for source, seeds in found.items()}
    seeds = [
        compare_fronts({source: of[number].means(metric) for source, of in parts.items()}, axes, reference).to_dict()
        for number in range(len(settings.seeds))
    ]
    volumes = {source: [one["qualities"][source]["hypervolume"] for one in seeds] for source in parts}
    pooled = {source: _seed_mean(of) for source, of in parts.items()}
    scale = compare_fronts({source: items.means(metric) for source, items in pooled.items()}, axes, reference).scale
    data = held_out(settings)
    shared = all(index == data.index[axes[0]] for index in data.index.values())
    single = {source: _by_item(items.scores[metric], shared) for source, items in pooled.items()}
    return {
        "regime": REGIMES[regime],
        "metric": METRICS[metric],
        "reference": dict.fromkeys(axes, REFERENCE),
        "points": {source: len(of[0].mixes) for source, of in parts.items()},
        "hypervolume": {s: {"mean": float(np.mean(v)), "sd": deviation(v), "seeds": v} for s, v in volumes.items()},
        "of_seed_mean": hypervolume_interval(single, scale, resamples=500).to_dict(),
        "seeds": seeds,
    }


def _by_item(scores: Mapping[str, Array], shared: bool) -> Any:
    """The scores of single pairs as the bootstrap draws them: together where the axes share their pairs."""
    columns = list(scores.values())
    return np.stack(columns, 1) if shared else columns


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over the seeds (n − 1 in the denominator); 0 for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _control(found: Mapping[str, Sequence[Items]], settings: Settings, metric: str) -> dict[str, Any]:
    """How an axis's own line of λ moves its own score and those of the others, for |λ| ≤ 2 and for all λ."""
    result: dict[str, Any] = {}
    for source, seeds in found.items():
        if source == "dpo_mixed":  # has no λ to turn
            continue
        result[source] = {}
        for axis, line in settings.lines().items():
            near = [mix for mix in line if abs(mix.get(axis, 0.0)) <= CONTROL]
            result[source][axis] = [
                {"near": _line(items, near, axis, metric), "all": _line(items, line, axis, metric)} for items in seeds
            ]
    return result


def _line(items: Items, line: Sequence[Mapping[str, float]], axis: str, metric: str) -> dict[str, Any]:
    part = items.part(items.at(line))
    weights = [mix.get(axis, 0.0) for mix in part.mixes]
    scores = part.scores[metric]
    others = {name: x.mean(1) for name, x in scores.items() if name != axis}
    own = scores[axis]
    return control_quality(weights, own.mean(1), others=others, samples=resampled(own)).to_dict()


def _safety(found: Mapping[str, Sequence[Items]], settings: Settings, metric: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for axis, line in settings.lines().items():
        for sign, name in ((1, "positive"), (-1, "negative")):
            chosen = sorted((m for m in line if sign * m.get(axis, 0.0) >= 0), key=lambda m: abs(m.get(axis, 0.0)))
            entries = []
            for merged, linear in zip(found["ts_dpo merged"], found["ts_dpo linearized"], strict=True):
                rows = merged.at(chosen)
                weights = np.array([abs(mix.get(axis, 0.0)) for mix in chosen])
                values = merged.scores[metric][axis][rows]
                gaps = np.array(linear.notes["gap"])[rows]
                entries.append(collapse(weights, values if sign > 0 else -values, gaps, LIMITS))
            result.setdefault(axis, {})[name] = entries
    return {"limits": LIMITS, **result}
