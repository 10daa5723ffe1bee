"""Switching λ: the same few steps for a small model and a large one, and not one tensor."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import config, logits, tangent_layers
from conftest import batch, enlarge, make_llama
from peft import PeftModel, get_peft_model
from tolerances import assert_equal
from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    """Counts the operations on tensors, of which making one is one."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return function(*args, **(kwargs or {}))


def two_axes(layers: int, inference: bool = True) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(enlarge(make_llama(layers)), config(num_layers=None, inference_mode=inference), "help")
    model.add_adapter("verb", config("shared", num_layers=None, inference_mode=inference))
    return model.eval()


def steps(action: Callable[[], Any]) -> int:
    """How many functions Python calls, its own and built-in ones."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


def scope(model: PeftModel) -> None:
    with model.axes(help=0.5, verb=1.0):
        pass


def rows(model: PeftModel) -> None:
    with model.axes([{"help": 0.5}, {}]):
        pass


def evaluation(model: PeftModel) -> None:
    with model.linearized(False):
        pass


SWITCHES: dict[str, Callable[[PeftModel], Any]] = {
    "another λ": lambda model: model.combine_axes({"help": 0.25}),
    "other axes": lambda model: model.combine_axes({"help": 0.5, "verb": -0.5}),
    "none": lambda model: model.combine_axes({}),
    "a block": scope,
    "a mix for every row": rows,
    "the evaluation": evaluation,
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switching_takes_no_tensor_and_no_longer_for_a_large_model(name: str) -> None:
    counted = []
    for layers in (1, 6):
        model = two_axes(layers)
        model.combine_axes({"help": 1.0})
        SWITCHES[name](model)  # what Python does once in a process, such as asking whether a list is a Mapping
        model.combine_axes({"help": 1.0})
        with Count() as operations:
            counted.append(steps(lambda model=model: SWITCHES[name](model)))
        assert operations.operations == 0
    assert counted[0] == counted[1]
    assert counted[0] < 300


def test_switching_is_light_once_the_trained_axes_are_frozen() -> None:
    """The first mix freezes them, layer by layer; those after it find nothing to do."""
    counted = []
    for layers in (1, 6):
        model = two_axes(layers, inference=False)
        model.combine_axes({"help": 1.0})
        assert not any(parameter.requires_grad for parameter in model.parameters())
        counted.append(steps(lambda model=model: model.combine_axes({"verb": 1.0})))
    assert counted[0] == counted[1]


def test_all_layers_read_one_mix() -> None:
    model, inputs = two_axes(3), batch("right")
    assert len({id(layer.tangent_live) for layer in tangent_layers(model)}) == 1
    model.combine_axes({"help": 0.5})
    model.add_adapter("late", config("trained", num_layers=None, lm_head=False, init_weights=False))
    assert len({id(layer.tangent_live) for layer in tangent_layers(model)}) == 1
    assert model.axis_weights == {"help": 0.5}
    model.combine_axes({"help": 0.5, "late": 0.0})
    found = logits(model, **inputs)
    model.combine_axes({"help": 0.5})
    assert_equal(found, logits(model, **inputs))


def test_training_again_after_a_mix() -> None:
    model = two_axes(2, inference=False)
    model.combine_axes({"verb": 1.0})
    model.set_adapter("help")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".help." in name for name in trained)
    with model.axes({"verb": 1.0}):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert model.axis_weights == {"help": 1.0}
    model.base_model.set_requires_grad("verb")
    model.combine_axes({"help": 1.0})
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_block_copied_into_the_model_reads_its_mix() -> None:
    """As in depth up-scaling, from the next forward on. Copies of the model or of a part have a mix of their own."""
    model, inputs = two_axes(2), {**batch("right"), "use_cache": False}
    model.combine_axes({"help": 1.0})
    part = copy.deepcopy(model.get_base_model().model)
    for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        blocks = changed.get_base_model().model.layers
        blocks.append(copy.deepcopy(blocks[1]))
        changed.combine_axes({})
        plain = changed.unload() if changed is not model else None
        found = logits(changed, **inputs)
        assert {id(layer.tangent_live) for layer in tangent_layers(changed)} <= {id(changed.base_model.tangent_live)}
        if plain is not None:
            assert torch.equal(found, logits(plain, **inputs))
        assert tangent_layers(part)[0].tangent_live.active == ["help"]
        model.combine_axes({"help": 1.0})


def test_an_axis_trains_on_beside_a_frozen_one(tmp_path: Path) -> None:
    model = two_axes(2, inference=False)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path / "verb"), "other")  # frozen, as PEFT loads
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".help." in name for name in trained)
    with model.axes({"other": 1.0}):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    model.combine_axes({"other": 0.5}, adapter_name="stored")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    model.combine_axes({"help": 1.0})
    assert not any(parameter.requires_grad for parameter in model.parameters())
