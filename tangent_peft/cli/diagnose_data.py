"""The prompts and pairs that `tangent-peft diagnose` measures on. Loads no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from tangent_peft.cli.diagnose_subject import Subject
from tangent_peft.cli.saved_axes import is_smollm2
from tangent_peft.cli.smollm2 import Axis, quickstart_pairs
from tangent_peft.cli.sweep_data import read_pairs, read_prompts
from tangent_peft.evaluate.pairs import Pair
from tangent_peft.evaluate.scorers import Prompt


PACKAGED = "held-out ones of the quickstart, packaged"
EVERYDAY = "everyday questions, packaged; give --prompts to measure on your own"


@dataclass(frozen=True)
class Data:
    """What is measured on.

    Attributes:
        prompts: user messages, or message lists.
        pairs: preference pairs by axis; for a checkpoint by any name.
        sources: where both come from, in words.
    """

    prompts: Sequence[Prompt]
    pairs: Mapping[str, Sequence[Pair]]
    sources: Mapping[str, str]


def read_data(subject: Subject, prompts: Sequence[str], pairs: Sequence[str], limit: int) -> Data:
    """Prompts and pairs from options, or packaged ones.

    Args:
        subject: what is diagnosed.
        prompts: texts and files, as `tangent-peft sweep` takes them. Left out: those of the pairs, else the
            questions of the packaged held-out pairs.
        pairs: NAME=FILE; a name is that of an axis. Left out: the packaged held-out ones for axes called `help` and
            `verb` on the quickstart's base, else none.
        limit: of the prompts, and of the pairs of each name; the first ones are taken.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a file of another form, or pairs of an axis that is not given.
    """
    sources = {"prompts": ", ".join(prompts), "pairs": ", ".join(pairs)}
    given: dict[str, list[Pair]] = read_pairs(pairs)
    unknown = sorted(set(given) - set(subject.axes))
    if subject.axes and unknown:
        raise ValueError(f"--pairs names {unknown}; the axes given are {list(subject.axes)}.")
    asked = read_prompts(prompts)
    if not asked and given:
        asked, sources["prompts"] = (
            _prompts_of([pair for rows in given.values() for pair in rows]),
            "those of the pairs",
        )
    if not asked:
        held = [pair for axis in get_args(Axis) for pair in quickstart_pairs(axis, "heldout")]
        asked, sources["prompts"] = _prompts_of(held), PACKAGED if is_smollm2(subject.base) else EVERYDAY
    if not given and is_smollm2(subject.base):
        given = {axis: list(quickstart_pairs(axis, "heldout")) for axis in get_args(Axis) if axis in subject.axes}
        sources["pairs"] = PACKAGED
    return Data(asked[:limit], {name: rows[:limit] for name, rows in given.items()}, sources)


def _prompts_of(pairs: Sequence[Pair]) -> list[Prompt]:
    """The prompts of pairs, each once."""
    return list({json.dumps(pair["prompt"], sort_keys=True): pair["prompt"] for pair in pairs}.values())
