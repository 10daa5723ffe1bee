"""What is measured of a training beside TRL's metrics: KL to the base, ‖τ‖, linearity gap, adjoint identity.

All of it goes into the trainer's metrics under the name of the axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from tangent_peft.train.adjoint import AdjointCheck
from tangent_peft.train.config import TangentDPOConfig
from tangent_peft.tuner import axis_norm, linearity_gap


_TOKENS = {"input_ids", "attention_mask"}
_NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
GAP_TOKENS = 64  # logits over the whole vocabulary are compared, so a few must do


class Watch:
    """Measures one training of one axis.

    Args:
        trainer: whose model is measured, and who logs.
        axis: the axis that trains.
        args: how often, `adjoint_check_steps` and `linearity_gap_steps`.
    """

    def __init__(self, trainer: DPOTrainer, axis: str, args: TangentDPOConfig) -> None:
        self.trainer, self.axis, self.args = trainer, axis, args
        self.restart()

    def restart(self) -> None:
        """Counts steps anew, as a second call of `train` does."""
        self._kl = torch.zeros(2, dtype=torch.float64)  # its sum over the completion tokens of a step, their number
        self._kl_step = self._checked_step = self._measured_step = self._checks = 0

    @property
    def _model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _log(self, name: str, value: float, training: bool = True) -> None:
        self.trainer._metrics["train" if training else "eval"][f"{name}/{self.axis}"].append(value)

    def norm(self) -> float:
        """‖τ‖."""
        return axis_norm(self._model, self.axis)

    # ---- KL ------------------------------------------------------------------------------------------------------

    def record_kl(self, kl: Tensor | None, step: int) -> None:
        """Logs the mean KL of a batch's completion tokens.

        Args:
            kl: its sum and their number, (2,) in this process; `None` if the batch was not linearized.
            step: the optimizer steps done so far.
        """
        if kl is None:
            return
        kl = self.trainer.accelerator.gather_for_metrics(kl[None]).sum(0).cpu()
        training = self._model.training
        self._log("kl", _mean(kl), training)
        if training:  # batches that are accumulated into one step count as one
            self._kl = self._kl + kl if step + 1 == self._kl_step else kl
            self._kl_step = step + 1

    def step_kl(self) -> float:
        """Mean KL of the last step's completion tokens, in nats."""
        return _mean(self._kl)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Nothing that runs inside the block counts towards the step's KL."""
        kept = self._kl, self._kl_step
        try:
            yield
        finally:
            self._kl, self._kl_step = kept

    # ---- linearity gap -------------------------------------------------------------------------------------------

    def measure_linearity_gap(self, step: int, inputs: dict[str, Any]) -> None:
        """Logs the gap every `linearity_gap_steps` steps, on answer tokens of the batch's first row.

        A row of a batch with images can not be cut out: the whole batch runs then, and is compared where every row has
        a token.
        """
        every = self.args.linearity_gap_steps
        if every is None or step % every or step == self._measured_step:
            return
        self._measured_step = step
        answer = inputs["completion_mask"][0, 1:].bool()  # the positions that predict an answer token
        if inputs.keys() <= _TOKENS | _NOT_FOR_THE_MODEL:
            sample = {name: inputs[name][:1] for name in _TOKENS}
        else:
            sample = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
            real = inputs["attention_mask"].bool().all(dim=0)[:-1]
            answer = answer & real if bool((answer & real).any()) else real
        sample["logits_to_keep"] = answer.nonzero().view(-1)[:GAP_TOKENS]
        self._log("linearity_gap", linearity_gap(self._model, [self.trainer._prepare_inputs(sample)]).gap)

    # ---- the adjoint identity ------------------------------------------------------------------------------------

    def adjoint_check_is_due(self, step: int) -> bool:
        """At the second and third step, when τ has left zero, and every N steps; once per step with accumulation."""
        every = self.args.adjoint_check_steps
        return bool(every) and step != self._checked_step and (step in (1, 2) or (step > 0 and step % every == 0))

    def adjoint_check_replays(self) -> bool:
        """Whether the next check replays the step or takes it as it is: in turns, each sees what the other can not.

        The replay shares no code with the forward pass, so it sees a tangent that was lost there. A recorded gradient
        is the transpose of what ran, lost tangents included, and only by itself it can be seen to be lost.
        """
        return self._checks % 2 == 0

    @contextmanager
    def adjoint_check(self, step: int) -> Iterator[AdjointCheck]:
        """Checks the backward pass inside the `with` block, which gives the yielded check's `probe` to the head.

        Raises:
            RuntimeError: if the identity does not hold.
        """
        self._checked_step = step
        self._checks += 1
        with AdjointCheck(self._model, self.axis, self._compute_dtype) as check:
            yield check
        error = check.error()
        if error is not None:
            self._log("adjoint_error", error)
            check.require(error, step, self.axis)

    @property
    def _compute_dtype(self) -> torch.dtype:
        """The coarsest precision that takes part: autocast's, or that of the base."""
        named = {"bf16": torch.bfloat16, "fp16": torch.float16}
        base = next(p for name, p in self._model.named_parameters() if ".tangent_" not in name)
        return named.get(self.trainer.accelerator.mixed_precision, base.dtype)


def _mean(sum_and_count: Tensor) -> float:
    total, count = sum_and_count.tolist()
    return float(total / max(count, 1))
