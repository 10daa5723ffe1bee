"""Later stages of sequential DPO: does this stage's gradient go against the objectives before it (arXiv 2606.19744)?

`ConflictAware` adds three things to a DPO trainer of an adapter:

* every `conflict_steps` steps, the cosine of the step's gradient with that of each previous objective on its held-out
  pairs;
* how far the adapter has moved in the space of ΔW since the stage began;
* if asked, PCGrad: components of the step's gradient that go against a previous objective are taken out of it.

The reference is the base model at every stage. TRL's own default is another: given a `PeftModel`, it clones the adapter
and refers to that, so a second stage would be measured from the end of the first.

Seam: `training_step` of TRL and transformers, after whose last call of a step all gradients are accumulated and nothing
is clipped yet; TRL's `_prepare_dataset`, `_precompute_ref_logps` and `_metrics`.
"""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from tangent_peft.train.config import TangentDPOConfig
from tangent_peft.train.surgery import Gradient, add_gradients, gradient_gram, gram_cosine, pcgrad_coefficients
from tangent_peft.train.trainer import TangentDPOTrainer, wrapping_by
from tangent_peft.tuner.movement import Deltas, Movement, adapter_deltas, movement


log = logging.getLogger(__name__)
CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # ways of starting a LoRA, as PEFT names them


# ---- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class ConflictOptions:
    """What `ConflictAware` adds to a trainer's configuration.

    Args:
        conflict_steps: measure at the first step and every N steps; with `project_conflicts` every step is measured.
        conflict_batch_size: held-out pairs of each previous objective per measurement and process, an even number: the
            two halves give the cosine that noise leaves between two gradients of one objective.
        project_conflicts: PCGrad. Costs, at every step and for each previous objective, one more forward and backward
            pass over `conflict_batch_size` pairs, where measuring alone costs that every `conflict_steps` steps. What
            the optimizer gets is the projected gradient; an update of Adam may still have a component against them.
    """

    conflict_steps: int = field(default=10, metadata={"help": "Measure gradient conflicts every N steps."})
    conflict_batch_size: int = field(
        default=8, metadata={"help": "Held-out pairs of each previous objective per measurement, an even number."}
    )
    project_conflicts: bool = field(
        default=False, metadata={"help": "Take out what goes against previous objectives (PCGrad), at every step."}
    )

    def check_conflict_options(self) -> None:
        """Raises a `ValueError` that names the first of these options that does not fit."""
        if self.conflict_steps < 1:
            raise ValueError(f"`conflict_steps` is a number of steps, at least 1; found {self.conflict_steps}.")
        if self.conflict_batch_size < 2 or self.conflict_batch_size % 2:
            raise ValueError(
                f"`conflict_batch_size` is {self.conflict_batch_size}; it is an even number of at least 2, since the "
                "two halves of the batch are compared."
            )


@dataclass
class ConflictAwareDPOConfig(ConflictOptions, DPOConfig):
    """`trl.DPOConfig` with the options of `ConflictOptions`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_conflict_options()


@dataclass
class ConflictAwareTangentDPOConfig(ConflictOptions, TangentDPOConfig):
    """`TangentDPOConfig` with the options of `ConflictOptions`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_conflict_options()


# ---- the trainers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredConflict:
    """One measurement.

    Attributes:
        step: optimizer steps done before.
        previous: the earlier objective.
        cosine: of the step's gradient, before any projection, with that objective's; NaN where one of them is zero.
        agreement: of the two halves of that objective's batch with each other.
        projected: whether something was taken out of the step's gradient for it.
    """

    step: int
    previous: str
    cosine: float
    agreement: float
    projected: bool


