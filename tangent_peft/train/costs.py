"""Memory of a training step on each device, as a sum of named terms, for the engines that accelerate launches.

With N devices, P the bytes of the base, t the entries of the τ that trains (A is held beside it where its rank is low):

| per device | base | τ | gradient | Adam | exchange |
|---|---|---|---|---|---|
| DDP | P | 4t | 4t | 8t | 4t (N > 1) |
| ZeRO-1 | P | s·t | s·t | 12t / N | a bucket |
| ZeRO-2 | P | s·t | s·t / N | 12t / N | a bucket |
| ZeRO-3 | P / N | s·t / N | s·t / N | 12t / N | a bucket and gathered weights |
| FSDP2 | P / N | 4t / N | 4t / N | 8t / N | two blocks and the root |

s = 2 where DeepSpeed runs in bfloat16 (it casts τ as well and keeps a float32 copy, hence 12 for Adam), else 4. The
other K − 1 axes are held frozen, as τ is. Activations are those of `activations.py`. A step passes through four phases,
and its peak is that of the largest: the head with all activations kept, the first block's backward pass with the head's
gradient, the last block's with all gradients, the update.

Nothing here runs a model. The exchange terms follow from how the engines are written and from their defaults; FSDP2 has
a unit per block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from tangent_peft.train.activations import backward_of_block, head_workspace, kept
from tangent_peft.train.sizes import BYTES, QUANTIZED, BlockSize, ModelSize, Workload


Engine: TypeAlias = Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
SHARDED = ("zero3", "zero3_offload", "fsdp2")  # engines that divide the base

FRAMEWORK = 1.5 * 2**30  # CUDA context, cuBLAS workspaces and NCCL's buffers; assumed, not measured
# DeepSpeed's defaults, which the packaged recipes leave alone: entries of a bucket of gradients, of weights gathered
# ahead, and of weights that may be gathered at a time.
BUCKET, PREFETCH, MAX_LIVE = 500_000_000, 50_000_000, 1_000_000_000


@dataclass(frozen=True)
class Cluster:
    """What the step runs on.

    Attributes:
        gpus: N, devices, one process each.
        accelerator: GPUs, whose kernels take larger tiles; `False`: processes on a CPU.
        framework: bytes that every process holds before there is a model.
    """

    gpus: int = 1
    accelerator: bool = True
    framework: float = FRAMEWORK

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"`gpus` is a positive number, found {self.gpus}.")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step.

    Attributes:
        engine: how the processes share the work.
        terms: bytes by what they hold, at the peak.
        phase: when that is.
        host: bytes of the host's memory that one process holds, where an engine offloads.
    """

    engine: Engine
    terms: dict[str, float] = field(repr=False)
    phase: str
    host: float = 0.0

    @property
    def total(self) -> float:
        """All terms."""
        return sum(self.terms.values())


def tangent_entries(model: ModelSize, rank: int | None) -> int:
    """t, the entries of one axis that are saved: ΔW of all wrapped layers, or B."""
    return sum(layer.tangent(rank) for layer in model.wrapped)


def base_bytes(model: ModelSize, work: Workload) -> float:
    """P, the bytes of the frozen base; quantized are the linear layers of its blocks, fused experts are not."""
    element = BYTES[work.dtype]
    if work.quantize is None:
        return float(model.parameters * element)
    linear = sum(layer.weights for block in model.blocks for layer in block.layers if layer.experts == 1)
    return (model.parameters - linear) * element + linear * QUANTIZED[work.quantize]


def memory(model: ModelSize, work: Workload, cluster: Cluster, engine: Engine) -> Memory:
    """The peak of a step on each device."""
    held = _held(model, work, cluster, engine)
    phases = _phases(model, work, cluster, engine)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return Memory(engine, {**held, **phases[phase]}, phase, _host(model, work, cluster, engine))


def _held(model: ModelSize, work: Workload, cluster: Cluster, engine: Engine) -> dict[str, float]:
    """What is there in every phase."""
    n, t = cluster.gpus, tangent_entries(model, work.rank)
    share = n if engine in SHARDED else 1
    offloaded = engine == "zero3_offload"
    optimizer = 8 * t if engine == "ddp" else 8 * t / n if engine == "fsdp2" else 0 if offloaded else 12 * t / n
    return {
        "base": 0 if offloaded else base_bytes(model, work) / share,
        "tangents": 0 if offloaded else work.axes * _tangent_element(work, engine) * t / share,
        "projections": 4.0 * sum(layer.projection(work.rank) for layer in model.wrapped),
        "optimizer": float(optimizer),
        "framework": cluster.framework,
    }


