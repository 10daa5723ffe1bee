"""Whether a model prefers what people chose: accuracy on held-out preference pairs.

Two questions are asked of each pair (x, y_w, y_l). The *policy* prefers y_w if log π(y_w|x) > log π(y_l|x), which can
also be asked of the base model. The *implicit reward* prefers it if the policy moved that way from the base:
log π/π₀ (y_w|x) > log π/π₀ (y_l|x); for the base itself this is undecided, 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tangent_peft.evaluate.pairs import Pair, pair_batch
from tangent_peft.forward import evaluating


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Result of `preference_accuracy`, means over the pairs.

    Attributes:
        policy: share of pairs whose chosen answer has the higher log-probability.
        policy_per_token: the same with log-probabilities per token, which length does not decide.
        reward: share of pairs whose chosen answer gained more over the reference; ties count half.
        margin: mean of log π/π₀ (y_w|x) − log π/π₀ (y_l|x), in nats.
        pairs: number of pairs.
    """

    policy: float
    policy_per_token: float
    reward: float
    margin: float
    pairs: int


def preference_accuracy(logps: Tensor, reference: Tensor, lengths: Tensor) -> PreferenceAccuracy:
    """Accuracy from `pair_logps` of the policy and of the base, and the answers' lengths; all (N, 2), chosen first."""
    chosen, rejected = logps.unbind(1)
    per_token = logps / lengths.clamp(min=1)
    margins = (logps - reference)[:, 0] - (logps - reference)[:, 1]
    wins = (margins > 0).double() + 0.5 * (margins == 0).double()
    return PreferenceAccuracy(
        float((chosen > rejected).double().mean()),
        float((per_token[:, 0] > per_token[:, 1]).double().mean()),
        float(wins.mean()),
        float(margins.mean()),
        len(logps),
    )


@torch.no_grad()
def pair_logps(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    batch_size: int = 4,
    progress: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each pair's answers under the model as it is now.

    Args:
        model: a causal language model; its active mix and evaluation decide what is scored.
        tokenizer: with a chat template, for conversational pairs.
        pairs: rows with `prompt`, `chosen`, `rejected`, conversational or plain text; see `pair_batch`.
        batch_size: pairs per forward.
        progress: called after every batch.

    Returns:
        log π (N, 2) in nats, chosen first, and the answers' lengths (N, 2) in tokens, end-of-turn included.
    """
    scored = []
    with evaluating(model):
        for start in range(0, len(pairs), batch_size):
            scored.append(_score(model, tokenizer, pairs[start : start + batch_size]))
            if progress is not None:
                progress()
    logps, lengths = (torch.cat(column) for column in zip(*scored, strict=True))
    return logps, lengths


def _score(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in pair_batch(tokenizer, pairs).items()}
    ids, answer = batch["input_ids"], batch.pop("completion_mask")
    first = max(1, int(answer.any(0).int().argmax()))  # no answer begins earlier, so no logits are needed before
    logits = model(**batch, use_cache=False, logits_to_keep=ids.shape[1] - first + 1).logits[:, :-1].float()
    picked = logits.gather(2, ids[:, first:, None]).squeeze(2) - logits.logsumexp(2)
    logps, lengths = (picked * answer[:, first:]).sum(1), answer.sum(1)
    return torch.stack(logps.chunk(2), 1).cpu(), torch.stack(lengths.chunk(2), 1).cpu()
