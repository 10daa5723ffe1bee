"""What every export is for: stock PEFT and plain transformers, in a process that never imports this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import config
from conftest import MODELS, build, make_llama
from exports import INPUTS, WEIGHTS, at_weights
from moe import build_moe
from peft import get_peft_model
from transformers import PreTrainedModel


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The (head|input embedding) .*is tied to the"),
]
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "num_layers": 1}

CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], dict[str, Any]]] = {
    "llama": (lambda: build("llama"), {}, {}),
    "llama, blocks alone": (lambda: build("llama"), {"lm_head": False}, {"server": "vllm"}),
    "llama, head in a base": (lambda: build("llama"), {}, {"head": "merge", "server": "vllm"}),
    "llama, embedding in a base": (lambda: build("llama"), EMBEDDING, {"head": "merge"}),
    "untied": (lambda: build("untied"), {}, {"server": "llama.cpp"}),
    "untied, embedding": (lambda: build("untied"), EMBEDDING, {"server": "sglang"}),
    "qwen3": (lambda: build("qwen3"), {}, {"server": "vllm"}),
    "gpt2": (lambda: build("gpt2"), {}, {}),
    "gpt2, head in a base": (lambda: build("gpt2"), {}, {"head": "merge", "server": "vllm"}),
    "mixtral experts": (lambda: build_moe("mixtral"), EXPERTS, {"server": "vllm"}),
    "gpt-oss experts": (lambda: build_moe("gpt_oss"), EXPERTS, {}),
}

SCRIPT = """
import json, sys, warnings
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
case = torch.load(Path(sys.argv[1]) / "inputs.pt")
mask, found = case["inputs"]["attention_mask"].bool(), {}

def error(model):
    with torch.no_grad():
        logits = model.eval()(**case["inputs"]).logits
    return float((logits - expected)[mask].abs().max() / expected[mask].abs().max())

for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    expected = torch.load(folder / "expected.pt")
    base = folder / "lora" / "base" if (folder / "lora" / "base").exists() else folder / "base"
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "lora")
    assert lora.peft_config["default"].peft_type == "LORA"
    found[folder.name] = {"lora": error(lora)}
    if (folder / "mergeable").exists():
        found[folder.name]["lora, merged by PEFT"] = error(lora.merge_and_unload())
    model, info = AutoModelForCausalLM.from_pretrained(folder / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    found[folder.name]["merged"] = error(model)
assert not any(name.startswith("tangent_peft") for name in sys.modules)
print(json.dumps(found))
"""


def write_case(folder: Path, case: str) -> None:
    """The base, the LoRA and the merged model of a case, and the logits of its mix."""
    build_base, options, how = CASES[case]
    build_base().save_pretrained(folder / "base")
    model = get_peft_model(build_base(), config("shared", **options), adapter_name="help").eval()
    model.add_adapter("verb", config("trained", **options))
    torch.save(at_weights(model, WEIGHTS), folder / "expected.pt")
    export = model.export_lora(folder / "lora", WEIGHTS, calibration=False, **how)
    assert export.relative_error == 0.0
    model.export_merged(folder / "merged", WEIGHTS, calibration=False)
    if export.head != "kept" or not model.get_base_model().config.tie_word_embeddings:
        (folder / "mergeable").touch()


def test_exports_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "untied", lambda: make_llama(tied=False))
    torch.save({"inputs": INPUTS}, tmp_path / "inputs.pt")
    for case in CASES:
        write_case(tmp_path / case, case)
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert set(found) == set(CASES)
    wrong = {case: errors for case, errors in found.items() if max(errors.values()) > 1e-5}
    assert not wrong, wrong
    assert sum("lora, merged by PEFT" in errors for errors in found.values()) == len(CASES) - 2  # the tied heads
