"""Hidden states and tangents at the head: those of a full linearized pass, and nothing of the model changed after."""

from __future__ import annotations

import pytest
import torch
from cases import config, tangent_model
from conftest import batch
from tolerances import assert_equal

from tangent_peft.tuner.hidden import AxisPasses


def test_states_are_those_of_the_backbone() -> None:
    model = tangent_model("llama", "dense", axis="below", lm_head=False)
    model.add_adapter("head", config("shared", target_modules=["lm_head"]))
    model.train()
    inputs = batch()
    keep = inputs["attention_mask"].bool()
    passes = AxisPasses(model)
    with passes.ready():
        assert not model.get_base_model().training
        hidden, (below, head) = passes.states(inputs, keep)
    assert model.get_base_model().training
    assert head is None and below is not None
    with model.disable_adapter(), torch.no_grad():
        primal = model.eval()(**inputs, output_hidden_states=True).hidden_states[-1][keep]
    assert_equal(hidden, primal)
    with model.axes({"below": 0.5}), torch.no_grad():
        logits = model(**inputs).logits[keep]
    assert_equal((hidden + 0.5 * below) @ passes.heads[0].weight.mT, logits)
    assert passes.heads[0].b is None and passes.heads[1].b is not None


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    model = tangent_model("llama", "shared")
    model.train()
    passes = AxisPasses(model)
    with pytest.raises(IndexError), passes.ready():
        passes.states({"input_ids": torch.tensor([[3, 10_000]])}, torch.ones(1, 2, dtype=torch.bool))
    assert model.get_base_model().training
    assert model.axis_weights == {"default": 1.0}
    assert not model.get_base_model().base_model._forward_hooks
