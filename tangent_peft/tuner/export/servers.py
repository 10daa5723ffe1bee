"""What LoRA servers take, read from their sources: vLLM 0.32, llama.cpp, SGLang.

All of them multiply by one lora_alpha / r; whether they follow a rank per layer differs (llama.cpp divides by each
tensor's own rank). A LoRA of one rank throughout is right in all of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from tangent_peft.tuner.experts import TangentExperts
from tangent_peft.tuner.layer import TangentLayer


Server: TypeAlias = Literal["vllm", "sglang", "llama.cpp"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank (vllm/config/lora.py)
VLLM_VOCABULARY = 258048  # LogitsProcessorWithLoRA.create_lora_weights refuses more

# transformers' causal models whose class in vLLM 0.32 lists the head in `embedding_modules`; the others refuse a LoRA
# on the head or the embedding when they load it.
VLLM_HEADS = frozenset(
    {
        "ApertusForCausalLM",
        "Ernie4_5ForCausalLM",
        "Exaone4ForCausalLM",
        "ExaoneMoeForCausalLM",
        "FalconH1ForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "GraniteSWAForCausalLM",
        "HyperCLOVAXForCausalLM",
        "JambaForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "Llama4ForCausalLM",
        "LlamaForCausalLM",
        "MiniCPM3ForCausalLM",
        "MixtralForCausalLM",
        "NemotronForCausalLM",
        "NemotronHForCausalLM",
        "Phi3ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
    }
)


@dataclass(frozen=True)
class Contents:
    """What of a LoRA a server may refuse.

    Attributes:
        architecture: class name of the base model.
        vocabulary: the wrapped head and input embedding that the LoRA has factors for.
        experts: the fused expert weights that it has factors for.
    """

    architecture: str
    vocabulary: Collection[TangentLayer]
    experts: Collection[TangentExperts]


def check_server(server: str | None) -> None:
    """Raises a `ValueError` for a server that is not known here."""
    if server is not None and server not in get_args(Server):
        raise ValueError(f"`server` is one of {get_args(Server)}, or None for stock PEFT; found {server!r}.")


def served_rank(rank: int, server: str | None) -> int:
    """The rank to write for a server: for vLLM the next one that it serves.

    Raises:
        ValueError: if the rank is above all of them.
    """
    if server != "vllm":
        return rank
    served = vllm_rank(rank)
    if served is None:
        raise ValueError(
            f"The LoRA has rank {rank}, and vLLM serves ranks up to {VLLM_RANKS[-1]}. Give `rank={VLLM_RANKS[-1]}` or "
            "less, the best approximation with its error stated; or use `export_merged`, which has no rank."
        )
    return served


def vllm_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` that takes a LoRA of this rank; `None` if there is none."""
    return next((served for served in VLLM_RANKS if served >= rank), None)


def check_contents(contents: Contents, server: str | None) -> None:
    """Refuses a LoRA with parts that a server would refuse, or skip without a word.

    Raises:
        ValueError: naming the part and the remedy.
    """
    if server is None:
        return
    for layer in contents.vocabulary:
        reason = _refusal(layer, contents.architecture, server)
        if reason is not None:
            raise ValueError(
                f"{layer.layer_name!r} has a tangent, and {reason}. Pass `head='merge'` to save a base model with that "
                "tangent in its weights beside the LoRA, or use `export_merged`."
            )
    if server != "vllm" and contents.experts:
        raise ValueError(
            f"{next(iter(contents.experts)).layer_name!r} has a tangent for every expert, whose LoRA format "
            f"(`target_parameters`) {server} is not known to read. Use `export_merged`."
        )
    for layer in contents.experts:
        owner = layer.layer_name.rpartition(".")[0]
        if sum(other.layer_name.startswith(f"{owner}.") for other in contents.experts) != 2:
            raise ValueError(
                f"Of the experts {owner!r} only {layer.layer_name!r} has a tangent; vLLM needs factors for both "
                "`gate_up_proj` and `down_proj`. Use `export_merged`."
            )


def _refusal(layer: TangentLayer, architecture: str, server: str) -> str | None:
    """Why a server takes no LoRA on this head or embedding."""
    size = max(layer.in_features, layer.out_features)
    if server == "vllm" and architecture not in VLLM_HEADS:
        return f"vLLM takes no LoRA on the head or the embedding of a {architecture}"
    if server == "vllm" and size > VLLM_VOCABULARY:
        return f"vLLM takes a LoRA on up to {VLLM_VOCABULARY} tokens, this model has {size}"
    if server == "sglang" and layer.tangent_tied:
        return "SGLang's releases before 2026 skip a LoRA on a tied head without a word"
    if server == "llama.cpp" and layer.tangent_tied:
        return "llama.cpp loads no LoRA on a tied head or embedding"
    return None
