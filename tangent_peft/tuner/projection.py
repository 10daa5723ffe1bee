"""The shared projection A of a low-rank tangent τ = B·A: fixed, orthonormal rows, the same for every axis.

A is a function of a seed, the layer's name and its size, so it is never stored and two axes trained apart agree on it.
numpy's `RandomState` is used because its stream is frozen for good (NEP 19); QR with a positive diagonal makes the
orthonormal basis unique, so that only rounding could differ between machines.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def shared_projection(seed: int, layer_name: str, r: int, in_features: int) -> Tensor:
    """A (r, in_features) in float32 on the CPU, with A·Aᵀ = 1.

    Raises:
        ValueError: if r exceeds in_features; r orthonormal rows do not exist then.
    """
    if r > in_features:
        raise ValueError(
            f"Layer {layer_name!r} has {in_features} input features, fewer than the rank r = {r} asked for. Lower `r`, "
            f"set a rank for it in `rank_pattern`, or use r=None (dense)."
        )
    digest = hashlib.sha256(f"{seed}:{layer_name}".encode()).digest()
    stream = np.random.RandomState(np.frombuffer(digest, dtype=np.uint32))
    basis, triangle = np.linalg.qr(stream.standard_normal((in_features, r)))
    basis = basis * np.sign(np.diag(triangle))
    return torch.from_numpy(np.ascontiguousarray(basis.T, dtype=np.float32))
