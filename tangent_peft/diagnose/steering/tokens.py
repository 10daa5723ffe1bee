"""What steering does to the next tokens: distances of one model's logits from those of two others, on fixed answers.

No judge is needed: answers of preference pairs are read token by token, and at each of their tokens the distributions
are compared in full. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tangent_peft.evaluate.preferences import AnswerTokens, preference_accuracy


METRICS = {
    "kl_base": "KL to base",
    "kl_tuned": "KL to tuned",
    "match_base": "top-1 = base",
    "match_tuned": "top-1 = tuned",
    "margin": "margin (nats)",
    "reward_accuracy": "reward acc.",
    "policy_accuracy": "policy acc.",
    "policy_per_token": "per token",
}  # what is measured on pairs, and what tables call it


@dataclass(frozen=True)
class Reference:
    """The next tokens of a model that others are compared with.

    Attributes:
        logps: log-probabilities (n, V) in float32.
        answers: log-probability of each pair's answers (P, 2), chosen first.
    """

    logps: Tensor
    answers: Tensor

    @staticmethod
    def of(logits: Tensor, answers: AnswerTokens) -> Reference:
        """From the logits (n, V) at the tokens of some answers."""
        logps = logits.float().log_softmax(-1)
        return Reference(logps, answers.by_pair(logps.gather(1, answers.labels[:, None]).squeeze(1).double()))


class Comparison:
    """Sums of what is compared, over batches."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._logps: list[Tensor] = []
        self._base: list[Tensor] = []
        self._lengths: list[Tensor] = []

    def add(self, logits: Tensor, answers: AnswerTokens, base: Reference, tuned: Reference) -> None:
        """Takes in the logits (n, V) of a batch, at the same tokens as the references."""
        self.add_reference(Reference.of(logits, answers), answers, base, tuned)

    def add_reference(self, found: Reference, answers: AnswerTokens, base: Reference, tuned: Reference) -> None:
        """As `add`, with the log-probabilities known already."""
        chances, best = found.logps.exp(), found.logps.argmax(1)
        # KL(found ‖ other) in nats: how far what is sampled from the one is from the other.
        # A token that the first rules out (−∞) adds nothing.
        gaps = [(found.logps - other.logps).mul_(chances).masked_fill_(chances == 0, 0.0) for other in (base, tuned)]
        far = [gap.sum(1).double().sum() for gap in gaps]
        same = [(other.logps.argmax(1) == best).double().sum() for other in (base, tuned)]
        self._sums += torch.stack([*far, *same]).cpu()
        self.tokens += len(best)
        self._logps.append(found.answers)
        self._base.append(base.answers)
        self._lengths.append(answers.lengths())

    def values(self) -> dict[str, float]:
        """The means: over tokens of KL and agreement, over pairs of margin and accuracies."""
        accuracy = preference_accuracy(*(torch.cat(parts) for parts in (self._logps, self._base, self._lengths)))
        pairs = (accuracy.margin, accuracy.reward, accuracy.policy, accuracy.policy_per_token)
        means = [float(value) for value in self._sums / self.tokens]
        return dict(zip(METRICS, [*(max(mean, 0.0) for mean in means), *pairs], strict=True))


def shortened(answers: AnswerTokens, limit: int | None) -> AnswerTokens:
    """The first `limit` tokens of each answer, and the prompts; all of them for `None`.

    Raises:
        ValueError: for a limit below 1.
    """
    if limit is None:
        return answers
    if limit < 1:
        raise ValueError(f"`answer_tokens` is a positive number, or None for whole answers; found {limit}.")
    scored = answers.scored & (answers.scored.cumsum(1) <= limit)
    length = int(scored.any(0).nonzero().max()) + 1
    scored = scored[:, :length]
    inputs = {name: x[:, : answers.first + length] for name, x in answers.inputs.items()}
    labels = inputs["input_ids"][:, answers.first :][scored]
    return replace(answers, inputs=inputs, scored=scored, labels=labels, rows=scored.nonzero()[:, 0])
