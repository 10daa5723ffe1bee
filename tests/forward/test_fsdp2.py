"""What FSDP2 gathers and frees around a linearized block; the numbers are in tests/train/test_distributed.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from cases import tangent_model
from conftest import batch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tangent_peft.forward import split


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("gradient", ["recorded", "replay"])
def test_fsdp2_frees_each_block_as_its_backward_pass_ends(alone: None, gradient: str) -> None:
    model = tangent_model(gradient=gradient, num_layers=3, lm_head=False)
    blocks: list[nn.Module] = list(model.get_base_model().model.layers)
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    groups = [group for block in blocks for group in block._get_fsdp_state()._fsdp_param_groups]
    whole: list[list[bool]] = []

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        tangent = split(output)[1]
        assert tangent is not None and tangent.requires_grad
        tangent.register_hook(lambda grad: whole.append([group.is_unsharded for group in groups]))

    for block in blocks[:2]:  # looked at when the gradient arrives at the second block's output, then at the first's
        block.register_forward_hook(watch)
    model.train()
    model(**batch(), use_cache=False).logits.sum().backward()
    after_last, after_second = whole
    assert not after_last[2]
    assert not any(after_second[1:])
