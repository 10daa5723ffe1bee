"""θ(λ) for other software: an ordinary model, and a LoRA that stock PEFT loads without this package."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMS, config, logits, tangent_layers, tangent_model
from conftest import MODELS, batch, build, make_llama
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tolerances import assert_equal, relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tangent_peft import TangentConfig


pytestmark = pytest.mark.filterwarnings("ignore:The head '.*' is tied to the input embedding")
INPUTS = batch("left")
WEIGHTS = {"help": 0.7, "verb": -1.3}


@pytest.fixture(autouse=True)
def _untied_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "untied", lambda: make_llama(tied=False))


def two_axes(name: str = "llama", first: str = "shared", second: str = "shared", **options: Any) -> PeftModel:
    model = tangent_model(name, first, axis="help", **options)
    model.add_adapter("verb", config(second, **options))
    return model


def at_weights(model: PeftModel, weights: dict[str, float]) -> Tensor:
    """Logits of the ordinary network at θ(λ)."""
    with model.axes(weights), model.linearized(False):
        return logits(model, **INPUTS)


# ---- as a model --------------------------------------------------------------------------------------------


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


# ---- as a LoRA ---------------------------------------------------------------------------------------------


def lora_logits(path: Path, name: str) -> Tensor:
    model = PeftModel.from_pretrained(build(name), path).eval()
    assert model.peft_config["default"].peft_type == "LORA"
    return logits(model, **INPUTS)


@pytest.mark.parametrize("forms", [("shared", "shared"), ("shared", "trained"), ("trained", "trained")])
@pytest.mark.parametrize("name", ["llama", "untied", "qwen3", "gpt2"])
def test_lora_of_low_rank_axes_is_exact(name: str, forms: tuple[str, str], tmp_path: Path) -> None:
    model = two_axes(name, *forms)
    result = model.export_lora(tmp_path, WEIGHTS)
    assert result.rank == (4 if forms == ("shared", "shared") else 8)
    assert result.relative_error == 0.0 and result.path == tmp_path
    assert_equal(lora_logits(tmp_path, name), at_weights(model, WEIGHTS))


@pytest.mark.slow
def test_lora_loads_without_this_package(tmp_path: Path) -> None:
    model = two_axes("gpt2", "shared", "trained", lm_head=False)
    model.export_lora(tmp_path / "lora", WEIGHTS)
    build("gpt2").save_pretrained(tmp_path / "base")
    torch.save({"inputs": INPUTS, "expected": at_weights(model, WEIGHTS)}, tmp_path / "case.pt")
    script = (
        "import sys, torch; from pathlib import Path; from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "path = Path(sys.argv[1]); case = torch.load(path / 'case.pt')\n"
        "base = AutoModelForCausalLM.from_pretrained(path / 'base')\n"
        "model = PeftModel.from_pretrained(base, path / 'lora').eval()\n"
        "found = model(**case['inputs']).logits\n"
        "assert 'tangent_peft' not in sys.modules\n"
        "print(float((found - case['expected']).abs().max() / case['expected'].abs().max()))\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 1e-5


@pytest.mark.parametrize("rank", [None, 2, 6, 32])
@pytest.mark.parametrize("form", ["dense", "shared", "trained"])
def test_lora_of_another_rank_reports_its_error(form: str, rank: int | None, tmp_path: Path) -> None:
    """The reported error is that of the files, and no LoRA of this rank is closer."""
    model = tangent_model("qwen3", form, axis="help")
    result = model.export_lora(tmp_path, {"help": -0.5}, rank=rank)
    state = load_file(tmp_path / "adapter_model.safetensors")
    saved = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(saved, LoraConfig) and saved.lora_alpha == saved.r == result.rank
    missed = best = total = 0.0
    for layer in tangent_layers(model):
        delta = -0.5 * layer.delta("help", 1.0).detach().double()
        prefix = f"base_model.model.{layer.layer_name}.lora_"
        b, a = state[f"{prefix}B.weight"].double(), state[f"{prefix}A.weight"].double()
        kept = a.shape[0]
        assert kept <= result.rank
        missed += float((delta - b @ a).square().sum())
        best += float(torch.linalg.svdvals(delta)[kept:].square().sum())
        total += float(delta.square().sum())
    assert result.relative_error == pytest.approx((missed / total) ** 0.5, rel=1e-3, abs=1e-6)
    assert missed / total == pytest.approx(best / total, rel=1e-3, abs=1e-10)


def test_lora_of_a_dense_axis_at_full_rank(tmp_path: Path) -> None:
    model = tangent_model("llama", "dense", axis="help")
    result = model.export_lora(tmp_path, rank=32)
    assert result.relative_error < 1e-5
    assert relative_error(lora_logits(tmp_path, "llama"), at_weights(model, {"help": 1.0})) < 1e-4


def test_lora_with_a_rank_pattern(tmp_path: Path) -> None:
    model = tangent_model("llama", "shared", axis="help", rank_pattern={"q_proj": 2, "up_proj": 7})
    result = model.export_lora(tmp_path)
    assert result.rank == 7 and result.relative_error == 0.0
    assert_equal(lora_logits(tmp_path, "llama"), at_weights(model, {"help": 1.0}))


def test_lora_on_the_tied_head(tmp_path: Path) -> None:
    """The head's factors are in the file, the embedding is not and stays as it is."""
    model = tangent_model("llama", "shared", axis="help")
    model.export_lora(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.lm_head.lora_B.weight" in state
    assert all(".lora_" in key for key in state)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, build("llama").get_input_embeddings().weight)


