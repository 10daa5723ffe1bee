"""`tangent-peft train` on a tiny model on disk and local files: what it trains, what it refuses, how it is started."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from tangent_peft import TangentConfig, TangentDPOConfig, TangentDPOTrainer
from tangent_peft.cli.main import main
from tangent_peft.cli.train import load_pairs
from tangent_peft.cli.train_options import (
    LORA,
    AxisArguments,
    ModelArguments,
    find_recipe,
    packaged_recipes,
    parse_train_options,
)


ROOT = Path(__file__).resolve().parents[2]
STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3}
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, pairs: Any) -> Path:
    """A folder with the model, `pairs.jsonl`, and `data/{train,test}.jsonl`."""
    folder = tmp_path_factory.mktemp("workplace")
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (folder / "pairs.jsonl").write_text("".join(lines))
    (folder / "data" / "train.jsonl").write_text("".join(lines[:6]))
    (folder / "data" / "test.jsonl").write_text("".join(lines[6:]))
    return folder


def write_recipe(workplace: Path, path: Path, **changes: Any) -> str:
    """A recipe that trains two steps, and its path; a change to `None` drops the key."""
    source = {"path": "json", "data_files": str(workplace / "pairs.jsonl")}
    axis = {"axis": "help", "r": 4, "num_layers": 2}
    recipe = {"model_name_or_path": str(workplace / "model"), "datasets": [source], **axis, **STEPS, **CPU, **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    return str(path)


def weights(folder: Path | str, workplace: Path, axis: str = "help") -> dict[str, torch.Tensor]:
    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    model = PeftModel.from_pretrained(base, str(folder), adapter_name=axis)
    return get_peft_model_state_dict(model, adapter_name=axis)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def script(workplace: Path, output: Path, pairs: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """The same run, written in Python."""
    init = {"dtype": "float32"}
    trainer = TangentDPOTrainer(
        model=str(workplace / "model"),
        args=TangentDPOConfig(str(output), axis="help", model_init_kwargs=init, **{**STEPS, **CPU, **changes}),
        train_dataset=Dataset.from_list(pairs),
        peft_config=TangentConfig(task_type="CAUSAL_LM", r=4, num_layers=2),
    )
    trainer.train()
    return {
        name: x.detach().clone() for name, x in get_peft_model_state_dict(trainer.model, adapter_name="help").items()
    }


# ---- what it trains --------------------------------------------------------------------------------------------------


def test_trains_what_the_script_trains(
    workplace: Path, tmp_path: Path, pairs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output = write_recipe(workplace, tmp_path / "recipe.yaml"), tmp_path / "out"
    assert main(["train", "--config", recipe, "--output_dir", str(output)]) == 0
    said = capsys.readouterr().out
    assert str(output / "help") in said and "combine_axes({'help': 1.0})" in said
    saved = weights(output / "help", workplace)
    assert any(value.abs().max() > 0 for value in saved.values())
    assert_same(saved, script(workplace, tmp_path / "script", pairs))


def test_what_it_prints_can_be_run(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(workplace, tmp_path / "recipe.yaml", output_dir=str(tmp_path / "out"), max_steps=1)
    assert main(["train", "--config", recipe]) == 0
    said = capsys.readouterr().out
    names: dict[str, Any] = {}
    exec("\n".join(line[4:] for line in said.splitlines() if line.startswith("    ")), names)
    assert names["model"].axis_weights == {"help": 1.0}


def test_unnamed_axis_lies_in_the_output_directory(workplace: Path, tmp_path: Path) -> None:
    recipe = write_recipe(workplace, tmp_path / "recipe.yaml", axis=None, max_steps=1)
    assert main(["train", "--config", recipe, "--output_dir", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out", workplace, axis="default")


def test_options_win_over_the_recipe(workplace: Path, tmp_path: Path) -> None:
    recipe = write_recipe(workplace, tmp_path / "recipe.yaml", beta=0.3)
    options = parse_train_options(["--config", recipe, "--r", "none", "--max_steps=7", "--no_lm_head"])
    assert options.axis.r is None and not options.axis.lm_head and options.axis.num_layers == 2
    assert options.training.max_steps == 7 and options.training.beta == 0.3
    assert parse_train_options([f"--config={recipe}"]).axis.r == 4


def test_evaluates_on_the_test_split(workplace: Path, tmp_path: Path) -> None:
    recipe = write_recipe(workplace, tmp_path / "recipe.yaml", datasets=None, eval_strategy="steps", eval_steps=1)
    output = tmp_path / "out"
    more = ["--dataset_name", str(workplace / "data"), "--output_dir", str(output), "--save_strategy", "steps"]
    assert main(["train", "--config", recipe, *more]) == 0
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    assert sum("eval_loss" in entry for entry in state["log_history"]) == 2


@pytest.mark.parametrize("name", ["pairs.jsonl", "data"])
def test_splits_by_itself_and_the_same_way_again(workplace: Path, name: str) -> None:
    line = [f"--dataset_name={workplace / name}", "--test_split_size=0.5", "--eval_strategy=epoch", *AS_ON_A_CPU]
    parts = [load_pairs(parse_train_options(line)) for _ in range(2)]
    assert len(parts[0][0]) == len(parts[0][1]) == (4 if name == "pairs.jsonl" else 3)
    assert parts[0][1].to_list() == parts[1][1].to_list()


def test_resumes(workplace: Path, tmp_path: Path, pairs: Any) -> None:
    """Two steps, then two more from the checkpoint, are four steps at once."""
    output, steps = tmp_path / "out", {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    recipe = write_recipe(workplace, tmp_path / "recipe.yaml", output_dir=str(output), **steps)
    assert main(["train", "--config", recipe]) == 0
    first = weights(output / "help", workplace)
    assert main(["train", "--config", recipe, "--max_steps", "4", "--resume_from_checkpoint", "true"]) == 0
    resumed = weights(output / "help", workplace)
    assert not all(torch.equal(value, first[name]) for name, value in resumed.items())
    whole = script(workplace, tmp_path / "script", pairs, **{**steps, "max_steps": 4})
    assert_same(resumed, whole)
    by_path = ["--resume_from_checkpoint", str(output / "checkpoint-2"), "--output_dir", str(tmp_path / "again")]
    assert main(["train", "--config", recipe, "--max_steps", "4", *by_path]) == 0
    assert_same(weights(tmp_path / "again" / "help", workplace), whole)


# ---- what it refuses -------------------------------------------------------------------------------------------------

AS_ON_A_CPU = ["--use_cpu", "--bf16", "false", "--report_to", "none"]


def failure(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that the command leaves on standard error."""
    assert main(["train", *line]) == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("tangent-peft: ")]
    assert len(lines) == 1 and not said.out, said
    return lines[0]


