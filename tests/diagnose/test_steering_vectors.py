"""Steering vectors in use: hooks against models with a bias, manual upper layers and torch.func; files and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch, build
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from steering_models import D, L, biased_llama, direction, vectors_of, with_bias
from tolerances import assert_equal
from torch.func import functional_call, jvp
from transformers import DynamicCache

from tangent_peft import TangentConfig
from tangent_peft.diagnose.steering.vectors import SteeringVectors


pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags.*")


def axis_model(layers: int = 1, **options: Any) -> Any:
    """A biased Llama with one strong axis on its last blocks, in float64."""
    config = TangentConfig(num_layers=layers, r=4, init_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(biased_llama(), config, adapter_name="help").double().eval()


# ---- what a forward gives --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_vector_acts_as_a_bias_of_the_block(layer: int) -> None:
    model, v = biased_llama(), direction()
    inputs = batch("left")
    with vectors_of(model, {layer: v}).applied(model, 0.7, [layer]):
        found = model(**inputs).logits
    assert_equal(found, with_bias(model, layer, 0.7 * v)(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_upper_layers_see_the_sum(name: str) -> None:
    model: Any = build(name).double()
    inputs, v = batch(rows=1), direction()
    seen = {}
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    norm = model.transformer.ln_f if name == "gpt2" else model.model.norm
    handle = blocks[-1].register_forward_hook(lambda m, a, out: seen.update(h=out if torch.is_tensor(out) else out[0]))
    model(**inputs)
    handle.remove()
    with vectors_of(model, {3: v}).applied(model, -2.0):  # the last layer is the default
        found = model(**inputs).logits
    assert_equal(found, model.lm_head(norm(seen["h"] - 2.0 * v)))


@torch.no_grad()
def test_middle_layer_against_a_manual_loop() -> None:
    model: Any = build("qwen3").double()
    inputs, v, w = batch(rows=1), direction(1), direction(2)
    hidden = model.model.embed_tokens(inputs["input_ids"])
    rotary = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for index, block in enumerate(model.model.layers):
        out = block(hidden, attention_mask=None, position_embeddings=rotary)
        hidden = out if torch.is_tensor(out) else out[0]
        hidden = hidden + {0: 0.5 * v, 1: 0.5 * w}.get(index, 0.0)
    with vectors_of(model, {1: v, 2: w}).applied(model, 0.5, [1, -2]):
        assert_equal(model(**inputs).logits, model.lm_head(model.model.norm(hidden)))


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_that_of_a_model_with_a_bias(use_cache: bool) -> None:
    model, v = biased_llama(), direction(size=6.0)
    twin, inputs = with_bias(model, 2, v), batch("left")
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
    plain = model.generate(**inputs, **options)
    with vectors_of(model, {2: v}).applied(model, layers=[2]):
        found = model.generate(**inputs, **options)
    assert torch.equal(found, twin.generate(**inputs, **options))
    assert not torch.equal(found, plain)


@torch.no_grad()
def test_generated_positions_start_at_the_last_token_of_the_prompt() -> None:
    model, v = biased_llama(), direction(size=6.0)
    ids = batch(rows=1)["input_ids"]
    prompt = ids.shape[1]
    grown = ids
    for _ in range(6):  # without a cache, steering by hand from the prompt's last token on

        def move(m: Any, a: Any, out: Any) -> Any:
            out = out.clone()
            out[:, prompt - 1 :] += v
            return out

        handle = model.model.layers[1].register_forward_hook(move)
        grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], 1)
        handle.remove()
    steering = vectors_of(model, {2: v})
    padded = {"input_ids": torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)}
    padded["attention_mask"] = (padded["input_ids"] > 0).long()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with steering.applied(model, layers=[2], positions="generated"):
        assert torch.equal(model.generate(ids, **options), grown)
        assert torch.equal(model.generate(**padded, **options)[:, 3:], grown)
        with pytest.raises(ValueError, match="use_cache=True"):
            model(ids, use_cache=False)
    with steering.applied(model, layers=[2]):
        assert not torch.equal(model.generate(ids, **options), grown)


@torch.no_grad()
def test_right_padding_hides_no_last_token() -> None:
    model, v = biased_llama(), direction()
    inputs = batch("right")
    seen: list[Any] = []
    handle = model.model.layers[2].register_forward_hook(lambda m, a, out: seen.append(out))
    model(**inputs)
    handle.remove()
    with vectors_of(model, {3: v}).applied(model, positions="generated"):
        handle = model.model.layers[2].register_forward_hook(lambda m, a, out: seen.append(out))  # after the steering
        model(**inputs, past_key_values=DynamicCache())
        handle.remove()
    moved = seen[1] - seen[0]
    last = inputs["attention_mask"].sum(1) - 1
    for row in range(3):
        assert_equal(moved[row, last[row]], v)
    assert int((moved.norm(dim=2) > 1e-9).sum()) == 3


@torch.no_grad()
def test_norm_is_kept_on_request() -> None:
    model, v = biased_llama(), direction(size=20.0)
    inputs, seen = batch(), []
    for context in (None, vectors_of(model, {3: v}).applied(model, preserve_norm=True)):
        if context is not None:
            context.__enter__()
        handle = model.model.layers[2].register_forward_hook(lambda m, a, out: seen.append(out))
        model(**inputs)
        handle.remove()
        if context is not None:
            context.__exit__(None, None, None)
    plain, moved = seen
    assert_equal(moved.norm(dim=-1), plain.norm(dim=-1))
    assert_equal(moved, (plain + v) * (plain.norm(dim=-1) / (plain + v).norm(dim=-1))[..., None])


@torch.no_grad()
def test_low_precision_is_rounded_once() -> None:
    model = biased_llama().bfloat16()
    v, inputs, seen = direction().float(), batch(), []
    handle = model.model.layers[2].register_forward_hook(lambda m, a, out: seen.append(out))
    model(**inputs)
    handle.remove()
    with vectors_of(model, {3: v}).applied(model, 0.3):
        handle = model.model.layers[2].register_forward_hook(lambda m, a, out: seen.append(out))
        model(**inputs)
        handle.remove()
    assert seen[1].dtype == torch.bfloat16
    assert torch.equal(seen[1], (seen[0].float() + 0.3 * v).bfloat16())


@torch.no_grad()
def test_hooks_nest_and_are_gone_after_an_exception() -> None:
    model, v, w = biased_llama(), direction(1), direction(2)
    inputs = batch()
    plain, both, one = (m(**inputs).logits for m in (model, with_bias(model, 3, v + 2 * w), with_bias(model, 3, v)))
    outer, inner = vectors_of(model, {3: v}), vectors_of(model, {3: w})
    with outer.applied(model):
        with inner.applied(model, 2.0):
            assert_equal(model(**inputs).logits, both)
        assert_equal(model(**inputs).logits, one)
    with pytest.raises(KeyError), outer.applied(model, positions="generated"):
        raise KeyError
    with outer.applied(model, 0.0):
        assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- linearized passes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 3])  # below the only block with an axis, and at it
@pytest.mark.parametrize("axes", [1, 3])
def test_linearized_model_takes_the_vector_to_first_order(layer: int, axes: int) -> None:
    model, v = axis_model(axes), direction()
    inputs = batch("right")
    with torch.no_grad():
        plain = model(**inputs).logits
        with vectors_of(model.get_base_model(), {layer: v}).applied(model, 0.5, [layer]):
            found = model(**inputs).logits
    base = biased_llama()  # the same weights, no PEFT
    name = f"model.layers.{layer - 1}.mlp.down_proj.bias"
    base.config._attn_implementation = "eager"

    def logits(bias: torch.Tensor) -> torch.Tensor:
        return functional_call(base, {name: bias}, (), dict(inputs)).logits

    _, expected = jvp(logits, (torch.zeros(D, dtype=torch.float64),), (0.5 * v,))
    real = inputs["attention_mask"].bool()
    assert_equal((found - plain)[real], expected.detach()[real], 1e-6)  # Llama takes norms in float32
    with torch.no_grad(), model.disable_adapter():
        assert float((plain - model(**inputs).logits).abs().max()) > 1e-3  # the axis is there at all


@torch.no_grad()
def test_taking_away_what_a_mix_adds_gives_the_base() -> None:
    model = axis_model(2, lm_head=False)
    inputs = {"input_ids": torch.tensor([[7]])}
    seen = []
    handle = (
        model.get_base_model()
        .model.layers[2]
        .register_forward_hook(
            lambda m, a, out: seen.append(torch.autograd.forward_ad.unpack_dual(out).tangent.clone())
        )
    )
    moved = model(**inputs).logits
    handle.remove()
    with model.disable_adapter():
        base = model(**inputs).logits
    assert float((moved - base).abs().max()) > 1e-3
    with vectors_of(model.get_base_model(), {3: seen[0][0, 0]}).applied(model, -1.0):
        assert_equal(model(**inputs).logits, base)


def test_linearized_generation_is_cached_as_well() -> None:
    model, v = axis_model(2), direction(size=6.0)
    inputs = batch("left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with vectors_of(model.get_base_model(), {1: v, 3: v}).applied(model, 1.0, [1, 3]):
        cached = model.generate(**inputs, **options)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


def test_linearized_passes_refuse_what_is_not_linear() -> None:
    model = axis_model(1)
    steering = vectors_of(model.get_base_model(), {3: direction()})
    with steering.applied(model, preserve_norm=True), pytest.raises(ValueError, match="not linear"):
        model(**batch())
    with model.linearized(False), steering.applied(model, preserve_norm=True):
        model(**batch())
    model.train()
    with steering.applied(model), pytest.raises(RuntimeError, match="training"):
        model(**batch())


def test_a_dual_tensor_of_the_user_keeps_its_tangent() -> None:
    model, v = biased_llama(), direction()
    model.config._attn_implementation = "eager"
    ids = batch(rows=1)["input_ids"]
    embedded = model.model.embed_tokens(ids).detach()
    step = torch.randn(embedded.shape, dtype=torch.float64)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=hidden).logits

    with vectors_of(model, {2: v}).applied(model, layers=[2]):
        _, found = jvp(logits, (embedded,), (step,))
    twin = with_bias(model, 2, v)
    _, expected = jvp(lambda hidden: twin(inputs_embeds=hidden).logits, (embedded,), (step,))
    assert_equal(found, expected)


# ---- the object ------------------------------------------------------------------------------------------------------


def test_random_directions_have_the_same_norms() -> None:
    steering = vectors_of(biased_llama(), {1: direction(1, 2.0).float(), 3: direction(2, 5.0).float()})
    one, again, other = steering.random(0), steering.random(0), steering.random(1)
    for layer, vector in steering.vectors.items():
        assert one.vectors[layer].norm() == pytest.approx(float(vector.norm()), rel=1e-6)
        assert torch.equal(one.vectors[layer], again.vectors[layer])
        assert not torch.allclose(one.vectors[layer], other.vectors[layer])
    many = torch.stack([steering.random(seed).vectors[1] / 2 for seed in range(400)])
    assert float(many.mean(0).norm()) < 0.1  # 1/√400
    assert float((many @ direction(1, 1.0).float()).square().mean()) == pytest.approx(1 / D, rel=0.3)


def test_files(tmp_path: Path) -> None:
    model = biased_llama()
    steering = vectors_of(model, {1: direction(1).float(), 3: direction(2).float()})
    path = tmp_path / "deep" / "v.safetensors"
    steering.save(path)
    found = SteeringVectors.load(path)
    assert [p.name for p in path.parent.iterdir()] == ["v.safetensors"]
    assert found.digest == steering.digest
    assert found.settings == steering.settings and (found.position, found.count) == ("last prompt token", 8)
    assert all(torch.equal(found.vectors[layer], steering.vectors[layer]) for layer in (1, 3))
    assert vectors_of(model, {}).digest != SteeringVectors({}, "x", "y", 3, "base", "tuned", "p", 8).digest
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors"):
        SteeringVectors.load(tmp_path / "no.safetensors")
    (tmp_path / "broken").write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        SteeringVectors.load(tmp_path / "broken")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no steering vectors"):
        SteeringVectors.load(tmp_path / "other.safetensors")
    text = path.read_bytes().replace(b"last prompt token", b"last prompt tokem")
    (tmp_path / "changed").write_bytes(text)
    with pytest.raises(ValueError, match="hash"):
        SteeringVectors.load(tmp_path / "changed")
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    good = {"layer.1": torch.ones(D), "layer.3": torch.ones(D)}
    for wrong in (
        {"layer.3": torch.ones(D - 1)},
        {"layer.3": good["layer.3"] * torch.inf},
        {f"layer.{L + 1}": good["layer.1"].clone()},
    ):
        save_file({**good, **wrong}, tmp_path / "wrong", metadata=metadata)
        with pytest.raises(ValueError, match="is damaged"):
            SteeringVectors.load(tmp_path / "wrong")
    for lacking in ("description", "digest"):
        save_file(good, tmp_path / "wrong", metadata={k: v for k, v in metadata.items() if k != lacking})
        with pytest.raises(ValueError, match="is damaged"):
            SteeringVectors.load(tmp_path / "wrong")
    with pytest.raises(ValueError, match="not finite"):
        vectors_of(model, {1: torch.full((D,), float("nan"))}).save(path)
    assert SteeringVectors.load(path).digest == steering.digest  # still there


def test_models_and_layers_that_do_not_fit() -> None:
    model, v = biased_llama(), direction().float()
    steering = vectors_of(model, {2: v})
    with pytest.raises(ValueError, match=r"number of blocks 2, not 3"), steering.applied(biased_llama(layers=2)):
        pass
    with (
        pytest.raises(ValueError, match="class Qwen3ForCausalLM, not LlamaForCausalLM"),
        steering.applied(build("qwen3")),
    ):
        pass
    with pytest.raises(ValueError, match="hidden size 32, not 16"), vectors_of(model, {2: v[:16]}).applied(model):
        pass
    for layer in (L + 1, -L - 2):
        with pytest.raises(IndexError, match=f"Layer {layer} is out of range"), steering.applied(model, layers=[layer]):
            pass
    for layer in (0, 3):
        with (
            pytest.raises(ValueError, match=rf"No vectors for layers \[{layer}\]"),
            steering.applied(model, layers=[layer]),
        ):
            pass
    with pytest.raises(ValueError, match="nan"), steering.applied(model, float("nan"), [2]):
        pass
    with pytest.raises(ValueError, match="'first'"), steering.applied(model, 1.0, [2], "first"):  # type: ignore[arg-type]
        pass
    with pytest.raises(TypeError, match="Linear"), steering.applied(torch.nn.Linear(2, 2)):
        pass
