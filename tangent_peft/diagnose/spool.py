"""Rows on disk instead of in memory: appended batch by batch, read back in chunks or as one mapped array."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import TracebackType

import numpy as np
import torch
from torch import Tensor


CHUNK_ROWS = 256


class Spool:
    """A temporary file of rows in float32, for a `with` block; gone afterwards.

    Args:
        shape: of one row.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.count = 0
        self._file = tempfile.TemporaryFile(prefix="tangent-peft-")  # noqa: SIM115 (closed by `__exit__`)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def append(self, rows: Tensor) -> None:
        """Writes some rows (n, *shape).

        Raises:
            ValueError: if they have another shape.
        """
        if tuple(rows.shape[1:]) != self.shape:
            raise ValueError(f"Rows of shape {tuple(rows.shape[1:])} do not go with those of shape {self.shape}.")
        self._file.write(rows.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        self.count += len(rows)

    def array(self) -> np.ndarray:
        """All rows (N, *shape) as an array that lies in the file; what is not read takes no memory."""
        self._file.flush()
        if not self.count:
            return np.empty((0, *self.shape), dtype=np.float32)
        return np.memmap(self._file, dtype=np.float32, mode="r", shape=(self.count, *self.shape))

    def chunks(self, rows: int = CHUNK_ROWS) -> Iterator[Tensor]:
        """The rows in their order, some at a time (n, *shape)."""
        held = self.array()
        for start in range(0, self.count, rows):
            yield torch.from_numpy(np.array(held[start : start + rows]))
