"""v⋆, cosines and spectra of ΔH: planted shifts, numpy twins, closed forms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build, make_llama
from peft import get_peft_model
from steering_models import D, L, biased_llama, direction, token_rows, with_bias
from strong_axes import two_axes
from tolerances import assert_equal
from transformers import LlamaConfig, LlamaForCausalLM

from tangent_peft import TangentConfig
from tangent_peft.diagnose import ModelState
from tangent_peft.diagnose.prompts import TokenBatch, answer_batches
from tangent_peft.diagnose.steering.measure import ShiftOptions, shift_rows, steering_vectors
from tangent_peft.diagnose.steering.shift import Cosines


def measured(base: Any, tuned: Any, rows: int = 12, held_out: int = 8, **options: Any) -> Any:
    first, second = (m if isinstance(m, ModelState) else ModelState.plain(m, n) for m, n in ((base, "a"), (tuned, "b")))
    held = [token_rows(held_out, seed=9)] if held_out else []
    batches = [token_rows(rows // 2, seed=1), token_rows(rows - rows // 2, length=4, seed=2)]
    return steering_vectors(first, second, batches, "last prompt token", held, ShiftOptions(**options))


def perturbed(model: Any, scale: float = 0.3) -> Any:
    """Another checkpoint: every weight moved."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0.0)
    return model


@torch.no_grad()
def all_shifts(base: Any, tuned: Any, batches: list[TokenBatch]) -> np.ndarray:
    """δ (N, L, D) by hooks, one row at a time, without padding."""
    found = []
    for batch in batches:
        for ids in batch.inputs["input_ids"]:
            states = []
            for model in (base, tuned):
                caught: list[Any] = []
                handles = [
                    b.register_forward_hook(lambda m, a, o, c=caught: c.append(o if torch.is_tensor(o) else o[0]))
                    for b in model.model.layers
                ]
                model(ids[None])
                for handle in handles:
                    handle.remove()
                states.append(torch.cat(caught)[:, -1])
            found.append((states[1] - states[0]).double().numpy())
    return np.stack(found)


# ---- a planted rank-one shift ----------------------------------------------------------------------------------------


def test_planted_vector_is_recovered() -> None:
    base, u = biased_llama(), direction()
    vectors, shift = measured(base, with_bias(base, L, u))
    last = shift.layers[-1]
    assert_equal(vectors.vectors[L], u.float())
    assert last.size == pytest.approx(3.0, rel=1e-5)
    for cosines in (last.cosines, last.leave_one_out, last.held_out):
        assert cosines.mean == pytest.approx(1.0, abs=1e-6)
        assert cosines.p5 == pytest.approx(1.0, abs=1e-6)
        assert cosines.peak == pytest.approx((0.96, 1.0))
    assert sum(last.cosines.histogram) == 12 and sum(last.held_out.histogram) == 8
    assert last.uncentred.ratio < 1e-5
    assert last.uncentred.top_energy == pytest.approx(1.0, abs=1e-9)
    assert last.uncentred.effective_rank == pytest.approx(1.0, abs=1e-6)
    assert last.uncentred.rank == 1
    assert last.uncentred.values[0] == pytest.approx(3.0 * math.sqrt(12), rel=1e-5)
    assert last.alignment == pytest.approx(1.0, abs=1e-9)
    assert last.recovery.share == pytest.approx(1.0, abs=1e-5)
    # ‖u − r‖ of two directions of the norm 3 that are nearly at right angles is √2 times as long as u.
    assert last.recovery.control_mean == pytest.approx(1 - math.sqrt(2), abs=0.3)
    for layer in shift.layers[:-1]:  # nothing moves below the block that was changed
        assert layer.cosines is None and "every δ is 0" in layer.reason
        assert math.isnan(layer.uncentred.entropy) and layer.size == 0
    findings = [verdict.finding for verdict in shift.verdicts()]
    assert findings == ["fine", "fine", "unknown", "fine"]
    assert "nan" not in str(shift.verdicts())


@pytest.mark.parametrize(("rows", "said"), [(0, "no held-out rows"), (7, "Fewer than 8 rows")])
def test_inversion_is_not_judged_by_few_rows(rows: int, said: str) -> None:
    base = biased_llama()
    _, shift = measured(base, with_bias(base, L, direction()), held_out=rows)
    assert shift.verdicts()[-1].finding == "unknown" and said in shift.verdicts()[-1].text


