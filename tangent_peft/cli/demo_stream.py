"""Answers while they are being written: a streamer for several rows at once, and a way to stop.

Knows tokens and text; neither axes nor the page.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer


State = Literal["waiting", "writing", "complete", "cut off", "stopped"]


@dataclass(frozen=True)
class Answer:
    """An answer as far as it is written.

    Attributes:
        text: what there is, special tokens removed.
        tokens: its length in tokens, the end-of-turn not counted.
        state: `"complete"` if the model ended it, `"cut off"` at the length limit, `"stopped"` by the user.
    """

    text: str = ""
    tokens: int = 0
    state: State = "waiting"


class RowStreamer(BaseStreamer):
    """Turns the tokens of a `generate` call over N rows into N answers, published after every token.

    Args:
        tokenizer: decodes.
        ends: ids of the tokens that end an answer.
        publish: called with all N answers.
        stopped: whether the user has asked to stop, as far as is known when the generation ends.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        publish: Callable[[list[Answer]], None],
        stopped: Callable[[], bool],
    ) -> None:
        self.tokenizer, self.ends, self.publish, self.stopped = tokenizer, frozenset(ends), publish, stopped
        self.rows: list[list[int]] = []
        self.ended: list[bool] = []

    def put(self, value: Tensor) -> None:
        """Takes the prompts (N, T) first, then one token for each row (N,)."""
        if not self.rows:
            self.rows, self.ended = [[] for _ in value], [False for _ in value]
            return
        for row, token in enumerate(value.reshape(-1).tolist()):
            self.ended[row] = self.ended[row] or token in self.ends
            if not self.ended[row]:  # what follows is padding
                self.rows[row].append(token)
        self.publish(self._answers("writing"))

    def end(self) -> None:
        """Says of each answer how it ended."""
        self.publish(self._answers("stopped" if self.stopped() else "cut off"))

    def _answers(self, unfinished: State) -> list[Answer]:
        answers = []
        for tokens, ended in zip(self.rows, self.ended, strict=True):
            text: Any = self.tokenizer.decode(tokens, skip_special_tokens=True)
            state: State = "complete" if ended else unfinished
            # Part of a character that takes several tokens decodes to replacement characters.
            answers.append(Answer(text.rstrip("\ufffd") if state == "writing" else text, len(tokens), state))
        return answers


class StopOn(StoppingCriteria):
    """Ends a generation, every row of it, once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """True for each row as soon as the event is set."""
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
