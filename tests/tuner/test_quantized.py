"""Tangents on quantized layers: against the oracle of the dequantized model; merging, exports, what is refused."""

from __future__ import annotations

import re
import sys
import types
import warnings
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from cases import config, deltas, logits, tangent_layers
from conftest import batch
from oracle import gradient, linearized
from peft import PeftModel, get_peft_model
from quantization import SCHEMES, dequantized, plain, quantized, with_quantized_head
from tolerances import assert_equal, relative_error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tangent_peft
from tangent_peft.tuner.backends import quantized_layers
from tangent_peft.tuner.quantized import TangentQuantized


EXACT = ["nf4", "nf4_double", "nf4_storage", "fp4", "torchao_int8", "torchao_int4", "hqq"]
ROUNDS_ITS_INPUT = ["int8", "torchao_dynamic"]  # the kernel rounds activations to 8 bits; LLM.int8 in eval mode only


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def wrapped(base: PreTrainedModel, form: str = "shared", **options: Any) -> PeftModel:
    return get_peft_model(base, config(form, **options)).eval()


def gradients(model: PeftModel, mode: str, cotangent: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """∂⟨cotangent, f_lin⟩/∂ΔW by the weight's name, of a dense axis."""
    for layer in tangent_layers(model):
        layer.tangent_gradient["default"] = mode
    model.train().zero_grad()
    (model(**inputs, use_cache=False).logits * cotangent).sum().backward()
    model.eval()
    return {f"{x.layer_name}.weight": x.tangent_delta["default"].weight.grad.clone() for x in tangent_layers(model)}


# ---- the linearized model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", EXACT)
@pytest.mark.parametrize("targets", [None, ["q_proj"]], ids=["all", "q_proj"])
def test_logits_and_gradient_are_those_of_the_dequantized_model(path: Path, scheme: str, targets: Any) -> None:
    base = quantized(path, scheme, "qwen2")  # has biases
    twin = dequantized(base)
    model, inputs = wrapped(base, "dense", target_modules=targets), batch("left")
    tau, real = deltas(model), inputs["attention_mask"].bool()
    primal, expected = linearized(twin, tau, **inputs)
    found = logits(model, **inputs)
    assert_equal(found[real], expected[real])
    assert relative_error((found - primal)[real], (expected - primal)[real]) <= 1e-3

    cotangent = torch.randn_like(found) * real[..., None]
    reference = gradient(twin, tau, cotangent, **inputs)
    product = (cotangent * (expected - primal)).sum()
    for mode in ("recorded", "replay"):
        grads = gradients(model, mode, cotangent, **inputs)
        assert grads.keys() == reference.keys()
        for name, value in grads.items():
            assert_equal(value, reference[name], 1e-4)
        adjoint = sum((value * tau[name]).sum() for name, value in grads.items())
        assert_equal(adjoint, product, 1e-3)  # ⟨g, Jτ⟩ = ⟨τ, Jᵀg⟩


@pytest.mark.parametrize("scheme", ROUNDS_ITS_INPUT)
def test_kernels_that_round_their_input_are_linearized_at_the_dequantized_weights(path: Path, scheme: str) -> None:
    base = quantized(path, scheme, "qwen2")
    twin = dequantized(base)
    model, inputs = wrapped(base, "dense"), batch("right")
    tau, real = deltas(model), inputs["attention_mask"].bool()
    assert relative_error(logits(model, **inputs)[real], linearized(twin, tau, **inputs)[1][real]) < 0.1
    cotangent = torch.randn(*real.shape, 300) * real[..., None]
    recorded, replayed = (gradients(model, mode, cotangent, **inputs) for mode in ("recorded", "replay"))
    for name, value in recorded.items():
        assert_equal(value, replayed[name])
    model.train()  # the mode in which both passes ran
    with torch.no_grad():
        full = model(**inputs).logits
        with model.disable_adapter():
            tangent = full - model(**inputs).logits
    assert_equal(sum((g * tau[n]).sum() for n, g in recorded.items()), (cotangent * tangent).sum(), 1e-3)
    if scheme == "int8":  # on a CPU it rounds nothing in train mode
        assert_equal(full[real], linearized(twin, tau, **inputs)[1][real])


@pytest.mark.parametrize("scheme", ["nf4", "int8", "torchao_int8", "hqq"])
def test_lambda_zero_is_the_quantized_base_bit_for_bit_and_generation_needs_no_cache(path: Path, scheme: str) -> None:
    base = quantized(path, scheme)
    inputs = batch("left")
    model = wrapped(base)
    with model.disable_adapter():
        expected = logits(model, **inputs)
    with model.axes(default=0.0):
        assert torch.equal(logits(model, **inputs), expected)
    options = {"max_new_tokens": 6, "do_sample": False}
    cached, uncached = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_bfloat16(path: Path) -> None:
    base = quantized(path, "nf4", dtype=torch.bfloat16)
    twin = dequantized(base)
    model, inputs = wrapped(base, "dense"), batch("right")
    real = inputs["attention_mask"].bool()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = linearized(twin, deltas(model), **inputs)[1]
    assert relative_error(logits(model, **inputs)[real], expected[real]) < 0.05


@pytest.mark.parametrize("scheme", ["nf4", "nf4_double", "fp4"])
def test_a_layer_that_ran_in_eval_mode_before_it_is_wrapped(path: Path, scheme: str) -> None:
    """bitsandbytes repacks it for the CPU, where it then has no backward and is read wrongly."""
    base, inputs = quantized(path, scheme), batch("right")
    original = dequantized(base)
    logits(base, **inputs)
    assert len(list(quantized_layers(base))) == 21  # unpacks them
    twin = dequantized(base)
    for name, weight in twin.named_parameters():
        assert relative_error(weight, original.get_parameter(name)) < 1e-2  # the scales are rounded by now
    logits(base, **inputs)
    model = wrapped(base, "dense")
    tau, real = deltas(model), inputs["attention_mask"].bool()
    assert_equal(logits(model, **inputs)[real], linearized(twin, tau, **inputs)[1][real])
    cotangent = torch.randn(*real.shape, 300) * real[..., None]
    reference = gradient(twin, tau, cotangent, **inputs)
    for name, value in gradients(model, "replay", cotangent, **inputs).items():
        assert_equal(value, reference[name])


def test_the_head_may_be_quantized(path: Path) -> None:
    base = with_quantized_head(quantized(path, "nf4"))
    twin, inputs = dequantized(base), batch("right")
    real = inputs["attention_mask"].bool()
    model = wrapped(base, "dense")
    assert_equal(logits(model, **inputs)[real], linearized(twin, deltas(model), **inputs)[1][real])


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nf4", "int8", "torchao_int8"])
def test_a_packed_weight_may_be_looked_at_and_not_computed_with(path: Path, scheme: str) -> None:
    model = wrapped(quantized(path, scheme, "qwen2"))
    layer = tangent_layers(model)[0]
    packed = layer.weight  # outside of a pass
    with model.linearized(False):
        assert (layer.weight.dtype, layer.weight.shape) == (packed.dtype, packed.shape)
        with pytest.raises(RuntimeError, match=r"reads the packed weight.*exclude_modules"):
            _ = layer.weight * 2


def test_one_layer_is_dequantized_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive, largest = wrapped(quantized(path, "nf4"), "dense"), [0], [0]
    dequantize = bnb.functional.dequantize_4bit

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        weight = dequantize(*args, **kwargs)
        alive[0] += 1
        largest[0] = max(largest[0], alive[0])
        weakref.finalize(weight, lambda: alive.append(alive.pop() - 1))
        return weight

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", counted)
    for mode in ("recorded", "replay"):
        gradients(model, mode, torch.randn(3, 10, 300), **batch("right"))
    assert alive[0] == 0 and largest[0] == 1
    packed = [layer.get_base_layer().weight for layer in tangent_layers(model) if isinstance(layer, TangentQuantized)]
    assert len(packed) == 14 and all(weight.dtype == torch.uint8 for weight in packed)


# ---- merging and exports ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nf4_double", "int8", "torchao_int8", "hqq"])
def test_merging_quantizes_again_and_unmerging_restores_every_bit(path: Path, scheme: str) -> None:
    model, inputs = wrapped(quantized(path, scheme)), batch("right")
    real = inputs["attention_mask"].bool()
    layers = [layer for layer in tangent_layers(model) if isinstance(layer, TangentQuantized)]
    before, weights = logits(model, **inputs), [layer.get_base_weight() for layer in layers]
    with model.linearized(False):
        expected = logits(model, **inputs)[real]
    with pytest.warns(UserWarning, match=r"which are quantized again.*export_merged"):
        model.merge_adapter()
    merged = logits(model, **inputs)[real]
    rounding = relative_error(merged, expected)
    assert 0 < rounding < (0.1 if "8" in scheme else 0.9)
    model.unmerge_adapter()
    assert all(torch.equal(x.get_base_weight(), w) for x, w in zip(layers, weights, strict=True))
    assert_equal(logits(model, **inputs), before)  # the head is an ordinary layer, whose sum is rounded
    with pytest.warns(UserWarning, match="quantized again"):
        unloaded = model.merge_and_unload()
    assert_equal(logits(unloaded, **inputs)[real], merged, 1e-5)
    assert not any(layer._forward_hooks for layer in unloaded.modules())


@pytest.mark.parametrize("scheme", ["nf4", "int8", "torchao_int4"])
def test_export_merged_writes_the_dequantized_base_with_tau(path: Path, scheme: str, tmp_path: Path) -> None:
    base = quantized(path, scheme, "qwen2")
    twin = dequantized(base)
    model, inputs = wrapped(base), batch("right")
    model.export_merged(tmp_path / "merged")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in vars(exported.config)
    with torch.no_grad():
        for name, delta in deltas(model).items():
            twin.get_parameter(name).add_(delta)
    assert_equal(logits(exported, **inputs), logits(twin, **inputs))
    report = model.export_lora(tmp_path / "lora")
    lora = PeftModel.from_pretrained(quantized(path, scheme, "qwen2"), tmp_path / "lora").train()
    with model.train().linearized(False):
        assert_equal(logits(lora, **inputs), logits(model, **inputs))
    assert report.relative_error == 0.0


@pytest.mark.parametrize("scheme", ["nf4", "torchao_int4"])
def test_export_lora_with_its_head_in_a_dequantized_base(path: Path, scheme: str, tmp_path: Path) -> None:
    base = quantized(path, scheme, "qwen2")
    twin = dequantized(base)
    model, inputs = wrapped(base, "shared"), batch("right")
    export = model.export_lora(tmp_path / "lora", head="merge")
    assert export.head == "merged" and export.relative_error == 0.0 and export.base.quantization is not None
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f"{export.base.quantization}, written dequantized" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "base")
    assert "quantization_config" not in vars(loaded.config)
    with torch.no_grad():
        for name, delta in deltas(model).items():
            twin.get_parameter(name).add_(delta)
    assert_equal(logits(PeftModel.from_pretrained(loaded, tmp_path / "lora").eval(), **inputs), logits(twin, **inputs))


