"""The fused head against plain logits and autograd."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_equal
from torch import Tensor

from tangent_peft.forward import head as head_module
from tangent_peft.forward.head import Head, score_tokens


N, D, V, R = 11, 8, 23, 3


def _case(form: str, tangent: bool, bias: bool, scale: float, softcap: float | None) -> tuple[dict[str, Tensor], Head]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    leaves = {"h": leaf(N, D), "weight": leaf(V, D)}
    if tangent:
        leaves["dh"] = leaf(N, D)
    if bias:
        leaves["bias"] = leaf(V)
    if form == "dense":
        leaves["dense"] = leaf(V, D)
    if form == "low rank":
        leaves |= {"b": leaf(V, R), "a": leaf(R, D)}
    parts = {name: leaves.get(name) for name in ("weight", "bias", "dense", "b", "a")}
    return leaves, Head(**parts, scale=scale, softcap=softcap)  # type: ignore[arg-type]


def _plain(leaves: dict[str, Tensor], head: Head, labels: Tensor) -> dict[str, Tensor]:
    def capped(z: Tensor) -> Tensor:
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    h, zero = leaves["h"], leaves["h"].new_zeros(())
    reference = h @ head.weight.mT + (zero if head.bias is None else head.bias)
    delta = zero if head.dense is None else head.dense
    delta = delta if head.b is None else head.b @ head.a
    policy = reference + (leaves["dh"] @ head.weight.mT if "dh" in leaves else 0)
    policy = policy + (h @ delta.mT if delta.ndim else 0)
    reference, policy = capped(head.scale * reference).log_softmax(-1), capped(head.scale * policy)
    distribution = policy.log_softmax(-1)
    return {
        "log_probs": distribution.gather(1, labels[:, None])[:, 0],
        "ref_log_probs": reference.gather(1, labels[:, None])[:, 0],
        "entropy": -(distribution.exp() * distribution).sum(-1),
        "log_sum_sq_probs": distribution.exp().square().sum(-1).log(),
        "mean_logits": policy.mean(-1),
        "is_top1": policy.argmax(-1) == labels,
    }


@pytest.mark.parametrize("options", [(1.0, None), (0.5, None), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tangent", [True, False])
@pytest.mark.parametrize("form", ["frozen", "dense", "low rank"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_equals_plain_logits(
    form: str,
    tangent: bool,
    bias: bool,
    options: tuple[float, float | None],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk * V)
    leaves, head = _case(form, tangent, bias, *options)
    labels = torch.randint(0, V, (N,))
    scores = score_tokens(leaves["h"], leaves.get("dh"), labels, head)
    expected = _plain(leaves, head, labels)
    for name, value in expected.items():
        if name == "is_top1":
            assert torch.equal(scores.is_top1, value)
        else:
            assert_equal(vars(scores)[name], value)
    upstream = torch.randn(N, dtype=torch.float64)
    found = torch.autograd.grad(scores.log_probs, list(leaves.values()), upstream)
    reference = torch.autograd.grad(expected["log_probs"], list(leaves.values()), upstream)
    for gradient, plain in zip(found, reference, strict=True):
        assert_equal(gradient, plain)


def test_no_token() -> None:
    leaves, head = _case("dense", True, False, 1.0, None)
    scores = score_tokens(leaves["h"][:0], leaves["dh"][:0], torch.empty(0, dtype=torch.long), head)
    scores.log_probs.sum().backward()
    assert not leaves["dense"].grad.any()


def test_autocast_computes_in_half_and_returns_float() -> None:
    h, dh, weight = torch.randn(N, D), torch.randn(N, D), torch.randn(V, D)
    delta = torch.randn(V, D, requires_grad=True)
    labels = torch.randint(0, V, (N,))
    exact = score_tokens(h, dh, labels, Head(weight, dense=delta))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = score_tokens(h, dh, labels, Head(weight, dense=delta))
    assert half.log_probs.dtype == torch.float32
    assert_equal(half.log_probs, exact.log_probs, 2e-2)
    half.log_probs.sum().backward()
    assert delta.grad.dtype == torch.float32
