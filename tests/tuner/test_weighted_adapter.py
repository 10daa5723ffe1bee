"""`add_weighted_adapter`: every combination type equals the same rule on ΔW formed in the test, and reloads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cases import config, in_float64, logits, tangent_layers, tangent_model
from conftest import batch, build
from moe import build_moe
from oracle import linearized
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils
from quantization import quantized
from tolerances import TOLERANCE, assert_equal
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tangent_peft import TangentConfig
from tangent_peft.tuner.combine import CombinationType


pytestmark = [pytest.mark.filterwarnings("ignore:The (head|input embedding) .*is tied to the")]
INPUTS = batch("left")
REAL = INPUTS["attention_mask"].bool()
DOUBLE = TOLERANCE[torch.float64]
TYPES: tuple[str, ...] = get_args(CombinationType)
PRUNING = [kind for kind in TYPES if kind not in ("linear", "cat", "svd")]
WEIGHTS = [0.7, -1.3]
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"form": "dense"},
    "shared": {"form": "shared"},
    "rank 2": {"form": "shared", "r": 2},
    "seed 7": {"form": "shared", "projection_seed": 7},
    "one block": {"form": "shared", "num_layers": 1, "lm_head": False},
    "pattern": {"form": "shared", "rank_pattern": {"q_proj": 2, "down_proj": 6}},
    "trained": {"form": "trained"},
}
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "lm_head": False,
    },
    "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
}


def base_of(family: str) -> Any:
    if family == "experts":
        return build_moe("qwen3_moe")
    return build("gpt2" if family == "gpt2" else "llama")


def two_axes(first: str = "shared", second: str = "shared", family: str = "llama") -> PeftModel:
    options = FAMILY[family]
    model = get_peft_model(base_of(family), config(**{**KINDS[first], **options}), adapter_name="help").eval()
    model.add_adapter("verb", config(**{**KINDS[second], **options}))
    return model


def delta(layer: Any, axis: str) -> Tensor:
    """ΔW (…, out, in) in float64, from the parameters alone."""
    if axis in layer.tangent_delta:
        return layer.tangent_delta[axis].weight.detach().double()
    b = layer.tangent_B[axis].weight.detach().double()
    return b @ layer.projection(axis, b.device).detach().double()


def options_of(kind: str, rank: int | None = 3) -> dict[str, Any]:
    chosen: dict[str, Any] = {"combination_type": kind}
    if kind.endswith("svd"):
        chosen["svd_rank"] = rank
    if kind in PRUNING:
        chosen["density"] = 0.4
    return chosen


def reference(
    layer: Any, axes: list[str], weights: list[float], kind: str, rank: int = 3, sign: str = "total"
) -> Tensor:
    """The rule on ΔW, by `merge_utils` and a full SVD."""
    present = [(axis, weight) for axis, weight in zip(axes, weights, strict=True) if axis in layer.tangent_r]
    deltas = [delta(layer, axis) for axis, _ in present]
    scales = torch.tensor([weight for _, weight in present], dtype=torch.float64)
    rule = kind.removesuffix("_svd")
    if rule in ("linear", "cat", "svd"):
        total = merge_utils.task_arithmetic(deltas, scales)
    elif rule.endswith("ties"):
        total = vars(merge_utils)[rule](deltas, scales, 0.4, sign)
    else:
        total = vars(merge_utils)[rule](deltas, scales, 0.4)
    if not kind.endswith("svd"):
        return total
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def assert_is(
    model: PeftModel, kind: str, axes: list[str], weights: list[float], new: str = "mix", **more: Any
) -> None:
    """Of every layer; those that neither axis wraps have no tangent."""
    torch.manual_seed(5)
    for layer in tangent_layers(model):
        if any(axis in layer.tangent_r for axis in axes):
            expected = reference(layer, axes, weights, kind, **more)
            assert_equal(delta(layer, new), expected, DOUBLE)
        else:
            assert new not in layer.tangent_r


def combine(model: PeftModel, kind: str, **more: Any) -> None:
    torch.manual_seed(5)
    model.add_weighted_adapter(["help", "verb"], WEIGHTS, "mix", **{**options_of(kind), **more})


# ---- every type, against the rule on ΔW ------------------------------------------------------------------------------

PAIRS = [
    *itertools.combinations_with_replacement(["dense", "shared", "trained"], 2),
    ("shared", "rank 2"),
    ("shared", "seed 7"),
    ("one block", "shared"),
    ("pattern", "shared"),
    ("pattern", "trained"),
]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_type_is_the_rule_on_delta(first: str, second: str, kind: str) -> None:
    model = two_axes(first, second).double()
    combine(model, kind)
    assert_is(model, kind, ["help", "verb"], WEIGHTS)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", ["gpt2", "experts", "embedding"])
@pytest.mark.parametrize(("first", "second"), [("shared", "shared"), ("shared", "trained"), ("dense", "shared")])
def test_every_type_on_other_layers(family: str, first: str, second: str, kind: str) -> None:
    model = two_axes(first, second, family).double()
    combine(model, kind)
    assert_is(model, kind, ["help", "verb"], WEIGHTS)
    if family == "embedding":
        embedding = model.get_base_model().model.embed_tokens
        assert not delta(embedding, "mix")[:, embedding.padding_idx].any()
        for holder in (embedding.tangent_A, embedding.tangent_delta):
            assert "mix" not in holder or not holder["mix"].weight[:, embedding.padding_idx].any()


@pytest.mark.parametrize("kind", ["ties", "dare_ties_svd"])
def test_signs_by_frequency(kind: str) -> None:
    model = two_axes("dense", "trained").double()
    model.add_adapter("third", config("dense"))
    model = model.double()
    names, weights = ["help", "third", "verb"], [1.0, -0.5, 2.0]
    torch.manual_seed(5)
    model.add_weighted_adapter(names, weights, "mix", majority_sign_method="frequency", **options_of(kind))
    assert_is(model, kind, names, weights, sign="frequency")
    torch.manual_seed(5)
    model.add_weighted_adapter(names, weights, "total", **options_of(kind))
    assert any(not torch.equal(delta(layer, "mix"), delta(layer, "total")) for layer in tangent_layers(model))


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "magnitude_prune_svd"])
def test_one_axis(kind: str) -> None:
    model = two_axes("trained").double()
    model.add_weighted_adapter(["help"], [-0.5], "mix", **options_of(kind))
    assert_is(model, kind, ["help"], [-0.5])


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_one_minus_one_is_the_difference(first: str, second: str) -> None:
    """Which LoRA's `linear` is not, by an error of the size of ΔW."""
    model = two_axes(first, second).double()
    model.add_weighted_adapter(["help", "verb"], [1.0, -1.0], "difference")
    model.add_weighted_adapter(["difference", "verb"], [1.0, 1.0], "again")
    for layer in tangent_layers(model):
        zero = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        parts = [delta(layer, name) if name in layer.tangent_r else zero for name in ("help", "verb")]
        assert_equal(delta(layer, "difference"), parts[0] - parts[1], DOUBLE)
        error = (delta(layer, "again") - parts[0]).abs().max()
        assert error <= DOUBLE * max(float(part.abs().max()) for part in parts)


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_it_is_what_lora_computes_where_that_is_exact(kind: str, tmp_path: Path) -> None:
    """Stock PEFT on the same ΔW: these of its types act on ΔW, or concatenate."""
    options = {"target_modules": ["q_proj", "down_proj"], "lm_head": False}
    model = tangent_model("llama", "trained", axis="help", **options)
    model.add_adapter("verb", config("shared", **options))
    for name in ("help", "verb"):
        model.export_lora(tmp_path / name, {name: 1.0})
    lora = PeftModel.from_pretrained(build("llama"), tmp_path / "help", adapter_name="help")
    lora.load_adapter(tmp_path / "verb", "verb")
    for host in (lora, model):
        host.add_weighted_adapter(["help", "verb"], WEIGHTS, "mix", **options_of(kind))
    modules = dict(lora.get_base_model().named_modules())
    for layer in tangent_layers(model):
        expected = modules[layer.layer_name].get_delta_weight("mix")
        assert_equal(delta(layer, "mix").float(), expected, 1e-4 if kind in PRUNING else None)


