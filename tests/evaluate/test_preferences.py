"""Preference accuracy against one row at a time, and its definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tolerances import assert_equal
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tangent_peft import TangentConfig
from tangent_peft.evaluate import preference_accuracy
from tangent_peft.evaluate.preferences import pair_logps


def test_pair_logps_equal_one_row_at_a_time(
    tiny_llama: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]
) -> None:
    model = get_peft_model(tiny_llama(), TangentConfig(num_layers=2, init_weights=False, task_type="CAUSAL_LM"))
    found, lengths = pair_logps(model, tokenizer, pairs, batch_size=3)
    for row, pair in enumerate(pairs):
        for column, key in enumerate(("chosen", "rejected")):
            text = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(pair["prompt"] + pair[key], tokenize=False)
            start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model.eval()(input_ids=ids).logits.log_softmax(-1)
            picked = logits[0, start - 1 : -1].gather(1, ids[0, start:, None])
            assert_equal(found[row, column], picked.sum())
            assert int(lengths[row, column]) == len(picked)


def test_definitions() -> None:
    base = torch.tensor([[-2.0, -1.0], [-4.0, -9.0], [-1.0, -1.5]])
    policy = torch.tensor([[-1.0, -1.5], [-5.0, -9.0], [-1.0, -1.5]])
    lengths = torch.tensor([[1, 1], [1, 3], [2, 1]])
    accuracy = preference_accuracy(policy, base, lengths)
    assert accuracy.policy == 1.0
    assert accuracy.policy_per_token == pytest.approx(2 / 3)
    assert accuracy.reward == pytest.approx(0.5)  # one gained, one lost, one tie
    assert accuracy.margin == pytest.approx((1.5 - 1.0 + 0.0) / 3)
    assert accuracy.pairs == 3
