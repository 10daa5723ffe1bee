"""The benchmarks run; the count of operations of a training step agrees with the formula."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
SCRIPT = FOLDER / "train_step.py"


@pytest.mark.slow
@pytest.mark.parametrize("comparison", ["low_rank_vs_lora", "replay_vs_recorded"])
def test_train_step(comparison: str) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--rounds", "2", "--only", comparison]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {"time", "spread", "memory", "flops"} <= found[comparison].keys()
    for variant, counted in found["flops_formula"].items():
        assert counted["predicted_over_counted"] == pytest.approx(1.0, abs=0.05), variant


@pytest.mark.slow
def test_generation() -> None:
    options = ["--tiny", "--rank", "4", "--layers", "2", "--rounds", "2", "--new", "4", "--clock", "cpu"]
    command = [sys.executable, str(FOLDER / "generation.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])  # DeepSpeed's import may log a line before
    assert {"base", "linearized", "weights", "merged", "unloaded", "exported", "exported_lora"} <= found.keys()
    assert found["linearized"]["ratio"] > 0 and found["linearized"]["prefill"]["ratio"] > 0
