"""vLLM engines, one after the other, in the interpreter of vLLM's own environment; knows neither torch nor PEFT.

    python tests/vllm_worker.py job.json

The job names for each engine a model and the LoRA folders by name, and for all of them the prompts as token ids. The
answers go to `job["out"]`: for each engine the greedy tokens of each prompt and their log-probs, of the model itself
(under "") and of every LoRA. All LoRAs of an engine are one batch. The model itself is asked apart from them: on a CPU,
vLLM 0.32 gives a row without a LoRA that of the last slot (docs/serving.md).
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


Answers = dict[str, list[dict[str, list[float]]]]


def answers(model: str, loras: dict[str, str], job: dict[str, Any]) -> Answers:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": True, "max_lora_rank": job["max_lora_rank"], "max_loras": len(loras)} if loras else {}
    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=job["length"], **options)
    sampling = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, logprobs=0)
    requests = {name: LoRARequest(name, number, loras[name]) for number, name in enumerate(loras, start=1)}
    found: Answers = {}
    for names in [[""], list(requests)]:
        rows = [(name, ids) for name in names for ids in job["prompts"]]
        if not rows:
            continue
        outputs = engine.generate(
            [{"prompt_token_ids": ids} for _, ids in rows],
            sampling,
            lora_request=[requests[name] for name, _ in rows] if names != [""] else None,
        )
        for (name, _), output in zip(rows, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            steps = zip(output.outputs[0].logprobs, tokens, strict=True)
            row = {"tokens": tokens, "logprobs": [step[token].logprob for step, token in steps]}
            found.setdefault(name, []).append(row)
    return found


def main(job: dict[str, Any]) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    found = {}
    for name, engine in job["engines"].items():
        found[name] = answers(engine["model"], engine["loras"], job)
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
