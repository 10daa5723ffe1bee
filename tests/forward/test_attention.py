"""The derivative of attention and its transpose against jvp and vjp of plain attention, case by case."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import config, tangent_model
from conftest import TINY, batch, build, enlarge
from oracle import attention
from peft import get_peft_model
from tolerances import assert_equal
from torch import Tensor, nn
from torch.func import jvp, vjp
from transformers import AttentionInterface, AttentionMaskInterface, Gemma2Config, Gemma2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tangent_peft.forward import attention as dispatch
from tangent_peft.forward import attention_rule, split
from tangent_peft.forward.attention import NAME, tangent_attention
from tangent_peft.forward.attention_rule import AttentionShape, AttentionTangent
from tangent_peft.forward.level import close_pass, current_pass, dual, open_pass


BATCH, HEADS, QUERIES, SIZE = 2, 4, 7, 5
SCALE = 0.4


@dataclass(frozen=True)
class Case:
    """One way of attending; the oracle sees it as an additive bias, a soft-cap and sinks."""

    groups: int = 2
    queries: int = QUERIES
    keys: int = QUERIES
    causal: bool = False
    offset: int = 0
    window: int | None = None
    mask: str | None = None
    softcap: float | None = None
    sinks: bool = False
    chunk: int = 128


CASES = {
    "full": Case(),
    "one key head": Case(groups=4),
    "no groups": Case(groups=1),
    "causal": Case(causal=True),
    "causal, window": Case(causal=True, window=3),
    "window of two": Case(causal=True, window=2),
    "bool mask": Case(mask="bool"),
    "bool mask per head": Case(mask="bool per head"),
    "additive mask": Case(mask="additive"),
    "additive mask per head": Case(mask="additive per head"),
    "causal and padding": Case(causal=True, mask="padding"),
    "fully masked rows": Case(mask="some rows"),
    "padding on the left": Case(causal=True, mask="left"),
    "soft-cap": Case(causal=True, softcap=1.5),
    "sinks": Case(causal=True, sinks=True),
    "sinks and soft-cap": Case(mask="bool", sinks=True, softcap=2.0),
    "decoding": Case(queries=1, keys=9),
    "decoding, mask": Case(queries=1, keys=9, mask="bool"),
    "continuing": Case(queries=3, keys=9, causal=True, offset=6),
    "continuing, window": Case(queries=3, keys=9, causal=True, offset=6, window=4),
}
CASES |= {f"{name}, chunks of {n}": Case(**{**vars(case), "chunk": n}) for name, case in CASES.items() for n in (1, 3)}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_mask(case: Case) -> Tensor | None:
    rows, columns = case.queries, case.keys
    causal = torch.ones(rows, columns).tril().bool()
    if case.mask is None:
        return None
    if case.mask.startswith("bool"):
        heads = HEADS if "head" in case.mask else 1
        mask = torch.rand(BATCH, heads, rows, columns) < 0.6
        return mask | torch.eye(rows, columns).bool()
    if case.mask.startswith("additive"):
        return random(BATCH, HEADS if "head" in case.mask else 1, rows, columns)
    if case.mask == "some rows":
        mask = causal.expand(BATCH, 1, rows, columns).clone()
        mask[0, :, :2] = False
        return mask
    padding = torch.ones(BATCH, columns).bool()
    padding[1, -2:] = False
    if case.mask == "left":
        padding[1] = padding[1].flip(0)
    return padding[:, None, None]


def bias_of(case: Case, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The additive bias, and which queries see any key (B, 1 or H, T, 1)."""
    bias = torch.zeros(BATCH, HEADS, case.queries, case.keys, dtype=torch.float64)
    if mask is not None:
        bias = bias + (mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf))
    if case.causal:
        row, column = torch.arange(case.queries)[:, None] + case.offset, torch.arange(case.keys)[None]
        visible = (column <= row) & (column > row - (case.window or 10**6))
        bias = bias.masked_fill(~visible, -torch.inf)
    seen = bias.isfinite().any(-1, keepdim=True)
    return bias.masked_fill(~seen, 0.0), seen


def reference(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, seen: Tensor, sinks: Tensor | None) -> Tensor:
    """The oracle; soft-cap and sinks, which it does not know, are written out."""
    if case.softcap is None and sinks is None:
        return attention(q, k, v, bias, SCALE) * seen
    k, v = k.repeat_interleave(case.groups, 1), v.repeat_interleave(case.groups, 1)
    scores = SCALE * q @ k.mT
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]]
    return weights @ v * seen


SUBSETS = [which for which in itertools.product([True, False], repeat=3) if any(which)]


