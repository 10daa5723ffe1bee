"""The mix that best explains a user's choices: λ fitted to a few preference pairs.

The model is Bradley–Terry with DPO's implicit reward (arXiv 2305.18290, eq. 7) of the linearized policy,

    P(y_w ≻ y_l | x) = σ(mₙ(λ)),   mₙ(λ) = β·[log π_λ/π₀ (y_w|x) − log π_λ/π₀ (y_l|x)],

where a pair may say with which probability pₙ the first answer is preferred (1 by default). What is minimized is

    ℓ(λ) = −Σₙ [pₙ log σ(mₙ) + (1 − pₙ) log σ(−mₙ)] + l2·‖λ‖²,

a smooth function of K numbers whose gradient and Hessian are exact (`AxisLogprobs.derivatives`). log π_λ of an answer
is concave in λ and a margin is the difference of two, so ℓ need not be convex: it is minimized from the lowest local
minima on a coarse grid over the safe range, and the lowest result is returned.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tangent_peft.evaluate.axis_logprobs import AxisLogprobs, axis_logprobs
from tangent_peft.evaluate.pairs import Pair, pair_batch
from tangent_peft.tuner.axes import SAFE_WEIGHT


GRID = {1: 13, 2: 7, 3: 5}  # points per axis over the safe range, by number of axes
STARTS = 3  # local minima of the grid from which ℓ is minimized, the lowest first
FAR = 10 * SAFE_WEIGHT  # where a minimum is taken for one at infinity
UNKNOWN = 100.0  # standard error of a direction from which on the pairs do not tell its λ
SAME = 1e-5  # least eigenvalue of the Hessian with a unit diagonal, far above rounding: no two axes do the same
EXPLAINED = 1e-3  # choices that are sure are all explained so closely only by a λ that would grow forever
_STEPS, _SMALL = 100, 1e-6  # of the minimization; gradient per pair at its end, of that of a margin


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
    """Fits the mix of `axes` that best explains preference pairs; the model at the top of this file.

    One linearized forward per axis is run on the pairs; the rest is arithmetic on λ. `model.combine_axes(fit.weights)`
    then activates the mix.

    Args:
        model: a `PeftModel` with tangent axes.
        pairs: `prompt`, `chosen`, `rejected`, conversational or plain text as TRL takes them, and, where the user is
            not sure, `probability`: that the chosen answer is the preferred one, in [0, 1]; 1 where it is missing.
        axes: the axes to mix; all axes of the model by default.
        tokenizer: the model's.
        beta: β, what a nat of log-probability is worth in the choice. As in DPO; a mix fitted with half of it is about
            twice as large.
        l2: weight of the penalty ‖λ‖². A few hard choices rarely pin λ down; 0.01 to 1 does.
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
    minimize = _scipy_minimize()
    parts = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    scores = axis_logprobs(model, (pair_batch(tokenizer, part) for part in parts), axes)
    order = _pair_rows([len(part) for part in parts]).to(scores.rows.device)
    problem = _Problem(scores, order, _probabilities(pairs), beta, l2)
    problem.check()
    best = min((_minimum(minimize, problem, start) for start in problem.starts()), key=lambda found: found[0])
    return problem.result(best[1])


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


def _pair_rows(sizes: list[int]) -> Tensor:
    """Rows (N, 2) of each pair's chosen and rejected answer among those of all batches."""
    starts = itertools.accumulate([0, *(2 * size for size in sizes)])
    chosen = [start + index for start, size in zip(starts, sizes, strict=False) for index in range(size)]
    rejected = [row + size for row, size in zip(chosen, (size for size in sizes for _ in range(size)), strict=True)]
    return torch.tensor([chosen, rejected]).mT


def _probabilities(pairs: Sequence[Pair]) -> Tensor:
    """P(chosen preferred) of each pair (N,), in float64."""
    found = [float(pair.get("probability", 1.0)) for pair in pairs]
    for index, probability in enumerate(found):
        if not 0.0 <= probability <= 1.0:
            raise ValueError(
                f"Pair {index} has the probability {probability}; P(chosen is preferred) must be a number in [0, 1]."
            )
    return torch.tensor(found, dtype=torch.float64)


