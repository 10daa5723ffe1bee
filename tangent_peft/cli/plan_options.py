"""The options of `tangent-peft plan`, and what it prints. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def add_plan(commands: Any) -> None:
    """Adds the subcommand `plan` to those of the entry point."""
    parser = commands.add_parser(
        "plan",
        help="estimate memory and operations of a training step per GPU, and recommend a recipe",
        description=(
            "Reads a model's config, never its weights, and estimates the peak memory of a TS-DPO step on each engine. "
            "Options have the names of `tangent-peft train` where they mean the same."
        ),
    )
    parser.add_argument("--model", required=True, help="packaged name, folder, config.json, or name on the Hub")
    parser.add_argument("--gpus", type=int, default=1, help="how many (default: %(default)s)")
    parser.add_argument("--gpu_memory", default="80GB", help="of one GPU, e.g. 141GiB (default: %(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--rank", type=int, default=64, help="rank of τ = B·A (default: %(default)s)")
    form.add_argument("--dense", action="store_true", help="dense τ = ΔW instead")
    parser.add_argument("--num_layers", default="16", help="the last blocks that train, or all (default: %(default)s)")
    parser.add_argument("--no_lm_head", action="store_true", help="no tangent on the head")
    parser.add_argument("--experts", action="store_true", help="tangents on fused experts as well")
    parser.add_argument("--axes", type=int, default=1, help="axes that the model holds (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="pairs per GPU and forward (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens per row (default: %(default)s)")
    parser.add_argument("--gradient", choices=("replay", "recorded"), default="replay", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the base")
    parser.add_argument("--quantize", choices=("4bit", "8bit"), help="how linear layers of blocks are stored")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--flop_rate", type=float, help="operations per second that a GPU sustains, e.g. 4e14")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print one JSON object")
    shown.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from tangent_peft.cli.plan import PlanOptions, make_plan, parse_bytes
    from tangent_peft.cli.plan_tables import markdown, print_plan

    plan = make_plan(
        PlanOptions(
            model=options.model,
            gpus=options.gpus,
            gpu_memory=parse_bytes(options.gpu_memory),
            rank=None if options.dense else options.rank,
            num_layers=_layers(options.num_layers),
            lm_head=not options.no_lm_head,
            experts=options.experts,
            axes=options.axes,
            batch_size=options.batch_size,
            max_length=options.max_length,
            gradient=options.gradient,
            dtype=options.dtype,
            quantize=options.quantize,
            accumulation=options.gradient_accumulation_steps,
            flop_rate=options.flop_rate,
        )
    )
    if options.json:
        sys.stdout.write(json.dumps(plan.as_dict()) + "\n")
    elif options.markdown:
        sys.stdout.write(markdown(plan))
    else:
        print_plan(Console(), plan)
    return 0


def _layers(text: str) -> int | None:
    if text.lower() in ("all", "none"):
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"`num_layers` is a positive number or 'all', found {text!r}.")
    return int(text)
