"""`tangent-peft quickstart`: the whole life of two axes on a small real model, in minutes on a CPU.

Load, train `help` and `verb` by TS-DPO, ask what each learned on held-out pairs, sweep λ_verb in both evaluations, write
results, picture, axes, a merged model and a plain LoRA. `examples/quickstart.py` is the same job as a script to copy from.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from tangent_peft.cli.smollm2 import Axis, load_smollm2, quickstart_pairs


AXES: tuple[Axis, ...] = ("help", "verb")
LAMBDAS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
HELDOUT_PAIRS = 24  # per axis
EXPORTED = {"help": 1.0, "verb": -0.5}
TRAINING = {
    "r": 16,
    "learning_rate": 2e-3,
    "beta": 0.1,
    "pairs_per_step": 4,
}


@dataclass(frozen=True)
class QuickstartOptions:
    """What the command line offers.

    Attributes:
        output: directory to write.
        steps: optimizer steps per axis.
        prompts: held-out questions that the sweep answers.
        tokens: length limit of an answer.
        seed: seed of data order.
    """

    output: Path
    steps: int = 16
    prompts: int = 12
    tokens: int = 48
    seed: int = 0


@dataclass
class QuickstartReport:
    """Everything `results.json` holds.

    Attributes:
        options: the command's options and the training constants.
        accuracy: held-out preference accuracy by axis and model: base, linearized, merged.
        sweep: one entry per λ_verb and evaluation: mean scores, answers, linearity gap.
        kendall_tau: rank correlation of λ_verb and the mean length, by evaluation.
        lora: rank and relative error of the LoRA export.
        seconds: wall time by stage.
        peak_memory_gb: largest resident size of the process.
    """

    options: dict[str, Any]
    accuracy: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    sweep: list[dict[str, Any]] = field(default_factory=list)
    kendall_tau: dict[str, float] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gb: float = math.nan


class Stage:
    """A context that names a stage on the console and records its wall time in a report."""

    def __init__(self, report: QuickstartReport, console: Console, name: str) -> None:
        self.report, self.console, self.name = report, console, name

    def __enter__(self) -> None:
        self.console.rule(f"[bold]{self.name}")
        self.begun = time.perf_counter()

    def __exit__(self, *unused: object) -> None:
        self.report.seconds[self.name] = round(time.perf_counter() - self.begun, 1)


def run_quickstart(options: QuickstartOptions, console: Console | None = None) -> QuickstartReport:
    """Runs the job and writes `options.output`.

    Args:
        options: sizes and the directory to write.
        console: where tables go; standard output by default.

    Returns:
        The report that was also written as `results.json`.

    Raises:
        ImportError: if a package of the extra `quickstart`, or the wheel with the model, is missing.
    """
    _require()
    console = Console() if console is None else console
    transformers_logging.set_verbosity_error()
    set_seed(options.seed)
    report = QuickstartReport({**asdict(options), "output": str(options.output), **TRAINING, "lambdas": LAMBDAS})
    options.output.mkdir(parents=True, exist_ok=True)
    with Stage(report, console, "load"):
        base, tokenizer = load_smollm2()
    with Stage(report, console, "train"):
        model = train_axes(base, tokenizer, options)
        model.save_pretrained(options.output / "axes")
    with Stage(report, console, "accuracy on held-out pairs"):
        report.accuracy = heldout_accuracy(model, tokenizer)
        _print_accuracy(console, report.accuracy)
    with Stage(report, console, "sweep"):
        _sweep(model, tokenizer, options, report, console)
    with Stage(report, console, "export"):
        model.export_merged(options.output / "merged", EXPORTED, tokenizer)
        report.lora = _export_lora(model, options.output / "lora")
        console.print(f"merged model and LoRA at {EXPORTED}: {options.output}/merged, {options.output}/lora")
    report.peak_memory_gb = _peak_memory_gb()
    (options.output / "results.json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    total = sum(report.seconds.values())
    console.print(f"{total:.0f} s, {report.peak_memory_gb:.1f} GB at most; everything is in {options.output}/")
    return report


def _require() -> None:
    """Names the extra before minutes are spent."""
    try:
        import datasets  # noqa: F401
        import matplotlib  # noqa: F401
        import moocore  # noqa: F401
        import scipy  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'The quickstart needs {error.name}, which is not installed: pip install "tangent-peft[quickstart]"'
        ) from error


# ---- training --------------------------------------------------------------------------------------------------------


def train_axes(base: Any, tokenizer: PreTrainedTokenizerBase, options: QuickstartOptions) -> Any:
    """Trains both axes on `base`, one after the other and independently; returns the `PeftModel` that holds them."""
    from datasets import Dataset
    from peft import get_peft_model

    from tangent_peft import TangentConfig, TangentDPOConfig, TangentDPOTrainer

    model = None
    for axis in AXES:
        config = TangentConfig(task_type="CAUSAL_LM", r=int(TRAINING["r"]))
        if model is None:
            model = get_peft_model(base, config, adapter_name=axis)
        else:
            model.add_adapter(axis, config)
        rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in quickstart_pairs(axis, "train")]
        args = TangentDPOConfig(
            output_dir=str(options.output / "trainer"),
            axis=axis,
            learning_rate=TRAINING["learning_rate"],
            beta=TRAINING["beta"],
            per_device_train_batch_size=int(TRAINING["pairs_per_step"]),
            max_steps=options.steps,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=2,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            seed=options.seed,
        )
        TangentDPOTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        ).train()
    return model


def heldout_accuracy(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, dict[str, float]]]:
    """Preference accuracy on each axis's held-out pairs: the base, the axis at λ = 1 linearized, and merged."""
    from tangent_peft.evaluate.preferences import pair_logps, preference_accuracy

    accuracy: dict[str, dict[str, dict[str, float]]] = {}
    for axis in AXES:
        pairs = quickstart_pairs(axis, "heldout")[:HELDOUT_PAIRS]
        with model.axes({}):
            base, lengths = pair_logps(model, tokenizer, pairs, progress=f"{axis}: base")
        accuracy[axis] = {"base": asdict(preference_accuracy(base, base, lengths))}
        for name, flag in (("linearized", True), ("merged", False)):
            with model.axes({axis: 1.0}), model.linearized(flag):
                logps, _ = pair_logps(model, tokenizer, pairs, progress=f"{axis}: {name}")
            accuracy[axis][name] = asdict(preference_accuracy(logps, base, lengths))
    return accuracy


