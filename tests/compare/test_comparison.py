"""A whole comparison on a tiny model: every method is trained and scored alike, and a run goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import build
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tangent_peft.cli.compare import parse_axes, read_settings, run_compare
from tangent_peft.cli.train_options import packaged_recipes
from tangent_peft.compare import ComparisonResult, Settings, run_comparison, trainings
from tangent_peft.compare.report import figures, markdown
from tangent_peft.compare.result import _by_item
from tangent_peft.compare.run import RUN, run_jobs
from tangent_peft.compare.sources import score, score_file, sources
from tangent_peft.compare.training import read_pairs
from tangent_peft.evaluate import axis_logprobs
from tangent_peft.evaluate.pairs import pair_batch
from tangent_peft.evaluate.pareto import hypervolume


pytestmark = pytest.mark.filterwarnings("ignore:λ = .* mixes beyond:UserWarning")  # the line goes there on purpose


def write_axes(folder: Path, pairs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Two axes on the same pairs, the second one with every other pair's answers exchanged."""
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if index % 2 else row
        for index, row in enumerate(pairs)
    ]
    found = {}
    for axis, rows in {"polite": list(pairs), "other": turned}.items():
        (folder / axis).mkdir(parents=True)
        for name, part in (("train", rows[:6]), ("test", rows[4:])):
            (folder / axis / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        found[axis] = str(folder / axis)
    return found


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]
) -> tuple[Settings, ComparisonResult]:
    folder = tmp_path_factory.mktemp("comparison")
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = Settings(
        model=str(folder / "model"),
        axes=write_axes(folder / "data", pairs),
        output=str(folder / "run"),
        seeds=(0, 1),
        dtype="float32",
        lora_rank=2,
        num_layers=2,
        steps=2,
        batch_size=3,
        learning_rates={"ts_dpo": 1e-3, "task_vectors": 1e-3, "dpo_mixed": 1e-3, "lora_soup": 1e-2},
        line=(-1.0, 1.0, 4.0),
        affine=(0.0, 0.5, 1.0, 2.0),
        scoring_batch=3,
    )
    return settings, run_comparison(settings)


Finished = tuple[Settings, ComparisonResult]


def test_every_method_is_there(finished: Finished) -> None:
    _, result = finished
    found = {point["source"] for point in result.points}
    assert found == {"ts_dpo linearized", "ts_dpo merged", "task_vectors", "dpo_mixed", "lora_soup", "mod"}
    assert len(result.trainings) == 2 * (2 + 2 + 2 + 3)
    assert {training["pairs"] for training in result.trainings} == {6}, "the same budget"
    mixed = [point["weights"] for point in result.points if point["source"] == "dpo_mixed" and point["seed"] == 0]
    assert len(mixed) == 3 + 2, "trained at three shares, and the ends of Task-Vector DPO"
    for point in result.points:
        if not point["weights"]:
            assert set(point["accuracy"].values()) == set(point["preference"].values()) == {0.5}, "the base model"
        assert ("gap" in point) == point["source"].startswith("ts_dpo")


def test_the_baselines_are_what_they_say(finished: Finished, tokenizer: PreTrainedTokenizerFast) -> None:
    """At one axis alone the logit mix and the weights are the same model."""
    settings, _ = finished
    weights, logits = score(settings, 0, "task_vectors"), score(settings, 0, "mod")
    row = weights.mixes.index({"polite": 1.0})
    torch.testing.assert_close(weights.logps[row], logits.logps[row], rtol=1e-4, atol=1e-3)
    blend = weights.mixes.index({"polite": 0.5, "other": 0.5})
    assert not torch.allclose(weights.logps[blend], logits.logps[blend], atol=1e-6)


def test_linearized_scores_are_those_of_the_axes(finished: Finished, tokenizer: PreTrainedTokenizerFast) -> None:
    settings, _ = finished
    found = score(settings, 1, "ts_dpo linearized")
    folder = Path(settings.output) / "seed-1"
    base = AutoModelForCausalLM.from_pretrained(settings.model)
    model = PeftModel.from_pretrained(base, folder / "ts_dpo-polite", adapter_name="polite")
    model.load_adapter(folder / "ts_dpo-other", adapter_name="other")
    rows = [json.loads(line) for line in settings.test_set("polite").read_text().splitlines()]
    for number, pair in enumerate(rows):
        scores = axis_logprobs(model, pair_batch(tokenizer, [pair]), ["polite", "other"])
        torch.testing.assert_close(found.logps[:, number], scores.logps(found.mixes), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.reference[number], scores.reference(), rtol=1e-4, atol=1e-3)