REFUSED = {
    "LoRA's rank": (["--lora_r", "16"], "`lora_r` is an option for LoRA; use `r`"),
    "LoRA's switch": (["--use-peft"], "`use_peft` is an option for LoRA; leave it out"),
    "a typing error": (["--max_step", "3"], "unknown option `max_step`; did you mean `max_steps`?"),
    "no option at all": (["pairs.jsonl"], "'pairs.jsonl' belongs to no option"),
    "not a number": (["--r", "many"], "--r: invalid int value: 'many'"),
    "not a choice": (["--projection", "random"], "--projection: invalid choice: 'random'"),
    "not a rank": (["--r", "0"], "`r` is a positive integer"),
    "not ranks": (["--r", "4", "--rank_pattern", "lm_head"], "`rank_pattern` maps names to ranks"),
    "two sources": (["--dataset_name", "elsewhere"], "use one of them"),
    "no checkpoint": (["--resume_from_checkpoint", "true"], "holds no checkpoint"),
    "a stream to be split": (["--streaming", "--test_split_size", "0.5"], "or do not stream"),
    "unfit for tangents": (["--torch_compile", "true"], "torch_compile=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_the_command_line(
    case: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(workplace, tmp_path / "recipe.yaml", output_dir=str(tmp_path / "out"))
    options, words = REFUSED[case]
    assert words in failure(["--config", recipe, *options], capsys)


REFUSED_IN_A_RECIPE: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA's rank": ({"lora_r": 16}, "`lora_r` is an option for LoRA; use `r`"),
    "a typing error": ({"num_layer": 2}, "unknown option `num_layer`; did you mean `num_layers`?"),
    "half a step": ({"max_steps": 2.5}, "--max_steps"),
    "not a choice": ({"dtype": "float23"}, "--dtype: 'float23' is not one of auto, bfloat16"),
    "no model": ({"model_name_or_path": None}, "no model to train"),
    "a model that is not there": ({"model_name_or_path": "./nowhere"}, "'./nowhere' could not be loaded"),
    "another file": ({"datasets": None, "dataset_name": __file__}, "known are .json, .jsonl"),
    "no data": ({"datasets": None}, "no data to train on"),
    "data that is not there": ({"datasets": None, "dataset_name": "./nowhere"}, "nowhere"),
    "a file that is not there": ({"datasets": [{"path": "json", "data_files": "nowhere.jsonl"}]}, "nowhere.jsonl"),
    "a source of unknown keys": ({"datasets": [{"path": "json", "files": "a"}]}, "found {'files': 'a', 'path'"),
    "no list of sources": ({"datasets": "pairs.jsonl"}, "found 'pairs.jsonl'"),
    "no split": ({"eval_strategy": "steps", "eval_steps": 1}, "has the splits ['train'], not 'test'"),
}


@pytest.mark.parametrize("case", REFUSED_IN_A_RECIPE)
def test_refused_in_a_recipe(
    case: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, words = REFUSED_IN_A_RECIPE[case]
    assert words in failure(["--config", write_recipe(workplace, tmp_path / "recipe.yaml", **changes)], capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question": "a"}\n', "columns `chosen` and `rejected`"),
        ('{"chosen": "a", "rejected": \n', "could not be read"),
    ],
)
def test_refuses_other_rows(
    text: str, words: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    recipe = write_recipe(workplace, tmp_path / "recipe.yaml", datasets=None, dataset_name=str(tmp_path / "rows.jsonl"))
    assert words in failure(["--config", recipe], capsys)


def test_refuses_what_is_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "smollm2_cpu" in failure(["--config", "smollm3"], capsys)
    assert "smollm2_cpu" in failure(["--config"], capsys)
    for text in ("r: [1", "- r\n"):
        (tmp_path / "recipe.yaml").write_text(text)
        assert "recipe.yaml" in failure(["--config", str(tmp_path / "recipe.yaml")], capsys)


def test_refuses_the_checkpoint_of_another_axis(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "output_dir": str(tmp_path / "out")}
    recipe = write_recipe(workplace, tmp_path / "recipe.yaml", **changes)
    assert main(["train", "--config", recipe]) == 0
    capsys.readouterr()
    line = ["--config", recipe, "--axis", "verb", "--resume_from_checkpoint", "true"]
    assert "no weights of the axis 'verb'" in failure(line, capsys)


def test_every_option_of_lora_is_refused() -> None:
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    assert {name for name in names if "lora" in name or "peft" in name or "dora" in name} == LORA.keys()
    offered = {f.name for f in dataclasses.fields(ModelArguments) if f.init}
    assert offered == names - LORA.keys()


# ---- the options of an axis, and the recipes -------------------------------------------------------------------------


def test_options_of_an_axis_are_those_of_its_configuration() -> None:
    config = TangentConfig.__dataclass_fields__
    for option in dataclasses.fields(AxisArguments):
        assert option.name in config
    assert AxisArguments().tangent_config() == TangentConfig(task_type="CAUSAL_LM")
    # For tests, for another method, written by itself, measured afterwards.
    elsewhere = {"init_weights", "linearize", "base_fingerprint", "safe_range"}
    own = {name for name in config if name not in TangentConfig.__mro__[1].__dataclass_fields__}
    assert {option.name for option in dataclasses.fields(AxisArguments)} == own - elsewhere


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["mlp.up_proj"], {"mlp.up_proj"}),
        (["all-linear"], "all-linear"),
        ([r".*\.[qk]_proj"], r".*\.[qk]_proj"),
    ],
)
def test_modules_are_names_or_an_expression(words: list[str], expected: Any, tmp_path: Path) -> None:
    line = [*AS_ON_A_CPU, "--target_modules", *words]
    assert parse_train_options(line).axis.target_modules == expected
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target_modules": words[0] if len(words) == 1 else words}))
    recipe = ["--config", str(tmp_path / "recipe.yaml"), *AS_ON_A_CPU]
    assert parse_train_options(recipe).axis.target_modules == expected