# ---- the sweep -------------------------------------------------------------------------------------------------------


def _sweep(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: QuickstartOptions,
    report: QuickstartReport,
    console: Console,
) -> None:
    from scipy.stats import kendalltau

    from tangent_peft.evaluate import answer_length, plot_fronts, question_relevance, sweep

    questions = list(dict.fromkeys(row["prompt"][0]["content"] for row in quickstart_pairs("verb", "heldout")))
    questions = questions[: options.prompts]

    def length(_: Sequence[str], answers: Sequence[str]) -> list[int]:
        return answer_length(tokenizer, answers)

    def relevance(asked: Sequence[str], answers: Sequence[str]) -> list[float]:
        with model.axes({}):
            return question_relevance(model, tokenizer, asked, answers).tolist()

    mixes = [{"verb": weight} for weight in LAMBDAS]
    points = sweep(
        model, tokenizer, mixes, questions, {"help": relevance, "verb": length}, max_new_tokens=options.tokens
    )
    gaps = _gaps(model, tokenizer, questions, mixes)
    report.sweep = [{**point.to_dict(), "gap": gaps[point.weights["verb"]]} for point in points]
    for evaluation in ("linearized", "merged"):
        scores = [point.scores["verb"] for point in points if point.evaluation == evaluation]
        report.kendall_tau[evaluation] = float(kendalltau(LAMBDAS, scores).statistic)
    _print_sweep(console, report, questions[0])
    labels = ("help: relevance to the question (nats per token)", "verb: answer length (tokens)")
    plot_fronts(points, "help", "verb", options.output / "pareto.png", labels)


def _gaps(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], mixes: Sequence[dict[str, float]]
) -> dict[float, float]:
    """The linearity gap of each mix on the questions, with the held-out chosen answers after them."""
    from tangent_peft.diagnose import linearity_gap

    rows = {row["prompt"][0]["content"]: row for row in quickstart_pairs("verb", "heldout")}
    texts = [
        tokenizer.apply_chat_template([*rows[q]["prompt"], *rows[q]["chosen"]], tokenize=False) for q in questions[:4]
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    gaps = {}
    for mix in mixes:
        with model.axes(mix):
            gaps[mix["verb"]] = linearity_gap(model, [batch]).gap
    return gaps


# ---- export and printing ---------------------------------------------------------------------------------------------


def _export_lora(model: Any, path: Path) -> dict[str, Any]:
    exported = model.export_lora(path, EXPORTED)
    return {"weights": EXPORTED, "rank": exported.rank, "relative_error": exported.relative_error}


def _print_accuracy(console: Console, accuracy: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table("axis", "model", "policy accuracy", "per token", "reward accuracy", "margin (nats)")
    for axis, models in accuracy.items():
        for name, values in models.items():
            figures = [f"{values[key]:.2f}" for key in ("policy", "policy_per_token", "reward", "margin")]
            table.add_row(axis, name, *figures)
    console.print(table)


def _print_sweep(console: Console, report: QuickstartReport, question: str) -> None:
    points = {(entry["weights"]["verb"], entry["evaluation"]): entry for entry in report.sweep}
    console.print(f"[bold]{question}")
    for weight in LAMBDAS:
        for evaluation in ("linearized", "merged"):
            answer = points[weight, evaluation]["answers"][0].replace("\n", " ")
            console.print(f"  λ_verb {weight:+.1f} {evaluation:>10}: {answer}", markup=False, highlight=False)
    table = Table(title="Means over the held-out questions")
    table.add_column("λ_verb", justify="right")
    for heading in ("verb, linearized", "verb, merged", "help, linearized", "help, merged", "linearity gap"):
        table.add_column(heading, justify="right")
    for weight in LAMBDAS:
        linear, merged = points[weight, "linearized"], points[weight, "merged"]
        table.add_row(
            f"{weight:+.1f}",
            f"{linear['scores']['verb']:.1f}",
            f"{merged['scores']['verb']:.1f}",
            f"{linear['scores']['help']:.2f}",
            f"{merged['scores']['help']:.2f}",
            f"{linear['gap']:.2f}",
        )
    console.print(table)
    for evaluation, tau in report.kendall_tau.items():
        console.print(f"Kendall τ of λ_verb and answer length, {evaluation}: {tau:+.2f}")


def _peak_memory_gb() -> float:
    """Largest resident size so far; NaN where the platform does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
