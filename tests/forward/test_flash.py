"""The fused kernel against the rule in plain PyTorch, option by option.

On a machine without a GPU the kernel runs in Triton's interpreter, in a process of its own: the interpreter has to be
chosen before Triton is imported. With a GPU the same tests run on it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import tangent_model
from conftest import batch
from tolerances import assert_equal, relative_error
from torch import Tensor

from tangent_peft.forward import flash
from tangent_peft.forward import sdpa as dispatch
from tangent_peft.forward.attention_rule import AttentionShape, tangent_by_chunks
from tangent_peft.forward.flash import can_flash, flash_tangent, use_flash_tangent


INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCH, HEADS, SCALE = 2, 4, 0.4

needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
runs_kernel = pytest.mark.skipif(
    not INSTALLED or not (INTERPRETED or GPU),
    reason="needs Triton, and a GPU or Triton's interpreter (`test_in_the_interpreter` runs it there)",
)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or GPU, reason="the tests below run by themselves")
def test_in_the_interpreter() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


# ---- against the rule ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way of attending; more queries and keys than fit into a block."""

    kv_heads: int = 2
    queries: int = 50
    keys: int = 50
    size: int = 24
    values: int | None = None
    causal: bool = False
    offset: int = 0
    window: int | None = None
    mask: str | None = None
    softcap: float | None = None
    sinks: bool = False


CASES = {
    "full": Case(),
    "no groups": Case(kv_heads=4),
    "one key head": Case(kv_heads=1),
    "causal": Case(causal=True),
    "causal, window": Case(causal=True, window=9),
    "a window that skips blocks of keys": Case(causal=True, queries=130, keys=130, window=20, kv_heads=4),
    "window of one": Case(causal=True, window=1),
    "bool mask": Case(mask="bool"),
    "bool mask per head": Case(mask="bool per head"),
    "bool mask for all rows of the batch": Case(mask="bool for all"),
    "additive mask": Case(mask="additive"),
    "additive mask per head": Case(mask="additive per head"),
    "additive mask that hides keys": Case(mask="additive, hidden"),
    "additive mask with the least number for rows": Case(mask="least"),
    "padding": Case(causal=True, mask="padding"),
    "padding on the left": Case(causal=True, mask="left"),
    "fully masked rows": Case(mask="some rows"),
    "soft-cap": Case(causal=True, softcap=1.5),
    "wide soft-cap": Case(softcap=50.0),
    "sinks": Case(causal=True, sinks=True),
    "sinks, rows masked": Case(mask="some rows", sinks=True),
    "sinks and soft-cap": Case(mask="bool", sinks=True, softcap=2.0),
    "sinks and window": Case(causal=True, window=7, sinks=True),
    "decoding": Case(queries=1),
    "decoding, mask": Case(queries=1, mask="bool", sinks=True),
    "decoding, window": Case(queries=1, causal=True, offset=49, window=5),
    "continuing": Case(queries=19, causal=True, offset=31),
    "continuing, window": Case(queries=19, causal=True, offset=31, window=13),
    "fewer keys than queries": Case(queries=40, keys=30, causal=True),
    "fewer keys, aligned at the end": Case(queries=40, keys=30, causal=True, offset=-10),
    "head size 16": Case(size=16, causal=True),
    "head size 80": Case(size=80, causal=True, queries=40, keys=40),
    "head size 96": Case(size=96, causal=True, queries=40, keys=40),
    "head size 128": Case(size=128, queries=40, keys=40),
    "head size 256": Case(size=256, causal=True, queries=20, keys=20),
    "smaller values": Case(size=48, values=20, causal=True),
}