# ---- the form of what is stored --------------------------------------------------------------------------------------


def test_shared_projections_stay_at_their_rank() -> None:
    model = two_axes()
    for kind in ("linear", "svd"):
        model.add_weighted_adapter(["help", "verb"], WEIGHTS, kind, kind)
        assert (model.peft_config[kind].r, model.peft_config[kind].projection) == (4, "shared")
        assert not any(kind in layer.tangent_A for layer in tangent_layers(model))
    model.add_weighted_adapter(["help", "verb"], WEIGHTS, "cat", "cat")
    assert (model.peft_config["cat"].r, model.peft_config["cat"].projection) == (8, "trained")
    model.add_weighted_adapter(["help", "verb"], WEIGHTS, "smaller", "svd", svd_rank=2)
    assert (model.peft_config["smaller"].r, model.peft_config["smaller"].projection) == (2, "trained")
    model.add_weighted_adapter(["help", "verb"], WEIGHTS, "ties", "ties", density=0.5)
    assert model.peft_config["ties"].r is None


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_ranks_that_add_up_to_more_than_a_matrix_has(kind: str, tmp_path: Path) -> None:
    """Head and embedding (300, 32), keys (16, 32): no rank above the smaller side is stored, and ΔW is the same."""
    model = tangent_model("llama", "trained", axis="help", r=20)
    model.add_adapter("verb", config("trained", r=14))
    model = model.double()
    combine(model, kind)
    assert_is(model, kind, ["help", "verb"], WEIGHTS)
    ranks = {layer.layer_name.rpartition(".")[2]: layer.tangent_r["mix"] for layer in tangent_layers(model)}
    assert (ranks["lm_head"], ranks["k_proj"], ranks["down_proj"]) == (32, 16, 32)
    assert_reloads(model.float(), tmp_path)


