"""Stops a training before τ leaves the neighborhood of the base: a limit on the KL to the base, or on the norm of τ.

The sigmoid loss of a linear model has no finite optimum, so nothing in the loss stops τ from growing. Knows no loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


logger = logging.getLogger(__name__)


class BudgetCallback(TrainerCallback):
    """Ends the training after the first optimizer step at which a limit is exceeded.

    Args:
        axis: the axis that trains, for the message.
        limits: by name, what is measured and its limit; `None` is no limit.
    """

    def __init__(self, axis: str, limits: dict[str, tuple[Callable[[], float], float | None]]) -> None:
        self.axis = axis
        self.limits = {name: (read, limit) for name, (read, limit) in limits.items() if limit is not None}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Called by the trainer after an optimizer step."""
        for name, (read, limit) in self.limits.items():
            value = read()
            if value > limit:
                logger.warning(
                    "Training of axis %r stops at step %d: its %s is %.4g, over the limit of %.4g.",
                    *(self.axis, state.global_step, name, value, limit),
                )
                control.should_training_stop = True
        return control
