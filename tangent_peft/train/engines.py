"""What the distributed engines can not do with a linearized model, said by name before the first step.

What they can is in docs/distributed.md, with the measurements. Seam: the plugins on accelerate's state.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch.distributed.tensor import DTensor

from tangent_peft.train.config import TangentDPOConfig
from tangent_peft.tuner import TangentConfig, TangentEmbedding, TangentExperts


# Options of `zero_optimization` at stage 3: what the value means when it is on, and what to do.
_ZERO3 = {
    "zero_hpz_partition_size": "ZeRO++'s second partition of the weights",
    "zero_quantized_weights": "ZeRO++'s quantized gathering, which changes the base",
    "zero_quantized_nontrainable_weights": "ZeRO++'s quantized gathering, which changes the base",
    "zero_quantized_gradients": "ZeRO++'s quantized gradients",
    "zenflow": "ZenFlow, which transposes the weights",
    "mics_shard_size": "MiCS, which has hooks of its own",
    "stage3_module_granularity_threshold": "leaf modules, whose inner layers get no hooks",
}
_OFF: tuple[Any, ...] = (None, 0, -1, 1, False, "none", {})


def prepare_engine(accelerator: Accelerator, model: PeftModel, config: TangentConfig, args: TangentDPOConfig) -> None:
    """Refuses what does not work, and lets FSDP2 leave a model's outputs in their dtype.

    Args:
        accelerator: the trainer's.
        model: the model that will be trained, as it is before the engine takes it.
        config: the axis that trains.
        args: the training arguments.

    Raises:
        ValueError: naming the engine, the option, the value found and the remedy.
    """
    for problem in _problems(accelerator, model, config, args):
        raise ValueError(problem)
    if accelerator.distributed_type == DistributedType.FSDP:
        _keep_output_dtype(accelerator.state.fsdp_plugin)


def _problems(accelerator: Any, model: PeftModel, config: TangentConfig, args: TangentDPOConfig) -> Iterator[str]:
    """What must be refused, most general first."""
    kind = accelerator.distributed_type
    yield from _other_parallelism(accelerator, model)
    if kind == DistributedType.DEEPSPEED:
        deepspeed = accelerator.state.deepspeed_plugin
        yield from _deepspeed_problems(deepspeed.deepspeed_config, deepspeed.zero_stage)
        if deepspeed.zero_stage == 3:
            names = deepspeed.transformer_moe_cls_names or os.environ.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES")
            if names:
                yield _ZERO3_REFUSED.format("deepspeed_moe_layer_cls_names", names)
            yield from _sharded_problems("DeepSpeed ZeRO-3", model, config, args)
    if kind == DistributedType.FSDP:
        fsdp = accelerator.state.fsdp_plugin
        if fsdp.fsdp_version != 2:
            yield (
                f"`fsdp_version: {fsdp.fsdp_version}`: FSDP1 flattens base and tangents into one parameter. Use FSDP2: "
                "`fsdp_version: 2`, as in the packaged `fsdp2` (`tangent-peft recipes fsdp2`)."
            )
        if fsdp.activation_checkpointing:
            yield (
                "`fsdp_activation_checkpointing: true` recomputes blocks outside of the dual level, where tangents are "
                "lost. Set it to false, and `gradient_checkpointing=True` in the training arguments: that replays them."
            )
        yield from _sharded_problems("FSDP2", model, config, args)


def _other_parallelism(accelerator: Any, model: PeftModel) -> Iterator[str]:
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        yield "Megatron-LM replaces the model by its own, which carries no tangents. Use DDP, DeepSpeed or FSDP2."
    parallelism = accelerator.parallelism_config
    sizes = {} if parallelism is None else {n: vars(parallelism).get(f"{n}_size") or 1 for n in ("tp", "cp", "sp")}
    for name, size in sizes.items():
        if size > 1:
            yield (
                f"`parallelism_config_{name}_size: {size}`: {_PARALLELISM[name]} parallelism is not supported for a "
                f"linearized model. Set it to 1 and shard the weights with FSDP2 or ZeRO-3 instead."
            )
    split = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if split is not None:
        yield (
            f"The weight {split!r} is a DTensor already: the model was loaded with tensor parallelism (`tp_plan`), "
            "which is not supported for a linearized model. Load it without, and shard it with FSDP2 or ZeRO-3."
        )


_PARALLELISM = {"tp": "tensor", "cp": "context", "sp": "sequence"}
_ZERO3_REFUSED = (
    "DeepSpeed ZeRO-3 with `{}: {}` is not supported for a linearized model. Leave it out, as the packaged `zero3` "
    "does (`tangent-peft recipes zero3`)."
)


def _deepspeed_problems(config: Mapping[str, Any], stage: int) -> Iterator[str]:
    tensor_parallel = config.get("tensor_parallel") or {}
    for option, size in (
        ("tensor_parallel.autotp_size", tensor_parallel.get("autotp_size", 1)),
        ("sequence_parallel_size", config.get("sequence_parallel_size", 1)),
    ):
        if isinstance(size, int) and size > 1:
            yield (
                f"DeepSpeed with `{option}: {size}`: tensor and sequence parallelism are not supported for a "
                "linearized model. Set it to 1 and shard the weights with ZeRO-3 instead."
            )
    if (config.get("compile") or {}).get("deepcompile"):
        yield "DeepSpeed with `compile.deepcompile: true` compiles the forward, which drops tangents. Set it to false."
    if stage != 3:
        return
    zero = config.get("zero_optimization") or {}
    for option, meaning in _ZERO3.items():
        if zero.get(option) is True or zero.get(option) not in _OFF:
            yield _ZERO3_REFUSED.format(option, f"{zero[option]} ({meaning})")


def _sharded_problems(engine: str, model: PeftModel, config: TangentConfig, args: TangentDPOConfig) -> Iterator[str]:
    base: Any = model.get_base_model()
    if args.trunk_cache is not None:
        yield (
            f"`trunk_cache={args.trunk_cache!r}` with {engine}: the cache is named by a hash of all weights below the "
            "first wrapped block, of which each process has a part. Train without it, or with DDP, ZeRO-1 or ZeRO-2."
        )
    if config.modules_to_save:
        yield (
            f"`modules_to_save={config.modules_to_save}` with {engine}: modules that train beside the tangents make "
            "the primal move, which is not tested on sharded weights. Leave it out, or use DDP, ZeRO-1 or ZeRO-2."
        )
    for layer in model.modules():
        if isinstance(layer, (TangentExperts, TangentEmbedding)):
            yield (
                f"A tangent on {layer.layer_name!r} ({type(layer).__name__}) with {engine}: its matrices are read "
                "outside of the calls that gather them. Leave it out of `target_parameters` or `target_modules`, or "
                "use DDP, ZeRO-1 or ZeRO-2."
            )
    quantizer = vars(base).get("hf_quantizer")
    if quantizer is not None:
        yield (
            f"A base quantized by {type(quantizer).__name__} with {engine}: packed weights can not be told from their "
            "parts. Use DDP, ZeRO-1 or ZeRO-2, which keep the whole (small) base on each GPU."
        )


def _keep_output_dtype(plugin: Any) -> None:
    """accelerate has FSDP2 round all outputs to bf16, log-probs among them, whose small differences make the loss."""
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)
