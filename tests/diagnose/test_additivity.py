"""Non-additivity against a plain loop with scipy, and where it is known to be 0."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import config, in_float64
from conftest import batch, build
from linear_toys import ids, toy
from scipy.spatial.distance import jensenshannon
from strong_axes import two_axes

from tangent_peft.diagnose import additivity
from tangent_peft.diagnose.linearity import mix_logits
from tangent_peft.diagnose.prompts import TokenBatch


GRID = [-1.0, 0.0, 0.5, 1.0]


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean Jensen–Shannon divergence in nats, by scipy."""
    p, q = (x.softmax(-1).numpy() for x in (first, second))
    return float(np.mean(np.nan_to_num(jensenshannon(p, q, axis=1)) ** 2))  # the root of −1e-17 where p is q


def test_equals_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = in_float64(two_axes(build("llama")), monkeypatch), batch("left")
    real = inputs["attention_mask"].bool()

    def network(**mix: float) -> torch.Tensor:
        with torch.no_grad(), model.axes(mix), model.linearized(False):
            return model(**inputs).logits[real]

    base, help_, verb = network(), network(help=1.0), network(verb=1.0)
    (pair,) = additivity(model, [inputs], grid=GRID).pairs
    assert (pair.first, pair.second, pair.first_weights) == ("help", "verb", GRID)
    for row, first in enumerate(GRID):
        for column, second in enumerate(GRID):
            if first == second == 0.0:
                assert math.isnan(pair.ratio[row][column]) and math.isnan(pair.interaction[row][column])
                continue
            actual = network(help=first, verb=second)
            added = base + first * (help_ - base) + second * (verb - base)
            own = network(help=first) + network(verb=second) - base
            expected = distance(actual, added) / distance(added, base)
            assert pair.ratio[row][column] == pytest.approx(expected, rel=1e-5, abs=1e-9)
            expected = distance(actual, own) / distance(own, base)
            assert pair.interaction[row][column] == pytest.approx(expected, rel=1e-5, abs=1e-9)
            assert pair.moved[row][column] == pytest.approx(distance(added, base), rel=1e-5)


def test_where_it_is_zero() -> None:
    """At λ = 1 of one axis the prediction is the network itself; a lone axis does not interact with one that is off."""
    model = two_axes(build("llama"))
    (pair,) = additivity(model, [batch()], grid=GRID).pairs
    zero, one = GRID.index(0.0), GRID.index(1.0)
    assert pair.ratio[one][zero] < 1e-9 and pair.ratio[zero][one] < 1e-9
    assert [row[zero] for row in pair.interaction if not math.isnan(row[zero])] == [0.0] * 3
    assert pair.interaction[one][one] > 0.01 and pair.interaction[one][one] == pytest.approx(pair.ratio[one][one])


def test_axes_on_the_last_layer_add_up() -> None:
    """Logits are then linear in τ, so both R are 0."""
    found = additivity(toy(["second"], ("help", "verb")), [ids()], grid=GRID)
    values = [value for rows in (found.pairs[0].ratio, found.pairs[0].interaction) for row in rows for value in row]
    assert max(value for value in values if not math.isnan(value)) < 1e-20
    assert found.verdicts()[0].finding == "fine" and "add up" in found.verdicts()[0].text


def test_axes_that_act_on_each_other() -> None:
    """Axes on one layer each: the mix has the term λ₁λ₂ D₂D₁x, which no axis alone has; R is of it alone."""
    model = toy(["first", "second"], ("help", "verb"))
    base = model.get_base_model()
    with torch.no_grad():
        for layer, axis in ((base.second, "help"), (base.first, "verb")):
            layer.get_submodule("tangent_delta")[axis].weight.zero_()
        x = base.embed(ids()["input_ids"])
        w1, w2 = base.first.get_base_layer().weight, base.second.get_base_layer().weight
        d1, d2 = base.first.get_delta_weight("help"), base.second.get_delta_weight("verb")
        f0, f1, f2, both = (x @ m.T for m in (w2 @ w1, w2 @ d1, d2 @ w1, d2 @ d1))
    (pair,) = additivity(model, [ids()], grid=[0.5]).pairs
    added = (f0 + 0.5 * f1 + 0.5 * f2).flatten(0, 1)
    actual, start = added + 0.25 * both.flatten(0, 1), f0.flatten(0, 1)
    expected = distance(actual, added) / distance(added, start)
    assert pair.ratio[0][0] == pytest.approx(expected) and pair.interaction[0][0] == pytest.approx(expected)


