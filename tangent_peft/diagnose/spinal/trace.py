"""SPINAL (arXiv 2601.06238): how strongly each layer contracts, and how far its prediction moves to the next.

The trace of a model of L blocks has, for each layer ℓ from 0 (what enters the first block) to L,

    contraction  α_ℓ = −d log σ_k(H_ℓ) / d log k   on the tail of the singular values of H_ℓ (N tokens × D)
    transport    ℒ_ℓ = 2 arccos Σ_v √(p_ℓ p_ℓ₊₁)   mean over tokens; p_ℓ the logit lens, ℓ from 0 to L − 1

and, on preference pairs, the squared norm of the DPO gradient in each block. `spinal_score.py` compares two traces.

The residual streams come batch by batch and leave a D × D second moment per layer, in float64: memory is L·D² and does
not grow with the number of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tangent_peft.diagnose.activations import decoder_blocks, layer_tangents
from tangent_peft.diagnose.moments import Moments
from tangent_peft.diagnose.prompts import TokenBatch
from tangent_peft.diagnose.result import Cell, Diagnosis, Finding, Table, Verdict
from tangent_peft.diagnose.spinal.block_gradients import BlockGradients, block_gradients
from tangent_peft.diagnose.spinal.lens import Lens
from tangent_peft.diagnose.spinal.options import SpinalOptions, Texts, terminal_block
from tangent_peft.diagnose.spinal.plots import Curve, plot_traces
from tangent_peft.diagnose.spinal.power_law import PowerLaw, fit_power_law, noise_exponent
from tangent_peft.diagnose.states import ModelState
from tangent_peft.evaluate.pairs import Pair
from tangent_peft.evaluate.scorers import Prompt


RECONSTRUCTED = [
    "window and bounds of the power-law fit",
    "which tokens are read",
    "scaling of the terminal block to other depths than 32",
    "the three terms and the score: formulas, scaling and weights",
]


@dataclass(frozen=True)
class SpinalSettings:
    """What a trace was taken on.

    Attributes:
        source: prompts or pairs, and how many.
        positions: which of their tokens.
        tokens: N, how many.
        lens_tokens: how many of them went through the lens, the whole vocabulary each.
        seed: of their draw.
        centred: whether the mean activation was taken out.
        dtype: of the model.
        hidden_size: D.
        noise: α that the same fit finds for independent Gaussian entries (N × D).
        reconstructed: what is not published, and is ours.
    """

    source: str
    positions: str
    tokens: int
    lens_tokens: int
    seed: int
    centred: bool
    dtype: str
    hidden_size: int
    noise: float
    reconstructed: list[str]


@dataclass(frozen=True)
class SpinalTrace(Diagnosis):
    """Result of `spinal_trace`.

    Attributes:
        name: of the state.
        contraction: the fit of each layer (L + 1,).
        transport: ℒ (L,) in radians.
        gradients: of the DPO loss by block; `None` without pairs.
        block: first and last layer of the terminal block T.
        settings: what it was taken on.
    """

    title: ClassVar[str] = "SPINAL: contraction and transport by depth"
    name: str
    contraction: list[PowerLaw]
    transport: list[float]
    gradients: BlockGradients | None
    block: tuple[int, int]
    settings: SpinalSettings

    @property
    def alphas(self) -> list[float]:
        """α (L + 1,); NaN where the fit is refused."""
        return [fit.alpha for fit in self.contraction]

    @property
    def length(self) -> float:
        """Σ ℒ, the length of the path of predictions, in radians."""
        return math.fsum(self.transport)

    @property
    def concentration(self) -> float:
        """Share of the squared gradient in T less |T| / L, 0 where it is spread evenly (reconstruction); or NaN."""
        if self.gradients is None:
            return math.nan
        first, last = self.block
        return self.gradients.share(first, last) - (last - first + 1) / len(self.transport)

    def tables(self) -> list[Table]:
        """The trace, layer by layer."""
        first, last = self.block
        rows: list[list[Cell]] = []
        for layer, fit in enumerate(self.contraction):
            share = self.gradients.share(layer, layer) if self.gradients is not None and layer else None
            moved = self.transport[layer] if layer < len(self.transport) else None
            mark = "T" if first <= layer <= last else ""
            rows.append([layer, mark, fit.alpha, fit.r2, fit.points, moved, share, fit.reason])
        columns = ["layer", "block", "α", "R²", "n", "ℒ to next (rad)", "gradient share", "why no α"]
        return [Table(f"{self.name}: depth trace", columns, rows, self._note())]

    def _note(self) -> str:
        held = self.settings
        lines = [
            f"T: terminal block. Total length {self.length:.4g} rad. Noise of the same shape has α = {held.noise:.3g}.",
            f"{held.source}; positions {held.positions!r}: N = {held.tokens} tokens, {held.lens_tokens} of them in "
            f"the lens (seed {held.seed}), with the whole vocabulary; "
            f"{'centred' if held.centred else 'uncentred'}; {held.dtype}.",
        ]
        if self.gradients is not None:
            lines.append(f"Gradient of the DPO loss on {self.gradients.pairs} pairs, β = {self.gradients.beta:g}.")
        return "\n".join([*lines, f"Reconstruction, not published: {'; '.join(held.reconstructed)}."])

    def verdicts(self) -> list[Verdict]:
        """Whether the numbers are there to be read."""
        refused = [layer for layer, alpha in enumerate(self.alphas) if math.isnan(alpha)]
        count = len(self.contraction)
        if refused:
            finding: Finding = "unknown" if len(refused) == count else "warning"
            why = f"layer {refused[0]}: {self.contraction[refused[0]].reason}"
            return [Verdict(finding, f"{self.name}: no α at {len(refused)} of {count} layers; {why}.")]
        worst = min(fit.r2 for fit in self.contraction)
        return [Verdict("fine", f"{self.name}: every layer has an α (R² at least {worst:.2f}).")]

    def plot(self, folder: str | Path) -> list[Path]:
        """α, ℒ and the gradient's shares by depth."""
        return plot_traces([self.curve()], self.block, self.settings.noise, Path(folder) / "spinal-trace")

    def curve(self) -> Curve:
        """What pictures draw."""
        energy = None if self.gradients is None else self.gradients.energy
        return Curve(self.name, self.alphas, self.transport, energy)


