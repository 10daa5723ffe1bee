"""Only the mix that filled a cache continues it, and operations on a cache act on the tangents as well."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from cases import config, tangent_model
from conftest import batch, build
from peft import PeftModel
from tolerances import assert_equal
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from tangent_peft.forward import dual, split
from tangent_peft.forward.cache import pack, unpack


IDS = batch(rows=2)["input_ids"].clamp_min(3)
Mix = Callable[[PeftModel], AbstractContextManager[Any]]
MIXES: dict[str, Mix] = {
    "one": lambda model: model.axes(default=1.0),
    "half": lambda model: model.axes(default=0.5),
    "zero": lambda model: model.axes(default=0.0),
    "empty": lambda model: model.axes({}),
    "disabled": lambda model: model.disable_adapter(),
    "as weights": lambda model: model.linearized(False),
}


def new_cache(model: PeftModel, kind: str) -> Cache:
    settings = model.get_base_model().config
    return StaticCache(settings, max_cache_len=16) if kind == "static" else DynamicCache(config=settings)


@torch.no_grad()
def prefill(model: torch.nn.Module, cache: Cache, ids: Tensor = IDS[:, :6]) -> Tensor:
    return model(input_ids=ids, past_key_values=cache).logits


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("filled", "read"),
    [
        ("one", "half"),
        ("one", "zero"),
        ("one", "empty"),
        ("one", "disabled"),
        ("one", "as weights"),
        ("zero", "one"),
        ("empty", "half"),
        ("disabled", "one"),
        ("as weights", "one"),
    ],
)
def test_another_mix_is_refused(filled: str, read: str, kind: str) -> None:
    model = tangent_model("llama", "shared")
    cache = new_cache(model, kind)
    with MIXES[filled](model):
        prefill(model, cache)
    names = {"one": r"default', 1\.0", "half": r"default', 0\.5"}
    expected = "filled by {}.*now read by {}".format(
        *(names.get(mix, "the model without a linearized axis") for mix in (filled, read))
    )
    expected = expected.replace("by default", "by the linearized mix.*default")
    with MIXES[read](model), pytest.raises(ValueError, match=expected):
        prefill(model, cache, IDS[:, 6:])
    with MIXES[filled](model):  # the refusal left model and cache in order
        found = prefill(model, cache, IDS[:, 6:])
        assert_equal(found, prefill(model, new_cache(model, kind), IDS)[:, 6:])


def test_the_same_mix_reached_otherwise_is_accepted() -> None:
    model = tangent_model("llama", "shared")
    cache = new_cache(model, "dynamic")
    prefill(model, cache)
    expected = prefill(model, new_cache(model, "dynamic"), IDS)[:, 6:]
    with model.linearized(False):
        prefill(model, new_cache(model, "dynamic"))
    with model.axes(default=1.0):
        assert_equal(prefill(model, cache, IDS[:, 6:]), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("first", MIXES)
@pytest.mark.parametrize("second", ["half", "disabled"])
def test_an_emptied_cache_can_be_reused(first: str, second: str, kind: str) -> None:
    model = tangent_model("llama", "shared")
    cache = new_cache(model, kind)
    with MIXES[first](model):
        prefill(model, cache)
    cache.reset()
    with MIXES[second](model):
        expected = prefill(model, new_cache(model, kind), IDS)
        prefill(model, cache)
        assert_equal(prefill(model, cache, IDS[:, 6:]), expected[:, 6:])


def _reorder(cache: Cache) -> Tensor:
    cache.reorder_cache(torch.tensor([1, 0]))
    return torch.tensor([1, 0])


def _repeat(cache: Cache) -> Tensor:
    cache.batch_repeat_interleave(2)
    return torch.tensor([0, 0, 1, 1])


def _select(cache: Cache) -> Tensor:
    cache.batch_select_indices(torch.tensor([1]))
    return torch.tensor([1])


@pytest.mark.parametrize("operation", [_reorder, _repeat, _select])
def test_operations_on_rows(operation: Callable[[Cache], Tensor]) -> None:
    model = tangent_model("llama", "dense")
    cache = new_cache(model, "dynamic")
    prefill(model, cache)
    rows = operation(cache)
    ending = IDS[rows, 6:].flip(1)
    expected = prefill(model, new_cache(model, "dynamic"), torch.cat([IDS[rows, :6], ending], 1))[:, 6:]
    assert_equal(prefill(model, cache, ending), expected)


def test_crop() -> None:
    model = tangent_model("llama", "dense")
    cache = new_cache(model, "dynamic")
    prefill(model, cache, IDS)
    cache.crop(-4)
    assert cache.get_seq_length() == 6
    expected = prefill(model, new_cache(model, "dynamic"), IDS)[:, 6:]
    assert_equal(prefill(model, cache, IDS[:, 6:]), expected)


def test_layers_below_the_tangent_store_no_tangent() -> None:
    model = tangent_model("llama", "dense", num_layers=1)
    cache = new_cache(model, "dynamic")
    prefill(model, cache)
    assert [layer.keys.shape[1] for layer in cache.layers] == [2, 2, 4]


def test_a_foreign_cache_is_left_alone() -> None:
    base = build("llama")
    cache = DynamicCache(config=base.config)
    expected = build("llama")(input_ids=IDS).logits[:, 6:]
    prefill(base, cache)
    assert vars(cache).keys() == vars(DynamicCache(config=base.config)).keys()
    assert_equal(prefill(base, cache, IDS[:, 6:]), expected)


def test_pack_and_unpack() -> None:
    primal, tangent = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    with torch.autograd.forward_ad.dual_level():
        found = split(unpack(pack(primal, tangent), primal_trains=False))
        assert torch.equal(found[0], primal) and torch.equal(found[1], tangent)
        without = split(unpack(pack(primal, None), primal_trains=False))
        assert torch.equal(without[0], primal) and torch.equal(without[1], torch.zeros_like(primal))
        assert split(dual(primal, None))[1] is None


class WithStates(DynamicCache):
    """Keeps states by a way of its own, as MiniMax's cache does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.own_states: list[Any] = []


