"""The logit lens: what the model would say if it stopped at a layer, and how far that moves from layer to layer.

p_ℓ = softmax of the head, after the final norm, of the residual stream h_ℓ; no top-k, the whole vocabulary. SPINAL
(arXiv 2601.06238) calls the Fisher–Rao distance of adjacent layers *transport*,

    ℒ_ℓ = 2 arccos Σ_v √(p_ℓ p_ℓ₊₁) = 4 arcsin(‖√p_ℓ − √p_ℓ₊₁‖ / 2)        between 0 and π

The second form is used: near 1 the arccos of float32 knows nothing below 7·10⁻⁴. Nor do the differences of two rounded
logits; so where layers are close, the change of the logits is computed as such, W·(n_ℓ₊₁ − n_ℓ), and that of the final
norm n = N(h), where it is small, as the derivative of N halfway: N(h + Δ/2) − N(h − Δ/2) = N'(h)·Δ + O(Δ³). With δ the
change of log p,

    √q − √p = ± exp(½ max(log p, log q)) · (1 − exp(−½ |δ|))

keeps the digits of δ. All that is as wide as the vocabulary is float32. Not reached is a layer that stretches h by more
than `NEAR` and does nothing else: a norm that casts to float32 itself then leaves some 1e-7 rad.

The final norm is whatever the model applies between its last block and its head. It is found by watching a forward, and
used once the model's own logits have come out of it. A linearized model is looked at through the linearized lens: with
ḣ the tangent and Δ that of the head, W·(N(h) + N'(h)·ḣ) + Δ·N(h), which at the last layer are the logits of f_lin.
Letters: n positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers import PreTrainedModel

from tangent_peft.diagnose.activations import decoder_blocks, layer_tangents
from tangent_peft.forward import find_head, split
from tangent_peft.forward.head import Head
from tangent_peft.tuner.heads import head_of
from tangent_peft.tuner.hidden import PROBE_TOKENS, PROBE_TOLERANCE
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.targets import find_blocks


Stream: TypeAlias = tuple[Tensor, Tensor | None]  # h and its tangent ḣ (n, D) of one layer; `None`: no linearized model
NEAR = 3e-3  # ‖Δ‖/‖h‖ below which the derivative halfway is more exact than a difference; at it both are to 1e-4
CLOSE = 2e4  # roundings of the largest logit; distances above are exact to 1e-3 from rounded logits
SMALL = 1.0  # largest |δ| of logits whose normalizer is computed from its difference to 1
TILE_ENTRIES = 2**22  # logits held at a time, of each of half a dozen such tensors
PART = 2**13  # rows of the head that are converted to float32 at a time


@dataclass(frozen=True)
class Lens:
    """The final norm and the head of a model in one of its states, verified by `Lens.of`.

    Attributes:
        norm: the modules between the last block and the head, in order; none where there are none.
        head: W, bias, the tangent Δ of its axes at their λ, scale and soft-cap.
    """

    norm: tuple[nn.Module, ...]
    head: Head

    @staticmethod
    @torch.no_grad()
    def of(root: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Lens:
        """The lens of a model in the state it is in (`with state.active() as root`).

        Args:
            root: a transformers decoder with an affine head.
            inputs: `input_ids` (B, T); a few tokens of the first row are run to find the final norm and to verify.

        Raises:
            TypeError: if there is no affine head, or if head and final norm do not give the model's own logits.
        """
        head = find_head(root)
        if head is None:
            raise TypeError(
                f"{type(root).__name__} has no affine head above its blocks, so no layer of it can be read as logits."
            )
        carried = head.uniform_axes() if isinstance(head, TangentLayer) else {}
        probe = {"input_ids": inputs["input_ids"][:1, :PROBE_TOKENS]}
        found, logits = _modules_above(root, head, probe)
        lens = Lens(found, head_of(root, head, carried))
        primal, tangent = layer_tangents(root, probe, torch.ones_like(probe["input_ids"], dtype=torch.bool))
        seen = lens.logits((primal[-1], tangent[-1] if bool(tangent.any()) else None))
        error = float((seen - logits.float()).abs().max() / logits.float().abs().max().clamp(min=1e-30))
        if not error <= PROBE_TOLERANCE.get(logits.dtype, 5e-2):
            names = [type(module).__name__ for module in found]
            raise TypeError(
                f"The logits of {type(root).__name__} are not its head after its final norm ({names or 'none found'}): "
                f"the relative difference is {error:.1e}. Its layers can not be read as logits."
            )
        return lens

    def logits(self, stream: Stream) -> Tensor:
        """The logits (n, V) in float32 that a layer would give; p_ℓ is their softmax."""
        raw = self._affine(*self._features(stream), bias=self.head.bias)
        cap = self.head.softcap
        return raw if cap is None else raw.div_(cap).tanh_().mul_(cap)

    def change(self, here: Stream, there: Stream) -> Tensor:
        """How the logits (n, V) change from one layer to another, relative to the change itself exact to about 1e-5."""
        change = self._affine(*self._feature_change(here, there), bias=None)
        cap = self.head.softcap
        if cap is None:
            return change
        # tanh a − tanh b = tanh(a − b) · (1 − tanh a · tanh b)
        slope = self.logits(here).mul_(self.logits(there)).div_(-cap * cap).add_(1.0)
        return change.div_(cap).tanh_().mul_(slope).mul_(cap)

    def transport(self, layers: Sequence[Stream]) -> Tensor:
        """ℒ (n, number of layers − 1), in radians: the Fisher–Rao distance of each layer to the next, at n positions.

        Two layers are held at a time, of a tile of positions. Where the distance is too short for rounded logits to
        tell, it is computed again from their exact change.
        """
        count, step = len(layers[0][0]), max(1, TILE_ENTRIES // len(self.head.weight))
        found = layers[0][0].new_empty(count, len(layers) - 1)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            tile = [_rows(stream, rows) for stream in layers]
            here, reach = self._roots(tile[0])
            for index in range(len(tile) - 1):
                there, reach_there = self._roots(tile[index + 1])
                distance = _arc((here - there).norm(dim=-1))
                doubtful = distance < CLOSE * torch.finfo(distance.dtype).eps * torch.maximum(reach, reach_there)
                if bool(doubtful.any()):
                    pair = _rows(tile[index], doubtful), _rows(tile[index + 1], doubtful)
                    distance[doubtful] = fisher_rao(self.logits(pair[0]), self.change(*pair))
                found[rows, index] = distance
                here, reach = there, reach_there
        return found

    def _roots(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """√p (n, V), and the largest |logit| (n,)."""
        logits = self.logits(stream)
        reach = logits.abs().amax(-1)
        return logits.log_softmax(-1).mul_(0.5).exp_(), reach

    def normed(self, h: Tensor) -> Tensor:
        """N(h) (n, D), the final norm applied once, with its weights in the dtype of h."""
        for module in self.norm:
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            wide = {name: x.to(h.dtype) if x.is_floating_point() else x for name, x in tensors.items()}
            h = functional_call(module, wide, (h,))
        return h

    def _features(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """What W and what Δ is multiplied by."""
        h, dh = stream
        if dh is None:
            n = self.normed(h)
            return n, n
        moved: Any = jvp(self.normed, (h,), (dh,))
        return moved[0] + moved[1], moved[0]

    def _feature_change(self, here: Stream, there: Stream) -> tuple[Tensor, Tensor]:
        """The change of what W and Δ are multiplied by; in float64, but for what a norm itself casts to float32."""
        (h, dh), (k, dk) = _wide(here), _wide(there)
        near = (k - h).norm(dim=1, keepdim=True) < NEAR * h.norm(dim=1, keepdim=True)
        small = self._small_change((h, dh), (k, dk))
        pairs = zip(small, self._features((h, dh)), self._features((k, dk)), strict=True)
        changes = [torch.where(near, step, after - before).to(here[0]) for step, before, after in pairs]
        return changes[0], changes[1]

    def _small_change(self, here: Stream, there: Stream) -> tuple[Tensor, Tensor]:
        """The same by derivatives in the middle m, to third order in the step Δ = k − h.

        With m' the tangent in the middle, that of N(h) + N'(h) ḣ is N'(m) (Δ + k' − h') + N''(m) [Δ, m']; the last term
        is a difference of N'(·) Δ along m', since forward mode in forward mode is wrong for torch's layer norm.
        """
        (h, dh), (k, dk) = here, there
        middle, step = (h + k) / 2, k - h
        plain = self._derivative(middle, step)
        if dh is None or dk is None:
            return plain, plain
        along = (dh + dk) / 2
        reach = NEAR * middle.norm(dim=1, keepdim=True) / along.norm(dim=1, keepdim=True).clamp(min=1e-30)
        ends = [self._derivative(middle + sign * reach * along, step) for sign in (1, -1)]
        return self._derivative(middle, step + dk - dh) + (ends[0] - ends[1]) / (2 * reach), plain

    def _derivative(self, h: Tensor, along: Tensor) -> Tensor:
        """N'(h) · along."""
        moved: Any = jvp(self.normed, (h,), (along,))
        return moved[1]

    def _affine(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """s·(W x + b + Δ y) (n, V), the weights converted a part of the vocabulary at a time."""
        head = self.head
        out = x.new_empty(len(x), len(head.weight))
        narrow = None if head.a is None else y @ head.a.to(y).mT
        for start in range(0, out.shape[1], PART):
            part = slice(start, start + PART)
            values = out[:, part]
            torch.mm(x, head.weight[part].to(x).mT, out=values)
            if bias is not None:
                values += bias[part].to(x)
            if head.dense is not None:
                values += y @ head.dense[part].to(y).mT
            if head.b is not None and narrow is not None:
                values += narrow @ head.b[part].to(y).mT
        return out if head.scale == 1.0 else out.mul_(head.scale)


def fisher_rao(logits: Tensor, change: Tensor) -> Tensor:
    """The Fisher–Rao distance 2 arccos Σ √(p q) of two distributions, exact however close they are.

    Args:
        logits: z (n, V), of which p is the softmax.
        change: δ (n, V); q is the softmax of z + δ. The distance is as exact, relatively, as δ is.

    Returns:
        (n,) in radians, from 0 to π.
    """
    log_p = logits.log_softmax(-1)
    small = change.abs().amax(-1) < SMALL
    normalizer = torch.empty_like(log_p[:, 0])
    normalizer[small] = (log_p[small].exp() * change[small].expm1()).sum(-1).log1p()
    normalizer[~small] = (log_p[~small] + change[~small]).logsumexp(-1)
    ratio = change - normalizer[:, None]  # log q − log p
    log_p.add_(ratio.clamp(min=0)).mul_(0.5).exp_()  # √ of the larger of the two
    return _arc(log_p.mul_(ratio.abs_().mul_(-0.5).expm1_()).norm(dim=-1))


def _arc(chord: Tensor) -> Tensor:
    """The distance on the sphere of radius 2, of which √p is a quarter, from the chord ‖√p − √q‖."""
    return 4 * (chord / 2).clamp(max=0.5**0.5).asin()


def _rows(stream: Stream, rows: slice | Tensor) -> Stream:
    h, dh = stream
    return h[rows], None if dh is None else dh[rows]


def _wide(stream: Stream) -> Stream:
    h, dh = stream
    return h.double(), None if dh is None else dh.double()


def _modules_above(
    root: PreTrainedModel, head: nn.Module, probe: dict[str, Tensor]
) -> tuple[tuple[nn.Module, ...], Tensor]:
    """The modules that pass the last block's output on to the head, in order, and the model's logits (T, V)."""
    blocks = decoder_blocks(root)
    found = find_blocks(root)
    assert found is not None
    path = [root.get_submodule(name) for name in accumulate(found[0].split("."), lambda a, b: f"{a}.{b}")]
    beside = [child for module in (root, *path[:-1]) for child in module.children() if child not in path]
    chain: list[nn.Module] = []
    current: list[Tensor] = []

    def started(module: nn.Module, args: Any, output: Any) -> None:
        current[:] = [_primal(output if isinstance(output, Tensor) else output[0])]
        chain.clear()

    def passed(beside_it: nn.Module, module: nn.Module, args: Any, output: Any) -> None:
        read = bool(current) and bool(args) and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        if read and torch.equal(_primal(args[0]), current[0]):
            chain.append(beside_it)
            current[:] = [_primal(output)]

    with ExitStack() as stack:
        stack.callback(blocks[-1].register_forward_hook(started).remove)
        for module in beside:
            if module is not head:
                stack.callback(module.register_forward_hook(partial(passed, module)).remove)
        logits: Tensor = root(**probe, use_cache=False).logits
    return tuple(chain), logits[0]


def _primal(x: Tensor) -> Tensor:
    return split(x)[0]
