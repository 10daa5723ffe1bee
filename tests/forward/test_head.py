"""The fused head against plain logits and autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tolerances import assert_equal
from torch import Tensor
from torch.func import jvp

from tangent_peft.forward import head as head_module
from tangent_peft.forward.head import Head, Linearized, score_tokens


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


def _frozen(leaves: dict[str, Tensor], head: Head) -> tuple[dict[str, Tensor], Head]:
    """The same case with a primal that does not train, as linearized log-probs ask for."""
    primal = {name: leaves[name].detach() for name in ("h", "weight", "bias") if name in leaves}
    return {**leaves, **primal}, replace(head, weight=primal["weight"], bias=primal.get("bias"))


def _capped(z: Tensor, head: Head) -> Tensor:
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _delta(leaves: dict[str, Tensor], head: Head) -> Tensor:
    """Δ (V, D), zero if the head carries no tangent."""
    low_rank = head.b @ head.a if head.b is not None else torch.zeros_like(head.weight)
    return low_rank if head.dense is None else head.dense


def _logits(leaves: dict[str, Tensor], head: Head, size: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """z₀ and size·ż, before the soft-cap."""
    h, dh = leaves["h"], leaves.get("dh", torch.zeros_like(leaves["h"]))
    bias = 0.0 if head.bias is None else head.bias
    primal = head.scale * (h @ head.weight.mT + bias)
    return primal, size * head.scale * (dh @ head.weight.mT + h @ _delta(leaves, head).mT)


def _linearized_log_probs(leaves: dict[str, Tensor], head: Head, size: Tensor | float = 1.0) -> Tensor:
    """log p₀ + size·J·(ḣ, Δ) of the whole map from h and the head's weight to log-probs (N, V), by torch.func.jvp."""

    def log_probs(h: Tensor, weight: Tensor) -> Tensor:
        bias = 0.0 if head.bias is None else head.bias
        return _capped(head.scale * (h @ weight.mT + bias), head).log_softmax(-1)

    dh = leaves.get("dh", torch.zeros_like(leaves["h"]))
    value, change = jvp(log_probs, (leaves["h"], head.weight), (dh, _delta(leaves, head)))
    return value + size * change


