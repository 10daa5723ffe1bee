"""What was found in a tree is kept as long as the tree is the same, and no longer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import config, deltas, tangent_model
from conftest import batch, build
from oracle import linearized
from tolerances import assert_equal
from torch import nn

from tangent_peft.forward.structure import Structure


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def shared() -> nn.Module:
    """A module with a hole, and a part that is in it twice."""
    part = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    root = nn.Sequential(part, nn.Linear(2, 2), part)
    root.register_module("hole", None)
    return root


@pytest.mark.parametrize("make", [shared, lambda: build("llama"), lambda: tangent_model("gpt2", "shared")])
def test_modules(make: Any) -> None:
    root = make()
    found = Structure.of(root)
    assert found.modules == list(root.modules())
    assert found.select(is_linear) == [module for module in root.modules() if is_linear(module)]
    assert found.homes == {type(module).__module__ for module in root.modules()}


class OtherLinear(nn.Linear):
    """What an engine makes of a layer, in place."""


def _exchange(root: Any) -> None:
    root.model.layers[0].mlp.up_proj.__class__ = OtherLinear


def _replace(root: Any) -> None:
    root.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=False)


def _remove(root: Any) -> None:
    del root.model.layers[2]


def _configure(root: Any) -> None:
    root.model.layers[0].self_attn.config = copy.deepcopy(root.config)


@pytest.mark.parametrize("change", [_exchange, _replace, _remove, _configure])
def test_a_change_is_seen(change: Any) -> None:
    root: Any = build("llama")
    known = Structure.of(root)
    assert Structure.of(root, known) is known
    change(root)
    found = Structure.of(root, known)
    assert found is not known and found.modules == list(root.modules())
    assert Structure.of(root, found) is found


def test_between_two_passes() -> None:
    """Layers are exchanged and an axis is added after a first pass: the next one is exact."""
    model = tangent_model("llama", "dense")
    inputs = batch()
    with torch.no_grad():
        model(**inputs)
        base: Any = model.get_base_model()
        base.model.layers[0].mlp = copy.deepcopy(base.model.layers[0].mlp)
        base.model.layers[0].mlp.up_proj.weight.mul_(-1.0)
        base.model.layers[1].post_attention_layernorm = nn.LayerNorm(32)
        model.add_adapter("other", config("shared"))
        with model.axes(default=1.0, other=0.5):
            found, tangents = model(**inputs).logits, deltas(model)
    expected = linearized(model.unload(), tangents, **inputs)[1]
    mask = inputs["attention_mask"].bool()
    assert_equal(found[mask], expected[mask])


def test_a_copy_has_a_structure_of_its_own() -> None:
    model = tangent_model("llama", "dense")
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        clone = copy.deepcopy(model)
        assert torch.equal(clone(**inputs).logits, expected)
        clone.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(-1.0)
        assert torch.equal(model(**inputs).logits, expected)
        assert not torch.equal(clone(**inputs).logits, expected)
