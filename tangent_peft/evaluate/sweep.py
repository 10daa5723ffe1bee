"""Walking over λ: the answers of each mix, linearized and as weights, and what scorers make of them.

Every point names its evaluation: `linearized` is f_lin, what was trained; `merged` is the ordinary network at θ(λ),
what a merged model or a LoRA export runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from tangent_peft.forward import evaluating
from tangent_peft.tuner import tangent_tuner


Evaluation = Literal["linearized", "merged"]
Scorer = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
EVALUATIONS: tuple[Evaluation, ...] = ("linearized", "merged")


@dataclass(frozen=True)
class SweepPoint:
    """One mix under one evaluation.

    Attributes:
        weights: λ by axis.
        evaluation: `"linearized"` or `"merged"`.
        scores: mean score over the prompts, by scorer; `"length"` is the mean of `lengths`.
        answers: one answer per prompt.
        lengths: tokens generated for each answer before it ended, the limit for one that was cut off.
        gap: the linearity gap of the mix, if it was measured.
    """

    weights: dict[str, float]
    evaluation: Evaluation
    scores: dict[str, float]
    answers: list[str]
    lengths: list[int]
    gap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def sweep(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    mixes: Iterable[Mapping[str, float]],
    questions: Sequence[str],
    scorers: Mapping[str, Scorer],
    evaluations: Sequence[Evaluation] = EVALUATIONS,
    max_new_tokens: int = 64,
) -> list[SweepPoint]:
    """Answers `questions` under every mix and evaluation, greedily, and scores the answers; their length always.

    Args:
        model: a `PeftModel` with tangent axes.
        tokenizer: with a chat template.
        mixes: the λ to visit; the next mix is asked for when the points of the one before are done.
        questions: user messages, one conversation each.
        scorers: functions (questions, answers) → one number per answer, by name.
        evaluations: which of `"linearized"` and `"merged"` to run.
        max_new_tokens: length limit of an answer.

    Returns:
        A point for every mix and evaluation, in that order.
    """
    tuner = tangent_tuner(model)
    points = []
    for weights in map(dict, mixes):
        for evaluation in evaluations:
            with tuner.axes(weights), tuner.linearized(evaluation == "linearized"):
                answers, lengths = _generate(model, tokenizer, questions, max_new_tokens)
            scores = {name: _mean(scorer(questions, answers)) for name, scorer in scorers.items()}
            scores["length"] = _mean(lengths)
            points.append(SweepPoint(weights, evaluation, scores, answers, lengths))
    return points


def _mean(values: Sequence[float]) -> float:
    return float(sum(map(float, values)) / len(values))


def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], max_new_tokens: int = 64
) -> list[str]:
    """One greedy answer per question, all in one left-padded batch, special tokens removed."""
    return _generate(model, tokenizer, questions, max_new_tokens)[0]


@torch.no_grad()
def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], max_new_tokens: int
) -> tuple[list[str], list[int]]:
    """The answers, and how many tokens each has before its end-of-turn."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    finally:
        tokenizer.padding_side = side
    with evaluating(model):
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    generated = output[:, inputs["input_ids"].shape[1] :]
    special = torch.tensor(tokenizer.all_special_ids, device=generated.device)
    lengths = (torch.isin(generated, special).cumsum(1) == 0).sum(1).tolist()
    return [answer.strip() for answer in tokenizer.batch_decode(generated, skip_special_tokens=True)], lengths
