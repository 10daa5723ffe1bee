"""The frozen-trunk cache: hidden states that enter the first wrapped block, kept on disk over epochs and axes.

A row is one sequence, keyed by the hash of its real tokens: no columns in the dataset, truncation covered, never a row
of other data. A directory holds one folder per trunk, named by a hash of all its weights. How rows lie on disk is known
to `trunk_store.py`, how a model is cut to `forward/trunk.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ProcessorMixin, Trainer

from tangent_peft.forward.trunk import PROBE_TOLERANCE, Autocast, Trunk
from tangent_peft.train.trunk_store import RowStore, digest
from tangent_peft.tuner.files import write_whole
from tangent_peft.tuner.targets import find_blocks


FORMAT = 1  # part of the fingerprint: caches of another format are not read
SHARD_BYTES = 256 * 2**20  # rows are collected up to this size before a file is written
BUILD_TOKENS = 8192  # padded tokens of one forward while building

# What a batch may hold beside its tokens without the hidden states depending on it.
_KEYS = {"input_ids", "attention_mask", "completion_mask", "labels", "ref_chosen_logps", "ref_rejected_logps"}
# What a model's configuration may differ in without the hidden states depending on it, up to rounding.
_VOLATILE = {
    *("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "attn_implementation", "experts_implementation"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "return_dict"),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrunkPlan:
    """What a build adds: sequences, each counted once, real tokens, bytes; `known` sequences were there already."""

    known: int
    rows: int
    tokens: int
    bytes: int


class TrunkCache:
    """Hidden states by sequence, for the trunk below the active axis of a model. Opening it computes but a probe.

    Args:
        directory: where caches lie, made if it does not exist; each trunk has its own `folder` there.
        model: a model with an active tangent axis.
        autocast: makes the context in which the model will train.
        max_bytes: refuse to make the folder larger than this; `None`: as large as the disk allows.
        add_missing: run the trunk for rows that are missing in `apply`, and keep them.
        notes: what `meta.json` says beside: names of tokenizer and data.

    Attributes:
        hits: batches whose trunk was read from the cache.
        misses: batches computed as usual.

    Raises:
        ValueError: if something below the first wrapped block trains or is random, if the model can not be cut there,
            or its weights can not be read.
    """

    def __init__(
        self,
        directory: str | Path,
        model: PeftModel,
        autocast: Autocast = nullcontext,
        max_bytes: int | None = None,
        add_missing: bool = False,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        root: Any = model.get_base_model()
        config: Any = model.peft_config[model.active_adapters[0]]
        found = find_blocks(root, config.layers_pattern)
        blocks = None if found is None else root.get_submodule(found[0])
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(f"{type(root).__name__} has no list of blocks to cut. Train without a trunk cache.")
        self.trunk, self.max_bytes, self.add_missing = Trunk(root, blocks, autocast), max_bytes, add_missing
        self.trunk.check_frozen()
        self.fingerprint = fingerprint(self.trunk)
        self.folder = Path(directory) / self.fingerprint[:16]
        self.store = RowStore(self.folder)
        self.notes = dict(notes or {})
        self.hits = self.misses = 0
        self._token_bytes = self.trunk.hidden_size * self.trunk.dtype.itemsize
        self._check_probe()

    def build(self, batches: Iterable[Mapping[str, Any]], share: tuple[int, int] = (0, 1)) -> TrunkPlan:
        """Computes and stores the rows of `batches` that are missing, after saying how large they are.

        Args:
            batches: what the model will be called with, `input_ids` and `attention_mask` (B, T).
            share: index and number of the processes that build together, each given all batches; after a barrier,
                `store.refresh` makes the others' rows visible.

        Raises:
            ValueError: if no batch can use the cache, or the rows do not fit on the disk or below `max_bytes`.
        """
        missing, known = self._missing(batches)
        tokens = sum(len(ids) for ids in missing.values())
        plan = TrunkPlan(known, len(missing), tokens, tokens * self._token_bytes)
        if not missing:
            return plan
        size = f"{plan.tokens} tokens × {self.trunk.hidden_size} × {self.trunk.dtype.itemsize} bytes"
        log.warning("Trunk cache: %d sequences, %s = %.3f GB, in %s", plan.rows, size, plan.bytes / 1e9, self.folder)
        self._check_room(plan.bytes)
        order = sorted(missing, key=lambda key: (len(missing[key]), key))[share[0] :: share[1]]
        try:
            while order:  # longest first: running out of memory shows early
                count = max(1, BUILD_TOKENS // len(missing[order[-1]]))
                self._compute({key: missing[key] for key in order[-count:]})
                del order[-count:]
        finally:
            self.flush()
        return plan

    def _missing(self, batches: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Tensor], int]:
        """Tokens by key of the rows that are not stored, small beside their states, and how many rows are stored."""
        found: dict[str, Tensor] = {}
        refused: set[str] = set()
        for batch in batches:
            rows = _rows(batch)
            refused |= set() if rows is not None else set(batch)
            found.update((key, ids.int()) for key, ids in rows or ())
        if refused and not found:
            raise ValueError(
                f"No batch can use the trunk cache: it needs right-padded rows of tokens and nothing else that hidden "
                f"states depend on, found batches of {sorted(refused)}. Train without a trunk cache on this data."
            )
        missing = {key: ids for key, ids in found.items() if key not in self.store}
        return missing, len(found) - len(missing)

    def _check_room(self, size: int) -> None:
        free, grown = shutil.disk_usage(self.folder).free, self.store.tokens * self._token_bytes + size
        limited = self.max_bytes is not None and grown > self.max_bytes
        if size > free or limited:
            limit = (
                f"grow to {grown} bytes, max_bytes={self.max_bytes}" if limited else f"add {size} bytes, {free} free"
            )
            raise ValueError(
                f"The trunk cache in {self.folder} would {limit}. Give it more room or another directory, shorten the "
                "sequences (`max_length`), or train without it."
            )

    def _compute(self, rows: Mapping[str, Tensor]) -> None:
        """Runs the trunk on rows of tokens and keeps their hidden states, on disk once there are enough."""
        ids = nn.utils.rnn.pad_sequence(list(rows.values()), batch_first=True).long()
        lengths = torch.tensor([len(row) for row in rows.values()])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        device, pending = self.trunk.device, self.store.pending
        hidden_BTD = self.trunk.hidden_states(ids.to(device), mask.to(device)).cpu()
        for key, length, hidden in zip(rows, lengths.tolist(), hidden_BTD, strict=True):
            pending[key] = hidden[:length].clone()
        if sum(row.nbytes for row in pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is not on disk yet."""
        if self.store.pending:
            self.store.flush()
            write_whole(self.folder / "meta.json", lambda path: path.write_text(json.dumps(self._meta(), indent=1)))

    def lookup(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """The stored hidden states (B, T, D) of a batch, on its device, zero at padding; `None` if a row is missing.

        Args:
            input_ids: tokens (B, T).
            attention_mask: ones at real tokens (B, T); `None` is the answer unless these come first in each row.
        """
        rows = _rows({"input_ids": input_ids, "attention_mask": attention_mask})
        if rows is None or not all(key in self.store for key, _ in rows):
            return None
        shape = (*input_ids.shape, self.trunk.hidden_size)
        hidden_BTD = torch.zeros(shape, dtype=self.trunk.dtype, pin_memory=input_ids.is_cuda)
        for hidden, (key, ids) in zip(hidden_BTD, rows, strict=True):
            hidden[: len(ids)] = self.store.read(key)
        return hidden_BTD.to(input_ids.device, non_blocking=True)

    @contextmanager
    def apply(self, inputs: Mapping[str, Any]) -> Iterator[bool]:
        """Lets forwards of the model on this batch start at the first wrapped block, if the cache has all its rows.

        Otherwise they run as usual: for rows that are missing (unless `add_missing`), left padding, positions or
        images given, an axis that became active below, a model cast to another dtype. Yields whether they skip.

        Args:
            inputs: the batch the model will be called with, (B, T) each.

        Raises:
            ValueError: if the trunk trains by now.
        """
        hidden_BTD = self._hidden(inputs)
        if hidden_BTD is None:
            self.misses += 1
            yield False
            return
        self.hits += 1
        with self.trunk.skipped(hidden_BTD):
            yield True

    def _hidden(self, inputs: Mapping[str, Any]) -> Tensor | None:
        self.trunk.check_frozen()
        rows = _rows(inputs)
        if rows is None or self.trunk.is_recast() or self.trunk.carries():
            return None
        missing = {key: ids for key, ids in rows if key not in self.store}
        if missing and self.add_missing:
            self._check_room(sum(len(ids) for ids in missing.values()) * self._token_bytes)
            self._compute(missing)
        return self.lookup(inputs["input_ids"], inputs.get("attention_mask"))

    def _check_probe(self) -> None:
        """Compares the trunk to the one that filled the folder, on a fixed row of tokens."""
        path = self.folder / "probe.safetensors"
        found = self.trunk.probe.contiguous()
        if not path.exists():
            write_whole(path, lambda unfinished: save_file({"probe": found}, unfinished))
        with safe_open(path, framework="pt") as file:
            stored = file.get_tensor("probe").double()
        error = float((stored - found.double()).norm() / stored.norm())
        if error > PROBE_TOLERANCE[found.dtype]:
            raise ValueError(
                f"The trunk cache in {self.folder} was made from the same weights, but its hidden states differ by "
                f"{error:.1%} from those computed now; another version of transformers may compute something else. "
                "Delete that folder, and it is made anew."
            )

    def _meta(self) -> dict[str, Any]:
        path, trunk, now = self.folder / "meta.json", self.trunk, datetime.now(UTC).isoformat(timespec="seconds")
        before = json.loads(path.read_text()) if path.exists() else {"created": now, "notes": []}
        return {
            "what": "hidden states that enter the first wrapped block, by tangent-peft; safe to delete",
            "model": trunk.root.name_or_path or type(trunk.root).__name__,
            "first_wrapped_block": trunk.first,
            "hidden_size": trunk.hidden_size,
            "dtype": f"{trunk.dtype}, autocast {trunk.autocast_dtype}",
            "fingerprint": self.fingerprint,
            "rows": len(self.store.keys),
            "tokens": self.store.tokens,
            "bytes": self.store.tokens * self._token_bytes,
            "versions": {"format": FORMAT, "transformers": transformers.__version__},
            "created": before["created"],
            "updated": now,
            "notes": [note for note in before["notes"] if note != self.notes] + [self.notes],
        }


def fingerprint(trunk: Trunk) -> str:
    """SHA-256 of every weight below the entry in full, the configuration, the entry's index, dtype and autocast.

    The attention implementation is not among them: its choices are equal up to rounding.

    Raises:
        ValueError: if a weight can not be read in this process.
    """
    sha = hashlib.sha256()
    config = json.loads(trunk.root.config.to_json_string(use_diff=False), object_hook=_stable)
    known = [FORMAT, config, trunk.first, str(trunk.dtype), str(trunk.autocast_dtype)]
    sha.update(json.dumps(known, sort_keys=True).encode())
    # Wrapped or not by an axis that is inactive, a weight is the same.
    tensors = {name.replace(".base_layer", ""): t for name, t in trunk.tensors() if ".tangent_" not in name}
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return sha.hexdigest()


def _stable(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _VOLATILE and not key.startswith("_")}


def _rows(batch: Mapping[str, Any]) -> list[tuple[str, Tensor]] | None:
    """Key and real tokens (T,) of each row; `None` if hidden states depend on more than these, or on where they are."""
    given = {key for key, value in batch.items() if value is not None}
    if "input_ids" not in given or not given <= _KEYS:
        return None
    ids = batch["input_ids"].cpu()
    mask = torch.ones_like(ids) if batch.get("attention_mask") is None else batch["attention_mask"].cpu()
    lengths = mask.ne(0).sum(dim=-1)
    if ids.ndim != 2 or mask.shape != ids.shape or not lengths.all():
        return None
    if not torch.equal(mask.ne(0), torch.arange(ids.shape[1]) < lengths[:, None]):
        return None  # padded on the left, or with holes
    rows = [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)]
    return [(digest(row.long().contiguous().numpy().tobytes()), row) for row in rows]