def spinal_trace(
    state: ModelState,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[Prompt] | None = None,
    pairs: Sequence[Pair] | None = None,
    reference: ModelState | None = None,
    options: SpinalOptions | None = None,
) -> SpinalTrace:
    """The depth trace of one state: contraction, transport and, on pairs, gradients.

    Args:
        state: a base, a mix of axes (linearized or as weights), or a checkpoint.
        tokenizer: with a chat template, for conversations.
        prompts: what is read; or
        pairs: of which the prompts with their chosen answers are read, and which the gradient is taken on.
        reference: of the DPO loss; default: the state itself, whose margins are all 0.
        options: see `SpinalOptions`.

    Raises:
        TypeError: if the model has no list of blocks, or its layers can not be read as logits.
        ValueError: for neither or both of prompts and pairs, empty ones, or activations that are not finite.
    """
    texts = Texts(tokenizer, prompts, pairs, options or SpinalOptions())
    watch = Watch(state, texts.options)
    sample, seen = texts.lens_sample(), 0
    for batch in texts.batches(state.device):
        count = int(batch.keep.sum())
        watch.add(batch, sample[seen : seen + count])
        seen += count
    return watch.trace(texts, texts.reference(reference or state))


class Watch:
    """Takes in the layers of a state batch by batch.

    Args:
        state: to look at.
        options: of the trace.
    """

    def __init__(self, state: ModelState, options: SpinalOptions) -> None:
        self.state, self.options = state, options
        self.layers = len(decoder_blocks(state.root))
        self.block = terminal_block(self.layers, options.block)
        self._moments: list[Moments] = []
        self._moved = torch.zeros(self.layers, dtype=torch.float64)
        self._moves = 0
        self._lens: Lens | None = None

    @torch.no_grad()
    def add(self, batch: TokenBatch, sample: Tensor) -> Tensor:
        """Takes in the kept positions of a batch.

        Args:
            batch: rows of tokens with n kept positions.
            sample: which of these go through the lens (n,).

        Returns:
            ℒ of those (m, L), on the CPU in float64.
        """
        inputs = {name: x.to(self.state.device) for name, x in batch.inputs.items()}
        with self.state.active() as root:
            lens = self._lens = self._lens or Lens.of(root, inputs)
            primal, tangent = layer_tangents(root, inputs, batch.keep)
            linearized = bool(tangent.any())
            joined = primal + tangent if linearized else primal
            self._moments = self._moments or [Moments(joined.shape[2]) for _ in range(len(joined))]
            for moments, layer in zip(self._moments, joined, strict=True):
                moments.add(layer)
            chosen = sample.to(primal.device)
            streams = [(h[chosen], dh[chosen] if linearized else None) for h, dh in zip(primal, tangent, strict=True)]
            found = lens.transport(streams).to("cpu", torch.float64)
        self._moved += found.sum(0)
        self._moves += len(found)
        return found

    def trace(self, texts: Texts, reference: Tensor | None) -> SpinalTrace:
        """The trace of what was taken in, with gradients against log π_ref of the pairs, if there are pairs."""
        options, rule = self.options, self.options.rule
        fits = [_fitted(moments, options) for moments in self._moments]
        tokens, size = self._moments[0].count, len(self._moments[0].mean)
        settings = SpinalSettings(
            texts.source,
            options.positions,
            tokens,
            self._moves,
            options.seed,
            options.centred,
            str(self.state.root.dtype).removeprefix("torch."),
            size,
            noise_exponent(tokens, size, rule),
            list(RECONSTRUCTED),
        )
        transport = (self._moved / self._moves).tolist()
        return SpinalTrace(self.state.name, fits, transport, self._gradients(texts, reference), self.block, settings)

    def _gradients(self, texts: Texts, reference: Tensor | None) -> BlockGradients | None:
        if reference is None:
            return None
        options = self.options
        return block_gradients(
            self.state, texts.tokenizer, texts.learned(), reference, options.beta, options.batch_size, options.memory
        )


def _fitted(moments: Moments, options: SpinalOptions) -> PowerLaw:
    """α of one layer; what centring leaves of rounding is not taken for singular values."""
    scale = math.sqrt(float(moments.second().trace()))
    return fit_power_law(
        moments.singular_values(options.centred).numpy(), options.rule, scale if options.centred else 0.0
    )
