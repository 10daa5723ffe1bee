"""`tangent-peft plan`: whether a training step fits, on which engine, and the command that runs it.

Reads a model's config, never its weights; `train/costs.py` has the formulas. What it shows is in `plan_tables.py`.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tangent_peft.train.costs import ENGINES, SHARDED, Cluster, Engine, Memory, memory, tangent_entries
from tangent_peft.train.flops import step_operations
from tangent_peft.train.sizes import Kept, ModelSize, Workload, model_size
from tangent_peft.tuner import TangentConfig


HEADROOM = 0.9  # of a GPU's memory: allocators fragment, and the formulas are within 15 % of what was measured
MOST_GPUS = 4096
UNITS = {"": 10**9, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12}


@dataclass(frozen=True)
class PlanOptions:
    """The options of the command.

    Attributes:
        model: a packaged name, a folder, a config.json, or a name on the Hub.
        gpus: how many there are.
        gpu_memory: bytes of one.
        rank: of τ = B·A; `None`: dense.
        num_layers: the last blocks that train; `None`: all.
        lm_head: whether the head trains as well.
        experts: whether fused experts carry tangents.
        axes: axes that the model holds.
        batch_size: pairs per GPU and forward.
        max_length: positions per row.
        gradient: `"replay"` or `"recorded"`.
        dtype: of the base.
        quantize: `"4bit"`, `"8bit"` or `None`.
        accumulation: forwards per optimizer step.
        flop_rate: operations per second that one GPU sustains, if known.
    """

    model: str
    gpus: int = 1
    gpu_memory: float = 80e9
    rank: int | None = 64
    num_layers: int | None = 16
    lm_head: bool = True
    experts: bool = False
    axes: int = 1
    batch_size: int = 1
    max_length: int = 1024
    gradient: Kept = "replay"
    dtype: str = "bfloat16"
    quantize: str | None = None
    accumulation: int = 1
    flop_rate: float | None = None

    @property
    def workload(self) -> Workload:
        """The step of one process."""
        return Workload(
            rank=self.rank,
            gradient=self.gradient,
            axes=self.axes,
            pairs=self.batch_size,
            length=self.max_length,
            dtype=self.dtype,
            quantize=self.quantize,
            accumulates=self.accumulation > 1,
        )


@dataclass(frozen=True)
class Plan:
    """What the command found.

    Attributes:
        options: what was asked.
        size: the model.
        estimates: memory by engine.
        operations: of one optimizer step on one GPU.
        recipe: the recommended engine, or `None` if nothing fits.
        advice: what to change if nothing fits.
        command: how to train with the recipe.
    """

    options: PlanOptions
    size: ModelSize
    estimates: tuple[Memory, ...]
    operations: float
    recipe: str | None
    advice: tuple[str, ...]
    command: str | None

    @property
    def seconds(self) -> float | None:
        """Time of one optimizer step at the given rate."""
        return None if self.options.flop_rate is None else self.operations / self.options.flop_rate

    def fits(self, estimate: Memory) -> bool:
        """Whether an estimate leaves a tenth of the memory free."""
        return estimate.total <= HEADROOM * self.options.gpu_memory

    def as_dict(self) -> dict[str, Any]:
        """Plain values, bytes and operations as they are."""
        return {
            "model": {
                "name": self.options.model,
                "class": self.size.name,
                "parameters": self.size.parameters,
                "blocks": len(self.size.blocks),
                "trained_blocks": len(self.size.trained_blocks),
                "tangent": tangent_entries(self.size, self.options.rank),
            },
            "options": vars(self.options),
            "engines": [
                {
                    "engine": e.engine,
                    "bytes": round(e.total),
                    "fits": self.fits(e),
                    "phase": e.phase,
                    "terms": {name: round(value) for name, value in e.terms.items()},
                    "host_bytes": round(e.host),
                }
                for e in self.estimates
            ],
            "operations_per_step": self.operations,
            "seconds_per_step": self.seconds,
            "recipe": self.recipe,
            "advice": list(self.advice),
            "command": self.command,
        }


def make_plan(options: PlanOptions) -> Plan:
    """Estimates every engine and chooses one.

    Raises:
        OSError: if the model's config can not be read.
        ValueError: naming the option that does not fit.
    """
    work = options.workload
    if options.accumulation < 1:
        raise ValueError(f"`gradient_accumulation_steps` is a positive number, found {options.accumulation}.")
    if options.flop_rate is not None and not options.flop_rate > 0:
        raise ValueError(f"`flop_rate` is a positive number of operations per second, found {options.flop_rate}.")
    axis = TangentConfig(task_type="CAUSAL_LM", r=options.rank, num_layers=options.num_layers, lm_head=options.lm_head)
    size = model_size(read_config(options.model), axis, options.experts)
    if not size.wrapped:
        raise ValueError("Nothing would train: no layer is wrapped. Raise `num_layers` or leave out `no_lm_head`.")
    estimates = tuple(memory(size, work, Cluster(options.gpus), engine) for engine in engines(options))
    chosen = next((e for e in estimates if e.total <= HEADROOM * options.gpu_memory), None)
    return Plan(
        options=options,
        size=size,
        estimates=estimates,
        operations=options.accumulation * step_operations(size, work),
        recipe=None if chosen is None else _recipe(options, chosen.engine),
        advice=() if chosen else tuple(_advice(size, options)),
        command=None if chosen is None else _command(options, chosen.engine),
    )


def engines(options: PlanOptions) -> list[Engine]:
    """The engines that make sense, the simplest first: sharding needs several GPUs, and weights that can be divided."""
    if options.quantize is not None:
        return [e for e in ENGINES if e not in SHARDED and (options.gpus > 1 or e == "ddp")]
    return [e for e in ENGINES if options.gpus > 1 or e in ("ddp", "zero3_offload")]


def _recipe(options: PlanOptions, engine: Engine) -> str:
    return "qlora" if options.quantize is not None and engine == "ddp" else engine


def _advice(size: ModelSize, options: PlanOptions) -> list[str]:
    """What would fit: more GPUs, a low rank, fewer bits."""
    found = []
    count = options.gpus
    while count < MOST_GPUS:
        count *= 2
        if _fits(size, options.workload, options, count):
            found.append(f"{count} GPUs of this size")
            break
    for change in ({"rank": 64}, {"rank": 64, "quantize": "4bit"}, {"rank": 64, "quantize": "4bit", "pairs": 1}):
        work = Workload(**{**vars(options.workload), **change})
        if work != options.workload and _fits(size, work, options, options.gpus):
            found.append("with " + ", ".join(f"{name} {value}" for name, value in change.items()))
            break
    return found


def _fits(size: ModelSize, work: Workload, options: PlanOptions, gpus: int) -> bool:
    names = [e for e in ENGINES if work.quantize is None or e not in SHARDED]
    cluster = Cluster(gpus)
    return any(memory(size, work, cluster, e).total <= HEADROOM * options.gpu_memory for e in names)


def _command(options: PlanOptions, engine: Engine) -> str:
    """How `tangent-peft train` runs it."""
    values: dict[str, object] = {
        "model_name_or_path": "MODEL" if _is_config(options.model) else options.model,
        "r": "none" if options.rank is None else options.rank,
        "num_layers": "none" if options.num_layers is None else options.num_layers,
        "dtype": options.dtype,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "max_length": options.max_length,
        "gradient_checkpointing": str(options.gradient == "replay").lower(),
        "dataset_name": "pairs.jsonl",
        "output_dir": "axis",
    }
    if not options.lm_head:
        values["lm_head"] = "false"
    if options.experts:
        values["target_parameters"] = "experts.gate_up_proj experts.down_proj"
    if options.quantize is not None:
        values[f"load_in_{options.quantize}"] = "true"
    arguments = " ".join(f"--{name} {' '.join(map(shlex.quote, str(value).split()))}" for name, value in values.items())
    if options.gpus == 1 and engine == "ddp":
        return f"tangent-peft train {arguments}"
    return f"tangent-peft train --accelerate_config {engine} --num_processes {options.gpus} {arguments}"


# ---- what the options name -------------------------------------------------------------------------------------------


def packaged_models() -> dict[str, Path]:
    """Configs that come with the package, by name."""
    folder = Path(str(resources.files("tangent_peft").joinpath("recipes", "models")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def _is_config(model: str) -> bool:
    """Whether it names the sizes of a model but no weights."""
    return model in packaged_models() or Path(model).is_file()


def read_config(model: str) -> Any:
    """The config of a packaged name, a folder, a config.json, or a name on the Hub.

    Raises:
        OSError: if it is not there, or the Hub can not be reached.
        ValueError: if a file is no config.
    """
    path = packaged_models().get(model, Path(model))
    if path.is_file():
        return _config_of_file(path)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise OSError(
            f"The config of {model!r} could not be read: it is no folder with a config.json and no such file, and the "
            f"Hub gave none. Without a network name one of {sorted(packaged_models())}, or a file. ({error})"
        ) from error


def _config_of_file(path: Path) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{path} has no `model_type`; a model's config.json does.")
    return AutoConfig.for_model(**values)


def parse_bytes(text: str) -> float:
    """`80GB`, `141GiB`, `24`: bytes; without a unit it is GB = 10⁹.

    Raises:
        ValueError: if it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    try:
        size = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    except (KeyError, ValueError):
        size = 0.0
    if not size > 0:
        raise ValueError(f"{text!r} is no amount of memory; write it as 80GB or 141GiB.")
    return size