def test_lora_on_the_tied_head_warns(tmp_path: Path) -> None:
    """PEFT's `merge_and_unload` of it changes the embedding, too."""
    with pytest.warns(UserWarning, match=r"'lm_head' is tied to the input embedding.*export_merged"):
        tangent_model("llama", "shared", axis="help").export_lora(tmp_path / "tied")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tangent_model("llama", "shared", axis="help", lm_head=False).export_lora(tmp_path / "blocks")
        tangent_model("untied", "shared", axis="help").export_lora(tmp_path / "untied")


@pytest.mark.parametrize("form", FORMS)
def test_lora_of_a_half_precision_axis(form: str, tmp_path: Path) -> None:
    """torch decomposes no half-precision matrices."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tangent_model("untied", form, axis="help").to(dtype)
        found.append(model.export_lora(tmp_path, rank=2, overwrite=True))
    assert found[1].rank == 2
    assert found[1].relative_error == pytest.approx(found[0].relative_error, rel=0.05)


def test_lora_of_an_axis_at_zero(tmp_path: Path) -> None:
    model = two_axes()
    model.export_lora(tmp_path, {"help": 0.0})
    assert torch.equal(lora_logits(tmp_path, "llama"), logits(build("llama"), **INPUTS))


@pytest.mark.parametrize("form", FORMS)
def test_lora_of_mixed_layers(form: str, tmp_path: Path) -> None:
    """Axes on different blocks: every layer at its own rank."""
    model = tangent_model("llama", "shared", axis="help", num_layers=1)
    model.add_adapter("verb", config(form, num_layers=3, lm_head=False))
    result = model.export_lora(tmp_path, WEIGHTS, rank=64)
    assert result.relative_error < 1e-5
    assert relative_error(lora_logits(tmp_path, "llama"), at_weights(model, WEIGHTS)) < 1e-4


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", ["export_merged", "export_lora"])
class TestErrors:
    @staticmethod
    def call(model: PeftModel, export: str, path: Path, weights: dict[str, float] | None = None) -> None:
        {"export_merged": model.export_merged, "export_lora": model.export_lora}[export](path, weights)
        raise AssertionError("did not raise")

    @pytest.mark.filterwarnings("ignore:The head is tied")
    def test_merged_model(self, export: str, tmp_path: Path) -> None:
        model = two_axes()
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            self.call(model, export, tmp_path)

    def test_modules_to_save(self, export: str, tmp_path: Path) -> None:
        model = tangent_model("llama", "shared", modules_to_save=["model.norm"])
        with pytest.raises(ValueError, match=r"model\.norm"):
            self.call(model, export, tmp_path)

    def test_unknown_axis(self, export: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Unknown axis 'nobody'"):
            self.call(two_axes(), export, tmp_path, {"nobody": 1.0})

    def test_a_file_in_the_way(self, export: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises((OSError, ValueError)):
            self.call(two_axes(), export, tmp_path / "file")


def test_an_empty_mix_is_no_lora(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        two_axes().export_lora(tmp_path, {})


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_none(rank: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"rank.*{rank}"):
        two_axes().export_lora(tmp_path, rank=rank)


def test_only_transformers_models_are_merged_to_disk(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    model = get_peft_model(network, TangentConfig(target_modules=["0"], init_weights=False))
    with pytest.raises(ValueError, match="Sequential"):
        model.export_merged(tmp_path)
