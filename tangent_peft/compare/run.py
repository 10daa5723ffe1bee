"""Runs a comparison: all trainings, then all scores, in processes side by side; what is there is not done again.

Every training and every score is a file or folder that appears when it is complete, so a run that was killed goes on
where it was. A folder of other settings, data or versions is refused.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from tangent_peft.compare.result import ComparisonResult, collect
from tangent_peft.compare.settings import Settings
from tangent_peft.compare.sources import score, sources
from tangent_peft.compare.training import RECORD, run_training, trainings
from tangent_peft.tuner.files import write_text


RUN = "run.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "tangent-peft")
Report = Callable[[str, int, int], None]  # what was done, how many are done, of how many


def run_comparison(settings: Settings, processes: int = 1, report: Report | None = None) -> ComparisonResult:
    """Trains and scores everything that is not there yet, and returns the result.

    Args:
        settings: of the comparison.
        processes: trainings and scores side by side; they share the CPU's cores. One on a GPU.
        report: called after every training and every score.

    Raises:
        ImportError: if a package of the extra `eval` is missing.
        FileNotFoundError: if data is missing.
        ValueError: if the folder holds a run of other settings; the message names what differs.
    """
    _require()
    claim(settings)
    jobs: list[tuple[str, Callable[..., Any], tuple[Any, ...]]]
    planned = [training for seed in settings.seeds for training in trainings(settings, seed)]
    missing = [training for training in planned if not (training.folder(settings) / RECORD).is_file()]
    trained = [(training.name, run_training, (settings, training)) for training in missing]
    scored = [(source, score, (settings, seed, source)) for seed in settings.seeds for source in sources(settings)]
    total, done = len(planned) + len(scored), len(planned) - len(missing)
    for jobs in (trained, scored):
        for name in run_jobs(jobs, processes):
            done += 1
            if report is not None:
                report(name, done, total)
    return collect(settings, environment())


def _require() -> None:
    """Names a missing package before hours are spent."""
    try:
        import matplotlib  # noqa: F401
        import moocore  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'A comparison needs {error.name}, which is not installed: pip install "tangent-peft[train,eval]"'
        ) from error


def claim(settings: Settings) -> None:
    """Makes the output folder this run's, or checks that it is.

    Raises:
        FileNotFoundError: if data is missing.
        ValueError: naming the first settings that differ from those of the run that lies there.
    """
    folder = Path(settings.output)
    packages = {name: version(name) for name in PACKAGES}
    found = json.loads(json.dumps({"settings": settings.to_dict(), "data": _digests(settings), "packages": packages}))
    found["settings"].pop("output")
    found["settings"]["order of the axes"] = list(settings.axes)
    path = folder / RUN
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        flat = [{name: value for part in held.values() for name, value in part.items()} for held in (found, before)]
        different = sorted(name for name in flat[0] | flat[1] if flat[0].get(name) != flat[1].get(name))
        if different:
            name = different[0]
            raise ValueError(
                f"{folder} holds another run: {name} is {flat[1].get(name)!r} there and {flat[0].get(name)!r} here"
                f"{f' (and {len(different) - 1} more differ)' if different[1:] else ''}. Choose another output folder."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1))


def environment() -> dict[str, Any]:
    """Where a run took place."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _digests(settings: Settings) -> dict[str, str]:
    files = {
        f"{path.name} of {axis}": path
        for axis in settings.axes
        for path in (settings.training_set(axis), settings.test_set(axis))
    }
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise FileNotFoundError(f"There is no file {missing[0]}. Write an axis's pairs with `tangent-peft data`.")
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in files.items()}


# ---- processes -------------------------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[tuple[str, Callable[..., Any], tuple[Any, ...]]], processes: int) -> Iterator[str]:
    """Runs jobs and yields their names as they finish; after an error no further one is begun.

    A job is a name, a function and its arguments; it has a process of its own, so that its memory is given back, and
    what it makes lies in files.
    """
    if processes <= 1:
        for name, function, arguments in jobs:
            function(*arguments)
            yield name
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ThreadPoolExecutor(processes) as pool:
        names = {pool.submit(_in_a_process, threads, *job): job[0] for job in jobs}
        try:
            for future in as_completed(names):
                future.result()
                yield names[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _in_a_process(threads: int, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Calls a function in a fresh process and waits for it.

    Raises:
        OSError: if the process was ended from outside.
        Exception: what the function raised.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, threads, function, arguments), name=name)
    process.start()
    sender.close()
    try:
        error = receiver.recv()
    except EOFError:
        process.join()
        raise OSError(
            f"The job {name!r} was ended from outside (exit status {process.exitcode}), most likely for lack of "
            "memory. Repeat the command, which goes on where it was, with fewer `processes`."
        ) from None
    process.join()
    if error is not None:
        raise error


def _call(sender: Any, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the host libraries' own deprecations
    warnings.filterwarnings("ignore", "λ = .* mixes beyond", UserWarning)  # the line goes there on purpose
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        function(*arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        sender.send(error)
    else:
        sender.send(None)
