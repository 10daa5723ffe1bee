"""What is scored: each method's models of one seed under every mix of the comparison, one file of log-probs for each.

TS-DPO is scored twice, linearized (f_lin, what was trained) and merged (the ordinary network at θ(λ)). Weights are not
rounded to the base's dtype: W x and Σ λᵢ ΔWᵢ x are added up, since a sum in bfloat16 would swallow most of a small ΔW.
Task-Vector DPO and the LoRA soup run as weights; DPO-Mixed at the shares it was trained for; MOD by the logits of the
models of Task-Vector DPO. Knows no scores and no figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tangent_peft.compare.checks import SOUP
from tangent_peft.compare.scoring import HeldOut, Mix, PairScorer, held_out
from tangent_peft.compare.settings import Settings, mixed_name
from tangent_peft.compare.training import load_model, single_name
from tangent_peft.evaluate import axis_logprobs
from tangent_peft.evaluate.logit_mix import mixed_pair_logps
from tangent_peft.evaluate.pairs import pair_batch
from tangent_peft.tuner.files import write_whole
from tangent_peft.tuner.linearity import linearity_gap


SOURCES = ("ts_dpo linearized", "ts_dpo merged", "task_vectors", "dpo_mixed", "lora_soup", "mod")
GAP_PAIRS = 1  # pairs of each axis on whose tokens the linearity gap is measured


@dataclass(frozen=True)
class Scored:
    """What `score` writes.

    Attributes:
        mixes: the M mixes.
        logps: log π (M, N, 2) of the distinct held-out pairs, in nats.
        reference: log π₀ (N, 2), computed alike.
        lengths: tokens (N, 2) of the answers.
        notes: what else was measured: `gap` by mix where merged weights are scored too, `cosine` of the axes; and
            `adapters`, a digest of what was scored.
    """

    mixes: list[dict[str, float]]
    logps: Tensor
    reference: Tensor
    lengths: Tensor
    notes: dict[str, Any]


def sources(settings: Settings) -> list[str]:
    """Those that the methods of a comparison give."""
    chosen = {f"ts_dpo {evaluation}" for evaluation in settings.evaluations} if "ts_dpo" in settings.methods else set()
    return [source for source in SOURCES if source in chosen or source in settings.methods]


def score_file(settings: Settings, seed: int, source: str) -> Path:
    """Where the log-probs of a source lie."""
    return Path(settings.output) / f"seed-{seed}" / f"scores-{source.replace(' ', '-')}.safetensors"


@dataclass(frozen=True)
class Adapters:
    """Adapters of a seed's trainings, and the mixes of them that are scored.

    Attributes:
        settings: of the comparison.
        seed: of the trainings.
        names: by the name an adapter gets, the folder of its training.
        mixes: λ by those names.
    """

    settings: Settings
    seed: int
    names: dict[str, str]
    mixes: list[dict[str, float]]

    def load(self) -> tuple[Any, Any]:
        """The base with the adapters, in eval mode, and the tokenizer."""
        model, tokenizer = load_model(self.settings)
        loaded: Any = None
        for adapter, name in self.names.items():
            place = str(self._folder(name))
            if loaded is None:
                loaded = PeftModel.from_pretrained(model, place, adapter_name=adapter)
            else:
                loaded.load_adapter(place, adapter_name=adapter)
        return loaded.eval(), tokenizer

    def digest(self) -> str:
        """What tells apart the adapters.

        Raises:
            FileNotFoundError: if one is missing.
        """
        digest = hashlib.sha256()
        for name in self.names.values():
            files = sorted(self._folder(name).rglob("adapter_model.safetensors"))
            if not files:
                raise FileNotFoundError(
                    f"{self._folder(name)} holds no adapter. Delete it, and run the comparison again."
                )
            for file in files:
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:16]

    def _folder(self, name: str) -> Path:
        return Path(self.settings.output) / f"seed-{self.seed}" / name


def score(settings: Settings, seed: int, source: str) -> Scored:
    """Scores a source, or reads what is there and is of these adapters; the file appears when it is complete.

    Raises:
        FileNotFoundError: if an adapter is missing.
        ValueError: if a file is damaged, or log-probs are not finite.
    """
    labels = None
    if source == "dpo_mixed":
        names = {f"mixed-{n}": mixed_name(shares) for n, shares in enumerate(settings.shares())}
        mixes, labels = [{name: 1.0} for name in names], settings.shares()
    else:
        method = {"mod": "task_vectors"}.get(source, source.split()[0])
        names, mixes = {axis: single_name(method, axis) for axis in settings.axes}, settings.mixes()
    return score_adapters(Adapters(settings, seed, names, mixes), source, score_file(settings, seed, source), labels)


def score_adapters(adapters: Adapters, source: str, path: Path, labels: list[dict[str, float]] | None = None) -> Scored:
    """Scores adapters in the way of a source, or reads what is there; see `score`.

    Args:
        adapters: which ones, in which mixes.
        source: one of `SOURCES`.
        path: the file of the scores.
        labels: what the mixes are called in it, where they are not called by their λ.
    """
    digest = adapters.digest()
    if path.is_file() and (held := _read(path)).notes.get("adapters") == digest:
        return held
    data = held_out(adapters.settings)
    if source == "ts_dpo linearized":
        found = _linearized(adapters, data)
    elif source == "mod":
        found = _logit_mixes(adapters, data)
    elif source == "lora_soup":
        found = _lora_soup(adapters, data)
    else:
        found = _weights(adapters, data, cosine=source == "task_vectors")
    found.notes["adapters"] = digest
    if labels is not None:
        found = replace(found, mixes=labels)
    _write(path, found)
    return found


# ---- the axes of TS-DPO, and ordinary task vectors -------------------------------------------------------------------


def _linearized(adapters: Adapters, data: HeldOut) -> Scored:
    model, tokenizer = adapters.load()
    mixes, names, settings = adapters.mixes, list(adapters.names), adapters.settings
    size = settings.scoring_batch
    order = sorted(range(len(data.pairs)), key=lambda i: len(json.dumps(data.pairs[i])))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [pair_batch(tokenizer, [data.pairs[i] for i in part]) for part in parts]
    scores = axis_logprobs(model, batches, names)
    rows = [*scores.logps(mixes), scores.reference(), scores.lengths.double()]  # each (2N,), by batches
    found = torch.zeros(len(rows), len(data.pairs), 2, dtype=torch.float64)
    for part, block in zip(parts, torch.stack(rows).cpu().split([2 * len(part) for part in parts], 1), strict=True):
        found[:, part] = torch.stack(block.chunk(2, 1), 2)
    notes: dict[str, Any] = {"cosine": model.axis_gram(names, cosine=True).tolist()}
    if "merged" in settings.evaluations:
        notes["gap"] = _gaps(model, tokenizer, data, mixes)
    return Scored(mixes, found[:-2], found[-2], found[-1].long(), notes)


def _gaps(model: Any, tokenizer: Any, data: HeldOut, mixes: Sequence[Mix]) -> list[float]:
    """The linearity gap of each mix on a few pairs of each axis; the model is in float32 from then on.

    In bfloat16 the rounding of two different computations alone makes it 0.4 and more where a mix does little.
    """
    chosen = dict.fromkeys(position for found in data.index.values() for position in found[:GAP_PAIRS])
    model.float()
    batch = pair_batch(tokenizer, [data.pairs[position] for position in chosen])
    batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    gaps = []
    for mix in mixes:
        with model.axes(mix):
            gaps.append(linearity_gap(model, [batch]).gap)
    return gaps


def _weights(adapters: Adapters, data: HeldOut, cosine: bool) -> Scored:
    """As weights: mixes of the axes, or the models of DPO-Mixed each at λ = 1."""
    model, tokenizer = adapters.load()
    with model.axes(dict.fromkeys(adapters.names, 1.0)):
        scorer = PairScorer(model, tokenizer, data.pairs, adapters.settings.scoring_batch)
    found = []
    for mix in [{}, *adapters.mixes]:
        with model.axes(mix), model.linearized(False):
            found.append(scorer.logps())
    notes = {"cosine": model.axis_gram(list(adapters.names), cosine=True).tolist()} if cosine else {}
    return Scored(adapters.mixes, torch.stack(found[1:]), found[0], scorer.lengths(), notes)


# ---- the baselines with models of their own --------------------------------------------------------------------------


def _lora_soup(adapters: Adapters, data: HeldOut) -> Scored:
    """PEFT's own combination of stock LoRAs, `cat`, which is exact in ΔW."""
    model, tokenizer = adapters.load()
    scorer = PairScorer(model, tokenizer, data.pairs, adapters.settings.scoring_batch)
    found = []
    with model.disable_adapter():
        reference = scorer.logps()
    for mix in adapters.mixes:
        with _soup(model, mix):
            found.append(scorer.logps())
    return Scored(adapters.mixes, torch.stack(found), reference, scorer.lengths(), {})


