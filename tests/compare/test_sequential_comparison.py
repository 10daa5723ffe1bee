"""Sequences against axes trained apart, on a tiny model: what is shared, what is scored, what is said."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tangent_peft.cli.main import main
from tangent_peft.cli.sequential import read_settings, run
from tangent_peft.cli.train_options import packaged_recipes
from tangent_peft.compare.sequential import conflict_pairs, run_sequential
from tangent_peft.compare.sequential_report import figures, markdown
from tangent_peft.compare.sequential_result import SequentialResult
from tangent_peft.compare.sequential_settings import SequentialSettings
from tangent_peft.compare.training import read_pairs
from tangent_peft.evaluate.preferences import pair_logps


def write_axes(folder: Path, pairs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Two objectives that want the opposite: the second has every pair's answers exchanged."""
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    found = {}
    for axis, rows in {"kind": list(pairs), "curt": turned}.items():
        (folder / axis).mkdir(parents=True)
        for name, part in (("train", rows[:4]), ("test", rows)):
            text = "".join(json.dumps({**row, "prompt": marked(row, name)}) + "\n" for row in part)
            (folder / axis / f"{name}.jsonl").write_text(text)
        found[axis] = str(folder / axis)
    return found


def marked(row: dict[str, Any], split: str) -> Any:
    """The prompt, another one in each split."""
    return [{"role": "user", "content": f"{row['prompt'][0]['content']} {'!' if split == 'train' else ''}"}]


@pytest.fixture(scope="module")
def settings(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]
) -> SequentialSettings:
    folder = tmp_path_factory.mktemp("sequential")
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return SequentialSettings(
        model=str(folder / "model"),
        axes=write_axes(folder / "data", pairs),
        output=str(folder / "run"),
        dtype="float32",
        rank=2,
        lora_rank=2,
        num_layers=2,
        steps=3,
        batch_size=4,
        beta=0.5,
        learning_rates={"ts_dpo": 3e-2, "lora_soup": 3e-2},
        heldout=4,
        conflict_steps=1,
        conflict_pairs=4,
        scoring_batch=4,
    )


@pytest.fixture(scope="module")
def result(settings: SequentialSettings) -> SequentialResult:
    return run_sequential(settings)


SOURCES = ("ts_dpo linearized", "ts_dpo merged", "lora_soup")


def system(result: SequentialResult, source: str, name: str) -> dict[str, Any]:
    return next(s for s in result.systems if (s["source"], s["name"]) == (source, name))


def test_every_system_is_there(result: SequentialResult) -> None:
    assert {s["source"] for s in result.systems} == set(SOURCES)
    for source in SOURCES:
        found = {s["name"]: s["kind"] for s in result.systems if s["source"] == source}
        assert found == {
            "kind": "one stage",
            "curt": "one stage",
            "λ = (1, 1)": "combined",
            "λ = (0.5, 0.5)": "combined",
            "kind-curt": "sequential",
            "curt-kind": "sequential",
        }
    assert len(result.forgetting) == len(SOURCES) * 2
    assert len(result.stages) == 2 * 2


def test_a_second_stage_begins_where_the_first_one_ended(settings: Any, result: SequentialResult) -> None:
    folder = Path(settings.output) / "seed-0"
    for stage in result.stages:
        first, second = stage["trained"]
        model = AutoModelForCausalLM.from_pretrained(settings.model)
        apart = PeftModel.from_pretrained(model, folder / f"{stage['method']}-{first}", adapter_name="a")
        apart.load_adapter(folder / f"sequential-{stage['method']}-{first}-{second}", adapter_name="b")
        deltas = {}
        for name in "ab":
            apart.set_adapter(name)
            merged: Any = _merged(apart, name)
            deltas[name] = torch.cat([merged[k] - v for k, v in _plain(settings).items() if k in merged]).double()
        moved = float((deltas["b"] - deltas["a"]).norm() / deltas["a"].norm())
        assert stage["movement"]["relative"] == pytest.approx(moved, rel=1e-3)