def test_safe_merge_changes_nothing_where_the_sum_is_not_finite(path: Path) -> None:
    model = wrapped(quantized(path, "nf4"), "dense")
    layer = tangent_layers(model)[0]
    before = layer.get_base_weight()
    layer.tangent_delta["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_weight(), before) and not layer.merged


# ---- another precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained_on", "loaded_on"), [("nf4", None), (None, "nf4"), ("hqq", "int8")])
def test_an_axis_moves_to_another_precision_with_a_warning(
    path: Path, trained_on: str | None, loaded_on: str | None, tmp_path: Path
) -> None:
    def base(scheme: str | None) -> PreTrainedModel:
        return plain() if scheme is None else quantized(path, scheme)

    wrapped(base(trained_on)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(base(trained_on), tmp_path)
    names = {None: "full precision", "nf4": "bnb 4bit nf4", "hqq": "hqq", "int8": "bnb 8bit"}
    expected = f"{names[trained_on]} there, {names[loaded_on]} here"
    with pytest.warns(UserWarning, match=expected):
        PeftModel.from_pretrained(base(loaded_on), tmp_path)


def test_an_axis_of_another_model_is_refused_on_a_quantized_base_too(path: Path, tmp_path: Path) -> None:
    wrapped(quantized(path, "nf4")).save_pretrained(tmp_path)
    torch.manual_seed(3)
    other = type(plain())(plain().config)
    with pytest.raises(ValueError, match="trained on another base model"):
        PeftModel.from_pretrained(other, tmp_path)


# ---- layers that can not be read, and what is refused ----------------------------------------------------------------


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.float().mT / 100.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ ctx.saved_tensors[0].float() / 100.0, None


class GptqLike(nn.Module):
    """An affine layer of a backend that PEFT can only run forward."""

    trains = True

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 100).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = _PackedProduct.apply(x if self.trains else x.detach(), self.qweight)
        return y if self.bias is None else y + self.bias


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose layers PEFT takes for GPTQ's, and its dequantized twin."""
    module = types.ModuleType("gptqmodel.nn_modules.qlinear")
    vars(module)["BaseQuantLinear"] = GptqLike
    for name in ("gptqmodel", "gptqmodel.nn_modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("peft.utils.quantization_utils.is_gptqmodel_available", lambda: True)
    model, twin = plain("qwen2"), plain("qwen2")
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layer = GptqLike(linear)
            model.set_submodule(name, layer)
            twin.get_submodule(name).weight.data = layer.qweight.float() / 100.0
    return model, twin


@pytest.mark.parametrize("targets", [None, ["q_proj"]], ids=["all", "q_proj"])
def test_layers_that_can_only_be_called_follow_the_affine_rule(gptq: Any, targets: Any) -> None:
    base, twin = gptq
    model, inputs = wrapped(base, "dense", target_modules=targets), batch("left")
    tau, real = deltas(model), inputs["attention_mask"].bool()
    found = logits(model, **inputs)
    assert_equal(found[real], linearized(twin, tau, **inputs)[1][real])
    cotangent = torch.randn_like(found) * real[..., None]
    reference = gradient(twin, tau, cotangent, **inputs)
    for mode in ("recorded", "replay"):
        for name, value in gradients(model, mode, cotangent, **inputs).items():
            assert_equal(value, reference[name])


def test_layers_that_can_only_be_called_merge_and_export_nothing_but_a_lora(gptq: Any, tmp_path: Path) -> None:
    model = wrapped(gptq[0])
    with pytest.raises(ValueError, match=r"quantized by gptq.*can not be quantized again.*bfloat16.*export_lora"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"quantized by gptq and can not be dequantized.*export_lora"):
        model.export_merged(tmp_path)
    with pytest.raises(ValueError, match=r"quantized by gptq and can not be dequantized"):
        model.export_lora(tmp_path / "lora", head="merge")
    assert not any(tmp_path.iterdir())
    assert model.export_lora(tmp_path / "lora").relative_error == 0.0
    assert model.peft_config["default"].base_fingerprint is None


def test_layers_without_a_backward_run_an_axis_and_train_none(gptq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GptqLike, "trains", False)
    with pytest.raises(ValueError, match=r"a GptqLike, has no backward"):
        wrapped(gptq[0])
    base, twin = gptq  # as it was: it is refused before anything is wrapped
    model, inputs = wrapped(base, inference_mode=True), batch("right")
    real = inputs["attention_mask"].bool()
    assert_equal(logits(model, **inputs)[real], linearized(twin, deltas(model), **inputs)[1][real])


def test_an_unknown_quantization_is_refused_by_name(path: Path) -> None:
    base = plain()
    base.model.layers[2].mlp.up_proj = GptqLike(base.model.layers[2].mlp.up_proj)  # PEFT is told nothing here
    with pytest.raises(TypeError, match=r"'model\.layers\.2\.mlp\.up_proj', a GptqLike.*torch\.int8.*What works"):
        wrapped(base, target_modules=["q_proj"])
    base = plain()
    base.model.layers[0].mlp.up_proj = GptqLike(base.model.layers[0].mlp.up_proj)  # below every tangent
    wrapped(base, target_modules=["q_proj"])


def test_bitsandbytes_layers_that_are_not_quantized_are_refused_by_name() -> None:
    base = plain()
    base.model.layers[2].mlp.up_proj = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=True)
    with pytest.raises(TypeError, match=r"up_proj' is a Linear8bitLt.*not quantized.*load_in_8bit"):
        wrapped(base)


# ---- the package itself ----------------------------------------------------------------------------------------------


def test_every_scheme_is_covered() -> None:
    assert {*EXACT, *ROUNDS_ITS_INPUT} == {*SCHEMES, "hqq"}


def test_the_package_imports_no_quantization_library() -> None:
    """PEFT does, if they are installed; a user without them needs none."""
    importing = re.compile(r"^\s*(import|from) (bitsandbytes|torchao|hqq)\b", re.MULTILINE)
    sources = Path(tangent_peft.__file__).parent.rglob("*.py")
    assert not [path.name for path in sources if importing.search(path.read_text(encoding="utf-8"))]