@pytest.mark.parametrize("recorded", [False, True], ids=["rule", "recorded"])
@pytest.mark.parametrize("name", CASES)
def test_derivative_and_transpose(name: str, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr(attention_rule, "CHUNK", case.chunk)
    kv = (BATCH, HEADS // case.groups, case.keys, SIZE)
    q, k, v = random(BATCH, HEADS, case.queries, SIZE), random(*kv), random(*kv)
    mask, sinks = make_mask(case), random(HEADS) if case.sinks else None
    bias, seen = bias_of(case, mask)

    def run(*qkv: Tensor) -> Tensor:
        return reference(case, *qkv, bias, seen, sinks)

    shape = AttentionShape(SCALE, case.causal, case.offset, case.window, case.softcap)
    for which in SUBSETS:
        tangents = [random(*x.shape).requires_grad_() if has else None for x, has in zip((q, k, v), which, strict=True)]
        full = [torch.zeros_like(x) if t is None else t.detach() for t, x in zip(tangents, (q, k, v), strict=True)]
        out, expected = jvp(run, (q, k, v), tuple(full))
        if recorded:
            found = attention_rule.tangent_by_chunks((q, k, v, out), tuple(tangents), mask, sinks, shape)
        else:
            found = AttentionTangent.apply(q, k, v, out, *tangents, mask, sinks, shape)
        assert_equal(found, expected)
        cotangent = random(*out.shape)
        found.backward(cotangent)
        for tangent, gradient in zip(tangents, vjp(run, q, k, v)[1](cotangent), strict=True):
            if tangent is not None:
                assert tangent.grad is not None
                assert_equal(tangent.grad, gradient)


def test_a_query_that_sees_nothing_has_no_derivative() -> None:
    case = CASES["fully masked rows"]
    q, k, v = (random(BATCH, HEADS, QUERIES, SIZE) for _ in range(3))
    mask = make_mask(case)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=SCALE)
    tangents = [random(*x.shape).requires_grad_() for x in (q, k, v)]
    found = AttentionTangent.apply(q, k, v, out, *tangents, mask, None, AttentionShape(SCALE))
    assert torch.equal(found[0, :, :2], torch.zeros_like(found[0, :, :2]))
    found.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in tangents)
    assert torch.equal(tangents[0].grad[0, :, :2], torch.zeros_like(out[0, :, :2]))


# ---- in the signature of transformers ----------------------------------------------------------------------


@contextmanager
def attention_module(chosen: str = "sdpa") -> Iterator[nn.Module]:
    """An attention module inside an open pass whose primal is served by `chosen`."""
    found = nn.Module().eval()
    found.config, found.num_key_value_groups, found.is_causal = SimpleNamespace(), 2, True
    opened = open_pass(found, "mix")
    opened.primal_attention[id(found.config)] = chosen
    try:
        yield found
    finally:
        close_pass(opened)


@pytest.fixture
def module() -> Iterator[nn.Module]:
    """The module above, in a pass that closes with the test."""
    with attention_module() as found:
        yield found


def dual_qkv(queries: int = QUERIES, keys: int = QUERIES) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v = random(BATCH, HEADS, queries, SIZE), random(BATCH, 2, keys, SIZE), random(BATCH, 2, keys, SIZE)
    return [q, k, v], [random(*x.shape) for x in (q, k, v)]