def test_fronts_are_those_of_the_points(finished: Finished) -> None:
    settings, result = finished
    regime = result.fronts["preference"]["all"]
    assert regime["reference"] == {"polite": 0.4, "other": 0.4}
    for source, found in regime["hypervolume"].items():
        for seed, volume in zip(settings.seeds, found["seeds"], strict=True):
            points = [
                [point["preference"][axis] for axis in settings.axes]
                for point in result.points
                if point["source"] == source and point["seed"] == seed
            ]
            assert volume == pytest.approx(hypervolume(np.array(points), [0.4, 0.4]), abs=1e-5)
    assert len(result.control["preference"]["ts_dpo linearized"]["polite"]) == 2
    assert "dpo_mixed" not in result.control["policy"]
    assert set(result.safety["preference"]) == {"limits", "polite", "other"}
    assert result.fronts["accuracy"]["convex"]["points"]["dpo_mixed"] == 5
    assert result.cosine["ts_dpo linearized"][0][0][0] == pytest.approx(1)


def test_a_run_goes_on_where_it_was(finished: Finished, tmp_path: Path) -> None:
    settings, result = finished
    copied = tmp_path / "run"
    shutil.copytree(settings.output, copied)
    again = replace(settings, output=str(copied))
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.safetensors")}
    score_file(again, 0, "task_vectors").unlink()
    shutil.rmtree(trainings(again, 1)[2].folder(again))
    done: list[tuple[str, int, int]] = []
    repeated = run_comparison(again, report=lambda *step: done.append(step))
    assert done[-1][1:] == (30, 30)
    assert repeated.points == result.points and repeated.fronts == result.fronts
    unchanged = {path for path, time in before.items() if path.is_file() and path.stat().st_mtime_ns == time}
    assert len(unchanged) == len(before) - 2
    assert not list(copied.rglob(".*")), "nothing unfinished is left"


