"""The sizes that decide what a training step costs: of the model, and of what is trained on which batch.

A model's sizes are counted on its modules, built from the config on the meta device: nothing is allocated, nothing is
assumed of an architecture that its modules do not say. Which layers train is asked of the functions that wrap them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from tangent_peft.tuner import TangentConfig
from tangent_peft.tuner.targets import block_index, default_targets, find_blocks, head_name, is_target


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes per weight of a quantized linear layer: 4 bits and one float32 per 64 weights; 8 bits, and a scale per row.
QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}

Kept: TypeAlias = Literal["recorded", "replay"]


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearSize:
    """One linear layer, or one weight of a group of experts.

    Attributes:
        name: full name of the module.
        inputs: in_features.
        outputs: out_features.
        experts: how many of it there are.
        active: how many of them serve one token.
        wrapped: whether it carries a tangent.
    """

    name: str
    inputs: int
    outputs: int
    experts: int = 1
    active: int = 1
    wrapped: bool = False

    @property
    def weights(self) -> int:
        """Entries of W, of all experts."""
        return self.experts * self.inputs * self.outputs

    @property
    def products(self) -> int:
        """Multiply-adds of one token."""
        return self.active * self.inputs * self.outputs

    def tangent(self, rank: int | None) -> int:
        """Entries of τ: ΔW, or B of a low rank."""
        return self.weights if rank is None else self.experts * self.outputs * rank

    def projection(self, rank: int | None) -> int:
        """Entries of A, which the experts of a layer share."""
        return 0 if rank is None else self.inputs * rank


@dataclass(frozen=True)
class BlockSize:
    """One block of the decoder.

    Attributes:
        parameters: all its parameters.
        layers: its linear layers and experts, in the model's order.
        inner: width between the two halves of its MLP, over all experts that serve a token.
        gated: whether the MLP multiplies a gate with another product.
        norms: normalizations of the hidden state.
        head_norms: whether queries and keys are normalized as well.
    """

    parameters: int
    layers: tuple[LinearSize, ...]
    inner: int
    gated: bool
    norms: int = 2
    head_norms: bool = False

    @property
    def wrapped(self) -> tuple[LinearSize, ...]:
        """The layers that carry a tangent."""
        return tuple(layer for layer in self.layers if layer.wrapped)


@dataclass(frozen=True)
class ModelSize:
    """A decoder.

    Attributes:
        name: class of the model.
        parameters: all parameters, shared ones once.
        blocks: its blocks, the first below.
        head: the LM head.
        tied: whether the head's weight is the embedding's.
        hidden: D, width of the hidden state.
        heads: H, query heads.
        kv_heads: K, key and value heads.
        head_size: E, width of one.
    """

    name: str
    parameters: int
    blocks: tuple[BlockSize, ...] = field(repr=False)
    head: LinearSize
    tied: bool
    hidden: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def trained_blocks(self) -> tuple[BlockSize, ...]:
        """From the first block that carries a tangent on."""
        first = next((i for i, block in enumerate(self.blocks) if block.wrapped), len(self.blocks))
        return self.blocks[first:]

    @property
    def wrapped(self) -> tuple[LinearSize, ...]:
        """All layers that carry a tangent, the head among them."""
        layers = tuple(layer for block in self.blocks for layer in block.wrapped)
        return (*layers, self.head) if self.head.wrapped else layers

    @property
    def outside(self) -> int:
        """Parameters outside of the blocks: embedding, head, last norm."""
        return self.parameters - sum(block.parameters for block in self.blocks)


def model_size(config: PreTrainedConfig, axis: TangentConfig, experts: bool = False) -> ModelSize:
    """Counts a causal language model, and marks what `axis` wraps.

    Args:
        config: of the model; read with `AutoConfig`.
        axis: the axis to train.
        experts: give the fused weights of experts tangents as well.

    Raises:
        ValueError: if the model has no list of blocks or no head, or is not a decoder that transformers knows.
    """
    auto: Any = AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise ValueError(
            f"`{config.model_type}` is no causal language model of transformers; only those can be counted. Of a "
            "vision-language model give the config of its text decoder."
        )
    with torch.device("meta"):
        model = auto.from_config(config)
    return count_model(model, axis, experts)


def count_model(model: nn.Module, axis: TangentConfig, experts: bool = False) -> ModelSize:
    """As `model_size`, of a model that is already there, not wrapped yet."""
    found, head = find_blocks(model, axis.layers_pattern), head_name(model)
    if found is None or head is None:
        raise ValueError(f"{type(model).__name__} has no list of blocks, or no LM head: its costs are not known.")
    _refuse_states(model, found[0])
    if axis.target_modules is None or axis.target_modules == "all-linear":
        axis = copy.copy(axis)  # completed here; the caller's is its own
        axis.target_modules = default_targets(model, axis)  # type: ignore[assignment]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    options = {**text.to_dict(), "num_attention_heads": text.num_attention_heads}  # GPT-2 has it under another name
    reader = _Reader(axis, found, head, embedding.weight.shape[1], options, experts)
    blocks = tuple(reader.block(model, index) for index in range(found[1]))
    output: Any = model.get_submodule(head)
    heads = int(reader.options["num_attention_heads"])
    return ModelSize(
        name=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        blocks=blocks,
        head=LinearSize(head, *_sides(output), wrapped=bool(is_target(axis, head, found, head))),
        tied=output.weight is embedding.weight,
        hidden=embedding.weight.shape[1],
        heads=heads,
        kv_heads=int(reader.options.get("num_key_value_heads") or heads),
        head_size=int(reader.options.get("head_dim") or embedding.weight.shape[1] // heads),
    )


def _refuse_states(model: nn.Module, blocks: str) -> None:
    """Refuses blocks with convolutional or recurrent states (Mamba, LFM2, …): what they hold in a step is not known."""
    if any(isinstance(module, nn.Conv1d) for module in model.get_submodule(blocks).modules()):
        raise ValueError(
            f"{type(model).__name__} has blocks that convolve instead of softmax attention, and what these hold in a "
            "training step is not known here. Costs can be told of decoders with attention in every block."
        )


def _sides(module: Any) -> tuple[int, int]:
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


_ACTIVE = ("num_experts_per_tok", "top_k", "moe_top_k", "num_experts_per_token")  # names in transformers' configs
_MLP = ("mlp", "feed_forward", "ffn", "moe", "experts", "fc1", "fc2", "fc_in", "fc_out")


@dataclass(frozen=True)
class _Reader:
    """Reads blocks off a model's modules."""

    axis: TangentConfig
    found: tuple[str, int]
    head: str
    width: int
    options: dict[str, Any]
    experts: bool

    def block(self, model: nn.Module, index: int) -> BlockSize:
        """The block's layers; a weight of three dimensions belongs to a group of experts."""
        prefix = f"{self.found[0]}.{index}"
        block = model.get_submodule(prefix)
        layers = []
        for name, module in block.named_modules(prefix=prefix):
            if isinstance(module, (nn.Conv1d, nn.Embedding)):
                continue
            if isinstance(module, (nn.Linear, Conv1D)):
                wrapped = bool(is_target(self.axis, name, self.found, self.head))
                layers.append(LinearSize(name, *_sides(module), wrapped=wrapped))
                continue
            for key, weight in module.named_parameters(recurse=False):
                if weight.ndim == 3:
                    layers.append(self._experts(f"{name}.{key}", weight))
                elif weight.ndim == 2 and key == "weight":
                    layers.append(LinearSize(name, weight.shape[1], weight.shape[0]))  # a router
        inner, widened = self._inner(prefix, layers)
        named = [
            (name.rpartition(".")[2], m) for name, m in block.named_modules() if "norm" in type(m).__name__.lower()
        ]
        of_heads = [name for name, _ in named if name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")]
        total = sum(p.numel() for p in block.parameters())
        norms = len(named) - len(of_heads)
        return BlockSize(total, tuple(layers), inner, widened > 1.5 * inner, norms, bool(of_heads))

    def _experts(self, name: str, weight: Any) -> LinearSize:
        count, rows, columns = weight.shape
        hidden = self.width
        inner = rows if columns == hidden else columns
        into = "down" not in name.rpartition(".")[2]
        index = block_index(name, self.found)
        inside = index is not None and index >= self.found[1] - (self.axis.num_layers or self.found[1])
        active = next((int(self.options[key]) for key in _ACTIVE if self.options.get(key)), 1)
        inputs, outputs = (hidden, inner) if into else (inner, hidden)
        return LinearSize(name, inputs, outputs, count, min(active, count), self.experts and inside)

    def _inner(self, prefix: str, layers: list[LinearSize]) -> tuple[int, int]:
        """Width of the MLP's middle as it is read and as it is written, by all experts that serve a token."""
        below = [x for x in layers if any(word in x.name.removeprefix(prefix) for word in _MLP)]
        last = [x for x in below if x.outputs == self.width and x.name.rpartition(".")[2] not in _FIRST]
        first = [x for x in below if x not in last and x.outputs > x.experts and "router" not in x.name]
        return sum(x.active * x.inputs for x in last), sum(x.active * x.outputs for x in first)


_FIRST = ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "w1", "w3")  # also where F = D


