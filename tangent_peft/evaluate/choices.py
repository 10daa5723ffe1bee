"""How well a mix explains preference pairs: Bradley–Terry with DPO's implicit reward, as a function of λ.

Of the linearized policy, with pₙ the probability that the user prefers y_w in pair n (arXiv 2305.18290, eq. 6 and 7):

    P(y_w ≻ y_l | x) = σ(mₙ(λ)),   mₙ(λ) = β·[log π_λ/π₀ (y_w|x) − log π_λ/π₀ (y_l|x)],
    ℓ(λ) = −Σₙ [pₙ log σ(mₙ) + (1 − pₙ) log σ(−mₙ)] + l2·‖λ‖²

Gradient and Hessian are exact, from those of the log-probs (`AxisLogprobs.derivatives`). log π_λ of an answer is
concave in λ and a margin is the difference of two, so ℓ need not be convex. Knows no optimizer, tokenizer or model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tangent_peft.evaluate.axis_logprobs import AxisLogprobs
from tangent_peft.forward.mixes import Derivatives
from tangent_peft.tuner.axes import SAFE_WEIGHT


GRID = {1: 13, 2: 7, 3: 5}  # points per axis over the safe range, by number of axes
STARTS = 3  # local minima of the grid, the lowest first


class Choices:
    """ℓ(λ) of N pairs, with its derivatives; in float64.

    Args:
        scores: of the answers.
        order: their rows, chosen and rejected (N, 2).
        chances: pₙ (N,).
        beta: β.
        l2: weight of the penalty.

    Raises:
        ValueError: for an answer without tokens, or log-probs of the base that are not finite.
    """

    def __init__(self, scores: AxisLogprobs, order: Tensor, chances: Tensor, beta: float, l2: float) -> None:
        device = scores.rows.device
        self.scores, self.order, self.chances = scores, order.to(device), chances.to(device)
        self.beta, self.l2 = beta, l2
        self.reference = scores.reference()
        self._found: dict[tuple[float, ...], Derivatives] = {}
        for rows, message in (
            (scores.lengths == 0, "an answer without tokens, which says nothing"),
            (~self.reference.isfinite(), "an answer whose log-probability under the base is not finite"),
        ):
            bad = rows[self.order].any(1).nonzero()[:, 0].tolist()
            if bad:
                raise ValueError(f"Pair {bad[0]} has {message} ({len(bad)} such pairs). Take it out.")

    def __len__(self) -> int:
        return len(self.order)

    def logps(self, mix: Sequence[float]) -> Tensor:
        """log π_λ of all answers (2N,) at λ."""
        return self._scored(mix).value

    def margins(self, logps: Tensor) -> Tensor:
        """m (…, N) from log-probs (…, 2N)."""
        gains = (logps - self.reference)[..., self.order]
        return self.beta * (gains[..., 0] - gains[..., 1])

    def losses(self, margins: Tensor) -> Tensor:
        """−[p log σ(m) + (1 − p) log σ(−m)] of each pair."""
        return nn.functional.softplus(margins) - self.chances * margins

    def accuracy(self, logps: Tensor) -> float:
        """Share of pairs whose preferred answer is the likelier one; ties, and p = 1/2, count half."""
        chosen, rejected = logps[self.order].unbind(1)
        return float((1 + torch.sign(chosen - rejected) * torch.sign(self.chances - 0.5)).mean() / 2)

    def derivatives(self, mix: Sequence[float]) -> tuple[float, Tensor, Tensor]:
        """ℓ, its gradient (K,) and its Hessian (K, K) at λ."""
        found, margins = self._scored(mix), self.margins(self.logps(mix))
        slope, bend = self._difference(found.gradient), self._difference(found.hessian)
        odds = margins.sigmoid()
        weights = slope.new_tensor([float(weight) for weight in mix])
        value = self.losses(margins).sum() + self.l2 * weights.square().sum()
        gradient = (odds - self.chances) @ slope + 2 * self.l2 * weights
        hessian = torch.einsum("n,ni,nj->ij", odds * (1 - odds), slope, slope)
        hessian = hessian + torch.einsum("n,nij->ij", odds - self.chances, bend)
        return float(value), gradient, hessian + 2 * self.l2 * torch.eye(len(weights)).to(hessian)

    def slope(self) -> float:
        """Size of a margin's gradient at λ = 0, root mean square over the pairs."""
        gradient = self._difference(self._scored([0.0] * len(self.scores.axes)).gradient)
        return float(gradient.square().sum(1).mean().sqrt())

    def starts(self) -> list[list[float]]:
        """The lowest local minima of ℓ on a grid over the safe range; for more than three axes, on a star.

        Raises:
            ValueError: for log-probs that are not finite.
        """
        axes = len(self.scores.axes)
        points = GRID.get(axes, 0)
        if not points:
            star = torch.eye(axes, dtype=torch.float64) * (SAFE_WEIGHT / 2)
            grid = torch.cat([torch.zeros(1, axes, dtype=torch.float64), star, -star])
            return grid[self._at(grid).argsort()[:STARTS]].tolist()
        line = torch.linspace(-SAFE_WEIGHT, SAFE_WEIGHT, points, dtype=torch.float64)
        grid = torch.cartesian_prod(*[line] * axes).view(-1, axes)
        losses = self._at(grid)
        image = -losses.view(1, 1, *[points] * axes)
        pool = (nn.functional.max_pool1d, nn.functional.max_pool2d, nn.functional.max_pool3d)[axes - 1]
        lowest = (pool(image, 3, stride=1, padding=1) == image).flatten().nonzero()[:, 0]
        return grid[lowest[losses[lowest].argsort()[:STARTS]]].tolist()

    def _at(self, grid: Tensor) -> Tensor:
        """ℓ (M,) at many λ, on the CPU."""
        losses = self.losses(self.margins(self.scores.logps(grid))).sum(1).cpu() + self.l2 * grid.square().sum(1)
        if not losses.isfinite().all():
            bad = grid[int((~losses.isfinite()).nonzero()[0])].tolist()
            raise ValueError(f"The log-probs at λ = {bad} are not finite. Look for values in the axes that are not.")
        return losses

    def _scored(self, mix: Sequence[float]) -> Derivatives:
        key = tuple(float(weight) for weight in mix)
        if key not in self._found:
            self._found[key] = self.scores.derivatives(key)
        return self._found[key]

    def _difference(self, rows: Tensor) -> Tensor:
        """β·(chosen − rejected) of a quantity by row."""
        chosen, rejected = self.order.unbind(1)
        return self.beta * (rows[chosen] - rows[rejected])
