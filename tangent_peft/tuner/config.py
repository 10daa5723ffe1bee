"""`TangentConfig`: what one preference axis wraps and how its tangent τ is stored. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from tangent_peft.forward import Gradient
from tangent_peft.tuner.card import write_usage_note
from tangent_peft.tuner.registration import TANGENT
from tangent_peft.tuner.safe_range import StoredRange


@dataclass
class TangentConfig(PeftConfig):
    """Configuration of a tangent axis (TS-DPO, arXiv 2602.01128).

    `target_modules` selects kinds of modules, `num_layers` the blocks among them, `lm_head` adds the head.

    Args:
        r: rank of τ = B·A; `None` trains ΔW itself (dense, the paper).
        projection: `"shared"`: A is fixed, with orthonormal rows drawn from `projection_seed` and the layer's name, the
            same for every axis, so τ is linear in its parameters and any mix keeps rank r. `"trained"`: A trains as
            well and is saved; τ is then bilinear in its parameters. Ignored for dense τ.
        projection_seed: seed of the shared projection; axes with another seed mix at the sum of their ranks.
        num_layers: wrap the last N blocks only; `None`, or more than there are: all. Modules outside of blocks that
            `target_modules` names stay selected.
        lm_head: give the language-model head a tangent as well, also when it is tied to the embedding; likewise the
            single output layer of a classifier, unless `modules_to_save` names it, as PEFT does for `task_type`
            `"SEQ_CLS"` and `"TOKEN_CLS"`.
        target_modules: names or a regular expression as in LoRA; `None` and `"all-linear"`: every linear layer of the
            selected blocks. A regular expression addresses whole names: `num_layers` and `lm_head` do not apply to it.
        exclude_modules: names or a regular expression that are never wrapped.
        target_parameters: names of fused expert weights (E, …), such as "experts.gate_up_proj", to give a tangent per
            expert, in the selected blocks; `target_modules=[]` wraps these alone.
        layers_to_transform: block indices to wrap instead of the last `num_layers`.
        layers_pattern: name of the block list, where it is ambiguous.
        rank_pattern: rank by layer name or regular expression, where it differs from `r`.
        modules_to_save: modules trained and saved in full beside the tangent.
        init_weights: start at τ = 0 (the default); `False` draws τ at random, for tests.
        linearize: run f_lin; `False` adds ΔW to the weights instead (an ordinary adapter, as for Task-Vector DPO).
        gradient: how a training step computes τ's gradient, both exact: `"recorded"` keeps the activations of the
            wrapped blocks (fewest FLOPs), `"replay"` keeps what enters each block and runs the block again in backward
            (least memory; in train mode only, and like gradient checkpointing without a key/value cache); `"auto"`
            replays the blocks for which gradient checkpointing is enabled.
        base_fingerprint: sample of the base model's weights, recorded when the axis is created and compared when it is
            loaded; `None` skips the comparison.
        safe_range: range of λ measured for this axis, which `tangent_peft.diagnose.store_safe_range` keeps here and
            `combine_axes` and the exports warn by; see `StoredRange`. `None`: not measured.
    """

    r: int | None = field(default=None, metadata={"help": "Rank of τ = B·A; None: dense τ = ΔW."})
    projection: Literal["shared", "trained"] = field(
        default="shared", metadata={"help": "'shared': A fixed, the same for every axis; 'trained': A trains as well."}
    )
    projection_seed: int = field(default=0, metadata={"help": "Seed of the shared projection A."})
    num_layers: int | None = field(default=16, metadata={"help": "Wrap the last N blocks; None: all of them."})
    lm_head: bool = field(default=True, metadata={"help": "Give the language-model head a tangent as well."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to wrap, as in LoRA; None: every linear layer of the selected blocks."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules never to wrap."})
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Fused expert weights (E, ...) to give a tangent per expert, as in LoRA."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Block indices to wrap."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks that differ from r, by name."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved in full."})
    init_weights: bool = field(default=True, metadata={"help": "Start at τ = 0; False: random, for tests."})
    linearize: bool = field(default=True, metadata={"help": "Run f_lin; False: add ΔW to the weights."})
    gradient: Gradient = field(
        default="auto", metadata={"help": "'recorded', 'replay', or 'auto': replay under gradient checkpointing."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Sample of the base weights; checked on load."}
    )
    safe_range: dict[str, Any] | None = field(
        default=None, metadata={"help": "Range of λ within which the linearity gap was measured to be small."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TANGENT
        self._check_rank()
        StoredRange.read(self.safe_range)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as LoRA: saved sorted
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_parameters, str):
            raise ValueError(
                f"`target_parameters` is a list of names, found the string {self.target_parameters!r}; there are no "
                "regular expressions for parameters. Put it into a list."
            )
        by_index = self.layers_to_transform is not None or self.layers_pattern is not None
        if by_index and isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError(
                "`layers_to_transform` and `layers_pattern` do not apply when `target_modules` is the regular "
                f"expression {self.target_modules!r}. Put the block indices into the expression, or list module names."
            )

    def _check_rank(self) -> None:
        if self.projection not in ("shared", "trained"):
            raise ValueError(f"`projection` is 'shared' or 'trained', found {self.projection!r}.")
        if self.gradient not in get_args(Gradient):
            raise ValueError(f"`gradient` is one of {get_args(Gradient)}, found {self.gradient!r}.")
        if self.r is not None and not _is_count(self.r):
            raise ValueError(f"`r` is a positive integer, or None for a dense tangent; found {self.r!r}.")
        if self.num_layers is not None and not _is_count(self.num_layers):
            raise ValueError(f"`num_layers` is a positive integer, or None for all blocks; found {self.num_layers!r}.")
        for name, r in self.rank_pattern.items():
            if not _is_count(r):
                raise ValueError(f"The ranks in `rank_pattern` are positive integers; found {r!r} for {name!r}.")
        if self.r is None and self.rank_pattern:
            raise ValueError(
                f"`rank_pattern={self.rank_pattern}` needs a rank to deviate from; `r` is None (dense). Set `r` as "
                "well."
            )
        if self.r is None and self.projection == "trained":
            raise ValueError(
                "`projection='trained'` needs a rank; `r` is None (dense tangent). Set `r`, for example 16."
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and into the model card what to import before loading it."""
        super().save_pretrained(save_directory, **kwargs)
        write_usage_note(Path(save_directory))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> TangentConfig:
        """Reads a saved configuration; a weight file beside it that can not be opened is reported here, by name.

        Raises:
            ValueError: if the safetensors file in that directory is corrupt or truncated.
        """
        directory = Path(pretrained_model_name_or_path) / (subfolder or "")
        weights = directory / "adapter_model.safetensors"
        if weights.is_file():
            check_safetensors(weights)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_safetensors(path: Path) -> None:
    """Opens the file's header, whose offsets tell whether all of it is there.

    Raises:
        ValueError: if the file is corrupt or truncated.
    """
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file: {error}. It was probably cut "
            "off while it was written or copied; restore it from its source or train the axis again."
        ) from error
