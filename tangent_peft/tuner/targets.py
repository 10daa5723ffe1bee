"""Which modules an axis wraps: kinds by `target_modules`, blocks by `num_layers`, and the head."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel

from tangent_peft.forward import find_head
from tangent_peft.tuner.backends import quantization_backend, refuse_unknown
from tangent_peft.tuner.config import TangentConfig
from tangent_peft.tuner.experts import fused_parameters
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.linear import is_plain_linear


ALL_LINEAR = "all-linear"
_TASK_HEADS = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}


def find_blocks(model: nn.Module, layers_pattern: list[str] | str | None = None) -> tuple[str, int] | None:
    """Name and length of the model's list of blocks; `None` if it has none.

    That is the outermost `nn.ModuleList` with linear layers in it: the longest, and of equally long ones the last. The
    text decoder is searched first, the whole model if that has none: the blocks are then those of the language model,
    however many a vision tower has. `layers_pattern` names the list where that is the wrong one.
    """
    decoder = text_decoder(model)
    inside = None if decoder is None else _longest_list(model, decoder + ".", layers_pattern)
    return _longest_list(model, "", layers_pattern) if inside is None else inside


def text_decoder(model: nn.Module) -> str | None:
    """Full name of a transformers model's text decoder; `None` where it is the model itself or not known."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError, TypeError, ValueError):  # bespoke models have a look-up of their own
        return None
    return next((name for name, module in model.named_modules() if name and module is decoder), None)


def _longest_list(model: nn.Module, prefix: str, layers_pattern: list[str] | str | None) -> tuple[str, int] | None:
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    found: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if not name.startswith(prefix):
            continue
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer, _ in found):
            continue
        if patterns and name.rpartition(".")[2] not in patterns:
            continue
        if any(is_linear(child) for child in module.modules()):
            found.append((name, len(module)))
    return max(reversed(found), key=lambda entry: entry[1], default=None)


def is_linear(module: nn.Module) -> bool:
    """Whether a tangent can be carried there: a linear layer, wrapped or not, quantized or not."""
    base: Any = module.base_layer if isinstance(module, BaseTunerLayer) else module
    return is_plain_linear(base) or quantization_backend(base) is not None


def block_index(key: str, blocks: tuple[str, int] | None) -> int | None:
    """The index of the block in which module `key` lies, or `None`."""
    if blocks is None:
        return None
    match = re.match(rf"{re.escape(blocks[0])}\.(\d+)\.", key)
    return int(match.group(1)) if match else None


def refuse_unknown_above(model: nn.Module, blocks: tuple[str, int] | None) -> None:
    """Refuses modules of the wrapped blocks, and of those above, that are quantized in a way nobody here knows.

    Raises:
        TypeError: naming the module.
    """
    wrapped = [block_index(m.layer_name, blocks) for m in model.modules() if isinstance(m, TangentLayer)]
    first = min((index for index in wrapped if index is not None), default=None)
    for name, module in model.named_modules():
        index = block_index(name, blocks)
        if index is not None and first is not None and index >= first:
            refuse_unknown(module, name)


def head_name(model: nn.Module) -> str | None:
    """Full name of the output layer, of a language model or a classifier; `None` if it is not one linear layer."""
    head = find_head(model)
    if head is None or not is_linear(head):  # saved in full beside an axis, for example
        return None
    return next(name for name, module in model.named_modules() if module is head)


def default_targets(model: nn.Module, config: TangentConfig) -> set[str]:
    """Every linear layer of the model's blocks, or of the model if it has no blocks; never the head.

    Raises:
        ValueError: if there is no linear layer.
    """
    blocks, head = find_blocks(model, config.layers_pattern), find_head(model)
    inside_layers = tuple(name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    names = {
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and module is not head
        and not name.startswith(inside_layers)
        and (blocks is None or block_index(name, blocks) is not None)
    }
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.Linear or Conv1D layer that could carry a tangent. Name the "
            "modules to wrap in `target_modules`."
        )
    return names


def warn_of_encoders(model: nn.Module) -> None:
    """Says of layers wrapped beside a text decoder, as those of a vision tower, what they exclude."""
    decoder, head = text_decoder(model), head_name(model)
    if decoder is None or not (isinstance(model, PreTrainedModel) and model.can_generate()):
        return
    wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    outside = [name for name in wrapped if not name.startswith(decoder + ".") and name != head]
    if outside:
        warnings.warn(
            f"{len(outside)} layers outside of the text decoder {decoder!r} carry a tangent, for example "
            f"{outside[0]!r}. That trains and evaluates exactly; but `generate` encodes images or a source before the "
            "model's forward, where it refuses to run linearized. To generate linearized keep these layers out "
            "(`exclude_modules`, or target_modules=None); or generate merged (`model.linearized(False)`).",
            stacklevel=4,
        )


