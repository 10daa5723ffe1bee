"""One model in one of its states: the base, a mix of axes, or a checkpoint; and whether two states can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tangent_peft.diagnose.activations import decoder_blocks
from tangent_peft.forward import evaluating
from tangent_peft.tuner.axes import check_enabled, check_weights, tangent_tuner


@dataclass(frozen=True)
class ModelState:
    """A model as it is to be looked at. Made by `ModelState.plain`, `.base` or `.mix`.

    Attributes:
        name: what tables and pictures call it.
        model: a transformers model, or a `PeftModel` around one.
        weights: λ by axis; `None`: the adapters as they are.
        linearized: `True`: f_lin; `False`: the network at the weights θ(λ); `None`: as the axes are configured.
        adapters: `False` switches every adapter off.
    """

    name: str
    model: nn.Module
    weights: Mapping[str, float] | None = None
    linearized: bool | None = None
    adapters: bool = True

    @staticmethod
    def plain(model: nn.Module, name: str) -> ModelState:
        """A model as it is: a checkpoint, or one with an adapter of any kind that is active."""
        return ModelState(name, model)

    @staticmethod
    def base(model: nn.Module, name: str = "base") -> ModelState:
        """The model under the adapters, whatever their kind; a model without adapters itself."""
        return ModelState(name, model, adapters=False)

    @staticmethod
    def mix(
        model: nn.Module, weights: Mapping[str, float], linearized: bool | None = None, name: str | None = None
    ) -> ModelState:
        """A mix of tangent axes.

        Raises:
            TypeError: if the model carries no tangent axes.
            ValueError: for an unknown axis, or a λ that is not a finite number.
        """
        checked = check_weights(tangent_tuner(model), weights)
        text = " ".join(f"{axis}={value:g}" for axis, value in checked.items())
        return ModelState(name or text or "base", model, checked, linearized)

    @property
    def root(self) -> PreTrainedModel:
        """The transformers model inside.

        Raises:
            TypeError: if it is none.
        """
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"{self.name!r} is a {type(model).__name__}, not a transformers model, so its layers are not known."
            )
        return model

    @property
    def device(self) -> torch.device:
        """Where its tokens go."""
        return self.root.get_input_embeddings().weight.device  # type: ignore[return-value]

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """Puts the model into this state for a `with` block, in eval mode; gradients are as the caller has them.

        Raises:
            ValueError: if adapters of a mix are disabled or merged.
        """
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            if not self.adapters:
                if isinstance(self.model, PeftModel):
                    stack.enter_context(self.model.disable_adapter())
            elif self.weights is not None:
                tuner = tangent_tuner(self.model)
                check_enabled(tuner)
                stack.enter_context(tuner.axes(self.weights))
                if self.linearized is not None:
                    stack.enter_context(tuner.linearized(self.linearized))
            yield self.root


def check_comparable(first: ModelState, second: ModelState) -> None:
    """Refuses to compare states of models that are built differently.

    Raises:
        ValueError: naming what differs: class, hidden size, number of blocks, or vocabulary.
    """
    found, expected = _shape(second.root), _shape(first.root)
    differing = [f"{key} {expected[key]} and {found[key]}" for key in expected if expected[key] != found[key]]
    if differing:
        raise ValueError(
            f"{first.name!r} and {second.name!r} are models of different architecture: {'; '.join(differing)}. Compare "
            "a model with one that was trained from it."
        )


def check_same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> None:
    """Refuses to compare models that read other tokens in the same text.

    Raises:
        ValueError: if a token has another number, or the chat templates differ.
    """
    mine, theirs = first.get_vocab(), second.get_vocab()
    differing = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    if differing:
        raise ValueError(
            f"The tokenizers of {first.name_or_path!r} and {second.name_or_path!r} differ in {len(differing)} tokens, "
            f"for example {differing[0]!r}. Compare models that share one tokenizer."
        )
    if first.chat_template != second.chat_template:
        raise ValueError(
            f"The chat templates of {first.name_or_path!r} and {second.name_or_path!r} differ, so the two would be "
            "given other tokens. Set one of them: `tokenizer.chat_template`."
        )


def _shape(root: PreTrainedModel) -> dict[str, Any]:
    config: Any = root.config.get_text_config()
    embedding: Any = root.get_input_embeddings()
    return {
        "class": type(root).__name__,
        "hidden size": config.hidden_size,
        "number of blocks": len(decoder_blocks(root)),
        "vocabulary": embedding.weight.shape[0],
    }
