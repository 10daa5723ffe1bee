"""Fitting λ to choices: planted mixes are found, errors are the likelihood's, what is not determined is refused."""

from __future__ import annotations

import builtins
import json
import math
from typing import Any

import pytest
import torch
from cases import config
from conftest import build
from peft import PeftModel, get_peft_model
from tolerances import assert_equal
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tangent_peft.evaluate import fit_weights
from tangent_peft.evaluate.preferences import pair_logps


PLANTED = {"left": 0.8, "right": -1.1}
BETA = 0.5
ASKED = ["rain", "an egg", "the sea", "a cat", "a color", "the sun", "a name", "some bread"]
ANSWERS = [
    ("Gladly: it is simple.", "No."),
    ("Sure.", "Why do you ask?"),
    ("It is blue.", "Go away now."),
    ("Yes", "I"),
]


def _rows() -> list[dict[str, Any]]:
    """32 pairs in plain text."""
    return [{"prompt": f"What is {x}? ", "chosen": a, "rejected": b} for x in ASKED for a, b in ANSWERS]


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(1)
    wrapped = get_peft_model(build("llama"), config("shared"), adapter_name="left")
    wrapped.add_adapter("right", config("dense"))
    return wrapped.eval()


def _margins(model: PeftModel, tokenizer: Any, rows: list[dict[str, Any]], mix: dict[str, float]) -> Tensor:
    """m of each pair, by running the model."""

    def gains(weights: dict[str, float]) -> Tensor:
        with model.axes(weights):
            return pair_logps(model, tokenizer, rows)[0].double()

    return BETA * (gains(mix) - gains({})) @ torch.tensor([1.0, -1.0], dtype=torch.float64)


def _graded(model: PeftModel, tokenizer: Any, mix: dict[str, float] = PLANTED) -> list[dict[str, Any]]:
    """The pairs with the probabilities of a user whose mix is `mix`: choices without noise."""
    rows = _rows()
    chances = _margins(model, tokenizer, rows, mix).sigmoid().tolist()
    return [{**row, "probability": chance} for row, chance in zip(rows, chances, strict=True)]


