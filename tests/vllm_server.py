"""Runs vLLM, which lives in an environment of its own: an engine for one batch, or its OpenAI-compatible server.

The variable TANGENT_PEFT_VLLM_PYTHON names that environment's interpreter; `make test-vllm` sets it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


VARIABLE = "TANGENT_PEFT_VLLM_PYTHON"
START = 900.0  # seconds that an engine may take to start and answer, on a machine that is busy with other things

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
}

Answers = dict[str, list[dict[str, list[float]]]]


@dataclass(frozen=True)
class Engine:
    """A model, and LoRAs on it by name."""

    model: Path
    loras: dict[str, Path]

    def plain(self) -> dict[str, object]:
        return {"model": str(self.model), "loras": {name: str(path) for name, path in self.loras.items()}}


@dataclass(frozen=True)
class Vllm:
    """An interpreter with vLLM, and a folder for its caches, jobs and logs."""

    python: str
    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        roots = {f"VLLM_{name}_ROOT": str(self.folder / name.lower()) for name in ("CACHE", "CONFIG")}
        return {**kept, **roots, **SETTINGS, **more}

    def answers(self, engines: dict[str, Engine], prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Answers]:
        """Greedy tokens and their log-probs of every engine, its model (under "") and each of its LoRAs."""
        job, out = self.folder / "job.json", self.folder / "answers.json"
        content = {
            "engines": {name: engine.plain() for name, engine in engines.items()},
            "prompts": prompts,
            "tokens": tokens,
            "length": max(map(len, prompts)) + tokens,
            "max_lora_rank": 16,
            "out": str(out),
        }
        job.write_text(json.dumps(content), encoding="utf-8")
        worker = Path(__file__).with_name("vllm_worker.py")
        with self._process([str(worker), str(job)], VLLM_ENABLE_V1_MULTIPROCESSING="0") as (process, log):
            status = process.wait(timeout=START * len(engines))
            assert status == 0, f"vLLM ended with status {status}:\n{tail(log)}"
        answers: dict[str, Answers] = json.loads(out.read_text(encoding="utf-8"))
        return answers

    @contextmanager
    def server(self, model: Path, *flags: str, **environment: str) -> Iterator[Server]:
        """`vllm serve` on a free port of the loopback interface, until the block ends."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", *flags]
        with self._process(command, **environment) as (process, log):
            server = Server(f"http://127.0.0.1:{port}", log)
            deadline = time.monotonic() + START
            while not server.is_up():
                assert process.poll() is None, f"the server ended:\n{tail(log)}"
                assert time.monotonic() < deadline, f"no answer after {START:.0f} s:\n{tail(log)}"
                time.sleep(1.0)
            yield server

    @contextmanager
    def _process(self, arguments: list[str], **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """A process of vLLM in a group of its own, all of which is gone when the block ends."""
        log = self.folder / f"log-{len(list(self.folder.glob('log-*.txt')))}.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [self.python, *arguments],
                env=self.environment(**environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )
        try:
            yield process, log
        finally:
            if process.poll() is None:
                process.terminate()  # in order first
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Server:
    """A running server: its address, and what it writes."""

    url: str
    log: Path

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def ask(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Status and text of the answer to a POST."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(encoding="utf-8", errors="replace")[-6000:]
