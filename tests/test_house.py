"""The rules of the house, read from the syntax trees: layering, sizes, docstrings, types, forbidden calls.

Nothing here imports the package. Each rule is one table or one short function; every exception is listed by
name, with its reason, and an exception that nothing needs any more fails as well.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tangent_peft"

# cli > compare > diagnose > train, evaluate > tuner > forward; diagnosis does not know training
BELOW: dict[str, set[str]] = {
    "forward": set(),
    "tuner": {"forward"},
    "train": {"tuner", "forward"},
    "evaluate": {"tuner", "forward"},
    "diagnose": {"evaluate", "tuner", "forward"},
    "compare": {"train", "evaluate", "diagnose", "tuner", "forward"},
    "cli": {"compare", "train", "evaluate", "diagnose", "tuner", "forward", PACKAGE},
    PACKAGE: {"compare", "train", "evaluate", "diagnose", "tuner", "forward"},  # the package's own __init__
}

EXTRAS = {"trl", "datasets", "matplotlib", "moocore", "scipy", "rich", "gguf", "gradio"}
EXTRAS |= {"textstat", "vaderSentiment", "nltk", "markdown_it"}
STRANGERS: dict[str, set[str]] = {
    "forward": EXTRAS | {"peft"},
    "tuner": EXTRAS,  # a base install has none of them
    "train": {"gradio"},
    "evaluate": {"trl", "gradio"},
    "diagnose": {"trl", "gradio"},
    "compare": {"gradio"},
    "cli": set(),
    PACKAGE: EXTRAS,
}

MODULE_LINES = 400
FUNCTION_LINES = 50
PARAMETERS = 7

# Functions with more parameters, because a host library calls them so: "module:qualified name" -> reason.
MANY_PARAMETERS = {
    "tangent_peft.forward.attention:tangent_attention": "the signature of transformers' AttentionInterface",
    "tangent_peft.tuner.verbs:AxisVerbs.add_weighted_adapter": "the signature of peft's LoraModel",
    "tangent_peft.train.trainer:TangentDPOTrainer.__init__": "the signature of trl.DPOTrainer",
}

# Modules that may call what the library may not: "module:function called" -> reason.
FORBIDDEN_CALLS = ("print", "getattr", "hasattr")
CALLS_ALLOWED: dict[str, str] = {}

Function = ast.FunctionDef | ast.AsyncFunctionDef


# ---- reading -----------------------------------------------------------------------------------------------


MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT / PACKAGE).as_posix())


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """`tangent_peft.tuner.axes` -> `tuner`; the package itself is a room of its own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, those inside functions and under TYPE_CHECKING included."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*origin, *([node.module] if node.module else [])])
            # `from tangent_peft import tuner` names a room, or a public name of the package itself.
            names = [f"{source}.{alias.name}" for alias in node.names] if source == PACKAGE else [source]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Call) and called(node) == "import_module" and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield node.lineno, target.value


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ast.unparse(call.func).rsplit(".", 1)[-1]