def _tangent_element(work: Workload, engine: Engine) -> int:
    """s, bytes per entry of τ: PEFT keeps it in float32, DeepSpeed casts it with the model."""
    return work.element if engine.startswith("zero") else 4


def _exchange(model: ModelSize, work: Workload, cluster: Cluster, engine: Engine) -> float:
    """What the engine holds to communicate: buckets of gradients, weights gathered for a moment."""
    n, t, s = cluster.gpus, tangent_entries(model, work.rank), _tangent_element(work, engine)
    if engine == "ddp":
        return 4.0 * t if n > 1 else 0.0
    # A GPU gives the whole bucket; a CPU only the pages that are written.
    filled = min(BUCKET, t)
    bucket = float(s * ((BUCKET if cluster.accelerator else filled) + filled))  # to be reduced it is copied flat
    if engine in ("zero1", "zero2"):
        return bucket
    base = base_bytes(model, work)
    if engine == "fsdp2":
        held = 4 * work.axes
        blocks = [base * b.parameters / model.parameters + held * _block_tangent(b, work) for b in model.blocks]
        head = model.head.tangent(work.rank) if model.head.wrapped else 0
        return 2 * max(blocks) + model.outside * BYTES[work.dtype] + held * head  # whole copies beside the shards
    share = min(1.0, (MAX_LIVE + PREFETCH) / (model.parameters + t))
    gathered = share * (base + s * t)
    return gathered * (1 if engine == "zero3_offload" else 1 - 1 / n) + bucket


def _block_tangent(block: BlockSize, work: Workload) -> int:
    return sum(layer.tangent(work.rank) for layer in block.wrapped)


def _phases(model: ModelSize, work: Workload, cluster: Cluster, engine: Engine) -> dict[str, dict[str, float]]:
    """Gradients, activations and workspace in each phase."""
    blocks = model.trained_blocks
    size = _gradient_share(work, cluster, engine)
    of_head = 4.0 * model.head.tangent(work.rank) if model.head.wrapped else 0.0  # whole, before it is shared out
    of_block = max((4.0 * _block_tangent(block, work) for block in blocks), default=0.0)
    complete = size * tangent_entries(model, work.rank)
    before = complete if work.accumulates else 0.0
    first, last = (blocks[-1], blocks[0]) if blocks else (None, None)
    backward = [0.0 if b is None else backward_of_block(model, b, work) for b in (first, last)]
    kept_open, kept_closed = (sum(kept(model, b, work, is_open) for b in blocks) for is_open in (True, False))
    kept_last = 0.0 if last is None else kept(model, last, work, False)
    exchange = _exchange(model, work, cluster, engine)
    # Buckets are given back before the update, and weights divided again; DDP keeps its buckets. A forward needs none.
    forward, update = (0.0 if engine in ("zero1", "zero2") else exchange), (exchange if engine == "ddp" else 0.0)
    found = {
        "head": (before, kept_open, head_workspace(model, work, cluster.accelerator), forward),
        "first block's backward": (before + of_head, kept_closed, backward[0] + of_block, exchange),
        "last block's backward": (complete, kept_last, backward[1] + (of_block if size < 4 else 0.0), exchange),
        "update": (complete, 0.0, _update_workspace(model, work, cluster, engine), update),
    }
    names = ("gradients", "activations", "workspace", "exchange")
    return {phase: dict(zip(names, terms, strict=True)) for phase, terms in found.items()}


def _gradient_share(work: Workload, cluster: Cluster, engine: Engine) -> float:
    """Bytes per entry of τ of the gradient that one device keeps."""
    size = _tangent_element(work, engine)
    return float(size) if engine in ("ddp", "zero1") else size / cluster.gpus


def _update_workspace(model: ModelSize, work: Workload, cluster: Cluster, engine: Engine) -> float:
    """Adam's: two temporaries of the largest matrix on a CPU, none where it is fused; DeepSpeed's float32 gradient."""
    if engine.startswith("zero"):
        return 0.0 if engine == "zero3_offload" else 8.0 * tangent_entries(model, work.rank) / cluster.gpus
    largest = max((layer.tangent(work.rank) for layer in model.wrapped), default=0)
    share = cluster.gpus if engine == "fsdp2" else 1
    return 0.0 if cluster.accelerator else 8.0 * largest / share


def _host(model: ModelSize, work: Workload, cluster: Cluster, engine: Engine) -> float:
    """What a process keeps on the host: base, τ, its master copy and Adam's state, each divided."""
    if engine != "zero3_offload":
        return 0.0
    t = tangent_entries(model, work.rank)
    tangents = work.axes * _tangent_element(work, engine) * t
    return (base_bytes(model, work) + tangents + 12 * t + 4 * t) / cluster.gpus