class _Problem:
    """ℓ(λ) and its derivatives; all tensors in float64."""

    def __init__(self, scores: AxisLogprobs, order: Tensor, probabilities: Tensor, beta: float, l2: float) -> None:
        self.scores, self.order, self.beta, self.l2 = scores, order, beta, l2
        self.probabilities = probabilities.to(order.device)
        self.reference = scores.reference()
        self._last: tuple[tuple[float, ...], tuple[Tensor, Tensor, Tensor]] | None = None

    def check(self) -> None:
        """Refuses answers without tokens, and log-probs that are not finite."""
        for rows, message in (
            (self.scores.lengths == 0, "an answer without tokens, which says nothing"),
            (~self.reference.isfinite(), "an answer whose log-probability under the base is not finite"),
        ):
            bad = rows[self.order].any(1).nonzero()[:, 0].tolist()
            if bad:
                raise ValueError(f"Pair {bad[0]} has {message} ({len(bad)} such pairs). Take it out.")

    def margins(self, logps: Tensor) -> Tensor:
        """m (…, N) from log-probs (…, 2N)."""
        gains = (logps - self.reference)[..., self.order]
        return self.beta * (gains[..., 0] - gains[..., 1])

    def losses(self, margins: Tensor) -> Tensor:
        """−[p log σ(m) + (1 − p) log σ(−m)]."""
        return nn.functional.softplus(margins) - self.probabilities * margins

    def derivatives(self, mix: Any) -> tuple[Tensor, Tensor, Tensor]:
        """ℓ, its gradient (K,) and Hessian (K, K) at λ."""
        key = tuple(float(weight) for weight in mix)
        if self._last is None or self._last[0] != key:
            self._last = key, self._derivatives(torch.tensor(key, dtype=torch.float64, device=self.order.device))
        return self._last[1]

    def _derivatives(self, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.scores.derivatives(mix)
        margins = self.margins(found.value)
        chosen, rejected = self.order.unbind(1)
        slope = self.beta * (found.gradient[chosen] - found.gradient[rejected])
        bend = self.beta * (found.hessian[chosen] - found.hessian[rejected])
        odds = margins.sigmoid()
        value = self.losses(margins).sum() + self.l2 * mix.square().sum()
        gradient = (odds - self.probabilities) @ slope + 2 * self.l2 * mix
        hessian = torch.einsum("n,ni,nj->ij", odds * (1 - odds), slope, slope)
        hessian = hessian + torch.einsum("n,nij->ij", odds - self.probabilities, bend)
        return value, gradient, hessian + 2 * self.l2 * torch.eye(len(mix), dtype=mix.dtype, device=mix.device)

    def scale(self) -> float:
        """Size of a margin's gradient at λ = 0, root mean square over the pairs."""
        gradient = self.scores.derivatives(torch.zeros(len(self.scores.axes))).gradient[self.order]
        return float(self.beta * (gradient[:, 0] - gradient[:, 1]).square().sum(1).mean().sqrt())

    def starts(self) -> list[list[float]]:
        """The lowest local minima of ℓ on a grid over the safe range; for many axes on a star."""
        axes = len(self.scores.axes)
        points = GRID.get(axes, 0)
        if not points:
            star = torch.eye(axes, dtype=torch.float64) * (SAFE_WEIGHT / 2)
            grid = torch.cat([torch.zeros(1, axes, dtype=torch.float64), star, -star])
            return grid[self._grid_losses(grid).argsort()[:STARTS].cpu()].tolist()
        line = torch.linspace(-SAFE_WEIGHT, SAFE_WEIGHT, points, dtype=torch.float64)
        grid = torch.cartesian_prod(*[line] * axes).view(-1, axes)
        losses = self._grid_losses(grid).cpu()
        image = -losses.view(1, 1, *[points] * axes)
        pool = (nn.functional.max_pool1d, nn.functional.max_pool2d, nn.functional.max_pool3d)[axes - 1]
        lowest = (pool(image, 3, stride=1, padding=1) == image).flatten().nonzero()[:, 0]
        return grid[lowest[losses[lowest].argsort()[:STARTS]]].tolist()

    def _grid_losses(self, grid: Tensor) -> Tensor:
        penalty = self.l2 * grid.square().sum(1)
        losses = self.losses(self.margins(self.scores.logps(grid))).sum(1) + penalty.to(self.order.device)
        if not losses.isfinite().all():
            bad = grid[int((~losses.isfinite()).nonzero()[0])].tolist()
            raise ValueError(f"The log-probs at λ = {bad} are not finite. Check the axes for values that are not.")
        return losses

    def result(self, mix: list[float]) -> AxisFit:
        """The fit at the minimum.

        Raises:
            ValueError: if the pairs do not determine it.
        """
        _, _, hessian = self.derivatives(mix)
        self._refuse_singular(hessian, mix)
        covariance = torch.linalg.inv(hessian)
        weights = dict(zip(self.scores.axes, mix, strict=True))
        far = {name: round(weight, 3) for name, weight in weights.items() if abs(weight) > SAFE_WEIGHT}
        if far:
            warnings.warn(
                f"The fitted λ are {far}: mixes beyond |λ| = {SAFE_WEIGHT:g} are outside the range in which TS-DPO was "
                "found to work. Fit with a larger `l2`, check the linearity gap, and read the answers.",
                stacklevel=3,
            )
        after = self.scores.derivatives(mix).value
        return AxisFit(
            weights=weights,
            standard_errors=dict(zip(self.scores.axes, covariance.diagonal().sqrt().tolist(), strict=True)),
            covariance=covariance.tolist(),
            log_likelihood=-float(self.losses(self.margins(after)).sum()),
            accuracy_before=self._accuracy(self.reference),
            accuracy_after=self._accuracy(after),
            pairs=len(self.order),
            beta=self.beta,
            l2=self.l2,
        )

    def _accuracy(self, logps: Tensor) -> float:
        """Share of pairs whose preferred answer is the likelier one; ties, and p = 1/2, count half."""
        chosen, rejected = logps[self.order].unbind(1)
        return float((1 + torch.sign(chosen - rejected) * torch.sign(self.probabilities - 0.5)).mean() / 2)

    def _refuse_singular(self, hessian: Tensor, mix: list[float]) -> None:
        misses = (self.margins(self.scores.derivatives(mix).value).sigmoid() - self.probabilities).abs()
        sure = bool((self.probabilities == self.probabilities.round()).all())
        if max(map(abs, mix)) >= FAR or (sure and not self.l2 and float(misses.max()) < EXPLAINED):
            raise ValueError(
                "No finite λ explains the pairs best: the loss still falls in the direction "
                f"{_named(self.scores.axes, mix)} (perfect separation). Set `l2` (0.01 to 1), give a `probability` "
                "below 1 where the user is not sure, or add pairs of the opposite kind."
            )
        sizes = hessian.diagonal().clamp(min=0).sqrt()
        alike = hessian / torch.outer(sizes, sizes).clamp(min=1e-300)
        for matrix, least in ((hessian, UNKNOWN**-2), (alike, SAME)):
            curvatures, directions = torch.linalg.eigh(matrix)
            if not float(curvatures[0]) > least:
                raise ValueError(
                    "The pairs do not determine λ in the direction "
                    f"{_named(self.scores.axes, directions[:, 0])}: the curvature of the loss there is "
                    f"{float(curvatures[0]):.1e}. Leave out one of these axes, add pairs in which they differ, or set "
                    "`l2` (0.01 to 1)."
                )


def _named(axes: Sequence[str], values: Any) -> str:
    named: Mapping[str, float] = {name: float(value) for name, value in zip(axes, values, strict=True)}
    return "{" + ", ".join(f"{name!r}: {value:+.2f}" for name, value in named.items() if abs(value) > 0.05) + "}"


class _TooFar(Exception):
    """The minimization has left every range that λ may have."""


def _minimum(minimize: Callable[..., Any], problem: _Problem, start: list[float]) -> tuple[float, list[float]]:
    """ℓ and λ of the minimum found from `start`, by Newton steps within a trust region."""
    last = list(start)

    def observe(mix: Any) -> None:
        last[:] = [float(weight) for weight in mix]
        if max(map(abs, last)) >= FAR:
            raise _TooFar

    options = {"gtol": _SMALL * len(problem.order) * max(problem.scale(), 1e-12), "maxiter": _STEPS}
    try:
        found = minimize(
            lambda mix: float(problem.derivatives(mix)[0]),
            start,
            jac=lambda mix: problem.derivatives(mix)[1].cpu().numpy(),
            hess=lambda mix: problem.derivatives(mix)[2].cpu().numpy(),
            method="trust-exact",
            callback=observe,
            options=options,
        )
        last = [float(weight) for weight in found.x]
    except _TooFar:
        pass
    return float(problem.derivatives(last)[0]), last
