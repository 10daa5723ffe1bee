"""From the arguments of `tangent-peft demo` to a model with its axes: which folders are axes, and which base they need.

Every mistake is named before anything heavy is loaded. Knows no page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tangent_peft.cli.demo_session import DemoSession
from tangent_peft.cli.smollm2 import load_smollm2
from tangent_peft.evaluate import SavedSweep, load_sweep
from tangent_peft.tuner.registration import NAME


CONFIG = "adapter_config.json"
SMOLLM2 = "smollm2"  # the name of the quickstart's base on the command line


def load_demo(paths: Sequence[str], base: str | None = None, sweep: Path | None = None) -> DemoSession:
    """Loads axes on their base.

    Args:
        paths: folders that `model.save_pretrained` wrote: of one axis, as `path` or `name=path`, or of several axes.
        base: folder or Hub name of the base model, or `smollm2` for the quickstart's; by default the one that the axes
            name.
        sweep: a saved sweep of these axes.

    Raises:
        FileNotFoundError: for a folder or file that is not there.
        ValueError: for a folder that holds no axis, a name that is given twice, axes of several bases, a sweep of other
            axes.
    """
    folders = find_axes(paths)
    chosen = _one_base(folders) if base is None else base
    saved = None if sweep is None else load_sweep(sweep)
    if saved is not None:
        check_sweep(saved, list(folders), str(sweep))
    model, tokenizer, shown = _load_base(chosen)
    return DemoSession(_load_axes(model, folders), tokenizer, shown, saved)


def find_axes(paths: Sequence[str]) -> dict[str, Path]:
    """The folder of each axis by its name; raises as `load_demo` does."""
    found: dict[str, Path] = {}
    for text in paths:
        name, given, path = text.partition("=")
        folder = Path(path if given else text)
        for axis, place in _axes_in(folder, name if given else None).items():
            if axis in found:
                raise ValueError(
                    f"Two axes are called {axis!r}: {found[axis]} and {place}. Name one of them yourself: "
                    f"other-name={place}"
                )
            found[axis] = place
    return found


def _axes_in(folder: Path, name: str | None) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}. Give the folder of a saved axis, or one that holds several; "
            "`tangent-peft quickstart` writes quickstart-output/axes."
        )
    if (folder / CONFIG).is_file():
        places = {name or folder.resolve().name: folder}
    else:
        places = {place.name: place for place in sorted(folder.iterdir()) if (place / CONFIG).is_file()}
        if not places:
            raise ValueError(
                f"{folder} is no saved axis: neither it nor a folder in it has an {CONFIG}. Give a folder that "
                "`model.save_pretrained` wrote."
            )
        if name is not None and len(places) > 1:
            raise ValueError(
                f"{folder} holds the axes {', '.join(places)}, which can not all be called {name!r}. Give them one by "
                "one, as name=path."
            )
        places = {name or axis: place for axis, place in places.items()}
    for place in places.values():
        kind = _config(place).get("peft_type")
        if kind != NAME:
            raise ValueError(f"{place} is an adapter of the type {kind!r}, not a tangent axis ({NAME!r}).")
    return places


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} can not be read as JSON: {error}. Save the axis again.") from None
    return config if isinstance(config, dict) else {}


def _one_base(folders: dict[str, Path]) -> str:
    named = {axis: _config(folder).get("base_model_name_or_path") for axis, folder in folders.items()}
    bases = set(named.values())
    if len(bases) > 1:
        raise ValueError(f"The axes name several base models: {named}. Say which one to load: --base FOLDER-OR-NAME")
    base = bases.pop()
    if not base:
        raise ValueError("The axes do not say which base model they belong to. Name it: --base FOLDER-OR-NAME")
    return str(base)


def check_sweep(sweep: SavedSweep, axes: Sequence[str], file: str) -> None:
    """Raises a `ValueError` if a point of the sweep mixes an axis that is not there."""
    mixed = {axis for point in sweep.points for axis, weight in point.weights.items() if weight}
    missing = sorted(mixed - set(axes))
    if missing:
        raise ValueError(
            f"The sweep {file} mixes the axes {', '.join(missing)}, but what was loaded is {', '.join(axes)}. Give the "
            "folders of those axes too, or leave the sweep out."
        )


def _load_base(base: str) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """The base model in eval mode on the machine's accelerator, its tokenizer, and the name to show."""
    quickstart = base == SMOLLM2 or Path(base).name.startswith("smollm2-135m-instruct-")
    shown = "SmolLM2-135M-Instruct" if quickstart else Path(base).name
    if quickstart and not Path(base).is_dir():  # the folder is in a cache, which may have been emptied
        smollm2, tokenizer = load_smollm2()
        return smollm2.eval(), tokenizer, shown
    if not Path(base).is_dir() and (Path(base).is_absolute() or base.count(os.sep) > 1):
        raise FileNotFoundError(
            f"There is no folder {base}, which the axes name as their base model. Say where it is now: --base FOLDER"
        )
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval(), tokenizer, shown


def _load_axes(base: Any, folders: dict[str, Path]) -> Any:
    from peft import PeftModel

    (first, folder), *rest = folders.items()
    model = PeftModel.from_pretrained(base, folder, adapter_name=first)
    for axis, place in rest:
        model.load_adapter(place, adapter_name=axis)
    return model.eval()
