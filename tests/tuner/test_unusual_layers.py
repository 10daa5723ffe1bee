"""Linear layers that are not what they seem: with a forward of their own, with hooks, sharing a weight."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tolerances import assert_equal
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from tangent_peft import TangentConfig
from tangent_peft.forward.support import _is_liger
from tangent_peft.tuner import TangentLayer
from tangent_peft.tuner.backends import unknown_quantization


class Normalized(nn.Linear):
    """Derives from a linear layer and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x / x.norm(dim=-1, keepdim=True), self.weight, self.bias)


class Stack(nn.Module):
    """Two layers, the second a linear one."""

    def __init__(self, first: nn.Module, bias: bool = False) -> None:
        super().__init__()
        self.first, self.second = first, nn.Linear(4, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def axis(**options: Any) -> TangentConfig:
    return TangentConfig(**{"num_layers": None, "init_weights": False, **options})


def test_a_linear_layer_with_a_forward_of_its_own_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"'first' is a Normalized.*forward of its own.*exclude_modules"):
        get_peft_model(Stack(Normalized(4, 4)), axis(target_modules=["first", "second"]))


def test_by_default_it_is_left_out_and_tangents_pass_through_it() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), Normalized(4, 4), nn.Linear(4, 3)), axis())
    wrapped = [module.layer_name for module in model.modules() if isinstance(module, TangentLayer)]
    assert wrapped == ["0", "2"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("differentiated", [False, True])
def test_a_hook_that_steers_does_not_steer_the_tangent(bias: bool, differentiated: bool) -> None:
    torch.manual_seed(0)
    network = Stack(nn.Linear(4, 4, bias=bias), bias).double()
    direction = torch.randn(4, dtype=torch.float64)
    network.first.register_forward_hook(lambda module, args, output: output + direction)
    x = torch.randn(5, 4, dtype=torch.float64)
    weights = {name: p.detach().clone() for name, p in network.named_parameters() if name.endswith("weight")}
    frozen = {name: p.detach().clone() for name, p in network.named_parameters() if name.endswith("bias")}
    reference = Stack(nn.Linear(4, 4, bias=bias), bias).double()
    reference.first.register_forward_hook(lambda module, args, output: output + direction)
    model = get_peft_model(network, axis(target_modules=["first", "second"])).double()
    layers = [module for module in model.modules() if isinstance(module, TangentLayer)]
    deltas = {layer.weight_name: layer.get_delta_weight("default").detach() for layer in layers}
    base, tangent = jvp(lambda w: functional_call(reference, {**w, **frozen}, (x,)), (weights,), (deltas,))
    with torch.set_grad_enabled(differentiated):
        assert_equal(model(x), base + tangent)


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


TINY = {"vocab_size": 50, "d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 0}
SHARED = {
    "one module, two names": (Twice, "a"),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**TINY, d_kv=4, d_ff=32, num_layers=1, num_heads=4)), "shared"),
    "bart": (
        lambda: BartForConditionalGeneration(BartConfig(**TINY, encoder_layers=1, decoder_layers=1)),
        "encoder.embed_tokens",
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_weight_with_other_owners_is_refused_also_where_these_are_not_wrapped(name: str) -> None:
    make, target = SHARED[name]
    with pytest.raises(NotImplementedError, match=rf"{target}' shares its weight with \[.*exclude_modules"):
        get_peft_model(make(), axis(target_modules=[target], lm_head=False))


def test_the_head_of_an_encoder_decoder_may_be_tied_to_its_embeddings() -> None:
    make, _ = SHARED["bart"]
    model = get_peft_model(make().eval(), axis(target_modules=["q_proj"], lm_head=True))
    embedding = model.get_base_model().get_input_embeddings().weight.clone()
    with pytest.warns(UserWarning, match="tied"):
        merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not torch.equal(merged.get_output_embeddings().weight, embedding)


def test_tables_of_indices_are_not_packed_weights() -> None:
    module = nn.Module()
    module.register_buffer("relative_position_index", torch.zeros(4, 4, dtype=torch.int32))
    assert unknown_quantization(module) is None
    module.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    assert unknown_quantization(module) == "qweight (torch.int32)"


def test_code_of_no_module_is_not_ligers() -> None:
    traced = type("Traced", (nn.Module,), {"__module__": None})
    assert not _is_liger(traced)
    assert not _is_liger(ModuleType)