def _plain(settings: Any) -> dict[str, torch.Tensor]:
    state = AutoModelForCausalLM.from_pretrained(settings.model).state_dict()
    return {name: x.flatten() for name, x in state.items() if "lm_head" not in name}


def _merged(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    import copy

    merged = copy.deepcopy(model).merge_and_unload(adapter_names=[adapter])
    return {name: x.flatten() for name, x in merged.state_dict().items()}


def test_opposed_objectives_undo_each_other(result: SequentialResult) -> None:
    """Trained apart with ΔW of opposite sign they cancel at λ = (1, 1); one after the other, the last one wins."""
    for source in ("ts_dpo linearized", "lora_soup"):
        alone = system(result, source, "kind")["margin"]["kind"]["mean"]
        assert alone > 0
        both = system(result, source, "λ = (1, 1)")["margin"]["kind"]["mean"]
        assert abs(both) < 0.7 * alone
        after = system(result, source, "kind-curt")["margin"]["kind"]["mean"]
        assert after < alone
    for stage in result.stages:
        assert all(one["cosine"] < 0.5 for one in stage["conflicts"])


def test_scores_are_those_of_the_saved_adapters(
    settings: Any, result: SequentialResult, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = AutoModelForCausalLM.from_pretrained(settings.model)
    rows = read_pairs(settings.test_set("curt"))[: settings.heldout]
    reference, lengths = pair_logps(base, tokenizer, rows)
    folder = Path(settings.output) / "seed-0" / "sequential-lora_soup-kind-curt"
    logps, _ = pair_logps(PeftModel.from_pretrained(base, folder), tokenizer, rows)
    gains = (logps - reference).double()
    margins = settings.beta * (gains[:, 0] - gains[:, 1])
    found = system(result, "lora_soup", "kind-curt")
    assert found["margin"]["curt"]["mean"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert found["preference"]["curt"]["mean"] == pytest.approx(float(margins.sigmoid().mean()), abs=1e-4)
    diagnosis = next(d for d in result.forgetting if (d["source"], d["order"]) == ("lora_soup", ["kind", "curt"]))
    cell = next(s for s in diagnosis["standings"] if (s["objective"], s["stage"]) == ("curt", "curt"))
    per_token = (logps / lengths).double()
    assert cell["margin"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert cell["policy_margin"] == pytest.approx(float((per_token[:, 0] - per_token[:, 1]).mean()), abs=1e-4)


def test_differences_are_paired(result: SequentialResult) -> None:
    for found in result.differences:
        source, name = _parts(found["combined"])
        other, order = _parts(found["sequential"])
        first, second = system(result, source, name), system(result, other, order)
        for axis in ("kind", "curt"):
            expected = first["preference"][axis]["mean"] - second["preference"][axis]["mean"]
            assert found["preference"][axis]["mean"] == pytest.approx(expected)
        worst = [min(s["preference"][axis]["mean"] for axis in ("kind", "curt")) for s in (first, second)]
        assert found["preference"]["worst"] == pytest.approx(worst[0] - worst[1])
    # each source with itself, and linearized axes with a sequential LoRA: two combinations, two orders
    assert len(result.differences) == (3 + 1) * 2 * 2


def _parts(label: str) -> tuple[str, str]:
    source = next(source for source in SOURCES if label.startswith(source))
    return source, label.removeprefix(f"{source} ")


def test_held_out_pairs_of_conflicts_are_neither_trained_nor_scored_on(settings: Any) -> None:
    found = {json.dumps(row) for row in conflict_pairs(settings, 0, "kind")}
    train = {json.dumps(row) for row in read_pairs(settings.training_set("kind"))}
    scored = {json.dumps(row) for row in read_pairs(settings.test_set("kind"))[:4]}
    assert len(found) == 4
    assert not found & (train | scored)
    with pytest.raises(ValueError, match="'kind' has 0 pairs that no axis is trained or scored on"):
        conflict_pairs(replace(settings, heldout=8), 0, "kind")


def test_held_out_pairs_of_conflicts_are_of_no_other_axis_either(settings: Any, pairs: Any, tmp_path: Path) -> None:
    """The second axis trains on pairs that are held out for the first one, with the answers exchanged."""
    axes = write_axes(tmp_path, pairs)
    rows = [json.loads(line) for line in (tmp_path / "kind" / "test.jsonl").read_text().splitlines()][4:6]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "curt" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    found = conflict_pairs(replace(settings, axes=axes, conflict_pairs=2), 0, "kind")
    prompts = [row["prompt"] for row in found]
    assert len(found) == 2
    assert not any(row["prompt"] in prompts for row in rows)


def test_saves_reads_prints_and_draws(settings: Any, result: SequentialResult, tmp_path: Path) -> None:
    result.save(tmp_path / "result.json")
    again = SequentialResult.load(tmp_path / "result.json")
    assert again.systems == json.loads(json.dumps(result.systems))
    text = markdown(again)
    assert "kind → curt" in text
    assert "Implied preference, combined minus sequential" in text
    assert "nan" not in text.lower()
    assert text == markdown(result)
    drawn = figures(result, tmp_path / "figures")
    assert len(drawn) == 1 + len(SOURCES) * 2, "fewer than 8 pairs, so no quartiles"
    assert all(path.is_file() for path in drawn)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="its `format` is not"):
        SequentialResult.load(tmp_path / "other.json")


def test_gradients_are_reported_by_earlier_objective(result: SequentialResult) -> None:
    """Two that cancel, and steps at which there is no number."""
    conflicts = [
        {"previous": name, "cosine": cosine, "agreement": 0.25, "step": 0, "projected": False}
        for name, cosine in (("kind", 0.5), ("curt", -0.5), ("kind", math.nan), ("kind", 0.3), ("curt", None))
    ]
    stage = {**result.stages[0], "trained": ["kind", "curt", "new"], "conflicts": conflicts}
    stage["movement"] = {"relative": math.nan, "cosine": None}
    line = next(line for line in markdown(replace(result, stages=[stage])).splitlines() if "kind → curt → new" in line)
    assert "kind: +0.400 (2; +0.250); curt: -0.500 (1; +0.250) | – | – |" in line


def test_a_run_goes_on_where_it_was(settings: Any, result: SequentialResult, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime for path in Path(settings.output).rglob("*.safetensors")}
    again = run(settings, 1, Console(file=(tmp_path / "out.txt").open("w")))
    assert {path: path.stat().st_mtime for path in Path(settings.output).rglob("*.safetensors")} == before
    assert again.systems == result.systems
    assert (Path(settings.output) / "report.md").is_file()
    with pytest.raises(ValueError, match="holds another run: conflict_steps"):
        run_sequential(replace(settings, conflict_steps=2))


def test_bad_settings(settings: Any) -> None:
    for change, message in (
        ({"methods": ("dpo_mixed", "task_vectors")}, "sequences are trained of ts_dpo, lora_soup"),
        ({"combined": ((1.0,),)}, "give one finite λ for each"),
        ({"combined": ((1.0, math.nan),)}, "give one finite λ for each"),
        ({"combined": ()}, "`combined` is empty"),
        ({"conflict_pairs": 3}, "even number of at least 2; found 3"),
        ({"conflict_steps": 0}, "at least 1; found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(settings, **change)


def test_the_packaged_recipe_is_complete(tmp_path: Path) -> None:
    assert "smollm2_cpu" in packaged_recipes("sequential")
    found = read_settings("smollm2_cpu", {"output": tmp_path, "model": "m"})
    assert list(found.axes) == ["help", "verb"]
    assert all(len(read_pairs(found.test_set(axis))) >= found.heldout for axis in found.axes)
    assert len(conflict_pairs(found, 0, "help")) >= found.conflict_pairs
    assert np.prod([found.steps, found.batch_size]) == found.training_size


def test_a_wrong_recipe_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["sequential", "nothing", "--output", str(tmp_path)]) == 1
    assert "packaged ones are smollm2_cpu" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text("model: m\naxes: quickstart\noutput: o\nconflict_step: 3\n")
    assert main(["sequential", str(tmp_path / "r.yaml")]) == 1
    assert "did you mean `conflict_steps`?" in capsys.readouterr().err
