"""Forgetting, against loops written out, planted changes, and a simulation in which nothing but noise happens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build
from scipy import stats
from torch import Tensor

from tangent_peft.diagnose.stages.forgetting import Conflict, Forgetting, forgetting
from tangent_peft.diagnose.stages.transfer import ObjectiveScores, contrast, differs, student_within
from tangent_peft.evaluate.pairs import pair_batch
from tangent_peft.evaluate.preferences import pair_logps
from tangent_peft.tuner.movement import Movement


BETA = 0.3


def scores_with(*per_token: Tensor, length: int = 4) -> ObjectiveScores:
    """Scores whose g is as given, the base first; the rejected answer has log-prob 0 throughout."""
    logps = [torch.stack([length * g.double(), torch.zeros(len(g), dtype=torch.float64)], 1) for g in per_token]
    lengths = torch.full((len(per_token[0]), 2), length)
    return ObjectiveScores(logps[0], logps[1:], lengths)


def random_scores(pairs: int, stages: int, seed: int) -> ObjectiveScores:
    generator = torch.Generator().manual_seed(seed)
    logps = [-10 + 4 * torch.randn(pairs, 2, generator=generator) for _ in range(stages + 1)]
    return ObjectiveScores(logps[0], logps[1:], torch.randint(1, 9, (pairs, 2), generator=generator))


@pytest.fixture
def random() -> tuple[dict[str, ObjectiveScores], Forgetting]:
    scores = {"help": random_scores(13, 2, 0), "verb": random_scores(9, 2, 1)}
    return scores, forgetting(scores, ["help", "verb"], BETA)


# ---- a twin, written out pair by pair --------------------------------------------------------------------------------


def by_hand(scores: ObjectiveScores) -> tuple[list[list[float]], list[list[float]]]:
    """m and g of every pair, by stage."""
    m, g = [], []
    for logps in [scores.reference, *scores.stages]:
        rows = range(len(logps))
        gains = [[float(logps[i, k]) - float(scores.reference[i, k]) for k in (0, 1)] for i in rows]
        m.append([BETA * (gains[i][0] - gains[i][1]) for i in rows])
        ratio = [[float(logps[i, k]) / int(scores.lengths[i, k]) for k in (0, 1)] for i in rows]
        g.append([ratio[i][0] - ratio[i][1] for i in rows])
    return m, g


def test_standings_are_those_of_a_loop(random: Any) -> None:
    scores, result = random
    for objective, found in scores.items():
        m, g = by_hand(found)
        for stage, name in enumerate(["base", "help", "verb"]):
            cell = result.standing(objective, name)
            n = len(m[stage])
            assert cell.margin == pytest.approx(sum(m[stage]) / n, abs=1e-12)
            assert cell.margin_error == pytest.approx(np.std(m[stage], ddof=1) / math.sqrt(n), abs=1e-12)
            assert cell.policy_margin == pytest.approx(sum(g[stage]) / n, abs=1e-6)
            assert cell.policy_accuracy == pytest.approx(sum(x > 0 for x in g[stage]) / n)
            accuracy = 0.5 if name == "base" else sum(x > 0 for x in m[stage]) / n
            assert cell.accuracy == pytest.approx(accuracy)


def test_changes_are_paired(random: Any) -> None:
    scores, result = random
    assert [(c.objective, c.before, c.after, c.role) for c in result.changes] == [
        ("help", "base", "help", "trained"),
        ("help", "help", "verb", "previous"),
        ("verb", "base", "help", "later"),
        ("verb", "help", "verb", "trained"),
    ]
    m, g = by_hand(scores["help"])
    change = result.forgotten()[0]
    steps = np.subtract(m[2], m[1])
    assert change.margin == pytest.approx(steps.mean())
    assert change.margin_error == pytest.approx(steps.std(ddof=1) / math.sqrt(13))
    assert change.improved == pytest.approx(sum(b > a for a, b in zip(g[1], g[2], strict=True)) / 13)
    assert change.lost == pytest.approx(sum(a > 0 > b for a, b in zip(g[1], g[2], strict=True)) / 13)
    assert change.gained == pytest.approx(sum(a < 0 < b for a, b in zip(g[1], g[2], strict=True)) / 13)


@pytest.mark.parametrize(("ranking", "stage"), [("stage", 1), ("base", 0)])
def test_quartiles_are_those_of_a_loop(random: Any, ranking: str, stage: int) -> None:
    scores, result = random
    _, g = by_hand(scores["help"])
    order = sorted(range(13), key=lambda i: g[stage][i])
    sizes, start = [4, 3, 3, 3], 0
    found = [q for q in result.quartiles if q.objective == "help" and q.ranked_by == ranking]
    assert [q.quartile for q in found] == [1, 2, 3, 4]
    for quartile, size in zip(found, sizes, strict=True):
        rows, start = order[start : start + size], start + size
        assert quartile.pairs == size
        assert (quartile.low, quartile.high) == pytest.approx((g[stage][rows[0]], g[stage][rows[-1]]))
        steps = [g[2][i] - g[1][i] for i in rows]
        assert quartile.change == pytest.approx(sum(steps) / size)
        assert quartile.error == pytest.approx(np.std(steps, ddof=1) / math.sqrt(size))
        assert quartile.improved == pytest.approx(sum(step > 0 for step in steps) / size)
        assert quartile.lost == pytest.approx(sum(g[1][i] > 0 > g[2][i] for i in rows) / size)
        assert quartile.gained == pytest.approx(sum(g[1][i] < 0 < g[2][i] for i in rows) / size)


def test_margins_are_those_of_the_models_own_logits(tokenizer: Any, pairs: list[dict[str, Any]]) -> None:
    base, policy = build("llama"), build("llama")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    (reference, lengths), (logps, _) = (pair_logps(model, tokenizer, pairs) for model in (base, policy))
    result = forgetting({"a": ObjectiveScores(reference, [logps], lengths)}, ["a"], BETA)
    m, g = [], []
    for pair in pairs:
        found = []
        batch = pair_batch(tokenizer, [pair])
        for row in range(2):
            ids, answer = batch["input_ids"][row], batch["completion_mask"][row].bool()
            ids, answer = ids[batch["attention_mask"][row].bool()], answer[batch["attention_mask"][row].bool()]
            sums = []
            for model in (base, policy):
                with torch.no_grad():
                    probs = model(ids[None]).logits[0].double().softmax(-1)
                sums.append(sum(math.log(probs[t - 1, ids[t]]) for t in range(1, len(ids)) if answer[t]))
            found.append((sums[1] - sums[0], sums[1] / int(answer.sum())))
        m.append(BETA * (found[0][0] - found[1][0]))
        g.append(found[0][1] - found[1][1])
    cell = result.standing("a", "a")
    assert cell.margin == pytest.approx(np.mean(m), abs=1e-4)
    assert cell.policy_margin == pytest.approx(np.mean(g), abs=1e-4)


# ---- planted changes -------------------------------------------------------------------------------------------------


def quartile_changes(result: Forgetting, ranked_by: str) -> list[float]:
    return [q.change for q in result.quartiles if q.objective == "a" and q.ranked_by == ranked_by]


def two_stages(base: Tensor, first: Tensor, second: Tensor) -> Forgetting:
    scores = {"a": scores_with(base, first, second), "b": scores_with(base, first, second)}
    return forgetting(scores, ["a", "b"], BETA)


def test_a_planted_change_of_each_quartile_is_found_under_both_rankings() -> None:
    base = torch.linspace(-1, 1, 40, dtype=torch.float64)
    planted = torch.tensor([0.3, 0.1, 0.0, -0.4], dtype=torch.float64).repeat_interleave(10)
    jitter = 1e-3 * torch.randn(40, dtype=torch.float64)
    result = two_stages(base, base + 0.2, base + 0.2 + planted + jitter)
    for ranked_by in ("stage", "base"):
        assert quartile_changes(result, ranked_by) == pytest.approx([0.3, 0.1, 0.0, -0.4], abs=2e-3)
    top = [q for q in result.quartiles if q.objective == "a" and q.ranked_by == "base"][3]
    flipped = (base[30:] + 0.2 > 0) & (base[30:] + 0.2 - 0.4 < 0)
    assert top.lost == pytest.approx(float(flipped.double().mean()), abs=0.11)


def test_regression_to_the_mean_moves_quartiles_by_stage_and_not_those_by_base() -> None:
    """g = standing + noise that is drawn anew at every stage: no pair is ever moved on purpose."""
    generator = torch.Generator().manual_seed(3)
    standing = torch.randn(20000, generator=generator, dtype=torch.float64)
    noise = (torch.randn(20000, generator=generator, dtype=torch.float64) for _ in range(3))
    base, first, second = (standing + one for one in noise)
    result = two_stages(base, first, second)
    by_stage, by_base = (quartile_changes(result, ranked_by) for ranked_by in ("stage", "base"))
    # g₁ has variance 2, half of it noise, so E[g₂ − g₁ | g₁] = −g₁/2, and the mean of the top quarter of a standard
    # normal is 1.271.
    expected = 0.5 * math.sqrt(2) * 1.271
    assert by_stage[3] == pytest.approx(-expected, abs=0.06)
    assert by_stage[0] == pytest.approx(expected, abs=0.06)
    assert by_base == pytest.approx([0.0] * 4, abs=0.06)
    change = result.forgotten()[0]
    assert change.pattern == "stability"
    assert any("regression to the mean" in verdict.text for verdict in result.verdicts())


@pytest.mark.parametrize(
    ("shift", "slope", "pattern"),
    [
        (-0.5, 0.0, "partial degradation"),
        (0.5, 0.0, "positive transfer"),
        (0.0, 0.8, "redistribution"),
        (0.0, 0.0, "stability"),
    ],
)
def test_patterns(shift: float, slope: float, pattern: str) -> None:
    base = torch.linspace(-1, 1, 40, dtype=torch.float64)
    wave = 0.1 * torch.cos(math.pi * torch.arange(40)).double()  # adds up to 0 in every quartile
    result = two_stages(base, base, base + shift + slope * base.abs() - slope * base.abs().mean() + wave)
    assert result.forgotten()[0].pattern == pattern


def test_a_shift_that_all_pairs_share_is_not_called_unlike() -> None:
    """All pairs fall by 0.5: every quartile differs from 0, and none from the others."""
    base = torch.linspace(-1, 1, 40, dtype=torch.float64)
    wave = 0.1 * torch.cos(math.pi * torch.arange(40)).double()
    result = two_stages(base, base, base - 0.5 + wave)
    lines = [verdict for verdict in result.verdicts() if "Δg by g after" in verdict.text]
    assert [line.finding for line in lines] == ["fine"]
    planted = two_stages(base, base, base - 0.5 * base + wave)
    assert any("moved unlike" in verdict.text for verdict in planted.verdicts())


def test_longer_answers_alone_are_no_redistribution() -> None:
    """Δm is 0 on average, Δg is 0.3 in every pair: a shift of g that all have alike, and no quartile of its own."""
    base = torch.linspace(-1, 1, 40, dtype=torch.float64)
    reference = torch.stack([4 * base, torch.zeros(40, dtype=torch.float64)], 1)
    lengths = torch.tensor([[4, 8]]).repeat(40, 1)
    wave = 0.1 * torch.cos(math.pi * torch.arange(40)).double()
    gain = torch.stack([2.4 + wave, torch.full((40,), 2.4, dtype=torch.float64)], 1)  # Δm = wave, Δg = 0.3 + wave / 4
    scores = {name: ObjectiveScores(reference, [reference, reference + gain], lengths) for name in "ab"}
    result = forgetting(scores, ["a", "b"], BETA)
    assert quartile_changes(result, "base") == pytest.approx([0.3] * 4, abs=1e-9)
    assert result.forgotten()[0].pattern == "stability"


def test_rises_at_the_top_are_not_laid_to_regression() -> None:
    """What stands high after the first stage rises: noise would let it fall."""
    generator = torch.Generator().manual_seed(0)
    base, step = torch.randn(2, 400, generator=generator, dtype=torch.float64)
    step = step - (step @ base / (base @ base)) * base
    result = two_stages(base, base + step, base + 1.5 * step)
    line = next(verdict for verdict in result.verdicts() if "Δg by g after" in verdict.text)
    assert line.finding == "warning"
    assert "not as regression to the mean would have it" in line.text


def test_contrasts_are_welchs(random: Any) -> None:
    scores, result = random
    _, g = by_hand(scores["help"])
    order = sorted(range(13), key=lambda i: g[0][i])
    steps = [g[2][i] - g[1][i] for i in order]
    found = [q for q in result.quartiles if q.objective == "help" and q.ranked_by == "base"]
    mean, error, pairs = contrast([found[0]], found[1:])
    expected = stats.ttest_ind(steps[:4], steps[4:], equal_var=False)
    assert mean / error == pytest.approx(expected.statistic)
    assert pairs - 1 == math.floor(expected.df)


def test_gradients_whose_sign_changes_are_not_called_a_conflict() -> None:
    scores = {name: random_scores(9, 2, 0) for name in ("a", "b")}

    def line(cosines: list[float]) -> Any:
        result = forgetting(scores, ["a", "b"], BETA, [Conflict("b", "a", cosines)])
        rows = next(table.rows for table in result.tables() if table.title.startswith("Gradients"))
        return rows[0], next(verdict for verdict in result.verdicts() if verdict.text.startswith("Gradients"))

    assert line([-0.9, 0.5])[1].finding == "unknown"
    assert line([-0.9])[1].finding == "unknown"
    assert line([-0.9, -0.8, -0.85])[1].finding == "warning"
    row, verdict = line([0.8, math.nan, 0.9, 0.85])
    assert row[2:4] == [3, pytest.approx(0.85)]
    assert verdict.finding == "fine"


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 23, 100, 999, 5000])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.0, 3.7, 12.0])
def test_student_as_scipy(t: float, freedom: int) -> None:
    expected = stats.t.cdf(t, freedom) - stats.t.cdf(-t, freedom)
    assert student_within(t, freedom) == pytest.approx(expected, abs=1e-3 if freedom > 1000 else 1e-12)


def test_differs_at_the_five_percent_of_the_tables() -> None:
    assert differs(2.572, 1.0, pairs=6)  # t(5) = 2.571
    assert not differs(2.570, 1.0, pairs=6)
    assert differs(-3.82, 1.0, pairs=6, tests=4)  # t(5) at 1.25 % = 3.810
    assert not differs(3.80, 1.0, pairs=6, tests=4)
    assert not differs(5.0, math.nan, pairs=1)


def test_what_a_stage_trains_is_not_printed_as_transfer() -> None:
    base = torch.linspace(-1, 1, 40, dtype=torch.float64)
    wave = 0.1 * torch.cos(math.pi * torch.arange(40)).double()
    result = two_stages(base, base + 0.5 + wave, base + 1.0)
    rows = next(table.rows for table in result.tables() if table.title.startswith("Pair by pair"))
    assert [(row[3], row[-1]) for row in rows[:2]] == [("trained", None), ("previous", "positive transfer")]


# ---- what it prints, saves and draws ---------------------------------------------------------------------------------


def test_prints_saves_and_draws(random: Any, tmp_path: Path) -> None:
    scores, _ = random
    conflicts = [Conflict("verb", "help", [0.01, -0.03], [0.4, 0.5])]
    movements = {"verb": Movement(1.0, 1.2, 0.5, 0.5, -0.1)}
    result = forgetting(scores, ["help", "verb"], BETA, conflicts, movements)
    text = str(result)
    assert "Near-orthogonal" in text
    assert "-0.010" in text
    assert "Movement of the adapter" in text
    result.save(tmp_path / "forgetting.json")
    held = json.loads((tmp_path / "forgetting.json").read_text())
    assert held["movements"]["verb"]["moved"] == 0.5
    assert held["conflicts"][0]["cosines"] == [0.01, -0.03]
    assert [path.name for path in result.plot(tmp_path)] == ["forgetting-transfer.png", "forgetting-quartiles.png"]
    assert (tmp_path / "forgetting-quartiles.svg").is_file()


def test_seven_pairs_are_too_few_for_quartiles(tmp_path: Path) -> None:
    scores = {"a": random_scores(7, 2, 0), "b": random_scores(12, 2, 1)}
    result = forgetting(scores, ["a", "b"], BETA)
    assert all(math.isnan(change) for change in quartile_changes(result, "stage"))
    assert "7 held-out pairs" in result.reasons["a"]
    assert [v.finding for v in result.verdicts() if "no quartiles" in v.text] == ["unknown"]
    result.save(tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text())["quartiles"][0]["change"] is None
    assert [path.stem for path in result.plot(tmp_path)] == ["forgetting-transfer"]


def test_one_stage_can_make_nothing_forgotten() -> None:
    result = forgetting({"a": random_scores(10, 1, 0)}, ["a"], BETA)
    assert not result.forgotten()
    assert result.verdicts()[0].finding == "unknown"


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_an_empty_completion_is_named() -> None:
    scores = random_scores(9, 1, 0)
    scores.lengths[4, 1] = 0
    with pytest.raises(ValueError, match="Pair 4 of 'a' has an empty rejected completion"):
        forgetting({"a": scores}, ["a"], BETA)


@pytest.mark.parametrize(
    ("scores", "stages", "beta", "message"),
    [
        (random_scores(9, 1, 0), ["a", "b"], BETA, "lacks \\['b'\\]"),
        (random_scores(9, 2, 0), ["a"], BETA, "after 2 stages, but 1"),
        (random_scores(9, 1, 0), [], BETA, "each trained objective once"),
        (random_scores(9, 1, 0), ["a"], 0.0, "positive number; found 0.0"),
        (ObjectiveScores(torch.zeros(3), [torch.zeros(3)], torch.ones(3)), ["a"], BETA, "expected \\(N, 2\\)"),
        (scores_with(torch.zeros(3), torch.tensor([0.0, math.nan, 0.0])), ["a"], BETA, "not finite at pair 1"),
    ],
)
def test_bad_input(scores: ObjectiveScores, stages: list[str], beta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forgetting({"a": scores}, stages, beta)
