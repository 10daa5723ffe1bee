"""Embeddings as carriers: the tangent of E[ids] is ΔE[ids], against the oracle and through every verb."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMS, config, deltas, in_float64, logits, tangent_layers
from conftest import MODELS, TINY, batch, build, enlarge, make_llama
from oracle import gradient, linearized
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tolerances import assert_equal
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from tangent_peft.forward.deposit import replaying
from tangent_peft.forward.trunk import Trunk
from tangent_peft.tuner import TangentEmbedding, axis_norm, linearity_gap


pytestmark = [
    pytest.mark.filterwarnings("ignore:The (head|input embedding) .*is tied to the"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]
INPUTS = batch("left")
REAL = INPUTS["attention_mask"].bool()
WEIGHTS = {"help": 0.7, "verb": -1.3}
EMBEDDING = {"gpt2": "wte"}


def make_gemma3() -> PreTrainedModel:
    """Gemma-3: a scaled embedding, tied to the head."""
    options = {"num_hidden_layers": 2, "head_dim": 8, "sliding_window": 8, "eos_token_id": 2}
    return Gemma3ForCausalLM(Gemma3TextConfig(**TINY, **options, pad_token_id=0))


@pytest.fixture(autouse=True)
def _more_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "gemma3", make_gemma3)
    monkeypatch.setitem(MODELS, "untied", lambda: make_llama(tied=False))


def embedding_config(name: str = "llama", form: str = "dense", **options: Any) -> Any:
    return config(form, **{"target_modules": [EMBEDDING.get(name, "embed_tokens"), "down_proj"], **options})


def model_of(name: str = "llama", form: str = "dense", axis: str = "default", **options: Any) -> PeftModel:
    model = get_peft_model(build(name), embedding_config(name, form, **options), adapter_name=axis)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def two_axes(first: str, second: str, name: str = "llama", **options: Any) -> PeftModel:
    model = model_of(name, first, "help", **options)
    model.add_adapter("verb", embedding_config(name, second, **options))
    return model


def embedding_of(model: PeftModel) -> TangentEmbedding:
    return next(layer for layer in tangent_layers(model) if isinstance(layer, TangentEmbedding))


# ---- the tangent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["recorded", "replay"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "untied", "gpt2", "gemma3"])
def test_logits_and_gradient_equal_the_oracle(name: str, form: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a tangent on the tied head; the embedding lies below the replayed blocks."""
    model = in_float64(model_of(name, form, gradient=mode), monkeypatch).train(mode == "replay")
    if mode == "replay":
        model.enable_input_require_grads()
    found = model(**INPUTS, use_cache=False).logits
    cotangent = torch.randn_like(found) * REAL[..., None]
    found.backward(cotangent)
    base, full = in_float64(build(name), monkeypatch), deltas(model)
    base_logits, expected = linearized(base, full, **INPUTS)
    assert_equal((found - base_logits)[REAL], (expected - base_logits)[REAL], 1e-8)
    reference = gradient(base, full, cotangent, **INPUTS)
    for layer in tangent_layers(model):
        of_weight = layer._layout(reference[layer.weight_name])
        if form == "dense":
            assert_equal(layer.tangent_delta["default"].weight.grad, of_weight)
            continue
        a, b = layer.projection("default", of_weight.device).detach().double(), layer.tangent_B["default"].weight
        assert_equal(b.grad, of_weight @ a.mT)
        if form == "trained":
            assert_equal(layer.tangent_A["default"].weight.grad, b.detach().mT @ of_weight)


@pytest.mark.parametrize("form", FORMS)
def test_the_padding_token_has_no_tangent(form: str) -> None:
    model = model_of("llama", form)
    embedding = embedding_of(model)
    assert embedding.padding_idx == 0 and not embedding.get_delta_weight("default")[0].any()
    model(**INPUTS).logits.sum().backward()
    holder = embedding.tangent_delta if form == "dense" else embedding.tangent_A
    if "default" in holder:
        gradient_of_columns = holder["default"].weight.grad
        assert not gradient_of_columns[:, 0].any() and gradient_of_columns[:, 1:].any()
    if form == "shared":
        a = embedding.projection("default", torch.device("cpu"))
        assert_equal(a @ a.mT, torch.eye(4))


def test_a_tangent_on_the_embedding_stays_out_of_the_tied_head() -> None:
    """And the other way round: the two together are the sum of the two alone."""
    both, embedding, head = (
        model_of(target_modules=targets, lm_head=lm_head)
        for targets, lm_head in [(["embed_tokens"], True), (["embed_tokens"], False), (["lm_head"], True)]
    )
    assert both.get_base_model().get_output_embeddings().base_layer.weight is embedding_of(both).base_layer.weight
    for part in (embedding, head):
        for name, parameter in part.named_parameters():
            if "tangent_" in name:
                parameter.data.copy_(dict(both.named_parameters())[name])
    with both.disable_adapter():
        base = logits(both, **INPUTS)
    effects = [(logits(model, **INPUTS) - base)[REAL] for model in (both, embedding, head)]
    assert_equal(effects[0], effects[1] + effects[2])


@pytest.mark.parametrize("form", FORMS)
def test_inside_of_a_replayed_block(form: str) -> None:
    """Where its input, token ids, has no gradient."""
    model = model_of("gemma3", form)
    embedding, ids = embedding_of(model), INPUTS["input_ids"]
    cotangent = torch.randn(*ids.shape, 32)
    with replaying() as collected:
        y = embedding(ids)
        y.backward(cotangent)
    assert torch.equal(y, embedding.base_layer(ids))
    expected = embedding._apply_tangent(ids, embedding.carried_axes())
    trained = embedding.tangent_parameters()
    gradients = torch.autograd.grad(expected, trained, cotangent)
    assert len(collected.gradients) == len(trained)
    for parameter, gradient_of in zip(trained, gradients, strict=True):
        assert_equal(collected.gradients[parameter], gradient_of)


