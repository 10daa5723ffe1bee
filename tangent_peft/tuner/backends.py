"""What is known about quantized layers: which there are, how their weight is read, which are refused.

Seam: PEFT's `resolve_quantization_backend`, which knows the layers of bitsandbytes, torchao, HQQ, GPTQ, AWQ, EETQ, AQLM
and others, and how to read and write their weight where that is possible. No quantization library is imported before a
model holds one of its layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    Bnb8bitBackend,
    HqqBackend,
    QuantizationBackend,
    TorchaoBackend,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tangent_peft.forward import OpaqueLinear
from tangent_peft.forward.opaque import ReadWeight
from tangent_peft.tuner.layer import TangentLayer


PLAIN = (nn.Linear, Conv1D, nn.Embedding)
PACKED = {torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}  # what weights are packed into
SUPPORTED = (
    "What works: bitsandbytes 4-bit and 8-bit, torchao, HQQ, and GPTQ, AWQ, EETQ, AQLM and the like where their layers "
    "are affine"
)


def quantization_backend(module: nn.Module, requantize: Callable[[], Any] | None = None) -> QuantizationBackend | None:
    """PEFT's backend for a quantized linear layer; `None` for every other module.

    Args:
        module: any module.
        requantize: how torchao packs a weight again, from the model's quantization config; merging needs it.
    """
    if isinstance(module, nn.Embedding) or not _may_be_quantized(module):
        return None
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=requantize or _not_known)
    if isinstance(backend, TorchaoBackend) and (requantize is None or not isinstance(module, nn.Linear)):
        backend.supports_merge = False
    return backend if backend is None or backend.layer_type == "linear" else None


def _not_known() -> Any:
    raise ValueError("The model does not say how torchao quantized it, so a merged weight can not be quantized again.")


def _may_be_quantized(module: nn.Module) -> bool:
    """Cheap, and imports nothing: only what is none of torch's and transformers' own layers is looked at closely."""
    if type(module) in PLAIN:
        weight: Any = module.weight
        return type(weight) not in (nn.Parameter, Tensor)  # torchao packs by a subclass of the tensor
    return not type(module).__module__.startswith(("torch.nn.", "transformers.models.", "peft.", "tangent_peft."))


def requantizer(model: nn.Module) -> Callable[[], Any] | None:
    """How the model's torchao layers are packed again; `None` where it does not say."""
    return get_quantization_kwargs(model).get("get_apply_tensor_subclass")


def reader(module: nn.Module, backend: QuantizationBackend) -> ReadWeight | None:
    """Reads Ŵ (out, in) of a quantized layer, the dequantized weight; `None` where PEFT can not."""
    if isinstance(backend, (Bnb4bitBackend, Bnb8bitBackend, HqqBackend)):
        return backend.get_base_weight
    if not isinstance(backend, TorchaoBackend):
        return None
    layout = type(module.weight)
    if layout not in _UNPACKS:
        try:
            backend.get_base_weight(module)
            _UNPACKS[layout] = True
        except NotImplementedError:
            _UNPACKS[layout] = False
    return backend.get_base_weight if _UNPACKS[layout] else None


_UNPACKS: dict[type, bool] = {}  # whether a layout of torchao can be unpacked, found out on its first layer


def read_weight(module: nn.Module) -> Tensor:
    """W (out, in) of a linear layer: its parameter, or the dequantized weight.

    Raises:
        TypeError: if the layer is quantized and can not be dequantized.
    """
    layer: Any = module
    backend = quantization_backend(module)
    if backend is None:
        return layer.weight
    read = reader(module, backend)
    if read is None:
        raise TypeError(
            f"A {type(module).__name__}, quantized by {backend.backend_name}, can not be dequantized, and its weight "
            "is needed here: the head of the model is scored from it. Load the model with its head unquantized."
        )
    return read(module).detach()


@torch.no_grad()
def unpack_state(model: PreTrainedModel, state: dict[str, Any]) -> None:
    """Replaces what quantized layers put into a state dict by their dequantized weight, in the dtype of the config.

    Raises:
        ValueError: for a layer that can not be dequantized.
    """
    for name, module, backend in quantized_layers(model):
        read = reader(module, backend)
        if read is None:
            raise ValueError(
                f"Layer {name!r} is quantized by {backend.backend_name} and can not be dequantized, so no merged model "
                "can be written. Load the base in bfloat16, load the axis there and export it; or export the axis as a "
                "LoRA (`export_lora`), which needs no weights of the base."
            )
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        layer: Any = module
        for key, value in {"weight": read(module), "bias": layer.bias}.items():
            if value is not None:
                dtype = model.config.dtype or value.dtype
                state[f"{name}.{key}"] = nn.Parameter(value.detach().to(dtype), requires_grad=False)


