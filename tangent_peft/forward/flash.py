"""The derivative of attention in one fused Triton kernel, for passes that record nothing; off until switched on.

`attention_rule.py` holds O(chunk · keys) weights in memory and reads them back between its matrix products. Here they
stay on the chip: one pass over the keys with the online softmax of flash attention. With p = exp(S − m), m the running
maximum, it carries three sums per query,

    z = Σ p     r = Σ p·dS     A = Σ (p·dS) V + p dV,     and at the end     dO = (A − r·O)/z,

where O is the output that the user's own kernel gave. Generation, evaluation and the replayed gradient run with
gradients off and can use it; a recorded pass keeps the rule in `attention_rule.py`, whose semantics these are.

Verified in the interpreter of Triton 3.8 on the CPU, and compiled by it for compute capability 8.6 and 9.0 (both are
tests); it has never run on a GPU, and its speed is not known. Hence `use_flash_tangent`. Block sizes are chosen to fit.
Letters as in `attention_rule.py`; in the kernel, capitals are compile-time constants.
"""

# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tangent_peft.forward.attention_rule import AttentionShape


try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch's CUDA builds for Linux bring it, those for the CPU do not
    triton = tl = None

# The largest head size that `can_flash` takes. float32 does without tensor cores, and beyond 64 its registers spill.
MAX_SIZE = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 64}
CAPABILITY = (8, 0)  # Ampere: the first with bfloat16, and with the shared memory that the blocks are made for
_MISSING = (
    "use_flash_tangent() needs Triton, which is not installed. PyTorch's CUDA builds for Linux bring it; otherwise "
    "`pip install triton`, or do without: the rule in plain PyTorch gives the same derivative."
)


# ---- the switch ------------------------------------------------------------------------------------------------------


@dataclass
class _Switch:
    """For the whole process: `generate` may run in a thread of its own, as with a streamer."""

    on: bool = False


_switch = _Switch()


class use_flash_tangent:
    """Switches the fused kernel on or off, for the process; as a context manager, until the block ends.

    Like `torch.set_grad_enabled`:

        use_flash_tangent()                 # from here on
        with use_flash_tangent():           # or in here
            model.generate(**inputs)

    It concerns CUDA devices only, and there the calls for which `can_flash` holds; all others keep the rule in plain
    PyTorch. Off by default, because the kernel has been verified in Triton's interpreter but never on a GPU: compare
    once on yours, `pytest tests/forward/test_flash.py`.

    Args:
        enabled: on or off.

    Raises:
        ImportError: if Triton is not installed.
    """

    def __init__(self, enabled: bool = True) -> None:
        if enabled and triton is None:
            raise ImportError(_MISSING)
        self._before = _switch.on
        _switch.on = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _switch.on = self._before


def can_flash(q: Tensor, v: Tensor) -> bool:
    """Whether `flash_tangent` serves this call: switched on, nothing recorded, and a device, dtype and size it knows.

    Args:
        q: queries (B, H, T, E).
        v: values (B, K, S, E), whose head size may differ.
    """
    if not _switch.on or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if q.device.type != "cuda" or torch.version.hip is not None or q.dtype not in MAX_SIZE:
        return False
    size = max(q.shape[-1], v.shape[-1])
    return size <= MAX_SIZE[q.dtype] and torch.cuda.get_device_capability(q.device) >= CAPABILITY


# ---- the launch ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setup:
    """What is compiled into the kernel.

    Attributes:
        CAUSAL: as in `AttentionShape`.
        WINDOWED: whether there is a window.
        CAPPED: whether there is a soft-cap.
        ADDITIVE: whether the mask is added; otherwise it says which keys are allowed.
        SIZE: head size of Q and K.
        VALUES: head size of V and O.
        BLOCK_E: `SIZE` rounded up to a power of two.
        BLOCK_V: `VALUES` rounded up to a power of two.
        BLOCK_M: queries per program.
        BLOCK_N: keys per step.
    """

    CAUSAL: bool
    WINDOWED: bool
    CAPPED: bool
    ADDITIVE: bool
    SIZE: int
    VALUES: int
    BLOCK_E: int
    BLOCK_V: int
    BLOCK_M: int
    BLOCK_N: int


