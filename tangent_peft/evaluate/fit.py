"""The mix that best explains a user's choices: λ fitted to a few preference pairs.

The loss of `choices.py` is a smooth function of K numbers. It is minimized by scipy (trust region, exact Hessian) from
the lowest local minima on a coarse grid, since it need not be convex, and the lowest result is returned, with standard
errors from the curvature there. Directions in λ of which the pairs say nothing are refused by name.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tangent_peft.evaluate.axis_logprobs import axis_logprobs
from tangent_peft.evaluate.choices import Choices
from tangent_peft.evaluate.pairs import Pair, pair_batch
from tangent_peft.tuner.axes import SAFE_WEIGHT


FAR = 10 * SAFE_WEIGHT  # where a minimum is taken for one at infinity
UNKNOWN = 100.0  # standard error of a direction from which on the pairs do not tell its λ
SAME = 1e-5  # least eigenvalue of the Hessian with a unit diagonal, far above rounding: no two axes do the same
EXPLAINED = 1e-3  # choices that are sure are all explained so closely only by a λ that would grow forever
STEPS, SMALL = 100, 1e-6  # of the minimization; gradient per pair at its end, of that of a margin


@dataclass(frozen=True)
class AxisFit:
    """Result of `fit_weights`.

    Attributes:
        weights: fitted λ by axis, as `combine_axes` takes them.
        standard_errors: of each λ, from the inverse of ℓ's Hessian at the minimum (the observed information); with
            `l2`, of the penalized likelihood. They hold for pairs that are independent and a model that is right.
        covariance: (K, K), in the order of `weights`.
        log_likelihood: Σ [p log σ(m) + (1 − p) log σ(−m)], without the penalty; at λ = 0 it is −pairs·log 2.
        accuracy_before: share of the pairs whose preferred answer has the higher log-probability under the base.
        accuracy_after: the same under the fitted mix.
        pairs: how many were fitted to.
        beta: β.
        l2: weight of the penalty.
    """

    weights: dict[str, float]
    standard_errors: dict[str, float]
    covariance: list[list[float]]
    log_likelihood: float
    accuracy_before: float
    accuracy_after: float
    pairs: int
    beta: float
    l2: float

    def __str__(self) -> str:
        found = ", ".join(
            f"{name} {self.weights[name]:+.3f} ± {self.standard_errors[name]:.3f}" for name in self.weights
        )
        return (
            f"{found} (λ ± standard error, {self.pairs} pairs, β = {self.beta:g}, l2 = {self.l2:g})\n"
            f"log-likelihood {self.log_likelihood:.3f}, at λ = 0 {-self.pairs * math.log(2):.3f}; preferred answer "
            f"more likely in {self.accuracy_after:.1%} of the pairs, base {self.accuracy_before:.1%}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All attributes, as plain numbers, lists and dicts."""
        return asdict(self)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict())


def fit_weights(
    model: nn.Module,
    pairs: Sequence[Pair],
    axes: Sequence[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    beta: float = 0.1,
    l2: float = 0.0,
    batch_size: int = 4,
) -> AxisFit:
    """Fits the mix of `axes` that best explains preference pairs, as probabilities σ(m(λ)); see `choices.py`.

    Of a pair, the linearized model in the mix λ explains the preference by m = β·[log π_λ/π₀ (chosen) − log π_λ/π₀
    (rejected)]; what is minimized is the logistic loss of all pairs + l2·‖λ‖². One linearized forward per axis is run
    on the pairs, the rest is arithmetic on λ. `model.combine_axes(fit.weights)` then activates the mix.

    Args:
        model: a `PeftModel` with tangent axes.
        pairs: `prompt`, `chosen`, `rejected`, conversational or plain text as TRL takes them, and, where the user is
            not sure, `probability`: that the chosen answer is the preferred one, in [0, 1]; 1 where it is missing.
        axes: the axes to mix; all axes of the model by default.
        tokenizer: the model's.
        beta: β, what a nat of log-probability is worth in the choice, as in DPO; with half of it the fitted mix is
            about twice as large.
        l2: weight of the penalty ‖λ‖². A few choices that are sure rarely pin λ down; 0.01 to 1 does.
        batch_size: pairs per forward.

    Raises:
        ImportError: if scipy is missing.
        TypeError: as `axis_logprobs`.
        ValueError: for no pairs, an answer without tokens, a probability outside [0, 1], log-probs that are not finite,
            unknown axes, or a fit that the pairs do not determine: the direction in λ is named.

    Warns:
        UserWarning: if a fitted |λ| is beyond the range in which TS-DPO was found to work.
    """
    _check_arguments(pairs, beta, l2, batch_size)
    minimize, chances = _scipy_minimize(), _chances(pairs)
    parts = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    scores = axis_logprobs(model, (pair_batch(tokenizer, part) for part in parts), axes)
    choices = Choices(scores, _pair_rows([len(part) for part in parts]), chances, beta, l2)
    small = SMALL * len(choices) * max(choices.slope(), 1e-12)
    mixes = [_minimum(minimize, choices, start, small) for start in choices.starts()]
    fit = _fit(choices, min(mixes, key=lambda mix: choices.derivatives(mix)[0]))
    far = {name: round(weight, 3) for name, weight in fit.weights.items() if abs(weight) > SAFE_WEIGHT}
    if far:
        warnings.warn(
            f"The fitted λ are {far}: mixes beyond |λ| = {SAFE_WEIGHT:g} are outside the range in which TS-DPO was "
            "found to work. Fit with a larger `l2`, check the linearity gap, and read the answers.",
            stacklevel=2,
        )
    return fit


def _check_arguments(pairs: Sequence[Pair], beta: float, l2: float, batch_size: int) -> None:
    if not len(pairs):
        raise ValueError("No preference pairs are given, and λ can not be fitted to nothing.")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"`beta={beta}` must be a positive number; DPO's default is 0.1.")
    if not (math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"`l2={l2}` must be a number that is not negative.")
    if batch_size < 1:
        raise ValueError(f"`batch_size={batch_size}` must be at least 1.")


