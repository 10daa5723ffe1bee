"""`tangent-peft diagnose`: what it finds, refuses before loading, reports as not done, and writes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import QUESTIONS, build, enlarge, make_llama
from peft import LoraConfig, get_peft_model
from strong_axes import two_axes
from transformers import PreTrainedTokenizerFast

from tangent_peft.cli import diagnose as command
from tangent_peft.cli.diagnose_sections import SECTIONS, Kind
from tangent_peft.cli.diagnose_stages import read_stages
from tangent_peft.cli.diagnose_subject import find_subject, load_subject
from tangent_peft.cli.main import main
from tangent_peft.compare.sequential_result import SequentialResult
from tangent_peft.diagnose.result import Diagnosis, Table, Verdict
from tangent_peft.diagnose.stages.forgetting import Conflict, Forgetting, forgetting
from tangent_peft.diagnose.stages.transfer import ObjectiveScores
from tangent_peft.evaluate.plots.drawing import drawing


@dataclass(frozen=True)
class Stub(Diagnosis):
    """A diagnosis that says what it was given."""

    title: ClassVar[str] = "Stub"
    said: str
    finding: Any = "fine"

    def tables(self) -> list[Table]:
        return [Table("Said", ["text", "number"], [[self.said, 1.5]])]

    def verdicts(self) -> list[Verdict]:
        return [Verdict(self.finding, f"{self.said} is said.")]

    def plot(self, folder: str | Path) -> list[Path]:
        with drawing(Path(folder) / "stub.png", (2, 1)) as figure:
            figure.subplots().plot([1, 2])
        return [Path(folder) / "stub.png"]


def fails() -> Diagnosis:
    raise ValueError("3 prompts are too few\nfor a fit")


def stubs() -> dict[str, Kind]:
    """One section for everything, one per axis, one that fails, one for two axes."""
    kinds = [
        Kind("linearity", "Linear", "Is it?", ("axes",), lambda inputs: [("", lambda: Stub(f"{inputs.how}"))]),
        Kind(
            "steering",
            "Steered",
            "",
            ("models",),
            lambda inputs: [(name, lambda name=name: Stub(name, "warning")) for name in inputs.models.tuned],
        ),
        Kind("spinal", "Spine", "", ("models", "pairs"), lambda inputs: [("all", fails)]),
        Kind("forgetting", "Forgotten", "", ("sequential",), lambda inputs: [("", lambda: Stub("stages"))]),
    ]
    return {kind.key: kind for kind in kinds}


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SECTIONS", stubs())


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]
) -> Path:
    """A folder with `base`, `axes`, a tuned model, a LoRA, models that do not fit, prompts and pairs."""
    folder = tmp_path_factory.mktemp("saved")

    def save(model: Any, name: str, words: Any = tokenizer) -> None:
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)

    base = build("llama")
    save(base, "base")
    model = two_axes(base)
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "axes")
    tuned = build("llama")
    for parameter in tuned.parameters():
        parameter.data += 0.01 * parameter.data.abs().mean()
    save(tuned, "tuned")
    save(enlarge(make_llama(layers=4)), "deeper")
    other = tokenizer.__class__(
        tokenizer_object=tokenizer._tokenizer, pad_token="<|pad|>", chat_template="{{ messages }}"
    )
    save(tuned, "worded", other)
    lora = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.peft_config["default"].base_model_name_or_path = str(folder / "base")
    lora.save_pretrained(folder / "lora")
    (folder / "prompts.txt").write_text("\n".join(QUESTIONS))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "empty").mkdir()
    return folder


def run(folder: Path, output: Path, *more: str, paths: tuple[str, ...] = ("axes",)) -> int:
    given = [str(folder / path) for path in paths]
    prompts = [] if "--prompts" in more else ["--prompts", str(folder / "prompts.txt")]
    return main(["diagnose", *given, "--report", str(output), *prompts, *more])


# ---- what is written and said ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stubbed")
def test_a_report(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    assert run(saved, tmp_path / "out", "--limit", "0.25", "--weights", "-1", "2", "--seed", "5") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["[warning] help is said. (steering, help)", "[warning] verb is said. (steering, verb)"]
    assert printed[2].startswith("[ok] How(limit=0.25, weights=(-1.0, 2.0), seed=5")
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [section["key"] for section in record["sections"]] == ["linearity", "steering", "spinal", "forgetting"]
    assert [section["reason"] for section in record["sections"][2:]] == [
        "Needs --pairs.",
        "Needs --sequential with a result of `tangent-peft sequential`.",
    ]
    assert record["run"]["date"] == "2001-09-09 01:46 UTC" and record["title"] == "Diagnosis of help, verb on base"
    assert record["settings"]["prompts"] == f"5 ({saved / 'prompts.txt'})"
    assert record["settings"]["seed"] == 5 and record["settings"]["dtype"] == "float32"
    assert 0 < record["run"]["peak_memory_gb"] < 64 and set(record["run"]["versions"]) >= {"torch", "tangent-peft"}
    assert len(list((tmp_path / "out" / "figures").rglob("*.png"))) == 3
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before, "an axis was touched"


@pytest.mark.usefixtures("stubbed")
def test_what_can_not_be_done_is_said_and_is_the_exit_status(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = ["--pairs", f"help={saved / 'pairs.jsonl'}"]
    assert run(saved, tmp_path / "out", *pairs) == 3
    assert "[not done] Spine, all: 3 prompts are too few for a fit" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["not_done"] == ["Spine, all: 3 prompts are too few for a fit"]
    assert "3 prompts are too few" in (tmp_path / "out" / "report.html").read_text()
    assert record["settings"]["pairs"] == f"help 8 (help={saved / 'pairs.jsonl'})"
    assert run(saved, tmp_path / "chosen", *pairs, "--sections", "steering, linearity") == 0
    record = json.loads((tmp_path / "chosen" / "report.json").read_text())
    assert [section["key"] for section in record["sections"]] == ["linearity", "steering"], "in the report's order"


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize(("paths", "base"), [(("tuned",), True), (("lora",), False), (("lora",), True)])
def test_checkpoints(saved: Path, tmp_path: Path, paths: tuple[str, ...], base: bool) -> None:
    more = ["--base", str(saved / "base")] if base else []
    assert run(saved, tmp_path / "out", *more, paths=paths) == 0
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    reasons = {section["key"]: section["reason"] for section in record["sections"]}
    assert reasons["linearity"] == "Needs tangent axes." and not reasons["steering"]
    assert [part["name"] for part in record["sections"][1]["parts"]] == [paths[0]]
    assert not record["not_done"]


def test_checkpoints_are_loaded_as_they_are(saved: Path) -> None:
    ids = torch.tensor([[1, 5, 9, 20]])
    expected = build("llama")(ids).logits
    for paths, base in [(["tuned"], "base"), (["lora"], None), (["axes"], None)]:
        found = load_subject(find_subject([str(saved / path) for path in paths], base and str(saved / base)))
        with torch.no_grad(), found.base.active() as root:
            torch.testing.assert_close(root(ids).logits, expected)
        for state in found.tuned.values():
            with torch.no_grad(), state.active() as root:
                assert (root(ids).logits - expected).abs().max() > 1e-3
    assert list(found.tuned) == ["help", "verb"]


def test_a_lora_of_another_base_is_refused(saved: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Of another depth, which PEFT loads in part; of another width; and with another tokenizer beside it."""
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(enlarge(make_llama(layers=4)), lora).save_pretrained(tmp_path / "deeper")
    get_peft_model(build("gpt2"), LoraConfig(target_modules=["c_attn"])).save_pretrained(tmp_path / "other")
    shutil.copytree(saved / "lora", tmp_path / "worded")
    for file in (saved / "worded").glob("*token*"):
        shutil.copy(file, tmp_path / "worded")
    shutil.copy(saved / "worded" / "chat_template.jinja", tmp_path / "worded")
    for name, message in (("deeper", "2 matrices are only"), ("other", "does not fit"), ("worded", "chat templates")):
        with pytest.raises(ValueError, match=message):
            load_subject(find_subject([str(tmp_path / name)], str(saved / "base")))


