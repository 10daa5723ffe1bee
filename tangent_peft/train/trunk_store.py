"""Rows of hidden states in safetensors files: written once, renamed into place, mapped into memory.

Each file is its own index, so several processes may read and write at once, and what an interrupted one has finished
counts. This file knows neither models nor tokens.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tangent_peft.tuner.files import write_whole


log = logging.getLogger(__name__)


class RowStore:
    """Rows (T, D) by key in the files of one folder; `pending` ones are not written yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = 0
        self.pending: dict[str, Tensor] = {}
        self._files: dict[str, Any] = {}  # name -> mapped file; `None` for a damaged one
        self.keys: dict[str, str] = {}  # key -> name of its file
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self.keys or key in self.pending

    def refresh(self) -> None:
        """Finds the files that other processes wrote; one that is cut off is left alone and named in a warning."""
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            if path.name in self._files:
                continue
            try:
                self._files[path.name] = file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                self._files[path.name] = None
                log.warning("Trunk cache: %s is damaged (%s) and not used; its rows are computed again.", path, error)
                continue
            self.keys.update(dict.fromkeys(file.keys(), path.name))
            self.tokens += int(file.metadata()["tokens"])

    def read(self, key: str) -> Tensor:
        """The row (T, D): mapped from its file, of which only its pages are read."""
        return self.pending[key] if key in self.pending else self._files[self.keys[key]].get_tensor(key)

    def flush(self) -> None:
        """Writes the pending rows as one file, completely or not at all."""
        if not self.pending:
            return
        name = f"rows-{digest(''.join(sorted(self.pending)).encode())}.safetensors"
        tokens = sum(len(row) for row in self.pending.values())
        write_whole(self.folder / name, lambda path: save_file(self.pending, path, {"tokens": str(tokens)}))
        self._files.pop(name, None)  # a damaged one of the same rows has been replaced
        self.pending = {}
        self.refresh()


def digest(data: bytes) -> str:
    """A short hash that tells rows apart."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