def head_in_targets(config: TangentConfig, head: str | None) -> None:
    """Turns a head named in `target_modules` into `lm_head=True`, which means the same.

    PEFT saves the whole embedding beside an adapter whose `target_modules` name "lm_head".
    """
    if head is None or config.target_modules is None or isinstance(config.target_modules, str):
        return
    naming = {name for name in config.target_modules if head == name or head.endswith("." + name)}
    if naming:
        config.lm_head = True
        config.target_modules = set(config.target_modules) - naming  # type: ignore[assignment]


def embeddings_in_targets(config: TangentConfig, model: nn.Module) -> None:
    """Replaces the names of embeddings in `target_modules` by their full names.

    PEFT saves the whole embedding beside an adapter whose `target_modules` name "embed_tokens".
    """
    if config.target_modules is None or isinstance(config.target_modules, str):
        return
    targets = set(config.target_modules)
    for name in EMBEDDING_LAYER_NAMES:
        full = {key for key, module in model.named_modules() if key.endswith("." + name) and is_embedding(module)}
        if name in targets and full:
            targets = targets - {name} | full
    config.target_modules = targets  # type: ignore[assignment]


def is_embedding(module: nn.Module) -> bool:
    """Whether this is an embedding, wrapped or not."""
    return isinstance(module, nn.Embedding) or (
        isinstance(module, BaseTunerLayer) and isinstance(module.base_layer, nn.Embedding)
    )


def save_task_head(config: TangentConfig) -> None:
    """Names the head that a task trains in full in `modules_to_save`, where PEFT names it too late for a copy.

    For sequence classification PEFT does so before it makes the adapter, for the others afterwards.
    """
    names = next((heads for task, heads in _TASK_HEADS.items() if config.task_type == task), ())
    missing = [name for name in names if name not in (config.modules_to_save or ())]
    if missing:
        config.modules_to_save = [*(config.modules_to_save or ()), *missing]


def check_targets(config: TangentConfig, model: nn.Module) -> None:
    """Refuses `target_modules` that match nothing, which PEFT would not notice beside the head of `lm_head`.

    Raises:
        ValueError: if no module of the model is named so.
    """
    names = config.target_modules
    if not names or not config.lm_head or isinstance(names, str):
        return
    if not any(key == name or key.endswith("." + name) for key, _ in model.named_modules() for name in names):
        raise ValueError(
            f"No module of {type(model).__name__} is named as in target_modules={sorted(names)}. Name some of its "
            "modules, or None for every linear layer."
        )


def is_target(config: TangentConfig, key: str, blocks: tuple[str, int] | None, head: str | None) -> object:
    """Whether module `key` is wrapped; PEFT's marker for an excluded one is passed on."""
    regular_expression = isinstance(config.target_modules, str)
    if key == head and config.lm_head and not regular_expression:
        return True if not _excluded(config, key) else _ExcludedModule()
    matched = check_target_module_exists(config, key)
    if not matched or regular_expression or config.layers_to_transform is not None or config.num_layers is None:
        return matched
    index = block_index(key, blocks)
    return matched if index is None or blocks is None else index >= blocks[1] - config.num_layers


def parameter_targets(config: TangentConfig, model: nn.Module, blocks: tuple[str, int] | None) -> list[str]:
    """Full names, in the unmodified model, of the fused expert weights that an axis wraps.

    Raises:
        ValueError: if a name in `target_parameters` matches none; the message lists those the model has.
    """
    wanted, names, fused = config.target_parameters or [], [], list(_fused_names(model))
    for name in wanted:
        matched = [full for full in fused if full == name or full.endswith("." + name)]
        chosen = [full for full in matched if _in_blocks(config, full, blocks) and not _excluded(config, full)]
        if not chosen:
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", full) for full in fused})
            found = f"those that match, {matched}, are excluded or in other blocks" if matched else f"it has {kinds}"
            raise ValueError(
                f"target_parameters={list(wanted)}: no parameter of {type(model).__name__} with a weight per expert "
                f"is named {name!r} and selected; {found}. Only three-dimensional floating parameters can be named "
                "there; modules go into `target_modules`."
            )
        names += chosen
    return [full for full in fused if full in names]


def _fused_names(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        yield from (f"{name}.{key}".replace(".base_layer", "") for key in fused_parameters(module) if name)


def _in_blocks(config: TangentConfig, key: str, blocks: tuple[str, int] | None) -> bool:
    index = block_index(key, blocks)
    if index is None or blocks is None:
        return True
    if config.layers_to_transform is not None:
        chosen = config.layers_to_transform
        return index in ([chosen] if isinstance(chosen, int) else chosen)
    return config.num_layers is None or index >= blocks[1] - config.num_layers


def _excluded(config: TangentConfig, key: str) -> bool:
    if isinstance(config.exclude_modules, str):
        return re.fullmatch(config.exclude_modules, key) is not None
    names = set(config.exclude_modules or ()) | set(config.modules_to_save or ())
    return any(key == name or key.endswith("." + name) for name in names)