def test_a_bare_no_is_a_word(tmp_path: Path) -> None:
    """YAML reads it as false, which `bf16` wants and a strategy does not."""
    (tmp_path / "recipe.yaml").write_text("eval_strategy: no\nsave_strategy: no\nbf16: no\nuse_cpu: yes\n")
    training = parse_train_options(["--config", str(tmp_path / "recipe.yaml")]).training
    assert training.eval_strategy == training.save_strategy == "no" and training.bf16 is False


def test_ranks_by_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("r: 4\nrank_pattern: {lm_head: 2}\n")
    recipe = ["--config", str(tmp_path / "recipe.yaml"), *AS_ON_A_CPU]
    assert parse_train_options(recipe).axis.rank_pattern == {"lm_head": 2}
    line = [*recipe, "--rank_pattern", '{"lm_head": 3}', "--layers_to_transform", "0", "2"]
    axis = parse_train_options(line).axis
    assert axis.rank_pattern == {"lm_head": 3} and axis.layers_to_transform == [0, 2]


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_parse(name: str) -> None:
    options = parse_train_options(["--config", name, "--use_cpu"])
    assert options.axis.r and options.model.model_name_or_path and options.training.learning_rate is None
    assert find_recipe(name) == packaged_recipes()[name]


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_train(name: str, workplace: Path, tmp_path: Path) -> None:
    """One step each, on the CPU, of a model that leaves room for a rank of 4."""
    places = [f"--model_name_or_path={workplace / 'model'}", f"--dataset_name={workplace / 'pairs.jsonl'}"]
    small = ["--max_steps", "1", "--r", "4", "--gradient_accumulation_steps", "1", "--use_cpu"]
    line = ["train", "--config", name, *places, *small, "--axis", "polite", f"--output_dir={tmp_path}"]
    assert main(line) == 0
    assert weights(tmp_path / "polite", workplace, axis="polite")


