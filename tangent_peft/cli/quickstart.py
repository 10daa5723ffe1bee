"""`tangent-peft quickstart`: the whole life of two axes on a small real model, in minutes on a CPU.

Train `help` and `verb` by TS-DPO, ask what each learned on held-out pairs, sweep λ_verb linearized and merged, write
results, picture, axes, a merged model and a plain LoRA. Two processes work side by side (`jobs.py` has what they do),
the tables are in `tables.py`. `examples/quickstart.py` is the same life as a plain script to copy from.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as ProgressBars

from tangent_peft.cli import jobs
from tangent_peft.cli.jobs import AXES, LAMBDAS, Progress, QuickstartOptions
from tangent_peft.cli.memory import peak_memory_gb
from tangent_peft.cli.report import QuickstartReport
from tangent_peft.cli.smollm2 import load_smollm2


EXPORTED = {"help": 1.0, "verb": -0.5}
WORKERS = 2


def run_quickstart(options: QuickstartOptions, console: Console | None = None) -> QuickstartReport:
    """Runs the job and writes `options.output`.

    Args:
        options: sizes and the directory to write.
        console: where bars and tables go; standard output by default.

    Returns:
        The report that was also written as `results.json`.

    Raises:
        ImportError: if a package of the extra `quickstart`, or the wheel with the model, is missing.
    """
    _require()
    from tangent_peft.cli import tables
    from tangent_peft.evaluate import SweepTable, save_sweep

    console = Console() if console is None else console
    jobs.prepare_worker(torch.get_num_threads())
    options.output.mkdir(parents=True, exist_ok=True)
    report = QuickstartReport(_describe(options))
    begun = time.perf_counter()
    console.print("SmolLM2-135M-Instruct: unpacking it into the cache takes half a minute, once.")
    load_smollm2()
    report.seconds["load"] = time.perf_counter() - begun
    trained, evaluated = _run_jobs(options, console, report)
    stages = [sum(result["peak_memory_gb"] for result in stage.values()) for stage in (trained, evaluated)]
    at_work = max(stages) + peak_memory_gb()
    report.training = {axis: trained[axis] for axis in AXES}
    _collect(report, evaluated)
    tables.print_accuracy(console, report)
    tables.print_sweep(console, report, jobs.questions(options)[0])
    tables.draw(report, options.output / "pareto.png")
    table = SweepTable(tables.sweep_points(report), list(jobs.questions(options)), tables.SCORES)
    save_sweep(options.output / "sweep.json", table)
    begun = time.perf_counter()
    _export(options, report, console)
    report.seconds["export"] = time.perf_counter() - begun
    report.peak_memory_gb = max(at_work, peak_memory_gb())
    report.seconds = {stage: round(seconds, 1) for stage, seconds in report.seconds.items()}
    (options.output / "results.json").write_text(
        json.dumps(asdict(report), indent=1, allow_nan=False), encoding="utf-8"
    )
    total = sum(report.seconds.values())
    console.print(f"{total:.0f} s, at most {report.peak_memory_gb:.1f} GB; everything is in {options.output}/")
    return report


def _require() -> None:
    """Names the extra before minutes are spent."""
    try:
        import datasets  # noqa: F401
        import matplotlib  # noqa: F401
        import moocore  # noqa: F401
        import scipy  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'The quickstart needs {error.name}, which is not installed: pip install "tangent-peft[quickstart]"'
        ) from error


def _describe(options: QuickstartOptions) -> dict[str, Any]:
    constants = {
        "rank": jobs.RANK,
        "learning_rate": jobs.LEARNING_RATE,
        "beta": jobs.BETA,
        "pairs_per_step": jobs.PAIRS_PER_STEP,
        "lambdas": LAMBDAS,
    }
    return {**asdict(options), "output": str(options.output), **constants}


# ---- two processes ---------------------------------------------------------------------------------------------------


def _run_jobs(
    options: QuickstartOptions, console: Console, report: QuickstartReport
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both axes are trained, then both evaluations run, each pair side by side; results by axis and by evaluation."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    queue: Any = context.Queue()
    initial: Any = (threads, queue)
    with (
        ProcessPoolExecutor(WORKERS, context, jobs.prepare_worker, initial) as pool,
        ProgressBars(console=console) as bars,
    ):

        def side_by_side(stage: str, job: Callable[..., Any], names: Iterable[str]) -> dict[str, Any]:
            begun = time.perf_counter()
            futures = {name: pool.submit(job, name, options) for name in names}
            _show(futures.values(), queue, bars)
            report.seconds[stage] = time.perf_counter() - begun
            return {name: future.result() for name, future in futures.items()}

        trained = side_by_side("train", jobs.train_axis, AXES)
        evaluated = side_by_side("evaluate", jobs.evaluate_axes, ("linearized", "merged"))
    return trained, evaluated


def _show(futures: Iterable[Future[Any]], queue: Any, bars: ProgressBars) -> None:
    """Turns progress messages into bars until all futures are done."""
    tasks: dict[str, Any] = {}
    waiting = set(futures)
    while waiting:
        waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED).not_done
        while not queue.empty():
            message: Progress = queue.get()
            if message.job not in tasks:
                tasks[message.job] = bars.add_task(message.job, total=message.total)
            bars.update(tasks[message.job], completed=message.done)


# ---- what comes of it ------------------------------------------------------------------------------------------------


def _collect(report: QuickstartReport, evaluated: dict[str, Any]) -> None:
    """Accuracy, sweep and rank correlations from what the two evaluations found."""
    from tangent_peft.evaluate import kendall_tau, preference_accuracy

    for axis in AXES:
        base, lengths = evaluated["merged"]["logps"][axis]["base"]
        models = {"base": base} | {name: evaluated[name]["logps"][axis][name][0] for name in ("linearized", "merged")}
        report.accuracy[axis] = {
            name: asdict(preference_accuracy(logps, base, lengths)) for name, logps in models.items()
        }
    gaps = evaluated["merged"]["gaps"]
    for name in ("linearized", "merged"):
        points = evaluated[name]["sweep"]
        report.sweep += [replace(point, gap=gaps[point.weights["verb"]]).to_dict() for point in points]
        report.kendall_tau[name] = kendall_tau(LAMBDAS, [point.scores["length"] for point in points])


def _export(options: QuickstartOptions, report: QuickstartReport, console: Console) -> None:
    model, tokenizer = jobs.load_axes(options)
    how = {"overwrite": True, "calibration": jobs.calibration_batches(tokenizer)}
    model.export_merged(options.output / "merged", EXPORTED, tokenizer, **how)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # said in the line printed below
        exported = model.export_lora(options.output / "lora", EXPORTED, **how)
    report.lora = {"weights": EXPORTED, "rank": exported.rank, "relative_error": exported.relative_error}
    console.print(
        f"exported {EXPORTED} as an ordinary model and as a LoRA of rank {exported.rank}; the head is tied, so load "
        "the LoRA as an adapter and take the ordinary model where merged weights are wanted"
    )
