"""What measures an answer on an axis, using nothing but a tokenizer and the base model.

Two measures: the length of an answer in tokens (verbosity), and how much more likely an answer is after the
question it was given to than after questions it was not given to (relevance).  Both are deterministic and
need no judge model.

This file does not know which adapter wrote the answers, how they were sampled, or how scores are reported.
The caller passes the model that judges: the frozen base model, or the adapted one with its adapters
disabled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["NULL_QUESTIONS", "answer_length", "question_relevance"]

NULL_QUESTIONS: tuple[str, ...] = (
    "How do I change a flat bicycle tire?",
    "What is the city of Lisbon known for?",
)
"""The other questions that `question_relevance` compares with: ordinary, of two kinds, on narrow topics."""


def answer_length(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[int]:
    """Length of each answer in tokens, without any special token.

    Args:
        tokenizer: the tokenizer whose tokens are counted.
        answers: N answers as plain text; an end-of-turn token written in the text does not count.

    Returns:
        N counts; 0 for an empty answer.
    """
    return [len(ids) for ids in _answer_ids(tokenizer, answers)]


@torch.no_grad()
def question_relevance(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    batch_size: int = 16,
) -> Tensor:
    """How much better its own question explains an answer than other questions do, in nats per token.

    For question x, answer y of |y| tokens and the other questions z in `NULL_QUESTIONS`::

        mean over z of (log p(y | x) - log p(y | z)) / |y|

    This is a pointwise mutual information.  The subtracted term cancels what makes an answer likely
    whatever was asked: fluency, stock phrases, repetition.  Other questions are used in place of an empty
    or content-free one because a model that is told nothing expects a greeting, so that any answer at all
    would seem relevant.  The log-likelihoods are averaged over z, not the likelihoods, so that a topic
    shared by chance with one z moves the score by no more than its share.  The other questions are fixed,
    so a score depends on its own row alone.

    About 0 means that the answer fits another question as well as its own; above 1 is clearly on topic.
    Scores of short answers spread more widely, and the scores of answers whose question is in
    `NULL_QUESTIONS` are biased towards 0.  Nothing is truncated: a row longer than the model can read fails
    in the model.

    Args:
        model: a causal language model that judges; it is run in eval mode, without gradients.
        tokenizer: its tokenizer, with a chat template.
        questions: N user messages.
        answers: N answers as plain text, `answers[i]` given to `questions[i]`.
        batch_size: rows per forward pass; it changes the memory taken, not the scores.

    Returns:
        Float32 tensor of shape [N] on the CPU; 0 for an empty answer.

    Raises:
        ValueError: the lists differ in length, `batch_size` is less than 1, or there is no chat template.
    """
    if len(questions) != len(answers):
        raise ValueError(
            f"{len(questions)} questions but {len(answers)} answers; pass one answer per question"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; pass at least 1")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template before scoring")
    targets = _answer_ids(tokenizer, answers)
    filled = [row for row, ids in enumerate(targets) if ids]
    prompts = [_prompt_ids(tokenizer, question) for question in questions]
    own = [(prompts[row], targets[row]) for row in filled]
    nulls = [_prompt_ids(tokenizer, question) for question in NULL_QUESTIONS]
    others = [(null, targets[row]) for null in nulls for row in filled]

    logp = _log_likelihood(model, own + others, batch_size)
    asked, compared = logp[: len(own)], logp[len(own) :].view(len(nulls), len(own)).mean(dim=0)
    sizes = torch.tensor([len(targets[row]) for row in filled], dtype=torch.float32)
    scores = torch.zeros(len(answers))
    scores[filled] = (asked - compared) / sizes
    return scores


def _answer_ids(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of each answer, special tokens dropped."""
    special = set(tokenizer.all_special_ids)
    return [
        [token for token in tokenizer(answer, add_special_tokens=False)["input_ids"] if token not in special]
        for answer in answers
    ]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids of the chat up to where the answer to `question` begins."""
    chat: list[dict[str, Any]] = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _log_likelihood(
    model: torch.nn.Module, rows: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> Tensor:
    """log p(answer | prompt) in nats, summed over tokens, of each (prompt ids, answer ids): [rows]."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]) + len(rows[row][1]))
    result = torch.zeros(len(rows))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            result[chosen] = _batch_log_likelihood(model, [rows[row] for row in chosen], device).cpu()
    finally:
        model.train(was_training)
    return result


def _batch_log_likelihood(
    model: torch.nn.Module, rows: Sequence[tuple[list[int], list[int]]], device: torch.device
) -> Tensor:
    """`_log_likelihood` of one right-padded batch, on `device`."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    attended = torch.zeros_like(ids)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        attended[row, :end] = 1
        scored[row, len(prompt) : end] = True
    ids, attended, scored = ids.to(device), attended.to(device), scored.to(device)

    logits: Tensor = model(input_ids=ids, attention_mask=attended, use_cache=False).logits
    first = min(len(prompt) for prompt, _ in rows)
    logits = logits[:, first - 1 : -1].float()
    token_logp: Tensor = logits.gather(-1, ids[:, first:, None]).squeeze(-1) - logits.logsumexp(-1)
    return (token_logp * scored[:, first:]).sum(dim=1)
