"""Convolutional and recurrent states keep their tangents from one decoding step to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from family_checks import linearize
from peft import PeftModel
from tolerances import assert_equal
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from tangent_peft.forward import cache as caches


BY_NAME = {family.name: family for family in FAMILIES}
KINDS = ["mamba", "lfm2", "falcon_h1", "qwen3_5_text"]
IDS = torch.randint(3, 300, (2, 10), generator=torch.Generator().manual_seed(1))
TOLERANCE = 3e-5  # recurrences are summed in another order, one token at a time


def model_of(name: str) -> PeftModel:
    torch.manual_seed(0)
    return linearize(BY_NAME[name])


def new_cache(model: PeftModel) -> Cache:
    return DynamicCache(config=model.get_base_model().config)


def read(model: PeftModel, cache: Cache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        name = "cache_params" if type(model.get_base_model()).__name__.startswith("Mamba") else "past_key_values"
        return model(input_ids=ids, use_cache=True, **{name: cache}).logits


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, [6, 1, 1, 1, 1]) for name in KINDS] + [(name, [6, 1, 3]) for name in KINDS if name != "mamba"],
)
def test_pieces_equal_the_whole(name: str, steps: list[int]) -> None:
    """Mamba itself forgets its recurrent state when it continues by several tokens at a time."""
    model = model_of(name)
    expected = read(model, new_cache(model), IDS)
    assert_equal(expected, model(input_ids=IDS, use_cache=False).logits, TOLERANCE)
    cache = new_cache(model)
    found = torch.cat([read(model, cache, piece) for piece in IDS.split(steps, dim=1)], dim=1)
    assert_equal(found, expected, TOLERANCE)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
@pytest.mark.parametrize("name", KINDS)
def test_generation(name: str, options: dict[str, Any]) -> None:
    model = model_of(name)
    found = {}
    for cached in (False, True):
        torch.manual_seed(3)
        settings: Any = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
        with torch.inference_mode(cached):
            found[cached] = model.generate(IDS, use_cache=cached, attention_mask=torch.ones_like(IDS), **settings)
    assert torch.equal(found[True], found[False])


@pytest.mark.parametrize("name", KINDS)
def test_another_mix_is_refused(name: str) -> None:
    model = model_of(name)
    cache = new_cache(model)
    read(model, cache, IDS[:, :6])
    for other in (model.axes(default=0.5), model.disable_adapter(), model.linearized(False)):
        with other, pytest.raises(ValueError, match="was filled by the linearized mix"):
            read(model, cache, IDS[:, 6:7])
    expected = read(model, new_cache(model), IDS)[:, 6:7]
    assert_equal(read(model, cache, IDS[:, 6:7]), expected, TOLERANCE)
    with model.disable_adapter():
        read(model, base := new_cache(model), IDS[:, :6])
    with pytest.raises(ValueError, match="was filled by the model without a linearized axis"):
        read(model, base, IDS[:, 6:])


@pytest.mark.parametrize("name", KINDS)
def test_an_emptied_cache_can_be_reused(name: str) -> None:
    model = model_of(name)
    cache = new_cache(model)
    read(model, cache, IDS)
    for other in (model.disable_adapter(), model.axes(default=0.5)):
        cache.reset()
        with other:
            expected = read(model, new_cache(model), IDS[:, :6])
            assert_equal(read(model, cache, IDS[:, :6]), expected, TOLERANCE)


def test_a_static_cache() -> None:
    model = model_of("lfm2")
    cache = StaticCache(model.get_base_model().config, max_cache_len=12)
    expected = read(model, new_cache(model), IDS)
    found = torch.cat([read(model, cache, piece) for piece in IDS.split([6, 1, 3], dim=1)], dim=1)
    assert_equal(found, expected, TOLERANCE)


def test_gradient_through_a_cache() -> None:
    """Of convolutions; recurrences write over what their own gradient needs, in stock transformers as well."""
    model = model_of("lfm2")
    tangents = [p for p in model.parameters() if p.requires_grad]
    cotangent = torch.randn(2, 10, 300)
    expected = torch.autograd.grad((model(input_ids=IDS, use_cache=False).logits * cotangent).sum(), tangents)
    cache, total = new_cache(model), torch.zeros(())
    for piece, weight in zip(IDS.split([6, 1, 3], dim=1), cotangent.split([6, 1, 3], dim=1), strict=True):
        total = total + (model(input_ids=piece, use_cache=True, past_key_values=cache).logits * weight).sum()
    found = torch.autograd.grad(total, tangents)
    largest = max(float(x.abs().max()) for x in expected)
    for left, right in zip(found, expected, strict=True):
        assert float((left - right).abs().max()) <= TOLERANCE * largest


def test_a_foreign_cache_is_left_alone() -> None:
    base = BY_NAME["lfm2"].build()
    cache = DynamicCache(config=base.config)
    expected = base(input_ids=IDS, use_cache=False).logits[:, 6:]
    with torch.no_grad():
        base(input_ids=IDS[:, :6], past_key_values=cache)
        assert_equal(base(input_ids=IDS[:, 6:], past_key_values=cache).logits, expected)
    assert not any(name.startswith("tangent") for layer in (cache, *cache.layers) for name in vars(layer))


def test_states_of_a_way_of_their_own_are_refused() -> None:
    model = model_of("minimax")
    with pytest.raises(NotImplementedError, match=r"MiniMaxCache keeps states.*use_cache=False"):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)


def test_installing_twice_changes_nothing() -> None:
    before = vars(Cache)["get_conv_state"]
    caches.install()
    assert vars(Cache)["get_conv_state"] is before
