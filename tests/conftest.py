"""Fixtures: tiny models built from configs, a small tokenizer trained here, preference pairs. Nothing is downloaded."""

from __future__ import annotations

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CI", "1")  # TRL's usage telemetry stays off

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tangent_peft import TangentDPOConfig, TangentDPOTrainer  # registers the method


VOCABULARY = 300
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ["How do I boil an egg?", "Name a color.", "What is rain?", "Why do cats purr?", "Where is the sea?"]


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_llama(layers: int = 3, tied: bool = True, **options: Any) -> PreTrainedModel:
    """Llama with grouped queries and a tied head."""
    config = LlamaConfig(
        **TINY,
        num_hidden_layers=layers,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return LlamaForCausalLM(config)


def make_qwen3() -> PreTrainedModel:
    """Qwen3: norms on queries and keys, untied head."""
    config = Qwen3Config(
        **TINY, num_hidden_layers=3, head_dim=8, tie_word_embeddings=False, pad_token_id=0, eos_token_id=2
    )
    return Qwen3ForCausalLM(config)


def make_gpt2() -> PreTrainedModel:
    """GPT-2: Conv1D layers with biases, layer norms, learned positions, tied head."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=256, pad_token_id=0, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": make_llama, "qwen3": make_qwen3, "gpt2": make_gpt2}


def build(name: str) -> PreTrainedModel:
    """A fresh tiny model in eval mode, the same weights at every call; every weight is large enough to matter."""
    torch.manual_seed(0)
    return enlarge(MODELS[name]())


def enlarge(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode with larger matrices, and biases that are not zero."""
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "bias" in parameter_name:
                parameter.normal_(std=0.1)
            elif parameter.ndim == 2:
                parameter.mul_(5.0)
    return model.eval()


def batch(side: str = "right", rows: int = 3, length: int = 10) -> dict[str, torch.Tensor]:
    """Token ids with padding on the given side, none in the first row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        padded = slice(0, 2 * row) if side == "left" else slice(length - 2 * row, length)
        mask[row, padded] = 0
        ids[row, padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def tiny_llama() -> Callable[[], PreTrainedModel]:
    """Makes a fresh tiny Llama."""
    return lambda: build("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens with a ChatML template."""
    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(QUESTIONS * 4 + ["user assistant system"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, Any]]:
    """Conversational preference pairs: the polite answer is chosen."""
    answers = [("Gladly: it is simple.", "No."), ("Sure, of course.", "Why?"), ("With pleasure!", "Go away now.")]
    rows = []
    for index in range(8):
        question, (good, bad) = QUESTIONS[index % len(QUESTIONS)], answers[index % len(answers)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}],
            }
        )
    return rows


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


SHORT_RUN: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "beta": 0.5,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]) -> Callable[..., Any]:
    """Makes a trainer of three short steps on the tiny Llama; every argument can be replaced."""

    def make(
        model: Any = None, peft_config: Any = None, train_dataset: Any = None, extra: Any = None, **options: Any
    ) -> TangentDPOTrainer:
        arguments = {**SHORT_RUN, "output_dir": str(tmp_path / "run")}
        return TangentDPOTrainer(
            model=build("llama") if model is None else model,
            args=TangentDPOConfig(**{**arguments, **options}),
            train_dataset=Dataset.from_list(pairs) if train_dataset is None else train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            **(extra or {}),
        )

    return make
