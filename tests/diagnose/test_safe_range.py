"""The safe range: on networks whose gap is known, and what comes of storing it with its axis."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import config, tangent_model
from conftest import batch, build
from linear_toys import curvature, ids, toy
from peft import PeftModel
from strong_axes import two_axes

from tangent_peft import TangentConfig
from tangent_peft.diagnose import SafeRange, linearity_gap, safe_range, store_safe_range
from tangent_peft.tuner.safe_range import StoredRange


@pytest.mark.parametrize("limit", [0.05, 0.5, 1.3])
@pytest.mark.parametrize("tolerance", [0.2, 0.01])
def test_a_proportional_gap(limit: float, tolerance: float) -> None:
    """gap(λ) = c |λ|: the range is ±limit/c, from the safe side and to within the tolerance."""
    model = toy(["first", "second"])
    expected = limit / curvature(model)
    found = safe_range(model, [ids()], "help", limit=limit, reach=1.7 * expected, tolerance=tolerance * expected)
    for bound in (-found.low, found.high):
        assert expected - tolerance * expected <= bound <= expected + 1e-12
    assert found.low_is_bound and found.high_is_bound and found.low_is_monotone and found.high_is_monotone
    assert len(found.probes) <= 8 + 4, "a power law finds a proportional gap in one pass"


def test_at_least() -> None:
    model = toy(["first", "second"])
    found = safe_range(model, [ids()], "help", limit=2.0, reach=1.9 / curvature(model))
    assert (found.low, found.high) == (-found.reach, found.reach)
    assert not found.low_is_bound and not found.high_is_bound and len(found.probes) == 8
    linear = safe_range(toy(["second"]), [ids()], "help", reach=2.5)
    assert linear.text == "λ of help from at least −2.5 to at least 2.5 (gap ≤ 0.5)"
    assert linear.verdicts()[0].finding == "fine" or "any λ" in linear.verdicts()[0].text


@pytest.mark.parametrize("measure", ["logits", "log_probs"])
def test_a_deep_network(measure: Any) -> None:
    """The gap at the bound is within the limit, and a tolerance further it is not."""
    model = two_axes(build("llama"))
    found = safe_range(model, [batch()], "help", tolerance=0.02, measure=measure)
    assert 0.05 < found.high < 1.0 and 0.05 < -found.low < 1.0
    if measure == "logits":
        for inside, outside in ((found.high, found.high + 0.02), (found.low, found.low - 0.02)):
            for weight, safe in ((inside, True), (outside, False)):
                with model.axes(help=weight):
                    assert (linearity_gap(model, [batch()]).gap <= 0.5) == safe
    assert str(found.stored) in str(found) and model.axis_weights == {"help": 1.0}


def test_a_gap_that_does_not_rise_all_the_way() -> None:
    """f = W₂ sin(W₁x) at W₁ = 0: gap = |sin(λu) − λu| / |λu|, which falls again, beyond its first maximum."""
    model = toy(["first"], bend=torch.sin)
    base = model.get_base_model()
    with torch.no_grad():
        base.first.get_base_layer().weight.zero_()
        delta = base.first.get_submodule("tangent_delta")["help"].weight
        delta.copy_(torch.eye(6))
        base.embed.weight.fill_(1.0)
    found = safe_range(model, [ids()], "help", limit=0.5, reach=8.0, tolerance=0.01)
    crossing = 1.8954942670339809  # of sin(u)/u = 1/2
    assert crossing - 0.01 <= found.high <= crossing and crossing - 0.01 <= -found.low <= crossing
    assert not found.low_is_monotone and not found.high_is_monotone
    assert [verdict.finding for verdict in found.verdicts()] == ["fine", "unknown"]
    assert "does not rise all the way" in found.verdicts()[1].text


def test_logits_that_overflow_are_outside() -> None:
    found = safe_range(tangent_model("llama", "dense", axis="help"), [batch()], "help", limit=1e9, reach=1e39)
    assert math.isfinite(found.high) and found.high_is_bound and found.high < 1e39 and len(found.probes) < 100
    assert any(math.isinf(probe.gap) for probe in found.probes)


def test_a_bound_of_rounding_is_not_stored() -> None:
    """A weak axis in bfloat16 has a gap over the limit at small λ, and none at larger ones."""
    model = two_axes(build("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tangent_B" in name:
                parameter.mul_(0.01)
    exact = safe_range(model, [batch()], "help")
    assert not exact.high_is_bound and not exact.is_rounding
    found = safe_range(model.to(torch.bfloat16), [batch()], "help")
    assert found.high_is_bound and found.is_rounding
    assert [verdict.finding for verdict in found.verdicts()] == ["unknown"] and "bfloat16" in found.verdicts()[0].text
    with pytest.raises(ValueError, match="matter of rounding in bfloat16"):
        store_safe_range(model, found)
    assert model.peft_config["help"].safe_range is None
    assert "−0" not in found.text


@pytest.mark.parametrize(
    ("bound", "text"), [(2.996, "2.99"), (0.09996, "0.0999"), (2.1, "2.1"), (4.0, "4"), (0.0, "0"), (12.37, "12.3")]
)
def test_what_is_read_is_within_the_range(bound: float, text: str) -> None:
    stored = StoredRange(-bound, bound, True, True, limit=0.5, measure="logits", norm=1.0)
    assert f"to {text}" in str(stored) and stored.holds(float(text)) and stored.holds(-float(text))


def test_files(tmp_path: Path) -> None:
    found = safe_range(two_axes(build("llama")), [batch()], "help")
    found.save(tmp_path / "range.json")
    saved = json.loads((tmp_path / "range.json").read_text())
    assert saved["high"] == found.high and saved["verdicts"][0]["text"] == found.text
    (picture,) = found.plot(tmp_path)
    assert picture.name == "safe-range-help.png" and picture.with_suffix(".svg").is_file()


def test_bad_input() -> None:
    model = two_axes(build("llama"))
    with pytest.raises(TypeError, match="once only"):
        safe_range(model, iter([batch()]), "help")  # type: ignore[arg-type]
    for options, match in (
        ({"limit": 0.0}, "`limit`"),
        ({"reach": -1.0}, "`reach`"),
        ({"tolerance": math.nan}, "`tolerance`"),
        ({"measure": "kl"}, "`measure`"),
    ):
        with pytest.raises(ValueError, match=match):
            safe_range(model, [batch()], "help", **options)
    with pytest.raises(ValueError, match="Unknown axis"):
        safe_range(model, [batch()], "kind")


# ---- storing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> SafeRange:
    return safe_range(two_axes(build("llama")), [batch()], "help")


@pytest.fixture
def model(measured: SafeRange) -> PeftModel:
    """Two axes, `help` with its range; their configuration is one object."""
    model = two_axes(build("llama"))
    store_safe_range(model, measured)
    return model


def test_saved_and_loaded(model: PeftModel, measured: SafeRange, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "help/adapter_config.json").read_text())["safe_range"] == measured.stored.to_dict()
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "help", adapter_name="again")
    assert StoredRange.read(loaded.peft_config["again"].safe_range) == measured.stored
    with pytest.warns(UserWarning, match=r"λ = 2 for axis 'again'.*measured range, from −0\.\d+ to 0\.\d+.*weights θ"):
        loaded.combine_axes({"again": 2.0})
    record = json.loads((tmp_path / "verb/adapter_config.json").read_text())
    assert record.pop("safe_range") is None
    (tmp_path / "verb/adapter_config.json").write_text(json.dumps(record))  # as it was before there were ranges
    loaded.load_adapter(tmp_path / "verb", "old")
    assert loaded.peft_config["old"].safe_range is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.combine_axes({"old": 2.0})


def test_which_warning(model: PeftModel, measured: SafeRange) -> None:
    """Outside the range its own, one for an axis; else TS-DPO's rule beyond 3, with or without a range."""
    for mix, expected in (
        ({"help": measured.high}, []),
        ({"help": measured.high + 0.01}, ["outside its measured range"]),
        ({"help": -5.0}, ["outside its measured range"]),
        ({"verb": 2.0}, []),
        ({"verb": -3.5}, [r"mixes beyond |λ| = 3"]),
        ({"help": 9.0, "verb": 9.0}, ["outside its measured range", "mixes beyond |λ| = 3"]),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.combine_axes(mix)
        assert len(caught) == len(expected)
        for warning, text in zip(caught, expected, strict=True):
            assert text in str(warning.message) and warning.filename == __file__
    wide = StoredRange(-4.0, 4.0, True, False, limit=0.5, measure="logits", norm=model.axis_norm("help"))
    model.peft_config["help"].safe_range = wide.to_dict()
    with pytest.warns(UserWarning, match=r"mixes beyond \|λ\| = 3"):
        model.combine_axes({"help": 3.5})
    with pytest.warns(UserWarning, match="has not been measured to keep within a linearity gap of 0.5"):
        model.combine_axes({"help": 4.5})


def test_what_has_no_range(model: PeftModel, measured: SafeRange) -> None:
    """Mixes, combinations and other axes made from this one or its configuration; taking it away."""
    assert model.peft_config["verb"].safe_range is None, "the two were made from one configuration object"
    model.combine_axes({"help": 0.1, "verb": 0.1}, adapter_name="mix")
    model.combine_axes({"help": 0.1}, adapter_name="tenth")
    model.add_weighted_adapter(["help", "verb"], [0.1, 0.1], "sum")
    model.orthogonalize_axis("help", "verb", "pure")
    model.add_adapter("fresh", model.peft_config["help"])
    for axis in ("mix", "tenth", "sum", "pure", "fresh"):
        assert model.peft_config[axis].safe_range is None, axis
    assert model.peft_config["help"].safe_range == measured.stored.to_dict()
    store_safe_range(model, None, "help")
    assert model.peft_config["help"].safe_range is None


def test_it_belongs_to_one_axis(model: PeftModel, measured: SafeRange) -> None:
    model.combine_axes({"help": measured.high / 2}, adapter_name="weaker")
    with pytest.raises(ValueError, match="another axis, or was trained since"):
        store_safe_range(model, measured, "weaker")
    with pytest.raises(ValueError, match="Unknown axis 'other'"):
        store_safe_range(model, measured, "other")
    with pytest.raises(ValueError, match="Name the `axis`"):
        store_safe_range(model, None)


@pytest.mark.parametrize(
    "record",
    [{"low": -1.0}, [1], {"low": 1.0, "high": 2.0, "low_is_bound": True, "high_is_bound": True, "limit": 0.5}],
)
def test_a_damaged_record_is_named(record: Any) -> None:
    with pytest.raises(ValueError, match=r"`safe_range` holds .*adapter_config.json"):
        TangentConfig(safe_range=record)


def test_numbers_that_are_no_range() -> None:
    with pytest.raises(ValueError, match="`low` ≤ 0"):
        StoredRange(1.0, 2.0, True, True, limit=0.5, measure="logits", norm=1.0)


def test_training_drops_it(make_trainer: Any) -> None:
    model = tangent_model("llama", "shared", axis="help", init_weights=True)
    stored = StoredRange(-1.0, 1.0, True, True, limit=0.5, measure="logits", norm=0.0)
    model.peft_config["help"].safe_range = stored.to_dict()
    trainer = make_trainer(model, axis="help", max_steps=1)
    assert model.peft_config["help"].safe_range is not None, "a trainer that only evaluates leaves it"
    trainer.train()
    assert trainer.model.peft_config["help"].safe_range is None


# ---- exports ---------------------------------------------------------------------------------------------------------


def stored(model: PeftModel, axis: str, limit: float, measure: str = "logits") -> None:
    """A wide range of an axis, of this limit."""
    wide = StoredRange(-3.0, 3.0, False, False, limit=limit, measure=measure, norm=model.axis_norm(axis))
    new = TangentConfig(**{**model.peft_config[axis].to_dict(), "safe_range": wide.to_dict()})
    model.peft_config[axis] = new


@pytest.mark.parametrize("export", ["export_lora", "export_merged"])
def test_exports_warn_of_the_gap_of_the_mix(export: str, tmp_path: Path) -> None:
    """Each axis within its range, the mix over the limit; by default the limit is 0.5."""
    model = tangent_model("llama", "shared", axis="help")
    model.add_adapter("verb", config("shared"))
    run = {"export_lora": model.export_lora, "export_merged": model.export_merged}[export]
    mix = {"help": 0.5, "verb": -0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties, by `export_lora`
        warnings.filterwarnings("error", message="The linearity gap")
        gap = run(tmp_path / "quiet", mix).gap.gap
        assert gap < 0.5
        stored(model, "help", gap * 1.1)
        stored(model, "verb", gap * 0.1, measure="log_probs")  # of another gap than is measured here
        run(tmp_path / "within", mix)
    stored(model, "verb", gap * 0.9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path / "over", mix)
    assert any("over the limit of" in str(w.message) and "safe ranges are for" in str(w.message) for w in caught)
    assert any(warning.filename == __file__ and "exported mix" in str(warning.message) for warning in caught)


def test_an_export_tells_an_axis_that_has_changed(tmp_path: Path) -> None:
    model = tangent_model("llama", "shared", axis="help")
    stored(model, "help", 1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tangent_B" in name:
                parameter.mul_(1.5)
    with pytest.warns(UserWarning, match="the axis has changed since"):
        model.export_merged(tmp_path / "changed", {"help": 0.5})


def test_an_axis_that_is_off_has_no_limit(tmp_path: Path) -> None:
    model = tangent_model("llama", "shared", axis="help")
    model.add_adapter("verb", config("shared"))
    stored(model, "verb", 1e-6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The linearity gap")
        gap = model.export_merged(tmp_path / "off", {"help": 0.5, "verb": 0.0}).gap.gap
    assert 1e-6 < gap < 0.5


def test_an_export_over_half_without_a_range(tmp_path: Path) -> None:
    model = two_axes(build("llama"))
    with pytest.warns(UserWarning, match=r"over the limit of 0\.5 up to which merging is taken to be safe"):
        model.export_merged(tmp_path / "far", {"help": 1.0})
