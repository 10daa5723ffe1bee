"""The derivative of rotary position embeddings: a rotation is linear, so the tangents are rotated as the values are.

    (q, k) ↦ (R q, R k)        (q̇, k̇) ↦ (R q̇, R k̇)

Differentiated operation by operation, each product with the frozen cosines and sines would first build zeros for their
tangents. Seam: in transformers each file of a model has a function `apply_rotary_pos_emb(q, k, cos, sin, …)` of its
own; the tests try every one that is written differently.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from tangent_peft.forward.level import LinearizedPass, carries_tangent, dual, split


NAMES = frozenset({"apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"})
_PARAMETERS = ("q", "k", "cos", "sin")  # the first ones, of functions that return (R q, R k)


def derive_rotations(opened: LinearizedPass) -> None:
    """Rotates tangents as values until the pass closes."""
    for home in opened.structure.homes:
        namespace = vars(sys.modules[home]) if home.startswith("transformers.models.") else {}
        for name in NAMES & namespace.keys():
            function = namespace[name]
            if is_rotation(function):
                opened.contexts.callback(namespace.__setitem__, name, function)
                namespace[name] = functools.partial(rotated, function)


def is_rotation(function: Any) -> bool:
    """Whether a function of that name takes what rotations take: other things with this name are left alone."""
    if not isinstance(function, FunctionType):
        return False
    code = function.__code__
    return code.co_varnames[: min(4, code.co_argcount)] == _PARAMETERS


def rotated(function: Callable[..., Any], q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
    """`function(q, k, …)`, linear in (q, k), on dual q and k."""
    (q_primal, dq), (k_primal, dk) = split(q), split(k)
    if dq is None or dk is None or any(map(carries_tangent, (*args, *kwargs.values()))):
        return function(q, k, *args, **kwargs)
    primals, tangents = function(q_primal, k_primal, *args, **kwargs), function(dq, dk, *args, **kwargs)
    return tuple(dual(primal, tangent) for primal, tangent in zip(primals, tangents, strict=True))
