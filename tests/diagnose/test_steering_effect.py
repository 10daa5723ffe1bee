"""What steering does: a planted shift that inversion undoes, a slow twin with biases, resumed forwards, controls."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from steering_models import D, L, biased_llama, direction, vectors_of, with_bias
from strong_axes import two_axes

from tangent_peft.diagnose import ModelState
from tangent_peft.diagnose.steering.greedy import GreedyAnswers
from tangent_peft.diagnose.steering.resume import Resumable
from tangent_peft.diagnose.steering.sweep import MODES, SteeringEffect, SteeringPoint
from tangent_peft.diagnose.steering.trial import EffectOptions, steering_effect
from tangent_peft.evaluate.generation import Answer
from tangent_peft.evaluate.pairs import pair_batch


QUICK = {"strengths": (0.5, 1.0), "control_seeds": 2, "answer_tokens": None, "batch_size": 3}


def effect(base: Any, tuned: Any, vectors: Any, tokenizer: Any, pairs: Any, **options: Any) -> Any:
    states = [m if isinstance(m, ModelState) else ModelState.plain(m, n) for m, n in ((base, "base"), (tuned, "tuned"))]
    prompts = options.pop("prompts", ())
    return steering_effect(*states, vectors, tokenizer, pairs, prompts, EffectOptions(**{**QUICK, **options}))


# ---- planted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [2, 3])
def test_planted_vector_is_undone_and_imitated(tokenizer: Any, pairs: list[Any], layer: int) -> None:
    base, u = biased_llama(), direction(size=6.0)
    found = effect(base, with_bias(base, layer, u), vectors_of(base, {layer: u}), tokenizer, pairs, layers=(layer,))
    assert found.unsteered["interpolation"]["kl_base"] == 0 and found.unsteered["inversion"]["kl_tuned"] == 0
    assert (
        found.unsteered["interpolation"]["margin"] == 0 and found.unsteered["interpolation"]["reward_accuracy"] == 0.5
    )
    assert found.unsteered["inversion"]["kl_base"] > 0.01
    for mode, target in (("interpolation", "tuned"), ("inversion", "base")):
        point = found.at(mode, 1.0)
        other = found.unsteered["inversion" if target == "tuned" else "interpolation"]
        assert point.values == pytest.approx(other, abs=1e-5)  # one model has become the other
        recovery = found.recovery(point)
        assert recovery.kl == pytest.approx(1.0, abs=1e-4) and recovery.match == 1.0
        assert recovery.control_mean < 0.5
        half = found.recovery(found.at(mode, 0.5))
        assert 0 < half.kl < 1
    assert [verdict.finding for verdict in found.verdicts()] == ["fine", "fine"]


def test_a_random_vector_is_called_chance(tokenizer: Any, pairs: list[Any]) -> None:
    base, u = biased_llama(), direction(size=6.0)
    wrong = vectors_of(base, {L: direction(7, 6.0)})
    found = effect(base, with_bias(base, L, u), wrong, tokenizer, pairs, control_seeds=4)
    assert [verdict.finding for verdict in found.verdicts()] == ["warning", "warning"]
    assert all("chance" in verdict.text for verdict in found.verdicts())


@pytest.mark.parametrize(
    ("far", "finding", "words"),
    [
        (0.1, "fine", "closes 90%"),
        (0.7, "warning", "less than half"),
        (1.2, "warning", "leads away"),  # and random directions lead further
        (5.2, "warning", "no more than chance"),
    ],
)
def test_verdicts(far: float, finding: str, words: str) -> None:
    def values(kl: float) -> dict[str, float]:
        return {"kl_base": kl, "kl_tuned": kl, "match_base": 0.5, "match_tuned": 0.5}

    controls = {name: [5.0, 5.5, 6.0] for name in values(0.0)}
    points = [SteeringPoint(mode, 1.0, values(far), controls, values(5.5), values(0.5)) for mode in MODES]
    starts = {mode: values(1.0) for mode in MODES}
    found = SteeringEffect("a", "b", 8, [L], {}, starts, points, {})
    for verdict in found.verdicts():
        assert verdict.finding == finding and words in verdict.text


def test_chance_is_what_random_directions_reach() -> None:
    def chance(mine: float, *others: float) -> bool:
        values = {"kl_base": mine}
        return SteeringPoint("inversion", 1.0, values, {"kl_base": list(others)}, values, values).is_chance

    assert not chance(0.0, 1.0, 2.0)
    assert not chance(0.1, 1.0, 2.0, 1.5)
    assert chance(1.2, 1.0, 2.0, 1.5)
    assert chance(0.9, 1.0, 8.0, 2.0)  # the lowest, and within what such a spread gives
    assert not chance(0.01, 1.0, 8.0, 2.0)


# ---- a slow twin -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow(model: Any, base: Any, tuned: Any, tokenizer: Any, pairs: list[Any], limit: int | None) -> dict[str, float]:
    """Every metric by a loop over answers and tokens, each answer in a forward of its own."""
    kl_base, kl_tuned, same_base, same_tuned, margins, wins, policy, token = ([] for _ in range(8))
    for pair in pairs:
        batch = pair_batch(tokenizer, [pair])
        sums = []
        for row in range(2):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            places = batch["completion_mask"][row].nonzero().flatten().tolist()[:limit]
            logps = [m(ids[None]).logits[0].float().log_softmax(-1) for m in (model, base, tuned)]
            totals = [0.0, 0.0]
            for place in places:
                p, q, r = (logp[place - 1] for logp in logps)
                kl_base.append(float((p.exp() * (p - q)).sum()))
                kl_tuned.append(float((p.exp() * (p - r)).sum()))
                same_base.append(float(p.argmax() == q.argmax()))
                same_tuned.append(float(p.argmax() == r.argmax()))
                totals[0] += float(p[ids[place]])
                totals[1] += float(q[ids[place]])
            sums.append((*totals, len(places)))
        (w, w0, nw), (r, r0, nr) = sums
        margins.append((w - w0) - (r - r0))
        wins.append(1.0 if margins[-1] > 0 else 0.0)
        policy.append(float(w > r))
        token.append(float(w / nw > r / nr))
    lists = (kl_base, kl_tuned, same_base, same_tuned, margins, wins, policy, token)
    names = "kl_base kl_tuned match_base match_tuned margin reward_accuracy policy_accuracy policy_per_token"
    return dict(zip(names.split(), map(statistics.fmean, lists), strict=True))


@pytest.mark.parametrize("limit", [None, 2])
def test_every_metric_against_a_slow_loop(tokenizer: Any, pairs: list[Any], limit: int | None) -> None:
    base, u, v = biased_llama(), direction(1, 6.0), direction(2, 5.0).float()
    tuned, vectors = with_bias(base, 2, u), vectors_of(base, {2: v})
    found = effect(base, tuned, vectors, tokenizer, pairs[:5], layers=(2,), strengths=(0.5,), answer_tokens=limit)
    models = {"interpolation": (base, 0.5), "inversion": (tuned, -0.5)}
    for mode in MODES:
        start, sign = models[mode]
        point = found.at(mode, 0.5)
        values = slow(with_bias(start, 2, sign * v), base, tuned, tokenizer, pairs[:5], limit)
        assert point.values == pytest.approx(values, rel=1e-3, abs=1e-4)
        controls = [
            slow(with_bias(start, 2, sign * vectors.random(seed).vectors[2]), base, tuned, tokenizer, pairs[:5], limit)
            for seed in (0, 1)
        ]
        for name in values:
            both = [control[name] for control in controls]
            assert point.control_means[name] == pytest.approx(statistics.fmean(both), rel=1e-3, abs=1e-4)
            assert point.control_sds[name] == pytest.approx(statistics.stdev(both), rel=1e-2, abs=1e-4)
            assert point.excess(name) == pytest.approx(values[name] - statistics.fmean(both), rel=1e-2, abs=2e-4)


# ---- running on from a layer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("linearized", [True, False])
def test_resumed_forwards_are_whole_ones(
    tokenizer: Any, pairs: list[Any], name: str, linearized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = Resumable._is_exact, []
    monkeypatch.setattr(Resumable, "_is_exact", lambda *given: tried.append(real(*given)) or tried[-1])
    model = two_axes(build(name))
    base, tuned = ModelState.base(model), ModelState.mix(model, {"help": 1.0}, linearized=linearized)
    vectors = vectors_of(model.get_base_model(), {2: direction(1).float(), 3: direction(2).float()})
    fast = effect(base, tuned, vectors, tokenizer, pairs, layers=(2, 3))
    assert tried == [True, True]
    monkeypatch.setattr(Resumable, "_is_exact", lambda self, whole, logits: False)
    whole = effect(base, tuned, vectors, tokenizer, pairs, layers=(2, 3))
    assert fast.unsteered["inversion"]["kl_base"] > 1e-3
    for one, other in zip(fast.points, whole.points, strict=True):
        assert one.values == other.values and one.controls == other.controls


@torch.no_grad()
def test_only_upper_blocks_run_again() -> None:
    model = biased_llama()
    calls: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda m, a, o, i=index: calls.append(i))
    resumable, ids = Resumable(model, 2), torch.tensor([[5, 6, 7]])
    resumable.first(lambda: model(ids).logits)
    assert resumable.exact
    calls.clear()
    with resumable.resumed():
        model(ids)
    assert calls == [2]
    calls.clear()
    model(ids)
    assert calls == [0, 1, 2]


@torch.no_grad()
def test_a_cut_that_changes_logits_a_little_is_refused() -> None:
    model = biased_llama().float()
    seen: dict[str, Any] = {}  # the last block adds a little of what the first one computes
    blocks = model.model.layers
    blocks[0].mlp.register_forward_hook(lambda m, a, o: seen.update(value=o))
    blocks[0].register_forward_hook(lambda m, a, o: None if "value" in seen else seen.update(value=0))
    blocks[2].mlp.register_forward_hook(lambda m, a, o: o + 1e-5 * seen.pop("value", 0))
    resumable, ids = Resumable(model, 2), torch.tensor([[5, 6, 7]])
    whole = resumable.first(lambda: model(ids).logits)
    with resumable._skipping():
        assert 0 < (model(ids).logits - whole).abs().max() < 1e-4 * whole.abs().max()
    assert not resumable.exact


@torch.no_grad()
def test_a_model_that_can_not_be_cut_runs_as_a_whole() -> None:
    model = biased_llama()
    state: dict[str, Any] = {}  # the head reads what the first block has left: past the hidden states
    model.model.layers[0].self_attn.register_forward_hook(lambda m, a, o: state.update(seen=state.get("seen", 0) + 1))
    model.lm_head.register_forward_hook(lambda m, a, o: o * state["seen"])
    resumable, ids = Resumable(model, 2), torch.tensor([[5, 6, 7]])
    whole = resumable.first(lambda: model(ids).logits)
    assert resumable.exact  # nothing ran again, so the count is the same
    state["seen"] = 0
    shifty = Resumable(model, 2)
    model.model.register_forward_hook(lambda m, a, o: state.update(seen=state["seen"] + 1))
    whole = shifty.first(lambda: model(ids).logits)
    assert not shifty.exact
    with shifty.resumed():
        assert not torch.equal(model(ids).logits, whole)  # a whole forward, counted once more


# ---- greedy answers --------------------------------------------------------------------------------------------------


def test_greedy_answers(tokenizer: Any, pairs: list[Any]) -> None:
    base, u = biased_llama(), direction(size=8.0)
    prompts = ["How do I boil an egg?", "What is rain?"]
    options = {"prompts": prompts, "generate_tokens": 6, "strengths": (1.0,)}
    found = effect(base, with_bias(base, L, u), vectors_of(base, {L: u}), tokenizer, pairs[:3], **options)
    assert found.unsteered["interpolation"]["greedy_base"] == 1.0
    assert found.unsteered["interpolation"]["greedy_tuned"] < 1.0
    assert found.at("interpolation", 1.0).values["greedy_tuned"] == 1.0
    assert found.at("inversion", 1.0).values["greedy_base"] == 1.0
    assert "4-gram rep." in str(found)


def test_greedy_comparison() -> None:
    def answers(*tokens: list[int], finite: bool = True) -> list[Answer]:
        return [Answer("", row, False, finite) for row in tokens]

    mine = answers([1, 2, 3, 4], [7, 7, 7, 7, 7, 7])
    found = GreedyAnswers.compare(mine, answers([1, 2, 9, 4], [7]), mine)
    assert found == pytest.approx({"greedy_base": (0.5 + 1 / 6) / 2, "greedy_tuned": 1.0, "repetition": (2 / 3) / 2})
    broken = GreedyAnswers.compare(answers([1], finite=False), mine[:1], mine[:1])
    assert all(math.isnan(value) for value in broken.values())


# ---- results and refusals --------------------------------------------------------------------------------------------


def test_prints_saves_and_draws(tokenizer: Any, pairs: list[Any], tmp_path: Path) -> None:
    base, u = biased_llama(), direction()
    found = effect(base, with_bias(base, L, u), vectors_of(base, {L: u}), tokenizer, pairs, strengths=(0.0, -1.0, 1.0))
    text = str(found)
    for part in ("base + λ v⋆", "tuned − λ v⋆", "v⋆ − random", "KL closed", "8 held-out pairs"):
        assert part in text
    assert [point.strength for point in found.points] == [-1.0, 1.0] * 2
    found.save(tmp_path / "effect.json")
    saved = json.loads((tmp_path / "effect.json").read_text())
    assert saved["points"][1]["values"]["kl_tuned"] == pytest.approx(found.points[1].values["kl_tuned"])
    assert saved["settings"]["vectors_digest"] == vectors_of(base, {L: u}).digest
    assert [path.name for path in found.plot(tmp_path)] == ["steering_effect.png"]
    assert (tmp_path / "steering_effect.svg").is_file()


def test_verdicts_where_a_number_is_missing(tokenizer: Any, pairs: list[Any]) -> None:
    base, u = biased_llama(), direction()
    states = ModelState.plain(base, "a"), ModelState.plain(with_bias(base, L, u), "b")
    found = effect(*states, vectors_of(base, {L: u.float()}), tokenizer, pairs, strengths=(1.0,))
    agreed = {mode: {**values, "match_base": 1.0, "match_tuned": 1.0} for mode, values in found.unsteered.items()}
    for verdict in replace(found, pairs=8, unsteered=agreed).verdicts():
        assert "the most likely tokens are the same" in verdict.text and "nan" not in verdict.text
    points = [replace(p, values={**p.values, "kl_base": math.nan, "kl_tuned": math.nan}) for p in found.points]
    for verdict in replace(found, pairs=8, points=points).verdicts():
        assert verdict.finding == "unknown" and "not finite" in verdict.text


def test_models_that_predict_the_same_close_nothing(tokenizer: Any, pairs: list[Any]) -> None:
    base = biased_llama()
    found = effect(base, base, vectors_of(base, {L: direction()}), tokenizer, pairs)
    assert math.isnan(found.recovery(found.at("inversion", 1.0)).kl)
    assert [verdict.finding for verdict in found.verdicts()] == ["unknown", "unknown"]
    few = effect(base, base, vectors_of(base, {L: direction()}), tokenizer, pairs[:2])
    assert "too few" in few.verdicts()[0].text


def test_named_errors(tokenizer: Any, pairs: list[Any]) -> None:
    base = biased_llama()
    vectors = vectors_of(base, {L: direction()})
    with pytest.raises(ValueError, match="No pairs"):
        effect(base, base, vectors, tokenizer, [])
    empty = [{**pairs[0], "chosen": [{"role": "assistant", "content": " "}]}]
    with pytest.raises(ValueError, match="chosen answer of pair 0 is empty"):
        effect(base, base, vectors, tokenizer, empty)
    with pytest.raises(IndexError, match="Layer 4"):
        effect(base, base, vectors, tokenizer, pairs, layers=(4,))
    with pytest.raises(ValueError, match="no prompts"):
        effect(base, base, vectors, tokenizer, pairs, generate_tokens=4)
    with pytest.raises(ValueError, match="answer_tokens"):
        effect(base, base, vectors, tokenizer, pairs, answer_tokens=0)
    with pytest.raises(ValueError, match="hidden size"):
        effect(base, base, vectors_of(base, {L: torch.zeros(D - 1)}), tokenizer, pairs)
    for wrong in ({"control_seeds": 1}, {"strengths": ()}, {"strengths": (1.0, 1.0)}, {"generate_tokens": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EffectOptions(**wrong)