def _collated(dataset: Dataset, trainer: Trainer) -> Iterator[Mapping[str, Any]]:
    """Batches in the data's order; unlike a DataLoader this draws no random number, so training shuffles as without."""
    size = trainer.args.per_device_train_batch_size
    for start in range(0, len(dataset), size):
        yield trainer.data_collator([dataset[i] for i in range(start, min(start + size, len(dataset)))])


def open_for_training(directory: str | Path, trainer: Trainer) -> TrunkCache:
    """Opens the cache of a trainer's model and builds what its training data lacks; call before the first step.

    Each process builds its share, and then what it does not see: another machine's rows, without a common disk.

    Raises:
        ValueError: as `TrunkCache` and `TrunkCache.build`, and for a data set without a length.
    """
    dataset, accelerator = trainer.train_dataset, trainer.accelerator
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The trunk cache is built before training, and a {type(dataset).__name__} can not be read twice. Use a "
            "`datasets.Dataset`, or train without a trunk cache."
        )
    model: Any = accelerator.unwrap_model(trainer.model)
    given: Any = trainer.processing_class
    tokenizer = given.tokenizer if isinstance(given, ProcessorMixin) else given
    notes = {"data": dataset._fingerprint, "tokenizer": "" if tokenizer is None else tokenizer.name_or_path}
    cache = TrunkCache(directory, model, autocast=accelerator.autocast, notes=notes)
    cache.build(_collated(dataset, trainer), share=(accelerator.process_index, accelerator.num_processes))
    accelerator.wait_for_everyone()
    cache.store.refresh()
    if accelerator.num_processes > 1:
        cache.build(_collated(dataset, trainer))
    return cache
