"""The tokenizer, or processor, that belongs to a base model, as far as it lies on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


Tokenizer: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin

_TOKENIZER = "tokenizer_config.json"
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def find_tokenizer(model: PreTrainedModel) -> Tokenizer | None:
    """What was saved beside the base model, from its folder or the local cache; nothing is downloaded."""
    name = model.name_or_path
    if not name or not _lies_here(name, _TOKENIZER):
        return None
    loader = AutoProcessor if any(_lies_here(name, file) for file in _PROCESSORS) else AutoTokenizer
    found: Tokenizer = loader.from_pretrained(name, local_files_only=True)
    return found


def _lies_here(name: str, file: str) -> bool:
    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    try:
        return isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError:  # a path that is gone
        return False
