"""The heavy work of the quickstart, one job per core: training an axis, evaluating the axes in one way.

Each job is a function of plain values that loads what it needs, so that it can run in a process of its own. It reports
progress as `Progress` messages and knows neither the terminal nor the other jobs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from tangent_peft.cli.memory import peak_memory_gb
from tangent_peft.cli.smollm2 import Axis, load_smollm2, quickstart_pairs


AXES: tuple[Axis, ...] = ("help", "verb")
LAMBDAS = (-2.0, -1.5, -1.25, -1.0, -0.75, 0.0, 1.0, 2.0)
RANK = 16
LEARNING_RATE = 1.5e-3
BETA = 0.1
PAIRS_PER_STEP = 4
SCORED_PAIRS = 2  # per forward; logits of the whole vocabulary are held for their answers


@dataclass(frozen=True)
class QuickstartOptions:
    """What the command line offers.

    Attributes:
        output: directory to write.
        steps: optimizer steps per axis.
        pairs: held-out pairs per axis on which accuracy is measured.
        prompts: held-out questions that the sweep answers.
        tokens: length limit of an answer.
        seed: seed of the data order.
    """

    output: Path
    steps: int = 16
    pairs: int = 16
    prompts: int = 6
    tokens: int = 48
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """One step forward in a job: its name, how far it is, and how far it will go."""

    job: str
    done: int
    total: int


_messages: Any = None  # the queue to the parent process, where there is one


class Counter:
    """Counts the steps of a job and tells the parent process of each."""

    def __init__(self, job: str, total: int) -> None:
        self.job, self.done, self.total = job, 0, total

    def __call__(self) -> None:
        """Counts one step."""
        self.done += 1
        if _messages is not None:
            _messages.put(Progress(self.job, self.done, self.total))


def prepare_worker(threads: int, messages: Any = None) -> None:
    """Sets up a process for one job at a time on `threads` cores, which puts its progress on the queue `messages`."""
    global _messages
    _messages = messages
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the host libraries' own deprecations
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


# ---- training --------------------------------------------------------------------------------------------------------


class _StepCallback(TrainerCallback):
    """Passes each optimizer step on."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer after an optimizer step."""
        self.counter()


def train_axis(axis: Axis, options: QuickstartOptions) -> dict[str, float]:
    """Trains one axis by TS-DPO and saves it to `output/axes/<axis>`.

    Returns:
        Loss and reward margin of the last step, and the peak memory of the process.
    """
    from datasets import Dataset
    from datasets.utils import logging as datasets_logging
    from peft import get_peft_model

    from tangent_peft import TangentConfig, TangentDPOConfig, TangentDPOTrainer

    datasets_logging.disable_progress_bar()
    set_seed(options.seed)
    base, tokenizer = load_smollm2()
    model = get_peft_model(base, TangentConfig(task_type="CAUSAL_LM", r=RANK), adapter_name=axis)
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in quickstart_pairs(axis, "train")]
    args = TangentDPOConfig(
        output_dir=str(options.output / "trainer" / axis),
        axis=axis,
        learning_rate=LEARNING_RATE,
        beta=BETA,
        per_device_train_batch_size=PAIRS_PER_STEP,
        max_steps=options.steps,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,  # there is memory to spare
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        log_level="error",
        seed=options.seed,
    )
    trainer = TangentDPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_StepCallback(Counter(f"train {axis}", options.steps))],
    )
    trainer.pop_callback(_printer())
    trainer.train()
    model.save_pretrained(str(options.output / "axes"))
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    figures = {key: float(last[key]) for key in ("loss", "rewards/margins")}
    return {**figures, "peak_memory_gb": peak_memory_gb()}


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


# ---- evaluation ------------------------------------------------------------------------------------------------------


def load_axes(options: QuickstartOptions) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model with both saved axes, and its tokenizer."""
    from peft import PeftModel

    base, tokenizer = load_smollm2()
    model = PeftModel.from_pretrained(base, options.output / "axes" / AXES[0], adapter_name=AXES[0])
    for axis in AXES[1:]:
        model.load_adapter(options.output / "axes" / axis, adapter_name=axis)
    return model.eval(), tokenizer


def evaluate_axes(evaluation: str, options: QuickstartOptions) -> dict[str, Any]:
    """Everything that is measured in one evaluation; `"merged"` also scores the base and measures the linearity gap.

    Returns:
        `logps`: log-probs and lengths of the held-out pairs by axis, those of the base as `"base"`; `sweep`: a point
        per λ_verb; `gaps`: the linearity gap by λ_verb; the peak memory of the process.
    """
    model, tokenizer = load_axes(options)
    merged = evaluation == "merged"
    batches = math.ceil(options.pairs / SCORED_PAIRS)
    total = len(LAMBDAS) * (3 if merged else 2) + len(AXES) * batches * (2 if merged else 1)
    step = Counter(f"evaluate {evaluation}", total)
    result: dict[str, Any] = {"logps": _logps(model, tokenizer, evaluation, options, step)}
    result["sweep"] = _sweep(model, tokenizer, evaluation, options, step)
    if merged:
        result["gaps"] = _gaps(model, tokenizer, step)
    return {**result, "peak_memory_gb": peak_memory_gb()}


def _logps(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: str,
    options: QuickstartOptions,
    step: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    from tangent_peft.evaluate.preferences import pair_logps

    found: dict[str, dict[str, Any]] = {}
    for axis in AXES:
        pairs = quickstart_pairs(axis, "heldout")[: options.pairs]
        mixes = {evaluation: {axis: 1.0}} | ({"base": {}} if evaluation == "merged" else {})
        found[axis] = {}
        for name, mix in mixes.items():
            with model.axes(mix), model.linearized(evaluation == "linearized"):
                found[axis][name] = pair_logps(model, tokenizer, pairs, SCORED_PAIRS, step)
    return found


def _sweep(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: str,
    options: QuickstartOptions,
    step: Callable[[], None],
) -> list[Any]:
    from tangent_peft.evaluate import Decoding, SweepOptions, question_coverage, sweep

    asked = questions(options)
    how = SweepOptions(
        evaluations=(evaluation,),  # type: ignore[arg-type]
        decoding=Decoding(options.tokens),
        batch_size=len(asked),
        kl=False,
        gap=0,
        progress=lambda done, total: step(),
    )
    mixes = [{"verb": weight} for weight in LAMBDAS]
    return sweep(model, tokenizer, mixes, asked, {"coverage": question_coverage}, options=how).points


def questions(options: QuickstartOptions) -> list[str]:
    """The held-out questions of the sweep."""
    asked = (row["prompt"][0]["content"] for row in quickstart_pairs("verb", "heldout"))
    return list(dict.fromkeys(asked))[: options.prompts]


def calibration_batches(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Four held-out questions with their chosen answers, to measure linearity gaps on."""
    rows = {row["prompt"][0]["content"]: row for row in quickstart_pairs("verb", "heldout")}
    chats = [[*row["prompt"], *row["chosen"]] for row in list(rows.values())[:4]]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return [tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts]


def _gaps(model: Any, tokenizer: PreTrainedTokenizerBase, step: Callable[[], None]) -> dict[float, float]:
    """The linearity gap by λ_verb."""
    from tangent_peft.diagnose import linearity_gap

    batches, gaps = calibration_batches(tokenizer), {}
    for weight in LAMBDAS:
        with model.axes(verb=weight):
            gaps[weight] = linearity_gap(model, batches).gap
        step()
    return gaps
