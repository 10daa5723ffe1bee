"""Traces are those of a slow loop over whole matrices; terms are closed forms on planted traces; nothing is made up."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build, enlarge, make_llama
from strong_axes import two_axes

from tangent_peft.diagnose.result import as_text
from tangent_peft.diagnose.spinal.block_gradients import BlockGradients
from tangent_peft.diagnose.spinal.options import SpinalOptions, Texts, terminal_block
from tangent_peft.diagnose.spinal.power_law import FitRule, PowerLaw, fit_power_law
from tangent_peft.diagnose.spinal.score import SpinalScore, _RowMeans, _scored, alignment, coherence, spinal_score
from tangent_peft.diagnose.spinal.trace import SpinalSettings, SpinalTrace, spinal_trace
from tangent_peft.diagnose.states import ModelState
from tangent_peft.evaluate.pairs import pair_batch


def deep() -> Any:
    """Eight layers, so that the terminal block is a part of them."""
    torch.manual_seed(0)
    return enlarge(make_llama(layers=8))


def rows_of(tokenizer: Any, pair: Any, positions: str) -> tuple[torch.Tensor, list[int]]:
    """The tokens of a prompt with its chosen answer, and the positions read."""
    batch = {name: x[:1] for name, x in pair_batch(tokenizer, [pair]).items()}
    ids = batch["input_ids"][:, : int(batch["attention_mask"].sum())]
    answer = batch["completion_mask"][0].nonzero()[:, 0].tolist()
    return ids, {"all": list(range(ids.shape[1])), "answer": answer, "last": [answer[0] - 1]}[positions]


@pytest.mark.parametrize("positions", ["all", "answer", "last"])
@pytest.mark.parametrize("centred", [False, True])
@torch.no_grad()
def test_a_trace_is_that_of_whole_matrices(positions: Any, centred: bool, tokenizer: Any, pairs: Any) -> None:
    model: Any = build("llama")
    rule = FitRule(least_points=3, least_r2=0.0)
    options = SpinalOptions(positions, centred, rule, lens_tokens=None, batch_size=3)
    found = spinal_trace(ModelState.plain(model, "llama"), tokenizer, pairs=pairs, options=options)

    layers: list[list[torch.Tensor]] = [[] for _ in range(4)]
    moves: list[torch.Tensor] = []
    for pair in pairs:
        ids, read = rows_of(tokenizer, pair, positions)
        hidden = list(model(ids, output_hidden_states=True, use_cache=False).hidden_states)
        seen: list[torch.Tensor] = []
        handle = model.model.layers[-1].register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        normed = [model.model.norm(h) for h in hidden[:-1]] + [hidden[-1]]  # the last one is normed already
        model(ids, use_cache=False)
        handle.remove()
        hidden[-1] = seen[0]
        p = [(h[0, read].double() @ model.lm_head.weight.double().T).softmax(-1) for h in normed]
        moves.append(torch.stack([2 * (a * b).sqrt().sum(-1).acos() for a, b in pairwise(p)]))
        for layer, h in zip(layers, hidden, strict=True):
            layer.append(h[0, read].double())
    for layer, fit in zip(layers, found.contraction, strict=True):
        h = torch.cat(layer)
        h = h - h.mean(0) if centred else h
        expected = fit_power_law(torch.linalg.svdvals(h).numpy(), rule, float(torch.cat(layer).norm()))
        assert fit.alpha == pytest.approx(expected.alpha, rel=1e-3, nan_ok=True) and fit.points == expected.points
    assert found.transport == pytest.approx(torch.cat(moves, 1).mean(1).tolist(), rel=1e-4)
    assert found.settings.tokens == found.settings.lens_tokens == sum(len(x) for x in layers[0])
    assert found.length == pytest.approx(sum(found.transport))


def test_batches_do_not_matter_and_prompts_will_do(tokenizer: Any) -> None:
    state = ModelState.plain(build("qwen3"), "qwen3")
    prompts = ["How do I boil an egg?", "Name a color.", "What is rain?"]
    one, all_ = (
        spinal_trace(state, tokenizer, prompts=prompts, options=SpinalOptions(batch_size=size, lens_tokens=20))
        for size in (1, 3)
    )
    assert one.transport == pytest.approx(all_.transport, rel=1e-4) and one.settings == all_.settings
    assert one.alphas == pytest.approx(all_.alphas, rel=1e-3, nan_ok=True)
    assert one.settings.lens_tokens == 20 < one.settings.tokens and one.gradients is None
    assert math.isnan(one.concentration)


def test_the_lens_reads_a_seeded_sample(tokenizer: Any, pairs: Any) -> None:
    samples = [
        Texts(tokenizer, None, pairs, SpinalOptions(lens_tokens=9, seed=seed, batch_size=size)).lens_sample()
        for seed, size in ((0, 2), (0, 5), (1, 2))
    ]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    assert [int(sample.sum()) for sample in samples] == [9, 9, 9]


@torch.no_grad()
def test_blocks_that_do_nothing_move_nothing(tokenizer: Any, pairs: Any) -> None:
    model: Any = build("llama")
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    found = spinal_trace(ModelState.plain(model, "idle"), tokenizer, pairs=pairs)
    assert found.transport == [0.0] * 3 and len(set(found.alphas)) == 1 and not math.isnan(found.alphas[0])


def test_a_mix_as_weights_has_the_trace_of_its_merged_checkpoint(tokenizer: Any, pairs: Any) -> None:
    model = two_axes(deep())
    mix = {"help": 0.8, "verb": -0.4}
    base, tuned = ModelState.base(model), ModelState.mix(model, mix, linearized=False)
    options = SpinalOptions(batch_size=8)
    found = spinal_score(base, tuned, tokenizer, pairs=pairs, options=options)
    linear = spinal_score(base, ModelState.mix(model, mix, True), tokenizer, pairs=pairs, options=options)
    model.combine_axes(mix)
    with pytest.warns(UserWarning, match="tied"):
        checkpoint = ModelState.plain(model.merge_and_unload(), "merged")
    merged = spinal_score(ModelState.plain(deep(), "base"), checkpoint, tokenizer, pairs=pairs, options=options)
    for name in ("base", "tuned"):
        ours, theirs = vars(found)[name], vars(merged)[name]
        assert ours.alphas == pytest.approx(theirs.alphas, rel=1e-3, nan_ok=True)
        assert ours.transport == pytest.approx(theirs.transport, rel=1e-3)
        assert ours.gradients.energy == pytest.approx(theirs.gradients.energy, rel=1e-2)
    assert found.score == pytest.approx(merged.score, rel=1e-2)
    assert linear.tuned.gradients.energy == pytest.approx(found.tuned.gradients.energy, rel=1e-3)  # at θ(λ) in both
    assert linear.tuned.transport != pytest.approx(found.tuned.transport, rel=1e-2)


def test_a_model_against_itself_has_not_changed(tokenizer: Any, pairs: Any) -> None:
    state = ModelState.plain(deep(), "base")
    found = spinal_score(state, state, tokenizer, pairs=pairs, options=SpinalOptions(gradient_pairs=3))
    assert found.tuned.gradients is not None and found.tuned.gradients.pairs == 3
    shift = found.alignment
    assert (shift.value, shift.scaled, shift.contraction_elsewhere, found.transport_error) == (0, 0, 0, 0)
    assert [verdict.finding for verdict in found.verdicts()][:2] == ["unknown", "unknown"]
    first, last = found.base.block
    energy = found.tuned.gradients.energy
    share = sum(energy[first - 1 : last]) / sum(energy)
    assert found.concentration[1] == pytest.approx(share - (last - first + 1) / 8)
    assert found.score == pytest.approx((found.coherence[1] + found.concentration[1]) / 3)


# ---- terms on planted traces ---------------------------------------------------------------------------------------

L, T = 8, (5, 8)


def planted(alphas: Any, transport: Any, energy: Any = None, block: tuple[int, int] = T) -> SpinalTrace:
    fits = [PowerLaw(float(a), 1.0, 20, (1, 20), 22, 0, "" if a == a else "no power law") for a in alphas]
    settings = SpinalSettings("made up", "all", 100, 100, 0, False, "float32", 64, 0.5, ["all of it"])
    gradients = None if energy is None else BlockGradients(list(energy), 0.7, 4, 0.1, 1)
    return SpinalTrace("planted", fits, [float(x) for x in transport], gradients, block, settings)


def test_alignment_is_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    alphas, transport = 1 + rng.random(L + 1), rng.random(L)
    base = planted(alphas, transport)
    risen, fallen = alphas.copy(), transport.copy()
    risen[5:9] += 0.3
    risen[:5] += 0.1
    fallen[5:8] -= 0.2  # the steps that leave the layers 5 to 7; none leaves layer 8
    found = alignment(base, planted(risen, fallen))
    assert found.contraction == pytest.approx(0.3) and found.contraction_elsewhere == pytest.approx(0.1)
    assert found.transport == pytest.approx(-0.2) and found.transport_elsewhere == pytest.approx(0)
    assert found.value == pytest.approx(0.5) and found.layers == 4 and found.reason == ""
    assert found.scaled == pytest.approx(0.3 / alphas.std() + 0.2 / transport.std())


def test_layers_without_an_exponent_are_left_out_or_make_the_term_unknown() -> None:
    alphas, transport = np.arange(9.0), np.arange(8.0)
    base = planted(alphas, transport)
    some, most = alphas + 1, alphas + 1
    some[[5, 8]] = math.nan
    most[[5, 6, 8]] = math.nan
    found = alignment(base, planted(some, transport))
    assert found.contraction == pytest.approx(1) and found.layers == 2
    found = alignment(base, planted(most, transport))
    assert math.isnan(found.value) and math.isnan(found.scaled) and "only 1 of 4 layers" in found.reason


def scored(base: SpinalTrace, tuned: SpinalTrace) -> SpinalScore:
    return _scored(base, tuned, _RowMeans(), SpinalOptions())


def terms_of(score: SpinalScore) -> dict[Any, list[Any]]:
    return {row[0]: row[1:] for row in score.tables()[0].rows}


def test_means_are_over_the_layers_that_both_have_or_missing_with_the_term() -> None:
    alphas, transport = np.arange(9.0), np.arange(8.0)
    some, most = alphas + 1, alphas + 1
    some[8] = math.nan  # the base's α of 8 must not enter its mean either
    most[[5, 6, 8]] = math.nan
    found = scored(planted(alphas, transport), planted(some, transport))
    assert terms_of(found)["mean α in layers 5–8"] == pytest.approx([6, 7, 1])
    found = scored(planted(alphas, transport), planted(most, transport))
    assert all(math.isnan(x) for x in terms_of(found)["mean α in layers 5–8"])
    assert terms_of(found)["mean ℒ in layers 5–8 (rad)"] == pytest.approx([6, 6, 0])


def test_a_score_that_is_missing_says_why() -> None:
    alphas, transport, energy = np.arange(9.0), np.arange(8.0), np.ones(8)
    base = planted(alphas, transport, energy)
    none = planted(np.full(9, math.nan), transport, energy)
    for other, words in (
        (none, ("only 0 of 4 layers of T have an α", "no coherence")),
        (planted(alphas, transport), ("no pairs were given",)),
        (planted(alphas, transport, np.zeros(8)), ("the gradient is zero",)),
    ):
        found = scored(base, other)
        assert math.isnan(found.score) and found.to_dict()["score"] is None
        assert all(word in found.to_dict()["reason"] and word in str(found) for word in words)
    found = scored(base, base)
    assert found.reason == "" and not math.isnan(found.score)
    assert "the same in all layers" in alignment(planted(np.ones(9), transport), base).reason
    assert {as_text(row[6]) for row in planted(alphas, transport, np.zeros(8)).tables()[0].rows} == {"–"}


def test_a_slight_rise_of_alpha_is_no_finding_and_a_whole_model_has_no_late_layers() -> None:
    alphas, transport = np.arange(9.0), np.arange(8.0)
    late = np.r_[np.zeros(5), np.ones(4)]
    for rise, finding in ((1e-3, "unknown"), (1.0, "fine"), (-1.0, "warning")):
        found = scored(planted(alphas, transport), planted(alphas + rise * late, transport))
        assert found.verdicts()[0].finding == finding
    whole = planted(alphas, transport, np.ones(8), block=(1, 8))
    (verdict,) = scored(whole, planted(alphas + 1, transport, np.ones(8), block=(1, 8))).verdicts()
    assert verdict.finding == "unknown" and "whole model" in verdict.text and "nan" not in verdict.text


def test_coherence_is_one_for_a_straight_trace_and_falls_with_its_bends() -> None:
    alphas, transport = np.linspace(1, 2, L + 1), np.linspace(3, 1, L)
    base = planted(alphas, transport)
    assert coherence(base, base) == pytest.approx(1.0)
    bent = alphas.copy()
    bent[6] += 0.5  # second differences at 5, 6, 7: 0.5, −1, 0.5; layer 7 has no step after the next, so 5 and 6 count
    expected = 1 / (1 + (0.5 + 1.0) / 2 / alphas.std())
    assert coherence(planted(bent, transport), base) == pytest.approx(expected)
    bent[:] = math.nan
    assert math.isnan(coherence(planted(bent, transport), base))
    assert math.isnan(coherence(base, planted(np.ones(9), transport)))  # nothing to scale by


def test_concentration_is_zero_for_an_even_gradient() -> None:
    energies = {0.0: np.ones(8), 0.5: np.r_[np.zeros(4), np.ones(4)], -0.5: np.r_[np.ones(4), np.zeros(4)]}
    for expected, energy in energies.items():
        assert planted(np.ones(9), np.ones(8), energy).concentration == pytest.approx(expected)
    assert math.isnan(planted(np.ones(9), np.ones(8), np.zeros(8)).concentration)


@pytest.mark.parametrize(
    ("layers", "block"), [(32, (21, 30)), (30, (19, 29)), (24, (15, 23)), (3, (1, 3)), (1, (1, 1))]
)
def test_the_terminal_block_scales_with_depth(layers: int, block: tuple[int, int]) -> None:
    assert terminal_block(layers) == block


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_it_prints_saves_and_draws_with_its_labels(tmp_path: Path, tokenizer: Any, pairs: Any) -> None:
    model = two_axes(deep())
    tuned = ModelState.mix(model, {"help": 1.0})
    found = spinal_score(ModelState.base(model), tuned, tokenizer, pairs=pairs, options=SpinalOptions(lens_tokens=40))
    text = str(found)
    for expected in ("reconstruction", "holds", "concentrat", "standard error", "n", "R²", "uncentred", "float32"):
        assert expected in text
    found.save(tmp_path / "spinal.json")
    saved = json.loads((tmp_path / "spinal.json").read_text(encoding="utf-8"))
    assert saved["tuned"]["transport"] == pytest.approx(found.tuned.transport)
    assert saved["tuned"]["settings"]["reconstructed"] and saved["base"]["settings"]["noise"] > 0
    for result in (found, found.tuned):
        (picture,) = result.plot(tmp_path)
        assert picture.is_file() and "reconstruction" in picture.with_suffix(".svg").read_text(encoding="utf-8")


def test_too_few_tokens_give_reasons_and_no_numbers(tmp_path: Path, tokenizer: Any, pairs: Any) -> None:
    state = ModelState.plain(deep(), "base")
    options = SpinalOptions(positions="last")
    found = spinal_score(state, state, tokenizer, pairs=pairs[:5], options=options)
    assert all(math.isnan(alpha) for alpha in found.base.alphas) and "too few tokens" in str(found)
    assert math.isnan(found.score) and math.isnan(found.alignment.value) and found.verdicts()[0].finding == "unknown"
    assert found.base.verdicts()[0].finding == "unknown"
    found.save(tmp_path / "spinal.json")
    assert json.loads((tmp_path / "spinal.json").read_text(encoding="utf-8"))["score"] is None
    assert found.plot(tmp_path)[0].is_file()


def test_named_errors(tokenizer: Any, pairs: Any) -> None:
    state = ModelState.plain(build("llama"), "llama")
    for given in ({}, {"prompts": ["Hi"], "pairs": pairs}):
        with pytest.raises(ValueError, match="either `prompts` or `pairs`"):
            spinal_trace(state, tokenizer, **given)
    with pytest.raises(ValueError, match="needs answers"):
        spinal_trace(state, tokenizer, prompts=["Hi"], options=SpinalOptions(positions="answer"))
    with pytest.raises(ValueError, match="No pairs"):
        spinal_trace(state, tokenizer, pairs=[])
    with pytest.raises(ValueError, match="terminal block 2 to 9"):
        spinal_trace(state, tokenizer, pairs=pairs, options=SpinalOptions(block=(2, 9)))
    with pytest.raises(ValueError, match="chosen answer of pair 0 is empty"):
        spinal_trace(state, tokenizer, pairs=[{**pairs[0], "chosen": [{"role": "assistant", "content": ""}]}])
    with pytest.raises(ValueError, match="number of blocks 3 and 8"):
        spinal_score(state, ModelState.plain(deep(), "deep"), tokenizer, pairs=pairs)
    for wrong in ({"positions": "first"}, {"lens_tokens": 0}, {"gradient_pairs": 0}, {"weights": (1.0, math.nan, 1.0)}):
        with pytest.raises(ValueError):
            SpinalOptions(**wrong)  # type: ignore[arg-type]
