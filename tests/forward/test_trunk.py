"""The trunk: what is cut off computes the same numbers, and a model that can not be cut is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import logits
from conftest import TINY, batch, build, enlarge, make_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPTJConfig, GPTJForCausalLM, PreTrainedModel

from tangent_peft import TangentConfig
from tangent_peft.forward.trunk import Trunk


def make_gemma3() -> PreTrainedModel:
    config = Gemma3TextConfig(
        **TINY,
        num_hidden_layers=4,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config)


def make_gptj() -> PreTrainedModel:
    """Its blocks return tuples."""
    config = GPTJConfig(vocab_size=300, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=64)
    return GPTJForCausalLM(config)


OTHERS: dict[str, Callable[[], PreTrainedModel]] = {"gemma3": make_gemma3, "gptj": make_gptj}
MODELS = ["llama", "qwen3", "gpt2", *OTHERS]
BLOCKS = {"gpt2": "transformer.h", "gptj": "transformer.h"}


def wrapped(name: str = "llama", dropout: float = 0.0, **options: Any) -> PeftModel:
    if name in OTHERS:
        torch.manual_seed(0)
        base = enlarge(OTHERS[name]())
    else:
        base = build(name)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    config = {"r": 4, "num_layers": 1, "init_weights": False, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(base, TangentConfig(**config)).eval()


def trunk_of(model: PeftModel, name: str = "llama", **options: Any) -> Trunk:
    root = model.get_base_model()
    return Trunk(root, root.get_submodule(BLOCKS.get(name, "model.layers")), **options)


def stored(trunk: Trunk, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states with zeros at padding, as a cache gives them."""
    return trunk.hidden_states(**inputs).masked_fill(inputs["attention_mask"][..., None] == 0, 0.0)


@pytest.mark.parametrize("linearized", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_skipping_changes_no_real_token(name: str, linearized: bool) -> None:
    model, inputs = wrapped(name), batch()
    trunk, real = trunk_of(model, name), inputs["attention_mask"].bool()
    with model.linearized(linearized):
        expected = logits(model, **inputs, use_cache=False)
        with trunk.skipped(stored(trunk, inputs)):
            found = logits(model, **inputs, use_cache=False)
        assert torch.equal(found[real], expected[real]) and found.isfinite().all()
        assert torch.equal(logits(model, **inputs, use_cache=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same(name: str, dtype: torch.dtype) -> None:
    model, inputs = wrapped(name).to(dtype), batch()
    trunk, real = trunk_of(model, name), inputs["attention_mask"].bool()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**inputs, use_cache=False).logits[real].double().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    with trunk.skipped(stored(trunk, inputs)):
        found = gradients()
    assert len(found) == len(expected) > 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant: bool) -> None:
    """As additive weights, where checkpointing was always allowed; its input must require gradients as before."""
    model, inputs = wrapped(linearize=False).train(), batch()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    trunk, real = trunk_of(model), inputs["attention_mask"].bool()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**inputs, use_cache=False).logits[real].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, hidden = gradients(), stored(trunk, inputs)
    assert model.training and all(module.training for module in model.modules())
    with trunk.skipped(hidden):
        found = gradients()
    assert len(found) == len(expected) > 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_each_part_runs_only_its_blocks() -> None:
    model, inputs, calls = wrapped(), batch(), []
    trunk = trunk_of(model)
    for index, block in enumerate(trunk.blocks):
        block.self_attn.register_forward_pre_hook(lambda *unused, index=index: calls.append(index))
    model.get_base_model().model.norm.register_forward_pre_hook(lambda *unused: calls.append(-1))
    hidden = stored(trunk, inputs)
    assert calls == [0, 1] and trunk.first == 2
    calls.clear()
    with trunk.skipped(hidden):
        logits(model, **inputs, use_cache=False)
    assert calls == [2, -1]


def test_everything_is_restored_after_an_exception() -> None:
    model, inputs = wrapped(), batch()
    trunk = trunk_of(model)
    before = [dict(vars(block)) for block in trunk.blocks]
    expected = logits(model, **inputs)
    with pytest.raises(KeyError), trunk.skipped(stored(trunk, inputs)):
        raise KeyError
    assert all(
        vars(block).get("forward") is old.get("forward") for block, old in zip(trunk.blocks, before, strict=True)
    )
    assert not trunk.entry._forward_pre_hooks
    assert torch.equal(logits(model, **inputs), expected)


