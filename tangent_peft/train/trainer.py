"""`TangentDPOTrainer`: TRL's `DPOTrainer` on a linearized model, with the reference read off the same forward.

TRL keeps the loss, its metrics, data, evaluation and checkpoints. Three seams are touched:

* `get_peft_model`, as `trl.trainer.dpo_trainer` names it, so that the adapter has the axis's name, and so that a model
  with axes comes in without TRL cloning its "default" adapter into a "ref" one;
* the forward that TRL's `add_fused_lm_head` installs: while a tangent is active, our head scores policy and reference
  from the same hidden states (`head.py`);
* `compute_loss`, TRL's public override point: `_compute_loss` reads `ref_*_logps` from the batch after the policy's
  forward, so a shim around `model` writes them there.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
import trl.trainer.dpo_trainer as dpo_module
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from tangent_peft.forward import LinearizedForward
from tangent_peft.forward.head import Linearized
from tangent_peft.train.budget import BudgetCallback
from tangent_peft.train.config import TangentDPOConfig
from tangent_peft.train.engines import prepare_engine
from tangent_peft.train.finite import check_finite
from tangent_peft.train.head import install_linearized_head
from tangent_peft.train.policy import Wrap, choose_policy, primal_moves, refuse_contradictions, refuse_images
from tangent_peft.train.trunk_cache import TrunkCache, open_for_training
from tangent_peft.train.watch import Watch
from tangent_peft.tuner import tangent_tuner
from tangent_peft.tuner.card import write_usage_note
from tangent_peft.tuner.safe_range import store_range


EvalData: TypeAlias = (
    Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Dataset | IterableDataset] | None
)

_CITATION = """\
@misc{erdogan2026tangent,
    title         = {Tangent Space Fine-Tuning for Directional Preference Alignment in Large Language Models},
    author        = {Mete Erdogan},
    year          = 2026,
    eprint        = {2602.01128},
    archivePrefix = {arXiv},
}"""


class TangentDPOTrainer(DPOTrainer):
    """Trains one axis by TS-DPO (arXiv 2602.01128): DPO on f_lin, against the base model that is its own primal.

    Signature, data formats, loss types, metrics and checkpoints are those of `trl.DPOTrainer`. One forward per step
    yields policy and reference; there is no reference model.

    Args:
        model: a model, its name, or a `PeftModel` with tangent axes, of which `args.axis` is trained and the others
            stay as they are (and off).
        ref_model: must be `None` for a linearized axis, whose reference is the base model itself.
        args: a `TangentDPOConfig`.
        data_collator: as in `DPOTrainer`.
        train_dataset: preference pairs, conversational or plain, in any of TRL's formats.
        eval_dataset: likewise.
        processing_class: the tokenizer or processor.
        compute_metrics: as in `DPOTrainer`.
        callbacks: as in `DPOTrainer`.
        optimizers: as in `DPOTrainer`.
        quantization_config: as in `DPOTrainer`.
        peft_config: a `TangentConfig` for a new axis; `None` with a plain model: `TangentConfig()`, a dense axis.

    Raises:
        ValueError: if the model's adapters are not tangent axes, the axis does not exist, or an option excludes the
            linearized forward.
    """

    _tag_names = ["trl", "dpo", "tangent-peft", "ts-dpo"]  # noqa: RUF012 (TRL's attribute)
    _name = "TS-DPO"
    _paper = {  # noqa: RUF012 (TRL's attribute)
        "title": "Tangent Space Fine-Tuning for Directional Preference Alignment in Large Language Models",
        "id": "2602.01128",
        "citation": _CITATION,
    }

    args: TangentDPOConfig
    model: PeftModel

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: TangentDPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalData = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = TangentDPOConfig("TS-DPO") if args is None else args
        if not isinstance(args, TangentDPOConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}; TangentDPOTrainer takes a TangentDPOConfig, which has the same "
                "fields and defaults that suit a tangent."
            )
        self.trunk_cache: TrunkCache | None = None
        self._probe: Tensor | None = None
        args = copy.copy(args)  # completed below; the caller's object may serve for another axis
        base, peft_config, wrap = choose_policy(model, peft_config, args)
        refuse_contradictions(ref_model, peft_config, args)
        self.axis = args.axis or "default"
        with wrapping_by(wrap):
            super().__init__(
                model=base,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        refuse_images(self._is_vision_dataset, args)
        wrapped: Any = self.model  # a PeftModel by now
        prepare_engine(self.accelerator, wrapped, wrapped.peft_config[self.axis], args)
        install_linearized_head(wrapped.get_base_model())
        self.watch = Watch(self, self.axis, args)
        limits = {"KL to the base": (self.watch.step_kl, args.max_kl), "norm": (self.watch.norm, args.max_norm)}
        self.add_callback(BudgetCallback(self.axis, limits))

    @property
    def _linearized_forward(self) -> LinearizedForward | None:
        return LinearizedForward.installed(self.accelerator.unwrap_model(self.model).get_base_model())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's; with `trunk_cache` the hidden states below the first wrapped block are stored first."""
        if self.args.trunk_cache is not None and self.trunk_cache is None:
            self.trunk_cache = open_for_training(self.args.trunk_cache, self)
        self.watch.restart()
        model: Any = self.accelerator.unwrap_model(self.model)
        store_range(tangent_tuner(model), self.axis, None)  # it was measured on what τ is before this training
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss; the reference log-probs are the primal's, from the same forward as the policy's.

        Raises:
            FloatingPointError: if the loss is not finite, naming step, axis and the rows of the batch.
        """
        linearized = self._linearized_forward
        active = linearized is not None and linearized.mix() is not None
        compute = self._linearized_loss if active else super().compute_loss
        with nullcontext() if self.trunk_cache is None else self.trunk_cache.apply(inputs):
            result = compute(model, inputs, return_outputs, num_items_in_batch)
        data = self.train_dataset if self.model.training else self.eval_dataset
        check_finite(result[0] if return_outputs else result, inputs, self.state.global_step, self.axis, data)
        return result

    def _linearized_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Any:
        given = self.ref_model is not None or self.precompute_ref_logps or primal_moves(model)
        policy = _LinearizedPolicy(model, inputs, self.args.linearized, self._probe, not given, self.ld_alpha)
        before = self.precompute_ref_logps
        self.precompute_ref_logps = before or not given  # TRL then takes the reference from the batch
        try:
            result = super().compute_loss(policy, inputs, *rest)
        finally:
            self.precompute_ref_logps = before
            if not given:
                for key in _REFERENCE_KEYS:
                    inputs.pop(key, None)
        self.watch.record_kl(policy.kl, self.state.global_step)
        return result

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """TRL's step; every `adjoint_check_steps` steps it also checks the adjoint identity.

        Raises:
            RuntimeError: if the identity does not hold: a tangent or its gradient got lost.
        """
        step, linearized = self.state.global_step, self._linearized_forward
        active = linearized is not None and linearized.mix() is not None and not primal_moves(self.model)
        self.watch.measure_linearity_gap(step, inputs)
        if linearized is None or not active or not self.watch.adjoint_check_is_due(step):
            return super().training_step(model, inputs, *args)
        replayed = linearized.replayed() if self.watch.adjoint_check_replays() else nullcontext()
        with self.watch.adjoint_check(step) as check, replayed:
            self._probe = check.probe
            try:
                return super().training_step(model, inputs, *args)
            finally:
                self._probe = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's logs, with the size of τ."""
        if "loss" in logs:
            logs[f"norm/{self.axis}"] = self.watch.norm()
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card, which replaces the adapter's; what to import before loading it goes below."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            folder = None if self.axis == "default" else self.axis  # as PEFT saves it
            write_usage_note(Path(self.args.output_dir or "."), folder)

    def _load_best_model(self) -> None:
        """As the host's, which looks for the adapter in the checkpoint itself, where only "default" lies.

        Engines that shard have checkpoints of their own, which hold the axis by its parameters' names.
        """
        axis, sharded = self.axis, self.is_deepspeed_enabled or self.is_fsdp_enabled
        folder = Path(self.state.best_model_checkpoint or "") / axis
        if sharded or not folder.is_dir():
            super()._load_best_model()
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        model.load_adapter(str(folder), axis, is_trainable=True)
        model.set_adapter(axis)


