"""The range of λ in which an axis was measured to be nearly linear, as it is kept in `TangentConfig` and warned of.

It is a statement about the network at the weights θ₀ + λτ, as merged and exported: within the range its linearity gap
is at most a limit. The linearized evaluation is exact at any λ. Measuring it is `tangent_peft.diagnose.safe_range`.

It belongs to one τ: a stored mix, an orthogonalized or combined axis starts without one, a training drops it, and an
export compares ‖τ‖ with what it was. Of a mix of several axes it says nothing but of each axis alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs

SAME_NORM = 1e-2  # relative; a change of dtype alters ‖τ‖ by less


@dataclass(frozen=True)
class StoredRange:
    """A measured range of λ of one axis alone.

    Attributes:
        low: smallest λ known to be within the limit, at most 0.
        high: largest one, at least 0.
        low_is_bound: whether the limit is crossed just below `low`; if not, λ was not followed further down.
        high_is_bound: the same above `high`.
        limit: of the linearity gap.
        measure: what the gap is of, "logits" or "log_probs".
        norm: ‖τ‖ of the axis it was measured on.

    Raises:
        ValueError: for numbers that are no range.
    """

    low: float
    high: float
    low_is_bound: bool
    high_is_bound: bool
    limit: float
    measure: str
    norm: float

    def __post_init__(self) -> None:
        numbers = {name: vars(self)[name] for name in ("low", "high", "limit", "norm")}
        numeric = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers.values())
        if not numeric or not self.low <= 0.0 <= self.high or self.limit <= 0 or self.norm < 0:
            raise ValueError(
                f"A safe range holds λ from `low` ≤ 0 to `high` ≥ 0, a `limit` above 0 and a `norm`; found {numbers}. "
                "Measure it with `tangent_peft.diagnose.safe_range`, or set it to null in adapter_config.json."
            )

    @staticmethod
    def read(record: object) -> StoredRange | None:
        """The range that `to_dict` gave; `None` for `None`.

        Raises:
            ValueError: for anything else.
        """
        if record is None:
            return None
        names = {field.name for field in fields(StoredRange)}
        if not isinstance(record, Mapping) or set(record) != names:
            raise ValueError(
                f"`safe_range` holds {sorted(names)}, or is None; found {record!r}. Measure it with "
                "`tangent_peft.diagnose.safe_range`, or set it to null in adapter_config.json."
            )
        return StoredRange(**record)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON holds them."""
        return asdict(self)

    def __str__(self) -> str:
        low = _number(self.low) if self.low_is_bound else f"at least {_number(self.low)}"
        high = _number(self.high) if self.high_is_bound else f"at least {_number(self.high)}"
        return f"from {low} to {high}"

    def holds(self, weight: float) -> bool:
        """Whether λ is within the range."""
        return self.low <= weight <= self.high

    def warning(self, axis: str, weight: float) -> str:
        """What to say of a λ outside of the range."""
        followed = self.low_is_bound if weight < self.low else self.high_is_bound
        what = "has been measured to exceed" if followed else "has not been measured to keep within"
        of = "log-probs" if self.measure == "log_probs" else "logits"
        return (
            f"λ = {weight:g} for axis {axis!r} is outside its measured range, {self}: beyond it the network at the "
            f"weights θ(λ), as merged or exported, {what} a linearity gap of {self.limit:g} ({of}). Stay in the range, "
            "keep to the linearized evaluation, which is exact in λ, or judge the merged model on its own."
        )


def _number(value: float) -> str:
    """Three digits, cut towards 0, so that what is read is within the range."""
    text = f"{value:.3g}"
    if abs(float(text)) > abs(value):
        text = f"{value - math.copysign(0.5 * 10.0 ** (math.floor(math.log10(abs(value))) - 2), value):.3g}"
    return text.replace("-", "−")


def store_range(tuner: AxisVerbs, axis: str, stored: StoredRange | None) -> None:
    """Keeps a range in the configuration of an axis, which `save_pretrained` writes; `None` takes it out.

    Args:
        tuner: the wrapped model.
        axis: an axis of it.
        stored: its range.
    """
    config = copy.copy(tuner.peft_config[axis])  # two axes may have been made from one configuration
    config.safe_range = None if stored is None else stored.to_dict()
    tuner.peft_config[axis] = config


def range_of(tuner: AxisVerbs, axis: str) -> StoredRange | None:
    """The range stored with an axis; `None` without one."""
    return StoredRange.read(tuner.peft_config[axis].safe_range)


def is_of_this_tangent(stored: StoredRange, norm: float) -> bool:
    """Whether a range was measured on an axis of this norm ‖τ‖; another one has changed since."""
    return math.isclose(stored.norm, norm, rel_tol=SAME_NORM)