def test_the_same_model_has_no_vector() -> None:
    _, shift = measured(biased_llama(), biased_llama())
    assert [verdict.finding for verdict in shift.verdicts()] == ["unknown"]
    assert "every δ is 0" in str(shift)


# ---- numpy twins -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [12, 60])  # fewer and more rows than D
def test_every_number_against_numpy(rows: int) -> None:
    base, tuned = build("qwen3").double(), perturbed(build("qwen3").double())
    batches = [token_rows(rows // 2, seed=1), token_rows(rows - rows // 2, length=4, seed=2)]
    vectors, shift = measured(base, tuned, rows, epsilon=0.3, top=4)
    everything, held = all_shifts(base, tuned, batches), all_shifts(base, tuned, [token_rows(8, seed=9)])
    for index, layer in enumerate(shift.layers):
        x, new = everything[:, index], held[:, index]
        v = x.mean(0)
        assert layer.layer == index + 1
        np.testing.assert_allclose(vectors.vectors[index + 1].numpy(), v, rtol=1e-3, atol=1e-4 * np.abs(v).max())
        cos = [row @ v / np.linalg.norm(row) / np.linalg.norm(v) for row in x]
        assert layer.cosines.mean == pytest.approx(np.mean(cos), abs=1e-4)
        assert layer.cosines.p5 == pytest.approx(np.percentile(cos, 5), abs=1e-4)
        assert layer.cosines.p95 == pytest.approx(np.percentile(cos, 95), abs=1e-4)
        assert layer.cosines.histogram == np.histogram(cos, np.linspace(-1, 1, 51))[0].tolist()
        others = [np.delete(x, i, 0).mean(0) for i in range(rows)]
        loo = [row @ o / np.linalg.norm(row) / np.linalg.norm(o) for row, o in zip(x, others, strict=True)]
        assert layer.leave_one_out.mean == pytest.approx(np.mean(loo), abs=1e-4)
        assert layer.leave_one_out.p50 == pytest.approx(np.median(loo), abs=1e-4)
        apart = [row @ v / np.linalg.norm(row) / np.linalg.norm(v) for row in new]
        assert layer.held_out.mean == pytest.approx(np.mean(apart), abs=1e-4)
        recovered = 1 - np.linalg.norm(new - v, axis=1).sum() / np.linalg.norm(new, axis=1).sum()
        assert layer.recovery.share == pytest.approx(recovered, abs=1e-4)
        u, s, _ = np.linalg.svd(x.T, full_matrices=False)
        check_spectrum(layer.uncentred, s, 0.3)
        assert layer.alignment == pytest.approx(abs(u[:, 0] @ v) / np.linalg.norm(v), abs=1e-4)
        centred = np.linalg.svd(x - v, compute_uv=False)[: min(rows - 1, D)]
        check_spectrum(layer.centred, centred, 0.3)


def check_spectrum(found: Any, s: np.ndarray, epsilon: float) -> None:
    assert found.values == pytest.approx(s[:4].tolist(), rel=1e-3)
    assert found.ratio == pytest.approx(s[1] / s[0], rel=1e-3)
    p = s**2 / (s**2).sum()
    entropy = -(p * np.log(p)).sum()
    assert found.top_energy == pytest.approx(p[0], rel=1e-3)
    assert found.entropy == pytest.approx(entropy, rel=1e-3)
    assert found.normalized_entropy == pytest.approx(entropy / np.log(len(s)), rel=1e-3)
    assert found.effective_rank == pytest.approx(np.exp(entropy), rel=1e-3)
    q = s / s.sum()
    assert found.entropy_of_sum == pytest.approx(-(q * np.log(q)).sum(), rel=1e-3)
    assert found.effective_rank_of_sum == pytest.approx(np.exp(-(q * np.log(q)).sum()), rel=1e-3)
    assert found.rank == (s > epsilon * s[0]).sum()


# ---- noise around a mean ---------------------------------------------------------------------------------------------


def embedding_shift(count: int, size: int, mean: float, noise: float) -> tuple[Any, Any]:
    """Two models of which all blocks do nothing and the embeddings of token i differ by μ + ε_i."""
    config = LlamaConfig(
        vocab_size=count, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4
    )
    models = [LlamaForCausalLM(config).eval() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    shift = torch.zeros(size)
    shift[0] = mean
    with torch.no_grad():
        for model in models:
            model.model.embed_tokens.weight.zero_()
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
        models[1].model.embed_tokens.weight.copy_(shift + noise * torch.randn(count, size, generator=generator))
    return models[0], models[1]


@pytest.mark.parametrize("count", [20, 200])
def test_isotropic_noise_around_a_mean(count: int) -> None:
    size, mean, noise = 256, 1.0, 0.05
    base, tuned = embedding_shift(2 * count, size, mean, noise)
    ids = torch.arange(2 * count)[:, None]
    parts = [
        TokenBatch({"input_ids": part, "attention_mask": torch.ones_like(part)}, torch.ones_like(part).bool())
        for part in ids.chunk(2)
    ]
    first, second = ModelState.plain(base, "a"), ModelState.plain(tuned, "b")
    _, shift = steering_vectors(first, second, parts[:1], "only token", parts[1:])
    layer, s = shift.layers[0], noise**2 * size  # E‖ε‖²
    within = math.sqrt((mean**2 + s / count) / (mean**2 + s))  # v⋆ holds its own ε_i / N
    apart = mean**2 / math.sqrt((mean**2 + s) * (mean**2 + s / count))  # and here it does not
    assert layer.cosines.mean == pytest.approx(within, abs=0.015)
    assert layer.leave_one_out.mean == pytest.approx(apart, abs=0.015)
    assert layer.held_out.mean == pytest.approx(apart, abs=0.015)
    if count == 20:
        assert layer.cosines.mean - layer.leave_one_out.mean > 0.02  # the bias that leave-one-out takes away
    # ‖ε_i − mean ε‖² = s (1 + 1/N)
    assert layer.recovery.share == pytest.approx(1 - math.sqrt(s * (1 + 1 / count) / (mean**2 + s)), abs=0.02)
    assert layer.uncentred.values[0] > 2 * layer.centred.values[0]
    assert layer.centred.ratio > 0.9  # nothing but noise is left; the uncentred ratio alone would call it rank one


# ---- what can be compared --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linearized", [True, False])
def test_a_mix_on_its_own_base(linearized: bool) -> None:
    model = two_axes(build("llama"))
    mix = {"help": 0.5, "verb": -0.5}
    base = ModelState.base(model)
    batches = [token_rows(6, seed=1), token_rows(6, length=4, seed=2)]
    vectors, shift = measured(base, ModelState.mix(model, mix, linearized=linearized))
    twin: Any = model.get_base_model()
    with torch.no_grad():
        with model.disable_adapter():
            before = [hidden_states(twin, b) for b in batches]
        with model.axes(mix), model.linearized(linearized):
            after = [hidden_states(twin, b) for b in batches]
    moved = torch.cat(after) - torch.cat(before)
    assert_equal(vectors.vectors[L], moved.mean(0), 1e-3)
    assert shift.layers[0].reason  # the first block has no axis
    assert shift.settings["linearized"] is linearized
    assert shift.tuned == "help=0.5 verb=-0.5"


def hidden_states(twin: Any, batch: TokenBatch) -> torch.Tensor:
    """What leaves the last block at the last token (B, D), primal + tangent; by a hook of our own."""
    caught: list[Any] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        held = torch.autograd.forward_ad.unpack_dual(output) if torch.autograd.forward_ad._current_level >= 0 else None
        both = output if held is None or held.tangent is None else held.primal + held.tangent
        caught.append(both[:, -1].clone())

    handle = twin.model.layers[-1].register_forward_hook(keep)
    twin(**batch.inputs)
    handle.remove()
    return caught[0]


def test_answers_are_averaged(tokenizer: Any, pairs: list[Any]) -> None:
    base, tuned = build("llama"), perturbed(build("llama"))
    batch = next(answer_batches(tokenizer, pairs[:3], 3))
    first, second = ModelState.plain(base, "a"), ModelState.plain(tuned, "b")
    shift, size = shift_rows(first, second, batch)
    assert shift.shape == (3, L + 1, D) and size.shape == (3, L + 1)
    with torch.no_grad():
        states = [m(**batch.inputs, output_hidden_states=True).hidden_states[1] for m in (base, tuned)]
    for row in range(3):
        keep = batch.keep[row]
        assert int(keep.sum()) > 1
        assert_equal(shift[row, 1], (states[1] - states[0])[row, keep].mean(0), 1e-4)
        assert float(size[row, 1]) == pytest.approx(float(states[0][row, keep].mean(0).norm()), rel=1e-4)


def test_named_errors(tiny_llama: Callable[[], Any]) -> None:
    state = ModelState.plain(tiny_llama(), "base")
    with pytest.raises(ValueError, match="different architecture: class LlamaForCausalLM and Qwen3ForCausalLM"):
        steering_vectors(state, ModelState.plain(build("qwen3"), "tuned"), [], "x")
    with pytest.raises(ValueError, match="number of blocks 3 and 2"):
        steering_vectors(state, ModelState.plain(make_llama(layers=2), "tuned"), [], "x")
    with pytest.raises(ValueError, match="0 rows are given"):
        steering_vectors(state, state, [], "x")
    with pytest.raises(ValueError, match="1 rows are given"):
        steering_vectors(state, state, [token_rows(1)], "x")
    broken = build("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[9] = float("inf")
    batch = token_rows(4)
    batch.inputs["input_ids"][2, 0] = 9
    with pytest.raises(ValueError, match="row 2 are not finite"):
        steering_vectors(state, ModelState.plain(broken, "tuned"), [batch], "x")
    with pytest.raises(ValueError, match="epsilon"):
        ShiftOptions(epsilon=2.0)
    with pytest.raises(ValueError, match="control_seeds"):
        ShiftOptions(control_seeds=1)


def test_few_rows_are_not_judged() -> None:
    _, shift = measured(build("llama"), perturbed(build("llama")), rows=6)
    assert [(v.finding, "too few" in v.text) for v in shift.verdicts()] == [("unknown", True)]


def test_a_shift_of_the_size_of_rounding_is_not_judged() -> None:
    _, shift = measured(build("llama"), perturbed(build("llama")))
    small = [*shift.layers[:-1], replace(shift.layers[-1], relative_size=0.005)]
    for dtype, linearized, judged in (
        ("torch.bfloat16", None, False),
        ("torch.float16", None, True),
        ("torch.float32", None, True),
        ("torch.bfloat16", True, True),
    ):
        settings = {**shift.settings, "dtype": dtype, "linearized": linearized}
        verdicts = replace(shift, layers=small, settings=settings).verdicts()
        assert (len(verdicts) == 4) is judged, dtype
        assert judged or (verdicts[0].finding == "unknown" and "0.50%" in verdicts[0].text)


def test_a_little_less_entropy_is_no_drop() -> None:
    _, shift = measured(build("llama"), perturbed(build("llama")))
    for late, finding in ((0.46, "warning"), (0.44, "fine")):
        layers = [
            replace(
                shift.layers[0], layer=layer, uncentred=replace(shift.layers[0].uncentred, normalized_entropy=value)
            )
            for layer, value in enumerate([0.5, 0.5, 0.5, late, late], start=1)
        ]
        assert replace(shift, layers=layers).verdicts()[2].finding == finding


def test_prints_saves_and_draws(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), TangentConfig(num_layers=2, r=4, init_weights=False), adapter_name="help")
    _, shift = measured(ModelState.base(model), ModelState.mix(model, {"help": 1.0}))
    text = str(shift)
    assert "base → help=1" in text and "leave-one-out" in text and "centred" in text
    shift.save(tmp_path / "shift.json")
    saved = json.loads((tmp_path / "shift.json").read_text())
    assert saved["layers"][0]["uncentred"]["entropy"] is None and saved["layers"][0]["reason"]
    assert saved["layers"][2]["cosines"]["mean"] == pytest.approx(shift.layers[2].cosines.mean)
    assert saved["count"] == 12 and saved["held_out"] == 8 and saved["settings"]["seed"] == 0
    drawn = shift.plot(tmp_path / "figures")
    assert [p.suffix for p in drawn] == [".png"] * 2
    assert all(p.is_file() and p.with_suffix(".svg").is_file() for p in drawn)


def test_cosines_that_are_undefined_are_counted() -> None:
    found = Cosines.of(torch.tensor([1.0, float("nan"), 0.94]))
    assert found.undefined == 1 and found.mean == pytest.approx(0.97)
    assert found.peak == pytest.approx((0.96, 1.0))
    empty = Cosines.of(torch.tensor([float("nan")]))
    assert math.isnan(empty.mean) and math.isnan(empty.peak[0]) and empty.undefined == 1