HALF = (
    "causal",
    "a window that skips blocks of keys",
    "bool mask",
    "additive mask",
    "fully masked rows",
    "sinks and soft-cap",
    "decoding",
    "continuing, window",
    "head size 80",
    "head size 256",
    "smaller values",
)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def make_mask(case: Case) -> Tensor | None:
    rows, columns = case.queries, case.keys
    kind = case.mask
    if kind is None:
        return None
    heads, batch = HEADS if "head" in kind else 1, 1 if "all" in kind else BATCH
    if kind.startswith("bool"):
        return (torch.rand(batch, heads, rows, columns) < 0.6) | torch.eye(rows, columns).bool()
    if kind.startswith("additive"):
        mask = random(BATCH, heads, rows, columns)
        return mask.masked_fill(mask > 0.5, -torch.inf) if "hidden" in kind else mask
    if kind == "least":  # transformers' eager masks
        mask = torch.zeros(BATCH, 1, rows, columns)
        mask[0, :, :5] = torch.finfo(torch.float32).min
        return mask
    if kind == "some rows":
        mask = torch.ones(rows, columns).tril().bool().expand(BATCH, 1, rows, columns).clone()
        mask[0, :, :20] = False
        mask[1, :, 35:] = False
        return mask
    padding = torch.ones(BATCH, columns).bool()
    padding[1, -30:] = False
    return (padding.flip(-1) if kind == "left" else padding)[:, None, None]


@dataclass
class Call:
    """Arguments of `tangent_by_chunks`, in double precision."""

    primals: tuple[Tensor, ...]
    tangents: tuple[Tensor | None, ...]
    mask: Tensor | None
    sinks: Tensor | None
    shape: AttentionShape

    def run(self, rule: Any, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        def to(x: Tensor | None) -> Any:
            return None if x is None else x.to(device, dtype) if x.is_floating_point() else x.to(device)

        primals, tangents = tuple(map(to, self.primals)), tuple(map(to, self.tangents))
        with torch.no_grad():
            return rule(primals, tangents, to(self.mask), to(self.sinks), self.shape).cpu()


def make_call(case: Case, dtype: torch.dtype = torch.float32, which: tuple[bool, ...] = (True,) * 3) -> Call:
    """Numbers that `dtype` represents exactly; O is what the rule gives for dV = V alone."""
    torch.manual_seed(0)
    values = case.size if case.values is None else case.values
    shapes = (
        (HEADS, case.queries, case.size),
        (case.kv_heads, case.keys, case.size),
        (case.kv_heads, case.keys, values),
    )
    q, k, v = (random(BATCH, *s).to(dtype).double() for s in shapes)
    tangents = tuple(
        random(*x.shape).to(dtype).double() if has else None for x, has in zip((q, k, v), which, strict=True)
    )
    mask, sinks = make_mask(case), random(HEADS).to(dtype).double() if case.sinks else None
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype).clamp_min(torch.finfo(dtype).min) if case.mask == "least" else mask.to(dtype)
        mask = mask.double()
    shape = AttentionShape(SCALE, case.causal, case.offset, case.window, case.softcap)
    out = tangent_by_chunks((q, k, v, q), (None, None, v), mask, sinks, shape)
    return Call((q, k, v, out), tangents, mask, sinks, shape)


