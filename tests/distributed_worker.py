"""What each process of a distributed test runs, as a user's training script would: `python distributed_worker.py SPEC`.

SPEC is a JSON file: `folder`, where the base model and the pairs lie and results go, `engine`, `cases`, and `killed`,
whether the second process is to be killed in a last training. The tests' reference is `run_case` in one process.

Two things differ from a script on GPUs. accelerate enables FSDP on accelerators only, so its state is told that it is
on. DeepSpeed would compile two extensions on a CPU, which takes longer than all of this.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback

from tangent_peft import TangentConfig, TangentDPOConfig, TangentDPOTrainer
from tangent_peft.tuner import TangentLayer


STEPS, PAIRS = 20, 4  # per step, over all processes
FORMS: dict[str, dict[str, Any]] = {
    "dense": {"r": None},
    "shared": {"r": 4},
    "trained": {"r": 4, "projection": "trained"},
}
# A checkpoint is written at half time, the gap is measured, and the axis is evaluated, in this case only.
THOROUGH = "shared-replay"


def make_trainer(folder: Path, engine: str, case: str, **options: Any) -> TangentDPOTrainer:
    """A trainer of 20 steps on the tiny Llama; `case` is the form of τ and how its gradient is computed."""
    form, gradient = case.split("-")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed = engine.startswith("zero")
    pairs = Dataset.from_list(json.loads((folder / "pairs.json").read_text()))
    defaults: dict[str, Any] = {
        "output_dir": str(folder / engine / case),
        "per_device_train_batch_size": PAIRS // world,
        "per_device_eval_batch_size": PAIRS // world,
        "max_steps": STEPS,
        "gradient_checkpointing": gradient == "replay",
        "max_grad_norm": 0.5,  # not DeepSpeed's default
        "lr_scheduler_type": "constant",
        "beta": 0.5,
        "bf16": False,
        "use_cpu": not deepspeed,  # accelerate then takes DeepSpeed for switched off
        "ddp_backend": "gloo" if world > 1 else None,
        "logging_steps": 1,
        "save_strategy": "steps" if case == THOROUGH else "no",
        "save_steps": STEPS // 2,
        "linearity_gap_steps": STEPS // 2 if case == THOROUGH else None,
        "adjoint_check_steps": STEPS // 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = TangentDPOTrainer(
        model=str(folder / "base"),
        args=TangentDPOConfig(**{**defaults, **options}),
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "base"),
        peft_config=TangentConfig(
            task_type="CAUSAL_LM",
            num_layers=2,
            gradient="recorded" if gradient == "recorded" else "auto",
            **FORMS[form],
        ),
    )
    if deepspeed:
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # nothing is too small to be divided
        config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW on the host instead of one that is compiled
    return trainer


def run_case(folder: Path, engine: str, case: str) -> None:
    """Trains and saves; the main process writes what was logged to `result.json`."""
    trainer = make_trainer(folder, engine, case)
    trainer.train()
    trainer.save_model()
    result: dict[str, Any] = {"logs": list(trainer.state.log_history), "engine": type(trainer.model_wrapped).__name__}
    result["projections"] = projections(trainer)
    if case == THOROUGH:
        result["evaluation"] = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        (folder / engine / case / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()


def resume(folder: Path, engine: str, case: str) -> None:
    """Trains from the checkpoint at half time to the end, into another folder."""
    trainer = make_trainer(folder, engine, case, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder / engine / case / f"checkpoint-{STEPS // 2}"))
    trainer.save_model(str(folder / engine / "resumed"))
    trainer.accelerator.wait_for_everyone()


def projections(trainer: TangentDPOTrainer) -> list[str]:
    """A hash of all shared projections in each process."""
    sha = hashlib.sha256()
    model = trainer.accelerator.unwrap_model(trainer.model)
    for layer in (module for module in model.modules() if isinstance(module, TangentLayer)):
        for projection in layer.tangent_projection.values():
            sha.update(projection.numpy().tobytes())
    found: list[Any] = [None] * trainer.accelerator.num_processes
    if len(found) == 1:
        return [sha.hexdigest()]
    torch.distributed.all_gather_object(found, sha.hexdigest())
    return found


class _Kill(TrainerCallback):
    """Kills the second process in the third step, as running out of memory would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and os.environ["RANK"] == "1":
            (self.folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def be_killed(folder: Path, engine: str, case: str) -> None:
    """A training that must not end, nor go on."""
    trainer = make_trainer(folder, engine, case, max_steps=100_000, save_strategy="no")
    trainer.add_callback(_Kill(folder / engine))
    trainer.train()


def _enable_fsdp_on_cpu() -> None:
    original: Any = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def _compile_nothing() -> None:
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    """Runs what SPEC says."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    folder, engine = Path(spec["folder"]), spec["engine"]
    if engine == "fsdp2":
        _enable_fsdp_on_cpu()
    elif engine != "ddp":
        _compile_nothing()
    for case in spec["cases"]:
        run_case(folder, engine, case)
        if case == THOROUGH:
            resume(folder, engine, case)
    if os.environ["RANK"] == "0":
        (folder / engine / "finished").touch()
    if spec["killed"]:
        be_killed(folder, engine, spec["cases"][0])


if __name__ == "__main__":
    main()
