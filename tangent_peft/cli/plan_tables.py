"""How a plan is shown: as tables on the terminal, or in Markdown. Knows no formula."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tangent_peft.cli.plan import Plan
from tangent_peft.train.costs import tangent_entries


TERMS = {
    "base": "base",
    "tangents": "tangents τ",
    "projections": "projections A",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "workspace": "workspace",
    "exchange": "exchange",
    "framework": "CUDA, NCCL (assumed)",
}
NAMES = {
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3 offload",
    "fsdp2": "FSDP2",
}


def header(plan: Plan) -> list[str]:
    """What was asked, in two lines."""
    options, size = plan.options, plan.size
    form = "dense τ" if options.rank is None else f"τ of rank {options.rank}"
    stored = options.dtype if options.quantize is None else f"{options.quantize} linear layers, else {options.dtype}"
    return [
        f"{options.model}: {size.parameters / 1e9:.2f} billion parameters in {len(size.blocks)} blocks, {stored}; "
        f"{form} on {len(size.trained_blocks)} blocks{' and the head' if size.head.wrapped else ''}: "
        f"{tangent_entries(size, options.rank) / 1e6:.1f} million; axes held: {options.axes}",
        f"GPUs: {options.gpus} of {options.gpu_memory / 1e9:.0f} GB; pairs per GPU: {options.batch_size} "
        f"of {options.max_length} tokens; gradient: {options.gradient}",
    ]


def rows(plan: Plan) -> list[list[str]]:
    """Headings, then one row per term: GB by engine, their sum, what the host holds, whether it fits."""
    one = plan.options.gpus == 1
    names = ["one process" if one and e.engine == "ddp" else NAMES[e.engine] for e in plan.estimates]
    found = [["", *names]]
    for term, words in TERMS.items():
        found.append([words, *(f"{e.terms[term] / 1e9:.1f}" for e in plan.estimates)])
    found.append(["sum", *(f"{e.total / 1e9:.1f}" for e in plan.estimates)])
    found.append(["on the host, per process", *(f"{e.host / 1e9:.0f}" for e in plan.estimates)])
    found.append(["fits", *("yes" if plan.fits(e) else "no" for e in plan.estimates)])
    return found


def conclusion(plan: Plan) -> list[str]:
    """Operations, time if a rate was given, and what to do."""
    lines = [f"{plan.operations / 1e12:,.0f} TFLOP per optimizer step and GPU"]
    if plan.seconds is not None:
        lines[0] += f", {plan.seconds:.2f} s at {(plan.options.flop_rate or 0) / 1e12:.0f} TFLOP/s"
    if plan.recipe is None:
        remedy = "; ".join(plan.advice) or "nothing that was tried: shorten `max_length`, train fewer blocks"
        lines.append(f"Nothing fits into {plan.options.gpu_memory / 1e9:.0f} GB with a tenth to spare. Fits: {remedy}.")
    else:
        lines += [f"Recipe: {plan.recipe}", str(plan.command)]
    return lines


def print_plan(console: Console, plan: Plan) -> None:
    """The plan on a terminal."""
    for line in header(plan):
        console.print(line, highlight=False, markup=False)
    headings, *figures = rows(plan)
    table = Table(title="GB per GPU at the peak of a step")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in figures:
        table.add_row(*row, end_section=row[0] in (TERMS["framework"], "sum"))
    console.print(table)
    for line in conclusion(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def markdown(plan: Plan) -> str:
    """The plan as Markdown."""
    headings, *rest = rows(plan)
    table = [headings, ["---", *["--:"] * len(plan.estimates)], *rest]
    lines = [*header(plan), "", *(f"| {' | '.join(row)} |" for row in table), "", *conclusion(plan)]
    return "\n".join(lines) + "\n"
