"""What a step costs on paper against real modules, counted operations, tensors that live, and a process's peak."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, build
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tangent_peft import TangentConfig
from tangent_peft.train.activations import kept
from tangent_peft.train.costs import ENGINES, SHARDED, Cluster, base_bytes, memory, tangent_entries
from tangent_peft.train.flops import step_operations
from tangent_peft.train.head import install_linearized_head
from tangent_peft.train.sizes import ModelSize, Workload, count_model, model_size
from tangent_peft.tuner import TangentLayer


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "plan_memory.py"
FORMS = {"dense": None, "low_rank": 4}
WIDE = {**TINY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "tie_word_embeddings": False}


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**TINY, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2))


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if "attn_dropout" in vars(module).get("_modules", {}):
            module.attn_dropout.p = 0.0
    return model


def model_of(name: str) -> Any:
    return mixtral() if name == "mixtral" else build(name)


def axis(rank: int | None = 4, layers: int | None = 2, **options: Any) -> TangentConfig:
    return TangentConfig(task_type="CAUSAL_LM", r=rank, num_layers=layers, **options)


def llama_size(rank: int | None = 4) -> ModelSize:
    return model_size(LlamaConfig(**WIDE), axis(rank))


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
def test_parameters_equal_those_of_the_real_model(name: str) -> None:
    model = model_of(name)
    for size in (model_size(model.config, axis()), count_model(model, axis())):
        assert size.parameters == sum(p.numel() for p in model.parameters())
        assert size.tied is bool(model.config.tie_word_embeddings)
        assert sum(b.parameters for b in size.blocks) + size.outside == size.parameters


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", [True, False])
def test_tangents_equal_those_of_the_wrapped_model(name: str, form: str, head: bool) -> None:
    rank, model = FORMS[form], model_of(name)
    size = model_size(model.config, axis(rank, lm_head=head))
    wrapped = get_peft_model(model, axis(rank, lm_head=head))
    layers = [m for m in wrapped.modules() if isinstance(m, TangentLayer)]
    assert tangent_entries(size, rank) == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    held = sum(a.numel() for layer in layers for a in layer.tangent_projection.values())
    assert sum(layer.projection(rank) for layer in size.wrapped) == held
    assert [layer.name for layer in size.wrapped] == [layer.layer_name for layer in layers]


def test_experts_count_where_they_are_asked_for() -> None:
    config = mixtral().config
    without, with_experts = (model_size(config, axis(layers=1), experts) for experts in (False, True))
    fused = [layer for layer in with_experts.wrapped if layer.experts > 1]
    assert len(with_experts.wrapped) == len(without.wrapped) + 2
    assert [(x.inputs, x.outputs, x.experts, x.active) for x in fused] == [(32, 96, 4, 2), (48, 32, 4, 2)]
    assert with_experts.blocks[-1].inner == 2 * 48 and with_experts.blocks[-1].gated


def test_a_plain_mlp_is_not_gated() -> None:
    block = count_model(build("gpt2"), axis()).blocks[-1]
    assert not block.gated and block.inner == 4 * 32


# ---- operations ------------------------------------------------------------------------------------------------------


def attention(query: torch.Size, key: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 4 * math.prod(query) * key[2]


def attention_backward(grad: torch.Size, query: torch.Size, key: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 5 * attention(query, key) // 2


ON_A_CPU = {  # PyTorch's table has the kernels of GPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def trained(model: Any, config: TangentConfig) -> Any:
    """A function that runs forward and backward as the trainer does, half of each row prompt."""
    add_fused_lm_head(model)
    model = get_peft_model(model, config).train()
    install_linearized_head(model.get_base_model())

    def step(ids: torch.Tensor) -> None:
        labels = ids.clone()
        labels[:, : ids.shape[1] // 2] = -100
        model(ids, labels=labels, fused_lm_head=True).loss.backward()

    return step


@pytest.mark.parametrize("gradient", ["recorded", "replay"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_operations_are_those_that_are_counted(name: str, form: str, gradient: Any) -> None:
    model, work = (
        without_dropout(build(name)),
        Workload(rank=FORMS[form], gradient=gradient, pairs=1, length=140, dtype="float32"),
    )
    size = count_model(model, axis(FORMS[form]))
    step = trained(model, axis(FORMS[form], gradient=gradient))
    with FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        step(torch.randint(3, 300, (2, 140)))
    assert step_operations(size, work) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_of_experts_those_count_that_serve_a_token() -> None:
    config = mixtral().config
    few, many = (model_size(MixtralConfig(**{**config.to_dict(), "num_local_experts": n}), axis()) for n in (4, 8))
    work = Workload(rank=4)
    router = 2 * 2 * work.tokens * (8 - 4) * 32  # in two blocks, recorded or replayed
    assert 0 < step_operations(many, work) - step_operations(few, work) < 6 * router


# ---- activations -----------------------------------------------------------------------------------------------------


class Living(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages and storage._cdata not in given:
                    self.storages[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.storages.pop, storage._cdata, None)
        return out

    def total(self) -> int:
        return sum(self.storages.values())


def living(model: Any, config: TangentConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes while the dual level is open, at the head, and after it is closed."""
    model = get_peft_model(model.to(dtype), config).train()
    seen = []
    head = model.get_base_model().get_output_embeddings()
    ids = torch.randint(3, 300, (2, 140))
    with Living() as alive:
        handle = head.register_forward_pre_hook(lambda *_: seen.append(alive.total()))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(ids, use_cache=False).logits
        handle.remove()
        seen.append(alive.total())
    del out
    return seen[0], seen[1]