# ---- what is trained on it -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One step on one process.

    Attributes:
        rank: of τ = B·A; `None`: dense.
        gradient: whether wrapped blocks keep their activations (`"recorded"`) or their input (`"replay"`).
        axes: axes that the model holds; one of them trains.
        pairs: preference pairs per process and forward; a pair is two rows.
        length: T, positions per row.
        prompt_share: share of the positions that are prompt, on which the head does not run.
        completions: positions on which it runs, of a batch that is known; `None`: by the share.
        dtype: of the base.
        autocast: compute in bfloat16 whatever the weights have.
        quantize: `"4bit"` or `"8bit"`: how linear layers of blocks are stored; `None`: not.
        accumulates: whether gradients are added up over several forwards.
    """

    rank: int | None = 64
    gradient: Kept = "replay"
    axes: int = 1
    pairs: int = 1
    length: int = 1024
    prompt_share: float = 0.5
    completions: int | None = None
    dtype: str = "bfloat16"
    autocast: bool = False
    quantize: str | None = None
    accumulates: bool = False

    def __post_init__(self) -> None:
        for name in ("axes", "pairs", "length"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` is a positive number, found {vars(self)[name]}.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"`rank` is a positive number, or None for a dense tangent; found {self.rank}.")
        if self.dtype not in BYTES:
            raise ValueError(f"`dtype` is one of {', '.join(BYTES)}, found {self.dtype!r}.")
        if self.quantize not in (None, *QUANTIZED):
            raise ValueError(f"`quantize` is one of {', '.join(QUANTIZED)}, found {self.quantize!r}.")
        if not 0 <= self.prompt_share < 1:
            raise ValueError(f"`prompt_share` is at least 0 and less than 1, found {self.prompt_share}.")

    @property
    def rows(self) -> int:
        """Sequences in a forward."""
        return 2 * self.pairs

    @property
    def tokens(self) -> int:
        """Positions in a forward."""
        return self.rows * self.length

    @property
    def scored(self) -> int:
        """N, the positions whose next token belongs to an answer."""
        if self.completions is not None:
            return self.completions
        return self.rows * min(self.length - 1, self.length - round(self.prompt_share * self.length))

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return 2 if self.autocast else BYTES[self.dtype]
