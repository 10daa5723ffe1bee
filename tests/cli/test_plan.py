"""`tangent-peft plan`: what it prints, recommends and refuses, and that the tables of the page are its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import build
from transformers import AutoConfig

from tangent_peft import TangentConfig
from tangent_peft.cli.main import main
from tangent_peft.cli.plan import PlanOptions, make_plan, packaged_models, parse_bytes, read_config
from tangent_peft.train.sizes import model_size


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build("llama").config.save_pretrained(path)
    return path


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_folder_and_its_file_are_the_same_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--rank", "4", "--num_layers", "2")
    found = [planned(capsys, "--model", str(path), *options) for path in (folder, folder / "config.json")]
    assert found[0]["model"]["parameters"] == sum(p.numel() for p in build("llama").parameters())
    assert found[0]["engines"] == found[1]["engines"]
    for engine in found[0]["engines"]:
        assert engine["bytes"] == pytest.approx(sum(engine["terms"].values()), abs=10)


def test_the_table_says_what_the_json_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ([], ["--markdown"]):
        assert main(["plan", "--model", str(folder), "--gpus", "4", "--rank", "4", *form]) == 0
        out = capsys.readouterr().out
        for words in ("ZeRO-2", "FSDP2", "projections A", "fits", "Recipe: ddp", "--accelerate_config ddp", "--r 4"):
            assert words in out


def test_published_sizes() -> None:
    counted = {name: make_plan(PlanOptions(name)).size.parameters for name in packaged_models()}
    published = {"gpt-oss-120b": 116.83e9, "llama-3.1-70b": 70.55e9, "llama-3.1-8b": 8.03e9}
    assert counted == {name: pytest.approx(value, rel=1e-3) for name, value in published.items()}


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ({"model": "llama-3.1-8b"}, "ddp"),
        ({"model": "llama-3.1-8b", "gpus": 8, "rank": None}, "zero1"),
        ({"model": "llama-3.1-70b", "gpus": 8}, "zero3"),
        ({"model": "llama-3.1-70b", "gpus": 4, "gpu_memory": 24e9}, "zero3_offload"),
        ({"model": "llama-3.1-8b", "quantize": "4bit", "gpu_memory": 16e9}, "qlora"),
    ],
)
def test_the_simplest_engine_that_fits_is_recommended(options: dict[str, Any], recipe: str) -> None:
    plan = make_plan(PlanOptions(**options))
    assert plan.recipe == recipe and plan.command is not None and plan.seconds is None
    assert any(plan.fits(estimate) for estimate in plan.estimates)


def test_where_nothing_fits_it_says_what_would() -> None:
    plan = make_plan(PlanOptions("llama-3.1-70b", gpus=8, rank=None, axes=8, gpu_memory=24e9))
    if plan.recipe is None:
        assert plan.command is None and "GPUs" in plan.advice[0]
    tight = make_plan(PlanOptions("llama-3.1-70b", gpu_memory=4e9))
    assert tight.recipe is None and tight.command is None


def test_time_is_operations_over_the_given_rate(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    more = ("--gradient_accumulation_steps", "3")
    found = planned(capsys, "--model", str(folder), "--rank", "4", "--flop_rate", "1e12", *more)
    once = planned(capsys, "--model", str(folder), "--rank", "4")
    assert found["seconds_per_step"] == pytest.approx(3 * once["operations_per_step"] / 1e12)
    assert once["seconds_per_step"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such/model"], "packaged|name one of"),
        (["--model", "llama-3.1-8b", "--gpus", "0"], "`gpus`"),
        (["--model", "llama-3.1-8b", "--gpu_memory", "80 apples"], "80GB"),
        (["--model", "llama-3.1-8b", "--rank", "0"], "positive"),
        (["--model", "llama-3.1-8b", "--num_layers", "few"], "num_layers"),
        (["--model", "llama-3.1-8b", "--axes", "0"], "axes"),
        (["--model", "llama-3.1-8b", "--flop_rate", "-1"], "flop_rate"),
        (["--model", "llama-3.1-8b", "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert any(words in error for words in message.split("|")), error


def test_files_that_are_no_config_are_named(tmp_path: Path) -> None:
    for text, words in (
        ("{", "not JSON"),
        ("{}", "model_type"),
        ('{"model_type": "t5"}', "`t5` is no causal language model"),
    ):
        file = tmp_path / "config.json"
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            make_plan(PlanOptions(str(file)))


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("1.5 GiB", 1.5 * 2**30), ("24", 24e9), ("500mb", 5e8)])
def test_amounts_of_memory(text: str, size: float) -> None:
    assert parse_bytes(text) == size


def test_the_packaged_configs_are_read() -> None:
    assert {read_config(name).model_type for name in packaged_models()} == {"llama", "gpt_oss"}


def test_the_tables_of_the_page_are_those_of_the_command() -> None:
    spec = importlib.util.spec_from_file_location("scaling_tables", ROOT / "examples" / "scaling_tables.py")
    assert spec is not None and spec.loader is not None
    tables: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text(encoding="utf-8")
    assert len(tables.MARKED.findall(page)) == len(tables.TABLES)
    assert tables.filled(page) == page, "run: python examples/scaling_tables.py --write"


@pytest.mark.parametrize("kind", ["mamba", "jamba", "lfm2"])
def test_decoders_without_attention_in_every_block_are_named(kind: str) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=4)
    if kind == "lfm2":
        config.layer_types = ["conv", "conv", "full_attention", "conv"]
    with pytest.raises(ValueError, match=r"blocks that convolve.*not known"):
        model_size(config, TangentConfig())


def test_what_is_no_causal_language_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"`llava` is no causal language model.*text decoder"):
        model_size(AutoConfig.for_model("llava"), TangentConfig())
