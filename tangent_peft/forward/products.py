"""W x and W ẋ of a few rows, for one read of W.

A decoding step multiplies every weight by a handful of rows, and reading the weight takes longer than multiplying by
it. Both products are therefore one. On a CPU x and ẋ stand to the right of W as two columns where they are one row
each, which MKL multiplies faster than two rows to its left. This file knows tensors only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


COLUMNS = 2  # rows, tangents counted, up to which they are faster as columns
_FULL = (torch.float32, torch.float64)  # oneDNN's products in half precision are not


def can_join_products(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether W x + b stays what the layer computes: in half precision a kernel adds b before it rounds."""
    return bias is None or (weight.dtype in _FULL and not torch.is_autocast_enabled(weight.device.type))


def both_products(weight: Tensor, x: Tensor, dx: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """W x + b and W ẋ, both (…, out).

    Args:
        weight: W (out, in).
        x: (…, in).
        dx: ẋ, of the same shape.
        bias: b (out,), or `None`.
    """
    size = weight.shape[1]
    rows = torch.cat([x, dx]).view(-1, size)
    if rows.shape[0] <= COLUMNS and weight.device.type == "cpu" and weight.dtype in _FULL:
        products = (weight @ rows.mT).mT
    else:
        products = F.linear(rows, weight)
    y, dy = products.chunk(2)
    y = y.clone(memory_format=torch.contiguous_format)  # so that it can be made dual without copying the tangent
    y = y if bias is None else y.add_(bias)
    return y.view(*x.shape[:-1], -1), dy.view(*x.shape[:-1], -1)
