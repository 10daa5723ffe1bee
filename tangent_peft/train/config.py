"""`TangentDPOConfig`: TRL's `DPOConfig` with the defaults that suit a tangent, and the name of the axis."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import DPOConfig


# docs/training.md has the experiment behind them (examples/benchmarks/learning_rates.py) and what it does not cover.
LEARNING_RATES = {"dense": 5e-5, "shared": 1e-3, "trained": 5e-4}


@dataclass
class TangentDPOConfig(DPOConfig):
    """Configuration of `TangentDPOTrainer`: every option of `trl.DPOConfig`, and these differences.

    Args:
        axis: name of the adapter to train. `None`: `"default"` for a new one, the active one of a `PeftModel`.
        learning_rate: `None` chooses by the form of τ: 5e-5 dense, 1e-3 low rank with the shared projection, 5e-4 with
            a trained one. TRL's 1e-6 suits full fine-tuning and moves a low-rank τ nowhere.
        gradient_checkpointing: off; recomputation happens outside the dual level and is refused.
        router_aux_loss_coef: 0; the router is frozen, there is no load to balance.
    """

    axis: str | None = field(default=None, metadata={"help": "Name of the adapter to train."})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Learning rate; None: 5e-5 dense, 1e-3 low rank, 5e-4 with trained projection."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Not available for a linearized model; must stay off."}
    )
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Coefficient of the router's load-balancing loss; the router is frozen."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refused = {
            "gradient_checkpointing": (self.gradient_checkpointing, "gradient_checkpointing=False"),
            "use_liger_kernel": (self.use_liger_kernel, "use_liger_kernel=False; its kernels have no derivative rule"),
            "torch_compile": (self.torch_compile, "torch_compile=False; a level opened outside loses its tangents"),
            "sync_ref_model": (self.sync_ref_model, "sync_ref_model=False; the reference is the frozen base itself"),
        }
        for name, (value, remedy) in refused.items():
            if value:
                raise ValueError(f"`{name}={value}` does not work with a linearized model. Use {remedy}.")
        if self.router_aux_loss_coef:
            raise ValueError(
                f"`router_aux_loss_coef={self.router_aux_loss_coef}`: the router is frozen, so its load-balancing loss "
                "has no gradient. Use 0.0."
            )
