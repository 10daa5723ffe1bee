"""Steering vectors as a thing to keep: v⋆ of each layer, saved as safetensors, added to a model that generates.

D-STEER (arXiv 2512.11838): v⋆ = mean of h_tuned(x) − h_base(x). Added to the base, h + λ v⋆, it imitates the tuned
model (interpolation); taken from the tuned model, h − λ v⋆, it undoes the training (inversion). The paper steers what
leaves the last block; its official code several upper blocks at once. The default here is the paper's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tangent_peft.diagnose.activations import check_layer, decoder_blocks
from tangent_peft.diagnose.states import ModelState
from tangent_peft.diagnose.steering.hooks import Positions, steered
from tangent_peft.tuner.files import write_whole


FORMAT = "tangent_peft steering vectors"
VERSION = 1
_FIELDS = ("model", "architecture", "base", "tuned", "position")  # those that are text


@dataclass(frozen=True)
class SteeringVectors:
    """v⋆ for each layer of a model. Made by `steering_vectors`, or read by `SteeringVectors.load`.

    Attributes:
        vectors: v⋆ (D,) in float32, by layer from 1 to L: layer ℓ is what leaves block ℓ − 1.
        model: name or path of the model it was measured on.
        architecture: its class.
        blocks: L.
        base: name of the state that δ starts from.
        tuned: name of the state that it leads to.
        position: which tokens δ is of.
        count: number of prompts, or of answers, that the mean is over.
        settings: what else it was made with, as plain values.
    """

    vectors: dict[int, Tensor]
    model: str
    architecture: str
    blocks: int
    base: str
    tuned: str
    position: str
    count: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        """D."""
        return len(next(iter(self.vectors.values())))

    @property
    def digest(self) -> str:
        """A hash (SHA-256, hexadecimal) of everything but the vectors: two files with the same were made alike."""
        text = json.dumps(self._described(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def _described(self) -> dict[str, Any]:
        named = {name: vars(self)[name] for name in _FIELDS}
        return {**named, "blocks": self.blocks, "count": self.count, "settings": self.settings}

    # ---- use -------------------------------------------------------------------------------------------------------

    @contextmanager
    def applied(
        self,
        model: nn.Module,
        strength: float = 1.0,
        layers: Sequence[int] | None = None,
        positions: Positions = "all",
        preserve_norm: bool = False,
    ) -> Iterator[None]:
        """Adds λ v⋆ to the model's hidden states in every forward of a `with` block, `generate` included.

        In a linearized pass the vector is added to the tangent; see `steering_hooks`. Blocks inside one another add
        up, and each is undone at its end, also after an exception.

        Args:
            model: a transformers model, or a `PeftModel` around one, built as the one the vectors were measured on.
            strength: λ; negative to take the shift away.
            layers: which layers get their vector, 1 to L, negative ones counted from the end; the last one by default.
            positions: `"all"`, or `"generated"` for those that an answer's tokens are chosen from; see `steered`.
            preserve_norm: give h + λ v⋆ the norm of h, as the paper's code can.

        Raises:
            TypeError: if there is no transformers model inside.
            ValueError: for a model that is built otherwise, a layer without a vector, or λ that is not finite.
            IndexError: for a layer out of range.
        """
        root = ModelState.plain(model, "the model to steer").root
        self.check(root)
        with steered(root, self.shifts(strength, layers), positions, preserve_norm):
            yield

    def shifts(self, strength: float = 1.0, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
        """λ v⋆ (D,) by layer; arguments and errors as of `applied`."""
        if not math.isfinite(strength):
            raise ValueError(f"`strength` is a finite number; found {strength}.")
        chosen = [check_layer(layer, self.blocks) for layer in ([-1] if layers is None else layers)]
        missing = [layer for layer in chosen if layer not in self.vectors]
        if missing or not chosen:
            raise ValueError(f"No vectors for layers {missing or chosen}; there are some for {sorted(self.vectors)}.")
        return {layer: strength * self.vectors[layer] for layer in chosen}

    def check(self, root: PreTrainedModel) -> None:
        """Refuses a model that the vectors do not fit.

        Raises:
            ValueError: if its class, its number of blocks or its hidden size is another.
        """
        config: Any = root.config.get_text_config()
        found = (type(root).__name__, len(decoder_blocks(root)), config.hidden_size)
        names = ("class", "number of blocks", "hidden size")
        own = (self.architecture, self.blocks, self.hidden_size)
        differing = [f"{n} {a}, not {b}" for n, a, b in zip(names, found, own, strict=True) if a != b]
        if differing:
            raise ValueError(
                f"These steering vectors were measured on {self.model!r} and do not fit the model: "
                f"{'; '.join(differing)}. Measure them on this model."
            )

    def random(self, seed: int) -> SteeringVectors:
        """The control: vectors of the same norm at each layer, in directions drawn at random.

        Args:
            seed: of the draw; the same one gives the same directions.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for layer, vector in sorted(self.vectors.items()):
            direction = torch.randn(len(vector), generator=generator, dtype=torch.float64)
            drawn[layer] = (direction * (vector.double().norm() / direction.norm())).float()
        return replace(self, vectors=drawn, settings={**self.settings, "random_directions": seed})

    # ---- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all; what describes it is in its metadata.

        Raises:
            ValueError: if a vector is not finite.
            OSError: if it can not be written.
        """
        bad = [layer for layer, vector in self.vectors.items() if not bool(vector.isfinite().all())]
        if bad:
            raise ValueError(f"The steering vectors of layers {bad} are not finite, so they are not saved.")
        description = json.dumps(self._described(), sort_keys=True, ensure_ascii=False)
        metadata = {"format": FORMAT, "version": str(VERSION), "description": description, "digest": self.digest}
        tensors = {f"layer.{layer}": vector.contiguous() for layer, vector in self.vectors.items()}
        write_whole(Path(path), lambda file: save_file(tensors, file, metadata=metadata))

    @staticmethod
    def load(path: str | Path) -> SteeringVectors:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds something else, is of a later version, or is damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file of steering vectors at {str(path)!r}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no safetensors file, or a damaged one: {error}.") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} holds no steering vectors. They are written by `SteeringVectors.save`.")
        if metadata.get("version") != str(VERSION):
            raise ValueError(f"{str(path)!r} is of version {metadata.get('version')}; this package reads {VERSION}.")
        try:
            by_layer = {int(name.removeprefix("layer.")): vector for name, vector in vectors.items()}
            found = SteeringVectors(dict(sorted(by_layer.items())), **json.loads(metadata["description"]))
            is_whole = found.digest == metadata["digest"] and found._is_sound()
        except (KeyError, TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise ValueError(
                f"{str(path)!r} is damaged: its description does not go with its hash, or its vectors are not finite "
                "ones of one size, of layers that the model has. Make it again."
            )
        return found

    def _is_sound(self) -> bool:
        shapes = {tuple(vector.shape) for vector in self.vectors.values()}
        inside = all(1 <= layer <= self.blocks for layer in self.vectors)
        finite = all(bool(vector.isfinite().all()) for vector in self.vectors.values())
        return inside and finite and len(shapes) == 1 and len(shapes.pop()) == 1
