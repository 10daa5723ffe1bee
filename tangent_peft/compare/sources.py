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
from dataclasses import dataclass
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


def score(settings: Settings, seed: int, source: str) -> Scored:
    """Scores a source, or reads what is there and is of these adapters; the file appears when it is complete.

    Raises:
        FileNotFoundError: if an adapter is missing.
        ValueError: if a file is damaged, or log-probs are not finite.
    """
    path, digest = score_file(settings, seed, source), _digest(settings, seed, source)
    if path.is_file() and (held := _read(path)).notes.get("adapters") == digest:
        return held
    data = held_out(settings)
    if source == "ts_dpo linearized":
        found = _linearized(settings, seed, data)
    elif source == "mod":
        found = _logit_mixes(settings, seed, data)
    elif source == "lora_soup":
        found = _lora_soup(settings, seed, data)
    else:
        found = _weights(settings, seed, source, data)
    found.notes["adapters"] = digest
    _write(path, found)
    return found


def _digest(settings: Settings, seed: int, source: str) -> str:
    """What tells apart the adapters that a source scores."""
    if source == "dpo_mixed":
        names = [mixed_name(shares) for shares in settings.shares()]
    else:
        method = {"mod": "task_vectors"}.get(source, source.split()[0])
        names = list(_singles(settings, method).values())
    digest = hashlib.sha256()
    for name in names:
        files = sorted((Path(settings.output) / f"seed-{seed}" / name).rglob("adapter_model.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{settings.output}/seed-{seed}/{name} holds no adapter. Delete it, and run the comparison again."
            )
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


# ---- the axes of TS-DPO, and ordinary task vectors -------------------------------------------------------------------


def _with_axes(settings: Settings, seed: int, names: dict[str, str]) -> tuple[Any, Any]:
    """The base with the adapters of some trainings, by the name they get."""
    model, tokenizer = load_model(settings)
    folder = Path(settings.output) / f"seed-{seed}"
    loaded: Any = None
    for axis, name in names.items():
        place = str(folder / name)
        if loaded is None:
            loaded = PeftModel.from_pretrained(model, place, adapter_name=axis)
        else:
            loaded.load_adapter(place, adapter_name=axis)
    return loaded.eval(), tokenizer


def _singles(settings: Settings, method: str) -> dict[str, str]:
    return {axis: single_name(method, axis) for axis in settings.axes}


def _linearized(settings: Settings, seed: int, data: HeldOut) -> Scored:
    model, tokenizer = _with_axes(settings, seed, _singles(settings, "ts_dpo"))
    mixes = settings.mixes()
    size = settings.scoring_batch
    order = sorted(range(len(data.pairs)), key=lambda i: len(json.dumps(data.pairs[i])))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [pair_batch(tokenizer, [data.pairs[i] for i in part]) for part in parts]
    scores = axis_logprobs(model, batches, list(settings.axes))
    rows = [*scores.logps(mixes), scores.reference(), scores.lengths.double()]  # each (2N,), by batches
    found = torch.zeros(len(rows), len(data.pairs), 2, dtype=torch.float64)
    for part, block in zip(parts, torch.stack(rows).cpu().split([2 * len(part) for part in parts], 1), strict=True):
        found[:, part] = torch.stack(block.chunk(2, 1), 2)
    notes: dict[str, Any] = {"cosine": model.axis_gram(list(settings.axes), cosine=True).tolist()}
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


def _weights(settings: Settings, seed: int, source: str, data: HeldOut) -> Scored:
    """As weights: mixes of the axes, or the models of DPO-Mixed each at λ = 1."""
    if source == "dpo_mixed":
        names = {f"mixed-{n}": mixed_name(shares) for n, shares in enumerate(settings.shares())}
        mixes, labels = [{name: 1.0} for name in names], settings.shares()
    else:
        names = _singles(settings, "ts_dpo" if source == "ts_dpo merged" else source)
        mixes = labels = settings.mixes()
    model, tokenizer = _with_axes(settings, seed, names)
    with model.axes(dict.fromkeys(names, 1.0)):
        scorer = PairScorer(model, tokenizer, data.pairs, settings.scoring_batch)
    found = []
    for mix in [{}, *mixes]:
        with model.axes(mix), model.linearized(False):
            found.append(scorer.logps())
    notes = {}
    if source == "task_vectors":
        notes["cosine"] = model.axis_gram(list(settings.axes), cosine=True).tolist()
    return Scored(labels, torch.stack(found[1:]), found[0], scorer.lengths(), notes)


# ---- the baselines with models of their own --------------------------------------------------------------------------


def _lora_soup(settings: Settings, seed: int, data: HeldOut) -> Scored:
    """PEFT's own combination of stock LoRAs, `cat`, which is exact in ΔW."""
    model, tokenizer = _with_axes(settings, seed, _singles(settings, "lora_soup"))
    scorer = PairScorer(model, tokenizer, data.pairs, settings.scoring_batch)
    found = []
    mixes = settings.mixes()
    with model.disable_adapter():
        reference = scorer.logps()
    for mix in mixes:
        with _soup(model, mix):
            found.append(scorer.logps())
    return Scored(mixes, torch.stack(found), reference, scorer.lengths(), {})


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


def _logit_mixes(settings: Settings, seed: int, data: HeldOut) -> Scored:
    model, tokenizer = _with_axes(settings, seed, _singles(settings, "task_vectors"))
    mixes = settings.mixes()
    logps, lengths = mixed_pair_logps(model, tokenizer, data.pairs, [{}, *mixes], settings.scoring_batch)
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
