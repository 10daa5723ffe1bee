"""θ(λ) as an ordinary model: what plain transformers loads is the mix, and nothing of the model in memory changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import config, logits, tangent_model
from conftest import MODELS, batch, build, make_llama
from exports import INPUTS, WEIGHTS, at_weights, two_axes
from peft import get_peft_model
from safetensors.torch import load_file
from tolerances import assert_equal
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tangent_peft import TangentConfig
from tangent_peft.tuner.export.atomic import files_in
from tangent_peft.tuner.layer import TangentLayer


pytestmark = pytest.mark.filterwarnings("ignore:The head '.*' is tied to the input embedding")


@pytest.fixture(autouse=True)
def _untied_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "untied", lambda: make_llama(tied=False))


@pytest.mark.parametrize("forms", [("dense", "shared"), ("trained", "shared")])
@pytest.mark.parametrize("name", ["llama", "untied", "qwen3", "gpt2"])
def test_merged(name: str, forms: tuple[str, str], tmp_path: Path) -> None:
    model = two_axes(name, *forms)
    expected = at_weights(model, WEIGHTS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = model.get_base_model().config.to_dict()
    linearized = logits(model, **INPUTS)
    model.export_merged(tmp_path, WEIGHTS)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any("tangent" in key for key in load_file(tmp_path / "model.safetensors"))
    assert_equal(logits(loaded.eval(), **INPUTS), expected)
    assert torch.equal(loaded.get_input_embeddings().weight, build(name).get_input_embeddings().weight)
    assert loaded.config.tie_word_embeddings is False  # the head has a tangent
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.get_base_model().config.to_dict() == settings
    assert model.axis_weights == {"help": 1.0}
    assert torch.equal(logits(model, **INPUTS), linearized)


def test_merged_keeps_the_tie_of_an_unchanged_head(tmp_path: Path) -> None:
    model = tangent_model("llama", "dense", lm_head=False)
    model.export_merged(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.tie_word_embeddings
    assert_equal(logits(loaded, **INPUTS), at_weights(model, {"default": 1.0}))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_merged_exports_the_active_mix_and_the_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = two_axes()
    model.combine_axes(WEIGHTS)
    model.export_merged(tmp_path, tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_equal(logits(loaded, **INPUTS), at_weights(model, WEIGHTS))
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_merged_empty_mix_is_the_base(tmp_path: Path) -> None:
    model = two_axes()
    model.export_merged(tmp_path, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, **INPUTS), logits(build("llama"), **INPUTS))


def test_merged_keeps_the_dtype_and_the_generation_config(tmp_path: Path) -> None:
    base = build("llama").bfloat16()
    base.generation_config.max_new_tokens = 17
    model = get_peft_model(base, config("shared")).eval()
    model.export_merged(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config.max_new_tokens == 17
    assert_equal(logits(loaded, **INPUTS), at_weights(model, {"default": 1.0}))


@pytest.mark.filterwarnings("ignore:The head is tied")
def test_merged_rounds_once(tmp_path: Path) -> None:
    """Three axes on a bfloat16 base: every weight is the nearest to the sum, exported and merged in memory."""
    base = build("untied").to(torch.bfloat16)
    model = get_peft_model(base, config("dense"), adapter_name="help")
    model.add_adapter("verb", config("trained"))
    model.add_adapter("terse", config("shared"))
    weights = {"help": 0.7, "verb": -0.6, "terse": 0.9}
    expected, summed = {}, {}
    for layer in (module for module in model.modules() if isinstance(module, TangentLayer)):
        weight = layer.get_base_weight().double()
        for name, scale in weights.items():
            factors = layer.factors(name, 1.0)
            dense = factors.b.double() @ factors.a.double() if factors.dense is None else factors.dense.double()
            weight = weight + scale * layer._layout(dense).detach()
        expected[layer.weight_name] = weight.to(torch.bfloat16)
        summed[layer.weight_name] = layer
    model.export_merged(tmp_path, weights, calibration=False)
    written = load_file(tmp_path / "model.safetensors")
    model.combine_axes(weights)
    model.merge_adapter()
    for found in (written, {name: layer.get_base_weight() for name, layer in summed.items()}):
        same = torch.cat([(found[name] == weight).flatten() for name, weight in expected.items()])
        assert same.double().mean() > 0.999
    assert all(written[name].dtype == torch.bfloat16 for name in expected)


def test_merged_beside_an_axis_that_keeps_modules(tmp_path: Path) -> None:
    model = two_axes()
    model.add_adapter("third", config("shared", modules_to_save=["model.norm", "embed_tokens"]))
    expected = at_weights(model, WEIGHTS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.mul_(2.0)
    model.export_merged(tmp_path, WEIGHTS)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal(logits(loaded.eval(), **INPUTS), expected)


def test_merged_is_sharded(tmp_path: Path) -> None:
    model = two_axes()
    model.export_merged(tmp_path / "merged", WEIGHTS, max_shard_size="40KB")
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 60_000 for path in shards[1:])
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_equal(logits(loaded, **INPUTS), at_weights(model, WEIGHTS))


def test_merged_finds_the_tokenizer_of_its_base(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    result = get_peft_model(base, config("shared")).export_merged(tmp_path / "without", calibration=False)
    assert not result.tokenizer and "without a tokenizer" in str(result)
    tokenizer.save_pretrained(tmp_path / "base")
    result = get_peft_model(base, config("shared")).export_merged(tmp_path / "with", calibration=False)
    assert result.tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / "with").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["", "nobody/nothing", "a folder/that is/gone"])
def test_a_base_whose_name_leads_nowhere(name: str, tmp_path: Path) -> None:
    model = two_axes()
    model.get_base_model().name_or_path = name
    assert not model.export_merged(tmp_path / "merged", calibration=False).tokenizer


def test_merged_classifier(tmp_path: Path) -> None:
    base = LlamaForSequenceClassification(make_llama().config).eval()
    model = get_peft_model(base, config("shared", task_type=None)).eval()
    result = model.export_merged(tmp_path / "merged")
    assert result.gap is None and "writes no text" in str(result)
    measured = model.export_merged(tmp_path / "measured", calibration=[batch()])
    assert measured.gap is not None and 0 < measured.gap.gap < 1
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with model.linearized(False):
        assert_equal(logits(loaded, **batch()), logits(model, **batch()))


# ---- what both exports state and refuse ------------------------------------------------------------------------------


EXPORTS = ["export_merged", "export_lora"]


@pytest.mark.parametrize("verb", EXPORTS)
def test_record_and_card(verb: str, tmp_path: Path) -> None:
    model = two_axes("untied", "shared", "dense", lm_head=False)
    model.get_base_model().name_or_path = "me/base"
    export = getattr(model, verb)(tmp_path / "out", WEIGHTS)
    record = json.loads((tmp_path / "out" / "tangent_peft.json").read_text())
    assert record["kind"] == verb.removeprefix("export_") == export.kind and record["format"] == 1
    assert record["weights"] == WEIGHTS and record["evaluation"] == "weights"
    shared = {"r": 4, "projection": "shared", "projection_seed": 0, "linearize": True}
    assert record["axes"]["help"] == shared and record["axes"]["verb"]["r"] is None
    assert record["base"]["fingerprint"] == model.peft_config["help"].base_fingerprint
    assert record["base"]["name"] == "me/base" and record["base"]["dtype"] == "float32"
    assert record["calibration"]["gap"]["gap"] == export.gap.gap > 0
    assert set(record["files"]) == files_in(tmp_path / "out")
    assert set(record["versions"]) == {"tangent_peft", "torch", "transformers", "peft"}
    card = (tmp_path / "out" / "README.md").read_text()
    stated = [
        "0.7·help",
        "λ_verb = -1.3",
        "rank 4, shared projection (seed 0)",
        "dense",
        "me/base",
        f"{export.gap.gap:.3f}",
    ]
    for words in [*stated, record["base"]["fingerprint"][:32], "not linearized", record["versions"]["tangent_peft"]]:
        assert words in card, words
    if verb == "export_lora":
        assert record["rank"] == 16 and record["vllm_flags"] == "--enable-lora --max-lora-rank 16"
        assert record["relative_error"] == export.relative_error and f"{export.relative_error:.2e}" in card


@pytest.mark.parametrize("verb", EXPORTS)
class TestErrors:
    @pytest.mark.filterwarnings("ignore:The head is tied")
    def test_merged_model(self, verb: str, tmp_path: Path) -> None:
        model = two_axes()
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            getattr(model, verb)(tmp_path)

    def test_disabled_adapters(self, verb: str, tmp_path: Path) -> None:
        """The gap would be that of the base, 0."""
        model = two_axes()
        with model.disable_adapter():
            for weights in (WEIGHTS, None):
                with pytest.raises(ValueError, match=r"Adapters are disabled.*disable_adapter.*enable_adapter_layers"):
                    getattr(model, verb)(tmp_path / "out", weights)
        model.disable_adapter_layers()
        with pytest.raises(ValueError, match="Adapters are disabled"):
            getattr(model, verb)(tmp_path / "out", WEIGHTS)
        assert not (tmp_path / "out").exists()
        model.enable_adapter_layers()
        assert getattr(model, verb)(tmp_path / "out", WEIGHTS).gap.gap > 0

    def test_modules_to_save(self, verb: str, tmp_path: Path) -> None:
        model = tangent_model("llama", "shared", modules_to_save=["model.norm"])
        with pytest.raises(ValueError, match=r"model\.norm"):
            getattr(model, verb)(tmp_path)

    def test_unknown_axis(self, verb: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Unknown axis 'nobody'"):
            getattr(two_axes(), verb)(tmp_path, {"nobody": 1.0})

    def test_a_file_in_the_way(self, verb: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError, match="is a file"):
            getattr(two_axes(), verb)(tmp_path / "file")

    def test_a_folder_in_the_way(self, verb: str, tmp_path: Path) -> None:
        model = two_axes()
        model.save_pretrained(tmp_path / "axes")
        before = {path: path.read_bytes() for path in (tmp_path / "axes").rglob("*") if path.is_file()}
        for overwrite, message in [(False, "overwrite=True"), (True, "no earlier export")]:
            with pytest.raises(FileExistsError, match=message):
                getattr(model, verb)(tmp_path / "axes", overwrite=overwrite)
        assert {path: path.read_bytes() for path in (tmp_path / "axes").rglob("*") if path.is_file()} == before

    def test_an_earlier_export_is_replaced_on_request(self, verb: str, tmp_path: Path) -> None:
        model = two_axes()
        getattr(model, verb)(tmp_path / "out", {"help": 1.0}, calibration=False)
        with pytest.raises(FileExistsError, match="overwrite=True"):
            getattr(model, verb)(tmp_path / "out", {"help": 2.0}, calibration=False)
        assert '"help": 1.0' in (tmp_path / "out" / "tangent_peft.json").read_text()
        getattr(model, verb)(tmp_path / "out", {"help": 2.0}, calibration=False, overwrite=True)
        assert '"help": 2.0' in (tmp_path / "out" / "tangent_peft.json").read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_axis_saved_into_an_export(self, verb: str, tmp_path: Path) -> None:
        """Overwriting would delete it; so would it one of the name "default", which goes to the folder itself."""
        for axis in ("verb", "default"):
            model, out = tangent_model("llama", "shared", axis=axis), tmp_path / axis
            getattr(model, verb)(out, calibration=False)
            model.save_pretrained(out)
            before = {name: (out / name).read_bytes() for name in files_in(out)}
            with pytest.raises(FileExistsError, match=r"LOADING\.md|adapter_config\.json"):
                getattr(model, verb)(out, calibration=False, overwrite=True)
            assert {name: (out / name).read_bytes() for name in files_in(out)} == before

    def test_the_base_of_the_axes(self, verb: str, tmp_path: Path) -> None:
        """Known of the model, or of an axis that was loaded."""
        tangent_model("llama", "shared").export_lora(tmp_path / "out", head="merge", calibration=False)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
        model = get_peft_model(base, config("shared", lm_head=False))
        for name in (base.name_or_path, ""):
            base.name_or_path = name
            assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "out" / "base")
            for place, message in [("out", r"The base model '.*base'.*lies in"), ("out/base", "no earlier export")]:
                with pytest.raises(FileExistsError, match=message):
                    getattr(model, verb)(tmp_path / place, calibration=False, overwrite=True)
        assert (tmp_path / "out" / "base" / "model.safetensors").is_file()

    def test_a_model_over_itself(self, verb: str, tmp_path: Path) -> None:
        tangent_model("llama", "shared").export_merged(tmp_path / "out", calibration=False)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        with pytest.raises(FileExistsError, match=r"The base model '.*out'.*lies in"):
            getattr(get_peft_model(base, config("shared")), verb)(tmp_path / "out", calibration=False, overwrite=True)

    def test_a_failure_in_the_middle(self, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The weights are written, the card is not: the old export is still there, and nothing of the new one."""
        model = two_axes()
        getattr(model, verb)(tmp_path / "out", {"help": 1.0}, calibration=False)
        before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

        def full_disk(*args: object) -> None:
            raise OSError(28, "No space left on device")

        module = f"tangent_peft.tuner.export.{verb.removeprefix('export_')}"
        monkeypatch.setattr(f"{module}.write_card", full_disk)
        for folder in ("out", "new"):
            with pytest.raises(OSError, match="No space left"):
                getattr(model, verb)(tmp_path / folder, {"help": 2.0}, calibration=False, overwrite=True)
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_calibration_without_tokens(self, verb: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="hold no tokens"):
            getattr(two_axes(), verb)(tmp_path / "out", WEIGHTS, calibration=[])
        assert not (tmp_path / "out").exists()


def test_only_transformers_models_are_merged_to_disk(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    model = get_peft_model(network, TangentConfig(target_modules=["0"], init_weights=False))
    with pytest.raises(ValueError, match="Sequential"):
        model.export_merged(tmp_path)
    lora = model.export_lora(tmp_path / "lora")
    assert lora.gap is None and "a Sequential is no transformers model" in str(lora)
