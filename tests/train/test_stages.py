"""Stages: one adapter trained on, both orders, resumed as if never stopped."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT_RUN, build
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from tangent_peft import TangentConfig
from tangent_peft.train.sequential import (
    STAGE,
    Objective,
    SequentialSetup,
    StageRecord,
    run_orders,
    run_stage,
    run_stages,
)


ADAPTERS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
    "tangent": TangentConfig(task_type="CAUSAL_LM", r=2, num_layers=1),
}
KINDS = tuple(ADAPTERS)


@pytest.fixture
def setup(tokenizer: Any) -> Callable[..., SequentialSetup]:
    """Makes a setup of two short steps per stage."""

    def make(kind: str, **options: Any) -> SequentialSetup:
        own = {"max_steps": 2, "learning_rate": 1e-2, "conflict_batch_size": 2, "conflict_steps": 1, "warmup_steps": 0}
        return SequentialSetup(lambda: (build("llama"), tokenizer), ADAPTERS[kind], {**SHORT_RUN, **own, **options})

    return make


@pytest.fixture
def objectives(pairs: list[dict[str, Any]]) -> list[Objective]:
    turned = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in pairs]
    data = {"help": pairs, "curt": turned}
    return [Objective(n, Dataset.from_list(rows[:4]), Dataset.from_list(rows[4:])) for n, rows in data.items()]


def weights(folder: str | Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(Path(folder) / "adapter_model.safetensors")
    return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_both_orders(kind: str, setup: Any, objectives: Any, tmp_path: Path) -> None:
    seen = []

    def evaluate(model: Any, tokenizer: Any, names: Any) -> Any:
        assert isinstance(model, PeftModel)
        assert not model.training
        seen.append(list(names))
        return {"norm": math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters() if p.requires_grad))}

    found = run_orders(setup(kind), objectives, tmp_path, evaluate)
    assert list(found) == ["help-curt", "curt-help"]
    assert seen == [["help", "curt"]] * 2 + [["curt", "help"]] * 2
    for order, (first, second) in found.items():
        assert Path(first.folder) == tmp_path / order / f"1-{first.objective}"
        assert {path.name for path in Path(second.folder).iterdir()} >= {"adapter_config.json", STAGE}
        assert not (Path(second.folder) / "run").exists()
        assert first.conflicts == []
        assert [(one.step, one.previous) for one in second.conflicts] == [(0, first.objective), (1, first.objective)]
        assert second.movement is not None
        assert first.movement is not None
        assert second.movement.norm_before == pytest.approx(first.movement.norm_after, rel=1e-6), "it trained on"
        assert second.movement.moved > 0
        assert distance(weights(first.folder), weights(second.folder)) > 0
        assert second.evaluation["norm"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(kind: str, setup: Any, objectives: Any, tmp_path: Path) -> None:
    whole = run_stages(setup(kind), objectives, tmp_path / "a")
    run_stages(setup(kind), objectives[:1], tmp_path / "b")
    (tmp_path / "b" / ".2-curt.dead.partial").mkdir()  # what a process that was killed leaves
    resumed = run_stages(setup(kind), objectives, tmp_path / "b")
    assert distance(weights(whole[1].folder), weights(resumed[1].folder)) == 0
    assert [one.cosine for one in whole[1].conflicts] == [one.cosine for one in resumed[1].conflicts]
    again = run_stages(setup(kind), objectives, tmp_path / "b")
    assert again[1].seconds == resumed[1].seconds, "it was read, not run"
    assert again[1].movement == resumed[1].movement


def test_a_projected_second_stage_goes_elsewhere(setup: Any, objectives: Any, tmp_path: Path) -> None:
    plain = run_stages(setup("lora"), objectives, tmp_path / "plain")
    projected = run_stages(setup("lora", project_conflicts=True), objectives, tmp_path / "projected")
    assert distance(weights(plain[0].folder), weights(projected[0].folder)) == 0
    assert distance(weights(plain[1].folder), weights(projected[1].folder)) > 0
    assert projected[1].conflicts[0].projected


def test_a_failed_stage_leaves_nothing(setup: Any, objectives: Any, tmp_path: Path) -> None:
    def evaluate(*unused: Any) -> Any:
        raise RuntimeError("the evaluation broke")

    with pytest.raises(RuntimeError, match="the evaluation broke"):
        run_stages(setup("lora"), objectives, tmp_path, evaluate)
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_not_taken_for_these(setup: Any, objectives: Any, tmp_path: Path) -> None:
    run_stages(setup("lora"), objectives[:1], tmp_path)
    with pytest.raises(ValueError, match="another 'training option learning_rate'"):
        run_stages(setup("lora", learning_rate=1.0), objectives[:1], tmp_path)
    other = [replace(objectives[0], train=objectives[1].train)]
    with pytest.raises(ValueError, match="another 'pairs'"):
        run_stages(setup("lora"), other, tmp_path)


def test_bad_input(setup: Any, objectives: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sets \\['axis'\\]"):
        setup("tangent", axis="help")
    with pytest.raises(ValueError, match="Each objective is a stage"):
        run_stages(setup("lora"), [objectives[0]] * 2, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no adapter to train on"):
        run_stage(setup("lora"), objectives, tmp_path / "2", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no finished stage"):
        StageRecord.read(tmp_path)
    run_stages(setup("lora"), objectives[:1], tmp_path)
    (tmp_path / "1-help" / STAGE).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        run_stages(setup("lora"), objectives[:1], tmp_path)
    shutil.rmtree(tmp_path / "1-help")
    (tmp_path / "1-help").mkdir()
    (tmp_path / "1-help" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError):
        run_stages(setup("lora"), objectives[:1], tmp_path)


def test_records_keep_what_is_not_a_number(setup: Any, objectives: Any, tmp_path: Path) -> None:
    record = run_stages(setup("lora"), objectives[:1], tmp_path)[0]
    assert record.movement is not None
    assert math.isnan(record.movement.relative), "from B = 0"
    assert math.isnan(StageRecord.read(record.folder).movement.relative)  # type: ignore[union-attr]
    assert torch.isfinite(torch.tensor(record.movement.moved))