@contextmanager
def _soup(model: Any, mix: Mix) -> Iterator[None]:
    if not mix:
        with model.disable_adapter():
            yield
        return
    model.add_weighted_adapter(list(mix), list(mix.values()), SOUP, combination_type="cat")
    model.set_adapter(SOUP)
    try:
        yield
    finally:
        model.set_adapter(next(iter(mix)))
        model.delete_adapter(SOUP)


def _logit_mixes(adapters: Adapters, data: HeldOut) -> Scored:
    model, tokenizer = adapters.load()
    mixes, size = adapters.mixes, adapters.settings.scoring_batch
    logps, lengths = mixed_pair_logps(model, tokenizer, data.pairs, [{}, *mixes], size)
    return Scored(mixes, logps[1:], logps[0], lengths, {})


# ---- files -----------------------------------------------------------------------------------------------------------


def _write(path: Path, scored: Scored) -> None:
    """Writes the file whole or not at all."""
    tensors = {name: vars(scored)[name].contiguous() for name in ("logps", "reference", "lengths")}
    if not scored.logps.isfinite().all():
        bad = int((~scored.logps.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"{path.stem}: log-probs at {scored.mixes[bad]} are not finite. Look for values in its models that are not."
        )
    notes = {"mixes": json.dumps(scored.mixes), "notes": json.dumps(scored.notes)}
    write_whole(path, lambda unfinished: save_file(tensors, unfinished, notes))


def _read(path: Path) -> Scored:
    try:
        with safe_open(path, "pt") as file:
            held = file.metadata()
            tensors = {name: file.get_tensor(name) for name in ("logps", "reference", "lengths")}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it, and run the comparison again.") from None
    return Scored(json.loads(held["mixes"]), **tensors, notes=json.loads(held["notes"]))
