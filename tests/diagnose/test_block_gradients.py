"""The streamed gradient energy of each block is that of a loss that keeps all gradients; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import build
from peft import LoraConfig, get_peft_model
from strong_axes import two_axes
from torch.func import functional_call, grad

from tangent_peft.diagnose.spinal.block_gradients import block_gradients, reference_logps
from tangent_peft.diagnose.states import ModelState
from tangent_peft.evaluate.pairs import pair_batch


BETA = 0.3


def expected(model: Any, tokenizer: Any, pairs: list[Any], reference: torch.Tensor, blocks: str) -> list[float]:
    """‖∇L‖² of each block by torch.func: one batch, every gradient kept."""
    batch = pair_batch(tokenizer, pairs)
    answer = batch.pop("completion_mask")[:, 1:]
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(chosen: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = functional_call(model, {**weights, **chosen}, (), {**batch, "use_cache": False}).logits
        token = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        logps = torch.stack((token * answer).sum(1).chunk(2), 1) - reference
        return -torch.log(torch.sigmoid(BETA * (logps[:, 0] - logps[:, 1]))).mean()

    found = grad(loss)({name: p for name, p in weights.items() if f"{blocks}." in name})
    layers = max(int(name.split(f"{blocks}.")[1].split(".")[0]) for name in found) + 1
    return [
        sum(float(g.double().square().sum()) for name, g in found.items() if f"{blocks}.{index}." in name)
        for index in range(layers)
    ]


@pytest.mark.parametrize(("name", "blocks"), [("llama", "layers"), ("gpt2", "h"), ("qwen3", "layers")])
@pytest.mark.parametrize(("batch_size", "memory", "passes"), [(8, 0, 1), (3, 2**30, 1), (3, 0, 3)])
def test_energy_is_that_of_all_gradients(
    name: str, blocks: str, batch_size: int, memory: int, passes: int, tokenizer: Any, pairs: Any
) -> None:
    model = build(name)
    state = ModelState.plain(model, name)
    reference = reference_logps(state, tokenizer, pairs) + torch.linspace(-3, 2, 16).reshape(8, 2)
    found = block_gradients(state, tokenizer, pairs, reference, BETA, batch_size, memory)
    oracle = expected(model, tokenizer, pairs, reference, blocks)
    assert found.energy == pytest.approx(oracle, rel=1e-4) and found.passes == passes
    assert found.share(2, 3) == pytest.approx(sum(oracle[1:]) / sum(oracle), rel=1e-4)


def test_its_own_reference_gives_log_two_and_a_gradient(tokenizer: Any, pairs: Any) -> None:
    state = ModelState.plain(build("llama"), "llama")
    found = block_gradients(state, tokenizer, pairs, reference_logps(state, tokenizer, pairs), BETA)
    assert found.loss == pytest.approx(0.6931472, abs=1e-5) and min(found.energy) > 0


@pytest.mark.parametrize("linearized", [True, False, None])
def test_axes_count_as_weights_of_the_merged_network(linearized: bool | None, tokenizer: Any, pairs: Any) -> None:
    model = two_axes(build("llama"))
    base = ModelState.base(model)
    reference = reference_logps(base, tokenizer, pairs)
    mix = ModelState.mix(model, {"help": 0.5, "verb": -0.3}, linearized)
    found = block_gradients(mix, tokenizer, pairs, reference, BETA)
    model.combine_axes({"help": 0.5, "verb": -0.3})
    with pytest.warns(UserWarning, match="tied"):
        merged = model.merge_and_unload()
    assert found.energy == pytest.approx(expected(merged, tokenizer, pairs, reference, "layers"), rel=1e-3)


def test_an_ordinary_lora_counts_by_its_weights(tokenizer: Any, pairs: Any) -> None:
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(build("llama"), config)
    reference = reference_logps(ModelState.base(model), tokenizer, pairs)
    found = block_gradients(ModelState.plain(model, "lora"), tokenizer, pairs, reference, BETA)
    assert found.energy == pytest.approx(
        expected(model.merge_and_unload(), tokenizer, pairs, reference, "layers"), rel=1e-3
    )


def condition(model: Any) -> list[Any]:
    """All that a look at gradients could leave changed."""
    return [
        (name, p.requires_grad, p.grad, p.detach().clone(), len(p._post_accumulate_grad_hooks or ()))
        for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, tokenizer: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").train()
    kept = next(model.parameters())
    kept.grad = torch.ones_like(kept)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before = condition(model)
    state = ModelState.plain(model, "llama")
    run: Callable[[], Any] = lambda: block_gradients(state, tokenizer, pairs, torch.zeros(8, 2), BETA, 4)  # noqa: E731
    if fails:
        monkeypatch.setattr(torch.Tensor, "backward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()
    assert model.training
    for old, new in zip(before, condition(model), strict=True):
        assert old[:2] == new[:2] and old[2] is new[2] and torch.equal(old[3], new[3]) and old[4] == new[4]


def test_named_errors(tokenizer: Any, pairs: Any) -> None:
    model = build("llama")
    state = ModelState.plain(model, "llama")
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for 8 pairs"):
        block_gradients(state, tokenizer, pairs, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="beta is 0"):
        block_gradients(state, tokenizer, pairs, torch.zeros(8, 2), beta=0)
    empty = [{**pairs[0], "rejected": [{"role": "assistant", "content": " "}]}]
    with pytest.raises(ValueError, match="rejected answer of pair 0 is empty"):
        reference_logps(state, tokenizer, empty)
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="block 2 can not have a gradient"):
        block_gradients(state, tokenizer, pairs, torch.zeros(8, 2))
