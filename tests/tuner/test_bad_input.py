"""What can be wrong with a model, a file or a configuration is named, with its value and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMS, config, logits, tangent_model
from conftest import MODELS, batch, build, make_llama
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tangent_peft import TangentConfig


INPUTS = batch("left")


# ---- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "`r` is a positive integer.*found 0"),
        ({"r": -4}, "found -4"),
        ({"r": 2.5}, "found 2.5"),
        ({"r": "16"}, "found '16'"),
        ({"r": True}, "found True"),
        ({"r": 4, "projection": "learned"}, "'shared' or 'trained', found 'learned'"),
        ({"projection": "trained"}, "Set `r`"),
        ({"rank_pattern": {"q_proj": 2}}, "Set `r` as well"),
        ({"r": 4, "rank_pattern": {"q_proj": 0}}, "rank_pattern.*found 0 for .q_proj"),
        ({"num_layers": 0}, "`num_layers` is a positive integer.*found 0"),
        ({"num_layers": -1}, "found -1"),
        ({"num_layers": "all"}, "found 'all'"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            "Put the block indices into the expression",
        ),
    ],
)
def test_configuration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TangentConfig(**options)


# ---- model -------------------------------------------------------------------------------------------------


def test_nothing_to_wrap() -> None:
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear or Conv1D"):
        get_peft_model(torch.nn.Sequential(torch.nn.LayerNorm(4)), TangentConfig())
    with pytest.raises(ValueError, match="nonsense"):
        get_peft_model(build("llama"), TangentConfig(target_modules=["nonsense"], lm_head=False))


def test_a_layer_that_can_not_carry_a_tangent() -> None:
    with pytest.raises(TypeError, match=r"input_layernorm' is a LlamaRMSNorm.*exclude_modules"):
        get_peft_model(build("llama"), TangentConfig(target_modules=["input_layernorm", "q_proj"]))


def test_a_rank_above_the_layers_size() -> None:
    with pytest.raises(ValueError, match=r"32 input features.*r = 33.*rank_pattern"):
        get_peft_model(build("llama"), TangentConfig(r=33))


def test_a_misspelled_target_beside_a_right_one() -> None:
    """The head alone would be wrapped if the rest of `target_modules` matched nothing."""
    with pytest.raises(ValueError, match="nonsense"):
        get_peft_model(build("llama"), TangentConfig(target_modules=["nonsense"]))


def test_reading_the_weight_of_the_head_inside_a_forward() -> None:
    """As TRL's fused head does: it would run without the head's tangent."""

    def read(module: Any, *_: Any) -> None:
        assert module.lm_head.weight.dtype == torch.float32  # harmless
        module.lm_head.weight.sum()

    for lm_head in (True, False):
        model = tangent_model("llama", lm_head=lm_head)
        expected, base = logits(model, **INPUTS), model.get_base_model()
        handle = base.model.register_forward_hook(lambda *_, base=base: read(base))
        if lm_head:
            with pytest.raises(RuntimeError, match=r"'lm_head'.*TangentDPOTrainer.*lm_head=False"):
                model(**INPUTS)
        else:
            model(**INPUTS)
        with model.disable_adapter():  # nothing is lost then
            model(**INPUTS)
        handle.remove()
        assert base.lm_head.weight is not None  # nor outside of a forward
        assert torch.equal(logits(model, **INPUTS), expected)


# ---- files -------------------------------------------------------------------------------------------------


def load_new(path: Path) -> Any:
    return PeftModel.from_pretrained(build("llama"), path)


def load_beside(path: Path) -> Any:
    return tangent_model("llama").load_adapter(path, adapter_name="loaded")


def load_in_transformers(path: Path) -> Any:
    return build("llama").load_adapter(str(path), adapter_name="loaded")


def load_trainable(path: Path) -> Any:
    return PeftModel.from_pretrained(build("llama"), path, is_trainable=True)


LOADERS = [load_new, load_beside, load_in_transformers]


def refusal(load: Any, message: str) -> Any:
    """transformers opens the file before any of our code knows its path; its error stands."""
    if load is load_in_transformers:
        return pytest.raises(SafetensorError, match="deserializing header")
    return pytest.raises(ValueError, match=message)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_a_truncated_file(load: Any, kept: int, tmp_path: Path) -> None:
    tangent_model("llama", "shared").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    expected = r"adapter_model\.safetensors.*not a complete safetensors file.*restore it"
    with refusal(load, expected):
        load(tmp_path)


@pytest.mark.parametrize("load", LOADERS)
def test_a_corrupt_file(load: Any, tmp_path: Path) -> None:
    tangent_model("llama", "shared").save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not a safetensors file at all")
    with refusal(load, "not a complete safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("load", [load_new, load_beside])
@pytest.mark.parametrize("form", FORMS)
def test_missing_tangents(load: Any, form: str, tmp_path: Path) -> None:
    tangent_model("llama", form).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    gone = sorted(state)[0]
    del state[gone]
    save_file(state, file)
    with pytest.raises(ValueError, match=r"lacks 1 of .* tangents.*lm_head"):
        load(tmp_path)


@pytest.mark.parametrize("load", [load_new, load_beside])
def test_a_tangent_of_another_shape(load: Any, tmp_path: Path) -> None:
    tangent_model("llama", "shared").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 3}))
    with pytest.raises(ValueError, match=r"4\) in the file and.*3\) in this model"):
        load(tmp_path)


def saved_for(path: Path, make: Any) -> None:
    get_peft_model(make(), config("shared")).save_pretrained(path)


def finetuned() -> Any:
    base = build("llama")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.02)
    return base


def other_seed() -> Any:
    torch.manual_seed(1)
    return MODELS["llama"]()


@pytest.mark.parametrize("load", [*LOADERS, load_trainable])
@pytest.mark.parametrize("make", [finetuned, other_seed, lambda: make_llama(layers=4)])
def test_another_base(load: Any, make: Any, tmp_path: Path) -> None:
    saved_for(tmp_path, make)
    with pytest.raises(ValueError, match=r"trained on another base model.*base_fingerprint"):
        load(tmp_path)


def test_the_same_base_in_half_precision_is_the_same(tmp_path: Path) -> None:
    saved_for(tmp_path, lambda: build("llama"))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        PeftModel.from_pretrained(build("llama").to(dtype), tmp_path)


def test_the_check_can_be_switched_off(tmp_path: Path) -> None:
    saved_for(tmp_path, finetuned)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_fingerprint": None}))
    load_new(tmp_path)


def test_a_refused_adapter_leaves_the_model_in_order(tmp_path: Path) -> None:
    saved_for(tmp_path, finetuned)
    model = tangent_model("llama")
    expected = logits(model, **INPUTS)
    with pytest.raises(ValueError, match="another base model"):
        model.load_adapter(tmp_path, adapter_name="loaded")
    assert torch.equal(logits(model, **INPUTS), expected)
    assert model.axis_weights == {"default": 1.0}
    assert list(model.peft_config) == ["default"]
    saved_for(tmp_path / "right", lambda: build("llama"))
    model.load_adapter(tmp_path / "right", adapter_name="loaded")  # the name is free
