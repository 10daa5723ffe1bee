"""Vision-language models: f_lin of the text decoder with images in the batch, against torch.func on the stock model."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from cases import config, deltas, tangent_layers
from peft import PeftModel, get_peft_model
from tolerances import assert_equal, relative_error
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from vision import VLMS, build_vlm, vision_batch

from tangent_peft.forward import current_pass, split


TIGHT = 5e-5  # float32 against float32; the norms of all these models sit on each other


def wrapped(name: str, gradient: str = "auto", **options: Any) -> PeftModel:
    """The tiny model `name` with a dense axis, the same at every call."""
    base = build_vlm(name)
    torch.manual_seed(1)
    return get_peft_model(base, config("dense", gradient=gradient, **options)).eval()


def text_blocks(model: PeftModel) -> str:
    """Name of the text decoder's list of blocks."""
    base = model.get_base_model()
    decoder = base.get_decoder()
    return next(name for name, module in base.named_modules() if module is decoder) + ".layers."


def assert_exact(name: str, gradient: str, inputs: dict[str, Any], **options: Any) -> None:
    """Linearized logits and the gradient of every tangent equal the oracle's."""
    model = wrapped(name, gradient, **options)
    real, taus, clean = inputs["attention_mask"].bool(), deltas(model), build_vlm(name)
    base, expected = oracle.linearized(clean, taus, **inputs)
    assert relative_error(base[real], expected[real]) > 0.05  # the axis does something
    with torch.no_grad():
        assert_equal(model(**inputs).logits[real], expected[real], TIGHT)
    logits = model.train()(**inputs).logits
    assert_equal(logits[real], expected[real], TIGHT)
    cotangent = torch.randn_like(logits) * real[..., None]
    logits.backward(cotangent)
    gradients = oracle.gradient(clean, taus, cotangent, **inputs)
    for layer in tangent_layers(model):
        found, exact = layer.tangent_delta["default"].weight.grad, gradients[f"{layer.layer_name}.weight"]
        if found is None:  # LLaVA reads the features below its last vision block
            assert not exact.any()
        else:
            assert_equal(found, exact, TIGHT)


@pytest.mark.parametrize("name", VLMS)
def test_text_decoder_equals_the_oracle(name: str) -> None:
    """Right-padded with a recorded gradient, left-padded with a replayed one."""
    assert_exact(name, "recorded", vision_batch(name, "right"))
    assert_exact(name, "replay", vision_batch(name, "left"))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm", "mllama"])
def test_cached_generation_equals_uncached(name: str) -> None:
    model, inputs = wrapped(name), vision_batch(name, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert_equal(torch.stack(cached.logits), torch.stack(plain.logits), TIGHT)
    with model.disable_adapter():
        base = model.generate(**inputs, **options)
    assert relative_error(base.logits[0], cached.logits[0]) > 0.01


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "mllama"])
def test_the_images_matter(name: str) -> None:
    model, inputs = wrapped(name), vision_batch(name)
    others = {**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])}
    with torch.no_grad():
        assert relative_error(model(**others).logits[0], model(**inputs).logits[0]) > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_the_vision_tower_is_an_ordinary_network(name: str) -> None:
    """By default only the last blocks of the text and the head are wrapped; nothing below them carries a tangent."""
    model = wrapped(name, "replay").train()
    base, blocks = model.get_base_model(), text_blocks(model)
    count = base.config.get_text_config().num_hidden_layers
    upper = tuple(f"{blocks}{index}." for index in range(count - 2, count))
    assert {layer.layer_name for layer in tangent_layers(model) if not layer.layer_name.startswith(upper)} == {
        "lm_head"
    }
    below, recorded = [], []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        assert current_pass() is not None
        hidden = output[0] if isinstance(output, tuple) else output
        below.append(split(hidden)[1] is None)
        recorded.append(hidden.requires_grad)

    for path, module in base.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not (path + ".").startswith(upper):
            module.register_forward_hook(look)
    model(**vision_batch(name)).logits.sum().backward()
    assert len(below) >= 5 and all(below) and not any(recorded)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llava", ["q_proj", "linear_1"]),
        ("qwen3_vl", ["qkv", "v_proj", "linear_fc2"]),
        ("mllama", ["q_proj"]),
    ],
)
def test_vision_layers_that_are_named_are_exact_too(name: str, modules: list[str]) -> None:
    """In the tower, the projector and (qwen3_vl) what deepstack adds to the blocks of the text."""
    for gradient in ("recorded", "replay"):
        with pytest.warns(UserWarning, match=r"layers outside of the text decoder.*exclude_modules"):
            assert_exact(name, gradient, vision_batch(name), target_modules=modules, num_layers=None)


def test_generation_with_a_tangent_on_the_vision_tower_is_refused() -> None:
    """transformers encodes the images before the first forward, where there is no pass."""
    with pytest.warns(UserWarning, match="generate"):
        model = wrapped("llava", target_modules=["q_proj"])
    with pytest.raises(RuntimeError, match=r"vision_tower.*exclude_modules"):
        model.generate(**vision_batch("llava", "left"), max_new_tokens=2)
    inputs = vision_batch("llava", "left")
    with model.linearized(False):
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_text_alone() -> None:
    """A batch without an image."""
    inputs = {name: value for name, value in vision_batch("llava").items() if name != "pixel_values"}
    inputs["input_ids"] = inputs["input_ids"].clamp(max=200)
    assert_exact("llava", "recorded", inputs)


def test_merged_model_is_the_additive_one() -> None:
    model, inputs = wrapped("gemma3"), vision_batch("gemma3")
    with model.linearized(False), torch.no_grad():
        expected = model(**inputs).logits
    with pytest.warns(UserWarning, match="tied"):
        merged = model.merge_and_unload()
    with torch.no_grad():
        assert_equal(merged(**inputs).logits, expected)


def test_the_keys_of_an_image_keep_their_tangents_in_the_cache() -> None:
    """Mllama keeps the keys of an image beside those of the text; a later step reads them past `Cache.update`."""
    model, inputs = wrapped("mllama"), vision_batch("mllama", "left")
    with torch.no_grad():
        whole = model(**inputs, use_cache=False).logits[:, -1]
        first = {name: value for name, value in inputs.items() if name not in ("input_ids", "cross_attention_mask")}
        first["attention_mask"] = inputs["attention_mask"][:, :-1]
        cross = inputs["cross_attention_mask"]
        start = model(input_ids=inputs["input_ids"][:, :-1], cross_attention_mask=cross[:, :-1], **first)
        last = model(
            input_ids=inputs["input_ids"][:, -1:],
            attention_mask=inputs["attention_mask"],
            cross_attention_mask=cross[:, -1:],
            past_key_values=start.past_key_values,
        )
    assert_equal(last.logits[:, -1], whole, TIGHT)
