"""One variant in a process of its own, which runs a step when it is told to and measures it.

Memory on a CPU is the peak of resident memory during a step, less mapped files (libraries) and less what was resident
after the imports. The kernel keeps that peak and resets it on request, so short-lived tensors count. The C library
must give freed memory back at once for it to mean what PyTorch's allocator holds: workers that measure memory
run with `RETURN_FREED` in their environment. That costs page faults, so timing has workers of its own without it.
"""

from __future__ import annotations

import gc
import math
import os
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils.logging import disable_progress_bar

from step.setting import Setting, prepare


RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run_worker(connection: Connection, setting: Setting, variant: str) -> None:
    """Body of the process: builds the variant, then answers "time", "memory", "flops" until "stop".

    Answers are ("done", value) or ("failed", traceback).
    """
    os.dup2(2, 1)  # standard output belongs to the result
    disable_progress_bar()
    try:
        if variant == "prepare":
            connection.send(("done", prepare(setting)))
            return
        from step.variants import run_variant

        _touch_kernels()
        before = _resident()
        run_variant(variant, setting, lambda step: _serve(connection, step, setting.device, before))
    except Exception:
        connection.send(("failed", traceback.format_exc()))


def _serve(connection: Connection, step: Any, device: str, before: int) -> None:
    step()  # the optimizer's state comes with the first step
    connection.send(("done", step()))
    measures = {
        "time": lambda: _seconds(step, device),
        "memory": lambda: _peak_bytes(step, device, before),
        "flops": lambda: _operations(step),
    }
    while (command := connection.recv()) != "stop":
        connection.send(("done", measures[command]()))


# ---- time ------------------------------------------------------------------------------------------------------------


def _seconds(step: Any, device: str) -> float:
    """Wall time of one step."""
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- memory ----------------------------------------------------------------------------------------------------------


def _peak_bytes(step: Any, device: str, before: int) -> int:
    """Most bytes held at once during a step: weights, optimizer state, gradients, activations, workspaces."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        _wait(device)
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    step()
    return _status("VmHWM") - _status("RssFile") - _status("RssShmem") - before


def _resident() -> int:
    """Anonymous resident bytes of this process."""
    gc.collect()
    return _status("RssAnon")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; memory on a CPU is measured on Linux only.")


def _touch_kernels() -> None:
    """Lets the math libraries allocate what they keep."""
    x = torch.randn(1, 4, 256, 64, requires_grad=True)
    F.scaled_dot_product_attention(x, x, x, is_causal=True).square().sum().backward()
    torch.randn(512, 512) @ torch.randn(512, 512)


# ---- operations ------------------------------------------------------------------------------------------------------


def _operations(step: Any) -> int:
    """Floating-point operations of all matrix products of a step, two per multiply-add."""
    with FlopCounterMode(display=False, custom_mapping=_MISSING) as counter:
        step()
    return counter.get_total_flops()


def _attention(query: torch.Size, key: torch.Size, *args: Any, **kwargs: Any) -> int:
    """QKᵀ and PV; like PyTorch's own formulas it does not know that a causal kernel skips about half."""
    return 4 * math.prod(query) * key[2]


def _attention_backward(grad: torch.Size, query: torch.Size, key: torch.Size, *args: Any, **kwargs: Any) -> int:
    """QKᵀ anew, then the gradients of P, V, Q and K."""
    return 5 * _attention(query, key) // 2


def _addmm_in_place(total: torch.Size, left: torch.Size, right: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(left) * right[1]


# What PyTorch's registry lacks: attention on a CPU, and the product in place of TRL's head.
_MISSING = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _addmm_in_place,
}
