"""The fused head as TRL calls it: the forward that `add_fused_lm_head` installs, with tangents reaching the log-probs.

Seam: the keyword `fused_lm_head` of the model's forward, `FusedCausalLMOutput` and its fields. Two keywords are our
own: `linearized`, which quantity is linear in τ, and `probe`, see `score_tokens`.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from tangent_peft.forward import call_within, current_pass, split
from tangent_peft.forward.head import Head, TokenScores, score_tokens
from tangent_peft.tuner import TangentLayer
from tangent_peft.tuner.backends import read_weight


@dataclass
class LinearizedOutput(FusedCausalLMOutput):
    """TRL's per-token output and what the same forward also gave, (B, T−1), zero without a label.

    Attributes:
        ref_log_probs: log-probs under the primal, the reference.
        kl: KL(policy ‖ reference) of the next token.
    """

    ref_log_probs: Tensor | None = None
    kl: Tensor | None = None


def install_linearized_head(base: PreTrainedModel) -> None:
    """Chains onto the forward TRL installed: same call, but tangents reach the log-probs."""
    trl_forward = base.forward

    @functools.wraps(type(base).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        head = self.get_output_embeddings()
        carried = isinstance(head, TangentLayer) and bool(head.carried_axes())
        if not fused_lm_head or (current_pass() is None and not carried):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("linearized", "probe")}
            return trl_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        return _score_completions(self, head, args, kwargs)

    base.forward = types.MethodType(forward, base)


def _score_completions(model: PreTrainedModel, head: nn.Module, args: Any, kwargs: dict[str, Any]) -> LinearizedOutput:
    """Backbone, then the fused head on the tokens that carry a label."""
    if kwargs.pop("shift_labels", None) is not None:
        raise NotImplementedError("Context parallelism (`shift_labels`) is not supported for a linearized model.")
    labels, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
    linearized, probe = kwargs.pop("linearized", "logits"), kwargs.pop("probe", None)
    output = model.base_model(*args, **{**kwargs, "use_cache": False})
    running = current_pass()
    hidden, tangent = _hidden_states(output.last_hidden_state)
    labels = labels[:, 1:].to(hidden.device)
    mask = labels != -100
    tangent = None if tangent is None else tangent[:, :-1][mask]
    scores = _score(model, head, hidden[:, :-1][mask], tangent, labels[mask], linearized, probe)
    fields = _per_position(scores, mask)
    if running is None:  # the primal is not the base here
        fields["ref_log_probs"] = fields["kl"] = None
    loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)
    return LinearizedOutput(loss=loss, label_mask=mask, **fields)


def _score(model: PreTrainedModel, head: Any, hidden: Tensor, tangent: Tensor | None, *rest: Any) -> TokenScores:
    """`score_tokens` where the head's weights can be read, which sharding engines allow inside their modules only."""
    labels, linearized, probe = rest

    def score(hidden: Tensor, tangent: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(vars(score_tokens(hidden, tangent, labels, _head_of(model, head), linearized, probe)).values())

    leaves = [head.get_base_layer(), *head.active_leaves()] if isinstance(head, TangentLayer) else [head]
    return TokenScores(*call_within(leaves, score, hidden, tangent))


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
        return Head(read_weight(head), head.bias, scale=scale, softcap=softcap)
    linear: Any = head.get_base_layer()
    factors = [head.factors(name, weight) for name, weight in head.uniform_axes().items()]
    dense = [f.dense for f in factors if f.dense is not None]
    bs, projections = [f.b for f in factors if f.b is not None], [f.a for f in factors if f.a is not None]
    return Head(
        read_weight(linear),
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
