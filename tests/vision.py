"""Tiny vision-language models, a batch of images and text for each, and a processor made without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import VOCABULARY, enlarge
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor


IMAGE = VOCABULARY  # token that stands where a patch of an image comes
BEGIN, END = VOCABULARY + 1, VOCABULARY + 2  # around an image, where a model has such tokens
PATCHES = 4  # tokens of one image
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY + 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,  # more than the text has
    "image_size": 8,
    "patch_size": 2,
}
QWEN_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
QWEN_VISION = {"num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": VOCABULARY + 3, "vision_start_token_id": BEGIN}


def _llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(**{**VISION, "patch_size": 4}, projection_dim=16)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def _qwen2_vl() -> PreTrainedModel:
    vision = {**QWEN_VISION, "depth": 4, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_TOKENS, vision_end_token_id=END)
    )


def _qwen2_5_vl() -> PreTrainedModel:
    vision = {**QWEN_VISION, "depth": 4, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_TOKENS, vision_end_token_id=END)
    )


def _qwen3_vl() -> PreTrainedModel:
    """Adds features of the vision tower to the first blocks of the text (deepstack)."""
    vision = {**QWEN_VISION, "depth": 4, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
    vision |= {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 16}
    text = {**QWEN_TEXT, "head_dim": 8}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS, vision_end_token_id=END)
    )


def make_gemma3() -> PreTrainedModel:
    """Attends in both directions inside an image, and in windows in two of its blocks."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**TEXT, "head_dim": 8, "sliding_window": 4, "layer_types": kinds}
    tokens = {"image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=PATCHES, **tokens)
    )


def _idefics3() -> PreTrainedModel:
    text = {"model_type": "llama", **TEXT}
    config = Idefics3Config(text_config=text, vision_config=VISION, scale_factor=2, image_token_id=IMAGE)
    return Idefics3ForConditionalGeneration(config)


def _smolvlm() -> PreTrainedModel:
    text = {"model_type": "llama", **TEXT}
    config = SmolVLMConfig(text_config=text, vision_config=VISION, scale_factor=2, image_token_id=IMAGE)
    return SmolVLMForConditionalGeneration(config)


def _internvl() -> PreTrainedModel:
    vision = {**VISION, "image_size": [8, 8], "patch_size": [2, 2]}
    text = {"model_type": "qwen2", **TEXT}
    return InternVLForConditionalGeneration(
        InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5)
    )


def _mistral3() -> PreTrainedModel:
    vision = {"model_type": "pixtral", **VISION, "head_dim": 8}
    text = {"model_type": "mistral", "head_dim": 8, **TEXT}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE, spatial_merge_size=2)
    )


def _paligemma() -> PreTrainedModel:
    vision = {"model_type": "siglip_vision_model", **VISION, "patch_size": 4, "vision_use_head": False}
    text = {"model_type": "gemma", "head_dim": 8, **TEXT}
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32)
    )


def _mllama() -> PreTrainedModel:
    """Cross-attends from two of its four text blocks to the image."""
    text = {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_output_dim": 32}
    vision |= {"intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE))


VLMS: dict[str, Callable[[], PreTrainedModel]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": make_gemma3,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "mistral3": _mistral3,
    "paligemma": _paligemma,
    "mllama": _mllama,
}


def build_vlm(name: str) -> PreTrainedModel:
    """A fresh tiny model in eval mode, the same weights at every call; none that starts at zero stays there."""
    torch.manual_seed(0)
    model = enlarge(VLMS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model


def vision_batch(name: str, side: str = "right", length: int = 14) -> dict[str, Any]:
    """Two rows of tokens around an image each, the second row padded on the given side, and the images."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    image = [BEGIN, *[IMAGE] * (1 if name == "mllama" else PATCHES), END]
    for row, start in enumerate((2, 6 if side == "left" else 3)):
        ids[row, start : start + len(image)] = torch.tensor(image)
    padded = slice(0, 3) if side == "left" else slice(length - 3, length)
    ids[1, padded] = mask[1, padded] = 0
    return {"input_ids": ids, "attention_mask": mask, **_pixels(name, ids, generator)}


def _pixels(name: str, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Two images, and what a model wants to know beside them."""
    kinds = (ids == IMAGE).long()
    if name.startswith("qwen"):
        patches = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": kinds}
    pixels = torch.randn(2, 3, 8, 8, generator=generator)
    if name in ("idefics3", "smolvlm"):
        return {"pixel_values": pixels[:, None], "pixel_attention_mask": torch.ones(2, 1, 8, 8, dtype=torch.long)}
    if name == "gemma3":
        return {"pixel_values": pixels, "token_type_ids": kinds}
    if name == "paligemma":
        return {"pixel_values": pixels, "token_type_ids": torch.zeros_like(kinds)}
    if name == "mistral3":
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[8, 8]] * 2)}
    if name == "mllama":
        one = torch.ones(2, 1, dtype=torch.long)
        crossed = torch.ones(*ids.shape, 1, 1, dtype=torch.long)
        return {
            "pixel_values": pixels[:, None, None],
            "aspect_ratio_ids": one,
            "aspect_ratio_mask": one[..., None],
            "cross_attention_mask": crossed,
        }
    return {"pixel_values": pixels}


# ---- a processor and data --------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def processor(name: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The processor of LLaVA or Gemma 3 for images of 8 × 8 pixels, around the tests' tokenizer."""
    tokens = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"}  # IMAGE, BEGIN, END
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token=tokenizer.pad_token,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=tokens,
    )
    size = {"height": 8, "width": 8}
    if name == "gemma3":
        images = Gemma3ImageProcessorPil(size=size)
        return Gemma3Processor(
            images, own, chat_template=TEMPLATE.replace("IMAGE", tokens["boi_token"]), image_seq_length=PATCHES
        )
    images = LlavaImageProcessorPil(size=size, crop_size=size)
    return LlavaProcessor(
        images,
        own,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", tokens["image_token"]),
    )


def vision_pairs(rows: int = 4) -> list[dict[str, Any]]:
    """Preference pairs about images of one color each; answers of different lengths."""
    colors = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}
    found = []
    for index in range(rows):
        name = list(colors)[index % len(colors)]
        answers = ("Gladly: it is " + name + ".", "No.") if index % 2 else ("Sure.", "Why do you ask me that?")
        found.append(
            {
                "images": [Image.new("RGB", (8, 8), colors[name])],
                "prompt": [{"role": "user", "content": "What color" + "?" * index}],
                "chosen": [{"role": "assistant", "content": answers[0]}],
                "rejected": [{"role": "assistant", "content": answers[1]}],
            }
        )
    return found
