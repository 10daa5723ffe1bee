"""What servers take."""

from __future__ import annotations

import pytest
import transformers
from cases import tangent_layers
from exports import two_axes
from moe import build_moe
from peft import get_peft_model

from tangent_peft import TangentConfig
from tangent_peft.tuner import TangentExperts
from tangent_peft.tuner.export.servers import VLLM_HEADS, Contents, check_contents, served_rank, vllm_rank


@pytest.mark.parametrize(
    ("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (17, 32), (129, 256), (257, 320), (512, 512), (513, None)]
)
def test_vllm_rank(rank: int, served: int | None) -> None:
    assert vllm_rank(rank) == served
    assert served_rank(rank, None) == served_rank(rank, "sglang") == served_rank(rank, "llama.cpp") == rank
    if served is not None:
        assert served_rank(rank, "vllm") == served


def test_every_architecture_exists() -> None:
    assert {name for name in VLLM_HEADS if name not in dir(transformers)} == set()


def test_vocabularies_too_large_for_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    head = next(layer for layer in tangent_layers(two_axes()) if layer.layer_name == "lm_head")
    check_contents(Contents("LlamaForCausalLM", [head], []), "vllm")
    head.out_features = 262144
    with pytest.raises(ValueError, match="up to 258048 tokens, this model has 262144"):
        check_contents(Contents("LlamaForCausalLM", [head], []), "vllm")


@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=["both", "down"])
def test_experts(names: list[str]) -> None:
    targets = [f"experts.{name}" for name in names]
    config = TangentConfig(r=4, target_parameters=targets, target_modules=[], lm_head=False)
    model = get_peft_model(build_moe("mixtral"), config)
    experts = [layer for layer in tangent_layers(model) if isinstance(layer, TangentExperts) and layer.tangent_r]
    contents = Contents("MixtralForCausalLM", [], experts)
    check_contents(contents, None)
    for server in ("sglang", "llama.cpp"):
        with pytest.raises(ValueError, match=f"every expert.*{server} is not known to read.*export_merged"):
            check_contents(contents, server)
    if len(names) == 2:
        check_contents(contents, "vllm")
        return
    with pytest.raises(ValueError, match=r"only .*down_proj.*both"):
        check_contents(contents, "vllm")
