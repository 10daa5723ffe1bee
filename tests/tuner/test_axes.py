"""λ: a mix is live and touches no weight; stored it is exact in ΔW; every scope puts back what it found."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMS, config, logits, tangent_layers, tangent_model
from conftest import batch, build
from peft import PeftModel
from tolerances import TOLERANCE, assert_equal
from torch import Tensor


INPUTS = batch("left")
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"form": "dense"},
    "shared": {"form": "shared"},
    "shared, rank 2": {"form": "shared", "r": 2},
    "shared, seed 7": {"form": "shared", "projection_seed": 7},
    "shared, 1 block": {"form": "shared", "num_layers": 1, "lm_head": False},
    "trained": {"form": "trained"},
    "rank pattern": {"form": "shared", "rank_pattern": {"q_proj": 2}},
}


def two_axes(first: str = "shared", second: str = "dense", name: str = "llama") -> PeftModel:
    model = tangent_model(name, axis="help", **KINDS[first])
    model.add_adapter("verb", config(**KINDS[second]))
    return model


def deltas(model: PeftModel, weights: dict[str, float]) -> dict[str, Tensor]:
    """Σ λᵢ ΔWᵢ by layer, in float64, from the parameters alone."""
    found = {}
    for layer in tangent_layers(model):
        total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        for name, scale in weights.items():
            if name in layer.tangent_delta:
                total += scale * layer.tangent_delta[name].weight.detach().double()
            elif name in layer.tangent_B:
                a = layer.projection(name, total.device).detach().double()
                total += scale * layer.tangent_B[name].weight.detach().double() @ a
        found[layer.layer_name] = total
    return found


def state(model: PeftModel) -> Any:
    """Everything a scope must put back."""
    return (
        model.axis_weights,
        model.active_adapters,
        [(id(parameter), parameter.requires_grad) for parameter in model.parameters()],
        [
            (dict(layer.tangent_scaling), layer.tangent_live.forced, list(layer.active_adapters))
            for layer in tangent_layers(model)
        ],
    )


# ---- live --------------------------------------------------------------------------------------------------


def test_a_live_mix_touches_no_weight() -> None:
    model = two_axes()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = [id(parameter) for parameter in model.parameters()]
    model.combine_axes({"help": 0.3, "verb": -1.7})
    logits(model, **INPUTS)
    assert model.axis_weights == {"help": 0.3, "verb": -1.7}
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_axes_not_named_are_off() -> None:
    model = two_axes()
    model.combine_axes({"help": 2.0, "verb": 1.0})
    model.combine_axes({"verb": 0.5})
    assert model.axis_weights == {"verb": 0.5}
    assert model.active_adapters == ["verb"]


def test_the_empty_mix_is_the_base() -> None:
    model = two_axes()
    expected = logits(build("llama"), **INPUTS)
    model.combine_axes({})
    assert model.axis_weights == {}
    assert torch.equal(logits(model, **INPUTS), expected)
    model.combine_axes({"help": 1.0})
    assert not torch.equal(logits(model, **INPUTS), expected)
    with model.disable_adapter():
        assert model.axis_weights == {}
    assert model.axis_weights == {"help": 1.0}


def test_loading_and_adding_leave_the_mix(tmp_path: Path) -> None:
    model = two_axes()
    model.save_pretrained(tmp_path)
    model.combine_axes({"help": 0.25, "verb": -0.5})
    expected = logits(model, **INPUTS)
    model.add_adapter("third", config("trained"))
    assert model.axis_weights == {"help": 0.25, "verb": -0.5}
    model.load_adapter(tmp_path / "verb", adapter_name="fourth")
    assert model.axis_weights == {"help": 0.25, "verb": -0.5}
    assert torch.equal(logits(model, **INPUTS), expected)
    model.delete_adapter("third")
    assert model.axis_weights == {"help": 0.25, "verb": -0.5}


def test_set_adapter_resets_to_one() -> None:
    model = two_axes()
    expected = logits(model, **INPUTS)
    model.combine_axes({"help": 0.25, "verb": -0.5})
    model.set_adapter("help")
    assert model.axis_weights == {"help": 1.0}
    assert torch.equal(logits(model, **INPUTS), expected)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_an_axis_on_fewer_layers() -> None:
    model = two_axes("shared, 1 block", "dense")
    real = INPUTS["attention_mask"].bool()
    base = logits(build("llama"), **INPUTS)
    effects = []
    for weights in ({"help": 0.5}, {"verb": -2.0}, {"help": 0.5, "verb": -2.0}):
        with model.axes(weights):
            assert model.axis_weights == weights
            effects.append((logits(model, **INPUTS) - base)[real])
    assert_equal(effects[2], effects[0] + effects[1])


# ---- stored ------------------------------------------------------------------------------------------------

WEIGHTS = {"help": 0.7, "verb": -1.3}


def expected_rank(first: str, second: str) -> int | None:
    """Of the layers that both axes wrap."""
    if "dense" in (first, second):
        return None
    ranks = [KINDS[kind].get("r", 4) for kind in (first, second)]
    seeds = [KINDS[kind].get("projection_seed", 0) for kind in (first, second)]
    same = ranks[0] == ranks[1] and seeds[0] == seeds[1] and "trained" not in (first, second)
    return ranks[0] if same else sum(ranks)


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations_with_replacement(list(KINDS)[:6], 2)])
def test_a_stored_mix_is_exact(first: str, second: str, tmp_path: Path) -> None:
    model = two_axes(first, second).double()
    before = state(model)
    expected = deltas(model, WEIGHTS)
    model.combine_axes(WEIGHTS, "mix")
    assert state(model)[0] == before[0] and state(model)[1] == before[1]
    for name, delta in deltas(model, {"mix": 1.0}).items():
        assert_equal(delta, expected[name])
    head = model.get_base_model().model.layers[-1].mlp.up_proj
    assert head.tangent_r["mix"] == expected_rank(first, second)
    with model.axes(WEIGHTS):
        live = logits(model, **INPUTS)
    model.set_adapter("mix")
    assert_equal(logits(model, **INPUTS), live, TOLERANCE[torch.float32])  # the norms compute in float32
    single = two_axes(first, second)  # saved and loaded as users do, in float32
    single.combine_axes(WEIGHTS, "mix")
    single.save_pretrained(tmp_path, selected_adapters=["mix"])
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "mix").eval()
    single.set_adapter("mix")
    assert torch.equal(logits(loaded, **INPUTS), logits(single, **INPUTS))


@pytest.mark.parametrize("other", KINDS)
def test_a_stored_mix_with_a_rank_pattern(other: str) -> None:
    model = two_axes("rank pattern", other)
    expected = deltas(model, WEIGHTS)
    model.combine_axes(WEIGHTS, "mix")
    for name, delta in deltas(model, {"mix": 1.0}).items():
        assert_equal(delta, expected[name], TOLERANCE[torch.float32])


@pytest.mark.parametrize("form", FORMS)
def test_a_stored_mix_of_one_axis_and_of_mixes(form: str) -> None:
    model = tangent_model("gpt2", form, axis="help")
    model.combine_axes({"help": -0.5}, "opposite")
    model.combine_axes({"opposite": 2.0, "help": 1.0}, "nothing")
    for name, delta in deltas(model, {"opposite": 1.0}).items():
        assert_equal(delta, deltas(model, {"help": -0.5})[name], TOLERANCE[torch.float32])
    assert all(delta.abs().max() < 1e-6 for delta in deltas(model, {"nothing": 1.0}).values())


def test_axes_at_zero_decide_no_form() -> None:
    model = tangent_model("llama", "shared", axis="help")
    model.add_adapter("verb", config("dense"))
    model.combine_axes({"help": 0.5, "verb": 0.0}, adapter_name="mix")
    assert model.peft_config["mix"].r == 4 and model.peft_config["mix"].projection == "shared"
    model.combine_axes({"help": 0.0, "verb": 0.0}, adapter_name="nothing")
    assert model.peft_config["nothing"].r is None


def test_a_stored_mix_does_not_follow_its_sources() -> None:
    model = two_axes("shared", "shared")
    model.combine_axes({"help": 1.0}, "mix")
    expected = deltas(model, {"mix": 1.0})
    with torch.no_grad():
        for layer in tangent_layers(model):
            layer.tangent_B["help"].weight.zero_()
    assert all(torch.equal(delta, expected[name]) for name, delta in deltas(model, {"mix": 1.0}).items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".mix." in n)
    model.set_adapter("mix")  # it can be trained on
    assert any(p.requires_grad for n, p in model.named_parameters() if ".mix." in n)


def test_storing_keeps_the_active_mix() -> None:
    model = two_axes("shared", "trained")
    model.combine_axes({"help": 0.25, "verb": -0.5})
    before, expected = model.axis_weights, logits(model, **INPUTS)
    model.combine_axes({"help": 1.0, "verb": 1.0}, "mix")
    assert model.axis_weights == before
    assert torch.equal(logits(model, **INPUTS), expected)


# ---- scopes ------------------------------------------------------------------------------------------------


def test_axes_nest_and_restore() -> None:
    model = two_axes()
    before = state(model)
    with model.axes(help=0.5):
        with model.axes({"verb": 2.0}, help=-1.0):
            assert model.axis_weights == {"help": -1.0, "verb": 2.0}
            with model.axes({}):
                assert model.axis_weights == {}
            assert model.axis_weights == {"help": -1.0, "verb": 2.0}
        assert model.axis_weights == {"help": 0.5}
    assert state(model) == before


def test_axes_restore_after_an_error() -> None:
    model = two_axes()
    before = state(model)
    with pytest.raises(KeyError), model.axes(help=0.5):
        raise KeyError
    assert state(model) == before
    with pytest.raises(ValueError, match="Unknown axis"), model.axes(help=0.5, nobody=1.0):
        pass
    assert state(model) == before


def test_a_name_given_twice() -> None:
    model = two_axes()
    with pytest.raises(ValueError, match=r"help.*twice"), model.axes({"help": 1.0}, help=0.5):
        pass


def test_axes_inside_a_disabled_model() -> None:
    model = two_axes()
    expected = logits(build("llama"), **INPUTS)
    with model.disable_adapter():
        with model.axes(help=0.5):
            assert torch.equal(logits(model, **INPUTS), expected)
        assert torch.equal(logits(model, **INPUTS), expected)
    assert model.axis_weights == {"help": 1.0}


def test_adding_an_axis_inside_a_scope() -> None:
    model = two_axes()
    with model.axes(help=0.5):
        model.add_adapter("third", config("dense"))
    assert model.axis_weights == {"help": 1.0}


def test_linearized_nests_and_restores() -> None:
    model = two_axes()
    before = state(model)
    linear = logits(model, **INPUTS)
    with model.linearized(False):
        additive = logits(model, **INPUTS)
        with model.linearized():
            assert torch.equal(logits(model, **INPUTS), linear)
        assert torch.equal(logits(model, **INPUTS), additive)
    assert not torch.equal(linear, additive)
    with pytest.raises(KeyError), model.linearized(False):
        raise KeyError
    assert state(model) == before


def test_linearized_reaches_layers_added_inside() -> None:
    model = tangent_model("llama", "shared", axis="help", num_layers=1)
    with model.linearized(False):
        model.add_adapter("verb", config("dense", num_layers=3))
        with model.axes(verb=1.0):
            inside = logits(model, **INPUTS)
    with model.axes(verb=1.0):
        assert not torch.equal(logits(model, **INPUTS), inside)
        with model.linearized(False):
            assert torch.equal(logits(model, **INPUTS), inside)


def test_additive_axes() -> None:
    """`linearize=False` is θ(λ), whatever the scope of the linearized ones says."""
    model = tangent_model("llama", "shared", axis="help", linearize=False)
    found = logits(model, **INPUTS)
    with model.linearized(False):
        assert torch.equal(logits(model, **INPUTS), found)
    with model.linearized(True):
        assert not torch.equal(logits(model, **INPUTS), found)


# ---- deleting ----------------------------------------------------------------------------------------------


def three_axes() -> PeftModel:
    model = two_axes()
    model.add_adapter("third", config("trained"))
    return model


def test_no_weight_of_an_earlier_mix_comes_back() -> None:
    model = two_axes()
    model.combine_axes({"help": 0.2})
    model.combine_axes({"verb": 1.0})
    with pytest.warns(UserWarning, match="Setting active adapter to help"):
        model.delete_adapter("verb")
    assert model.axis_weights == {"help": 1.0}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model, **INPUTS), logits(two_axes(), **INPUTS))


@pytest.mark.filterwarnings("ignore:The head is tied", "ignore:Adapter verb was active")
@pytest.mark.parametrize("activate", ["combine_axes", "set_adapter"])
def test_merging_or_activating_an_axis_of_an_earlier_mix(activate: str) -> None:
    model = two_axes()
    model.combine_axes({"help": 0.2, "verb": -0.5})
    if activate == "combine_axes":
        model.combine_axes({"help": 1.0})
    else:
        model.set_adapter("help")
    model.merge_adapter(["verb"])
    assert all(layer.tangent_merged == {"verb": 1.0} for layer in tangent_layers(model))
    model.unmerge_adapter()
    model.set_adapter("verb")
    model.delete_adapter("verb")
    assert model.axis_weights == {"help": 1.0}
    assert any(parameter.requires_grad for parameter in model.parameters())  # as the deleted one


@pytest.mark.parametrize("keeps_modules", [False, True])
@pytest.mark.parametrize("gone", ["help", "verb", "third"])
def test_deleting_leaves_the_rest_of_the_mix(gone: str, keeps_modules: bool) -> None:
    model = two_axes()
    model.add_adapter("third", config("trained", modules_to_save=["model.norm"] if keeps_modules else None))
    mix = {"help": 0.3, "verb": -0.5, "third": 1.0}
    rest = {name: weight for name, weight in mix.items() if name != gone}
    with model.axes(rest):
        expected = logits(model, **INPUTS)
    model.combine_axes(mix)
    model.delete_adapter(gone)
    assert model.axis_weights == rest
    assert torch.equal(logits(model, **INPUTS), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_deleting_the_axis_that_peft_remembers() -> None:
    """`PeftModel` goes on asking for its configuration while several others are active."""
    model = three_axes()
    model.combine_axes({"verb": 1.0, "third": 0.5})
    expected = logits(model, **INPUTS)
    model.delete_adapter("help")
    assert model.axis_weights == {"verb": 1.0, "third": 0.5}
    assert torch.equal(logits(model, **INPUTS), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, **INPUTS), logits(build("llama"), **INPUTS))
    assert torch.equal(logits(copy.deepcopy(model), **INPUTS), expected)
    assert "help" not in model.peft_config
    with pytest.raises(KeyError, match="nobody"):
        model.peft_config["nobody"]
    model.add_adapter("help", config("dense"))
    assert model.peft_config["help"].r is None


@pytest.mark.parametrize("inside", [{"verb": 1.0}, {}])
def test_deleting_the_active_axis_inside_a_scope(inside: dict[str, float]) -> None:
    model = two_axes()
    with model.axes(inside):
        model.delete_adapter("help")
    assert model.axis_weights == {"verb": 1.0}
    assert not torch.equal(logits(model, **INPUTS), logits(build("llama"), **INPUTS))


def test_deleting_the_last_axis_and_an_unknown_one() -> None:
    model = two_axes()
    with pytest.raises(ValueError, match=r"Unknown axis 'nobody'.*help"):
        model.base_model.delete_adapter("nobody")
    model.combine_axes({"help": 0.5, "verb": 0.5})
    model.delete_adapter("help")
    model.delete_adapter("verb")
    assert model.axis_weights == {} and not model.peft_config


# ---- modules of its own ------------------------------------------------------------------------------------


def keeping_axes() -> PeftModel:
    """Axis `help` with a norm of its own, twice the base's, and `verb` without."""
    model = tangent_model("llama", "shared", axis="help", modules_to_save=["model.norm"])
    model.add_adapter("verb", config("dense"))
    with torch.no_grad():
        model.get_base_model().model.norm.modules_to_save["help"].weight.mul_(2.0)
    return model


