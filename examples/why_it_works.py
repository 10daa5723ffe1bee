"""Claims of four papers, looked up in one small real model: TS-DPO, D-STEER, SPINAL, sequential DPO.

    python examples/why_it_works.py --data DATA --output why-it-works

Runs commands of this package one after the other, on a CPU, and prints each before it runs:

1. `tangent-peft quickstart` trains the axes help and verb of SmolLM2-135M-Instruct (`--axes` names trained ones)
2. `tangent-peft sequential` trains the same two objectives one after the other, in both orders, as ordinary LoRAs and
   as one tangent axis, with two seeds
3. `tangent-peft diagnose` looks at the two axes, and at what the sequences forgot
4. `tangent-peft diagnose` looks at an ordinary DPO checkpoint: the LoRA after its first stage

DATA is a folder with `dpo_en_demo.json` of LLaMA-Factory (Apache-2.0, github.com/hiyouga/LLaMA-Factory,
data/dpo_en_demo.json): hidden states are read on its prompts, which nothing here was trained on. A step whose output is
there is not run again. The reading of one such run is docs/experiments/why_it_works.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tangent_peft.cli.smollm2 import load_smollm2, smollm2_folder


MODEL = "SmolLM2-135M-Instruct"
PROMPTS = 96  # prompts that hidden states are read on
PROMPT_TOKENS = 96  # longer ones are left out
SEEDS = ("0", "1")
OBJECTIVE = "help"  # of the ordinary DPO checkpoint


def main() -> None:
    """Runs what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the prompts")
    parser.add_argument("--output", type=Path, default=Path("why-it-works"))
    parser.add_argument("--axes", type=Path, help="folder of trained axes help and verb (default: train them)")
    parser.add_argument("--publish", type=Path, help="copy reports and results into this folder as well")
    parser.add_argument("--processes", type=int, default=2, help="trainings side by side (default: %(default)s)")
    options = parser.parse_args()
    out: Path = options.output
    axes = options.axes or out / "quickstart" / "axes"
    if not axes.is_dir():
        run("quickstart", "--output", out / "quickstart")
    sequences = out / "sequential"
    if not (sequences / "result.json").is_file():
        places = ["--output", sequences, "--processes", str(options.processes)]
        run("sequential", "smollm2_cpu", *places, "--seeds", *SEEDS)
    told = ["--base", "smollm2", "--prompts", write_prompts(options.data, out / "prompts.jsonl")]
    if not (out / "axes-report").is_dir():
        also = ["--sequential", sequences / "result.json", "--title", "Axes help and verb of SmolLM2-135M"]
        run("diagnose", axes, *told, *also, "--report", out / "axes-report")
    if not (out / "dpo-report").is_dir():
        checkpoint = sequences / "seed-0" / f"lora_soup-{OBJECTIVE}"
        pairs = sequences / "pairs" / OBJECTIVE / "test.jsonl"
        also = ["--pairs", f"{OBJECTIVE}={pairs}", "--title", f"A LoRA trained by DPO on {OBJECTIVE}, SmolLM2-135M"]
        run("diagnose", checkpoint, *told, *also, "--report", out / "dpo-report")
    if options.publish is not None:
        publish(out, options.publish)


def run(*arguments: str | Path) -> None:
    """Prints a command of this package and runs it; its failure ends this program."""
    command = ["tangent-peft", *map(str, arguments)]
    print("$", shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", "tangent_peft.cli.main", *command[1:]], check=True)


def write_prompts(data: Path, path: Path) -> Path:
    """The first short prompts of the data set, as message lists."""
    _, tokenizer = load_smollm2()
    kept: list[Any] = []
    for messages in read_prompts(data):
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if messages not in kept and len(tokenizer(text)["input_ids"]) <= PROMPT_TOKENS:
            kept.append(messages)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept[:PROMPTS]), encoding="utf-8")
    return path


def read_prompts(data: Path) -> Sequence[Any]:
    """The prompts as message lists, as the data set is published, or prepared as `helpful_pairs.jsonl`."""
    prepared = data / "helpful_pairs.jsonl"
    if prepared.is_file():
        return [json.loads(line)["prompt"] for line in prepared.read_text(encoding="utf-8").split("\n") if line]
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    rows = json.loads((data / "dpo_en_demo.json").read_text(encoding="utf-8"))
    return [[{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]] for row in rows]


def publish(out: Path, target: Path) -> None:
    """Copies what a reader wants to see; folders of this machine are left out."""
    for name in ("axes-report", "dpo-report"):
        (target / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(out / name / "report.html", target / name / "report.html")  # holds its figures
        text = (out / name / "report.json").read_text(encoding="utf-8")
        (target / name / "report.json").write_text(text.replace(str(smollm2_folder()), MODEL), encoding="utf-8")
    shutil.copy(out / "sequential" / "report.md", target / "sequential.md")
    result = json.loads((out / "sequential" / "result.json").read_text(encoding="utf-8"))
    axes = {axis: f"pairs/{axis}" for axis in result["settings"]["axes"]}
    result["settings"] |= {"model": MODEL, "axes": axes, "output": "sequential"}
    (target / "sequential.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
