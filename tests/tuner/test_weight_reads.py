"""Code that reads the weight of a wrapped layer, instead of calling the layer, gets its tangent or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import FORMS
from peft import PeftModel, get_peft_model
from tolerances import assert_equal
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tangent_peft import TangentConfig
from tangent_peft.forward.deposit import replaying
from tangent_peft.tuner import TangentLayer
from tangent_peft.tuner.guard import GuardedWeight


class Reader(nn.Module):
    """Multiplies by the weight of a layer itself, or calls the layer."""

    def __init__(self, kind: str, reads: bool) -> None:
        super().__init__()
        self.reads = reads
        self.inside = nn.Linear(4, 6) if kind == "linear" else Conv1D(6, 4)
        self.above = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.reads:
            return self.above(torch.tanh(self.inside(x)))
        weight = self.inside.weight
        weight = weight.mT if isinstance(self.inside.get_base_layer(), Conv1D) else weight
        return self.above(torch.tanh(F.linear(x, weight, self.inside.bias)))


def wrapped(kind: str, form: str, reads: bool) -> PeftModel:
    torch.manual_seed(0)
    settings = TangentConfig(target_modules=["inside", "above"], init_weights=False, **FORMS[form])
    return get_peft_model(Reader(kind, reads), settings)


@pytest.mark.parametrize("linearized", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_reading_equals_calling(kind: str, form: str, linearized: bool) -> None:
    x, found = torch.randn(5, 4), {}
    for reads in (False, True):
        model = wrapped(kind, form, reads)
        with model.linearized(linearized):
            y = model(x)
            y.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
        found[reads] = {"y": y, **gradients}
    for name, expected in found[False].items():
        assert_equal(found[True][name], expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_reading_in_a_replay_leaves_the_gradient(kind: str, form: str) -> None:
    x, weight, found = torch.randn(5, 4), torch.randn(5, 3), {}
    for reads in (False, True):
        model: Any = wrapped(kind, form, reads).get_base_model()
        with replaying() as collected, torch.enable_grad():
            y = model.forward(x.clone().requires_grad_())
            torch.autograd.backward([y], [weight])
        named = {id(p): name for name, p in model.named_parameters()}
        found[reads] = {named[id(p)]: g for p, g in collected.gradients.items()}
    assert found[True].keys() == found[False].keys() and len(found[True]) >= 2
    for name, expected in found[False].items():
        assert_equal(found[True][name], expected)


def test_outside_of_a_pass_it_is_the_weight() -> None:
    model = wrapped("linear", "dense", True)
    layer: Any = model.get_base_model().inside
    assert isinstance(layer, TangentLayer)
    assert layer.weight is layer.get_base_layer().weight
    with model.disable_adapter():
        assert layer.weight is layer.get_base_layer().weight


def test_a_guarded_weight_tells_its_dtype_and_refuses_use() -> None:
    guarded = GuardedWeight.of(nn.Parameter(torch.randn(3, 4)), "called {by name}")
    assert (guarded.dtype, guarded.device.type, guarded.shape) == (torch.float32, "cpu", (3, 4))
    assert guarded.ndim == guarded.dim() == 2 and guarded.size(0) == 3 and guarded.is_floating_point()
    x = torch.randn(2, 4)
    uses = [lambda: F.linear(x, guarded), lambda: x @ guarded.T, lambda: guarded.float(), lambda: guarded[0]]
    for use in [*uses, lambda: torch.cat([guarded, x]), lambda: guarded.detach(), lambda: guarded.data_ptr()]:
        with pytest.raises(RuntimeError, match=r"called \{by name\}"):
            use()