def scheme(module: nn.Module, backend: QuantizationBackend) -> str:
    """What a layer is quantized to, such as "bnb 4bit nf4": for messages, and to tell two bases apart."""
    if isinstance(backend, Bnb4bitBackend):
        weight: Any = module.weight
        return f"{backend.backend_name} {weight.quant_type}"
    if isinstance(backend, TorchaoBackend):
        return f"{backend.backend_name} {type(module.weight).__name__}"
    return backend.backend_name


def prepare_quantized(module: nn.Module, name: str, backend: QuantizationBackend) -> None:
    """Readies a layer for reading and training.

    bitsandbytes packs a 4-bit layer anew when it first runs in eval mode on a CPU with AVX-512 for bfloat16. That
    rounds its scales, the kernel has no backward, and PEFT then reads nonsense. Such a layer is unpacked, and stays so.

    Raises:
        TypeError: for a layer of bitsandbytes whose weight is not quantized.
    """
    layer: Any = module
    if isinstance(backend, Bnb4bitBackend):
        layer.support_avx512bf16_for_cpu = False
        if layer.weight.quant_state is None and layer.weight.device.type != "meta":
            raise TypeError(_UNQUANTIZED.format(name, type(module).__name__))
        if layer.weight.quant_state is not None:
            _unpack_for_cpu(layer)
    elif isinstance(backend, Bnb8bitBackend) and layer.weight.has_fp16_weights:
        raise TypeError(_UNQUANTIZED.format(name, type(module).__name__))


def _unpack_for_cpu(layer: Any) -> None:
    state = layer.weight.quant_state
    if vars(state).get("packing_format_for_cpu", False):
        layer.state_dict()  # unpacks, in place
    if state.absmax.ndim == 2:  # bitsandbytes 0.50 forgets to transpose the scales back, unless they are quantized too
        state.absmax = state.absmax.mT.reshape(-1).float()


_UNQUANTIZED = (
    "Module {!r} is a {} of bitsandbytes whose weight is not quantized (yet). Load the model with "
    "`quantization_config=BitsAndBytesConfig(load_in_4bit=True)` or `load_in_8bit=True` (without "
    "`llm_int8_has_fp16_weight`), or move it to its device first, which quantizes it."
)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizationBackend]]:
    """Name, module and backend of every quantized linear layer, ready for use; wrapped ones under their own names.

    Raises:
        TypeError: for a layer of bitsandbytes that is not quantized.
    """
    requantize = requantizer(model)
    for name, module in model.named_modules():
        backend = quantization_backend(module, requantize)
        if backend is not None:
            prepare_quantized(module, name, backend)
            yield name.replace(".base_layer", ""), module, backend


def opaque_layers(model: nn.Module) -> list[OpaqueLinear]:
    """The derivatives of every quantized linear layer, wrapped or not."""
    rules = []
    for name, module, backend in quantized_layers(model):
        in_features = _get_in_out_features(module)[0]
        rules.append(OpaqueLinear(module, name, reader(module, backend), in_features or 0))
    return rules


def activation_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's activations, which is that of its norms and biases: these are never quantized."""
    vectors = (p.dtype for p in model.parameters() if p.ndim == 1 and p.is_floating_point())
    return next(vectors, torch.float32)


_WEIGHT = re.compile("weight|W_q|blocks|packed")  # buffers of other names are tables of indices, masks and the like


def unknown_quantization(module: nn.Module) -> str | None:
    """What shows that a module is quantized in a way nobody here knows; `None` if nothing does."""
    if isinstance(module, (nn.Embedding, TangentLayer)):
        return None
    buffers = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if _WEIGHT.search(name)]
    own = [*module.named_parameters(recurse=False), *buffers]
    found = next((f"{name} ({tensor.dtype})" for name, tensor in own if tensor.dtype in PACKED and tensor.ndim > 1), "")
    if type(module).__module__.startswith("torch.ao.nn.quantized"):
        found = "in torch's own format"
    return found if found and quantization_backend(module) is None else None


def refuse_unknown(module: nn.Module, name: str) -> None:
    """Refuses a module that is quantized in a way nobody here knows.

    Raises:
        TypeError: naming the module, what it holds, and what works.
    """
    found = unknown_quantization(module)
    if found is not None:
        raise TypeError(
            f"Module {name!r}, a {type(module).__name__}, holds packed numbers ({found}) and is of no known kind of "
            f"quantized layer, so its derivative is not known. {SUPPORTED}. Load the model quantized by one of these, "
            "or dequantize it (`model.dequantize()`)."
        )
