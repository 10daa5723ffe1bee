"""What can not be linearized exactly, refused by name before anything runs.

The rule is the other way round for everything not listed here: an unknown model is taken, and fails loudly where an
operation without a derivative meets a tangent. Listed is what would be wrong without a word, and what fails with a
message that names no remedy. `docs/models.md` shows these tables beside what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tangent_peft.forward.attention import attention_configs, check_attention
from tangent_peft.forward.experts import check_experts
from tangent_peft.forward.level import LinearizedPass


@dataclass(frozen=True)
class Refusal:
    """Why modules of one class are refused.

    Attributes:
        family: the `model_type` of transformers, for the reader.
        reason: what would go wrong.
        remedy: what to do instead.
    """

    family: str
    reason: str
    remedy: str


WEIGHTS = "train ordinary weights with `TangentConfig(linearize=False)`"
#: By the module and the name of a class, as its own code gives them.
REFUSED = {
    ("transformers.models.recurrent_gemma.modeling_recurrent_gemma", "RecurrentGemmaRglru"): Refusal(
        "recurrent_gemma",
        "it keeps its recurrent states in the module from one call to the next, where their tangents end, and clips "
        "the gradient of its square root, which is then not the derivative",
        WEIGHTS,
    ),
    ("transformers.models.phimoe.modeling_phimoe", "PhimoeTopKRouter"): Refusal(
        "phimoe",
        "its router (sparsemixer) replaces the derivative of its weights by an estimate and draws at random in "
        "training",
        WEIGHTS,
    ),
    ("transformers.models.reformer.modeling_reformer", "ReformerEncoder"): Refusal(
        "reformer",
        "its reversible layers compute their own backward pass and have no forward derivative",
        WEIGHTS,
    ),
}
#: The same, refused for some settings of their config only.
REFUSED_IF: dict[tuple[str, str], tuple[Callable[[Any], bool], Refusal]] = {
    ("transformers.models.rwkv.modeling_rwkv", "RwkvModel"): (
        lambda config: config.rescale_every > 0,
        Refusal(
            "rwkv with `rescale_every` > 0",
            "it divides weights in place whenever it changes between training and evaluation, and would not divide the "
            "tangents",
            "set `model.config.rescale_every = 0` before wrapping it, which computes the same",
        ),
    ),
    ("transformers.models.doge.modeling_doge", "DogeAttention"): (
        lambda config: config._attn_implementation != "eager",
        Refusal(
            "doge with fused attention",
            "its attention mask is computed from the hidden states and carries a tangent, which fused kernels do not "
            "take",
            "load it with attn_implementation='eager'",
        ),
    ),
}
HUB_KERNELS = Refusal(
    "any, loaded with `use_kernels=True`",
    "kernels from the hub replace its layers, and most have no derivative or lose the tangent",
    "call `model.set_use_kernels(False)`, or load it without `use_kernels`",
)
LIGER = Refusal(
    "any, patched by Liger",
    "Liger's kernels have no forward derivative",
    "load the model without `use_liger_kernel=True` (and without calling `apply_liger_kernel_to_…`)",
)
WORKS = "Families that were tested are listed in docs/models.md."


def check_support(root: nn.Module) -> None:
    """Refuses a model that can not be linearized exactly.

    Args:
        root: the module whose call is to be a linearized pass.

    Raises:
        NotImplementedError: naming the module, why it is refused, and what to do instead.
    """
    modules = list(root.modules())
    for module in modules:
        for refusal in _refusals(module):
            raise NotImplementedError(
                f"{type(root).__name__} can not be linearized exactly: {type(module).__name__} is refused because "
                f"{refusal.reason}. Instead, {refusal.remedy}. {WORKS}"
            )
    for config, through_interface in attention_configs(modules):
        if config._attn_implementation is not None and config._attn_implementation != "eager":
            check_attention(config._attn_implementation, through_interface)
    check_experts(modules)


def _refusals(module: nn.Module) -> Iterator[Refusal]:
    for kind in type(module).__mro__:
        listed = REFUSED.get((kind.__module__, kind.__name__))
        if listed is not None:
            yield listed
        condition, refusal = REFUSED_IF.get((kind.__module__, kind.__name__), (None, None))
        if condition is not None and refusal is not None and condition(_config(module)):
            yield refusal
    if _has_hub_kernels(module):
        yield HUB_KERNELS
    if any(_is_liger(code) for code in (type(module), type(module).forward, vars(module).get("forward"))):
        yield LIGER


def is_model(module: nn.Module) -> bool:
    """Whether the module is a model of transformers."""
    return isinstance(module, PreTrainedModel)


def _has_hub_kernels(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and module.use_kernels


def refuse_hub_kernels(opened: LinearizedPass) -> None:
    """Refuses a pass of a model whose layers were replaced after it was wrapped.

    Raises:
        NotImplementedError: as `check_support`.
    """
    if any(map(_has_hub_kernels, opened.structure.select(is_model))):
        raise NotImplementedError(
            f"{type(opened.root).__name__} runs on kernels from the hub: {HUB_KERNELS.reason}. Instead, "
            f"{HUB_KERNELS.remedy}."
        )


def _config(module: Any) -> Any:
    return module.config


def _is_liger(code: Any) -> bool:
    """Whether a class or function is defined by Liger, which patches both."""
    if isinstance(code, MethodType):
        code = code.__func__
    return isinstance(code, (type, FunctionType)) and (code.__module__ or "").split(".")[0] == "liger_kernel"
