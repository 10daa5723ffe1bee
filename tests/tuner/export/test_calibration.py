"""The gap that an export states, and the tokens that the base writes where the user gives none."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from cases import config, logits, tangent_model
from conftest import batch, build
from exports import WEIGHTS, two_axes
from peft import get_peft_model

from tangent_peft.tuner import linearity_gap, tangent_tuner
from tangent_peft.tuner.export.calibration import LENGTH, ROWS, base_sample, calibrate


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_sample_is_the_base_model_s(name: str) -> None:
    """The same at every call and whatever the mix, without special tokens, likelier than tokens drawn at random."""
    model = two_axes(name)
    with model.axes(help=2.0):
        ids = base_sample(tangent_tuner(model))["input_ids"]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(base_sample(tangent_tuner(model))["input_ids"], ids)
    assert torch.equal(torch.get_rng_state(), before)
    assert ids.shape == (ROWS, LENGTH) and not torch.isin(ids[:, 1:], torch.tensor([0, 2])).any()
    noise = torch.randint(3, 300, ids.shape)
    noise[:, 0] = ids[:, 0]

    def likelihood(tokens: torch.Tensor) -> float:
        scores = logits(build(name), input_ids=tokens[:, :-1]).log_softmax(-1)
        return float(scores.gather(-1, tokens[:, 1:, None]).mean())

    assert likelihood(ids) > likelihood(noise) + 0.1


def test_the_generation_config_of_the_base_is_not_in_the_way() -> None:
    model = two_axes()
    expected = base_sample(tangent_tuner(model))["input_ids"]
    settings = model.get_base_model().generation_config
    settings.update(do_sample=False, num_beams=3, max_new_tokens=2, temperature=0.1, repetition_penalty=3.0, top_k=2)
    assert torch.equal(base_sample(tangent_tuner(model))["input_ids"], expected)


def test_it_is_the_gap_of_that_mix() -> None:
    model = two_axes()
    model.train()
    model.combine_axes({"verb": 0.25})
    found = calibrate(tangent_tuner(model), WEIGHTS, [batch("left")])
    with model.axes(WEIGHTS):
        assert found.gap == linearity_gap(model, [batch("left")])
    assert found.source == "given by the user" and str(found).startswith(f"linearity gap {found.gap.gap:.3f}")
    assert model.axis_weights == {"verb": 0.25} and model.training
    sampled = calibrate(tangent_tuner(model), WEIGHTS, True)
    with model.axes(WEIGHTS):
        assert sampled.gap == linearity_gap(model, [base_sample(tangent_tuner(model))])
    assert sampled.gap.tokens == ROWS * LENGTH and "seed 0" in sampled.source


def test_what_is_not_measured_says_why() -> None:
    tuner = tangent_tuner(two_axes())
    for weights, data, reason in [
        (WEIGHTS, False, "calibration=False"),
        ({}, True, "the mix is the base"),
        ({"help": 0.0}, True, "the mix is the base"),
    ]:
        found = calibrate(tuner, weights, data)
        assert found.gap is None and reason in str(found)
    additive = tangent_tuner(get_peft_model(build("llama"), config("shared", linearize=False)))
    assert "add their weights" in str(calibrate(additive, {"default": 1.0}, True))


@pytest.mark.filterwarnings("ignore:.*head.* tied")
def test_a_weight_outside_the_safe_range_is_warned_of_once(tmp_path: Path) -> None:
    model = tangent_model("llama", "shared", axis="help")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.export_lora(tmp_path / "lora", {"help": 3.5})
    found = [entry for entry in caught if "λ = 3.5" in str(entry.message)]
    assert len(found) == 1 and found[0].filename == __file__


@pytest.mark.filterwarnings("ignore:.*head.* tied")
def test_inside_a_block_that_mixes_rows(tmp_path: Path) -> None:
    """A mix that is named is exported and measured as anywhere; rows with a mix each are no one mix."""
    model = two_axes()
    expected = calibrate(tangent_tuner(model), WEIGHTS, True)
    mixes = [{"help": 1.0}, {"verb": 2.0}]
    with model.axes(mixes):
        assert model.export_lora(tmp_path / "lora", WEIGHTS).gap == expected.gap
        with pytest.raises(ValueError, match="differs from row to row"):
            model.export_lora(tmp_path / "rows")
        ids = {"input_ids": batch()["input_ids"][:2]}
        mixed = logits(model, **ids)
    assert torch.equal(mixed, logits(model, **ids, axis_weights=mixes))
