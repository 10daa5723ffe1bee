"""Writes docs/models.md: what was measured for every row of the table of families, and what is refused.

python tests/models_page.py
"""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from families import FAMILIES, Family
from family_checks import Measured, cached_error, measure

from tangent_peft.forward.support import HUB_KERNELS, LIGER, REFUSED, REFUSED_IF, Refusal


PAGE = Path(__file__).parents[1] / "docs" / "models.md"
COMMAND = "python tests/models_page.py"
COLUMNS = [
    "family",
    "class",
    "attention",
    "experts",
    "logits, padded left",
    "padded right",
    "gradient",
    "replayed",
    "with a cache",
    "note",
]
HEAD = """# Models

Every family below was built tiny from its own configuration class (three blocks, float32) with a dense axis on the last
two blocks and the head, and compared with an oracle that shares no code with the package: `torch.func.jvp` and `vjp`
over a float64 copy of the unmodified network in plain attention. Attention and experts are the implementations that
`from_pretrained` gives by default. Fused experts are not wrapped here; their derivative is. This page is written by

```bash
{command}
```

on {date}, {hardware}, with torch {torch}, transformers {transformers} and peft {peft}. A test holds
every family to a relative error of {tolerance:.0e}, and this page to the table.

* **logits**: the largest error of what the axis adds to the logits, relative to its largest entry, at the real
  positions of padded rows.
* **gradient**, **replayed**: the largest error of ∂L/∂τ relative to its largest entry, recorded and with
  `gradient="replay"`. A dash: the model has no blocks that transformers can checkpoint; train it with
  `gradient="recorded"` and without gradient checkpointing.
* **with a cache**: greedy generation of left-padded prompts gives the same tokens as with `use_cache=False`, and logits
  within the error shown. *no*: generating with a cache is refused by name; pass `use_cache=False`.

"""
REFUSALS = """
## What is refused

`get_peft_model` raises `NotImplementedError`, naming the module, the reason and the remedy. With `linearize=False`
(ordinary weights, no tangent) nothing in this table is refused.

| model | reason | instead |
|---|---|---|
"""
REST = """
**Attention.** `sdpa`, `eager` and the flash kernels that transformers dispatches work. Refused are `flex_attention` and
paged attention (`generate_batch`): load with `attn_implementation="sdpa"` or `"eager"`; and the flash kernels of models
with attention classes of their own (Falcon, GPT-J, GPT-Neo): load with `attn_implementation="eager"`.

**Experts.** `grouped_mm`, `batched_mm` and `eager` work.

**Shared weights.** A layer whose weight others use as well (Zamba 2's shared block, an encoder-decoder's embeddings) is
refused, except for a head and the embedding tied to it: name it in `exclude_modules`.

**Linear layers with a forward of their own** (routers, products by groups) are left out by default and refused by
name.

**Optional kernels.** Those of `mamba-ssm`, `causal-conv1d` and `flash-linear-attention` have no derivative. Where these
packages are installed, a linearized forward runs transformers' reference implementation instead: exact, and slower.

**A family that is not on this page** is not refused. It works if its operations have derivatives; if one has none,
PyTorch raises at the first forward and names it. Training checks the two directions of the derivative against each
other as it goes, see [training](training.md#the-adjoint-identity).
"""


def row(family: Family, found: Measured, cached: float | None) -> list[str]:
    """The cells of one family, in the order of `COLUMNS`."""
    errors = [f"{x:.0e}" for x in (found.left, found.right, found.gradient)]
    replay = "–" if found.replay is None else f"{found.replay:.0e}"
    generates = "no" if cached is None else f"{cached:.0e}"
    names = [f"`{family.name}`", f"`{found.model}`", found.attention, found.experts or "–"]
    return [*names, *errors, replay, generates, family.note]


def refusals() -> list[Refusal]:
    """Everything that `check_support` refuses by a table."""
    return [*REFUSED.values(), *(refusal for _, refusal in REFUSED_IF.values()), HUB_KERNELS, LIGER]


def line(cells: list[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(cells) + " |\n"


def parse(page: str) -> dict[str, dict[str, str]]:
    """The rows of the first table of the page, by family."""
    rows = re.findall(r"^\| (`.*) \|$", page, flags=re.MULTILINE)
    split = ([cell.strip() for cell in found.split(" | ")] for found in rows)
    return {
        cells[0].strip("`"): dict(zip(COLUMNS, cells, strict=True)) for cells in split if len(cells) == len(COLUMNS)
    }


def write() -> str:
    """Measures every family and returns the page."""
    page = HEAD.format(
        command=COMMAND,
        date=f"{datetime.date.today():%-d %B %Y}",
        hardware=f"one thread of an {platform.machine()} CPU",
        tolerance=max(family.tolerance for family in FAMILIES),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    )
    page += line(COLUMNS) + line(["---"] * len(COLUMNS))
    for family in FAMILIES:
        torch.manual_seed(0)
        found = measure(family)
        page += line(row(family, found, cached_error(family) if family.cached else None))
    page += REFUSALS + "".join(line([x.family, x.reason, x.remedy]) for x in refusals())
    return page + REST


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(write(), encoding="utf-8")
