"""No LoRA is written that stock PEFT would refuse, rewrite or lose on its way into the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import config, logits, tangent_model
from families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from tolerances import assert_equal
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from vision import build_vlm

from tangent_peft.tuner.export import loadable


pytestmark = [
    pytest.mark.filterwarnings("ignore:The head .*is tied to the"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
]
IDS = {"input_ids": torch.randint(3, 290, (2, 9), generator=torch.Generator().manual_seed(1))}


def build(model_type: str) -> PreTrainedModel:
    return next(family for family in FAMILIES if family.model_type == model_type).build().eval()


def exported(model: PeftModel, path: Path) -> Tensor:
    """Writes the LoRA; logits of the mix."""
    model.export_lora(path, calibration=False)
    with model.linearized(False):
        return logits(model, **IDS)


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "qwen3_next", "hunyuan_v1_moe", "afmoe"])
def test_shared_experts(family: str, tmp_path: Path) -> None:
    """PEFT takes a layer called `gate_proj` for a routed expert, where routed experts once were called so."""
    expected = exported(get_peft_model(build(family), config("shared")).eval(), tmp_path)
    saved = LoraConfig.from_pretrained(tmp_path)
    assert any(name.endswith("gate_proj.weight") for name in saved.target_parameters)
    lora = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert_equal(logits(lora, **IDS), expected)
    assert_equal(logits(lora.merge_and_unload(), **IDS), expected)


def test_others_keep_their_layers(tmp_path: Path) -> None:
    exported(tangent_model("qwen3", "shared"), tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).target_parameters is None


def test_a_rewritten_lora_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where naming layers by their parameter does not help, either."""
    monkeypatch.setattr(loadable, "_named_by_parameter", lambda config: config)
    with pytest.raises(ValueError, match=r"rewrites a LoRA.*Glm4MoeForCausalLM: \d+ tensors.*export_merged"):
        exported(get_peft_model(build("glm4_moe"), config("shared")), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_refused_architecture(tmp_path: Path) -> None:
    model = get_peft_model(build("mamba2"), config("shared")).eval()
    with pytest.raises(ValueError, match=r"refuses a LoRA.*Mamba2ForCausalLM.*'out_proj'.*export_merged"):
        exported(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    model = get_peft_model(build("mamba2"), config("shared", exclude_modules=["out_proj"])).eval()
    expected = exported(model, tmp_path / "lora")
    assert_equal(logits(PeftModel.from_pretrained(build("mamba2"), tmp_path / "lora").eval(), **IDS), expected)


@pytest.mark.parametrize("family", ["jamba", "mamba"])
def test_a_weight_that_is_read(family: str, tmp_path: Path) -> None:
    """Mamba multiplies by the weight of dt_proj itself, and never asks for what a LoRA adds to its output."""
    excluded = ["out_proj"] if family == "mamba" else None
    model = get_peft_model(build(family), config("shared", exclude_modules=excluded)).eval()
    mix = model.axis_weights
    with pytest.raises(ValueError, match=r"reads the weight of '.*dt_proj'.*LoRA on it would be lost.*exclude_modules"):
        exported(model, tmp_path / "lora")
    assert model.axis_weights == mix
    model = get_peft_model(build(family), config("shared", exclude_modules=["out_proj", "dt_proj"])).eval()
    expected = exported(model, tmp_path / "lora")
    assert_equal(logits(PeftModel.from_pretrained(build(family), tmp_path / "lora").eval(), **IDS), expected)


def test_a_model_that_needs_more_than_tokens(tmp_path: Path) -> None:
    model = tangent_model("qwen3", "shared")
    base, expected = model.get_base_model(), logits(tangent_model("qwen3", "shared", linearize=False), **IDS)
    forward = base.forward

    def demanding(*args: object, style: str | None = None, **kwargs: object) -> object:
        if style is None:
            raise TypeError("forward() needs a style")
        return forward(*args, **kwargs)

    base.forward = demanding
    with pytest.warns(UserWarning, match=r"Qwen3ForCausalLM does not run on two token ids.*needs a style") as caught:
        model.export_lora(tmp_path, calibration=False)
    assert caught[0].filename == __file__
    assert_equal(logits(PeftModel.from_pretrained(tangent_model("qwen3").unload(), tmp_path), **IDS), expected)


@pytest.mark.parametrize("name", ["internvl", "mistral3", "qwen2_vl", "llava"])
def test_vision_language_models(name: str, tmp_path: Path) -> None:
    """The tie of head and embedding may be said in either configuration, or not at all."""
    model = get_peft_model(build_vlm(name), config("shared")).eval()
    result = model.export_merged(tmp_path / "merged")
    assert result.gap is not None and result.gap.gap > 0
    with model.linearized(False):
        expected = logits(model, **IDS)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert_equal(logits(merged, **IDS), expected)
    exported(model, tmp_path / "lora")
    assert_equal(logits(PeftModel.from_pretrained(build_vlm(name), tmp_path / "lora").eval(), **IDS), expected)
