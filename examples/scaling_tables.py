"""The tables of docs/scaling.md, from the formulas of `tangent-peft plan`.

python examples/scaling_tables.py            # prints them
python examples/scaling_tables.py --write    # puts them between the marks in docs/scaling.md
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from tangent_peft.cli.plan import PlanOptions, read_config
from tangent_peft.cli.plan_tables import NAMES
from tangent_peft.train.costs import Cluster, Engine, memory, tangent_entries
from tangent_peft.train.flops import products, step_operations
from tangent_peft.train.sizes import ModelSize, Workload, model_size
from tangent_peft.tuner import TangentConfig


PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
MARKED = re.compile(r"(<!-- table (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODELS = ("llama-3.1-8b", "llama-3.1-70b", "gpt-oss-120b")
FORMS = {"dense": None, "r = 64": 64}
AXES = (1, 3, 8)
GPUS = (8, 16, 64)
COLUMNS: tuple[Engine, ...] = ("ddp", "zero2", "zero3", "fsdp2")
WORK = PlanOptions("").workload  # the command's defaults: one pair of 1024 tokens per GPU, bfloat16, replay


@cache
def size_of(model: str, rank: int | None) -> ModelSize:
    """The sizes of a packaged model under the default axis."""
    return model_size(read_config(model), TangentConfig(task_type="CAUSAL_LM", r=rank))


def memory_table(model: str) -> str:
    """GB per GPU by form of τ and number of axes."""
    lines = [["τ", "axes", *(NAMES[e] for e in COLUMNS)], ["---", "--:", *["--:"] * len(COLUMNS)]]
    for form, rank in FORMS.items():
        for axes in AXES:
            work = replace(WORK, rank=rank, axes=axes)
            lines.append([form, str(axes), *(_over_gpus(size_of(model, rank), work, e) for e in COLUMNS)])
    return _table(lines)


def _over_gpus(size: ModelSize, work: Workload, engine: Engine) -> str:
    """GB at each number of GPUs, one figure where the number does not matter."""
    found = [f"{memory(size, work, Cluster(n), engine).total / 1e9:,.0f}" for n in GPUS]
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def operations_table() -> str:
    """What a step takes, in TFLOP and in forwards."""
    headings = ["model", "τ", "entries of τ", "one forward", "replayed", "recorded", "replayed / F", "recorded / F"]
    lines = [headings, ["---", "---", *["--:"] * 6]]
    for model in MODELS:
        for form, rank in FORMS.items():
            size = size_of(model, rank)
            forward = products(size, WORK).forward
            steps = [step_operations(size, replace(WORK, rank=rank, gradient=g)) for g in ("replay", "recorded")]
            entries = f"{tangent_entries(size, rank) / 1e6:,.0f} M"
            figures = [f"{x / 1e12:,.0f}" for x in (forward, *steps)]
            lines.append([model, form, entries, *figures, *(f"{x / forward:.2f}" for x in steps)])
    return _table(lines)


def gradient_table() -> str:
    """Activations of both gradients over the length of rows, for the 8B model of rank 64."""
    lines = [["tokens per row", "replay", "recorded"], ["--:", "--:", "--:"]]
    size = size_of("llama-3.1-8b", 64)
    for length in (512, 1024, 2048, 4096):
        found = []
        for gradient in ("replay", "recorded"):
            terms = memory(size, replace(WORK, length=length, gradient=gradient), Cluster(1), "ddp").terms
            found.append(f"{(terms['activations'] + terms['workspace']) / 1e9:.1f}")
        lines.append([str(length), *found])
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    **{model: (lambda model=model: memory_table(model)) for model in MODELS},
    "operations": operations_table,
    "gradients": gradient_table,
}


def filled(page: str) -> str:
    """The page with all of its tables made anew."""
    return MARKED.sub(lambda found: found[1] + TABLES[found["name"]]() + found[3], page)


def main() -> None:
    """Prints the tables, or writes them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/scaling.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, table in TABLES.items():
        print(f"{name}\n\n{table()}")


if __name__ == "__main__":
    main()
