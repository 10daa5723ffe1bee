"""The adjoint check: silent on a sound training, loud where a tangent or a gradient gets lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FORMS, config
from conftest import build
from torch import Tensor, nn
from torch.autograd import forward_ad
from training import GRADIENTS, logged

from tangent_peft import TangentDPOTrainer
from tangent_peft.forward.deposit import Collected
from tangent_peft.train import watch as watch_module
from tangent_peft.train.adjoint import TOLERANCE, AdjointCheck


def trainer_with(make_trainer: Callable[..., Any], gradient: str, form: str = "dense", **options: Any) -> Any:
    """A trainer that checks at every step from the second on."""
    chosen, own = GRADIENTS[gradient]
    options = {"axis": "verb", "adjoint_check_steps": 1, "learning_rate": 1e-3, **own, **options}
    return make_trainer(peft_config=config(form, gradient=chosen, init_weights=True), **options)


def errors(trainer: TangentDPOTrainer) -> dict[int, float]:
    """The logged errors by step."""
    return logged(trainer, "adjoint_error/verb")


def mlp_of_a_wrapped_block(trainer: TangentDPOTrainer) -> nn.Module:
    """Its tangent is a part of the block's: what is lost here is lost inside of a replayed block."""
    return trainer.model.get_base_model().model.layers[-1].mlp


# ---- sound trainings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linearized", ["logits", "log_probs"])
@pytest.mark.parametrize("gradient", ["recorded", "replay"])
@pytest.mark.parametrize("form", FORMS)
def test_holds(form: str, gradient: str, linearized: str, make_trainer: Callable[..., Any]) -> None:
    trainer = trainer_with(make_trainer, gradient, form, linearized=linearized, max_steps=4)
    trainer.train()
    assert list(errors(trainer)) == [2, 3, 4]
    assert max(errors(trainer).values()) <= 1e-4


@pytest.mark.parametrize("gradient", ["recorded", "replay"])
@pytest.mark.parametrize("dtype", ["autocast", "base"])
def test_holds_in_half_precision(dtype: str, gradient: str, make_trainer: Callable[..., Any]) -> None:
    """The limit leaves room for rounding, of which more than nothing is left."""
    options = {"bf16": True} if dtype == "autocast" else {"model": build("llama").to(torch.bfloat16)}
    trainer = trainer_with(make_trainer, gradient, max_steps=4, **options)
    trainer.train()
    assert len(errors(trainer)) == 3
    assert 0 < max(errors(trainer).values()) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("every", "steps"), [(0, []), (1, [2, 3, 4, 5, 6]), (4, [2, 3, 5]), (50, [2, 3])], ids=["never", "1", "4", "50"]
)
def test_which_steps_are_checked(every: int, steps: list[int], make_trainer: Callable[..., Any]) -> None:
    """Logs count a step when it is done, so what was checked at step 1 shows at 2."""
    trainer = trainer_with(make_trainer, "replay", adjoint_check_steps=every, max_steps=6)
    trainer.train()
    assert list(errors(trainer)) == steps


def test_once_per_optimizer_step(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []

    class Counted(AdjointCheck):
        def __enter__(self) -> AdjointCheck:
            checks.append(self)
            return super().__enter__()

    monkeypatch.setattr(watch_module, "AdjointCheck", Counted)
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "max_steps": 4}
    trainer = trainer_with(make_trainer, "replay", **options)
    trainer.train()
    assert len(checks) == 3 and max(errors(trainer).values()) <= 1e-4
    assert not any(p._backward_hooks for p in trainer.model.parameters())


# ---- broken ones -----------------------------------------------------------------------------------------------------


class LoseGradient(torch.autograd.Function):
    """Identity whose backward forgets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def lose_tangent(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A hook that knows values only; in the replay nothing is lost."""
    return forward_ad.unpack_dual(output).primal


def lose_tangents_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A hook that hands the tangent on, but not its graph."""
    primal, tangent = forward_ad.unpack_dual(output)
    return output if tangent is None else forward_ad.make_dual(primal, LoseGradient.apply(tangent))


@pytest.mark.parametrize(
    ("gradient", "hook", "step"),
    [("replay", lose_tangent, 1), ("recorded", lose_tangent, 1), ("recorded", lose_tangents_gradient, 2)],
)
def test_what_a_hook_loses_is_found(gradient: str, hook: Any, step: int, make_trainer: Callable[..., Any]) -> None:
    trainer = trainer_with(make_trainer, gradient)
    mlp_of_a_wrapped_block(trainer).register_forward_hook(hook)
    with pytest.raises(RuntimeError, match=rf"adjoint identity does not hold at step {step} of axis 'verb'.*float32"):
        trainer.train()
    assert trainer.state.global_step == step


def test_a_gradient_that_the_replay_loses_is_found(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_with(make_trainer, "replay")
    lost = {id(p) for name, p in trainer.model.named_parameters() if ".down_proj." in name and ".tangent_" in name}
    add = Collected.add

    def forgetful(self: Any, parameter: Tensor, gradient: Tensor) -> None:
        add(self, parameter, gradient * (id(parameter) not in lost))

    trainer.train()  # a sound run: τ of the lost layers is not zero
    monkeypatch.setattr(Collected, "add", forgetful)
    with pytest.raises(RuntimeError, match=r"step 1 of axis 'verb'"):
        trainer.train()


@pytest.mark.parametrize("gradient", ["recorded", "replay"])
def test_a_layer_that_nothing_reaches(gradient: str, make_trainer: Callable[..., Any]) -> None:
    """Such as an expert that no token chose: without tangent and without gradient the identity holds."""
    trainer = trainer_with(make_trainer, gradient)
    mlp_of_a_wrapped_block(trainer).register_forward_hook(lambda module, args, output: output.detach())
    trainer.train()
    assert max(errors(trainer).values()) <= 1e-4


def test_nothing_to_say_at_zero(make_trainer: Callable[..., Any]) -> None:
    """At τ = 0 both sides are 0."""
    trainer = trainer_with(make_trainer, "replay", max_steps=1)
    check = AdjointCheck(trainer.model, "verb", torch.float32)
    assert check.error() is None and check.sides() == (0.0, 0.0)