class ConflictAware(DPOTrainer):
    """Measures, and on request projects, conflicts with previous objectives; base of the two trainers below.

    Args:
        previous_datasets: held-out pairs of each objective trained before, by name, in TRL's formats; they are
            tokenized and batched as `eval_dataset` is. `None` or empty in a first stage.
        kwargs: of the trainer; its `args` must be one of the two configurations above.

    Raises:
        ValueError: for a model without an adapter that trains, a `ref_model`, an adapter under which the base is not
            the reference (see `check_base_is_reference`), data that is streamed or too small, a distributed engine, or
            `project_conflicts` without a previous objective.
    """

    args: Any
    model: Any
    processing_class: Any

    def __init__(self, *, previous_datasets: Mapping[str, Dataset] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conflicts: list[MeasuredConflict] = []
        self._refuse_engines()
        self._check_adapter()
        if self.args.project_conflicts and not previous_datasets:
            raise ValueError(
                "`project_conflicts=True` without `previous_datasets`: there is no objective to protect. Give the "
                "held-out pairs of each earlier objective, or leave the option out in a first stage."
            )
        self._previous = {name: self._prepared(name, data) for name, data in (previous_datasets or {}).items()}
        self._adapter: str = self.model.active_adapters[0]
        self._start: Deltas | None = None
        try:
            self._start = adapter_deltas(self.model, self._adapter)
        except ValueError as error:
            log.warning("Movement of the adapter is not measured. %s", error)

    def _refuse_engines(self) -> None:
        kind = self.accelerator.distributed_type
        name = kind.value if kind != DistributedType.NO else "DataParallel" if self.args.n_gpu > 1 else None
        if name is not None:
            raise ValueError(
                f"The distributed engine {name} is not supported by {type(self).__name__}, which takes whole "
                "gradients in one process. Train on one device."
            )

    def _check_adapter(self) -> None:
        if not isinstance(self.model, PeftModel):
            raise ValueError(
                f"{type(self).__name__} trains an adapter, whose base stays what it is and is the reference at every "
                "stage; the model has none. Give a PeftModel, or a `peft_config`."
            )
        if self.ref_model is not None:
            raise ValueError("`ref_model` is given, but the reference is the base at every stage. Leave it out.")
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError("No parameter of the adapter trains. Load it with `is_trainable=True`.")
        check_base_is_reference(self.model, trained)

    def _prepared(self, name: str, data: Dataset) -> Dataset:
        size = self.args.conflict_batch_size
        if not isinstance(data, Dataset):
            raise ValueError(
                f"The previous objective {name!r} has a {type(data).__name__}; rows are drawn at random from it, so it "
                "is a `datasets.Dataset`, not streamed."
            )
        if not self._is_vision_dataset:
            data = self._prepare_dataset(data, self.processing_class, self.args, name)
        if len(data) < size:
            raise ValueError(
                f"The previous objective {name!r} has {len(data)} held-out pairs that fit `max_length`, fewer than "
                f"`conflict_batch_size={size}`. Give more, or lower that."
            )
        if self.precompute_ref_logps:
            batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            data = self._precompute_ref_logps(data, name, batch_size)
        return data

    # ---- a step --------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's step; once a step's gradient is complete, it is compared with those of previous objectives."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        due = self.args.project_conflicts or self.state.global_step % self.args.conflict_steps == 0
        if due and self._previous and self.accelerator.sync_gradients:
            self._meet_previous(model)
        return loss

    def _meet_previous(self, model: nn.Module) -> None:
        step, trained = self.state.global_step, [p for p in model.parameters() if p.requires_grad]
        halves = [half for name in self._previous for half in self._previous_halves(model, trained, name)]
        stage = [_or_zero(p.grad, p) for p in trained]
        each = gradient_gram([stage, *halves])
        whole = torch.block_diag(torch.ones(1, 1), *[torch.full((1, 2), 0.5)] * len(self._previous)).to(each)
        gram = whole @ each @ whole.mT  # of the step's gradient and of each objective's, the mean of its two halves
        coefficients = torch.eye(1, len(gram), dtype=gram.dtype)[0]
        if self.args.project_conflicts and bool(gram.isfinite().all()):  # in fp16 a step may overflow: it is skipped
            order = random.Random(f"{self.args.seed} {step}").sample(range(1, len(gram)), len(gram) - 1)
            coefficients = pcgrad_coefficients(gram, order)
            add_gradients(stage, halves, (coefficients @ whole)[1:].tolist())
            for parameter, gradient in zip(trained, stage, strict=True):
                parameter.grad = gradient
        for place, name in enumerate(self._previous, start=1):
            agreement = gram_cosine(each, 2 * place - 1, 2 * place)
            projected = bool(coefficients[place] != 0)
            self._record(MeasuredConflict(step, name, gram_cosine(gram, 0, place), agreement, projected))

    def _record(self, found: MeasuredConflict) -> None:
        self.conflicts.append(found)
        values = {"cosine": found.cosine, "agreement": found.agreement}
        if self.args.project_conflicts:
            values["projected"] = float(found.projected)
        for kind, value in values.items():
            if math.isfinite(value):
                self._metrics["train"][f"conflict/{kind}_{found.previous}"].append(value)

    def _previous_halves(self, model: nn.Module, trained: Sequence[nn.Parameter], name: str) -> list[Gradient]:
        """The gradients of a previous objective on the two halves of a batch drawn for this step."""
        data, size = self._previous[name], self.args.conflict_batch_size
        rows = random.Random(f"{self.args.seed} {self.state.global_step} {name}").sample(range(len(data)), size)
        try:
            return [self._gradient(model, trained, [data[row] for row in part]) for part in (rows[::2], rows[1::2])]
        except FloatingPointError as error:
            raise FloatingPointError(
                f"On held-out pairs {sorted(rows)} of the previous objective {name!r}, as tokenized: {error}"
            ) from None

    def _gradient(self, model: nn.Module, trained: Sequence[nn.Parameter], rows: list[Any]) -> Gradient:
        """∂L/∂θ of a batch; the gradients that are being accumulated stay as they are."""
        accumulated = [p.grad for p in trained]
        for parameter in trained:
            parameter.grad = None
        try:
            with self._aside():
                inputs = self._prepare_inputs(self.data_collator(rows))
                with self.maybe_activation_offload_context, self.compute_loss_context_manager():
                    loss = self.compute_loss(model, inputs)
                if not bool(torch.isfinite(loss).all()):
                    raise FloatingPointError(f"The loss is {float(loss.detach())} at step {self.state.global_step}.")
                self.accelerator.backward(loss)
            return [_or_zero(p.grad, p) for p in trained]
        finally:
            for parameter, gradient in zip(trained, accumulated, strict=True):
                parameter.grad = gradient

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What runs inside the block leaves neither metrics nor random numbers of the training changed."""
        metrics, tokens = self._metrics, self._total_train_tokens
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        device = self.args.device
        rng = {} if device.type == "cpu" else {"device_type": device.type}
        try:
            with torch.random.fork_rng([device] if rng else [], **rng):
                yield
        finally:
            self._metrics, self._total_train_tokens = metrics, tokens

    # ---- movement ------------------------------------------------------------------------------------------------

    def movement(self) -> Movement | None:
        """How far the adapter is from where this stage began; `None` for an adapter that has no factors of a ΔW."""
        return None if self._start is None else movement(self._start, adapter_deltas(self.model, self._adapter))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The trainer's logs, with the movement of the adapter."""
        if "loss" in logs and (found := self.movement()) is not None:
            measured = {"moved": found.moved, "relative": found.relative, "cosine": found.cosine}
            logs |= {f"movement/{name}": value for name, value in measured.items() if math.isfinite(value)}
        super().log(logs, start_time)


def check_base_is_reference(model: PeftModel, trained: Sequence[str]) -> None:
    """Raises where switching the adapter off does not give the base back, from which the reference is read.

    Args:
        model: with one active adapter.
        trained: names of the parameters that train.

    Raises:
        ValueError: for an adapter named "ref", to which TRL refers instead; several active adapters; weights that train
            outside the adapter, such as biases; a LoRA that was taken out of the base's weights.
    """
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"The adapters {active} are active; a stage trains one. Call `model.set_adapter(name)`.")
    if "ref" in model.peft_config:
        raise ValueError(
            "The model has an adapter named 'ref', which `trl.DPOTrainer` adds, and to which TRL would refer instead "
            "of the base. Call `model.delete_adapter('ref')`, or load the adapter anew."
        )
    outside = [name for name in trained if f".{active[0]}." not in f"{name}."]
    if outside:
        raise ValueError(
            f"{len(outside)} parameters outside the adapter {active[0]!r} train, for example {outside[0]!r}, so the "
            "base would not stay the reference. Freeze them; a LoRA with `bias` other than 'none' trains the base's."
        )
    config: Any = model.peft_config[active[0]]
    start = config.init_lora_weights if isinstance(config, LoraConfig) else None
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"`init_lora_weights={start!r}` takes the LoRA's start out of the base's weights, and what is left of them "
            "would be the reference. Use `init_lora_weights=True`."
        )


