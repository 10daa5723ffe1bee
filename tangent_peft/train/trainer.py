"""`TangentDPOTrainer`: TRL's `DPOTrainer` on a linearized model, with the reference read off the same forward.

TRL keeps the loss, its metrics, data, evaluation and checkpoints. Three seams are touched, all of them here:

* `get_peft_model`, as `trl.trainer.dpo_trainer` names it, so that the adapter has the axis's name, and so that a model
  with axes comes in without TRL cloning its "default" adapter into a "ref" one;
* the forward that TRL's `add_fused_lm_head` installs: while a tangent is active, our head scores policy and reference
  from the same hidden states;
* `compute_loss`, TRL's public override point: `_compute_loss` reads `ref_*_logps` from the batch after the policy's
  forward, so a shim around `model` writes them there.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

from tangent_peft.forward import LinearizedForward, current_pass, split
from tangent_peft.forward.head import Head, TokenScores, score_tokens
from tangent_peft.train.config import TangentDPOConfig
from tangent_peft.train.policy import Wrap, choose_policy, primal_moves
from tangent_peft.tuner import TangentLayer


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
        ref_model: a reference other than the base; costs TRL's second forward.
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
        args = copy.copy(args)  # completed below; the caller's object may serve for another axis
        base, peft_config, wrap = choose_policy(model, peft_config, args)
        with _named_axis(wrap):
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
        wrapped: Any = self.model  # a PeftModel by now
        _install_linearized_head(wrapped.get_base_model())

    @property
    def _linearized_forward(self) -> LinearizedForward | None:
        return LinearizedForward.installed(self.accelerator.unwrap_model(self.model).get_base_model())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss; the reference log-probs are the primal's, from the same forward as the policy's."""
        linearized = self._linearized_forward
        given = self.ref_model is not None or self.precompute_ref_logps
        if given or linearized is None or linearized.mix() is None or primal_moves(model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.precompute_ref_logps = True  # TRL then takes the reference from the batch
        try:
            policy = _WithReference(model, inputs, self.ld_alpha)
            return super().compute_loss(policy, inputs, return_outputs, num_items_in_batch)
        finally:
            self.precompute_ref_logps = False
            for key in _REFERENCE_KEYS:
                inputs.pop(key, None)

    def _load_best_model(self) -> None:
        """As the host's, which looks for the adapter in the checkpoint itself, where only "default" lies."""
        args: Any = self.args
        axis = args.axis or "default"
        folder = Path(self.state.best_model_checkpoint or "") / axis
        if not folder.is_dir():
            super()._load_best_model()
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        model.load_adapter(str(folder), axis, is_trainable=True)
        model.set_adapter(axis)


# ---- the axis's name -------------------------------------------------------------------------------------------------


@contextmanager
def _named_axis(wrap: Wrap) -> Iterator[None]:
    """Lets TRL's constructor call `wrap` where it would call `get_peft_model`."""
    module: Any = dpo_module
    original = module.get_peft_model
    module.get_peft_model = wrap
    try:
        yield
    finally:
        module.get_peft_model = original


# ---- the head --------------------------------------------------------------------------------------------------------


@dataclass
class LinearizedOutput(FusedCausalLMOutput):
    """TRL's per-token output with the reference log-probs (B, T−1) that the same forward gave; zero without a label."""

    ref_log_probs: Tensor | None = None


def _install_linearized_head(base: PreTrainedModel) -> None:
    """Chains onto the forward TRL installed: same call, but tangents reach the log-probs."""
    trl_forward = base.forward

    @functools.wraps(type(base).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        head = self.get_output_embeddings()
        carried = isinstance(head, TangentLayer) and bool(head.carried_axes())
        if not fused_lm_head or (current_pass() is None and not carried):
            return trl_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        return _score_completions(self, head, args, kwargs)

    base.forward = types.MethodType(forward, base)


def _score_completions(model: PreTrainedModel, head: nn.Module, args: Any, kwargs: dict[str, Any]) -> LinearizedOutput:
    """Backbone, then the fused head on the tokens that carry a label."""
    if kwargs.pop("shift_labels", None) is not None:
        raise NotImplementedError("Context parallelism (`shift_labels`) is not supported for a linearized model.")
    labels, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
    output = model.base_model(*args, **{**kwargs, "use_cache": False})
    running = current_pass()
    hidden, tangent = _hidden_states(output.last_hidden_state)
    labels = labels[:, 1:].to(hidden.device)
    mask = labels != -100
    tangent = None if tangent is None else tangent[:, :-1][mask]
    scores = score_tokens(hidden[:, :-1][mask], tangent, labels[mask], _head_of(model, head))
    fields = _per_position(scores, mask)
    if running is None:
        fields.pop("ref_log_probs")  # the primal is not the base here
    loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)
    return LinearizedOutput(loss=loss, label_mask=mask, **fields)


def _hidden_states(last: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent (B, T, D) of the backbone's output, also where it was joined already."""
    running = current_pass()
    if running is not None and running.hidden is not None:
        return running.hidden
    return (last, None) if running is None else split(last)


def _per_position(scores: TokenScores, mask: Tensor) -> dict[str, Any]:
    """The fields of `scores` (N,) at their positions (B, T−1), zero elsewhere; differentiable also for N = 0."""
    return {name: x.new_zeros(mask.shape).masked_scatter(mask, x) for name, x in vars(scores).items()}


def _head_of(model: PreTrainedModel, head: Any) -> Head:
    """The head's weight, its active tangents Σ λᵢ τᵢ, and what the model does to its logits."""
    scale, softcap = _logit_options(model.config.get_text_config().to_dict())
    if not isinstance(head, TangentLayer):
        return Head(head.weight, head.bias, scale=scale, softcap=softcap)
    linear: Any = head.get_base_layer()
    factors = [head.factors(name, weight) for name, weight in head.carried_axes().items()]
    dense = [f.dense for f in factors if f.dense is not None]
    bs, projections = [f.b for f in factors if f.b is not None], [f.a for f in factors if f.a is not None]
    return Head(
        linear.weight,
        linear.bias,
        dense=sum(dense[1:], start=dense[0]) if dense else None,
        b=(bs[0] if len(bs) == 1 else torch.cat(bs, dim=1)) if bs else None,
        a=(projections[0] if len(projections) == 1 else torch.cat(projections)) if projections else None,
        scale=scale,
        softcap=softcap,
    )


def _logit_options(config: dict[str, Any]) -> tuple[float, float | None]:
    """Factor and soft-cap of the logits; the names are those `add_fused_lm_head` reads, in its order."""
    factor = next((config[n] for n in _LOGIT_FACTORS if config.get(n) is not None), None)
    if factor is None and config.get("logits_scaling") is not None:
        scaling = config["logits_scaling"]
        factor = scaling if config.get("model_type") == "hyperclovax" else 1 / scaling
    return 1.0 if factor is None else float(factor), config.get("final_logit_softcapping")


_LOGIT_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


# ---- the reference ---------------------------------------------------------------------------------------------------

_REFERENCE_KEYS = ("ref_chosen_logps", "ref_rejected_logps")


class _WithReference:
    """The model as TRL's `_compute_loss` sees it: each fused call also leaves the reference log-probs in the batch."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], ld_alpha: float | None) -> None:
        self.model, self.inputs, self.ld_alpha = model, inputs, ld_alpha

    def __call__(self, **kwargs: Any) -> Any:
        output = self.model(**kwargs)
        if kwargs.get("fused_lm_head"):
            if output.ref_log_probs is None:
                raise RuntimeError("The forward was expected to be linearized, but returned no reference log-probs.")
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
