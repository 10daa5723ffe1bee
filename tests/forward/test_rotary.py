"""Rotations of dual queries and keys, by every function of transformers that is written differently."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models
from cases import tangent_model
from conftest import batch
from tolerances import assert_equal
from torch.autograd.forward_ad import dual_level
from transformers.models.llama import modeling_llama

from tangent_peft.forward import dual, split
from tangent_peft.forward.rotary import NAMES, is_rotation, rotated


def written() -> dict[str, str]:
    """One file of each kind of function, its helpers included: `home:name` by what is written there."""
    found: dict[str, str] = {}
    for path in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if not any(f"def {name}(" in text for name in NAMES):
            continue
        functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
        helpers = "".join(ast.unparse(node) for name, node in functions.items() if "rotate" in name)
        for name in sorted(NAMES & functions.keys()):
            node = functions[name]
            node.body = [x for x in node.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
            found.setdefault(ast.unparse(node) + helpers, f"transformers.models.{path.parent.name}.{path.stem}:{name}")
    return found


def function_of(where: str) -> Any:
    home, _, name = where.partition(":")
    return inspect.unwrap(vars(importlib.import_module(home))[name])


@pytest.mark.parametrize("where", sorted(written().values()))
def test_against_torch(where: str) -> None:
    function = function_of(where)
    if not is_rotation(function):
        pytest.skip("takes other things than q, k, cos, sin, and is left alone")
    q, dq = torch.randn(2, 2, 4, 5, 8, dtype=torch.float64)
    k, dk = torch.randn(2, 2, 2, 5, 8, dtype=torch.float64)
    for shape in ((2, 5, 8), (2, 5, 4), (5, 8)):  # some take each angle once, some the same for all rows
        cos, sin = torch.randn(2, *shape, dtype=torch.float64)
        try:
            expected, tangents = torch.func.jvp(lambda q, k: function(q, k, cos, sin), (q, k), (dq, dk))  # noqa: B023
        except RuntimeError:
            continue
        with dual_level():
            found = [split(x) for x in rotated(function, dual(q, dq), dual(k, dk), cos, sin)]
        for (primal, tangent), value, derivative in zip(found, expected, tangents, strict=True):
            assert_equal(primal, value)
            assert_equal(tangent, derivative)  # type: ignore[arg-type]
        return
    pytest.fail("takes cosines of an unknown shape")


def test_what_is_no_rotation_of_values_alone() -> None:
    q, dq, k, dk = torch.randn(4, 2, 4, 5, 8, dtype=torch.float64)
    cos, dcos, sin = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    function = inspect.unwrap(modeling_llama.apply_rotary_pos_emb)
    with dual_level():
        with_angle = [split(x)[1] for x in rotated(function, dual(q, dq), dual(k, dk), dual(cos, dcos), sin)]
        one = [split(x)[1] for x in rotated(function, dual(q, dq), k, cos, sin)]
        none = [split(x)[1] for x in rotated(function, q, k, cos, sin=sin)]
    expected = torch.func.jvp(lambda q, k, cos: function(q, k, cos, sin), (q, k, cos), (dq, dk, dcos))[1]
    for found, derivative in zip(with_angle, expected, strict=True):
        assert_equal(found, derivative)  # type: ignore[arg-type]
    assert_equal(one[0], function(dq, k, cos, sin)[0])  # type: ignore[arg-type]
    assert one[1] is None or not one[1].any()
    assert none == [None, None]
    assert not is_rotation(lambda q, k, v, cos, sin: (q, k, v)) and not is_rotation(torch.sin)


def test_the_functions_are_put_back() -> None:
    before = modeling_llama.apply_rotary_pos_emb
    model, seen = tangent_model("llama"), []
    handle = (
        model.get_base_model()
        .model.layers[0]
        .register_forward_hook(lambda *_: seen.append(modeling_llama.apply_rotary_pos_emb))
    )
    with torch.no_grad():
        model(**batch())
    handle.remove()
    assert seen[0] is not before and modeling_llama.apply_rotary_pos_emb is before