def flash_tangent(
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...],
    mask: Tensor | None,
    sinks: Tensor | None,
    shape: AttentionShape,
) -> Tensor:
    """dO (B, H, T, E) for primals (Q, K, V, O) and tangents (dQ, dK, dV), as `tangent_by_chunks`, without a graph.

    A query that may see no key at all has dO = 0.
    """
    q, k, v = primals[:3]
    batch, heads, queries, _ = q.shape
    keys, values = k.shape[2], v.shape[3]
    result = q.new_empty(batch, queries, heads, values).transpose(1, 2)  # laid out as transformers goes on with it
    primals = tuple(_rows(x) for x in primals)
    tangents = tuple(None if t is None or t._is_zerotensor() else _rows(t) for t in tangents)
    additive = mask is not None and mask.dtype != torch.bool
    if mask is not None:
        mask = (mask if additive else mask.view(torch.uint8))[:, :, :queries].expand(batch, heads, queries, -1)
    setup, warps, stages = _setup(q, v, shape, additive)
    strides = tuple((0,) * 4 if x is None else x.stride() for x in (*primals, *tangents, mask, result))
    window = shape.window if setup.WINDOWED else 0
    sizes = (heads, heads // k.shape[1], queries, keys, shape.offset, window)
    factors = (float(shape.scale), float(shape.softcap or 0.0))
    sinks = None if sinks is None else sinks.contiguous()
    grid = (batch * heads * -(-queries // setup.BLOCK_M),)
    with torch.cuda.device_of(q):
        _kernel[grid](
            primals, tangents, (mask, sinks, result), strides, sizes, factors, setup, num_warps=warps, num_stages=stages
        )
    return result


def _rows(x: Tensor) -> Tensor:
    """With the head's entries side by side, as the kernel reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _setup(q: Tensor, v: Tensor, shape: AttentionShape, additive: bool) -> tuple[_Setup, int, int]:
    """What to compile, and with how many warps and pipeline stages."""
    size, values = q.shape[-1], v.shape[-1]
    block_e, block_v = (max(16, 1 << (n - 1).bit_length()) for n in (size, values))
    largest, wide = max(block_e, block_v), q.dtype == torch.float32
    block_m = 64 if largest <= 128 and not wide else 32 if largest <= 64 or not wide else 16
    setup = _Setup(
        CAUSAL=shape.causal,
        WINDOWED=shape.causal and shape.window is not None,
        CAPPED=shape.softcap is not None,
        ADDITIVE=additive,
        SIZE=size,
        VALUES=values,
        BLOCK_E=block_e,
        BLOCK_V=block_v,
        BLOCK_M=block_m if q.shape[2] > 16 else 16,
        BLOCK_N=16 if wide else 32,
    )
    return setup, 8 if wide or largest > 64 else 4, 1 if wide or largest > 128 else 2


# ---- the kernel ------------------------------------------------------------------------------------------------------


def _jit(**options: Any) -> Callable[[Any], Any]:
    return (lambda function: function) if triton is None else triton.jit(**options)


@_jit()
def _tile(
    x: tl.tensor,
    strides: tl.tuple,
    place: tl.tuple,
    rows: tl.tensor,
    length: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Rows of one head, (rows, BLOCK), zero outside; `place` is (batch, head), in 64 bits."""
    columns = tl.arange(0, BLOCK)
    start = place[0] * strides[0] + place[1] * strides[1]
    inside = (rows < length)[:, None] & (columns < SIZE)[None, :]
    return tl.load(x + start + rows.to(tl.int64)[:, None] * strides[2] + columns[None, :], mask=inside, other=0.0)


@_jit()
def _visible(first: tl.tensor, sizes: tl.tuple, SETUP: tl.constexpr) -> tl.tuple:
    """The keys that any of the queries from `first` on may see: from, to."""
    _, _, _, keys, offset, window = sizes
    begin, end = 0, keys
    if SETUP.CAUSAL:
        end = tl.minimum(keys, first + SETUP.BLOCK_M + offset)
    if SETUP.WINDOWED:
        begin = tl.maximum(0, first + offset + 1 - window)
    return begin, end


@_jit()
def _scores(q: tl.tensor, k: tl.tensor, factors: tl.tuple, SETUP: tl.constexpr) -> tl.tuple:
    """S before any mask, and what its derivative is multiplied by: s and the soft-cap's slope."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factors[0]
    slope = factors[0]
    if SETUP.CAPPED:
        decay = tl.exp(-2 * tl.abs(scores / factors[1]))  # of tanh |x| = (1 − e)/(1 + e), 1 − tanh² = 4e/(1 + e)²
        bounded = (1 - decay) / (1 + decay)
        scores = tl.where(scores < 0, -bounded, bounded) * factors[1]
        slope = 4 * decay / ((1 + decay) * (1 + decay)) * factors[0]
    return scores, slope


@_jit()
def _masked(
    scores: tl.tensor,
    where: tl.tuple,
    place: tl.tuple,
    mask: tl.tensor,
    strides: tl.tuple,
    sizes: tl.tuple,
    SETUP: tl.constexpr,
) -> tl.tensor:
    """−∞ where a query may not see a key; `where` is (rows, columns)."""
    rows, columns = where
    _, _, queries, keys, offset, window = sizes
    inside = (rows < queries)[:, None] & (columns < keys)[None, :]
    allowed = inside
    if SETUP.CAUSAL:
        allowed = allowed & (columns[None, :] <= rows[:, None] + offset)
    if SETUP.WINDOWED:
        allowed = allowed & (columns[None, :] > rows[:, None] + offset - window)
    if mask is not None:
        start = place[0] * strides[0] + place[1] * strides[1]
        at = start + rows.to(tl.int64)[:, None] * strides[2] + columns[None, :] * strides[3]
        given = tl.load(mask + at, mask=inside, other=0)
        if SETUP.ADDITIVE:
            scores += given.to(tl.float32)
        else:
            allowed = allowed & (given != 0)
    return tl.where(allowed, scores, float("-inf"))


@_jit()
def _change(q: tl.tensor, k: tl.tensor, dq: tl.tensor, dk: tl.tensor) -> tl.tensor:
    """dQ Kᵀ + Q dKᵀ, of which one may be missing."""
    if dq is None:
        return tl.dot(q, tl.trans(dk), input_precision="ieee")
    elif dk is None:
        return tl.dot(dq, tl.trans(k), input_precision="ieee")
    else:
        return tl.dot(dq, tl.trans(k), tl.dot(q, tl.trans(dk), input_precision="ieee"), input_precision="ieee")


@_jit(do_not_specialize=["sizes"])
def _kernel(
    primals: tl.tuple,
    tangents: tl.tuple,
    others: tl.tuple,
    strides: tl.tuple,
    sizes: tl.tuple,
    factors: tl.tuple,
    SETUP: tl.constexpr,
) -> None:
    """dO of BLOCK_M queries of one head, named as in the module's docstring; `others` are mask, sinks and result."""
    BLOCK_M: tl.constexpr = SETUP.BLOCK_M
    BLOCK_V: tl.constexpr = SETUP.BLOCK_V
    heads, groups, queries, keys, _, _ = sizes
    tiles = tl.cdiv(queries, BLOCK_M)
    first = (tl.program_id(0) % tiles) * BLOCK_M
    index = (tl.program_id(0) // tiles).to(tl.int64)
    place, key_place = (index // heads, index % heads), (index // heads, index % heads // groups)
    rows = first + tl.arange(0, BLOCK_M)
    q = _tile(primals[0], strides[0], place, rows, queries, SETUP.SIZE, SETUP.BLOCK_E)
    dq = None
    if tangents[0] is not None:
        dq = _tile(tangents[0], strides[4], place, rows, queries, SETUP.SIZE, SETUP.BLOCK_E)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z, r = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if others[1] is not None:  # a column of the denominator, and of nothing else
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(others[1] + place[1]).to(tl.float32)
        z += 1.0
    a = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    begin, end = _visible(first, sizes, SETUP)
    for start in tl.range(begin, end, SETUP.BLOCK_N):
        columns = start + tl.arange(0, SETUP.BLOCK_N)
        k = _tile(primals[1], strides[1], key_place, columns, keys, SETUP.SIZE, SETUP.BLOCK_E)
        scores, slope = _scores(q, k, factors, SETUP)
        scores = _masked(scores, (rows, columns), place, others[0], strides[7], sizes, SETUP)
        peak = tl.maximum(m, tl.max(scores, 1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)  # no key seen yet
        p, fade = tl.exp(scores - shift[:, None]), tl.exp(m - shift)
        m, z, r, a = peak, z * fade + tl.sum(p, 1), r * fade, a * fade[:, None]
        if (dq is not None) or (tangents[1] is not None):
            dk = None
            if tangents[1] is not None:
                dk = _tile(tangents[1], strides[5], key_place, columns, keys, SETUP.SIZE, SETUP.BLOCK_E)
            v = _tile(primals[2], strides[2], key_place, columns, keys, SETUP.VALUES, BLOCK_V)
            weighted = (p * _change(q, k, dq, dk) * slope).to(v.dtype)
            r += tl.sum(weighted.to(tl.float32), 1)  # of the rounded weights, so that their errors cancel
            a = tl.dot(weighted, v, a, input_precision="ieee")
        if tangents[2] is not None:
            dv = _tile(tangents[2], strides[6], key_place, columns, keys, SETUP.VALUES, BLOCK_V)
            a = tl.dot(p.to(dv.dtype), dv, a, input_precision="ieee")
    out = _tile(primals[3], strides[3], place, rows, queries, SETUP.VALUES, BLOCK_V)
    _store(others[2], strides[8], place, rows, (z, r, a, out), queries, SETUP)


@_jit()
def _store(
    result: tl.tensor,
    strides: tl.tuple,
    place: tl.tuple,
    rows: tl.tensor,
    found: tl.tuple,
    queries: tl.tensor,
    SETUP: tl.constexpr,
) -> None:
    """dO = (A − r·O)/z, and 0 where a query saw no key."""
    z, r, a, out = found
    seen = (z > 0)[:, None]
    value = tl.where(seen, (a - r[:, None] * out.to(tl.float32)) / tl.where(seen, z[:, None], 1.0), 0.0)
    columns = tl.arange(0, SETUP.BLOCK_V)
    start = place[0] * strides[0] + place[1] * strides[1]
    inside = (rows < queries)[:, None] & (columns < SETUP.VALUES)[None, :]
    at = start + rows.to(tl.int64)[:, None] * strides[2] + columns[None, :]
    tl.store(result + at, value.to(result.dtype.element_ty), mask=inside)