def test_another_run_is_refused(finished: Finished, tmp_path: Path) -> None:
    settings, _ = finished
    with pytest.raises(ValueError, match=r"holds another run: steps is 2 there and 3 here"):
        run_comparison(replace(settings, steps=3))
    copied = tmp_path / "data"
    shutil.copytree(Path(settings.axes["polite"]).parent, copied)
    with (copied / "polite" / "train.jsonl").open("a") as file:
        file.write('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    held = json.loads((Path(settings.output) / RUN).read_text())
    assert held["settings"]["steps"] == 2
    axes = {axis: str(copied / axis) for axis in settings.axes}
    with pytest.raises(ValueError, match="holds another run"):
        run_comparison(replace(settings, axes=axes))
    with pytest.raises(FileNotFoundError, match="tangent-peft data"):
        run_comparison(replace(settings, axes=dict.fromkeys(settings.axes, "nowhere"), output=str(tmp_path / "new")))


def test_result_file(finished: Finished, tmp_path: Path) -> None:
    _, result = finished
    result.save(tmp_path / "new" / "result.json")
    assert asdict(ComparisonResult.load(tmp_path / "new" / "result.json")) == json.loads(json.dumps(asdict(result)))
    (tmp_path / "other.json").write_text('{"format": "tangent_peft sweep"}')
    with pytest.raises(ValueError, match="`format` is not"):
        ComparisonResult.load(tmp_path / "other.json")
    (tmp_path / "half.json").write_text('{"format": "tangent')
    with pytest.raises(ValueError, match="can not be read as JSON"):
        ComparisonResult.load(tmp_path / "half.json")


def test_report_and_figures(finished: Finished, tmp_path: Path) -> None:
    _, result = finished
    text = markdown(result)
    for name in ("TS-DPO, linearized", "Task-Vector DPO", "LoRA soup", "DPO-Mixed", "MOD", "reference point 0.4"):
        assert name in text
    made = figures(result, tmp_path)
    assert len(made) == 2 * 1 + 2 * 2
    assert all(path.is_file() and path.with_suffix(".svg").is_file() for path in made)


def test_three_axes(finished: Finished, tmp_path: Path) -> None:
    settings, _ = finished
    axes = {**settings.axes, "third": settings.axes["polite"]}
    three = replace(
        settings, axes=axes, output=str(tmp_path / "three"), methods=("ts_dpo",), seeds=(0,), line=(1.0,), divisions=3
    )
    result = run_comparison(three)
    assert sources(three) == ["ts_dpo linearized", "ts_dpo merged"]
    assert sources(replace(three, evaluations=("linearized",))) == ["ts_dpo linearized"]
    assert len(result.points) == 2 * (1 + 10)
    made = figures(result, tmp_path / "figures")
    assert len([path for path in made if path.name.startswith("simplex")]) == 4


def test_the_command(finished: Finished, tmp_path: Path) -> None:
    settings, result = finished
    held = {**asdict(settings), "methods": list(settings.methods), "seeds": [0, 1]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(held)), sort_keys=False))
    found = read_settings(str(tmp_path / "recipe.yaml"), {"seeds": [0, 1]})
    assert found == settings
    console = Console(record=True, width=200)
    again = run_compare(found, 1, console)
    assert again.points == result.points
    folder = Path(settings.output)
    assert ComparisonResult.load(folder / "result.json").fronts == json.loads(json.dumps(result.fronts))
    assert "Hypervolume" in (folder / "report.md").read_text()
    assert "result.json" in console.export_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x\n", "did you mean `model`"),
        ("model: x\n", r"lacks \['axes', 'output'\]"),
        ("- a\n", "holds no keys"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(str(tmp_path / "recipe.yaml"), {})
    with pytest.raises(FileNotFoundError, match="neither a file nor a packaged recipe"):
        read_settings(str(tmp_path / "none.yaml"), {})


@pytest.mark.parametrize("recipe", packaged_recipes("compare"))
def test_packaged_recipes(recipe: str) -> None:
    axes = parse_axes(["help=data/help", "verb=data/verb"])
    assert read_settings(recipe, {"axes": axes, "output": "o"}).axes == axes
    with pytest.raises(ValueError, match=r"lacks \['axes', 'output'\]"):
        read_settings(recipe, {})


@pytest.mark.parametrize("texts", [["help"], ["help="], ["=x"], ["help=a", "help=b"]])
def test_bad_axes(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="NAME=FOLDER"):
        parse_axes(texts)


def test_scores_of_other_adapters_are_made_again(finished: Finished, tmp_path: Path) -> None:
    settings, _ = finished
    shutil.copytree(settings.output, tmp_path / "run")
    again = replace(settings, output=str(tmp_path / "run"))
    before = score(again, 0, "ts_dpo linearized")
    adapter = next((tmp_path / "run" / "seed-0" / "ts_dpo-polite").rglob("adapter_model.safetensors"))
    save_file({name: 2 * x for name, x in load_file(adapter).items()}, adapter, {"format": "pt"})
    after = score(again, 0, "ts_dpo linearized")
    assert not torch.equal(before.logps, after.logps)
    row, double = (before.mixes.index(mix) for mix in ({"polite": 1.0}, {"polite": 4.0}))
    assert after.notes["gap"][row] > before.notes["gap"][row] and before.notes["gap"][double] > before.notes["gap"][row]
    score_file(again, 0, "mod").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is damaged"):
        score(again, 0, "mod")
    adapter.unlink()
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        score(again, 0, "ts_dpo merged")


def test_axes_that_share_their_pairs_are_drawn_together() -> None:
    scores = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones((2, 3))}
    assert _by_item(scores, shared=True).shape == (2, 2, 3)
    assert [x.shape for x in _by_item(scores, shared=False)] == [(2, 3), (2, 3)]


def test_two_processes(finished: Finished, tmp_path: Path) -> None:
    settings, result = finished
    again = replace(settings, output=str(tmp_path / "run"), methods=("ts_dpo",), seeds=(1,))
    expected = [point for point in result.points if point["source"].startswith("ts_dpo") and point["seed"] == 1]
    assert run_comparison(again, processes=2).points == expected


def test_a_job_that_fails_in_its_process(tmp_path: Path) -> None:
    jobs = [("reading", read_pairs, (tmp_path / "none.jsonl",)), ("ending", os._exit, (3,))]
    with pytest.raises(FileNotFoundError, match=r"none.jsonl"):
        list(run_jobs(jobs[:1], 2))
    with pytest.raises(OSError, match=r"'ending' was ended from outside \(exit status 3\)"):
        list(run_jobs(jobs[1:], 2))
