"""A tangent per expert: fused weights named in `target_parameters`, against the oracle and through every verb."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMS, config, deltas, in_float64, logits, tangent_layers
from conftest import batch, build
from moe import EXPERTS, FAMILIES, build_moe
from oracle import gradient, linearized
from peft import PeftModel, get_peft_model
from tolerances import assert_equal
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tangent_peft import TangentConfig
from tangent_peft.tuner import TangentExperts, axis_norm, linearity_gap


NAMES = ["experts.gate_up_proj", "experts.down_proj"]
INPUTS = batch("left")
REAL = INPUTS["attention_mask"].bool()
WEIGHTS = {"help": 0.7, "verb": -1.3}


def experts_config(form: str = "dense", **options: Any) -> TangentConfig:
    return config(
        form, **{"num_layers": None, "lm_head": False, "target_modules": [], "target_parameters": NAMES} | options
    )


def model_of(family: str = "mixtral", form: str = "dense", axis: str = "default", **options: Any) -> PeftModel:
    return get_peft_model(build_moe(family), experts_config(form, **options), adapter_name=axis).eval()


def two_axes(first: str = "shared", second: str = "shared", family: str = "qwen3_moe", **options: Any) -> PeftModel:
    model = model_of(family, first, "help", **options)
    model.add_adapter("verb", experts_config(second, **options))
    return model


def oracle_model(family: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    base = build_moe(family)
    base.set_experts_implementation("eager")
    return in_float64(base, monkeypatch)


def assert_gradients(model: PeftModel, form: str, reference: dict[str, Tensor], tolerance: float) -> None:
    """Of every factor, relative to the largest entry that any layer's full gradient has."""
    scale = max(float(full.detach().abs().max()) for full in reference.values())
    for layer in tangent_layers(model):
        full = layer._layout(reference[layer.weight_name])
        if form == "dense":
            pairs = [(layer.tangent_delta["default"].weight.grad, full)]
        else:
            a = layer.projection("default", full.device).detach().to(full.dtype)
            b = layer.tangent_B["default"].weight
            pairs = [(b.grad, full @ a.mT)]
            if form == "trained":
                pairs.append((layer.tangent_A["default"].weight.grad, b.detach().to(full.dtype).mT @ full))
        for found, expected in pairs:
            assert float((found - expected).detach().abs().max()) <= tolerance * scale, layer.layer_name


# ---- the tangent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["recorded", "replay"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradient_equal_the_oracle(
    family: str, form: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 against float64, with the default kernel; a tangent per expert and nothing else."""
    model = model_of(family, form, gradient=mode).train(mode == "replay")
    found = model(**INPUTS, use_cache=False).logits
    cotangent = torch.randn_like(found) * REAL[..., None]
    found.backward(cotangent)
    base, full = oracle_model(family, monkeypatch), {k: v.double() for k, v in deltas(model).items()}
    assert all(delta.shape[0] == EXPERTS for delta in full.values())
    base_logits, expected = linearized(base, full, **INPUTS)
    assert_equal((found - base_logits)[REAL], (expected - base_logits)[REAL], 2e-5)
    assert_gradients(model, form, gradient(base, full, cotangent.double(), **INPUTS), 1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("mode", ["recorded", "replay"])
def test_every_plain_implementation_in_float64(implementation: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside tangents on all linear layers and the head."""
    options = {"target_modules": None, "lm_head": True, "gradient": mode}
    model = in_float64(model_of("gpt_oss", "trained", **options), monkeypatch).train(mode == "replay")
    model.set_experts_implementation(implementation)
    found = model(**INPUTS, use_cache=False).logits
    cotangent = torch.randn_like(found) * REAL[..., None]
    found.backward(cotangent)
    base = oracle_model("gpt_oss", monkeypatch)
    base_logits, expected = linearized(base, deltas(model), **INPUTS)
    assert_equal((found - base_logits)[REAL], (expected - base_logits)[REAL], 1e-8)
    assert_gradients(model, "trained", gradient(base, deltas(model), cotangent, **INPUTS), 1e-9)


def test_only_the_last_blocks_and_one_parameter() -> None:
    model = model_of(num_layers=1, target_parameters=["down_proj"])
    assert list(deltas(model)) == ["model.layers.1.mlp.experts.down_proj"]
    model.add_adapter("both", experts_config(layers_to_transform=[0]))
    model.set_adapter("both")
    assert set(deltas(model)) == {f"model.layers.0.mlp.{name}" for name in NAMES}


def test_half_precision() -> None:
    expected = logits(model_of(), **INPUTS)
    model = model_of().bfloat16()
    base = logits(build_moe("mixtral").bfloat16(), **INPUTS)
    assert_equal(logits(model, **INPUTS)[REAL].float(), expected[REAL], 5e-2)
    with model.axes(default=0.0):
        assert torch.equal(logits(model, **INPUTS), base)
    model = model_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(logits(model, **INPUTS)[REAL].float(), expected[REAL], 5e-2)


