"""The fused head as TRL calls it: the forward that `add_fused_lm_head` installs, with tangents reaching the log-probs.

Seam: the keyword `fused_lm_head` of the model's forward, `FusedCausalLMOutput` and its fields. Two keywords are our
own: `linearized`, which quantity is linear in τ, and `probe`, see `score_tokens`.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from tangent_peft.forward import call_within, current_pass, split
from tangent_peft.forward.head import TokenScores, score_tokens
from tangent_peft.tuner import TangentLayer
from tangent_peft.tuner.heads import head_of


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

    carried = head.uniform_axes() if isinstance(head, TangentLayer) else {}

    def score(hidden: Tensor, tangent: Tensor | None) -> tuple[Tensor, ...]:
        parts = head_of(model, head, carried)
        return tuple(vars(score_tokens(hidden, tangent, labels, parts, linearized, probe)).values())

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