def test_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts as whole, and with positions by name; three axes give every pair."""
    model, inputs = two_axes(build("llama")), batch()
    model.add_adapter("safe", config("shared"))
    whole = additivity(model, [inputs], grid=[-1.0, 1.0])
    assert [(p.first, p.second) for p in whole.pairs] == [("help", "verb"), ("help", "safe"), ("verb", "safe")]
    monkeypatch.setattr(mix_logits, "PART_ENTRIES", 1)
    mask = inputs["attention_mask"].bool()
    parts = additivity(model, [TokenBatch(inputs, mask)], grid=[-1.0, 1.0])
    assert parts.tokens == whole.tokens == int(mask.sum())
    for one, other in zip(whole.pairs, parts.pairs, strict=True):
        assert np.array(one.ratio) == pytest.approx(np.array(other.ratio), rel=1e-3)
        assert np.array(one.interaction) == pytest.approx(np.array(other.interaction), rel=1e-3)


def test_no_number_within_rounding(tmp_path: Path) -> None:
    """Axes that move the model by less than bfloat16 can tell have no R, and the verdict says so."""
    model = two_axes(build("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tangent_B" in name:
                parameter.mul_(1e-5)
    found = additivity(model.to(torch.bfloat16), [batch()], grid=[0.0, 1.0])
    assert all(math.isnan(value) for row in found.pairs[0].interaction[1:] for value in row[1:])
    assert found.verdicts()[0].finding == "unknown"
    found.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["pairs"][0]["interaction"][0][0] is None
    (picture,) = found.plot(tmp_path)
    assert picture.name == "additivity-help-verb.png" and picture.stat().st_size > 1000


def test_rounding_is_not_blamed_on_the_axes() -> None:
    """Weak axes, which add up in float32, seem to act on each other in bfloat16."""
    model = two_axes(build("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tangent_B" in name:
                parameter.mul_(0.006)
    assert additivity(model, [batch()], grid=[-1.0, 1.0]).verdicts()[0].finding == "fine"
    found = additivity(model.to(torch.bfloat16), [batch()], grid=[-1.0, 1.0])
    (pair,) = found.pairs
    assert max(value for _, _, value in pair.cells(pair.interaction)) > found.limit
    assert pair.rounding == pytest.approx(np.mean(pair.missed_own), rel=0.5)
    assert found.verdicts()[0].finding == "unknown" and "measure with the base in float32" in str(found)


def test_verdict_and_picture(tmp_path: Path) -> None:
    found = additivity(two_axes(build("llama")), [batch()], grid=GRID)
    assert found.verdicts()[0].finding == "warning" and "act on each other" in str(found)
    assert len(found.tables()) == 2 and found.plot(tmp_path)[0].is_file()


def test_bad_input() -> None:
    model = two_axes(build("llama"))
    with pytest.raises(ValueError, match=r"two axes or more; found \['help'\]"):
        additivity(model, [batch()], ["help"])
    with pytest.raises(ValueError, match="`grid`"):
        additivity(model, [batch()], grid=[])
    with pytest.raises(ValueError, match="`grid`"):
        additivity(model, [batch()], grid=[math.inf])
    with pytest.raises(ValueError, match=r"`limit`.*0"):
        additivity(model, [batch()], limit=0.0)
    with pytest.raises(ValueError, match="hold no tokens"):
        additivity(model, [])
