"""`TangentCarrier`: what the linearized forward asks of a module at which a tangent is born. Knows no form of τ."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Literal, TypeAlias

from torch import nn


Gradient: TypeAlias = Literal["auto", "recorded", "replay"]


class TangentCarrier(nn.Module):
    """Abstract: a module of the linearized model at which a tangent may be born."""

    #: While true, reading `.weight` instead of calling the module must fail: the tangent would be lost.
    tangent_guarded: bool = False

    @abstractmethod
    def tangent_mix(self) -> Hashable | None:
        """Identifies the tangent carried now; `None` when there is none.

        Equal values mean equal tangents: a key/value cache filled under one mix is not read under another.
        """

    @abstractmethod
    def is_additive(self) -> bool:
        """Whether the module currently adds a ΔW to its weights instead of carrying it as a tangent."""

    @abstractmethod
    def gradient_modes(self) -> set[Gradient]:
        """How the gradients of the tangents carried now are to be computed."""

    @abstractmethod
    def tangent_parameters(self) -> list[nn.Parameter]:
        """The parameters of the tangents born here that train."""