def functions(path: Path) -> Iterator[tuple[str, Function, bool]]:
    """Qualified name, node, and whether self or cls comes first, of every function, nested ones included."""

    def visit(node: ast.AST, prefix: str, in_class: bool) -> Iterator[tuple[str, Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield prefix + child.name, child, in_class and "staticmethod" not in decorators(child)
                yield from visit(child, f"{prefix}{child.name}.", False)
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.", True)
            else:
                yield from visit(child, prefix, in_class)

    yield from visit(syntax(path), "", False)


def decorators(node: Function) -> set[str]:
    return {ast.unparse(decorator).rsplit(".", 1)[-1] for decorator in node.decorator_list}


def public(path: Path) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Qualified name and node of every public class, function and method."""

    def visit(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, ast.ClassDef | Function]]:
        for child in node.body:
            if not isinstance(child, ast.ClassDef | Function) or child.name.startswith("_"):
                continue
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")

    yield from visit(syntax(path), "")


def code_lines(node: Function) -> int:
    """Lines from `def` to the end, docstring excluded."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node, clean=False) is None:
        return total
    text = node.body[0]
    return total - ((text.end_lineno or text.lineno) - text.lineno + 1)


def parameters(node: Function, bound: bool) -> list[ast.arg]:
    given = node.args
    named = [*given.posonlyargs, *given.args][1 if bound else 0 :] + given.kwonlyargs
    return named + [star for star in (given.vararg, given.kwarg) if star is not None]


# ---- layering ----------------------------------------------------------------------------------------------


@each_module
def test_imports_its_own_room_or_one_below(path: Path) -> None:
    here = room(module_name(path))
    assert here in BELOW, f"{here!r} is a new room: give it a floor in BELOW, or move it elsewhere"
    wrong = []
    for line, name in imported(path):
        if name.split(".")[0] != PACKAGE or name == f"{PACKAGE}.__version__":
            continue
        there = room(name) if room(name) in BELOW else PACKAGE  # a public name of the package itself
        if there != here and there not in BELOW[here]:
            wrong.append(f"line {line}: {here} may not know {there} (imports {name})")
    assert not wrong, "\n".join(wrong)


@each_module
def test_knows_no_strange_library(path: Path) -> None:
    strangers = STRANGERS.get(room(module_name(path)), set())
    wrong = [f"line {line}: {name}" for line, name in imported(path) if name.split(".")[0] in strangers]
    assert not wrong, f"{room(module_name(path))} may not import\n" + "\n".join(wrong)


# ---- sizes -------------------------------------------------------------------------------------------------


@each_module
def test_module_is_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MODULE_LINES, f"{lines} lines, the limit is {MODULE_LINES}: one idea per file"


@each_module
def test_functions_are_short(path: Path) -> None:
    long = [
        f"line {node.lineno}: {name} has {code_lines(node)} lines, the limit is {FUNCTION_LINES}"
        for name, node, _ in functions(path)
        if code_lines(node) > FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


@each_module
def test_functions_take_few_parameters(path: Path) -> None:
    many = [
        f"line {node.lineno}: {name} takes {len(parameters(node, bound))}, the limit is {PARAMETERS}"
        for name, node, bound in functions(path)
        if len(parameters(node, bound)) > PARAMETERS and f"{module_name(path)}:{name}" not in MANY_PARAMETERS
    ]
    assert not many, "\n".join(many)


# ---- what a reader may count on ----------------------------------------------------------------------------


@each_module
def test_public_names_have_a_docstring(path: Path) -> None:
    bare = [] if ast.get_docstring(syntax(path)) else ["the module itself"]
    for name, node in public(path):
        exempt = not isinstance(node, ast.ClassDef) and decorators(node) & {"overload", "setter", "deleter"}
        if not exempt and not ast.get_docstring(node):
            bare.append(f"line {node.lineno}: {name}")
    assert not bare, "without a docstring:\n" + "\n".join(bare)


@each_module
def test_signatures_are_typed(path: Path) -> None:
    untyped = []
    for name, node, bound in functions(path):
        missing = [given.arg for given in parameters(node, bound) if given.annotation is None]
        missing += [] if node.returns else ["return"]
        if missing:
            untyped.append(f"line {node.lineno}: {name} does not type {', '.join(missing)}")
    assert not untyped, "\n".join(untyped)


@each_module
def test_calls_nothing_forbidden(path: Path) -> None:
    wrong = [
        f"line {node.lineno}: {called(node)}(…)"
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in FORBIDDEN_CALLS
        and f"{module_name(path)}:{node.func.id}" not in CALLS_ALLOWED
    ]
    assert not wrong, "the library neither prints nor probes for attributes:\n" + "\n".join(wrong)


# ---- the lists of exceptions, and the whole repository -----------------------------------------------------


def test_every_exception_is_needed() -> None:
    by_name = {module_name(path): path for path in MODULES}
    many = {
        f"{module}:{name}"
        for module, path in by_name.items()
        for name, node, bound in functions(path)
        if len(parameters(node, bound)) > PARAMETERS
    }
    calls = {
        f"{module}:{node.func.id}"
        for module, path in by_name.items()
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    unneeded = (MANY_PARAMETERS.keys() - many) | (CALLS_ALLOWED.keys() - calls)
    assert not unneeded, f"take these out of the lists of exceptions: {sorted(unneeded)}"


def repository_files() -> list[Path]:
    """Files that git tracks or would track; without git (a source archive) all that are not hidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        files = (path for path in ROOT.rglob("*") if path.is_file())
        return [path for path in files if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_folder_of_the_machine_it_was_written_on() -> None:
    folder = re.compile(r"(?<![\w.\-])/" + "work/")  # in two parts, or this file would name one
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text file
        lines = enumerate(text.splitlines(), start=1)
        found += [f"{path.relative_to(ROOT)}:{number}" for number, line in lines if folder.search(line)]
    assert not found, "\n".join(found)