def test_half_precision_and_the_primal_bit_for_bit() -> None:
    expected, base = logits(model_of("gemma3"), **INPUTS), logits(build("gemma3").bfloat16(), **INPUTS)
    model = model_of("gemma3").bfloat16()
    assert_equal(logits(model, **INPUTS)[REAL].float(), expected[REAL], 5e-2)
    with model.axes(default=0.0):
        assert torch.equal(logits(model, **INPUTS), base)


def test_cached_generation_equals_uncached() -> None:
    model = model_of()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = [model.generate(**INPUTS, **options, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


def test_outside_of_a_pass() -> None:
    with pytest.raises(RuntimeError, match=r"embed_tokens' carries the linearized axes"):
        model_of().get_input_embeddings()(INPUTS["input_ids"])


def test_no_trunk_below_an_embedding_with_a_tangent() -> None:
    model = model_of(num_layers=1).get_base_model()
    with pytest.raises(ValueError, match=r"\['model\.embed_tokens'.*carry a tangent below the blocks"):
        Trunk(model, model.model.layers)


# ---- axes and verbs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forms", [("shared", "shared"), ("trained", "shared"), ("dense", "trained")])
def test_mixes_live_stored_and_saved(forms: tuple[str, str], tmp_path: Path) -> None:
    model = two_axes(*forms)
    model.combine_axes(WEIGHTS)
    expected = logits(model, **INPUTS)
    model.combine_axes(WEIGHTS, "mix")
    model.set_adapter("mix")
    assert_equal(logits(model, **INPUTS), expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*save_embedding_layers.*")
        model.save_pretrained(tmp_path)
    assert all(".tangent_" in key for key in load_file(tmp_path / "mix" / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "help", adapter_name="help").eval()
    loaded.load_adapter(tmp_path / "verb", "verb")
    loaded.load_adapter(tmp_path / "mix", "mix")
    assert loaded.peft_config["help"].target_modules == {"model.embed_tokens", "down_proj"}
    loaded.combine_axes(WEIGHTS)
    assert_equal(logits(loaded, **INPUTS), expected)
    loaded.set_adapter("mix")
    assert_equal(logits(loaded, **INPUTS), expected)
    total = sum(float(delta.double().square().sum()) for delta in deltas(loaded).values())
    assert axis_norm(loaded, "mix") == pytest.approx(total**0.5, rel=1e-5)


@pytest.mark.parametrize("lm_head", [True, False])
@pytest.mark.parametrize("name", ["llama", "untied", "gemma3"])
def test_merging(name: str, lm_head: bool, tmp_path: Path) -> None:
    model = two_axes("dense", "trained", name, lm_head=lm_head)
    model.combine_axes(WEIGHTS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tied = name != "untied"
    with model.linearized(False):
        expected = logits(model, **INPUTS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter(safe_merge=True)
    assert any("The input embedding is tied to the head" in str(w.message) for w in caught) == tied
    assert_equal(logits(model, **INPUTS), expected)
    head, embedding = model.get_base_model().lm_head, embedding_of(model).base_layer
    head = head.base_layer if lm_head else head
    assert head.weight is not embedding.weight
    model.unmerge_adapter()
    assert (head.weight is embedding.weight) == tied
    for key, value in model.state_dict().items():
        assert_equal(value, before[key])
    model.export_merged(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.tie_word_embeddings is False
    assert_equal(logits(loaded, **INPUTS), expected)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    assert_equal(logits(merged, **INPUTS), expected)


def test_linearity() -> None:
    model = model_of("gemma3", "shared")
    gaps = []
    for scale in (0.2, 0.1):
        with model.axes(default=scale):
            gaps.append(linearity_gap(model, [INPUTS]).gap)
    assert gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.2)


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_lora_of_low_rank_axes_is_exact(name: str, tmp_path: Path) -> None:
    model = two_axes("shared", "trained", name)
    model.combine_axes(WEIGHTS)
    with model.linearized(False):
        expected = logits(model, **INPUTS)
    export = model.export_lora(tmp_path)
    assert (export.rank, export.relative_error) == (8, 0.0)
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_equal(logits(loaded, **INPUTS)[REAL], expected[REAL], 2e-5)


def test_lora_of_a_dense_axis(tmp_path: Path) -> None:
    model = model_of()
    with model.linearized(False):
        expected = logits(model, **INPUTS)
    export = model.export_lora(tmp_path, rank=32)
    assert export.relative_error < 1e-5
    assert_equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path).eval(), **INPUTS), expected, 2e-5)


# ---- bad input -------------------------------------------------------------------------------------------------------


class _Learned(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (lambda: nn.Embedding(300, 32, max_norm=1.0), "rescales its rows.*max_norm=1.0"),
        (lambda: nn.Embedding(300, 32, scale_grad_by_freq=True), "frequency of the token"),
        (lambda: _Learned(300, 32), r"something of its own \(_Learned\.forward\)"),
    ],
)
def test_embeddings_that_do_more(embedding: Any, message: str) -> None:
    base = make_llama(tied=False)
    base.model.embed_tokens = embedding()
    with pytest.raises(TypeError, match=message):
        get_peft_model(enlarge(base), embedding_config())
