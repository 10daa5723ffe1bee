"""What no engine can do is refused by name before the first step; no process is started here."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from cases import config, tangent_model
from torch.distributed.fsdp import MixedPrecisionPolicy

from tangent_peft import TangentDPOConfig
from tangent_peft.train.engines import prepare_engine


def accelerator(kind: DistributedType, parallelism: Any = None, **plugin: Any) -> Any:
    """As much of an `Accelerator` as says which engine runs, and how."""
    sections = {name: plugin.pop(name) for name in list(plugin) if name.startswith("ds_")}
    fsdp = SimpleNamespace(
        **{"fsdp_version": 2, "activation_checkpointing": False, "mixed_precision_policy": None, **plugin}
    )
    deepspeed = SimpleNamespace(
        zero_stage=sections.pop("ds_stage", 3),
        transformer_moe_cls_names=sections.pop("ds_moe", None),
        deepspeed_config={name[3:]: value for name, value in sections.items()},
    )
    return SimpleNamespace(
        distributed_type=kind,
        parallelism_config=None if parallelism is None else SimpleNamespace(**parallelism),
        state=SimpleNamespace(deepspeed_plugin=deepspeed, fsdp_plugin=fsdp),
    )


def prepare(engine: Any, tmp_path: Path, axis: Any = None, model: Any = None, **options: Any) -> None:
    arguments = TangentDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)
    prepare_engine(engine, model or tangent_model(), axis or config(), arguments)


ZERO, FSDP, DDP = DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MULTI_GPU
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "zero3 hpz": (
        accelerator(ZERO, ds_zero_optimization={"zero_hpz_partition_size": 8}),
        {},
        "zero_hpz_partition_size",
    ),
    "zero3 quantized": (
        accelerator(ZERO, ds_zero_optimization={"zero_quantized_weights": True}),
        {},
        "zero_quantized_weights: True",
    ),
    "zero3 leaf modules": (accelerator(ZERO, ds_moe="MixtralSparseMoeBlock"), {}, "MixtralSparseMoeBlock"),
    "zero3 trunk cache": (accelerator(ZERO), {"trunk_cache": "cache"}, "`trunk_cache='cache'` with DeepSpeed ZeRO-3"),
    "zero3 saved modules": (accelerator(ZERO), {"axis": config(modules_to_save=["norm"])}, "modules_to_save=['norm']"),
    "zero2 tensor parallel": (
        accelerator(ZERO, ds_stage=2, ds_tensor_parallel={"autotp_size": 4}),
        {},
        "tensor_parallel.autotp_size: 4",
    ),
    "zero2 sequence parallel": (
        accelerator(ZERO, ds_stage=2, ds_sequence_parallel_size=2),
        {},
        "sequence_parallel_size",
    ),
    "zero2 deepcompile": (accelerator(ZERO, ds_stage=2, ds_compile={"deepcompile": True}), {}, "deepcompile"),
    "fsdp1": (accelerator(FSDP, fsdp_version=1), {}, "FSDP1 flattens.*Use FSDP2"),
    "fsdp2 checkpointing": (
        accelerator(FSDP, activation_checkpointing=True),
        {},
        "fsdp_activation_checkpointing.*gradient_checkpointing=True",
    ),
    "fsdp2 trunk cache": (accelerator(FSDP), {"trunk_cache": "cache"}, "with FSDP2"),
    "tensor parallel": (accelerator(FSDP, {"tp_size": 2}), {}, "parallelism_config_tp_size: 2.*tensor parallelism"),
    "context parallel": (accelerator(FSDP, {"cp_size": 4}), {}, "context parallelism"),
    "sequence parallel": (accelerator(DDP, {"sp_size": 4}), {}, "sequence parallelism"),
    "megatron": (accelerator(DistributedType.MEGATRON_LM), {}, "Megatron-LM"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    engine, options, message = REFUSED[name]
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern):
        prepare(engine, tmp_path, **options)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_quantized_base_is_refused_where_weights_are_sharded(engine: str, tmp_path: Path) -> None:
    model = tangent_model()
    model.get_base_model().hf_quantizer = SimpleNamespace()
    with pytest.raises(ValueError, match="A base quantized by SimpleNamespace"):
        prepare(accelerator({"zero3": ZERO, "fsdp2": FSDP}[engine]), tmp_path, model=model)


@pytest.mark.parametrize("engine", [ZERO, FSDP])
def test_tangents_that_no_module_call_gathers_are_refused_where_weights_are_sharded(
    engine: DistributedType, tmp_path: Path
) -> None:
    embedded = tangent_model(target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"'model.embed_tokens' \(TangentEmbedding\).*`target_modules`"):
        prepare(accelerator(engine), tmp_path, model=embedded)


ACCEPTED = {
    "ddp": accelerator(DDP, {"tp_size": 1, "cp_size": 1, "sp_size": None}),
    "zero1": accelerator(ZERO, ds_stage=1),
    "zero2": accelerator(ZERO, ds_stage=2, ds_zero_optimization={"zero_hpz_partition_size": 1}),
    "zero3": accelerator(ZERO, ds_zero_optimization={"zero_quantized_weights": False, "mics_shard_size": -1}),
    "fsdp2": accelerator(FSDP),
}


@pytest.mark.parametrize("name", list(ACCEPTED))
def test_what_works_is_accepted(name: str, tmp_path: Path) -> None:
    options = {} if name in ("zero3", "fsdp2") else {"trunk_cache": "cache", "axis": config(modules_to_save=["norm"])}
    prepare(ACCEPTED[name], tmp_path, linearity_gap_steps=5, **options)


def test_fsdp2_does_not_round_log_probs(tmp_path: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    engine = accelerator(FSDP, mixed_precision_policy=policy)
    prepare(engine, tmp_path)
    assert engine.state.fsdp_plugin.mixed_precision_policy == MixedPrecisionPolicy(param_dtype=torch.bfloat16)