@pytest.mark.parametrize(
    ("name", "form", "gradient", "dtype"),
    [
        ("llama", "dense", "recorded", torch.float32),
        ("llama", "low_rank", "recorded", torch.bfloat16),
        ("llama", "dense", "replay", torch.float32),
        ("qwen3", "dense", "recorded", torch.bfloat16),
        ("qwen3", "low_rank", "recorded", torch.float32),
    ],
)
def test_a_block_keeps_what_is_said(name: str, form: str, gradient: Any, dtype: torch.dtype) -> None:
    def make() -> Any:
        options = {**WIDE, "head_dim": 24}
        return LlamaForCausalLM(LlamaConfig(**options)) if name == "llama" else Qwen3ForCausalLM(Qwen3Config(**options))

    rank = FORMS[form]
    configs = [axis(rank, layers, lm_head=False, gradient=gradient) for layers in (2, 3)]
    counted = [living(make(), config, dtype) for config in configs]
    size = count_model(make(), configs[1])
    work = Workload(rank=rank, gradient=gradient, length=140, dtype=str(dtype).removeprefix("torch."))
    for is_open in (True, False):
        index = 0 if is_open else 1
        found = counted[1][index] - counted[0][index]
        assert kept(size, size.blocks[-1], work, is_open) == pytest.approx(found, rel=0.02), f"open: {is_open}"


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_sharding_divides_what_it_says() -> None:
    size, work = llama_size(), Workload(rank=4, length=64)
    for engine in ENGINES:
        few, many = (memory(size, work, Cluster(n, framework=0.0), engine) for n in (2, 64))
        assert many.total <= few.total, engine
        assert (many.terms["base"] < few.terms["base"]) is (engine in ("zero3", "fsdp2"))
        assert many.terms["optimizer"] == (few.terms["optimizer"] if engine == "ddp" else few.terms["optimizer"] / 32)
        assert many.terms["projections"] == few.terms["projections"] > 0
    offloaded = memory(size, work, Cluster(2), "zero3_offload")
    assert offloaded.terms["base"] == 0 and offloaded.host > base_bytes(size, work) / 2
    assert set(SHARDED) <= set(ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_of_anything_takes_no_less(engine: Any) -> None:
    cluster = Cluster(4)
    for rank in (4, None):
        size, work = llama_size(rank), Workload(rank=rank, length=64)
        before = memory(size, work, cluster, engine).total
        for change in ({"axes": 8}, {"pairs": 4}, {"length": 512}, {"dtype": "float32"}, {"accumulates": True}):
            after = memory(size, replace(work, **change), cluster, engine).total
            assert after >= before, (rank, change)
        assert memory(size, replace(work, gradient="recorded"), cluster, engine).total >= before


def test_quantized_layers_take_their_bits() -> None:
    size, work = llama_size(), Workload()
    linear = sum(layer.weights for block in size.blocks for layer in block.layers)
    rest = 2 * (size.parameters - linear)
    assert base_bytes(size, replace(work, quantize="8bit")) == rest + linear
    assert base_bytes(size, replace(work, quantize="4bit")) == rest + linear * (0.5 + 1 / 16)


def test_experts_stay_as_they_are_under_quantization() -> None:
    size = model_size(mixtral().config, axis())
    fused = sum(x.weights for block in size.blocks for x in block.layers if x.experts > 1)
    assert base_bytes(size, Workload(quantize="4bit")) > 2 * fused


@pytest.mark.parametrize(
    "options", [{"axes": 0}, {"rank": 0}, {"dtype": "int4"}, {"quantize": "2bit"}, {"prompt_share": 1.0}, {"length": 0}]
)
def test_bad_workloads_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Workload(**options)


def test_a_model_without_blocks_is_named() -> None:
    with pytest.raises(ValueError, match="no list of blocks"):
        count_model(torch.nn.Linear(3, 3), axis())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_the_peak_of_a_real_step_is_within_15_percent() -> None:
    config = json.dumps({"num_hidden_layers": 6, "vocab_size": 8000})
    command = [
        sys.executable,
        str(SCRIPT),
        "--only",
        "dense_replay",
        "--config",
        config,
        "--layers",
        "4",
        "--tokens",
        "128",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)["dense_replay"]
    assert found["measured_mib"] > 400
    assert found["ratio"] == pytest.approx(1.0, abs=0.15), found
