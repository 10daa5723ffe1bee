"""Greedy answers of steered models: how far they agree with those of the models unsteered, and whether they loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from tangent_peft.evaluate.chats import chat_tokens
from tangent_peft.evaluate.generation import Answer, Decoding, generate
from tangent_peft.evaluate.scorers import Prompt
from tangent_peft.evaluate.sweeps.text_metrics import repetition


BATCH_ROWS = 16
GREEDY_METRICS = {"greedy_base": "greedy = base", "greedy_tuned": "greedy = tuned", "repetition": "4-gram rep."}


class GreedyAnswers:
    """Greedy answers to some prompts.

    Args:
        tokenizer: with a chat template.
        prompts: at least one.
        max_new_tokens: length limit of an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.rows = chat_tokens(tokenizer, prompts)
        self.decoding = Decoding(max_new_tokens)

    def of(self, model: Any) -> list[Answer]:
        """The answers of a model as it is now."""
        batches = (self.rows[start : start + BATCH_ROWS] for start in range(0, len(self.rows), BATCH_ROWS))
        return [answer for rows in batches for answer in generate(model, self.tokenizer, rows, self.decoding)]

    @staticmethod
    def compare(answers: Sequence[Answer], base: Sequence[Answer], tuned: Sequence[Answer]) -> dict[str, float]:
        """Mean share of an answer's tokens before it leaves that of the base, of the tuned model; mean repetition.

        All NaN if the logits of an answer were not finite: it says nothing.
        """
        if not all(answer.finite for answer in answers):
            return dict.fromkeys(GREEDY_METRICS, math.nan)
        values = [
            fmean(_shared(mine.tokens, other.tokens) for mine, other in zip(answers, others, strict=True))
            for others in (base, tuned)
        ]
        values.append(fmean(repetition(answer.words) for answer in answers))
        return dict(zip(GREEDY_METRICS, values, strict=True))


def _shared(first: Sequence[int], second: Sequence[int]) -> float:
    """Length of the common beginning over the length of the longer one; 1 where they are the same."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    return same / max(len(first), len(second), 1)