def test_the_default_rank_is_the_largest() -> None:
    model = two_axes("rank 2", "trained").double()
    model.add_weighted_adapter(["help", "verb"], WEIGHTS, "mix", "svd")
    assert model.peft_config["mix"].r == 4
    assert_is(model, "svd", ["help", "verb"], WEIGHTS, rank=4)


def test_it_is_neither_active_nor_trained() -> None:
    model = two_axes()
    model.combine_axes({"help": 0.25, "verb": -0.5})
    expected = logits(model, **INPUTS)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    combine(model, "ties")
    assert model.axis_weights == {"help": 0.25, "verb": -0.5}
    assert torch.equal(logits(model, **INPUTS), expected)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    model.set_adapter("mix")
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if ".mix." in name)
    model.set_adapter("help")
    model.combine_axes({"mix": 1.0, "verb": -2.0}, "of a mix")
    model.delete_adapter("mix")
    assert list(model.peft_config) == ["help", "verb", "of a mix"]


def assert_reloads(model: PeftModel, path: Path, base: Callable[[], Any] | None = None) -> None:
    """Saved and loaded on a fresh base: the same ΔW, bit for bit, and the same logits."""
    model.save_pretrained(path, selected_adapters=["mix"])
    fresh = build("llama") if base is None else base()
    loaded = PeftModel.from_pretrained(fresh, path / "mix", adapter_name="mix").eval()
    found = {layer.layer_name: layer for layer in tangent_layers(loaded) if "mix" in layer.tangent_r}
    stored = {layer.layer_name: layer for layer in tangent_layers(model) if "mix" in layer.tangent_r}
    assert set(found) == set(stored)
    for name, layer in stored.items():
        assert found[name].tangent_r == {"mix": layer.tangent_r["mix"]}
        assert torch.equal(delta(found[name], "mix"), delta(layer, "mix"))
    model.set_adapter("mix")
    assert torch.equal(logits(loaded, **INPUTS)[REAL], logits(model, **INPUTS)[REAL])


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "dare_ties", "magnitude_prune_svd"])
@pytest.mark.parametrize(("first", "second"), [("pattern", "shared"), ("one block", "trained"), ("shared", "shared")])
def test_what_is_stored_reloads(first: str, second: str, kind: str, tmp_path: Path) -> None:
    """Also with ranks that differ from layer to layer, where LoRA's result does not load (huggingface/peft#3737)."""
    model = two_axes(first, second)
    combine(model, kind)
    assert_reloads(model, tmp_path)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "dare_linear_svd"])
@pytest.mark.parametrize("family", ["experts", "embedding", "gpt2"])
def test_what_is_stored_reloads_on_other_layers(family: str, kind: str, tmp_path: Path) -> None:
    model = two_axes("shared", "trained", family)
    combine(model, kind)
    assert_reloads(model, tmp_path, lambda: base_of(family))


@pytest.mark.parametrize("kind", ["linear", "svd", "ties"])
def test_on_a_quantized_base(kind: str, tmp_path: Path) -> None:
    """The tangent is an ordinary matrix beside the packed weight."""
    model = get_peft_model(quantized(tmp_path, "nf4"), config("shared"), adapter_name="help").eval()
    model.add_adapter("verb", config("trained"))
    combine(model, kind)
    torch.manual_seed(5)
    for layer in tangent_layers(model):
        expected = reference(layer, ["help", "verb"], WEIGHTS, kind)
        assert_equal(delta(layer, "mix"), expected, TOLERANCE[torch.float32])
    assert_reloads(model, tmp_path, lambda: quantized(tmp_path, "nf4"))


