"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import build
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from tangent_peft import TangentDPOConfig, TangentDPOTrainer


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, Any]]) -> Callable[..., Any]:
    """Makes a trainer of three short steps on the tiny Llama; every argument can be replaced."""

    def make(
        model: Any = None, peft_config: Any = None, train_dataset: Any = None, extra: Any = None, **options: Any
    ) -> TangentDPOTrainer:
        arguments = {
            "output_dir": str(tmp_path / "run"),
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
        return TangentDPOTrainer(
            model=build("llama") if model is None else model,
            args=TangentDPOConfig(**{**arguments, **options}),
            train_dataset=Dataset.from_list(pairs) if train_dataset is None else train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            **(extra or {}),
        )

    return make
