"""Prompts and pairs as batches of tokens, with the positions that are looked at. Knows no model.

Batches are made one after the other, so that memory does not grow with the number of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tangent_peft.evaluate.chats import chat_tokens, padded
from tangent_peft.evaluate.pairs import ANSWERS, Pair, pair_batch
from tangent_peft.evaluate.scorers import Prompt


@dataclass(frozen=True)
class TokenBatch:
    """Some rows of tokens.

    Attributes:
        inputs: `input_ids` and `attention_mask` (B, T), padded on the right.
        keep: the positions to look at (B, T), as booleans; at least one in each row.
    """

    inputs: dict[str, Tensor]
    keep: Tensor

    @property
    def rows(self) -> int:
        """B."""
        return len(self.keep)


def prompt_batches(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    batch_size: int,
    device: torch.device | str = "cpu",
    keep: Literal["last", "all"] = "last",
) -> Iterator[TokenBatch]:
    """Prompts up to where the answer begins.

    Args:
        tokenizer: with a chat template.
        prompts: user messages as text, or lists of messages.
        batch_size: rows of a batch.
        device: where the tokens go.
        keep: the last token of each prompt, or all of them.

    Raises:
        ValueError: for no prompts, an empty one, or a batch size below 1.
    """
    _check(len(prompts), batch_size, "prompts")
    for start in range(0, len(prompts), batch_size):
        rows = chat_tokens(tokenizer, prompts[start : start + batch_size])
        inputs = padded(rows, "right", 0, torch.device(device))
        mask = inputs["attention_mask"].bool()
        last = torch.zeros_like(mask)
        last[torch.arange(len(mask)), mask.sum(1) - 1] = True
        yield TokenBatch(inputs, mask if keep == "all" else last)


def answer_batches(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    batch_size: int,
    device: torch.device | str = "cpu",
    answer: Literal["chosen", "rejected"] = "chosen",
    keep: Literal["answer", "predicting", "all"] = "answer",
) -> Iterator[TokenBatch]:
    """Prompts with one of their two answers, the tokens of the answer kept, those that predict them, or all of them.

    Args:
        tokenizer: as of `pair_batch`.
        pairs: rows with `prompt`, `chosen`, `rejected`.
        batch_size: rows of a batch.
        device: where the tokens go.
        answer: which of the two.
        keep: the tokens of the answer (its end included), for what they are turned into; the positions whose next token
            is one of the answer's, for what the model says of it; or all of prompt and answer.

    Raises:
        ValueError: for no pairs, a batch size below 1, or a pair whose answer is empty.
    """
    _check(len(pairs), batch_size, "pairs")
    half = ANSWERS.index(answer)
    for start in range(0, len(pairs), batch_size):
        check_answers(pairs[start : start + batch_size], start)
        batch = {name: x.chunk(2)[half] for name, x in pair_batch(tokenizer, pairs[start : start + batch_size]).items()}
        longest = int(batch["attention_mask"].sum(1).max())
        batch = {name: x[:, :longest].to(device) for name, x in batch.items()}
        answered, mask = batch.pop("completion_mask").bool(), batch["attention_mask"].bool()
        predicting = torch.zeros_like(answered)
        predicting[:, :-1] = answered[:, 1:]
        yield TokenBatch(batch, {"answer": answered, "predicting": predicting, "all": mask}[keep])


def check_answers(pairs: Sequence[Pair], start: int = 0) -> None:
    """Refuses a pair with an answer that says nothing.

    Args:
        pairs: some pairs.
        start: the number of the first one.

    Raises:
        ValueError: naming the pair and the answer.
    """
    for index, pair in enumerate(pairs, start=start):
        for name in ANSWERS:
            held = pair.get(name)
            text = held if isinstance(held, str) else "".join(str(message.get("content", "")) for message in held or ())
            if not text.strip():
                raise ValueError(f"The {name} answer of pair {index} is empty. Leave the pair out.")


def _check(count: int, batch_size: int, what: str) -> None:
    if not count:
        raise ValueError(f"No {what} are given, so there is nothing to look at. Give at least one.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch holds at least one row.")