def test_the_empty_mix_switches_saved_modules_off() -> None:
    model, expected = keeping_axes(), logits(build("llama"), **INPUTS)
    before, active = state(model), logits(model, **INPUTS)
    with model.axes({}):
        assert torch.equal(logits(model, **INPUTS), expected)
    assert state(model) == before and torch.equal(logits(model, **INPUTS), active)
    model.combine_axes({})
    assert model.axis_weights == {} and torch.equal(logits(model, **INPUTS), expected)
    with model.axes(help=1.0, verb=0.0):
        assert torch.equal(logits(model, **INPUTS), active)
    with model.axes(verb=0.5):
        found = logits(model, **INPUTS)
    assert not torch.equal(found, expected)
    assert torch.equal(logits(model, **INPUTS), expected)


def test_adding_an_axis_while_saved_modules_are_off() -> None:
    model, expected = keeping_axes(), logits(build("llama"), **INPUTS)
    model.combine_axes({})
    model.add_adapter("third", config("dense"))
    model.add_adapter("fourth", config("dense", modules_to_save=["model.norm"]))
    assert model.axis_weights == {} and torch.equal(logits(model, **INPUTS), expected)
    model.delete_adapter("help")
    assert model.axis_weights == {} and torch.equal(logits(model, **INPUTS), expected)