def test_finds_a_planted_mix(model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.combine_axes({"left": 0.25})
    fit = fit_weights(model, _graded(model, tokenizer), tokenizer=tokenizer, beta=BETA)
    assert model.axis_weights == {"left": 0.25}
    for axis, weight in PLANTED.items():
        assert fit.weights[axis] == pytest.approx(weight, rel=0.01)
    assert fit.pairs == 32 and fit.beta == BETA
    margins = _margins(model, tokenizer, _rows(), fit.weights)
    chances = _margins(model, tokenizer, _rows(), PLANTED).sigmoid()
    likelihood = chances * margins.sigmoid().log() + (1 - chances) * (-margins).sigmoid().log()
    assert fit.log_likelihood == pytest.approx(float(likelihood.sum()), rel=1e-5)
    assert fit.log_likelihood > -32 * math.log(2)
    model.combine_axes(fit.weights)
    assert model.axis_weights == fit.weights


def test_one_axis_of_two(model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = _graded(model, tokenizer, {"right": 1.5})
    fit = fit_weights(model, rows, ["right"], tokenizer=tokenizer, beta=BETA, batch_size=5)
    assert fit.weights == {"right": pytest.approx(1.5, rel=0.01)}


def test_hard_choices_give_the_direction(model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = _rows()
    for row, margin in zip(rows, _margins(model, tokenizer, rows, PLANTED), strict=True):
        if margin < 0:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    fit = fit_weights(model, rows, tokenizer=tokenizer, beta=BETA, l2=0.3)
    found, planted = (torch.tensor(list(x.values())) for x in (fit.weights, PLANTED))
    assert torch.cosine_similarity(found, planted, dim=0) > 0.8
    assert (_margins(model, tokenizer, rows, fit.weights) > 0).double().mean() > 0.8


def test_standard_errors_are_those_of_the_likelihood(model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = model.double()
    rows = _graded(model, tokenizer)
    fit = fit_weights(model, rows, tokenizer=tokenizer, beta=BETA, l2=0.1)
    chances = torch.tensor([row["probability"] for row in rows], dtype=torch.float64)

    def loss(left: float, right: float) -> float:
        margins = _margins(model, tokenizer, rows, {"left": left, "right": right})
        terms = chances * margins.sigmoid().log() + (1 - chances) * (-margins).sigmoid().log()
        return -float(terms.sum()) + 0.1 * (left**2 + right**2)

    (x, y), d = fit.weights.values(), 0.02
    bend_x = (loss(x + d, y) - 2 * loss(x, y) + loss(x - d, y)) / d**2
    bend_y = (loss(x, y + d) - 2 * loss(x, y) + loss(x, y - d)) / d**2
    mixed = (loss(x + d, y + d) - loss(x + d, y - d) - loss(x - d, y + d) + loss(x - d, y - d)) / (4 * d**2)
    covariance = torch.linalg.inv(torch.tensor([[bend_x, mixed], [mixed, bend_y]], dtype=torch.float64))
    assert_equal(torch.tensor(fit.covariance, dtype=torch.float64), covariance, 0.02)
    assert list(fit.standard_errors.values()) == pytest.approx(covariance.diagonal().sqrt().tolist(), rel=0.01)


def test_it_prints_and_saves(model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
    fit = fit_weights(model, _graded(model, tokenizer), tokenizer=tokenizer, beta=BETA)
    assert "left +0.8" in str(fit) and "32 pairs" in str(fit)
    saved = json.loads(fit.to_json())
    assert saved == fit.to_dict()
    assert saved["weights"] == fit.weights and len(saved["covariance"]) == 2
    assert 0.0 <= fit.accuracy_before <= 1.0 and 0.0 <= fit.accuracy_after <= 1.0


def test_conversational_pairs(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]
) -> None:
    chances = _margins(model, tokenizer, pairs, {"left": 1.0}).sigmoid().tolist()
    rows = [{**row, "probability": chance} for row, chance in zip(pairs, chances, strict=True)]
    fit = fit_weights(model, rows, ["left"], tokenizer=tokenizer, beta=BETA)
    assert fit.weights["left"] == pytest.approx(1.0, rel=0.01)


def test_a_large_mix_is_warned_of(model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.warns(UserWarning, match="λ = 4.0"):
        rows = _graded(model, tokenizer, {"left": 4.0})
    with pytest.warns(UserWarning, match="fitted λ are"):
        fit = fit_weights(model, rows, tokenizer=tokenizer, beta=BETA)
    assert fit.weights["left"] == pytest.approx(4.0, rel=0.05)


class TestNotDetermined:
    def test_equal_axes(self, model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
        model.combine_axes({"left": 1.0}, adapter_name="again")
        rows = _graded(model, tokenizer)
        with pytest.raises(ValueError, match=r"do not determine λ in the direction \{'left': .*'again': "):
            fit_weights(model, rows, ["left", "right", "again"], tokenizer=tokenizer, beta=BETA)
        fit = fit_weights(model, rows, ["left", "again"], tokenizer=tokenizer, beta=BETA, l2=0.01)
        assert fit.weights["left"] == pytest.approx(fit.weights["again"], abs=1e-3)

    def test_an_axis_that_does_nothing(self, model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
        model.add_adapter("idle", config("shared", init_weights=True))
        with pytest.raises(ValueError, match=r"direction \{'idle': [+-]1.00\}"):
            fit_weights(model, _graded(model, tokenizer), tokenizer=tokenizer, beta=BETA)

    def test_separated_choices(self, model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
        rows = _graded(model, tokenizer, {"left": 2.0})
        sure = max(rows, key=lambda row: abs(row["probability"] - 0.5))
        sure["probability"] = float(sure["probability"] > 0.5)
        with pytest.raises(ValueError, match="perfect separation"):
            fit_weights(model, [sure], ["left"], tokenizer=tokenizer, beta=BETA)


class TestBadInput:
    def test_arguments(self, model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
        rows = _rows()[:2]
        for given, options, message in (
            ([], {}, "No preference pairs"),
            (rows, {"beta": 0.0}, "beta=0.0"),
            (rows, {"l2": -1.0}, "l2=-1.0"),
            (rows, {"batch_size": 0}, "batch_size=0"),
            (rows, {"axes": ["up"]}, "Unknown axis 'up'"),
            ([*rows, {**rows[0], "probability": 1.2}], {}, "Pair 2 has the probability 1.2"),
            ([*rows, {**rows[0], "probability": math.nan}], {}, "Pair 2 has the probability nan"),
            ([{"prompt": "a", "chosen": "b"}], {}, r"lacks \['rejected'\]"),
            ([{"prompt": "a", "chosen": "b", "rejected": []}], {}, "mixes message lists and text"),
        ):
            with pytest.raises(ValueError, match=message):
                fit_weights(model, given, tokenizer=tokenizer, **options)

    def test_an_empty_answer(self, model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
        rows = _rows()[:3]
        rows[2] = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [], "rejected": []}
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        with pytest.raises(ValueError, match="Pair 2 has an answer without tokens"):
            fit_weights(model, rows, tokenizer=tokenizer)

    def test_values_that_are_not_finite(self, model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
        with torch.no_grad():
            model.get_submodule("base_model.model.lm_head").tangent_B["left"].weight[5] = math.inf
        with pytest.raises(ValueError, match="not finite"):
            fit_weights(model, _rows()[:2], tokenizer=tokenizer)

    def test_scipy_missing(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = builtins.__import__

        def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.startswith("scipy"):
                raise ImportError("No module named 'scipy'", name="scipy")
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(ImportError, match=r'pip install "tangent-peft\[eval\]"'):
            fit_weights(model, _rows()[:2], tokenizer=tokenizer)
