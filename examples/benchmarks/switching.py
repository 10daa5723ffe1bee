"""What changing λ takes, by the size of the model: `combine_axes`, `with model.axes(...)`, a mix for every row.

Two axes of rank 16 are put on every layer of random Llamas of 1, 8 and 64 blocks, and λ is changed in turn in all of
them; reported is the median time of a change. Beside it stand the tensor operations of a change and the calls that
Python makes, which tests/tuner/test_live.py holds to be none and the same at every size.

Run as: python examples/benchmarks/switching.py
Prints one JSON line on standard output, after less than a minute on a CPU.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tangent_peft import TangentConfig


BLOCKS = (1, 8, 64)
REPEATS = 300


class Count(TorchDispatchMode):
    """Counts operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return function(*args, **(kwargs or {}))


def build(blocks: int) -> PeftModel:
    """A random Llama with two frozen axes on all of its layers."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = TangentConfig(task_type="CAUSAL_LM", r=16, num_layers=None, inference_mode=True)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=blocks)), config, "help")
    model.add_adapter("verb", config)
    return model.eval()


def scope(model: PeftModel, weight: float) -> None:
    """In and out of a block."""
    with model.axes({"help": weight}):
        pass


def rows(model: PeftModel, weight: float) -> None:
    """In and out of a block with a mix for each of eight rows."""
    with model.axes([{"help": weight, "verb": -0.5}] * 8):
        pass


SWITCHES: dict[str, Callable[[PeftModel, float], Any]] = {
    "combine_axes": lambda model, weight: model.combine_axes({"help": weight, "verb": -0.5}),
    "block": scope,
    "rows": rows,
}


def calls(action: Callable[[], Any]) -> int:
    """Functions that Python calls."""
    made = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return made


def main() -> None:
    """Measures all sizes in turn and prints the JSON line."""
    models = {blocks: build(blocks) for blocks in BLOCKS}
    result: dict[str, Any] = {"benchmark": "switching", "date": datetime.date.today().isoformat()}
    for name, switch in SWITCHES.items():
        times: dict[int, list[float]] = {blocks: [] for blocks in BLOCKS}
        for repeat in range(REPEATS):
            for blocks, model in models.items():
                begun = time.perf_counter()
                switch(model, 0.001 * repeat)
                times[blocks].append(time.perf_counter() - begun)
        medians = {blocks: statistics.median(found) for blocks, found in times.items()}
        with Count() as operations:
            made = {
                blocks: calls(lambda model=model, switch=switch: switch(model, 0.5)) for blocks, model in models.items()
            }
        result[name] = {
            "milliseconds": {blocks: round(1000 * median, 4) for blocks, median in medians.items()},
            "largest_to_smallest": round(medians[BLOCKS[-1]] / medians[BLOCKS[0]], 2),
            "tensor_operations": operations.operations,
            "python_calls": made,
        }
    result["hardware"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