@pytest.mark.parametrize("weight", [0.0, 0.5, -1.0])
def test_saved_modules_have_no_weight(weight: float) -> None:
    model = keeping_axes()
    before = state(model)
    with pytest.raises(ValueError, match=rf"'help'.*\['model.norm'\].*λ = {weight:g} .*leave it out"):
        model.combine_axes({"help": weight})
    model.add_adapter("third", config("dense", modules_to_save=["model.norm"]))
    with pytest.raises(ValueError, match=r"\['help', 'third'\].*'model.norm'.*only one"):
        model.combine_axes({"help": 1.0, "third": 1.0})
    assert state(model)[0] == before[0]


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"nobody": 1.0}, "Unknown axis 'nobody'.*help.*verb"),
        ({"help": float("nan")}, "'help' is nan"),
        ({"help": float("inf")}, "'help' is inf"),
        ({"help": "much"}, "'help' is 'much'"),
        ({"help": None}, "'help' is None"),
        ({"help": [1.0]}, r"'help' is \[1.0\]"),
    ],
)
@pytest.mark.parametrize("name", [None, "mix"])
def test_bad_weights(weights: Any, message: str, name: str | None) -> None:
    model = two_axes()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        model.combine_axes(weights, name)
    assert state(model) == before
    assert "mix" not in model.peft_config


