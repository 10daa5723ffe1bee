"""The wrapped embedding: the tangent of E[ids] is ΔE[ids].

With one-hot inputs an embedding is the linear map W = Eᵀ (D, V), so its tangent is stored as that of every layer,
ΔW (D, V) or B (D, r)·A (r, V), and its columns are looked up. The token `padding_idx` has no gradient in torch, and no
tangent here: its column of ΔW, or of A, is zero. Code that reads E instead of calling the embedding (DeBERTa's relative
positions) gets it with its tangent. On an embedding that is tied to the head the tangent is the
embedding's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangent_peft.forward import dual, graft, leave, split
from tangent_peft.tuner.guard import GuardedWeight
from tangent_peft.tuner.layer import TangentLayer, itself
from tangent_peft.tuner.live import Weight
from tangent_peft.tuner.projection import shared_projection
from tangent_peft.tuner.weights import leaf_weight


class TangentEmbedding(TangentLayer):
    """Final: a wrapped `nn.Embedding`, or transformers' scaled one, E (V, D).

    Raises:
        TypeError: for an embedding that does more than look up a row and scale it.
    """

    def __init__(self, base_layer: nn.Embedding, layer_name: str) -> None:
        check_embedding(base_layer, layer_name)
        super().__init__(base_layer, base_layer.num_embeddings, base_layer.embedding_dim, layer_name)
        self._scaled = is_scaled(base_layer)
        self.padding_idx = base_layer.padding_idx

    @property
    def scale(self) -> Tensor | float:
        """What the embedding multiplies its rows by."""
        base: Any = self.get_base_layer()
        return base.embed_scale if self._scaled else 1.0

    def _apply_base(
        self, primal: Tensor, tangent: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        return self.base_layer(primal, *args, **kwargs), None

    def _apply_tangent(
        self, x: Tensor, carried: Mapping[str, Weight], through: Callable[[Tensor], Tensor] = itself
    ) -> Tensor:
        """Σ λᵢ ΔEᵢ[ids] (…, D) of token ids x (…), scaled as the embedding is."""
        total = None
        for name, weight in carried.items():
            factors = self.factors(name, 1.0, through)
            if factors.dense is not None:
                term = F.embedding(x, factors.dense.mT, self.padding_idx)
            else:
                assert factors.b is not None and factors.a is not None
                term = F.linear(F.embedding(x, factors.a.mT, self.padding_idx), factors.b)
            term = self._weighted(term, weight)
            total = term if total is None else total + term
        assert total is not None
        factor = self.scale
        return total * (factor.to(total.dtype) if isinstance(factor, Tensor) else factor)

    def _replay(self, x: Tensor, carried: dict[str, float], *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        return graft(y, self._apply_tangent(x, carried, leave).to(y.dtype))

    def _layout(self, delta: Tensor) -> Tensor:
        return delta.mT

    def _shared_projection(self, seed: int, r: int) -> Tensor:
        padding = self.padding_idx
        if padding is None:
            return super()._shared_projection(seed, r)
        a = shared_projection(seed, self.layer_name, r, self.in_features - 1)
        return torch.cat([a[:, :padding], a.new_zeros(r, 1), a[:, padding:]], dim=1)

    def _randomize(self, adapter_name: str) -> None:
        super()._randomize(adapter_name)
        if self.padding_idx is not None and adapter_name in self.tangent_delta:
            weight = leaf_weight(self.tangent_delta, adapter_name)
            if not weight.is_meta:
                weight.data[:, self.padding_idx] = 0.0

    def tied_kinds(self) -> tuple[str, str]:
        """In words, what this layer is and what it may be tied to."""
        return "input embedding", "head"

    @property
    def weight(self) -> Tensor:
        """E with the tangent it carries, for modules that read it; E itself where the reader is a head tied to it."""
        if self.tangent_tied:
            embedding: Any = self.get_base_layer()
            return embedding.weight
        return super().weight

    def carried_weight(self, weight: Tensor) -> Tensor:
        """As of every layer, without `embed_scale`; the padding token's row gives the tangent no gradient."""
        read, padding = super().carried_weight(weight), self.padding_idx
        if read is weight or padding is None or isinstance(read, GuardedWeight):
            return read
        primal, tangent = split(read)
        return _held(read, padding) if tangent is None else dual(primal, _held(tangent, padding))


def _held(rows: Tensor, index: int) -> Tensor:
    """The same rows (V, D), of which the one at `index` gives no gradient."""
    held = torch.arange(len(rows), device=rows.device).eq(index)
    return torch.where(held[:, None], rows.detach(), rows)


def is_scaled(embedding: nn.Embedding) -> bool:
    """Whether this is one of transformers' embeddings that multiply their rows by `embed_scale`."""
    return type(embedding).__name__.endswith("ScaledWordEmbedding")


def check_embedding(embedding: nn.Embedding, name: str) -> None:
    """Refuses an embedding that does more than look up a row and scale it.

    Raises:
        TypeError: naming what it does.
    """
    kind = type(embedding)
    if kind.forward is not nn.Embedding.forward and not is_scaled(embedding):
        reason = f"computes something of its own ({kind.__name__}.forward)"
    elif embedding.max_norm is not None:
        reason = f"rescales its rows as it reads them (max_norm={embedding.max_norm})"
    elif embedding.scale_grad_by_freq:
        reason = "divides gradients by the frequency of the token (scale_grad_by_freq=True)"
    else:
        return
    raise TypeError(
        f"Module {name!r} is a {kind.__name__} that {reason}, so its tangent would not be exact. A plain "
        "torch.nn.Embedding and transformers' scaled ones can carry a tangent; take it out of `target_modules`."
    )