def test_documentation(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs and the recipe that docs/cli.md prints, with another model; then resumed as it says there."""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for kind, name in (("json", "pairs.jsonl"), ("yaml", "recipe.yaml")):
        (tmp_path / name).write_text(page.split(f"```{kind}\n")[1].split("```")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    line = ["train", "--config", "recipe.yaml", "--model_name_or_path", str(workplace / "model")]
    assert main(line) == 0
    assert (tmp_path / "polite" / "polite" / "adapter_model.safetensors").is_file()
    assert main([*line, "--resume_from_checkpoint", "polite/checkpoint-4", "--max_steps", "16"]) == 0
    assert (tmp_path / "polite" / "checkpoint-16").is_dir()
    assert main([*line, "--resume_from_checkpoint", "true", "--max_steps", "18"]) == 0


# ---- how it is started -----------------------------------------------------------------------------------------------


def start(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_trl_is_imported_only_to_train(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tangent_peft.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert not {'trl', 'datasets'} & sys.modules.keys()\n"
    )
    for line in (["--help"], ["quickstart", "--help"]):
        ended = start([sys.executable, "-c", code, *line], tmp_path)
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert "quickstart" in ended.stdout


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "--config" in said
    for name in ("r", "num_layers", "axis", "beta", "learning_rate", "model_name_or_path", "dataset_name"):
        assert f"--{name}" in said
    assert "lora" not in said.replace("qlora", "")  # the name of a recipe


@pytest.mark.slow
def test_starts_as_a_module_and_by_accelerate(workplace: Path, tmp_path: Path) -> None:
    """A plain process, one under accelerate, and two under torchrun, of which the first alone reports."""
    recipe = write_recipe(workplace, tmp_path / "recipe.yaml", max_steps=1)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    commands = {
        "module": [sys.executable],
        "accelerate": launch,
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    for name, command in commands.items():
        line = ["-m", "tangent_peft.cli.main", "train", "--config", recipe, "--output_dir", name]
        ended = start([*command, *line], tmp_path)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ended.stdout.count("The axis 'help' is in") == 1
    assert_same(weights(tmp_path / "accelerate" / "help", workplace), weights(tmp_path / "module" / "help", workplace))
    arguments = torch.load(tmp_path / "torchrun" / "training_args.bin", weights_only=False)
    assert arguments.parallel_mode.value == "distributed"
    assert weights(tmp_path / "torchrun" / "help", workplace)
