"""The training steps that are compared, each built from the same base and run on the same batch.

Trainers are built and started as a user would, and hand over inside `train()`, at their first step: by then model,
optimizer, checkpointing and precision are exactly what the host library makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from step.functorch import FunctorchStep
from step.setting import Setting, last_blocks, load_base, load_batch, tiny_dataset, tiny_tokenizer
from tangent_peft import TangentConfig, TangentDPOConfig, TangentDPOTrainer


Step = Callable[[], float]
Serve = Callable[[Step], None]


def run_variant(name: str, setting: Setting, serve: Serve) -> None:
    """Builds a variant and calls `serve` with a function that does one step and returns the loss.

    Args:
        name: `dpo_same_layers`, `dpo_all`, `dpo_checkpointed`, `lora`, `functorch`, or `dense` and `low_rank`, each
            alone or followed by `_recorded`, `_replay` or `_cached`, and by `_checkpointed`.
        setting: what to build it from.
        serve: called once.

    Raises:
        ValueError: if there is no such variant.
    """
    model = load_base(setting, "eager" if name == "functorch" else "sdpa")
    if name == "functorch":
        own_memory(model)
        serve(FunctorchStep(model, load_batch(setting), autocast=setting.autocast))
        return
    checkpointing = name.endswith("_checkpointed")
    form = name.removesuffix("_checkpointed")
    if form in ("dpo", "dpo_same_layers", "dpo_all", "lora"):
        if form != "dpo_all":
            _train_only_wrapped(model, setting.layers)
        trainer: Any = _stock(model, setting, checkpointing, _lora(model, setting) if form == "lora" else None)
    elif form.startswith(("dense", "low_rank")):
        trainer = _tangent(model, setting, checkpointing, form)
    else:
        raise ValueError(f"There is no variant {name!r}.")
    for part in (trainer.model, trainer.ref_model):
        if part is not None:
            own_memory(part)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_HandOver(trainer, load_batch(setting), serve))
    trainer.train()


def own_memory(model: nn.Module) -> None:
    """Moves weights out of the mapped checkpoint file, whose pages count as held only once they are read."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def _train_only_wrapped(model: Any, layers: int) -> None:
    """Leaves what a `TangentConfig` wraps trainable: the linear layers of the last blocks, and the head."""
    model.requires_grad_(False)
    for module in (*last_blocks(model, layers), model.get_output_embeddings()):
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.requires_grad_(True)


def _lora(model: Any, setting: Setting) -> LoraConfig:
    """LoRA on every linear layer of the same blocks. TRL refuses an adapter on the head, so it goes without."""
    blocks = list(model.get_decoder().layers)
    linears = sorted({n.rpartition(".")[2] for n, m in blocks[-1].named_modules() if isinstance(m, nn.Linear)})
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=setting.rank,
        lora_alpha=setting.rank,
        target_modules=linears,
        layers_to_transform=list(range(len(blocks)))[-setting.layers :],
    )


def _arguments(setting: Setting, checkpointing: bool) -> dict[str, Any]:
    return {
        "output_dir": str(setting.folder / "out"),
        "per_device_train_batch_size": 1,
        "max_steps": 1,
        "gradient_checkpointing": checkpointing,
        "bf16": setting.autocast,
        "use_cpu": setting.device == "cpu",
        "optim": "adamw_torch",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _stock(model: Any, setting: Setting, checkpointing: bool, peft_config: LoraConfig | None) -> DPOTrainer:
    return DPOTrainer(
        model=model,
        args=DPOConfig(**_arguments(setting, checkpointing)),
        train_dataset=tiny_dataset(),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def _tangent(model: Any, setting: Setting, checkpointing: bool, form: str) -> TangentDPOTrainer:
    rank = setting.rank if form.startswith("low_rank") else None
    options: dict[str, Any] = {mode: {"gradient": mode} for mode in ("recorded", "replay")}.get(
        form.removeprefix("low_rank").removeprefix("dense").strip("_"), {}
    )
    return TangentDPOTrainer(
        model=model,
        args=TangentDPOConfig(
            **_arguments(setting, checkpointing),
            trunk_cache=str(setting.folder / "trunk") if form.endswith("_cached") else None,
        ),
        train_dataset=tiny_dataset(),
        processing_class=tiny_tokenizer(),
        peft_config=TangentConfig(task_type="CAUSAL_LM", r=rank, num_layers=setting.layers, **options),
    )


class _HandOver(TrainerCallback):
    """At the trainer's first step, serves steps on the benchmark's batch instead of its own data."""

    def __init__(self, trainer: Any, batch: dict[str, Tensor], serve: Serve) -> None:
        self.trainer, self.batch, self.serve = trainer, batch, serve

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer when all is set up."""
        if isinstance(self.trainer, TangentDPOTrainer) and self.trainer.trunk_cache is not None:
            self.trainer.trunk_cache.build([self.batch])
        self.serve(self._step)
        control.should_training_stop = True

    def _step(self) -> float:
        """What the trainer does per step: forward, loss, backward, update."""
        trainer = self.trainer
        loss = trainer.training_step(trainer.model_wrapped, dict(self.batch))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss)