@pytest.mark.parametrize("number", [torch.tensor(0.5), 1, True, __import__("numpy").float32(0.5)])
def test_any_number_is_a_weight(number: Any) -> None:
    model = two_axes()
    model.combine_axes({"help": number})
    assert model.axis_weights == {"help": float(number)}
    assert type(model.axis_weights["help"]) is float


def test_modules_of_its_own_do_not_mix() -> None:
    model = tangent_model("llama", "shared", axis="help", modules_to_save=["model.norm"])
    with pytest.raises(ValueError, match=r"'help' keeps its own copy of the modules \['model.norm'\]"):
        model.combine_axes({"help": 1.0}, "mix")


def test_dense_on_some_layers_only() -> None:
    """Where one axis is dense the mix is dense, also at the layers that only the low-rank axis wraps."""
    model = tangent_model("llama", "shared", axis="help", num_layers=3)
    model.add_adapter("verb", config("dense", num_layers=1, lm_head=False))
    expected = deltas(model, WEIGHTS)
    model.combine_axes(WEIGHTS, "mix")
    assert all(layer.tangent_r["mix"] is None for layer in tangent_layers(model))
    for name, delta in deltas(model, {"mix": 1.0}).items():
        assert_equal(delta, expected[name], TOLERANCE[torch.float32])


