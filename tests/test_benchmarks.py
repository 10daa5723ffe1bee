"""The benchmark of training steps runs, and its count of operations agrees with the formula."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "train_step.py"


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
