"""T5: its attention adds a learned position bias, which transformers hands to the kernel beside the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import config, deltas, tangent_layers
from conftest import VOCABULARY, enlarge
from oracle import gradient, linearized
from peft import PeftModel, get_peft_model
from tolerances import assert_equal, relative_error
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration


pytestmark = pytest.mark.filterwarnings("ignore:The head .*is tied to the")
TARGETS = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]


def build_t5() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    special = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    settings = T5Config(vocab_size=VOCABULARY, feed_forward_proj="gated-gelu", **sizes, **special)
    return enlarge(T5ForConditionalGeneration(settings)).double()


def wrapped(**options: Any) -> PeftModel:
    axis = config("dense", **{"task_type": "SEQ_2_SEQ_LM", "num_layers": None, "target_modules": TARGETS, **options})
    return get_peft_model(build_t5(), axis).double().eval()


def inputs() -> dict[str, Tensor]:
    """Padded questions (2, 7) and the beginnings of their answers (2, 5)."""
    draw = torch.Generator().manual_seed(1)
    ids, answers = (torch.randint(2, VOCABULARY, shape, generator=draw) for shape in ((2, 7), (2, 5)))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "decoder_input_ids": answers}


@pytest.mark.parametrize("mode", ["recorded", "replay"])
def test_logits_and_gradient_equal_the_oracle(mode: str) -> None:
    model, given = wrapped(gradient=mode).train(), inputs()
    assert model.get_base_model().config._attn_implementation == "sdpa"
    taus = deltas(model)
    base, expected = linearized(build_t5(), taus, **given)
    assert relative_error(base, expected) > 0.02
    found = model(**given, use_cache=False).logits
    assert_equal(found, expected)
    cotangent = torch.randn_like(found)
    found.backward(cotangent)
    gradients = gradient(build_t5(), taus, cotangent, **given)
    for layer in tangent_layers(model):
        assert_equal(layer.tangent_delta["default"].weight.grad, gradients[layer.weight_name])


def test_generation_with_a_cache_equals_generation_without() -> None:
    """With tangents in the decoder; `generate` runs the encoder by itself, where one would be refused."""
    model, given = wrapped(target_modules=r"decoder\..*\.(q|k|v|o|wi_0|wo)"), inputs()
    given.pop("decoder_input_ids")
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        cached, plain = (model.generate(**given, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert_equal(torch.stack(cached.logits), torch.stack(plain.logits))
    with pytest.raises(RuntimeError, match=r"'encoder\.block.*outside of a linearized forward"):
        wrapped().generate(**given, **options)


def test_a_bias_that_carries_a_tangent_is_refused() -> None:
    model = wrapped(target_modules=["q", "relative_attention_bias"])
    with pytest.raises(NotImplementedError, match=r"position bias of T5Attention carries a tangent.*target_modules"):
        model(**inputs())
