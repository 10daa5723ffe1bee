"""Which model is trained and which of its axes: what `TangentDPOTrainer` settles before TRL's constructor runs.

Knows PEFT and the tuner; nothing of TRL but the arguments that depend on the axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from tangent_peft.train.config import LEARNING_RATES, TangentDPOConfig
from tangent_peft.tuner import TangentConfig


Wrap: TypeAlias = Callable[..., PeftModel]


def primal_moves(model: nn.Module) -> bool:
    """Whether modules train beside the tangents (`modules_to_save`): the primal is then not the base any more.

    Raises:
        ValueError: if weights of the base itself train, of which no copy is left that could be the reference.
    """
    others = [name for name, p in model.named_parameters() if p.requires_grad and ".tangent_" not in name]
    base = [name for name in others if ".modules_to_save." not in name]
    if base:
        raise ValueError(
            f"{len(base)} weights of the base model require gradients, for example {base[0]!r}; the base is the "
            "reference and stays frozen. Call `requires_grad_(False)` on them, or name their modules in "
            "`modules_to_save`."
        )
    return bool(others)


def choose_policy(
    model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: TangentDPOConfig
) -> tuple[str | PreTrainedModel, TangentConfig, Wrap]:
    """The base model, the axis's configuration, and the function that wraps the one by the other."""
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError(
                "`model` is a PeftModel and `peft_config` was given as well. Add the axis with "
                "`model.add_adapter(name, peft_config)` and name it in `TangentDPOConfig(axis=name)`."
            )
        return _existing_axis(model, args)
    config = TangentConfig(task_type="CAUSAL_LM") if peft_config is None else peft_config
    if not isinstance(config, TangentConfig):
        raise ValueError(
            f"`peft_config` is a {type(config).__name__}; TangentDPOTrainer trains tangents. Use TangentConfig, or "
            "trl.DPOTrainer for other adapters."
        )

    def wrap(base: PreTrainedModel, peft_config: TangentConfig, **kwargs: Any) -> PeftModel:
        return _prepared(get_peft_model(base, peft_config, adapter_name=args.axis or "default", **kwargs), args)

    return model, config, wrap


def refuse_contradictions(ref_model: object, config: TangentConfig, args: TangentDPOConfig) -> None:
    """Raises if arguments contradict each other: a linearized axis has its reference in itself, another no tangent.

    Raises:
        ValueError: naming the argument.
    """
    if args.max_kl is not None and not config.linearize:
        raise ValueError(
            f"`max_kl={args.max_kl}` with an axis that is not linearized (`TangentConfig(linearize=False)`): the KL to "
            "the base is read off the linearized pass. Use `max_norm`, or `linearize=True`."
        )
    if args.linearized == "log_probs" and not config.linearize:
        raise ValueError(
            "`linearized='log_probs'` with an axis that is not linearized (`TangentConfig(linearize=False)`): it "
            "has no tangent. Use `linearized='logits'`, or `linearize=True`."
        )
    if ref_model is not None and config.linearize:
        raise ValueError(
            f"`ref_model` is a {type(ref_model).__name__}, but the reference of a linearized axis is the base, the "
            "primal of the same forward. Leave `ref_model` out; to train against another reference, use "
            "`TangentConfig(linearize=False)`."
        )


def refuse_images(images: bool, args: TangentDPOConfig) -> None:
    """Raises if the data has images and an option can not take them.

    Raises:
        ValueError: naming the option.
    """
    if images and args.trunk_cache is not None:
        raise ValueError(
            f"`trunk_cache={str(args.trunk_cache)!r}` on data with images: the hidden states below the first wrapped "
            "block depend on the images, and the cache knows sequences by their tokens alone. Train without "
            "`trunk_cache`."
        )


def _existing_axis(model: PeftModel, args: TangentDPOConfig) -> tuple[PreTrainedModel, TangentConfig, Wrap]:
    foreign = {name: type(config).__name__ for name, config in model.peft_config.items()}
    if not all(isinstance(config, TangentConfig) for config in model.peft_config.values()):
        raise ValueError(f"The model's adapters are {foreign}; TangentDPOTrainer trains axes made from TangentConfig.")
    active = model.active_adapters
    axis = args.axis or (active[0] if len(active) == 1 else None)
    if axis is None or axis not in model.peft_config:
        raise ValueError(
            f"The model has the axes {sorted(model.peft_config)} and `axis={args.axis!r}` does not say which one to "
            "train. Set `TangentDPOConfig(axis=...)` to one of them."
        )
    args.axis = axis
    base: Any = model.get_base_model()
    config: Any = model.peft_config[axis]
    return base, config, lambda *unused, **kwargs: _prepared(model, args)


def _prepared(model: PeftModel, args: TangentDPOConfig) -> PeftModel:
    """Activates the axis at λ = 1, as the only one that trains, and completes the arguments that depend on it."""
    axis = args.axis or "default"
    if "ref" in model.peft_config:
        raise ValueError("An axis is named 'ref', which TRL reserves for a reference adapter. Give it another name.")
    model.set_adapter(axis)
    config: Any = model.peft_config[axis]
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES["dense" if config.r is None else config.projection]
    return model