@pytest.mark.parametrize("where", ["cache", "layer", "legacy"])
def test_states_kept_by_another_way_are_refused(where: str) -> None:
    model = tangent_model("llama", "dense")
    base = model.get_base_model()
    cache = WithStates(config=base.config)
    expected = prefill(model, new_cache(model, "dynamic"))

    def keep(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        if where == "cache":
            cache.own_states.append([[], output])
        else:
            vars(cache.layers[2])["own_state"] = {0: output}

    def legacy(module: torch.nn.Module, args: Any, output: Any) -> None:
        output["past_key_values"] = ((output.last_hidden_state,),)

    handle = base.model.register_forward_hook(legacy, prepend=True)
    if where != "legacy":
        handle.remove()
        handle = base.model.layers[2].register_forward_hook(keep)
    name = "tuple" if where == "legacy" else "WithStates"
    with pytest.raises(NotImplementedError, match=f"{name} keeps states.*use_cache=False"):
        prefill(model, cache)
    with model.disable_adapter():
        prefill(model, WithStates(config=base.config) if where == "cache" else new_cache(model, "dynamic"))
    handle.remove()
    assert_equal(prefill(model, WithStates(config=base.config)), expected)


def test_a_second_axis_on_other_layers() -> None:
    """The mix of the whole model decides, not that of a layer."""
    model = tangent_model("llama", "dense")
    model.add_adapter("top", config("shared", num_layers=1))
    cache = new_cache(model, "dynamic")
    with model.axes(top=1.0):
        prefill(model, cache)
        expected = prefill(model, new_cache(model, "dynamic"), IDS)[:, 6:]
    with model.axes(default=1.0, top=1.0), pytest.raises(ValueError, match="filled by"):
        prefill(model, cache, IDS[:, 6:])
    with model.axes(top=1.0):
        assert_equal(prefill(model, cache, IDS[:, 6:]), expected)
