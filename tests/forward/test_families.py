"""Every decoder family of the table against the float64 oracle: logits, both gradients, cached generation, its page."""

from __future__ import annotations

from typing import Any

import pytest
from families import FAMILIES, Family
from family_checks import cached_error, linearize, measure
from models_page import COMMAND, PAGE, parse, refusals


ROWS = parse(PAGE.read_text(encoding="utf-8"))
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@each_family
def test_logits_and_gradient_equal_the_oracle(family: Family) -> None:
    found = measure(family)
    assert found.worst() <= family.tolerance, found
    assert (found.replay is not None) == family.replay
    shown = ROWS[family.name]
    experts = found.experts or "–"
    assert [shown["class"], shown["attention"], shown["experts"]] == [f"`{found.model}`", found.attention, experts]


@each_family
def test_generation_with_a_cache_equals_generation_without(family: Family) -> None:
    if family.cached:
        assert cached_error(family) <= family.tolerance
        return
    with pytest.raises(NotImplementedError, match=r"keeps states from one decoding step.*use_cache=False"):
        cached_error(family)


@each_family
def test_the_last_blocks_and_the_head_are_found(family: Family) -> None:
    tuner: Any = linearize(family).base_model
    name, length = tuner.blocks
    assert length == 3 and tuner.head_name is not None
    wrapped = {layer.layer_name for layer in tuner.modules() if hasattr(layer, "layer_name")}
    assert tuner.head_name in wrapped
    inside = {key.removeprefix(name + ".").split(".")[0] for key in wrapped - {tuner.head_name}}
    assert inside == {"1", "2"}


def test_the_page_lists_the_table() -> None:
    assert list(ROWS) == [family.name for family in FAMILIES]
    for family in FAMILIES:
        shown = ROWS[family.name]
        assert (shown["with a cache"] != "no") == family.cached, family.name
        assert (shown["replayed"] != "–") == family.replay, family.name
        assert shown["note"] == family.note, family.name
        errors = [
            shown[name] for name in ("logits, padded left", "padded right", "gradient", "replayed", "with a cache")
        ]
        assert all(float(x) <= family.tolerance for x in errors if x not in {"–", "no"}), family.name


def test_the_page_lists_what_is_refused() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert COMMAND in page
    for refusal in refusals():
        assert f"| {refusal.family} | {refusal.reason} | {refusal.remedy} |" in page
