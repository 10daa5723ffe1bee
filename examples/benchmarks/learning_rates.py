"""Which learning rate makes an axis learn, by form of τ: the experiment behind `TangentDPOConfig`'s defaults.

Trains one axis of SmolLM2-135M-Instruct on the packaged pairs for a few steps at every rate and measures, on held-out
pairs, how often the chosen answer gained more than the rejected one, linearized and merged, and the linearity gap.

Run as: python examples/benchmarks/learning_rates.py
Prints one JSON line per run and one that names the best rate of each form; about a minute and a half per run on a core.
"""

from __future__ import annotations

import argparse
import json
import tempfile

import torch
from datasets import Dataset
from peft import get_peft_model

from tangent_peft import TangentConfig, TangentDPOConfig, TangentDPOTrainer
from tangent_peft.cli.smollm2 import load_smollm2, quickstart_pairs
from tangent_peft.diagnose import linearity_gap
from tangent_peft.evaluate.preferences import pair_logps, preference_accuracy


FORMS = {
    "dense": ({}, (1e-5, 5e-5)),
    "shared": ({"r": 16}, (5e-4, 2e-3)),
    "trained": ({"r": 16, "projection": "trained"}, (5e-4, 2e-3)),
}


def run(form: str, rate: float, axis: str, steps: int, pairs: int) -> dict[str, object]:
    """Trains one axis at one rate and measures it on `pairs` held-out pairs."""
    base, tokenizer = load_smollm2()
    model = get_peft_model(base, TangentConfig(task_type="CAUSAL_LM", **FORMS[form][0]), adapter_name=axis)
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in quickstart_pairs(axis, "train")]
    with tempfile.TemporaryDirectory() as directory:
        args = TangentDPOConfig(
            output_dir=directory,
            axis=axis,
            learning_rate=rate,
            per_device_train_batch_size=4,
            max_steps=steps,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=2,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,  # there is memory to spare
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        trainer = TangentDPOTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
    heldout = quickstart_pairs(axis, "heldout")[:pairs]
    with model.axes({}):
        reference, lengths = pair_logps(model, tokenizer, heldout)
    result: dict[str, object] = {"form": form, "learning_rate": rate, "axis": axis, "steps": steps}
    for name, flag in (("linearized", True), ("merged", False)):
        with model.linearized(flag):
            logps, _ = pair_logps(model, tokenizer, heldout)
        accuracy = preference_accuracy(logps, reference, lengths)
        result[name] = {"reward_accuracy": round(accuracy.reward, 3), "margin": round(accuracy.margin, 2)}
    text = tokenizer.apply_chat_template([*heldout[0]["prompt"], *heldout[0]["chosen"]], tokenize=False)
    result["gap"] = round(linearity_gap(model, [tokenizer(text, return_tensors="pt", add_special_tokens=False)]).gap, 3)
    return result


def main() -> None:
    """Runs every form at every rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axis", choices=("help", "verb"), default="verb")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=8, help="held-out pairs")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    results = []
    for form in options.forms:
        for rate in FORMS[form][1]:
            results.append(run(form, rate, options.axis, options.steps, options.pairs))
            print(json.dumps(results[-1]), flush=True)
    best = {}
    for form in options.forms:
        runs = (result for result in results if result["form"] == form)
        best[form] = max(runs, key=lambda result: result["merged"]["reward_accuracy"])["learning_rate"]
    print(json.dumps({"largest_linearized_margin": best, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
