"""docs/distributed.md names configurations, commands, options and files that exist, and every engine that is tested."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tangent_peft.cli.launch import launcher_arguments
from tangent_peft.cli.main import main
from tangent_peft.cli.train_options import find_recipe, packaged_recipes


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
ENGINES = packaged_recipes("accelerate")
each_engine = pytest.mark.parametrize("engine", list(ENGINES))


@each_engine
def test_every_configuration_is_in_both_tables(engine: str) -> None:
    assert PAGE.count(f"\n| `{engine}` |") == 2


@each_engine
def test_configuration_is_one_of_accelerate(engine: str) -> None:
    config: Any = load_config_from_file(str(ENGINES[engine]))
    assert str(config.distributed_type).rsplit(".", 1)[-1] in {"MULTI_GPU", "DEEPSPEED", "FSDP"}
    if engine.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(engine[4])
        assert config.deepspeed_config["gradient_clipping"] == "auto"


@each_engine
def test_comment_in_configuration_names_itself(engine: str) -> None:
    text = ENGINES[engine].read_text(encoding="utf-8")
    assert f"--accelerate_config {engine} " in text
    assert f"$(tangent-peft recipes {engine})" in text


def test_files_named_exist() -> None:
    named = re.findall(r"(?:tests|forward|train|docs)/[\w/]+\.(?:py|md)", PAGE)
    assert named
    for name in named:
        assert (ROOT / name).is_file() or (ROOT / "tangent_peft" / name).is_file(), name


def test_commands_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"^tangent-peft train (.*)$", PAGE, re.MULTILINE)
    found = launcher_arguments(line.split())
    before, after = found[: found.index("--module")], found[found.index("--module") :]
    assert before == ["--config_file", str(ENGINES["zero2"]), "--num_processes", "8"]
    assert after[1:3] == ["tangent_peft.cli.main", "train"]
    assert after[3:] == ["--config", "8b_single_gpu", "--dataset_name", "pairs.jsonl"]
    assert main(["recipes", "zero2"]) == 0
    assert capsys.readouterr().out.strip() == str(ENGINES["zero2"])
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in [*ENGINES, *packaged_recipes()])


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "zero4"]) == 1
    assert "'zero4' is not the name of a packaged recipe" in capsys.readouterr().err
    assert main(["train", "--accelerate_config", "zero4"]) == 1
    assert "--accelerate_config 'zero4' is neither a file nor a packaged recipe" in capsys.readouterr().err
    assert main(["train", "--accelerate_config"]) == 1
    assert "takes one value" in capsys.readouterr().err
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"distributed_type": "NO"}))
    assert find_recipe(str(own), "accelerate") == own


def test_options_of_launcher_and_training_are_told_apart() -> None:
    line = "--accelerate_config=ddp --mixed_precision no --r 4 --no_bf16 --num_machines 2 --unheard_of 1"
    found = launcher_arguments(line.split())
    at = found.index("--module")
    assert found[2:at] == ["--mixed_precision", "no", "--num_machines", "2"]
    assert found[at + 3 :] == ["--r", "4", "--no_bf16", "--unheard_of", "1"]  # refused there, by name