@pytest.mark.parametrize("form", FORMS)
def test_the_formed_weights_are_not_kept_for_backward(form: str) -> None:
    model = model_of(form=form)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(**INPUTS)
    largest = max(x.numel() for x in kept if x.untyped_storage().data_ptr() not in known)
    assert largest < min(layer.get_base_weight().numel() for layer in tangent_layers(model))


def test_cached_generation_equals_uncached() -> None:
    model = model_of("qwen3_moe")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = [model.generate(**INPUTS, **options, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


def test_nothing_stays_in_the_parameters_place() -> None:
    model = model_of()
    experts = model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    with pytest.raises((RuntimeError, IndexError)):
        experts.register_forward_hook(lambda *_: [][1])
        logits(model, **INPUTS)
    assert "gate_up_proj" not in vars(experts) and isinstance(experts.gate_up_proj, nn.Parameter)
    assert not experts._forward_pre_hooks


def test_outside_of_a_pass() -> None:
    model = model_of()
    hidden = torch.randn(5, 32)
    layer = model.get_base_model().model.layers[0].mlp
    with pytest.raises(RuntimeError, match=r"experts\.\w+' carries the linearized axes"):
        layer(hidden[None])
    with model.disable_adapter():
        layer(hidden[None])


# ---- axes and verbs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forms", [("shared", "shared"), ("trained", "shared"), ("dense", "trained")])
def test_mixes_live_stored_and_saved(forms: tuple[str, str], tmp_path: Path) -> None:
    model = two_axes(*forms, target_modules=["q_proj"])
    with model.axes(WEIGHTS):
        expected = logits(model, **INPUTS)
        with model.linearized(False):
            additive = logits(model, **INPUTS)
    parts = []
    with model.disable_adapter():
        base = logits(model, **INPUTS)
    for name in WEIGHTS:
        with model.axes({name: 1.0}):
            parts.append(logits(model, **INPUTS) - base)
    assert_equal((expected - base)[REAL], (0.7 * parts[0] - 1.3 * parts[1])[REAL], 2e-5)

    model.combine_axes(WEIGHTS, "mix")
    model.set_adapter("mix")
    assert_equal(logits(model, **INPUTS), expected)
    assert model.peft_config["mix"].r == {"shared": 4, "trained": 8, "dense": None}[forms[0]]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_moe("qwen3_moe"), tmp_path / "mix", adapter_name="mix").eval()
    assert_equal(logits(loaded, **INPUTS), expected)
    loaded.load_adapter(tmp_path / "help", "help")
    loaded.load_adapter(tmp_path / "verb", "verb")
    loaded.combine_axes(WEIGHTS)
    assert_equal(logits(loaded, **INPUTS), expected)
    with loaded.linearized(False):
        assert_equal(logits(loaded, **INPUTS), additive)
    loaded.delete_adapter("mix")
    assert_equal(logits(loaded, **INPUTS), expected)
    assert not any(".mix." in key for key in loaded.state_dict())


def test_a_saved_axis_does_not_depend_on_the_other_axes(tmp_path: Path) -> None:
    """Axes on different parameters of a module load in any order."""
    model = model_of("mixtral", "trained", "down", target_parameters=["down_proj"])
    model.add_adapter("up", experts_config("dense", target_parameters=["gate_up_proj"]))
    model.combine_axes({"down": 1.0, "up": 0.5})
    expected = logits(model, **INPUTS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_moe("mixtral"), tmp_path / "up", adapter_name="up").eval()
    loaded.load_adapter(tmp_path / "down", "down", low_cpu_mem_usage=True)
    loaded.combine_axes({"down": 1.0, "up": 0.5})
    assert_equal(logits(loaded, **INPUTS), expected)
    saved = json.loads((tmp_path / "up" / "adapter_config.json").read_text())
    assert saved["target_parameters"] == ["gate_up_proj"] and saved["target_modules"] == []


def test_merging(tmp_path: Path) -> None:
    model = two_axes("dense", "trained", "gpt_oss", lm_head=True)
    model.combine_axes(WEIGHTS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with model.linearized(False):
        expected = logits(model, **INPUTS)
    additive = two_axes("dense", "trained", "gpt_oss", lm_head=True, linearize=False)
    additive.load_state_dict(model.state_dict())
    additive.combine_axes(WEIGHTS)
    assert torch.equal(logits(additive, **INPUTS), expected)

    model.merge_adapter(safe_merge=True)
    assert_equal(logits(model, **INPUTS), expected)
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert_equal(value, before[key])
    model.export_merged(tmp_path, calibration=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_equal(logits(loaded, **INPUTS), expected)
    merged = model.merge_and_unload()
    assert_equal(logits(merged, **INPUTS), expected)
    assert not any(isinstance(module, TangentExperts) for module in merged.modules())
    assert set(merged.state_dict()) == set(build_moe("gpt_oss").state_dict())


def test_unloading_gives_the_base_back() -> None:
    base = model_of().unload()
    assert torch.equal(logits(base, **INPUTS), logits(build_moe("mixtral"), **INPUTS))


def test_a_broken_tangent_is_not_merged() -> None:
    model = model_of()
    layer = tangent_layers(model)[0]
    layer.tangent_delta["default"].weight.data[1, 0, 0] = float("nan")
    before = layer.get_base_weight().clone()
    with pytest.raises(ValueError, match="seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_weight(), before)


@pytest.mark.parametrize("form", FORMS)
def test_norm_and_gap(form: str) -> None:
    """At scales at which no token changes its experts; where one does, the network jumps and f_lin does not."""
    model = model_of("gpt_oss", form)
    total = sum(float(delta.double().square().sum()) for delta in deltas(model).values())
    assert axis_norm(model, "default") == pytest.approx(total**0.5, rel=1e-5)
    gaps = []
    for scale in (0.2, 0.1):
        with model.axes(default=scale):
            gaps.append(linearity_gap(model, [INPUTS]).gap)
    assert gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.2)


def test_a_copy_trains_and_another_base_is_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(model_of("mixtral", "shared", init_weights=True))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(**INPUTS).logits[REAL], INPUTS["input_ids"][REAL])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    model.save_pretrained(tmp_path)
    other = build_moe("mixtral")
    other.model.layers[0].mlp.experts.down_proj.data.mul_(3.0)
    with pytest.raises(ValueError, match="trained on another base model"):
        PeftModel.from_pretrained(other, tmp_path)


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:]], ids=["both", "up", "down"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_lora_of_low_rank_axes_is_exact(family: str, names: list[str], tmp_path: Path) -> None:
    model = two_axes("shared", "trained", family, target_parameters=names)
    model.combine_axes(WEIGHTS)
    with model.linearized(False):
        expected = logits(model, **INPUTS)
    export = model.export_lora(tmp_path, calibration=False)
    assert (export.rank, export.relative_error) == (8, 0.0)
    loaded = PeftModel.from_pretrained(build_moe(family), tmp_path).eval()
    assert_equal(logits(loaded, **INPUTS)[REAL], expected[REAL], 2e-5)
    assert_equal(logits(loaded.merge_and_unload(), **INPUTS)[REAL], expected[REAL], 2e-5)


@pytest.mark.parametrize(("form", "rank"), [("dense", 32), ("shared", 2), ("dense", 2)])
def test_lora_of_another_rank_reports_its_error(form: str, rank: int, tmp_path: Path) -> None:
    model = model_of("olmoe", form)
    exact = deltas(model)
    export = model.export_lora(tmp_path, rank=rank, calibration=False)
    loaded = PeftModel.from_pretrained(build_moe("olmoe"), tmp_path)
    merged = loaded.merge_and_unload().state_dict()
    base = build_moe("olmoe").state_dict()
    missed = sum(float((merged[n] - base[n] - delta).double().square().sum()) for n, delta in exact.items())
    total = sum(float(delta.double().square().sum()) for delta in exact.values())
    assert export.relative_error == pytest.approx((missed / total) ** 0.5, abs=1e-5)
    assert (export.relative_error < 1e-5) == (rank == 32)


def test_no_lora_of_a_single_expert(tmp_path: Path) -> None:
    base = build_moe("mixtral", num_local_experts=1, num_experts_per_tok=1)
    model = get_peft_model(base, experts_config("shared"))
    with pytest.raises(ValueError, match=r"a single expert.*export_merged"):
        model.export_lora(tmp_path)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_parameters": ["expert.w1"]},
            r"is named 'expert\.w1'.*it has \['model\.layers\.\*\.mlp\.experts\.down_proj'",
        ),
        ({"target_parameters": ["gate.weight"]}, "is named 'gate.weight'"),
        ({"exclude_modules": NAMES}, "are excluded or in other blocks"),
        ({"target_parameters": "experts.*"}, "a list of names, found the string"),
    ],
)
def test_names_that_match_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of("mixtral", **options)


def test_a_dense_model_has_none() -> None:
    with pytest.raises(ValueError, match=r"it has \[\]"):
        get_peft_model(build("llama"), experts_config())


def test_a_tangent_of_other_experts_is_not_loaded(tmp_path: Path) -> None:
    model_of("mixtral", "shared").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_fingerprint"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    other = AutoModelForCausalLM.from_config(build_moe("mixtral", num_local_experts=6).config)
    with pytest.raises(ValueError, match=r"has shape \(4, 96, 4\) in the file"):
        PeftModel.from_pretrained(other, tmp_path)