@pytest.mark.parametrize(("first", "second"), [("shared", "shared"), ("trained", "dense")])
@pytest.mark.parametrize("family", ["llama", "embedding", "experts"])
def test_the_linearized_effect_is_the_sum_of_effects(
    first: str, second: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each axis's effect by the oracle on the unmodified network; a router computes its softmax in float32."""
    model, plain, total = in_float64(two_axes(first, second, family), monkeypatch), base_of(family).double(), 0.0
    if family == "experts":
        model.get_base_model().set_experts_implementation("eager")
        plain.set_experts_implementation("eager")
    for axis, weight in zip(["help", "verb"], WEIGHTS, strict=True):
        layers = [layer for layer in tangent_layers(model) if axis in layer.tangent_r]
        f0, f = linearized(plain, {x.weight_name: x._layout(delta(x, axis)) for x in layers}, **INPUTS)
        total = total + weight * (f - f0)
    combine(model, "linear")
    model.set_adapter("mix")
    tolerance = TOLERANCE[torch.float32 if family == "experts" else torch.float64]
    assert_equal((logits(model, **INPUTS) - f0)[REAL], total[REAL], tolerance)


# ---- clamping --------------------------------------------------------------------------------------------------------


def test_clamping_as_lora_does() -> None:
    model = two_axes("dense", "dense").double()
    model.add_weighted_adapter(["help", "verb"], WEIGHTS, "mix", "svd", svd_rank=3, svd_clamp=0.9)
    for layer in tangent_layers(model):
        total = WEIGHTS[0] * delta(layer, "help") + WEIGHTS[1] * delta(layer, "verb")
        u, s, vh = torch.linalg.svd(total)
        b, a = u[:, :3] * s[:3], vh[:3]
        bound = float(torch.quantile(torch.cat([b.flatten(), a.flatten()]), 0.9))
        assert_equal(delta(layer, "mix"), b.clamp(-bound, bound) @ a.clamp(-bound, bound), DOUBLE)
    with pytest.raises(ValueError, match=r"svd_clamp=0\.01: that quantile .*nearer to 1"):
        model.add_weighted_adapter(["help", "verb"], WEIGHTS, "other", "svd", svd_rank=3, svd_clamp=0.01)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": ["help", "nobody"]}, "Unknown axis 'nobody'.*help.*verb"),
        ({"adapters": ["help"]}, r"1 axes \['help'\] and 2 weights"),
        ({"adapters": "help"}, "are lists, found 'help'"),
        ({"weights": {"help": 1.0, "verb": 2.0}}, "are lists"),
        ({"adapters": [], "weights": []}, "at least one axis"),
        ({"adapters": ["help", "help"]}, r"\['help'\] are named twice"),
        ({"weights": [1.0, float("nan")]}, "'verb' is nan"),
        ({"weights": [1.0, "much"]}, "'verb' is 'much'"),
        ({"adapter_name": "verb"}, "'verb' exists already"),
        ({"adapter_name": "a.b"}, "without dots, found 'a.b'"),
        ({"adapter_name": "half"}, "'half' is the name of something that every torch module has"),
        ({"adapter_name": ""}, "without dots, found ''"),
        ({"combination_type": "slerp"}, r"one of \['linear', 'cat', 'svd', 'ties'.*found 'slerp'"),
        ({"combination_type": "ties"}, "'ties' needs `density`.*found None"),
        ({"combination_type": "ties", "density": 0.0}, r"found 0\.0"),
        ({"combination_type": "dare_linear", "density": 1.5}, r"found 1\.5"),
        ({"combination_type": "dare_linear", "density": float("nan")}, "found nan"),
        ({"combination_type": "magnitude_prune", "density": "half"}, "found 'half'"),
        ({"combination_type": "magnitude_prune", "density": 1e-4}, r"keeps none of the .* entries of layer 'model"),
        ({"combination_type": "svd", "svd_rank": 0}, "`svd_rank` is a positive integer.*found 0"),
        ({"combination_type": "svd", "svd_rank": 2.5}, r"found 2\.5"),
        ({"combination_type": "svd", "svd_rank": 17}, r"svd_rank=17 is above .*k_proj' can have, \(16, 32\)"),
        ({"combination_type": "svd", "svd_clamp": 2.0}, r"a quantile above 0 and at most 1, or None; found 2\.0"),
        ({"combination_type": "svd", "svd_rank": 2, "svd_driver": "fast"}, r"\['gesvd', .*found 'fast'"),
        ({"combination_type": "svd", "svd_rank": 2, "svd_driver": "gesvd"}, "on CUDA; these are on cpu"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "vote"}, r"\['total', .*found 'vote'"),
        ({"svd_rank": 2}, r"'linear' does not use \{'svd_rank': 2\}"),
        ({"combination_type": "svd", "density": 0.5}, r"'svd' does not use \{'density': 0\.5\}"),
        ({"combination_type": "cat", "majority_sign_method": "frequency"}, "does not use.*frequency"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model = two_axes()
    before = [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    arguments: dict[str, Any] = {"adapters": ["help", "verb"], "weights": WEIGHTS, "adapter_name": "mix", **options}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**arguments)
    assert list(model.peft_config) == ["help", "verb"] and model.axis_weights == {"help": 1.0}
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before


def test_dense_axes_give_no_rank() -> None:
    model = two_axes("shared", "dense")
    with pytest.raises(ValueError, match=r"Axes \['verb'\] are dense and give no rank.*svd_rank=16"):
        model.add_weighted_adapter(["help", "verb"], WEIGHTS, "mix", "svd")


@pytest.mark.parametrize("kind", ["linear", "ties"])
def test_axes_that_do_not_mix(kind: str) -> None:
    model = two_axes()
    model.add_adapter("additive", config("dense", linearize=False))
    with pytest.raises(ValueError, match=r"'additive': False.*linearize"):
        model.add_weighted_adapter(["help", "additive"], WEIGHTS, "mix", **options_of(kind))
    model.add_adapter("keeping", config("shared", modules_to_save=["model.norm"]))
    with pytest.raises(ValueError, match=r"'keeping' keeps its own copy of the modules \['model.norm'\]"):
        model.add_weighted_adapter(["help", "keeping"], WEIGHTS, "mix", **options_of(kind))
    model.merge_adapter(["help"])
    with pytest.raises(ValueError, match=r"\['help'\] are merged.*unmerge_adapter"):
        combine(model, kind)
    model.unmerge_adapter()
    tangent_layers(model)[3].tangent_B["verb"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"'verb' has a tangent with NaN or infinite entries at layer 'model"):
        combine(model, kind)
    assert list(model.peft_config) == ["help", "verb", "additive", "keeping"]


def test_a_sharded_axis_is_not_combined() -> None:
    """As DeepSpeed ZeRO-3 marks the parameters that it partitions."""
    model = two_axes()
    vars(tangent_layers(model)[0].tangent_B["verb"].weight)["ds_id"] = 0
    with pytest.raises(ValueError, match=r"'verb' is sharded over several processes \(layer 'model.*in one process"):
        combine(model, "linear")
    assert list(model.peft_config) == ["help", "verb"]


def test_nothing_is_left_of_one_that_fails_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = two_axes().double(), itertools.count()
    kind, expected = type(tangent_layers(model)[0]), logits(model, **INPUTS)
    whole = kind.update_layer

    def fails(self: Any, *args: Any) -> None:
        if next(calls) == 5:
            raise MemoryError("no memory left")
        whole(self, *args)

    monkeypatch.setattr(kind, "update_layer", fails)
    with pytest.raises(MemoryError, match="no memory left"):
        combine(model, "linear")
    monkeypatch.undo()
    assert list(model.peft_config) == ["help", "verb"] and not any(".mix." in name for name in model.state_dict())
    assert torch.equal(logits(model, **INPUTS), expected)
    combine(model, "linear")
    assert_is(model, "linear", ["help", "verb"], WEIGHTS)


def test_names_that_end_like_others(tmp_path: Path) -> None:
    """`layers.1` beside `layers.11`: a rank that differs belongs to one of them."""
    shape = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}

    def base() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=12, tie_word_embeddings=False)).eval()

    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "lm_head": False, "num_layers": None}
    model = get_peft_model(base(), TangentConfig(**options, init_weights=False), adapter_name="help").eval()
    model.add_adapter(
        "verb", TangentConfig(**{**options, "r": 3}, init_weights=False, layers_to_transform=[1], task_type="CAUSAL_LM")
    )
    combine(model, "linear")
    ranks = [layer.tangent_r["mix"] for layer in tangent_layers(model)]
    assert ranks == [2, 5, *[2] * 10]
    assert_reloads(model, tmp_path, base)
