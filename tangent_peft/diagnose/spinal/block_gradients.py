"""Where in the depth of a model the DPO loss pulls: the squared norm of its gradient in each block's weights.

    L = mean over pairs of −log σ(β [(log π(y_w) − log π(y_l)) − (log π_ref(y_w) − log π_ref(y_l))])

An answer's log π is the sum over its tokens. The gradient is that of the ordinary network in its full weights θ; of a
base with axes it is taken at θ(λ) = θ₀ + Σ λᵢ τᵢ, axes added as weights, also where they otherwise run linearized. Its
norm is that of the mean over all pairs, so it can be taken only once the last batch has added to it: until then the
gradients of some blocks are held, as many as fit `memory`, and the pairs are run again for the next blocks. With all
pairs in one batch nothing is held but the gradient of one weight. Knows no trainer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tangent_peft.diagnose.activations import decoder_blocks
from tangent_peft.diagnose.prompts import check_answers
from tangent_peft.diagnose.states import ModelState
from tangent_peft.evaluate.pairs import Pair
from tangent_peft.evaluate.preferences import AnswerTokens, check_pairs, pair_logps
from tangent_peft.tuner.axes import tangent_tuner
from tangent_peft.tuner.layer import TangentLayer


MEMORY = 2**30  # bytes of gradients held at a time


@dataclass(frozen=True)
class BlockGradients:
    """Result of `block_gradients`.

    Attributes:
        energy: ‖∇_{θ_ℓ} L‖² of each block (L,), the first block first.
        loss: L, in nats.
        pairs: how many.
        beta: β.
        passes: how often the pairs were run, because of the memory that gradients take.
    """

    energy: list[float]
    loss: float
    pairs: int
    beta: float
    passes: int

    def share(self, first: int, last: int) -> float:
        """Σ of the energy of the blocks `first` to `last`, counted from 1, over that of all; NaN if there is none."""
        total = math.fsum(self.energy)
        return math.fsum(self.energy[first - 1 : last]) / total if total > 0 else math.nan


def reference_logps(
    state: ModelState, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], batch_size: int = 2
) -> Tensor:
    """log π_ref of each pair's answers (N, 2), chosen first, of the network at the weights θ(λ) of a state.

    Raises:
        ValueError: for no pairs, or an empty answer.
    """
    check_answers(pairs)
    with _as_weights(state) as root:
        return pair_logps(root, tokenizer, pairs, batch_size)[0]


def block_gradients(
    state: ModelState,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    reference: Tensor,
    beta: float = 0.1,
    batch_size: int = 2,
    memory: int = MEMORY,
) -> BlockGradients:
    """The energy of the gradient of the DPO loss in each block; nothing of the model changes.

    Args:
        state: the policy. Its weights require gradients for as long as this runs, and get back what they had.
        tokenizer: as of `pair_logps`.
        pairs: rows with `prompt`, `chosen`, `rejected`.
        reference: log π_ref (N, 2), as `reference_logps` gives; the policy's own make every margin 0, where the
            gradient is not.
        beta: β.
        batch_size: pairs per forward and backward pass.
        memory: bytes of gradients held at a time; one block's are held at least.

    Raises:
        ValueError: for no pairs, an empty answer, a reference of another shape, or β that is not positive.
        TypeError: if weights of a block can not have a gradient, as quantized ones.
    """
    check_pairs(pairs, batch_size)
    check_answers(pairs)
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta!r}; DPO needs a positive number.")
    if reference.shape != (len(pairs), 2):
        raise ValueError(
            f"The reference has the shape {tuple(reference.shape)} for {len(pairs)} pairs; expected (N, 2)."
        )
    chunks = [slice(start, start + batch_size) for start in range(0, len(pairs), batch_size)]
    energy: list[float] = []
    with _as_weights(state) as root, torch.enable_grad():
        blocks = [_weights(block, index) for index, block in enumerate(decoder_blocks(root), start=1)]
        groups = [blocks] if len(chunks) == 1 else list(_groups(blocks, memory))
        for group in groups:
            loss = 0.0
            with _learning(root, group) as learner:
                for chunk in chunks:
                    learner.is_last = chunk is chunks[-1]
                    part = _loss(root, tokenizer, pairs[chunk], reference[chunk], beta) / len(pairs)
                    part.backward()
                    loss += float(part.detach())
                learner.collect()
            energy += learner.energy
    return BlockGradients(energy, loss, len(pairs), beta, len(groups))


def _loss(
    root: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], reference: Tensor, beta: float
) -> Tensor:
    """Σ over some pairs of −log σ(β · margin)."""
    answers = AnswerTokens.of(tokenizer, pairs, root.get_input_embeddings().weight.device)  # type: ignore[arg-type]
    logits = answers.logits(root).float()
    logps = answers.by_pair(logits.gather(1, answers.labels[:, None]).squeeze(1) - logits.logsumexp(1))
    moved = logps - reference.to(logps)
    return -F.logsigmoid(beta * (moved[:, 0] - moved[:, 1])).sum()


@contextmanager
def _as_weights(state: ModelState) -> Iterator[PreTrainedModel]:
    """The network at θ(λ): a state, with tangent axes not linearized."""
    with ExitStack() as stack:
        root = stack.enter_context(state.active())
        if any(isinstance(module, TangentLayer) for module in root.modules()):
            stack.enter_context(tangent_tuner(state.model).linearized(False))
        yield root


def _weights(block: nn.Module, number: int) -> list[nn.Parameter]:
    """The base weights of a block, without those of adapters."""
    adapters = {
        parameter
        for layer in block.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, child in layer.named_children()
        if name in layer.adapter_layer_names
        for parameter in child.parameters()
    }
    named = [(name, p) for name, p in block.named_parameters() if p not in adapters]
    packed = [f"{name} ({p.dtype})" for name, p in named if not p.is_floating_point()]
    if packed:
        raise TypeError(
            f"Weights of block {number} can not have a gradient: {', '.join(packed[:3])}. Load the model unquantized "
            "to see where its gradient concentrates."
        )
    return [p for _, p in named]


def _groups(blocks: list[list[nn.Parameter]], memory: int) -> Iterator[list[list[nn.Parameter]]]:
    """Adjacent blocks whose gradients fit into `memory` bytes, one block at least."""
    group: list[list[nn.Parameter]] = []
    held = 0
    for block in blocks:
        size = sum(p.numel() * p.element_size() for p in block)
        if group and held + size > memory:
            yield group
            group, held = [], 0
        group.append(block)
        held += size
    if group:
        yield group


class _Learner:
    """Adds up the squared gradients of some blocks; a gradient is dropped as soon as it is complete."""

    def __init__(self, group: list[list[nn.Parameter]]) -> None:
        self.owner = {p: index for index, block in enumerate(group) for p in block}
        self.energy = [0.0] * len(group)
        self.is_last = False

    def arrived(self, parameter: Tensor) -> None:
        """A gradient has been added to."""
        if self.is_last:
            self._take(parameter)

    def collect(self) -> None:
        """Takes what the last batch did not reach, as experts that no token of it chose."""
        for parameter in self.owner:
            self._take(parameter)

    def _take(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            square = parameter.grad.float().square().sum(dtype=torch.float64)
            self.energy[self.owner[parameter]] += float(square)  # type: ignore[index]
            parameter.grad = None


@contextmanager
def _learning(root: PreTrainedModel, group: list[list[nn.Parameter]]) -> Iterator[_Learner]:
    """Lets the weights of some blocks, and nothing else, learn; everything is as it was afterwards."""
    learner = _Learner(group)
    before = [(p, p.requires_grad, p.grad) for p in root.parameters()]
    with ExitStack() as stack:
        try:
            for parameter, _, _ in before:
                parameter.requires_grad_(parameter in learner.owner)
                parameter.grad = None
            for parameter in learner.owner:
                stack.callback(parameter.register_post_accumulate_grad_hook(learner.arrived).remove)
            yield learner
        finally:
            for parameter, learns, gradient in before:
                parameter.requires_grad_(learns)
                parameter.grad = gradient
