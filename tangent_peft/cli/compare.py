"""`tangent-peft compare`: a comparison from a recipe, with its report and figures."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tangent_peft.cli.train_options import find_recipe
from tangent_peft.compare import ComparisonResult, Settings, run_comparison
from tangent_peft.compare.report import figures, markdown
from tangent_peft.tuner.files import write_text


TUPLES = ("methods", "evaluations", "seeds", "line", "affine", "mixed")


def read_settings(config: str, given: Mapping[str, Any]) -> Settings:
    """The settings of a recipe, with the options that override them.

    Args:
        config: a YAML file whose keys are the fields of `Settings`, or the name of a packaged recipe.
        given: values by field that win over the recipe's.

    Raises:
        FileNotFoundError: if the recipe is neither a file nor the name of a packaged one.
        ValueError: naming a key that is unknown or missing, or a value that does not fit.
    """
    values = read_values(config, "compare", Settings, given)
    values |= {name: tuple(values[name]) for name in TUPLES if values.get(name) is not None}
    return Settings(**{**values, "output": str(values["output"]), "model": str(values["model"])})


def read_values(config: str, kind: str, settings: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe with those given, checked to be fields of a settings class, all that are required.

    Raises:
        FileNotFoundError: if the recipe is neither a file nor the name of a packaged one.
        ValueError: naming a key that is unknown or missing.
    """
    path = find_recipe(config, kind)
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} is no recipe: it holds no keys. See the packaged ones: `tangent-peft recipes`.")
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name in held:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            raise ValueError(f"{path}: unknown key `{name}`" + (f"; did you mean `{close[0]}`?" if close else "."))
    values = {**held, **given}
    needed = [name for name, field in fields.items() if _is_required(field) and name not in values]
    if needed:
        raise ValueError(f"{path} lacks {needed}. Add them, or give them on the command line.")
    return values


def parse_axes(texts: Sequence[str]) -> dict[str, str]:
    """The folder of each axis from `NAME=FOLDER`.

    Raises:
        ValueError: for another form, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, given, folder = text.partition("=")
        if not (name and given and folder) or name in found:
            raise ValueError(f"--axis {text!r}: write NAME=FOLDER, each name once; found before: {list(found)}.")
        found[name] = folder
    return found


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def run_compare(settings: Settings, processes: int, console: Console | None = None) -> ComparisonResult:
    """Runs the comparison; writes `result.json`, `report.md` and `figures/` into its folder, and prints the report.

    Args:
        settings: of the comparison.
        processes: jobs side by side.
        console: where bars and tables go; standard output by default.
    """
    console = Console() if console is None else console
    with warnings.catch_warnings(), reported(console) as report:
        warnings.filterwarnings("ignore", "λ = .* mixes beyond", UserWarning)  # the line goes there on purpose
        result = run_comparison(settings, processes, report)
    folder = Path(settings.output)
    result.save(folder / "result.json")
    show(folder, markdown(result), figures(result, folder / "figures"), console)
    return result


@contextmanager
def reported(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for the jobs of a comparison; yields what is to be called with the job's name, those done, and all."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("train and score", total=None)
        yield lambda name, done, total: bars.update(task, description=name, completed=done, total=total)


def show(folder: Path, text: str, pictures: Sequence[Path], console: Console) -> None:
    """Writes the report of a comparison beside its result, and prints it."""
    write_text(folder / "report.md", text)
    console.print(Markdown(text))
    console.print(f"{folder}/result.json, {folder}/report.md and {len(pictures)} figures in {folder}/figures")
