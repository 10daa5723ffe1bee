"""The options of `tangent-peft export`. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_export(commands: Any) -> None:
    """Adds the subcommand `export` to those of the entry point."""
    parser = commands.add_parser(
        "export",
        help="write a mix of saved axes as a LoRA or as an ordinary model",
        description=(
            "Loads a base model and saved axes, and writes θ(λ) as a plain LoRA or as an ordinary transformers model, "
            "with a model card that states rank, error and linearity gap."
        ),
    )
    parser.add_argument("axes", nargs="+", metavar="AXIS", help="folder of a saved axis or of several, or NAME=FOLDER")
    parser.add_argument("--weights", required=True, help="λ by axis: help=1,verb=-0.5")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--format", choices=("lora", "merged"), default="lora", help="(default: %(default)s)")
    parser.add_argument("--base", help="base model (default: the one that the axes name)")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the base (default: that of its files)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--prompts", type=Path, help="measure the linearity gap on these, one a line")
    parser.add_argument("--no_calibration", action="store_true", help="do not measure the linearity gap")
    lora = parser.add_argument_group("a LoRA")
    lora.add_argument("--rank", help="rank, or share of the energy such as 0.95 (default: that of the mix)")
    lora.add_argument("--head", choices=("keep", "merge", "refuse"), default="keep", help="what becomes of its tangent")
    lora.add_argument("--server", choices=("vllm", "sglang", "llama.cpp"), help="make it ready for this server")
    merged = parser.add_argument_group("a merged model")
    merged.add_argument("--max_shard_size", help="largest size of one file (default: 5GB)")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from tangent_peft.cli.export import ExportOptions, parse_rank, parse_weights, run_export
    from tangent_peft.cli.saved_axes import find_axes

    _refuse_strangers(options)
    export = run_export(
        ExportOptions(
            axes=find_axes(options.axes),
            weights=parse_weights(options.weights),
            output=options.output,
            merged=options.format == "merged",
            base=options.base,
            dtype=options.dtype,
            overwrite=options.overwrite,
            prompts=options.prompts,
            calibration=not options.no_calibration,
            rank=parse_rank(options.rank),
            head=options.head,
            server=options.server,
            max_shard_size=options.max_shard_size or "5GB",
        )
    )
    sys.stdout.write(f"{export}\n")
    return 0


def _refuse_strangers(options: argparse.Namespace) -> None:
    """Options that mean nothing for the chosen format, or contradict each other."""
    merged = options.format == "merged"
    lora_alone = {"--rank": options.rank, "--server": options.server, "--head": options.head != "keep"}
    given = [name for name, value in lora_alone.items() if value] if merged else []
    given += ["--max_shard_size"] if options.max_shard_size and not merged else []
    if given:
        raise ValueError(f"{', '.join(given)} means nothing with --format {options.format}. Leave it out.")
    if options.prompts is not None and options.no_calibration:
        raise ValueError("--prompts and --no_calibration contradict each other. Give one of them.")
