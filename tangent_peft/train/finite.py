"""A loss that is not finite ends the training with the rows that made it, before it reaches the optimizer.

The rows are found by their tokens: TRL's batches do not carry the place of a row in the data set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor


def check_finite(loss: Tensor, inputs: dict[str, Any], step: int, axis: str, data: Any) -> None:
    """Raises if `loss` is NaN or infinite.

    Args:
        loss: the loss of a batch.
        inputs: that batch, as TRL's collator makes it.
        step: the optimizer steps done so far.
        axis: the axis that trains.
        data: the data set or data sets the batch may come from.

    Raises:
        FloatingPointError: naming step, axis and the rows of the batch.
    """
    if bool(torch.isfinite(loss).all()):
        return
    sets = data.values() if isinstance(data, dict) else [data]
    rows = sorted({row for dataset in sets for row in find_rows(dataset, inputs)})
    where = f"rows {rows} of the data set" if rows else "rows that could not be found in the data set (it is streamed?)"
    value = float(loss.detach())
    raise FloatingPointError(
        f"The loss is {value} at step {step} of axis {axis!r}, on a batch of {where}. τ has grown too large "
        "(lower the learning rate, set `max_norm` or `max_kl`), half precision overflowed (use bf16, not fp16), or "
        "a row is degenerate, such as an empty answer."
    )


def find_rows(data: Any, inputs: dict[str, Any]) -> Iterable[int]:
    """Indices of the tokenized pairs in `data` whose chosen answer is one of the batch's, at either end truncated."""
    if not isinstance(data, Dataset) or not {"prompt_ids", "chosen_ids"} <= set(data.column_names):
        return
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    chosen = [row[real].tolist() for row, real in zip(ids, mask, strict=True)][: len(ids) // 2]
    for index, row in enumerate(data.select_columns(["prompt_ids", "chosen_ids"])):
        tokens = row["prompt_ids"] + row["chosen_ids"]
        if any(other in (tokens[: len(other)], tokens[-len(other) :]) for other in chosen if other):
            yield index