def test_a_checkpoint_that_is_the_working_directory_has_a_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved / "tuned")
    assert find_subject(["."], str(saved / "base")).tuned_name == "tuned"


def two_stages() -> Forgetting:
    """Two objectives of nine pairs each; the first is lost in the second stage. The numbers are drawn."""
    torch.manual_seed(3)
    lengths = torch.full((9, 2), 5)
    scores = {}
    for name, gains in {"help": (2.0, -1.0), "safe": (0.0, 2.0)}.items():
        reference = torch.randn(9, 2) - 20
        moved = [reference + torch.tensor([gain, 0.0]) + 0.3 * torch.randn(9, 2) for gain in gains]
        scores[name] = ObjectiveScores(reference, moved, lengths)
    return forgetting(scores, ["help", "safe"], 0.1, [Conflict("safe", "help", [0.1, math.nan])])


def test_a_saved_result_of_stages_is_read_back(tmp_path: Path) -> None:
    made = two_stages()
    made.save(tmp_path / "stages.json")
    (read,) = read_stages(tmp_path / "stages.json").values()
    assert read.to_dict() == made.to_dict() and read.verdicts() == made.verdicts()
    assert [str(table) for table in read.tables()] == [str(table) for table in made.tables()]


def test_memory_is_counted_in_the_unit_of_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource
    from types import SimpleNamespace

    from tangent_peft.cli import memory

    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=2**21))
    found = {}
    for name in ("linux", "darwin"):
        monkeypatch.setattr(memory.sys, "platform", name)
        found[name] = memory.peak_memory_gb()
    assert found == {"linux": 2.0, "darwin": 2.0**-9}