def _scipy_minimize() -> Callable[..., Any]:
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise ImportError('Fitting needs scipy, which is not installed: pip install "tangent-peft[eval]"') from error
    return minimize


def _chances(pairs: Sequence[Pair]) -> Tensor:
    """P(chosen is preferred) of each pair (N,), in float64."""
    found = [float(pair.get("probability", 1.0)) for pair in pairs]
    for index, chance in enumerate(found):
        if not 0.0 <= chance <= 1.0:
            raise ValueError(f"Pair {index} has the probability {chance}; that it is so must be a number in [0, 1].")
    return torch.tensor(found, dtype=torch.float64)


def _pair_rows(sizes: list[int]) -> Tensor:
    """Rows (N, 2) of each pair's chosen and rejected answer among those of all batches."""
    starts = list(itertools.accumulate([0, *(2 * size for size in sizes)]))
    return torch.tensor(
        [
            [start + index, start + size + index]
            for start, size in zip(starts, sizes, strict=False)
            for index in range(size)
        ]
    )


class _TooFar(Exception):
    """The minimization has left every range that λ may have."""


def _minimum(minimize: Callable[..., Any], choices: Choices, start: list[float], small: float) -> list[float]:
    """λ of the minimum found from `start`, by Newton steps within a trust region; one at `FAR` has no end."""
    last = list(start)

    def observe(mix: Any) -> None:
        last[:] = [float(weight) for weight in mix]
        if max(map(abs, last)) >= FAR:
            raise _TooFar

    try:
        found = minimize(
            lambda mix: choices.derivatives(mix)[0],
            start,
            jac=lambda mix: choices.derivatives(mix)[1].cpu().numpy(),
            hess=lambda mix: choices.derivatives(mix)[2].cpu().numpy(),
            method="trust-exact",
            callback=observe,
            options={"gtol": small, "maxiter": STEPS},
        )
    except _TooFar:
        return last
    return [float(weight) for weight in found.x]


def _fit(choices: Choices, mix: list[float]) -> AxisFit:
    """The fit at the minimum."""
    axes, after = choices.scores.axes, choices.logps(mix)
    hessian = choices.derivatives(mix)[2].cpu()
    margins = choices.margins(after)
    _refuse_separated(choices, mix, margins)
    _refuse_singular(axes, hessian)
    covariance = torch.linalg.inv(hessian)
    return AxisFit(
        weights=dict(zip(axes, mix, strict=True)),
        standard_errors=dict(zip(axes, covariance.diagonal().sqrt().tolist(), strict=True)),
        covariance=covariance.tolist(),
        log_likelihood=-float(choices.losses(margins).sum()),
        accuracy_before=choices.accuracy(choices.reference),
        accuracy_after=choices.accuracy(after),
        pairs=len(choices),
        beta=choices.beta,
        l2=choices.l2,
    )


def _refuse_separated(choices: Choices, mix: list[float], margins: Tensor) -> None:
    """Raises a `ValueError` if the loss has no minimum, but falls forever in some direction."""
    sure = bool((choices.chances == choices.chances.round()).all())
    explained = float((margins.sigmoid() - choices.chances).abs().max()) < EXPLAINED
    if max(map(abs, mix)) >= FAR or (sure and explained and not choices.l2):
        raise ValueError(
            "No finite λ explains the pairs best: the loss still falls in the direction "
            f"{_named(choices.scores.axes, mix)} (perfect separation). Set `l2` (0.01 to 1), give a `probability` "
            "below 1 where the user is not sure, or add pairs of the opposite kind."
        )


def _refuse_singular(axes: Sequence[str], hessian: Tensor) -> None:
    """Raises a `ValueError` if a direction in λ is not determined, also between axes that are made equally strong."""
    sizes = hessian.diagonal().clamp(min=0).sqrt()
    alike = hessian / torch.outer(sizes, sizes).clamp(min=1e-300)
    for matrix, least in ((hessian, UNKNOWN**-2), (alike, SAME)):
        curvatures, directions = torch.linalg.eigh(matrix)
        if not float(curvatures[0]) > least:
            raise ValueError(
                f"The pairs do not determine λ in the direction {_named(axes, directions[:, 0])}: the curvature of the "
                f"loss there is {float(curvatures[0]):.1e}. Leave out one of these axes, add pairs in which they "
                "differ, or set `l2` (0.01 to 1)."
            )


def _named(axes: Sequence[str], values: Any) -> str:
    named = {name: float(value) for name, value in zip(axes, values, strict=True)}
    return "{" + ", ".join(f"{name!r}: {value:+.2f}" for name, value in named.items() if abs(value) > 0.05) + "}"
