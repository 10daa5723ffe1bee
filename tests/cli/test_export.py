"""`tangent-peft export`: saved axes in, an export out, the same as from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import logits
from conftest import build
from exports import INPUTS, WEIGHTS, at_weights, two_axes
from peft import LoraConfig, PeftModel, get_peft_model
from tolerances import assert_equal
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tangent_peft.cli.export import parse_rank, parse_weights
from tangent_peft.cli.main import main


pytestmark = pytest.mark.filterwarnings("ignore:The head '.*' is tied to the input embedding")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, Tensor]:
    """A folder with `base` and `axes`, and the logits of their mix."""
    folder = tmp_path_factory.mktemp("saved")
    build("llama").save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = two_axes("llama", "shared", "trained")
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "axes")
    return folder, at_weights(model, WEIGHTS)


def export(folder: Path, output: Path, *options: str) -> int:
    axes = [str(folder / "axes" / "help"), f"verb={folder / 'axes' / 'verb'}"]
    weights = ",".join(f"{name}={value}" for name, value in WEIGHTS.items())
    return main(["export", *axes, "--weights", weights, "--output", str(output), *options])


def test_lora(saved: tuple[Path, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, expected = saved
    (tmp_path / "prompts.txt").write_text("How do I boil an egg?\n\nWhat is rain?\n")
    output = tmp_path / "lora"
    assert export(folder, output, "--server", "vllm", "--prompts", str(tmp_path / "prompts.txt")) == 0
    printed = capsys.readouterr().out
    assert "LoRA of rank 8, exact" in printed and "given by the user" in printed and "--max-lora-rank 8" in printed
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert_equal(logits(PeftModel.from_pretrained(base, output).eval(), **INPUTS), expected)
    assert export(folder, output, "--rank", "0.5", "--no_calibration") == 1
    assert "overwrite=True" in capsys.readouterr().err
    assert export(folder, output, "--rank", "0.5", "--no_calibration", "--overwrite", "--head", "merge") == 0
    record = json.loads((output / "tangent_peft.json").read_text())
    assert record["relative_error"] > 0.1 and record["head"] == "merged"
    assert record["calibration"]["source"].startswith("calibration=False")


def test_merged(saved: tuple[Path, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, expected = saved
    output = tmp_path / "merged"
    assert export(folder, output, "--format", "merged", "--max_shard_size", "40KB", "--base", str(folder / "base")) == 0
    assert "with its tokenizer" in capsys.readouterr().out
    assert (output / "model.safetensors.index.json").is_file()
    assert_equal(logits(AutoModelForCausalLM.from_pretrained(output).eval(), **INPUTS), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "merged", "--rank", "8"], "--rank means nothing with --format merged"),
        (["--max_shard_size", "1GB"], "--max_shard_size means nothing with --format lora"),
        (["--prompts", "x", "--no_calibration"], "contradict"),
        (["--rank", "many"], "--rank is a number such as 16"),
        (["--rank", "0"], "`rank` is a positive integer"),
        (["--head", "refuse"], "have tangents"),
        (["--base", "nowhere/at/all/"], "nowhere"),
    ],
)
def test_what_is_refused(
    options: list[str], message: str, saved: tuple[Path, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(saved[0], tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_axes_that_are_none(saved: tuple[Path, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    out = ["--output", str(tmp_path / "out")]
    help_axis = str(saved[0] / "axes" / "help")
    for arguments, message in [
        ([str(tmp_path / "lora"), "--weights", "lora=1"], "of the type 'LORA', not a tangent axis"),
        ([str(tmp_path / "gone"), "--weights", "gone=1"], "gone"),
        ([help_axis, "--weights", "verb=1"], "--weights names ['verb'], and the axes given are ['help']"),
        ([help_axis, help_axis, "--weights", "help=1"], "Two axes are called 'help'"),
    ]:
        assert main(["export", *arguments, *out]) == 1
        assert message in capsys.readouterr().err


def test_arguments() -> None:
    assert parse_weights("help=1, verb=-0.5") == {"help": 1.0, "verb": -0.5}
    assert (parse_rank("8"), parse_rank("0.95"), parse_rank(None)) == (8, 0.95, None)
    assert isinstance(parse_rank("8"), int)
    for text in ("help", "help=", "=1", "help=x", "help=1,help=2", "", "help=1,"):
        with pytest.raises(ValueError, match=r"is a list such as help=1,verb=-0\.5"):
            parse_weights(text)