def test_the_result_of_a_comparison_is_read(tmp_path: Path) -> None:
    made = two_stages()
    entries = [
        {"seed": seed, "source": "ts_dpo", "order": made.stages, "verdicts": [], **made.to_dict()} for seed in (0, 1)
    ]
    SequentialResult({}, {}, [], [], entries, []).save(tmp_path / "result.json")
    read = read_stages(tmp_path / "result.json")
    assert list(read) == ["help → safe, ts_dpo, seed 0", "help → safe, ts_dpo, seed 1"]
    assert all(found.to_dict() == made.to_dict() for found in read.values())
    SequentialResult({}, {}, [], [], [], []).save(tmp_path / "empty.json")
    with pytest.raises(ValueError, match="no sequence of stages"):
        read_stages(tmp_path / "empty.json")


@pytest.mark.usefixtures("stubbed")
def test_a_report_of_stages_needs_no_model(saved: Path, tmp_path: Path) -> None:
    two_stages().save(tmp_path / "stages.json")
    assert main(["diagnose", "--sequential", str(tmp_path / "stages.json"), "--report", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [bool(section["parts"]) for section in record["sections"]] == [False, False, False, True]


@pytest.mark.usefixtures("stubbed")
def test_only_an_earlier_report_is_replaced(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(saved, tmp_path / "out") == 0
    assert run(saved, tmp_path / "out") == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert run(saved, tmp_path / "out", "--overwrite", "--title", "Again") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["title"] == "Again"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert run(saved, tmp_path / "mine", "--overwrite") == 1
    assert (tmp_path / "mine" / "thesis.tex").is_file()


def test_prompts_are_those_of_the_pairs_if_none_are_given(saved: Path, pairs: list[dict[str, Any]]) -> None:
    from tangent_peft.cli.diagnose_data import read_data

    subject = find_subject([str(saved / "axes")], None)
    data = read_data(subject, [], [f"verb={saved / 'pairs.jsonl'}"], 4)
    assert data.prompts == [row["prompt"] for row in pairs[:4]] and len(data.pairs["verb"]) == 4
    assert len(read_data(subject, [], [f"verb={saved / 'pairs.jsonl'}"], 100).prompts) == len(QUESTIONS), "each once"


def test_packaged_data_for_the_base_of_the_quickstart(saved: Path) -> None:
    from dataclasses import replace

    from tangent_peft.cli.diagnose_data import read_data
    from tangent_peft.cli.smollm2 import quickstart_pairs

    subject = replace(find_subject([str(saved / "axes")], None), base="smollm2")
    data = read_data(subject, [], [], 256)
    assert set(data.pairs) == {"help", "verb"} and data.pairs["verb"] == quickstart_pairs("verb", "heldout")
    asked = [prompt[0]["content"] for prompt in data.prompts]
    assert len(asked) == len(set(asked)) > 20
    train = {row["prompt"][0]["content"] for axis in ("help", "verb") for row in quickstart_pairs(axis, "train")}
    assert not train & set(asked)
    other = replace(subject, axes={"polite": saved})
    assert not read_data(other, [], [], 256).pairs
    elsewhere = read_data(replace(subject, base="other/base"), [], [], 5)
    assert len(elsewhere.prompts) == 5 and not elsewhere.pairs and "everyday" in elsewhere.sources["prompts"]


# ---- what is refused, before anything is loaded ----------------------------------------------------------------------


@pytest.mark.usefixtures("stubbed")
@pytest.mark.parametrize(
    ("paths", "more", "message"),
    [
        (("gone",), (), "There is no folder"),
        (("empty",), (), "is no saved axis"),
        (("axes/help", "axes/help"), (), "Two axes are called 'help'"),
        (("axes", "tuned"), (), "Give tangent axes alone, or one checkpoint"),
        (("tuned", "lora"), (), "Give tangent axes alone, or one checkpoint"),
        (("tuned",), (), "--base BASE"),
        (("deeper",), ("--base", "{}/base"), "different architecture: number of blocks 3 and 4"),
        (("worded",), ("--base", "{}/base"), "chat templates"),
        (("tuned",), ("--base", "{}/gone"), "no folder"),
        (("axes",), ("--sections", "beauty"), "--sections names ['beauty']; the sections are linearity, steering"),
        (("axes",), ("--sections", "forgetting"), "forgetting needs --sequential"),
        (("tuned",), ("--base", "{}/base", "--sections", "linearity"), "linearity needs tangent axes"),
        (("axes",), ("--sequential", "{}/gone.json"), "There is no file"),
        (("axes",), ("--sequential", "{}/axes/help/adapter_config.json"), "is no result of `tangent-peft sequential`"),
        (("axes",), ("--sequential", "{}/prompts.txt"), "can not be read as JSON"),
        (("axes",), ("--prompts", "{}/gone.txt"), "There is no file"),
        (("axes",), ("--pairs", "kind={}/pairs.jsonl"), "--pairs names ['kind']; the axes given are ['help', 'verb']"),
        (("axes",), ("--limit", "-1"), "--limit is a positive number"),
        (("axes",), ("--weights", "nan"), "λ must be finite"),
        (("tuned",), ("--base", "{}/base", "--store"), "--store keeps the safe range of axes"),
        (("axes",), ("--sections", "steering", "--store"), "--store keeps the safe range of axes"),
        ((), (), "nothing to diagnose"),
    ],
)
def test_what_is_refused(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    paths: tuple[str, ...],
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(command, "load_subject", lambda *_: pytest.fail("a model was loaded"))
    words = [word.format(saved) for word in more]
    assert run(saved, tmp_path / "out", *words, paths=paths) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("stubbed")
def test_a_date_that_is_none(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_subject", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert run(saved, tmp_path / "out") == 1


def test_a_mistake_in_the_program_is_not_taken_for_one_in_the_data(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Diagnosis:
        raise KeyError("layer")

    kind = Kind("steering", "Steered", "", ("models",), lambda inputs: [("", broken)])
    monkeypatch.setattr(command, "SECTIONS", {"steering": kind})
    with pytest.raises(KeyError):
        run(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the sections themselves -----------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, pairs: list[dict[str, Any]]) -> list[str]:
    """Options that name twenty prompts, and pairs of both axes on them."""
    asked = [f"{question} {word}" for question in QUESTIONS for word in ("Today?", "Here?", "Why?", "Now?")]
    rows = [
        {**pairs[index % len(pairs)], "prompt": [{"role": "user", "content": text}]} for index, text in enumerate(asked)
    ]
    for name, shift in {"help": 0, "verb": 5}.items():
        moved = [{**row, "chosen": rows[(i + shift) % len(rows)]["chosen"]} for i, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in moved))
    (tmp_path / "prompts.txt").write_text("\n".join(asked))
    files = [f"{name}={tmp_path / name}.jsonl" for name in ("help", "verb")]
    return ["--prompts", str(tmp_path / "prompts.txt"), "--pairs", *files]


@pytest.mark.slow
def test_every_section_of_axes(saved: Path, tmp_path: Path, data: list[str]) -> None:
    """All sections on a tiny model, then some again, stored: the same numbers, one field of a config changed."""
    shutil.copytree(saved / "axes", tmp_path / "axes")
    two_stages().save(tmp_path / "stages.json")
    given = [str(tmp_path / "axes"), *data, "--weights", "-1", "1"]
    configs = {axis: tmp_path / "axes" / axis / "adapter_config.json" for axis in ("help", "verb")}
    before = {path: path.read_bytes() for path in (tmp_path / "axes").rglob("*") if path.is_file()}
    whole = ["--sequential", str(tmp_path / "stages.json"), "--report", str(tmp_path / "first")]
    assert main(["diagnose", *given, *whole]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "axes").rglob("*") if path.is_file()} == before
    again = ["--sections", "linearity,interference", "--store", "--report", str(tmp_path / "second")]
    assert main(["diagnose", *given, *again]) == 0

    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "second"))
    made = {section["key"]: [part["result"] for part in section["parts"]] for section in first["sections"]}
    assert list(made) == list(SECTIONS) and all(all(results) for results in made.values())
    assert not first["not_done"] and not second["not_done"]
    for section in second["sections"]:
        assert [part["result"] for part in section["parts"]] == made[section["key"]]
    figures = [file for file in second["files"] if file.startswith("figures")]
    assert len(figures) >= 6
    for name in figures:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert (tmp_path / "first" / "attached" / "steering-verb-at-1" / "steering_prompt.safetensors").is_file()

    ranges = {result["axis"]: result for result in made["linearity"][1:]}
    for axis, path in configs.items():
        old, new = json.loads(before[path]), json.loads(path.read_text())
        stored = new.pop("safe_range")
        assert {**new, "safe_range": None} == {"safe_range": None, **old}
        assert (stored["low"], stored["high"]) == (ranges[axis]["low"], ranges[axis]["high"])
        assert stored["norm"] == ranges[axis]["norm"] > 0
    assert {path for path in before if path.read_bytes() != before[path]} == set(configs.values())
    with pytest.warns(UserWarning, match="outside its measured range"):
        load_subject(find_subject([str(tmp_path / "axes")], None))


def test_every_section_of_a_checkpoint_without_pairs(saved: Path, tmp_path: Path) -> None:
    asked = ["--prompts", *(f"{question} {word}" for question in QUESTIONS for word in ("Today?", "Here?"))]
    given = [str(saved / "tuned"), "--base", str(saved / "base"), *asked]
    assert main(["diagnose", *given, "--report", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    made = {section["key"]: [part["name"] for part in section["parts"]] for section in record["sections"]}
    assert {key: names for key, names in made.items() if names} == {"steering": ["tuned"], "spinal": ["tuned"]}
    (shift,) = [s["parts"][0]["result"] for s in record["sections"] if s["key"] == "steering"]
    assert (shift["count"], shift["held_out"]) == (8, 2), "a quarter is held out without pairs, too"


def test_too_few_prompts_are_said(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(saved / "axes"), "--prompts", "Why is it so?", "--sections", "interference,steering,geometry"]
    assert main(["diagnose", *given, "--report", str(tmp_path / "out")]) == 3
    assert "[not done] Steering vectors (D-STEER), help at λ = 1" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert next(s for s in record["sections"] if s["key"] == "geometry")["parts"][0]["result"]