def test_a_forward_that_was_replaced_before_comes_back() -> None:
    model, inputs = wrapped(), batch()
    trunk = trunk_of(model)
    block = trunk.blocks[0]
    block.forward = replaced = block.forward
    with trunk.skipped(stored(trunk, inputs)):
        logits(model, **inputs, use_cache=False)
    assert vars(block)["forward"] is replaced


def test_wrong_uses_are_refused() -> None:
    model, inputs = wrapped(), batch()
    trunk = trunk_of(model)
    hidden = stored(trunk, inputs)
    with trunk.skipped(hidden):
        with pytest.raises(ValueError, match=r"\(2, 10, 32\).*\(3, 10, 32\)"):
            logits(model, **batch(rows=2), use_cache=False)
        with pytest.raises(ValueError, match="use_cache=False"):
            logits(model, **inputs, use_cache=True)
        with pytest.raises(ValueError, match=r"bfloat16.*None"), torch.autocast("cpu", torch.bfloat16):
            logits(model, **inputs, use_cache=False)


def test_autocast() -> None:
    model, inputs = wrapped(), batch()
    trunk = trunk_of(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    real, hidden = inputs["attention_mask"].bool(), stored(trunk, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, **inputs, use_cache=False)
        with trunk.skipped(hidden):
            assert torch.equal(logits(model, **inputs, use_cache=False)[real], expected[real])


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_nothing_below() -> None:
    with pytest.raises(ValueError, match=r"first of the 3 blocks.*num_layers"):
        trunk_of(wrapped(num_layers=3))


def test_no_active_axis() -> None:
    model = wrapped()
    with model.disable_adapter(), pytest.raises(ValueError, match=r"No axis.*active"):
        trunk_of(model)


def test_head_only_keeps_the_last_block() -> None:
    assert trunk_of(wrapped(target_modules=["lm_head"])).first == 2


def test_inactive_axis_below_does_not_count() -> None:
    model = wrapped()
    model.add_adapter("low", TangentConfig(r=4, num_layers=3, init_weights=False, task_type="CAUSAL_LM"))
    trunk = trunk_of(model)
    assert trunk.first == 2 and not trunk.carries()
    model.set_adapter("low")
    assert trunk.carries()


def test_dropout_below_is_named() -> None:
    with pytest.raises(ValueError, match=r"random in training mode.*transformer\.drop"):
        trunk_of(wrapped("gpt2", dropout=0.1), "gpt2")


def test_functional_dropout_below_is_named() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        enlarge(make_llama(attention_dropout=0.2)), TangentConfig(num_layers=1, linearize=False, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match=r"random in training mode.*attention_dropout"):
        trunk_of(model)


def test_batch_dependent_rotary_embedding_is_named() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = get_peft_model(make_llama(rope_parameters=rope).eval(), TangentConfig(num_layers=1, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"dynamic.*longest row"):
        trunk_of(model)


def test_a_model_that_is_not_causal_is_refused() -> None:
    model = wrapped()
    for block in model.get_base_model().model.layers:
        block.self_attn.register_forward_hook(lambda m, args, out: (out[0] + out[0].mean(1, keepdim=True), *out[1:]))
    with pytest.raises(ValueError, match="depends on later tokens"):
        trunk_of(model)


def test_a_model_that_reads_lower_blocks_elsewhere_is_refused() -> None:
    """As shared keys and values are: block 2 adds something that block 0 has left."""
    model = wrapped()
    layers, left = model.get_base_model().model.layers, {}
    layers[0].mlp.register_forward_hook(lambda m, args, out: left.update(out=out))
    layers[2].mlp.register_forward_hook(lambda m, args, out: out + left.pop("out", torch.zeros(())))
    with pytest.raises(ValueError, match="read something of lower ones"):
        trunk_of(model)


def test_parameters_that_train_below_are_named() -> None:
    model = wrapped(modules_to_save=["embed_tokens"], lm_head=False)
    with pytest.raises(ValueError, match=r"embed_tokens.*modules_to_save"):
        trunk_of(model).check_frozen()