# ---- the axis's name -------------------------------------------------------------------------------------------------


@contextmanager
def wrapping_by(wrap: Wrap) -> Iterator[None]:
    """Lets TRL's constructor call `wrap` where it would call `get_peft_model`.

    On a quantized base that constructor then rounds what trains to bfloat16. A τ in bfloat16 does not move by less than
    0.4 %, which is where most updates are: it gets the values back that it had.
    """
    module: Any = dpo_module
    original = module.get_peft_model
    before: dict[nn.Parameter, Tensor] = {}

    def wrapped(*args: Any, **kwargs: Any) -> PeftModel:
        model = wrap(*args, **kwargs)
        before.update({p: p.data for p in model.parameters() if p.requires_grad})
        return model

    module.get_peft_model = wrapped
    try:
        yield
    finally:
        module.get_peft_model = original
    for parameter, value in before.items():
        if parameter.dtype != value.dtype:
            parameter.data = value.to(parameter.device)


# ---- the reference ---------------------------------------------------------------------------------------------------

_REFERENCE_KEYS = ("ref_chosen_logps", "ref_rejected_logps")


class _LinearizedPolicy:
    """The model as TRL's `_compute_loss` sees it: each fused call also leaves the reference log-probs in the batch."""

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        linearized: Linearized,
        probe: Tensor | None,
        gives_reference: bool,
        ld_alpha: float | None,
    ) -> None:
        self.model, self.inputs, self.ld_alpha, self.gives_reference = model, inputs, ld_alpha, gives_reference
        self.options = {"linearized": linearized, "probe": probe}
        self.kl: Tensor | None = None  # its sum over the completion tokens, and their number

    def __call__(self, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return self.model(**kwargs)
        output = self.model(**kwargs, **self.options)
        if output.ref_log_probs is None:
            raise RuntimeError("The forward was expected to be linearized, but returned no reference log-probs.")
        self.kl = torch.stack([output.kl.sum(dtype=torch.float64), output.label_mask.sum()])
        if self.gives_reference:
            reference = _sum_logps(output.ref_log_probs, self.inputs["completion_mask"][:, 1:], self.ld_alpha)
            self.inputs.update(zip(_REFERENCE_KEYS, reference.chunk(2), strict=True))
        return output


def _sum_logps(log_probs: Tensor, mask: Tensor, ld_alpha: float | None) -> Tensor:
    """Log-prob of each completion (2B,) from (2B, T−1); LD-DPO weighs what exceeds the shorter of a pair by alpha."""
    if ld_alpha is None:
        return log_probs.sum(dim=1)
    position, length = mask.cumsum(dim=1), mask.sum(dim=1)
    shared = torch.minimum(*length.chunk(2)).repeat(2)[:, None]
    weights = torch.where(position <= shared, 1.0, ld_alpha) * (position > 0)
    return (log_probs * weights).sum(dim=1)


# ---- the contract ----------------------------------------------------------------------------------------------------


def check_contract() -> None:
    """Fails at import if the installed TRL lacks what the seams above rely on.

    Raises:
        ImportError: naming what is missing.
    """
    needed = {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "loss"}
    source = inspect.getsource(DPOTrainer._compute_loss)
    policy, reference = source.find("fused_lm_head=True"), source.find('inputs["ref_chosen_logps"]')
    problems = {
        "FusedCausalLMOutput has other fields": needed <= set(FusedCausalLMOutput.__dataclass_fields__),
        "DPOTrainer reads the reference before the policy's forward": 0 < policy < reference,
        "trl.trainer.dpo_trainer no longer names get_peft_model": "get_peft_model" in vars(dpo_module),
    }
    broken = [problem for problem, holds in problems.items() if not holds]
    if broken:
        raise ImportError(f"This version of TRL does not fit tangent-peft: {'; '.join(broken)}. Install trl>=1.15,<2.")


check_contract()
