"""What a SPINAL trace is taken from and how: tokens, window of the fit, terminal block, weights of the score."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tangent_peft.diagnose.prompts import TokenBatch, answer_batches, prompt_batches
from tangent_peft.diagnose.spinal.block_gradients import MEMORY, reference_logps
from tangent_peft.diagnose.spinal.power_law import FitRule
from tangent_peft.diagnose.states import ModelState
from tangent_peft.evaluate.pairs import Pair
from tangent_peft.evaluate.scorers import Prompt


Positions: TypeAlias = Literal["all", "answer", "last"]
FIRST, LAST, OF = 21, 30, 32  # the paper's terminal block, layers 21 to 30, as shares of a depth of 32


@dataclass(frozen=True)
class SpinalOptions:
    """How a trace is taken; what the paper's abstract does not give is marked (ours).

    Attributes:
        positions: which tokens are read: all, those of the answers, or the last one before each answer (ours).
        centred: whether the mean activation of a layer is taken out before its singular values (ours: not).
        rule: window and bounds of the power-law fit (ours).
        lens_tokens: of the tokens read, how many go through the lens, drawn at random; `None`: all.
        block: first and last layer of the terminal block; `None`: layers 21 to 30 of 32, scaled to the depth.
        weights: of alignment, coherence and concentration in the score (ours: equal).
        beta: β of the DPO loss whose gradient is looked at.
        gradient_pairs: how many of the pairs, the first ones, the gradient is taken on; `None`: all.
        batch_size: rows, or pairs, of a batch.
        seed: of the draw of `lens_tokens`.
        memory: bytes of gradients held at a time.

    Raises:
        ValueError: for numbers that make no sense.
    """

    positions: Positions = "all"
    centred: bool = False
    rule: FitRule = field(default_factory=FitRule)
    lens_tokens: int | None = 256
    block: tuple[int, int] | None = None
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    beta: float = 0.1
    gradient_pairs: int | None = 16
    batch_size: int = 2
    seed: int = 0
    memory: int = MEMORY

    def __post_init__(self) -> None:
        if self.positions not in ("all", "answer", "last"):
            raise ValueError(f"`positions` is {self.positions!r}; it is 'all', 'answer' or 'last'.")
        if self.lens_tokens is not None and self.lens_tokens < 1:
            raise ValueError(f"`lens_tokens` is {self.lens_tokens}; give at least 1, or None for all tokens.")
        if self.gradient_pairs is not None and self.gradient_pairs < 1:
            raise ValueError(f"`gradient_pairs` is {self.gradient_pairs}; give at least 1, or None for all pairs.")
        if len(self.weights) != 3 or not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"`weights` is {self.weights}; give three finite numbers.")


def terminal_block(layers: int, block: tuple[int, int] | None = None) -> tuple[int, int]:
    """First and last layer of the terminal block T of a model of L blocks; layer ℓ is what block ℓ of 1 to L writes.

    Default: ⌊21 L / 32⌋ to ⌈30 L / 32⌉, the paper's layers 21 to 30 at L = 32 (scaling ours).

    Raises:
        ValueError: for a block outside of the model.
    """
    first, last = block or (max(1, FIRST * layers // OF), -(-LAST * layers // OF))
    if not 1 <= first <= last <= layers:
        raise ValueError(f"The terminal block {first} to {last} is not within the layers 1 to {layers} of the model.")
    return first, last


@dataclass(frozen=True)
class Texts:
    """The prompts, or the pairs, that a trace is taken on; exactly one of them is given.

    Raises:
        ValueError: for both or neither, or answers asked of prompts.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt] | None
    pairs: Sequence[Pair] | None
    options: SpinalOptions

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.pairs is None):
            raise ValueError("Give either `prompts` or `pairs`: a trace is taken on one of them.")
        if self.pairs is None and self.options.positions == "answer":
            raise ValueError("positions='answer' needs answers: give `pairs`, or read the prompts, positions='all'.")

    @property
    def source(self) -> str:
        """What is read, in words."""
        if self.pairs is None:
            return f"{len(self.prompts or ())} prompts"
        return f"{len(self.pairs)} pairs, each prompt with its chosen answer"

    def batches(self, device: torch.device | str = "cpu") -> Iterator[TokenBatch]:
        """The rows, with the positions that are read.

        Raises:
            ValueError: for no rows, an empty prompt or answer, or a batch size below 1.
        """
        options = self.options
        if self.pairs is None:
            kept: Literal["last", "all"] = "last" if options.positions == "last" else "all"
            yield from prompt_batches(self.tokenizer, self.prompts or [], options.batch_size, device, kept)
            return
        read: Literal["answer", "all"] = "all" if options.positions == "all" else "answer"
        for batch in answer_batches(self.tokenizer, self.pairs, options.batch_size, device, keep=read):
            yield TokenBatch(batch.inputs, _before(batch.keep)) if options.positions == "last" else batch

    def learned(self) -> Sequence[Pair]:
        """The pairs that the gradient is taken on."""
        return (self.pairs or [])[: self.options.gradient_pairs]

    def reference(self, state: ModelState) -> Tensor | None:
        """log π_ref of these pairs (N, 2), of the network at the weights of a state; `None` without pairs."""
        if self.pairs is None:
            return None
        return reference_logps(state, self.tokenizer, self.learned(), self.options.batch_size)

    def lens_sample(self) -> Tensor:
        """Which of the positions read, in order, go through the lens (N,), as booleans on the CPU."""
        count = sum(int(batch.keep.sum()) for batch in self.batches())
        chosen = torch.ones(count, dtype=torch.bool)
        wanted = self.options.lens_tokens
        if wanted is not None and wanted < count:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.options.seed))
            chosen[order[wanted:]] = False
        return chosen


def _before(answers: Tensor) -> Tensor:
    """The position before each row's answer."""
    last = torch.zeros_like(answers)
    first = answers.int().argmax(1)
    last[torch.arange(len(answers), device=answers.device), (first - 1).clamp(min=0)] = True
    return last
