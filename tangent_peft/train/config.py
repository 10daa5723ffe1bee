"""`TangentDPOConfig`: TRL's `DPOConfig` with the defaults that suit a tangent, and the name of the axis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import torch
from trl import DPOConfig

from tangent_peft.forward.head import Linearized


# docs/training.md has the experiment behind them (examples/benchmarks/learning_rates.py) and what it does not cover.
LEARNING_RATES = {"dense": 5e-5, "shared": 1e-3, "trained": 5e-4}


@dataclass
class TangentDPOConfig(DPOConfig):
    """Configuration of `TangentDPOTrainer`: every option of `trl.DPOConfig`, and these differences.

    Args:
        axis: name of the adapter to train. `None`: `"default"` for a new one, the active one of a `PeftModel`.
        learning_rate: `None` chooses by the form of τ: 5e-5 dense, 1e-3 low rank with the shared projection, 5e-4 with
            a trained one. TRL's 1e-6 suits full fine-tuning and moves a low-rank τ nowhere.
        linearized: what is linear in τ: `"logits"` (the paper; a distribution that generates, a loss that is not
            convex) or `"log_probs"` (DPO's loss is then convex in τ; inference runs the linearized logits in any case).
        adjoint_check_steps: check ⟨∂L/∂f_lin, Jτ⟩ = ⟨τ, ∂L/∂τ⟩ at the second and third step and every N steps, log the
            relative error and stop if it is large; 0: never. Every other check replays the step.
        linearity_gap_steps: log the linearity gap on a sample of the batch every N steps; `None`: never.
        trunk_cache: directory in which the hidden states entering the first wrapped block are stored once and reused
            over epochs and axes, see docs/trunk_cache.md; `None`: off.
        max_kl: stop when the mean KL(policy ‖ base) of a step's completion tokens, in nats, exceeds this.
        max_norm: stop when ‖τ‖, the Frobenius norm over all wrapped layers, exceeds this.
        gradient_checkpointing: on, as in TRL; the wrapped blocks are replayed (`TangentConfig.gradient`). Off: faster.
        router_aux_loss_coef: 0; the router is frozen, there is no load to balance.
    """

    axis: str | None = field(default=None, metadata={"help": "Name of the adapter to train."})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Learning rate; None: 5e-5 dense, 1e-3 low rank, 5e-4 with trained projection."}
    )
    linearized: Linearized = field(
        default="logits", metadata={"help": "What is linear in the tangent: 'logits' or 'log_probs' (convex loss)."}
    )
    adjoint_check_steps: int = field(
        default=50, metadata={"help": "Check the adjoint identity every N steps; 0: never."}
    )
    linearity_gap_steps: int | None = field(
        default=None, metadata={"help": "Log the linearity gap every N steps; None: never."}
    )
    trunk_cache: str | None = field(default=None, metadata={"help": "Directory of the frozen-trunk cache; None: off."})
    max_kl: float | None = field(
        default=None, metadata={"help": "Stop when the mean KL to the base, in nats per token, exceeds this."}
    )
    max_norm: float | None = field(default=None, metadata={"help": "Stop when the norm of the tangent exceeds this."})
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Coefficient of the router's load-balancing loss; the router is frozen."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refused = {
            "use_liger_kernel": (self.use_liger_kernel, "use_liger_kernel=False; its kernels have no derivative rule"),
            "torch_compile": (self.torch_compile, "torch_compile=False; a level opened outside loses its tangents"),
            "sync_ref_model": (self.sync_ref_model, "sync_ref_model=False; the reference is the frozen base itself"),
        }
        for name, (value, remedy) in refused.items():
            if value:
                raise ValueError(f"`{name}={value}` does not work with a linearized model. Use {remedy}.")
        self._check_own_options()
        if self.activation_offloading and not torch.accelerator.is_available():
            raise ValueError(
                "`activation_offloading=True` moves activations from an accelerator to the host, and there is no "
                "accelerator. Leave it out; `gradient_checkpointing=True` keeps activations small on a CPU as well."
            )
        if self.router_aux_loss_coef:
            raise ValueError(
                f"`router_aux_loss_coef={self.router_aux_loss_coef}`: the router is frozen, so its load-balancing loss "
                "has no gradient. Use 0.0."
            )

    def _check_own_options(self) -> None:
        if self.linearized not in get_args(Linearized):
            raise ValueError(f"`linearized` is one of {get_args(Linearized)}, found {self.linearized!r}.")
        if self.adjoint_check_steps < 0:
            raise ValueError(f"`adjoint_check_steps` is 0 (never) or positive, found {self.adjoint_check_steps}.")
        if self.linearity_gap_steps is not None and self.linearity_gap_steps < 1:
            raise ValueError(f"`linearity_gap_steps` is positive or None, found {self.linearity_gap_steps}.")
        for name, limit in (("max_kl", self.max_kl), ("max_norm", self.max_norm)):
            if limit is not None and not limit > 0:
                raise ValueError(f"`{name}` is a positive limit or None, found {limit}.")
        losses = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if self.linearized == "log_probs" and ("sft" in losses or self.use_weighting):
            option = "loss_type 'sft'" if "sft" in losses else "use_weighting=True"
            raise ValueError(
                f"{option} with `linearized='log_probs'`: linearized log-probs are no distribution, so a likelihood "
                "has no bound and a probability no meaning. Use `linearized='logits'`, or another loss."
            )
