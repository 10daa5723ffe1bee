"""What can not be linearized exactly is refused by name when it is wrapped; what is unknown is not."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from cases import config, tangent_model
from conftest import build
from families import FAMILIES, REFUSED, Family
from family_checks import padded
from peft import get_peft_model
from tolerances import assert_equal
from torch import nn

from tangent_peft import TangentConfig
from tangent_peft.forward import check_support, support


BY_NAME = {family.name: family for family in FAMILIES}
REMEDY = {
    "phimoe": r"PhimoeTopKRouter is refused.*sparsemixer.*linearize=False",
    "recurrent_gemma": r"RecurrentGemmaRglru is refused.*states in the module.*linearize=False",
    "reformer": r"ReformerEncoder is refused.*reversible.*linearize=False",
    "rwkv": r"RwkvModel is refused.*config.rescale_every = 0",
    "doge": r"DogeAttention is refused.*attn_implementation='eager'",
    "zamba2": r"shares its weight with.*exclude_modules",
}


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_a_family_is_refused_with_its_remedy(family: Family) -> None:
    model = family.build()
    with pytest.raises(NotImplementedError, match=REMEDY[family.name]):
        get_peft_model(model, config())


@pytest.mark.parametrize("family", [x for x in REFUSED if x.name in ("phimoe", "doge")], ids=lambda family: family.name)
def test_ordinary_weights_are_not_refused(family: Family) -> None:
    model = get_peft_model(family.build(), config(linearize=False)).eval()
    base = family.build()(**padded()).logits
    assert not torch.equal(model(**padded()).logits, base)


def test_every_row_of_the_table_is_tested() -> None:
    assert {refusal.family.split(" ")[0] for refusal in support.REFUSED.values()} <= REMEDY.keys()
    assert {refusal.family.split(" ")[0] for _, refusal in support.REFUSED_IF.values()} <= REMEDY.keys()


def test_the_remedies_work() -> None:
    shared = next(family for family in REFUSED if family.name == "zamba2").build()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "0", "1"]
    model = get_peft_model(shared, config(exclude_modules=names)).eval()
    assert model(**padded()).logits.isfinite().all()


@pytest.mark.parametrize("chosen", ["flex_attention", "paged|sdpa"])
def test_attention_without_a_derivative(chosen: str) -> None:
    base = build("llama")
    base.config._attn_implementation_internal = chosen
    with pytest.raises(NotImplementedError, match=f"{chosen.split('|')[0]}.*"):
        get_peft_model(base, config())
    base.config._attn_implementation_internal = "sdpa"
    model = get_peft_model(base, config()).eval()
    base.config._attn_implementation_internal = chosen
    with pytest.raises(NotImplementedError, match=chosen.split("|")[0]):
        model(**padded())


@pytest.mark.parametrize("name", ["falcon", "gptj", "gpt_neo"])
def test_flash_kernels_that_a_model_calls_itself(name: str) -> None:
    base = BY_NAME[name].build()
    base.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(NotImplementedError, match=r"flash_attention_2.*attn_implementation='eager'"):
        check_support(base)


def test_kernels_from_the_hub() -> None:
    base = build("llama")
    base._use_kernels = True
    with pytest.raises(NotImplementedError, match=r"kernels from the hub.*set_use_kernels\(False\)"):
        get_peft_model(base, config())
    model = tangent_model("llama")
    model.get_base_model()._use_kernels = True  # after it was wrapped
    with pytest.raises(NotImplementedError, match=r"kernels from the hub.*set_use_kernels\(False\)"):
        model(**padded())
    model.get_base_model().set_use_kernels(False)
    model(**padded())


def liger_function(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Stands for a forward that Liger puts on a module."""
    return x


@pytest.mark.parametrize("patched", ["instance", "class"])
def test_liger(patched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("llama")
    monkeypatch.setattr(liger_function, "__module__", "liger_kernel.transformers.rms_norm")
    norm = base.model.layers[0].input_layernorm
    if patched == "instance":
        norm.forward = types.MethodType(liger_function, norm)
    else:
        monkeypatch.setattr(type(norm), "forward", liger_function)
    with pytest.raises(NotImplementedError, match="LlamaRMSNorm is refused because Liger's kernels"):
        get_peft_model(base, config())


class Double(torch.autograd.Function):
    """Without a jvp."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


class Unknown(nn.Module):
    """Somebody's own network."""

    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.opaque, self.below, self.above = opaque, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.below(x))
        return self.above(Double.apply(y) if self.opaque else y)


def test_an_unknown_model_is_taken_and_fails_loudly() -> None:
    x = torch.randn(2, 4)
    settings = TangentConfig(target_modules=["below"], init_weights=False)
    found = get_peft_model(Unknown(False), settings)(x)
    assert found.isfinite().all()
    model = get_peft_model(Unknown(True), settings)
    with pytest.raises(NotImplementedError, match="jvp"):
        model(x)


def test_a_mask_that_carries_a_tangent() -> None:
    """Named at the forward as well: a model of one's own may compute its mask."""
    base = next(family for family in REFUSED if family.name == "doge").build()
    model = get_peft_model(base, config(linearize=False)).eval()
    with model.linearized(True), pytest.raises(NotImplementedError, match=r"computes its attention mask.*'eager'"):
        model(**padded())
    base.set_attn_implementation("eager")
    with model.linearized(True):
        found = model(**padded()).logits[0]
    twin = get_peft_model(BY_NAME["doge"].build(), config()).eval()
    twin.load_state_dict(model.state_dict())
    assert_equal(found, twin(**padded()).logits[0])