def test_shared_projections_of_several_seeds_on_several_blocks() -> None:
    model = tangent_model("llama", "shared", axis="help", layers_to_transform=[0], lm_head=False)
    model.add_adapter("verb", config("shared", layers_to_transform=[1], lm_head=False, projection_seed=7))
    expected = deltas(model, WEIGHTS)
    model.combine_axes(WEIGHTS, "mix")
    for name, delta in deltas(model, {"mix": 1.0}).items():
        assert_equal(delta, expected[name], TOLERANCE[torch.float32])


def test_bad_names_for_a_stored_mix() -> None:
    model = two_axes()
    with pytest.raises(ValueError, match="'verb' exists already"):
        model.combine_axes({"help": 1.0}, "verb")
    with pytest.raises(ValueError, match="at least one axis"):
        model.combine_axes({}, "mix")
    model.add_adapter("additive", config("dense", linearize=False))
    with pytest.raises(ValueError, match="linearize"):
        model.combine_axes({"help": 1.0, "additive": 1.0}, "mix")
    assert list(model.peft_config) == ["help", "verb", "additive"]


@pytest.mark.filterwarnings("ignore:The head is tied")
@pytest.mark.parametrize(
    "action",
    [
        lambda model: model.combine_axes({"help": 0.5}),
        lambda model: model.axes(help=0.5).__enter__(),
    ],
)
def test_a_merged_model_has_no_mix(action: Callable[[PeftModel], Any]) -> None:
    model = two_axes()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        action(model)
    model.unmerge_adapter()
    action(model)


def test_a_large_weight_warns() -> None:
    model = two_axes()
    with pytest.warns(UserWarning, match=r"λ = -3\.5 for axis 'help'"):
        model.combine_axes({"help": -3.5})
    assert model.axis_weights == {"help": -3.5}
    model.combine_axes({"help": -3.0})
