"""Two processes train what one does, at the same global batch, on every engine: DDP, ZeRO-1/2/3, FSDP2.

Each engine is launched once, by `accelerate launch` with the packaged configuration; pytest's processes share the runs
through files. `pytest -rP tests/train/test_distributed.py` shows the deviations that docs/distributed.md quotes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from distributed_worker import FORMS, STEPS, THOROUGH, run_case
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from tolerances import relative_error

from tangent_peft.cli.train_options import packaged_recipes


pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]

EVERY = ["shared-replay", "shared-recorded", "dense-replay", "dense-recorded"]
CASES: dict[str, list[str]] = {
    "ddp": EVERY,
    "zero1": ["shared-replay"],
    "zero2": EVERY,
    "zero3": [*EVERY, "trained-replay"],
    "zero3_offload": ["shared-replay"],
    "fsdp2": [*EVERY, "trained-replay"],
}
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}
TOLERANCE = 1e-4
TIMEOUT_S = 400
END_S = 60  # from the death of one process to the end of the job
WORKER = Path(__file__).parents[1] / "distributed_worker.py"

each_engine = pytest.mark.parametrize("engine", list(CASES))
each_run = pytest.mark.parametrize(("engine", "case"), [(e, c) for e, cases in CASES.items() for c in cases])


@dataclass(frozen=True)
class Job:
    """One launch: its exit status, what it printed, and when it ended."""

    status: int
    output: str
    ended: float


# ---- running them ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any, worker_id: str, tokenizer: Any, pairs: Any) -> Path:
    """The base model, the pairs, and the reference: every case in one process."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared if worker_id == "master" else shared.parent) / "distributed"
    with FileLock(f"{shared}.lock"):
        if not (shared / "single" / "finished").exists():
            build("llama").save_pretrained(shared / "base")
            tokenizer.save_pretrained(shared / "base")
            (shared / "pairs.json").write_text(json.dumps(pairs))
            for case in sorted({case for cases in CASES.values() for case in cases}):
                run_case(shared, "single", case)
            (shared / "single" / "finished").touch()
    return shared


@pytest.fixture(scope="session")
def launched(folder: Path) -> Callable[[str], Job]:
    """Launches an engine, or reads what the launch gave."""

    def launch(engine: str) -> Job:
        saved = folder / f"{engine}.json"
        with FileLock(f"{saved}.lock"):
            if not saved.exists():
                saved.write_text(json.dumps(vars(_launch(folder, engine))))
        return Job(**json.loads(saved.read_text()))

    return launch


def _launch(folder: Path, engine: str) -> Job:
    spec = folder / f"{engine}.spec.json"
    spec.write_text(
        json.dumps({"folder": str(folder), "engine": engine, "cases": CASES[engine], "killed": len(CASES[engine]) > 1})
    )
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(packaged_recipes("accelerate")[engine])]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(_free_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    log = folder / f"{engine}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, str(WORKER), str(spec)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(TIMEOUT_S)
        finally:  # also those that outlived the launcher
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return Job(status, log.read_text(errors="replace")[-6000:], time.time())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _finished(launched: Callable[[str], Job], folder: Path, engine: str) -> Path:
    job = launched(engine)
    assert (folder / engine / "finished").exists(), job.output
    return folder / engine


def _result(folder: Path, engine: str, case: str) -> dict[str, Any]:
    return json.loads((folder / engine / case / "result.json").read_text())


def _curve(logs: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.tensor([entry[name] for entry in logs if name in entry and "loss" in entry], dtype=torch.float64)


def _adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def _distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all tensors of an adapter."""
    assert found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
    square = sum(float((found[name].double() - tensor.double()).square().sum()) for name, tensor in expected.items())
    size = sum(float(tensor.double().square().sum()) for tensor in expected.values())
    return (square / size) ** 0.5


# ---- what they must give ---------------------------------------------------------------------------------------------


@each_run
def test_trains_as_one_process_does(engine: str, case: str, launched: Any, folder: Path) -> None:
    _finished(launched, folder, engine)
    found, expected = (_result(folder, name, case) for name in (engine, "single"))
    assert found["engine"] == WRAPPERS.get(engine, "DeepSpeedEngine")
    curve, reference = (_curve(result["logs"], "loss") for result in (found, expected))
    assert len(curve) == STEPS
    assert float(reference[0] - reference[-1]) > 0.1  # something was learned
    loss = float((curve - reference).abs().max())
    adapter = _distance(*(_adapter(folder / name / case) for name in (engine, "single")))
    sys.stdout.write(f"DEVIATION {engine} {case}: loss {loss:.1e}, adapter {adapter:.1e}\n")  # shown by `pytest -rP`
    assert loss < TOLERANCE
    assert adapter < TOLERANCE
    for name in ("norm/default", "kl/default", "rewards/margins", "grad_norm"):
        assert relative_error(_curve(found["logs"], name), _curve(expected["logs"], name)) < 10 * TOLERANCE, name
    checks = [entry["adjoint_error/default"] for entry in found["logs"] if "adjoint_error/default" in entry]
    assert len(checks) == 3
    assert max(checks) < TOLERANCE


@each_engine
def test_metrics_of_all_processes_are_those_of_one(engine: str, launched: Any, folder: Path) -> None:
    _finished(launched, folder, engine)
    found, expected = (_result(folder, name, THOROUGH) for name in (engine, "single"))
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_kl/default"):
        assert abs(found["evaluation"][name] - expected["evaluation"][name]) < TOLERANCE, name
    gaps = [_curve(result["logs"], "linearity_gap/default") for result in (found, expected)]
    assert len(gaps[0]) == len(gaps[1]) == 1
    assert relative_error(*gaps) < 10 * TOLERANCE


@each_engine
def test_projections_are_the_same_in_every_process(engine: str, launched: Any, folder: Path) -> None:
    _finished(launched, folder, engine)
    found = _result(folder, engine, THOROUGH)["projections"]
    assert found == 2 * _result(folder, "single", THOROUGH)["projections"]


@each_engine
def test_resumes(engine: str, launched: Any, folder: Path) -> None:
    resumed = _finished(launched, folder, engine) / "resumed"
    assert _distance(_adapter(resumed), _adapter(folder / "single" / THOROUGH)) < TOLERANCE


@each_engine
def test_adapter_loads_in_a_plain_process(engine: str, launched: Any, folder: Path) -> None:
    _finished(launched, folder, engine)
    ids = torch.arange(3, 13)[None]
    logits = []
    for name in (engine, "single"):
        model = PeftModel.from_pretrained(build("llama"), folder / name / THOROUGH).eval()
        logits.append(model(input_ids=ids).logits.detach())
        assert model.peft_config["default"].base_fingerprint is not None
    assert relative_error(*logits) < TOLERANCE


@pytest.mark.parametrize("engine", [engine for engine, cases in CASES.items() if len(cases) > 1])
def test_killing_one_process_ends_the_job(engine: str, launched: Any, folder: Path) -> None:
    job = launched(engine)
    killed = float((_finished(launched, folder, engine) / "killed").read_text())
    assert job.status != 0
    assert "SIGKILL" in job.output or "exitcode  : -9" in job.output
    assert job.ended - killed < END_S


@pytest.mark.parametrize("engine", [engine for engine, cases in CASES.items() if len(cases) == 1])
def test_ends_well(engine: str, launched: Any) -> None:
    job = launched(engine)
    assert job.status == 0, job.output


def test_every_packaged_configuration_is_run() -> None:
    assert set(CASES) == set(packaged_recipes("accelerate"))
    assert {case.split("-")[0] for cases in CASES.values() for case in cases} == set(FORMS)
