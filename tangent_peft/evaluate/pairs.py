"""Preference pairs as tokens: two rows of a batch per pair, and which of their tokens belong to an answer.

As TRL's `DPOTrainer` tokenizes them: conversational pairs by the chat template, plain text with the end-of-text token
appended, an answer beginning where the tokens of prompt and prompt with answer diverge. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


Pair = Mapping[str, Any]  # `prompt`, `chosen`, `rejected`: message lists, or text
ANSWERS = ("chosen", "rejected")


def pair_batch(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The rows of some pairs, padded on the right: all chosen answers, then all rejected ones.

    Args:
        tokenizer: with a chat template for conversational pairs, with an end-of-text token for plain text.
        pairs: rows with `prompt`, `chosen`, `rejected`: all three message lists, or all three text.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask`, all (2·P, T).

    Raises:
        ValueError: for a pair that lacks a column or mixes the two formats.
    """
    tokens = [_tokens(tokenizer, pair, index) for index, pair in enumerate(pairs)]
    rows = [(pair[answer], start) for answer in (1, 2) for pair in tokens for start in [_answer_start(pair)]]
    shape = len(rows), max(len(ids) for ids, _ in rows)
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")}
    for row, (ids, start) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["completion_mask"][row, start : len(ids)] = 1
    return batch


def _tokens(tokenizer: PreTrainedTokenizerBase, pair: Pair, index: int) -> tuple[list[int], ...]:
    """Tokens of the prompt, of it with the chosen and with the rejected answer."""
    missing = [name for name in ("prompt", *ANSWERS) if name not in pair]
    if missing:
        raise ValueError(
            f"Pair {index} has the columns {sorted(pair)} and lacks {missing}. Give each pair a `prompt`, a "
            "`chosen` and a `rejected` answer, as TRL's preference datasets have them."
        )
    prompt, *answers = (pair[name] for name in ("prompt", *ANSWERS))
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return (_encode(tokenizer, prompt), *(_encode(tokenizer, prompt + _ended(tokenizer, x)) for x in answers))
    if any(isinstance(x, str) for x in (prompt, *answers)):
        kinds = {name: type(pair[name]).__name__ for name in ("prompt", *ANSWERS)}
        raise ValueError(f"Pair {index} mixes message lists and text: {kinds}. Give all three in one format.")
    start = _chat(tokenizer, prompt, add_generation_prompt=True)
    return (start, *(_chat(tokenizer, [*prompt, *answer], add_generation_prompt=False) for answer in answers))


def _answer_start(tokens: tuple[list[int], ...]) -> int:
    """Where the tokens of the prompt, and of it with either answer, begin to differ."""
    prompt, *rows = tokens
    common = (takewhile(lambda pair: pair[0] == pair[1], zip(prompt, row, strict=False)) for row in rows)
    return min(sum(1 for _ in same) for same in common)


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    end: Any = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _chat(tokenizer: PreTrainedTokenizerBase, messages: Any, add_generation_prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
