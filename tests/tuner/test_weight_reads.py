"""Code that reads the weight of a wrapped layer, instead of calling the layer, gets its tangent or a refusal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import FORMS, deltas, tangent_layers
from conftest import enlarge
from oracle import gradient, linearized
from peft import PeftModel, get_peft_model
from tolerances import assert_equal, relative_error
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification
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


class Table(nn.Module):
    """Reads its embedding, in which one row is for padding, and looks rows up in it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.above = nn.Embedding(6, 4, padding_idx=1), nn.Linear(4, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        scores = torch.softmax(x @ self.positions.weight.mT, dim=-1)
        return self.above(torch.tanh(scores @ self.positions.weight + self.positions(ids)))


@pytest.mark.parametrize("form", FORMS)
def test_an_embedding_that_is_read(form: str) -> None:
    """Against torch.func, linearized and in the gradient; and against merging, as weights."""
    torch.manual_seed(0)
    stock, x, ids = Table().double(), torch.randn(5, 4).double(), torch.arange(5)
    settings = TangentConfig(target_modules=["positions"], init_weights=False, lm_head=False, **FORMS[form])
    model = get_peft_model(copy.deepcopy(stock), settings).double()
    layer: Any = model.get_base_model().positions
    tau = layer.get_delta_weight("default").detach()
    frozen = {name: p.detach() for name, p in stock.named_parameters() if "above" in name}

    def value(table: Tensor) -> Tensor:
        return functional_call(stock, {**frozen, "positions.weight": table}, (x, ids))

    table = stock.positions.weight.detach()
    base, change = jvp(value, (table,), (tau,))
    found = model(x, ids)
    assert_equal(found, base + change)
    cotangent = torch.randn_like(found)
    found.backward(cotangent)
    full = vjp(value, table)[1](cotangent)[0].mT.clone()
    full[:, 1] = 0.0  # the padding token has no tangent
    if form == "dense":
        assert_equal(layer.tangent_delta["default"].weight.grad, full)
    else:
        a, b = layer.projection("default", full.device).detach().double(), layer.tangent_B["default"].weight
        assert_equal(b.grad, full @ a.mT)
        if form == "trained":
            assert_equal(layer.tangent_A["default"].weight.grad, b.detach().mT @ full)
    with torch.no_grad(), model.linearized(False):
        additive = model(x, ids)
        assert_equal(additive, value(table + tau))
        model.merge_adapter()
        assert_equal(model(x, ids), additive)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("targets", [["rel_embeddings"], ["rel_embeddings", "query_proj", "word_embeddings"]])
def test_relative_positions_of_deberta(targets: list[str]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0}
    settings = DebertaV2Config(vocab_size=20, pooler_hidden_size=16, share_att_key=True, **sizes, **relative, **quiet)
    stock = enlarge(DebertaV2ForSequenceClassification(settings)).double().eval()
    model = get_peft_model(
        copy.deepcopy(stock), TangentConfig(target_modules=targets, init_weights=False, lm_head=False, r=None)
    ).double()
    taus, ids = deltas(model), torch.randint(1, 20, (2, 6))
    assert any("rel_embeddings" in name for name in taus)
    base, expected = linearized(stock, taus, input_ids=ids)
    assert relative_error(base, expected) > 1e-5  # relative positions matter little in a tiny model
    found = model.eval()(input_ids=ids).logits
    assert_equal(found - base, expected - base, 1e-8)
    cotangent = torch.randn_like(found)
    found.backward(cotangent)
    full = gradient(stock, taus, cotangent, input_ids=ids)
    for layer in tangent_layers(model):
        assert_equal(layer.tangent_delta["default"].weight.grad, layer._layout(full[layer.weight_name]))
    with torch.no_grad(), model.linearized(False):
        additive = model(input_ids=ids).logits
        assert relative_error(additive - base, expected - base) < 0.5
        assert_equal(model.merge_and_unload()(input_ids=ids).logits, additive)


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
