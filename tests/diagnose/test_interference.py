"""Shifts of axes on prompts: against finite differences and torch.func; bad input; what is printed, saved and drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import config, in_float64, tangent_layers
from conftest import QUESTIONS, build
from peft import PeftModel, get_peft_model
from tolerances import assert_equal

from tangent_peft.diagnose.geometry.axes import axis_geometry
from tangent_peft.diagnose.interference.controls import scrambled
from tangent_peft.diagnose.interference.measure import _batches, _shifts, axis_interference
from tangent_peft.diagnose.interference.overlap import shift_overlap
from tangent_peft.diagnose.interference.result import InterferenceSettings
from tangent_peft.diagnose.states import ModelState


PROMPTS = [f"{question} {index}" for index in range(4) for question in QUESTIONS]  # 20
FEW = InterferenceSettings(permutations=19, batch_size=7)


def two_axes(second: str = "shared", **options: Any) -> PeftModel:
    model = get_peft_model(build("llama"), config("shared"), adapter_name="help").eval()
    model.add_adapter("verb", config(second, **options))
    return model


def states_by_hand(model: Any, tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """Layers (L + 1, N, D) at the last prompt token, one prompt at a time, by hooks on the blocks."""
    blocks, seen, rows = model.get_base_model().model.layers, [], []
    handles = [blocks[0].register_forward_pre_hook(lambda m, a: seen.append(a[0][0, -1]))]
    handles += [block.register_forward_hook(lambda m, a, y: seen.append(y[0, -1])) for block in blocks]
    for prompt in prompts:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            model(input_ids=ids)
        rows.append(torch.stack(seen))
        seen.clear()
    for handle in handles:
        handle.remove()
    return torch.stack(rows, 1)


def shifts(model: PeftModel, tokenizer: Any, kind: str) -> dict[str, torch.Tensor]:
    settings = InterferenceSettings(shift=kind, batch_size=3, controls=False)  # type: ignore[arg-type]
    found: dict[str, list[torch.Tensor]] = {"help": [], "verb": []}
    for batch in _batches(tokenizer, PROMPTS[:5], settings, ModelState.base(model)):
        for (name, _), rows in _shifts(model, ["help", "verb"], batch, settings):
            found[name].append(rows)
    return {name: torch.cat(rows, 1) for name, rows in found.items()}


def test_shifts_are_the_derivative_and_the_difference(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_float64(two_axes(), monkeypatch)
    exact, steps = shifts(model, tokenizer, "tangent"), shifts(model, tokenizer, "weights")
    with model.disable_adapter():
        base = states_by_hand(model, tokenizer, PROMPTS[:5])
    for name in ("help", "verb"):
        with model.linearized(False):
            with model.axes({name: 1.0}):
                whole = states_by_hand(model, tokenizer, PROMPTS[:5]) - base
            with model.axes({name: 1e-4}):
                up = states_by_hand(model, tokenizer, PROMPTS[:5])
            with model.axes({name: -1e-4}):
                down = states_by_hand(model, tokenizer, PROMPTS[:5])
        derivative = (up - down) / 2e-4
        assert float((exact[name] - derivative).norm() / derivative.norm()) < 1e-4
        assert float((steps[name] - whole).norm() / whole.norm()) < 1e-5
        assert float(exact[name][:2].norm()) == 0.0  # block 0 carries no tangent


def test_the_result_is_the_overlap_of_those_shifts(tokenizer: Any) -> None:
    model = two_axes()
    settings = InterferenceSettings(layers=(-1, 2), permutations=19, batch_size=7, seed=5)
    found = axis_interference(model, tokenizer, PROMPTS, settings=settings)
    assert [(p.first, p.second, p.layer) for p in found.pairs] == [("help", "verb", 2), ("help", "verb", 3)]
    assert found.layers == [2, 3] and found.prompts == 20 and found.last_layer == 3 and found.dtype == "float32"
    alone = InterferenceSettings(batch_size=20, controls=False)
    one_batch = next(iter(_batches(tokenizer, PROMPTS, alone, ModelState.base(model))))
    rows = {name: x[3].numpy() for (name, _), x in _shifts(model, ["help", "verb"], one_batch, alone)}
    expected = shift_overlap(rows["help"], rows["verb"], permutations=19, seed=5)
    assert found.pairs[1].overlap.cosine == pytest.approx(expected.cosine, abs=1e-4)
    assert found.pairs[1].overlap.cca.correlations == pytest.approx(expected.cca.correlations, abs=1e-2)
    assert found.pairs[1].norms[0] == pytest.approx(float(np.linalg.norm(rows["help"], axis=1).mean()), rel=1e-4)
    assert max(found.pairs[1].overlap.cca.directions) <= 4


def test_an_axis_and_its_multiple_are_one(tokenizer: Any) -> None:
    model = two_axes()
    model.combine_axes({"help": -2.0}, "back")
    found = axis_interference(model, tokenizer, PROMPTS, ["help", "back"], FEW)
    overlap = found.pairs[0].overlap
    assert overlap.cosine == pytest.approx(-1.0, abs=1e-5)
    assert overlap.cca.correlations == pytest.approx([1.0] * len(overlap.cca.correlations), abs=1e-3)
    assert found.pairs[0].norms[1] == pytest.approx(2 * found.pairs[0].norms[0], rel=1e-4)
    first, second = found.verdicts()
    assert first.finding == "warning" and "against each other" in first.text
    assert second.finding == "unknown" and "more than those of controls" in second.text
    assert all(control.correlation < overlap.cca.mean for control in found.pairs[0].control)
    without = InterferenceSettings(permutations=19, controls=False)
    found = axis_interference(model, tokenizer, PROMPTS, ["help", "back"], without)
    assert found.pairs[0].control == [] and "only controls" in found.verdicts()[1].text


@pytest.mark.parametrize("form", ["shared", "trained", "dense"])
def test_a_control_keeps_all_but_where_it_writes(form: str) -> None:
    model = two_axes(form)
    before = {m.place.name: m for m in axis_geometry(model).modules if m.axis == "verb"}
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with scrambled(model, "verb", 3):
        geometry = axis_geometry(model)
        for m in geometry.modules:
            if m.axis == "verb":
                assert m.ranks.values == pytest.approx(before[m.place.name].ranks.values, rel=1e-4, abs=1e-6)
        changed = [layer.delta("verb", 1.0).detach().clone() for layer in tangent_layers(model)]
    for layer, delta in zip(tangent_layers(model), changed, strict=True):
        original = layer.delta("verb", 1.0)
        assert_equal(delta.mT @ delta, original.mT @ original, 1e-4)  # what it reads, and how strongly
        assert float((delta * original).sum().abs() / original.square().sum()) < 0.5
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())


def test_a_control_is_undone_after_an_error() -> None:
    model = two_axes()
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), scrambled(model, "help", 0):
        raise KeyError
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())


def test_controls_repeat_with_the_seed(tokenizer: Any) -> None:
    model = two_axes()
    found = [
        axis_interference(model, tokenizer, PROMPTS, settings=InterferenceSettings(permutations=3, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert found[0].pairs[0].control == found[1].pairs[0].control != found[2].pairs[0].control
    assert found[0].pairs[0].overlap.cosine == found[2].pairs[0].overlap.cosine


def test_answers_take_the_mean_over_their_tokens(tokenizer: Any, pairs: Any) -> None:
    model = two_axes()
    settings = InterferenceSettings(position="answer", batch_size=3, permutations=5)
    found = axis_interference(model, tokenizer, pairs * 2, settings=settings)
    assert found.prompts == 16 and "answer" in str(found)
    broken = [{**pairs[0], "chosen": [{"role": "assistant", "content": " "}]}]
    with pytest.raises(ValueError, match="chosen answer of pair 0 is empty"):
        axis_interference(model, tokenizer, broken, settings=settings)


def test_an_axis_on_the_head_alone_moves_no_hidden_state(tokenizer: Any) -> None:
    model = two_axes("dense", target_modules=[], lm_head=True)
    found = axis_interference(model, tokenizer, PROMPTS, settings=FEW)
    assert found.pairs[0].norms[1] == 0.0 and math.isnan(found.pairs[0].overlap.cosine)
    assert [verdict.finding for verdict in found.verdicts()] == ["unknown", "unknown"]
    assert "'verb' does not move" in found.verdicts()[0].text and "zero for every prompt" in found.verdicts()[1].text


def test_few_prompts_give_a_reason(tokenizer: Any) -> None:
    found = axis_interference(two_axes(), tokenizer, PROMPTS[:6], settings=FEW)
    assert math.isnan(found.pairs[0].overlap.cca.mean) and "6 prompts are too few" in found.verdicts()[1].text
    assert math.isfinite(found.pairs[0].overlap.cosine)


def test_refuses(tokenizer: Any) -> None:
    model = two_axes()
    with pytest.raises(ValueError, match="Unknown axis 'safe'"):
        axis_interference(model, tokenizer, PROMPTS, ["help", "safe"])
    with pytest.raises(ValueError, match="in pairs"):
        axis_interference(model, tokenizer, PROMPTS, ["help"])
    with pytest.raises(ValueError, match="No prompts"):
        axis_interference(model, tokenizer, [])
    with pytest.raises(IndexError, match="Layer 9 is out of range"):
        axis_interference(model, tokenizer, PROMPTS, settings=InterferenceSettings(layers=(9,)))
    with pytest.raises(TypeError, match="PeftModel"):
        axis_interference(build("llama"), tokenizer, PROMPTS)
    with pytest.raises(ValueError, match="components=9"):
        axis_interference(model, tokenizer, PROMPTS, settings=InterferenceSettings(components=9))
    for wrong in ({"layers": ()}, {"position": "first"}, {"shift": "logits"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            InterferenceSettings(**wrong)


def test_leaves_the_model_as_it_was(tokenizer: Any) -> None:
    model = two_axes()
    model.train()
    model.combine_axes({"help": 0.5})
    axis_interference(model, tokenizer, PROMPTS[:10], settings=FEW)
    assert model.axis_weights == {"help": 0.5} and model.training


def test_prints_saves_and_draws(tokenizer: Any, tmp_path: Path) -> None:
    settings = InterferenceSettings(layers=(1, 2, 3), permutations=19, seed=2)
    found = axis_interference(two_axes(), tokenizer, PROMPTS, settings=settings)
    text = str(found)
    assert "help – verb" in text and "seed 2" in text and "N = 20" in text
    found.save(tmp_path / "out.json")
    saved = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert saved["pairs"][0]["overlap"]["cosine"] is None  # layer 1 lies below the tangents
    assert saved["pairs"][2]["overlap"]["cca"]["mean"] == found.pairs[2].overlap.cca.mean
    assert saved["settings"]["seed"] == 2
    files = found.plot(tmp_path / "figures")
    assert [file.name for file in files] == ["interference_correlations.png", "interference_depth.png"]
    assert all(file.stat().st_size > 5000 and file.with_suffix(".svg").is_file() for file in files)
