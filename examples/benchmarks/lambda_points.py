"""What scoring many λ costs, in evaluations of the base: `axis_logprobs` on SmolLM2-135M-Instruct with two axes.

Trains the two axes of the quickstart once (kept in the folder given), and scores the answers of held-out pairs: by one
plain evaluation of the base, and by 100 and 1000 mixes of the axes. The time of a sweep includes the two linearized
passes. All variants run in one process on one thread, in turn; a ratio is that of the least of the rounds. Some mixes
are also scored by running the linearized model at them, which tells the largest deviation.

Run as: python examples/benchmarks/lambda_points.py FOLDER
Prints one JSON line; about fifteen minutes on one core, a few more the first time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tangent_peft.cli.jobs import AXES, QuickstartOptions, load_axes, train_axis
from tangent_peft.cli.smollm2 import quickstart_pairs
from tangent_peft.evaluate import axis_logprobs
from tangent_peft.evaluate.pairs import pair_batch
from tangent_peft.evaluate.preferences import pair_logps


POINTS = (100, 1000)


def mixes_of(points: int, reach: float) -> torch.Tensor:
    """Mixes spread evenly over [−reach, reach]²: no two share a λ, so that no grid helps."""
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=points)
    return (sobol.draw(points, dtype=torch.float64) * 2 - 1) * reach


Seconds = tuple[float, float]  # by the clock, and of the processor in this process


def timed(function: Callable[[], Any]) -> tuple[Seconds, Any]:
    """Seconds and result."""
    begin, used = time.perf_counter(), time.process_time()
    result = function()
    return (time.perf_counter() - begin, time.process_time() - used), result


def ratios(times: dict[str, list[Seconds]], clock: int) -> dict[str, float]:
    """Passes and sums over the vocabulary of each sweep, in plain evaluations; the least of the rounds of each."""
    least = {name: min(seconds[clock] for seconds in rounds) for name, rounds in times.items()}
    base, passes = least.pop("plain"), least.pop("passes")
    swept = {name: round((passes + seconds) / base, 2) for name, seconds in least.items()}
    return {**swept, "of which passes": round(passes / base, 2)}


def deviation(model: Any, tokenizer: Any, pairs: list[Any], size: int, scores: Any, mixes: torch.Tensor) -> float:
    """Largest deviation from the linearized model run at each of the mixes, relative to the largest log-prob."""
    worst = 0.0
    for mix, row in zip(mixes, scores.logps(mixes), strict=True):
        with model.axes(dict(zip(scores.axes, mix.tolist(), strict=True))):
            logps, _ = pair_logps(model, tokenizer, pairs, size)
        expected = torch.cat([part.mT.flatten() for part in logps.split(size)]).double()  # in the order of the batches
        worst = max(worst, float((row - expected).abs().max() / expected.abs().max()))
    return worst


def main() -> None:
    """Runs all variants and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the trained axes are kept")
    parser.add_argument("--pairs", type=int, default=8, help="held-out pairs per axis")
    parser.add_argument("--batch", type=int, default=4, help="pairs per forward")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reach", type=float, nargs="+", default=[1.0, 3.0], help="the mixes lie in [−reach, reach]²")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compared", type=int, default=3, help="mixes at which the model is run as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for axis in AXES:
        if not (options.folder / "axes" / axis).is_dir():
            train_axis(axis, QuickstartOptions(output=options.folder))
    model, tokenizer = load_axes(QuickstartOptions(output=options.folder))
    pairs = [pair for axis in AXES for pair in quickstart_pairs(axis, "heldout")[: options.pairs]]
    pairs.sort(key=lambda pair: len(str(pair["chosen"])) + len(str(pair["rejected"])))

    def plain() -> Any:
        with model.axes({}):
            return pair_logps(model, tokenizer, pairs, options.batch)

    def passes() -> Any:
        parts = (pairs[start : start + options.batch] for start in range(0, len(pairs), options.batch))
        return axis_logprobs(model, (pair_batch(tokenizer, part) for part in parts), AXES)

    times: dict[str, list[Seconds]] = {}
    found: dict[str, Any] = {}
    for _ in range(options.rounds):
        runs = {"plain": plain, "passes": passes}
        for name, run in runs.items():
            seconds, found[name] = timed(run)
            times.setdefault(name, []).append(seconds)
        for reach in options.reach:
            for points in POINTS:
                name = f"{points} points, reach {reach:g}"
                seconds, found[name] = timed(lambda p=points, r=reach: found["passes"].score(mixes_of(p, r)))
                times.setdefault(name, []).append(seconds)
    scores = found.pop("passes")
    found.pop("plain")
    deviations = {}
    for reach in options.reach:
        mixes = mixes_of(options.compared, reach)
        error = deviation(model, tokenizer, pairs, options.batch, scores, mixes)
        deviations[f"reach {reach:g}"] = float(f"{error:.1e}")
    print(
        json.dumps(
            {
                "time_over_one_plain_evaluation": ratios(times, 0),
                "processor_time_over_one_plain_evaluation": ratios(times, 1),
                "plain_evaluation_seconds": round(min(times["plain"])[0], 1),
                "tokens": {"scored": len(scores.tokens), "completions": len(scores.lengths)},
                "summed_plainly": {name: round(result.plain, 4) for name, result in found.items()},
                "deviation_of_log_sum_exp": {name: float(f"{x.deviation:.1e}") for name, x in found.items()},
                "deviation_from_running_the_model": deviations,
                "rounds": options.rounds,
                "threads": options.threads,
                "torch": torch.__version__,
                "processor": platform.processor() or platform.machine(),
                "date": datetime.date.today().isoformat(),
            }
        )
    )


if __name__ == "__main__":
    main()
