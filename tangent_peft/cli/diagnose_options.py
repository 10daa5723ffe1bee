"""The options of `tangent-peft diagnose`. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_diagnose(commands: Any) -> None:
    """Adds the subcommand `diagnose` to those of the entry point."""
    parser = commands.add_parser(
        "diagnose",
        help="why a mix works and when it stops: one report on saved axes, or on a model and its checkpoint",
        description=(
            "Measures how far each axis stays linear, whether two axes interfere, where in the model they act and how "
            "alike that is for all prompts, and writes report.html, report.json and figures. For a checkpoint "
            "beside the model it was trained from, what needs no tangent axes."
        ),
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="folder of a saved axis or of several, or NAME=FOLDER; or one checkpoint: a whole model or a plain LoRA",
    )
    parser.add_argument("--report", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--base", help="base model (default: the one that the axes or the LoRA name)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    parser.add_argument("--title", help="heading of the report")
    parser.add_argument(
        "--sections", metavar="NAME,…", help="which sections, such as linearity,geometry (default: all that apply)"
    )
    parser.add_argument(
        "--sequential", type=Path, metavar="FILE", help="a result of `tangent-peft sequential`, for the last section"
    )
    parser.add_argument(
        "--store", action="store_true", help="write the safe range of λ that was measured into each axis's config"
    )
    _add_data(parser.add_argument_group("what it is measured on"))
    _add_how(parser.add_argument_group("how it is measured"))
    parser.set_defaults(run=_diagnose)


def _add_data(group: Any) -> None:
    group.add_argument(
        "--prompts", nargs="+", default=[], metavar="FILE|TEXT", help="user messages, or files of them (.txt, .jsonl)"
    )
    group.add_argument(
        "--pairs", nargs="+", default=[], metavar="AXIS=FILE", help="held-out preference pairs (.jsonl), by axis"
    )
    group.add_argument(
        "--max_prompts", "--max-prompts", type=_positive, default=256, help="at most (default: %(default)s)"
    )


def _add_how(group: Any) -> None:
    group.add_argument(
        "--limit", type=float, default=0.5, help="linearity gap at which λ stops being safe (default: %(default)s)"
    )
    group.add_argument(
        "--weights", type=float, nargs="+", metavar="λ", help="at which the gap is measured (default: -3 to 3)"
    )
    group.add_argument("--seed", type=int, default=0, help="of permutations and random controls (default: %(default)s)")
    group.add_argument(
        "--batch_size", "--batch-size", type=_positive, default=8, help="rows per forward (default: %(default)s)"
    )
    group.add_argument(
        "--effort",
        type=_positive,
        default=1,
        help="read so many times as many rows as by default, and take as much longer",
    )
    dtypes = ("auto", "bfloat16", "float16", "float32")
    group.add_argument(
        "--dtype",
        choices=dtypes,
        help="of the weights (default: float32 on a CPU, elsewhere that of the files; a small gap drowns in less)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _diagnose(options: argparse.Namespace) -> int:
    try:
        from tangent_peft.cli.diagnose import run_diagnose
    except ImportError as error:
        if error.name not in ("rich", "scipy", "matplotlib"):
            raise
        raise ImportError(
            f'`tangent-peft diagnose` needs {error.name}: pip install "tangent-peft[eval,cli]"'
        ) from error
    return run_diagnose(options)
