"""Log-probs of every mix, and their derivatives, against plain logits and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_equal
from torch import Tensor
from torch.func import hessian, jacfwd

from tangent_peft.forward import mixes as mixes_module
from tangent_peft.forward.head import Head
from tangent_peft.forward.mixes import Tokens, axis_logits, mix_derivatives, mix_logps, tiles


N, D, V, R, K = 7, 8, 23, 3, 3
MIXES = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, 0.3], [-2.0, 1.5, 3.0]], dtype=torch.float64)
CASES = [(False, 1.0, None), (True, 0.5, None), (False, 1.0, 3.0), (True, 2.0, 5.0)]


def _case(bias: bool, scale: float, softcap: float | None) -> tuple[Tokens, list[Head]]:
    """Axis 0 has no tangent on the head, axis 1 a dense one and nothing below, axis 2 a low-rank one."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    shared = {"weight": normal(V, D), "bias": normal(V) if bias else None, "scale": scale, "softcap": softcap}
    heads = [Head(**shared), Head(**shared, dense=normal(V, D)), Head(**shared, b=normal(V, R), a=normal(R, D))]
    return Tokens(normal(N, D), [normal(N, D), None, normal(N, D)], torch.randint(V, (N,))), heads


def _log_probs(tokens: Tokens, heads: list[Head], mix: Tensor) -> Tensor:
    """log p(y; λ) (N,), written out."""
    head = heads[0]
    logits = tokens.hidden @ head.weight.mT + (0.0 if head.bias is None else head.bias)
    for weight, tangent, own in zip(mix, tokens.tangents, heads, strict=True):
        if tangent is not None:
            logits = logits + weight * (tangent @ head.weight.mT)
        delta = own.dense if own.dense is not None else None if own.b is None or own.a is None else own.b @ own.a
        if delta is not None:
            logits = logits + weight * (tokens.hidden @ delta.mT)
    logits = head.scale * logits
    capped = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    return capped.log_softmax(-1).gather(1, tokens.labels[:, None])[:, 0]


@pytest.mark.parametrize(("bias", "scale", "softcap"), CASES)
def test_log_probs(bias: bool, scale: float, softcap: float | None) -> None:
    tokens, heads = _case(bias, scale, softcap)
    found, _ = mix_logps(tokens, heads, MIXES, 1e-10)
    assert_equal(found, torch.stack([_log_probs(tokens, heads, mix) for mix in MIXES]))


@pytest.mark.parametrize(("bias", "scale", "softcap"), CASES)
def test_derivatives(bias: bool, scale: float, softcap: float | None) -> None:
    tokens, heads = _case(bias, scale, softcap)
    for mix in MIXES:

        def log_probs(weights: Tensor) -> Tensor:
            return _log_probs(tokens, heads, weights)

        found = mix_derivatives(tokens, heads, mix)
        assert_equal(found.value, log_probs(mix))
        assert_equal(found.gradient, jacfwd(log_probs)(mix))
        assert_equal(found.hessian, hessian(log_probs)(mix))


def test_log_probs_are_concave_in_the_mix() -> None:
    tokens, heads = _case(True, 1.0, None)
    curvatures = torch.linalg.eigvalsh(mix_derivatives(tokens, heads, MIXES[1]).hessian)
    assert (curvatures <= 1e-12).all()


def test_low_precision_logits_are_float32() -> None:
    tokens, heads = _case(True, 1.0, None)

    def low(head: Head) -> Head:
        return Head(**{name: x.bfloat16() if isinstance(x, Tensor) else x for name, x in vars(head).items()})

    lower = Tokens(
        tokens.hidden.bfloat16(), [None if x is None else x.bfloat16() for x in tokens.tangents], tokens.labels
    )
    assert axis_logits(lower, [low(head) for head in heads]).dtype == torch.float32
    found, _ = mix_logps(lower, [low(head) for head in heads], MIXES, 1e-6)
    assert_equal(found.bfloat16(), torch.stack([_log_probs(tokens, heads, mix) for mix in MIXES]), 4e-2)


def test_tiles_cover_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, heads = _case(True, 1.0, None)
    whole, _ = mix_logps(tokens, heads, MIXES, 1e-10)
    monkeypatch.setattr(mixes_module, "TILE_CPU", 2 * (K + 1) * V)
    parts = list(tiles(tokens, heads))
    assert [len(tokens[part]) for part in parts] == [2, 2, 2, 1]
    assert_equal(torch.cat([mix_logps(tokens[part], heads, MIXES, 1e-10)[0] for part in parts], 1), whole)
