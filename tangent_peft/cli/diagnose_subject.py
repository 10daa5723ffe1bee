"""What `tangent-peft diagnose` looks at: axes of one base, or a checkpoint beside the model it was trained from.

Finding it reads configs and tokenizers only, so that a mistake is named before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tangent_peft.cli.saved_axes import (
    CONFIG,
    axis_config,
    find_axes,
    is_smollm2,
    load_axes,
    load_base,
    one_base,
    text_tokenizer,
)
from tangent_peft.diagnose.states import ModelState, check_comparable, check_same_tokenizer
from tangent_peft.tuner.export.card import is_repository
from tangent_peft.tuner.registration import NAME


LORA = "LORA"
TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Subject:
    """What is to be diagnosed, not yet loaded.

    Attributes:
        base: folder or Hub name of the base model, or `smollm2`.
        axes: folder or repository of each tangent axis, by its name; empty for a checkpoint.
        tuned: folder or repository of a checkpoint, or of a LoRA; empty for axes.
        is_lora: whether `tuned` is an adapter of the base.
    """

    base: str
    axes: Mapping[str, Path]
    tuned: str = ""
    is_lora: bool = False

    @property
    def tuned_name(self) -> str:
        """What reports call the checkpoint."""
        folder = Path(self.tuned)
        return (folder.resolve() if folder.is_dir() else folder).name  # `.` has no name of its own


@dataclass(frozen=True)
class Loaded:
    """What is to be diagnosed, in memory.

    Attributes:
        base: the model without axes.
        tuned: by name, each axis at λ = 1, or the checkpoint.
        tokenizer: of all of them.
        notes: what a reader of the report has to know.
    """

    base: ModelState
    tuned: Mapping[str, ModelState]
    tokenizer: PreTrainedTokenizerBase
    notes: Mapping[str, str]


# ---- finding ---------------------------------------------------------------------------------------------------------


def find_subject(paths: Sequence[str], base: str | None) -> Subject:
    """Which axes, or which checkpoint, the arguments name.

    Args:
        paths: folders of saved axes as `find_axes` takes them; or one folder, or name of the Hub, of a whole model or
            of a LoRA.
        base: folder or Hub name of the base model, or `smollm2`; `None`: the one that the axes or the LoRA name.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: for axes and checkpoints together, several checkpoints, an adapter of another kind, a base that is
            not named, or one of another architecture or with another tokenizer.
    """
    others = [path for path in paths if not _is_axes(path)]
    if not others:
        axes = find_axes(paths)
        return Subject(base or one_base(axes), axes)
    if len(paths) > 1:
        raise ValueError(
            f"{others[0]} is a checkpoint, not a tangent axis. Give tangent axes alone, or one checkpoint with the "
            f"model that it was trained from: --base BASE {others[0]}"
        )
    tuned = others[0]
    adapter = _adapter(tuned)
    if adapter is None:
        if base is None:
            raise ValueError(
                f"{tuned} is a whole model; name the model that it was trained from as well: --base BASE {tuned}"
            )
        _check_models(base, tuned)
        return Subject(base, {}, tuned)
    kind, named = adapter.get("peft_type"), adapter.get("base_model_name_or_path")
    if kind != LORA:
        raise ValueError(f"{tuned} is an adapter of the type {kind!r}; checkpoints are whole models or plain LoRAs.")
    if not (base or named):
        raise ValueError(f"{tuned} does not say which base model it belongs to. Name it: --base FOLDER-OR-NAME")
    return Subject(base or str(named), {}, tuned, is_lora=True)


def _is_axes(path: str) -> bool:
    """Whether `find_axes` is to read this, or to say what is wrong with it."""
    folder = Path(path if Path(path).exists() or "=" not in path else path.partition("=")[2])
    if not folder.is_dir():
        if not is_repository(folder.as_posix()):
            return True
        adapter = _adapter(folder.as_posix())
        return adapter is not None and adapter.get("peft_type") == NAME
    if (folder / CONFIG).is_file():
        return "=" in path or axis_config(folder).get("peft_type") == NAME
    return not (folder / "config.json").is_file()


def _adapter(place: str) -> dict[str, Any] | None:
    """The config of an adapter; `None` for a whole model."""
    folder = Path(place)
    if folder.is_dir() and not (folder / CONFIG).is_file():
        return None
    try:
        return axis_config(folder)
    except ValueError:
        if folder.is_dir():
            raise
        return None  # a repository without an adapter_config.json


def _check_models(base: str, tuned: str) -> None:
    """Refuses two models that can not be compared, from their configs and tokenizers alone."""
    for name in (base, tuned):
        if not Path(name).is_dir() and not is_repository(name) and not is_smollm2(name):
            raise FileNotFoundError(f"There is no folder {name}, and it is no name of the Hub either.")
    if is_smollm2(base) and not Path(base).is_dir():
        return  # nothing lies in its place before it is unpacked; `load` compares
    first, second = _described(base), _described(tuned)
    differing = [f"{key} {first[key]} and {second[key]}" for key in first if first[key] != second[key]]
    if differing:
        raise ValueError(
            f"{base} and {tuned} are models of different architecture: {'; '.join(differing)}. Compare a model with "
            "one that was trained from it."
        )
    if _has_tokenizer(tuned):
        check_same_tokenizer(AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(tuned))


def _described(name: str) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(name)
    text = config.get_text_config()
    return {
        "class": (config.architectures or [config.model_type])[0],
        "hidden size": text.hidden_size,
        "number of blocks": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
    }


def _has_tokenizer(name: str) -> bool:
    return not Path(name).is_dir() or (Path(name) / TOKENIZER).is_file()


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_subject(subject: Subject, dtype: str | None = None) -> Loaded:
    """Loads base, axes or checkpoint, and the tokenizer, on the machine's accelerator.

    Args:
        subject: from `find_subject`.
        dtype: of the weights, by name; `None`: float32 on a CPU, elsewhere that of the files.

    Raises:
        OSError: if something can not be read.
        ValueError: for a base without a tokenizer, models that can not be compared, or a LoRA of another base.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    base: Any = load_base(subject.base, dtype=dtype).to(device)  # type: ignore[arg-type]
    tokenizer = text_tokenizer(base, subject.base)
    notes = {"dtype": str(base.dtype).removeprefix("torch."), "device": device}
    if subject.axes:
        model = load_axes(base, subject.axes)
        configs: Any = model.peft_config
        tuned = {axis: ModelState.mix(model, {axis: 1.0}, configs[axis].linearize, axis) for axis in subject.axes}
        return Loaded(ModelState.base(model), tuned, tokenizer, notes)
    if subject.is_lora:
        adapted = _adapted(base, subject)
        if Path(subject.tuned).is_dir() and _has_tokenizer(subject.tuned):
            check_same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(subject.tuned))
        tuned = {subject.tuned_name: ModelState.plain(adapted, subject.tuned_name)}
        return Loaded(ModelState.base(adapted), tuned, tokenizer, notes)
    other: Any = load_base(subject.tuned, dtype=dtype).to(device)  # type: ignore[arg-type]
    first, second = ModelState.plain(base, "base"), ModelState.plain(other, subject.tuned_name)
    check_comparable(first, second)
    if _has_tokenizer(subject.tuned):
        check_same_tokenizer(tokenizer, text_tokenizer(other, subject.tuned))
    else:
        notes["tokenizer"] = "that of the base; none lies beside the checkpoint"
    return Loaded(first, {second.name: second}, tokenizer, notes)


def _adapted(base: PreTrainedModel, subject: Subject) -> PeftModel:
    """The base with a LoRA. PEFT passes over matrices of blocks that the base does not have, which are refused here."""
    try:
        adapted = PeftModel.from_pretrained(base, subject.tuned).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"The LoRA {subject.tuned} does not fit the base model {subject.base}: {error}") from None
    saved, there = load_peft_weights(subject.tuned, device="cpu"), get_peft_model_state_dict(adapted)
    differing = sorted(key for key in set(saved) ^ set(there) if "lora_" in key)
    if differing:
        raise ValueError(
            f"The LoRA {subject.tuned} does not fit the base model {subject.base}: {len(differing)} matrices are only "
            f"in one of them, such as {differing[0]}. Name the model that it was trained from: --base FOLDER-OR-NAME"
        )
    return adapted
