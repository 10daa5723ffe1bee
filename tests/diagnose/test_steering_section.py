"""D-STEER as one call: vectors are made from some prompts and judged on others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUESTIONS, build
from steering_models import D, L, biased_llama, direction, with_bias
from strong_axes import two_axes

from tangent_peft.diagnose import ModelState
from tangent_peft.diagnose.steering import section
from tangent_peft.diagnose.steering.section import SteeringOptions, diagnose_steering, split_rows
from tangent_peft.diagnose.steering.trial import EffectOptions
from tangent_peft.diagnose.steering.vectors import SteeringVectors


QUICK = EffectOptions(strengths=(1.0,), control_seeds=2, answer_tokens=4)
PROMPTS = [f"{question} And {number}?" for question in QUESTIONS for number in range(5)]


def rows(prompts: list[str]) -> list[dict[str, Any]]:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {"prompt": said("user", p), "chosen": said("assistant", "Gladly."), "rejected": said("assistant", "No way.")}
        for p in prompts
    ]


def options(**given: Any) -> SteeringOptions:
    return SteeringOptions(**{"effect": QUICK, "batch_size": 4, **given})


def test_a_mix_of_axes(tokenizer: Any, tmp_path: Path) -> None:
    model = two_axes(build("llama"))
    base, tuned = ModelState.base(model), ModelState.mix(model, {"help": 1.0}, linearized=True)
    found = diagnose_steering(base, tuned, tokenizer, PROMPTS, rows(PROMPTS), options())
    assert list(found.shifts) == ["prompt", "answer"]
    assert found.shifts["prompt"].count == 19 and found.shifts["prompt"].held_out == 6
    assert len(found.tables()) == 2 + 2 + 3
    text = str(found)
    assert "Last prompt token: " in text and "Mean over the chosen answer: " in text
    assert "pairs are too few" in text
    found.save(tmp_path / "steering.json")
    saved = json.loads((tmp_path / "steering.json").read_text())
    assert set(saved) == {"diagnosis", "verdicts", "shifts", "effect", "settings"}
    assert saved["effect"]["settings"]["linearized"] is True
    paths = found.save_vectors(tmp_path)
    assert [path.name for path in paths] == ["steering_prompt.safetensors", "steering_answer.safetensors"]
    loaded = SteeringVectors.load(paths[0])
    assert torch.equal(loaded.vectors[L], found.vectors["prompt"].vectors[L])
    with loaded.applied(model, 0.5), torch.no_grad():
        model(input_ids=torch.tensor([[3, 4]]))
    assert len(found.plot(tmp_path)) == 5


def test_two_checkpoints_with_a_planted_vector(tokenizer: Any) -> None:
    base, u = biased_llama(), direction(size=6.0)
    states = ModelState.plain(base, "before"), ModelState.plain(with_bias(base, L, u), "after")
    found = diagnose_steering(*states, tokenizer, PROMPTS, rows(PROMPTS), options(steer_with="answer"))
    assert torch.allclose(found.vectors["answer"].vectors[L], u.float(), atol=1e-5)
    for mode in ("interpolation", "inversion"):
        assert found.effect.recovery(found.effect.at(mode, 1.0)).kl == pytest.approx(1.0, abs=1e-4)
    assert {verdict.finding for verdict in found.effect.verdicts()} <= {"fine", "unknown"}


def test_no_prompt_is_on_both_sides(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {"prompts": [], "pairs": []}
    real_batches, real_effect = section.prompt_batches, section.steering_effect

    def batches(tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        seen["prompts"].append(list(prompts))
        return real_batches(tokenizer, prompts, *rest)

    def effect(base: Any, tuned: Any, vectors: Any, tokenizer: Any, pairs: Any, prompts: Any, given: Any) -> Any:
        seen["pairs"].append([pair["prompt"][0]["content"] for pair in pairs])
        return real_effect(base, tuned, vectors, tokenizer, pairs, prompts, given)

    monkeypatch.setattr(section, "prompt_batches", batches)
    monkeypatch.setattr(section, "steering_effect", effect)
    base = biased_llama()
    state = ModelState.plain(base, "a"), ModelState.plain(with_bias(base, L, direction()), "b")
    given = [*PROMPTS, *PROMPTS[:7]]  # some of them twice
    one = options(positions=("prompt",), steer_with="prompt", max_pairs=100)
    diagnose_steering(*state, tokenizer, given, rows(given), one)
    diagnose_steering(*state, tokenizer, given[::-1], rows(given), one)
    diagnose_steering(
        *state, tokenizer, given, rows(given), options(positions=("prompt",), steer_with="prompt", seed=1)
    )
    fitted, judged, again, _, other, _ = map(set, seen["prompts"])
    assert not fitted & judged and fitted | judged == set(PROMPTS)
    assert fitted == again and fitted != other
    assert not set(seen["pairs"][0]) & fitted and set(seen["pairs"][0]) == judged


def test_a_row_counts_once_and_its_place_does_not_count() -> None:
    pairs = rows(PROMPTS)
    other = {**pairs[0], "chosen": [{"role": "assistant", "content": "With pleasure."}]}
    for position, given in (("prompt", PROMPTS), ("answer", [*pairs, other])):
        one = options(max_prompts=7, max_answers=7)
        fitted, judged = split_rows(position, given, one)
        assert (len(fitted), len(judged)) == (7, 3)
        assert split_rows(position, [*given[::-1], *given[:9]], one) == (fitted, judged)
        fitted, judged = split_rows(position, given * 2, options())
        assert len(fitted) + len(judged) == len(given)


def test_a_pair_that_lacks_a_part_is_named_first(tokenizer: Any) -> None:
    states = ModelState.plain(biased_llama(), "a"), ModelState.plain(biased_llama(), "b")
    wrong = [*rows(PROMPTS[:2]), {"chosen": "Yes.", "rejected": "No."}]
    with pytest.raises(ValueError, match="Pair 2 lacks one of `prompt`"):
        diagnose_steering(*states, tokenizer, PROMPTS, wrong, options())
    with pytest.raises(ValueError, match="chosen answer of pair 1 is empty"):
        empty = [rows(PROMPTS[:1])[0], {**rows(PROMPTS[:1])[0], "chosen": " "}]
        diagnose_steering(*states, tokenizer, PROMPTS, empty, options())


def test_named_errors(tokenizer: Any) -> None:
    base = biased_llama()
    state = ModelState.plain(base, "a"), ModelState.plain(with_bias(base, L, torch.ones(D).double()), "b")
    with pytest.raises(ValueError, match="leaves 0 of 1 rows"):
        diagnose_steering(*state, tokenizer, PROMPTS[:1], rows(PROMPTS), options())
    with pytest.raises(ValueError, match="different architecture"):
        diagnose_steering(state[0], ModelState.plain(build("qwen3"), "b"), tokenizer, PROMPTS, [], options())
    one = options(positions=("prompt",), steer_with="prompt")
    taken, _ = split_rows("prompt", PROMPTS, one)
    with pytest.raises(ValueError, match="prompt of each pair was used"):
        diagnose_steering(*state, tokenizer, PROMPTS, rows(taken), one)
    for wrong in ({"positions": ("first",)}, {"steer_with": "answer", "positions": ("prompt",)}, {"held_out": 1.0}):
        with pytest.raises(ValueError, match=r"`(positions|held_out)`"):
            SteeringOptions(**wrong)
