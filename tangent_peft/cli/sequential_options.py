"""The options of `tangent-peft sequential`. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_sequential(commands: Any) -> None:
    """Adds the subcommand `sequential` to those of the entry point."""
    parser = commands.add_parser(
        "sequential",
        help="train objectives one after the other and apart, and compare what is left of each",
        description=(
            "Trains a LoRA and a tangent axis on one objective after the other, in both orders, and on each objective "
            "apart; scores all of them, and the combinations of those trained apart, on the same held-out pairs; says "
            "what was forgotten; writes result.json, report.md and figures. A run that was stopped goes on."
        ),
    )
    parser.add_argument("config", help="YAML recipe, or the name of a packaged one")
    parser.add_argument(
        "--axis",
        action="append",
        metavar="NAME=FOLDER",
        help="an objective and the folder of its train.jsonl and test.jsonl, as `tangent-peft data` writes them",
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: that of the recipe)")
    parser.add_argument("--model", help="base model, folder or Hub name (default: that of the recipe)")
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: those of the recipe)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a stage (default: those of the recipe)")
    parser.add_argument("--processes", type=int, default=1, help="jobs side by side, on a CPU (default: %(default)s)")
    parser.set_defaults(run=_sequential)


def _sequential(options: argparse.Namespace) -> int:
    from tangent_peft.cli.compare import parse_axes
    from tangent_peft.cli.sequential import read_settings, run

    names = ("output", "model", "seeds", "steps")
    given = {name: vars(options)[name] for name in names if vars(options)[name] is not None}
    if options.axis:
        given["axes"] = parse_axes(options.axis)
    run(read_settings(options.config, given), options.processes)
    return 0