@pytest.fixture
def exact_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates to bfloat16, and multiplies its bit patterns (triton-lang/triton#11584)."""
    if not INTERPRETED:
        return
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert, multiply = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (bfloat16, float32):
            return x.astype("uint32") << 16
        if (source, target) == (float32, bfloat16):
            bits = x.view("uint32")
            return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("uint16")  # to nearest, ties to even
        return convert(x, source, target, mode)

    def widened(x: Any) -> Any:
        return interpreter.interpreter_builder.cast_impl(x, float32) if x.dtype == bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@runs_kernel
@pytest.mark.parametrize("name", CASES)
def test_equals_the_rule(name: str) -> None:
    call = make_call(CASES[name])
    found, expected = call.run(flash_tangent, torch.float32, DEVICE), call.run(tangent_by_chunks, torch.float64)
    assert found.dtype == torch.float32
    assert_equal(found, expected)


@runs_kernel
@pytest.mark.parametrize("which", [w for w in itertools.product([True, False], repeat=3) if any(w)])
def test_any_tangent_may_be_missing(which: tuple[bool, ...]) -> None:
    call = make_call(Case(causal=True, softcap=2.0, sinks=True), which=which)
    assert_equal(call.run(flash_tangent, torch.float32, DEVICE), call.run(tangent_by_chunks, torch.float64))


@runs_kernel
@pytest.mark.usefixtures("exact_bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HALF)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """At the numbers that the dtype represents: as close to the derivative as the rule in that dtype is."""
    call = make_call(CASES[name], dtype)
    found, expected = call.run(flash_tangent, dtype, DEVICE), call.run(tangent_by_chunks, torch.float64)
    by_rule = relative_error(call.run(tangent_by_chunks, dtype), expected)
    assert found.dtype == dtype
    assert_equal(found, expected, max(1.2 * by_rule, 5e-3 if dtype == torch.bfloat16 else 1e-3))


@runs_kernel
def test_a_query_that_sees_nothing_has_no_derivative() -> None:
    call = make_call(CASES["fully masked rows"])
    call.primals[3][0, :, :20] = torch.nan  # what some kernels give there
    found = call.run(flash_tangent, torch.float32, DEVICE)
    assert torch.equal(found[0, :, :20], torch.zeros_like(found[0, :, :20]))
    assert found.isfinite().all()


@runs_kernel
def test_any_layout_in_and_transformers_layout_out() -> None:
    call = make_call(Case(causal=True, mask="bool"))
    expected = call.run(tangent_by_chunks, torch.float64)

    def stranger(x: Tensor) -> Tensor:
        """A slice of something larger, in another order of axes."""
        larger = torch.full((x.shape[0], x.shape[2] + 3, x.shape[1], 2 * x.shape[3]), torch.nan, device=x.device)
        larger = larger.to(x.dtype)
        larger[:, 2:-1, :, ::2] = x.transpose(1, 2)
        return larger.transpose(1, 2)[:, :, 2:-1, ::2]

    def rule(primals: Any, tangents: Any, mask: Any, sinks: Any, shape: Any) -> Tensor:
        q, k, v, out = primals
        primals = (stranger(q), k.transpose(1, 2).contiguous().transpose(1, 2), stranger(v), stranger(out))
        wider = torch.zeros(*mask.shape[:3], mask.shape[3] + 5, dtype=torch.bool, device=mask.device)
        wider[..., : mask.shape[3]] = mask
        result = flash_tangent(primals, tuple(map(stranger, tangents)), wider[..., : mask.shape[3]], sinks, shape)
        assert result.transpose(1, 2).is_contiguous()
        return result

    assert_equal(call.run(rule, torch.float32, DEVICE), expected)


@runs_kernel
def test_tangents_that_autograd_knows_to_be_zero() -> None:
    """They have no memory that a kernel could read."""
    call = make_call(Case(causal=True), which=(False, True, False))
    zero = torch._efficientzerotensor(call.primals[0].shape, dtype=torch.float32, device=DEVICE)

    def rule(primals: Any, tangents: Any, *rest: Any) -> Tensor:
        return flash_tangent(primals, (zero, *tangents[1:]), *rest)

    assert_equal(call.run(rule, torch.float32, DEVICE), call.run(tangent_by_chunks, torch.float64))
    nothing = replace(call, tangents=(None, None, None)).run(rule, torch.float32, DEVICE)
    assert torch.equal(nothing, torch.zeros_like(nothing))


# ---- compiled for a GPU that is not there ----------------------------------------------------------------------------


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "memory"), [(86, 99), (90, 227)])  # KiB of shared memory per block
def test_compiles(capability: int, memory: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreter takes Python that the compiler does not."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    kernel, compiled = flash._kernel, []

    class Compiling:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

    class Absent:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return capability

        def get_current_stream(self, device: int) -> int:
            return 0

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(flash, "_kernel", Compiling())
    monkeypatch.setattr(driver, "_active", Absent())
    make_call(Case(causal=True, size=64)).run(flash_tangent, torch.bfloat16)
    make_call(Case(causal=True, window=9, sinks=True, softcap=2.0, size=128)).run(flash_tangent, torch.bfloat16)
    make_call(Case(mask="bool", queries=1, size=256), which=(True, False, True)).run(flash_tangent, torch.float16)
    make_call(Case(mask="additive"), which=(False, True, False)).run(flash_tangent, torch.float32)
    assert len(compiled) == 4 and all("cubin" in found.asm for found in compiled)
    assert all(found.metadata.shared <= memory * 1024 for found in compiled)


# ---- in a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that take the kernel's path from here on; where it can not run, the rule answers."""
    made: list[Any] = []
    answer = flash_tangent if INSTALLED and (INTERPRETED or GPU) else tangent_by_chunks

    def counted(*args: Any) -> Tensor:
        made.append(args)
        return answer(*args)

    monkeypatch.setattr(dispatch, "can_flash", lambda q, v: not torch.is_grad_enabled())
    monkeypatch.setattr(dispatch, "flash_tangent", counted)
    return made


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pass_that_records_nothing_uses_it(side: str, calls: list[Any]) -> None:
    model, inputs = tangent_model("llama").to(DEVICE), {k: v.to(DEVICE) for k, v in batch(side).items()}
    recorded = model(**inputs).logits.detach()
    assert not calls
    with torch.no_grad():
        assert_equal(model(**inputs).logits, recorded)
    assert len(calls) == 2  # the blocks with a tangent


def test_generation_and_the_replayed_gradient_use_it(calls: list[Any]) -> None:
    inputs, found = {k: v.to(DEVICE) for k, v in batch("left").items()}, []
    for gradient in ("replay", "recorded"):
        model = tangent_model("llama", gradient=gradient).to(DEVICE)
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        logits = model.train()(**inputs).logits
        logits.square().mean().backward()
        found.append([tokens.float(), logits, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert len(calls) == 2 * 5 + 2 * (gradient == "replay")
        calls.clear()
    for left, right in zip(*found, strict=True):
        assert_equal(left, right)


# ---- when it is used -------------------------------------------------------------------------------------------------


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if Triton and a GPU were there."""
    monkeypatch.setattr(flash, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with use_flash_tangent():
        yield


def tensor(size: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Any:
    return SimpleNamespace(shape=(1, 2, 3, size), dtype=dtype, device=torch.device(device))


@pytest.mark.usefixtures("switched_on")
def test_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_flash(tensor(), tensor())  # a pass that records
    with torch.no_grad():
        assert can_flash(tensor(), tensor())
        assert can_flash(tensor(256), tensor(128))
        assert can_flash(tensor(dtype=torch.float32), tensor())
        assert not can_flash(tensor(264), tensor())
        assert not can_flash(tensor(), tensor(264))
        assert not can_flash(tensor(128, torch.float32), tensor())
        assert not can_flash(tensor(dtype=torch.float64), tensor())
        assert not can_flash(tensor(device="cpu"), tensor())
        with use_flash_tangent(False):
            assert not can_flash(tensor(), tensor())
        assert can_flash(tensor(), tensor())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not can_flash(tensor(), tensor())


def test_it_is_off_until_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "triton", object())
    with torch.no_grad():
        assert not can_flash(tensor(), tensor())
        use_flash_tangent()
        try:
            assert can_flash(tensor(), tensor())
        finally:
            use_flash_tangent(False)
        assert not can_flash(tensor(), tensor())


def test_without_triton_it_can_not_be_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        use_flash_tangent()
    with use_flash_tangent(False), torch.no_grad():
        assert not can_flash(tensor(), tensor())
