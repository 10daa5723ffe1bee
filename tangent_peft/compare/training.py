"""The trainings of a comparison: which models each method needs, and training one of them.

All of them see the same pairs in the same order under the same options; what differs is what moves and how. Knows no
scores.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import DPOConfig, DPOTrainer

from tangent_peft.compare.settings import Settings, mixed_name
from tangent_peft.train import TangentDPOConfig, TangentDPOTrainer
from tangent_peft.tuner import TangentConfig
from tangent_peft.tuner.axes import tangent_layers


RECORD = "training.json"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """One training run.

    Attributes:
        method: which method's learning rate and kind of adapter it has.
        name: of its folder, unique within a seed.
        shares: of each axis's pairs in its data, adding up to 1.
        seed: which pairs are drawn, and in which order.
    """

    method: str
    name: str
    shares: Mapping[str, float]
    seed: int

    def folder(self, settings: Settings) -> Path:
        """Where its adapter lies."""
        return Path(settings.output) / f"seed-{self.seed}" / self.name


def trainings(settings: Settings, seed: int) -> list[Training]:
    """All trainings of one seed. MOD has none of its own: it mixes the models of Task-Vector DPO."""
    found = []
    for method in ("ts_dpo", "task_vectors", "lora_soup"):
        if method in settings.methods:
            found += [Training(method, single_name(method, axis), {axis: 1.0}, seed) for axis in settings.axes]
    if "dpo_mixed" in settings.methods:
        found += [Training("dpo_mixed", mixed_name(shares), shares, seed) for shares in settings.shares()]
    return found


def single_name(method: str, axis: str) -> str:
    """The folder of a method's model of one axis."""
    return f"{method}-{axis}"


# ---- data ------------------------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> list[Row]:
    """The pairs of a file of JSON lines.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the line, for one that is no pair of `prompt`, `chosen` and `rejected`; for a file without
            pairs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Write an axis's pairs with `tangent-peft data`.")
    rows: list[Row] = []
    # Not `splitlines`, which also ends a line at characters that JSON writes as they are, such as U+2028.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} can not be read as JSON: {error}. Write the file again.") from None
        missing = {"prompt", "chosen", "rejected"} - set(row)
        if missing:
            raise ValueError(f"{path}:{number} lacks {sorted(missing)}; a pair has `prompt`, `chosen` and `rejected`.")
        rows.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
    if not rows:
        raise ValueError(f"{path} holds no pairs. Write them with `tangent-peft data`.")
    return rows


def training_pairs(settings: Settings, training: Training) -> list[Row]:
    """The pairs of a training, in order: of each axis its share, drawn and shuffled by the seed.

    A larger share of an axis has the pairs of a smaller one and more, and a file that is too small is used again.
    """
    counts = _shares(training.shares, settings.training_size)
    drawn: list[Row] = []
    for axis, count in counts.items():
        rows = read_pairs(settings.training_set(axis))
        order = random.Random(f"{training.seed} {axis}")
        while count:
            epoch = order.sample(rows, len(rows))[:count]
            drawn, count = [*drawn, *epoch], count - len(epoch)
    random.Random(training.seed).shuffle(drawn)
    return drawn


def _shares(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in the proportion of the shares that add up to `total`, by largest remainder."""
    counts = {axis: int(share * total) for axis, share in shares.items()}
    rest = sorted(shares, key=lambda axis: counts[axis] - shares[axis] * total)
    for axis in rest[: total - sum(counts.values())]:
        counts[axis] += 1
    return counts


# ---- training --------------------------------------------------------------------------------------------------------


def load_model(settings: Settings) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model in its dtype, on the accelerator if there is one, and its tokenizer."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(settings.model, dtype=vars(torch)[settings.dtype])
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model, AutoTokenizer.from_pretrained(settings.model)


def run_training(settings: Settings, training: Training) -> dict[str, Any]:
    """Trains and saves one adapter; its folder appears when it is complete, and is not trained again.

    Returns:
        What is in its `training.json`: the data's size, time, and the trainer's log.
    """
    target = training.folder(settings)
    if (target / RECORD).is_file():
        return json.loads((target / RECORD).read_text(encoding="utf-8"))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        set_seed(training.seed)
        model, tokenizer = load_model(settings)
        pairs = Dataset.from_list(training_pairs(settings, training))
        trainer = _trainer(settings, training, model, (pairs, tokenizer), str(unfinished / "run"))
        trainer.remove_callback(PrinterCallback)  # the log is in the record
        begun = time.perf_counter()
        trainer.train()
        trained: Any = trainer.model
        record = {
            "method": training.method,
            "shares": dict(training.shares),
            "seed": training.seed,
            "pairs": len(pairs),
            "seconds": round(time.perf_counter() - begun, 1),
            "trained_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
            "log": trainer.state.log_history,
        }
        trained.save_pretrained(unfinished)
        shutil.rmtree(unfinished / "run", ignore_errors=True)
        (unfinished / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        try:
            unfinished.rename(target)
        except OSError:
            if not (target / RECORD).is_file():  # otherwise another process has finished it, and its copy is as good
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return record


def _trainer(
    settings: Settings, training: Training, model: Any, data: tuple[Dataset, PreTrainedTokenizerBase], folder: str
) -> DPOTrainer:
    options = {**training_options(settings, training.method, training.seed), "output_dir": folder}
    pairs, tokenizer = data
    if training.method == "lora_soup":
        policy: Any = get_peft_model(model, lora_config(settings, model))
        return DPOTrainer(model=policy, args=DPOConfig(**options), train_dataset=pairs, processing_class=tokenizer)
    axis = tangent_config(settings, linearize=training.method == "ts_dpo")
    arguments = TangentDPOConfig(**options)
    return TangentDPOTrainer(
        model=model, args=arguments, train_dataset=pairs, processing_class=tokenizer, peft_config=axis
    )


def training_options(settings: Settings, method: str, seed: int) -> dict[str, Any]:
    """Options of `trl.DPOConfig` for a training; alike for all methods but for the learning rate."""
    return {
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate(method),
        "beta": settings.beta,
        "seed": seed,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": min(2, settings.steps - 1),
        "train_sampling_strategy": "sequential",  # the pairs are shuffled already, alike for all methods
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": max(1, settings.steps // 8),
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        **settings.training,
    }


def tangent_config(settings: Settings, linearize: bool) -> TangentConfig:
    """What TS-DPO trains, linearized, and what ordinary DPO trains: the same ΔW of the same layers, in the weights."""
    return TangentConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        num_layers=settings.num_layers,
        lm_head=settings.lm_head,
        linearize=linearize,
    )


def lora_config(settings: Settings, model: Any) -> LoraConfig:
    """A stock LoRA on the layers that the axes wrap, but for the head, on which TRL trains no adapter."""
    targets = wrapped_layers(settings, model)
    return LoraConfig(
        task_type="CAUSAL_LM", r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=targets
    )


def wrapped_layers(settings: Settings, model: Any) -> list[str]:
    """Names of the layers below the head that an axis of these settings wraps."""
    with torch.device("meta"):
        shell = type(model)(model.config)
    axes = PeftModel(shell, TangentConfig(task_type="CAUSAL_LM", num_layers=settings.num_layers, lm_head=False))
    return [layer.layer_name for layer in tangent_layers(axes)]