def _or_zero(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient.detach()


class ConflictAwareDPOTrainer(ConflictAware):
    """`trl.DPOTrainer` of a LoRA for a stage of sequential DPO: conflicts are measured, the reference is the base.

    Takes the arguments of `trl.DPOTrainer` by name, and `previous_datasets`; see `ConflictAware`.

    Args:
        model: a `PeftModel` whose adapter trains on, or a model with `peft_config` for a first stage.
        args: a `ConflictAwareDPOConfig`.
        peft_config: for a plain model.
        kwargs: as `trl.DPOTrainer` and `ConflictAware`.
    """

    def __init__(self, *, model: Any, args: Any, peft_config: PeftConfig | None = None, **kwargs: Any) -> None:
        _check_config(args, ConflictAwareDPOConfig, type(self))
        if not isinstance(model, PeftModel) or peft_config is not None:
            super().__init__(model=model, args=args, peft_config=peft_config, **kwargs)
            return
        adapter: Any = model.peft_config[model.active_adapters[0]]
        with wrapping_by(lambda *unused, **options: model):  # TRL would clone the adapter and refer to that
            super().__init__(model=model.get_base_model(), args=args, peft_config=adapter, **kwargs)


class ConflictAwareTangentDPOTrainer(ConflictAware, TangentDPOTrainer):
    """`TangentDPOTrainer` for a stage of sequential DPO on one axis: conflicts are measured.

    Takes the arguments of `TangentDPOTrainer` by name, and `previous_datasets`; see `ConflictAware`.

    Args:
        args: a `ConflictAwareTangentDPOConfig`.
        kwargs: as `TangentDPOTrainer` and `ConflictAware`.
    """

    def __init__(self, *, args: Any, **kwargs: Any) -> None:
        _check_config(args, ConflictAwareTangentDPOConfig, type(self))
        super().__init__(args=args, **kwargs)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        with super()._aside(), self.watch.aside():
            yield


def _check_config(args: Any, expected: type, trainer: type) -> None:
    if not isinstance(args, expected):
        raise TypeError(f"`args` is a {type(args).__name__}; {trainer.__name__} takes a {expected.__name__}.")