@pytest.mark.parametrize(
    "case",
    [
        Case(causal=True),
        Case(causal=False),
        Case(queries=1, keys=9),
        Case(mask="bool"),
        Case(mask="additive"),
        Case(mask="some rows"),
    ],
)
def test_transformers_signature(case: Case) -> None:
    primals, tangents = dual_qkv(case.queries, case.keys)
    mask = make_mask(case)
    bias, seen = bias_of(case, mask)
    expected = jvp(lambda *qkv: reference(case, *qkv, bias, seen, None), tuple(primals), tuple(tangents))
    with attention_module() as module:
        duals = [dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        found, _ = tangent_attention(module, *duals, mask, is_causal=case.causal, scaling=SCALE)
        out, tangent = split(found)
    assert tangent is not None
    assert_equal(out, expected[0].transpose(1, 2))
    assert_equal(tangent, expected[1].transpose(1, 2))


@pytest.mark.parametrize("window", [None, 3])
def test_flash_kernels(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a padding mask (B, S), and align the last query with the last key."""
    case = Case(queries=3, keys=9, causal=True, offset=6, window=window, mask="padding")
    primals, tangents = dual_qkv(case.queries, case.keys)
    mask = make_mask(case)
    assert mask is not None
    bias, seen = bias_of(case, mask)

    def run(*qkv: Tensor) -> Tensor:
        return reference(case, *qkv, bias, seen, None)

    def flash(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return run(q, k, v).transpose(1, 2), None

    expected = jvp(run, tuple(primals), tuple(tangents))[1].transpose(1, 2)
    monkeypatch.setattr(dispatch, "ALL_ATTENTION_FUNCTIONS", {"my_flash": flash})
    with attention_module("my_flash") as module:
        duals = [dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        found, _ = tangent_attention(module, *duals, mask[:, 0, 0].long(), scaling=SCALE, sliding_window=window)
        tangent = split(found)[1]
    assert tangent is not None
    assert_equal(tangent, expected)


def test_a_flash_kernel_slides_its_window_for_a_single_query(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(queries=1, keys=9, causal=True, offset=8, window=3)
    primals, tangents = dual_qkv(1, 9)
    bias, seen = bias_of(case, None)

    def run(*qkv: Tensor) -> Tensor:
        return reference(case, *qkv, bias, seen, None)

    def flash(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return run(q, k, v).transpose(1, 2), None

    expected = jvp(run, tuple(primals), tuple(tangents))[1].transpose(1, 2)
    monkeypatch.setattr(dispatch, "ALL_ATTENTION_FUNCTIONS", {"my_flash": flash})
    with attention_module("my_flash") as module:
        duals = [dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        tangent = split(tangent_attention(module, *duals, None, scaling=SCALE, sliding_window=3)[0])[1]
        with pytest.raises(NotImplementedError, match="both directions within a sliding window of 3"):
            tangent_attention(module, *duals, None, is_causal=False, sliding_window=3)
    assert tangent is not None
    assert_equal(tangent, expected)


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
BOUNDARIES = torch.tensor([0, 3, 7])


@pytest.mark.parametrize(
    ("chosen", "hints", "refused"),
    [
        ("my_flash", {"position_ids": POSITIONS}, True),
        ("my_kernel", {"position_ids": POSITIONS}, True),
        ("sdpa", {"position_ids": POSITIONS}, False),  # this kernel does not read them
        ("my_flash", {"position_ids": torch.arange(QUERIES)[None]}, False),
        ("my_flash", {"cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": BOUNDARIES}, True),
        ("sdpa", {"cache": object()}, True),
    ],
)
def test_packed_rows_and_paged_caches_are_refused(
    chosen: str, hints: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return query.transpose(1, 2), None

    monkeypatch.setattr(dispatch, "ALL_ATTENTION_FUNCTIONS", {chosen: kernel})
    primals, tangents = dual_qkv()
    with attention_module(chosen) as module:
        duals = [dual(x[:1], t[:1]) for x, t in zip(primals, tangents, strict=True)]
        if refused:
            with pytest.raises(NotImplementedError, match=r"padding_free=False|generate_batch"):
                tangent_attention(module, *duals, None, **hints)
        else:
            tangent_attention(module, *duals, None, **hints)
        plain = [x[:1] for x in primals]  # without a tangent it is the kernel's affair
        assert torch.equal(tangent_attention(module, *plain, None, **hints)[0], plain[0].transpose(1, 2))


def test_the_primal_is_bit_for_bit_the_kernels(module: nn.Module) -> None:
    primals, tangents = dual_qkv()
    duals = [dual(x, t) for x, t in zip(primals, tangents, strict=True)]
    expected = sdpa_attention_forward(module, *primals, None)[0]
    assert torch.equal(split(tangent_attention(module, *duals, None)[0])[0], expected)
    plain, _ = tangent_attention(module, *primals, None)
    assert split(plain)[1] is None and torch.equal(plain, expected)


def test_default_scale(module: nn.Module) -> None:
    primals, tangents = dual_qkv()
    duals = [dual(x, t) for x, t in zip(primals, tangents, strict=True)]
    implicit = split(tangent_attention(module, *duals, None)[0])[1]
    explicit = split(tangent_attention(module, *duals, None, scaling=SIZE**-0.5)[0])[1]
    assert implicit is not None and explicit is not None and torch.equal(implicit, explicit)


def test_what_is_not_implemented_raises(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    primals, tangents = dual_qkv()
    duals = [dual(x, t) for x, t in zip(primals, tangents, strict=True)]
    with pytest.raises(ValueError, match=r"dropout 0\.1.*attention_dropout=0"):
        tangent_attention(module, *duals, None, dropout=0.1)
    accepts_all = {"sdpa": lambda module, q, *_, **__: (q.transpose(1, 2), None)}
    monkeypatch.setattr(dispatch, "ALL_ATTENTION_FUNCTIONS", accepts_all)
    with pytest.raises(NotImplementedError, match=r"SimpleNamespace.*attn_implementation='sdpa'"):
        tangent_attention(module, *duals, SimpleNamespace())
    bias = torch.zeros(1, HEADS, QUERIES, QUERIES, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"position bias of Module carries a tangent.*target_modules"):
        tangent_attention(module, *duals, None, position_bias=dual(bias, torch.ones_like(bias)))
    running = current_pass()
    assert running is not None
    running.primal_attention[id(module.config)] = "flash_attention_2"
    monkeypatch.setattr(dispatch, "ALL_ATTENTION_FUNCTIONS", {"flash_attention_2": accepts_all["sdpa"]})
    with pytest.raises(NotImplementedError, match=r"learned position bias.*'sdpa' and 'eager'"):
        tangent_attention(module, *duals, None, position_bias=bias)


@pytest.mark.parametrize("case", [Case(causal=True), Case(), Case(mask="bool"), Case(mask="additive per head")])
def test_a_position_bias_is_an_additive_mask(case: Case) -> None:
    primals, tangents = dual_qkv()
    mask, learned = make_mask(case), random(1, HEADS, QUERIES, QUERIES)
    bias, seen = bias_of(case, mask)
    expected = jvp(lambda *qkv: reference(case, *qkv, bias + learned, seen, None), tuple(primals), tuple(tangents))
    with attention_module() as module:
        duals = [dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        options = {"is_causal": case.causal, "scaling": SCALE, "position_bias": learned}
        out, tangent = split(tangent_attention(module, *duals, mask, **options)[0])
    assert tangent is not None
    assert_equal(out, expected[0].transpose(1, 2))
    assert_equal(tangent, expected[1].transpose(1, 2))


# ---- in a model --------------------------------------------------------------------------------------------


def test_the_users_implementation_serves_the_primal(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def counting(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(split(query)[1] is None)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("counting", counting)
    AttentionMaskInterface.register("counting", sdpa_mask)
    try:
        inputs = batch("left")
        model = tangent_model("llama")
        expected = model(**inputs).logits
        model.get_base_model().set_attn_implementation("counting")
        assert torch.equal(model(**inputs).logits, expected)
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            del interface._global_mapping["counting"]
    assert seen == [True] * 3  # every layer, once, without its tangent


def implementation(model: nn.Module) -> str:
    return model.get_base_model().config._attn_implementation


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_the_config_is_restored(chosen: str) -> None:
    model = tangent_model("llama")
    base = model.get_base_model()
    base.set_attn_implementation(chosen)
    inside = []
    base.model.layers[0].register_forward_hook(lambda *_: inside.append(implementation(model)))
    model(**batch())
    assert inside == ["eager" if chosen == "eager" else NAME]
    assert implementation(model) == chosen

    def fail(*_: Any) -> None:
        raise KeyError("inside")

    handle = base.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="inside"):
        model(**batch())
    assert implementation(model) == chosen
    handle.remove()
    model(**batch())


def test_outside_of_a_pass_it_refuses() -> None:
    base = build("llama")
    base.config._attn_implementation_internal = NAME
    assert NAME in ALL_ATTENTION_FUNCTIONS
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        base(**batch())


def test_paged_attention_is_refused() -> None:
    model = tangent_model("llama")
    expected = model(**batch()).logits
    model.get_base_model().config._attn_implementation_internal = "paged|eager"
    with pytest.raises(NotImplementedError, match=r"paged\|eager.*generate_batch"):
        model(**batch())
    model.get_base_model().set_attn_implementation("sdpa")
    assert torch.equal(model(**batch()).logits, expected)


def test_attention_dropout_in_training() -> None:
    base = build("llama")
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = get_peft_model(base, config())
    with pytest.raises(ValueError, match="attention_dropout"):
        model.train()(**batch())
    model.eval()(**batch())


@pytest.mark.parametrize("side", ["left", "right"])
def test_soft_capped_model_equals_eager(side: str) -> None:
    """Gemma 2: soft-cap and alternating windows. Eager differentiates itself; the rule must agree."""
    torch.manual_seed(0)
    settings = Gemma2Config(
        **TINY,
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=4,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=None,
    )
    model = get_peft_model(enlarge(Gemma2ForCausalLM(settings)), config()).eval()
    inputs, found = batch(side), []
    AttentionInterface.register("capped", _soft_capped)
    AttentionMaskInterface.register("capped", sdpa_mask)
    try:
        for chosen in ("eager", "capped"):
            model.get_base_model().set_attn_implementation(chosen)
            model.zero_grad()
            logits = model(**inputs).logits * inputs["attention_mask"][..., None]
            logits.square().mean().backward()
            found.append([logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            del interface._global_mapping["capped"]
    for right, left in zip(*found, strict=True):
        assert_equal(left, right)


def _soft_capped(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """A kernel with a soft-cap, as flash attention has, and with no derivative in forward mode."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    cap = kwargs["softcap"]
    scores = cap * torch.tanh(q @ k.mT * kwargs["scaling"] / cap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:]).tril().bool()
    weights = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), -1)
    return (weights @ v).transpose(1, 2), None
