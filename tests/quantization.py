"""Quantized tiny models, and the ordinary model that each of them means: its dequantized twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, enlarge
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    TorchAoConfig,
)


# Every width is a multiple of 64, the block that bitsandbytes scales: its kernels for the CPU need that.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def plain(family: str = "llama", **options: Any) -> PreTrainedModel:
    """The tiny model before quantization: Llama, or Qwen2, whose queries, keys and values have biases."""
    torch.manual_seed(0)
    shape = {**SHAPE, **options}
    model = LlamaForCausalLM(LlamaConfig(**shape)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    return enlarge(model)


def _torchao(name: str, **options: Any) -> Any:
    import torchao.quantization as torchao

    return TorchAoConfig(vars(torchao)[name](**options))


def _intx() -> Any:
    from torchao.quantization.granularity import PerGroup

    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))


SCHEMES: dict[str, Callable[[], Any]] = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4_double": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "nf4_storage": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    ),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao_int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao_int4": _intx,
    "torchao_dynamic": lambda: _torchao("Int8DynamicActivationInt8WeightConfig"),
}


def quantized(path: Path, scheme: str, family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model, saved and loaded as a user does it, in eval mode."""
    folder = path / family
    if not folder.exists():
        plain(family).save_pretrained(folder)
    if scheme == "hqq":
        return _by_hqq(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=SCHEMES[scheme](), dtype=dtype).eval()


def _by_hqq(model: PreTrainedModel) -> PreTrainedModel:
    """transformers 5.23 does not load HQQ yet: the layers are replaced by hand."""
    pytest.importorskip("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    options = BaseQuantizeConfig(nbits=4, group_size=32)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = HQQLinear(module, copy.deepcopy(options), compute_dtype=module.weight.dtype, device="cpu")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.requires_grad_(False))
    return model


def is_quantized(module: nn.Module) -> Any:
    """PEFT's backend of a module."""
    return resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary float32 model with the weights that the quantized one stands for; read before its first forward."""
    config = copy.deepcopy(model.config)
    if "quantization_config" in vars(config):
        del config.quantization_config
    twin = type(model)(config).float().eval()
    weights = {}
    for name, module in model.named_modules():
        backend = is_quantized(module)
        if backend is not None:
            weights[f"{name}.weight"] = backend.get_base_weight(module).detach().float().clone()
            if module.bias is not None:
                weights[f"{name}.bias"] = module.bias.detach().float()
    rest = {n: p.detach().float() for n, p in model.named_parameters() if n not in weights}
    known = twin.state_dict().keys()
    twin.load_state_dict({**{n: p for n, p in rest.items() if n in known}, **weights})
    return twin


def with_quantized_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its head in 4 bits as well, which transformers leaves out."""
    import bitsandbytes as bnb

    head = bnb.nn.Linear4bit(model.lm_head.in_features, VOCABULARY, bias=False, quant_type="nf4")
    head.weight = bnb.nn.Params4bit(model.lm_head.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    model.lm_head = head
    return model