def _plain(leaves: dict[str, Tensor], head: Head, labels: Tensor) -> dict[str, Tensor]:
    primal, tangent = _logits(leaves, head)
    reference, policy = _capped(primal, head).log_softmax(-1), _capped(primal + tangent, head)
    distribution = policy.log_softmax(-1)
    return {
        "log_probs": distribution.gather(1, labels[:, None])[:, 0],
        "ref_log_probs": reference.gather(1, labels[:, None])[:, 0],
        "entropy": -(distribution.exp() * distribution).sum(-1),
        "log_sum_sq_probs": distribution.exp().square().sum(-1).log(),
        "mean_logits": policy.mean(-1),
        "is_top1": policy.argmax(-1) == labels,
        "kl": torch.nn.functional.kl_div(reference, distribution, log_target=True, reduction="none").sum(-1),
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
    monkeypatch.setattr(head_module, "TILE_CPU", (chunk, 1 + chunk % V))
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


# ---- linearized log-probs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(1.0, None), (0.5, None), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("form", "tangent"), [("frozen", True), ("dense", True), ("dense", False), ("low rank", True), ("low rank", False)]
)
@pytest.mark.parametrize("chunk", [4, 100])
def test_log_probs_equal_their_jvp(
    form: str,
    tangent: bool,
    bias: bool,
    options: tuple[float, float | None],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a trained A: `a` is a leaf as well. Everything but the log-probs is as for linearized logits."""
    monkeypatch.setattr(head_module, "TILE_CPU", (chunk, 1 + chunk % V))
    leaves, head = _frozen(*_case(form, tangent, bias, *options))
    labels = torch.randint(0, V, (N,))
    scores = score_tokens(leaves["h"], leaves.get("dh"), labels, head, "log_probs")
    plain = _plain(leaves, head, labels)
    expected = _linearized_log_probs(leaves, head).gather(1, labels[:, None])[:, 0]
    assert_equal(scores.log_probs, expected)
    for name in ("ref_log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "kl"):
        assert_equal(vars(scores)[name], plain[name])
    upstream, learned = torch.randn(N, dtype=torch.float64), [x for x in leaves.values() if x.requires_grad]
    found = torch.autograd.grad(scores.log_probs, learned, upstream)
    reference = torch.autograd.grad(expected, learned, upstream)
    for gradient, other in zip(found, reference, strict=True):
        assert_equal(gradient, other)


def test_log_probs_of_a_fixed_projection() -> None:
    leaves, head = _frozen(*_case("low rank", True, False, 1.0, None))
    head = replace(head, a=leaves["a"].detach())
    labels = torch.randint(0, V, (N,))
    score_tokens(leaves["h"], leaves["dh"], labels, head, "log_probs").log_probs.square().sum().backward()
    expected = _linearized_log_probs(leaves, head).gather(1, labels[:, None]).square().sum()
    assert leaves["a"].grad is None
    for name in ("b", "dh"):
        assert_equal(leaves[name].grad, torch.autograd.grad(expected, leaves[name], retain_graph=True)[0])


@pytest.mark.parametrize("trains", ["h", "weight", "bias"])
def test_log_probs_need_a_frozen_primal(trains: str) -> None:
    leaves, head = _frozen(*_case("dense", True, True, 1.0, None))
    labels = torch.randint(0, V, (N,))
    leaves[trains].requires_grad_()
    with pytest.raises(ValueError, match=r"frozen base.*linearized='logits'"):
        score_tokens(leaves["h"], leaves["dh"], labels, head, "log_probs")
    with torch.no_grad():
        score_tokens(leaves["h"], leaves["dh"], labels, head, "log_probs")


# ---- the probe and τ = 0 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linearized", ["logits", "log_probs"])
@pytest.mark.parametrize("options", [(1.0, None), (2.0, 3.0)])
@pytest.mark.parametrize(
    ("form", "tangent"), [("frozen", True), ("dense", True), ("dense", False), ("low rank", True), ("frozen", False)]
)
@pytest.mark.parametrize("chunk", [4, 100])
def test_probe_receives_the_product_of_gradient_and_tangent(
    form: str,
    tangent: bool,
    options: tuple[float, float | None],
    linearized: Linearized,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """⟨∂L/∂z, ż⟩ = dL(f₀ + s·Jτ)/ds at s = 1, for a loss that is not linear."""
    monkeypatch.setattr(head_module, "TILE_CPU", (chunk, 1 + chunk % V))
    leaves, head = _frozen(*_case(form, tangent, True, *options))
    labels, probe = torch.randint(0, V, (N,)), torch.ones((), dtype=torch.float64, requires_grad=True)
    scores = score_tokens(leaves["h"], leaves.get("dh"), labels, head, linearized, probe)
    scores.log_probs.square().sum().backward()
    size = torch.ones((), dtype=torch.float64, requires_grad=True)
    if linearized == "logits":
        expected = _capped(sum(_logits(leaves, head, size)), head).log_softmax(-1)
    else:
        expected = _linearized_log_probs(leaves, head, size)
    expected.gather(1, labels[:, None]).square().sum().backward()
    assert_equal(probe.grad, size.grad)
    assert bool(probe.grad) == (form != "frozen" or tangent)


@pytest.mark.parametrize("linearized", ["logits", "log_probs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("softcap", [3.0, None])
def test_zero_tangent_is_the_reference_bit_for_bit(
    softcap: float | None, autocast: bool, dtype: torch.dtype, linearized: Linearized
) -> None:
    h, weight, bias = torch.randn(N, D, dtype=dtype), 5 * torch.randn(V, D, dtype=dtype), torch.randn(V, dtype=dtype)
    head = Head(weight, bias, b=torch.zeros(V, R), a=torch.randn(R, D), scale=0.7, softcap=softcap)
    labels = torch.randint(0, V, (N,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = score_tokens(h, torch.zeros_like(h), labels, head, linearized)
    assert torch.equal(scores.log_probs, scores.ref_log_probs)
    assert float(scores.kl.abs().max()) <= 1e-6
