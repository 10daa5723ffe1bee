"""What the demo does, without its page: answers of several mixes as they are written, linearity gaps, exports.

One thing at a time: the active mix belongs to the model, so each job holds a lock. Errors are `ValueError` or `OSError`
with a sentence that may be shown to anybody. Knows no Gradio.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import BatchEncoding, PreTrainedTokenizerBase, StoppingCriteriaList

from tangent_peft.cli.demo_stream import Answer, RowStreamer, StopOn
from tangent_peft.diagnose import LinearityGap, linearity_gap
from tangent_peft.evaluate import SweepTable
from tangent_peft.tuner.axes import SAFE_WEIGHT, tangent_tuner
from tangent_peft.tuner.safe_range import range_of


Form = Literal["lora", "merged"]
PROMPT_TOKENS = 1024  # a longer question is cut: a demonstration should answer soon
QUESTIONS = (
    "How do I make tea?",
    "Why is the sky blue?",
    "What should I pack for a weekend trip?",
    "How do I learn to swim?",
)


@dataclass(frozen=True)
class AskOptions:
    """How to answer.

    Attributes:
        linearized: f_lin, as the axes were trained, or the ordinary network at θ(λ), which is what an export runs.
        max_new_tokens: length limit of an answer.
        temperature: 0 for the most likely token each time.
    """

    linearized: bool = True
    max_new_tokens: int = 96
    temperature: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """A question ready for the model.

    Attributes:
        inputs: token ids and mask (1, T).
        note: what was done to it that its author should know; empty if nothing.
    """

    inputs: BatchEncoding
    note: str


class DemoSession:
    """A model with axes that answers, measures and exports.

    Args:
        model: a `PeftModel` with tangent axes.
        tokenizer: of the base.
        base_name: name of the base to show.
        sweep: a saved sweep of these axes, if there is one.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, base_name: str, sweep: SweepTable | None = None
    ) -> None:
        self.model, self.tokenizer, self.base_name, self.sweep = model, tokenizer, base_name, sweep
        self.axes: list[str] = list(model.peft_config)
        self.questions = list(sweep.questions[:4] if sweep is not None and sweep.questions else QUESTIONS)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._gaps: dict[tuple[tuple[str, float], ...], LinearityGap] = {}  # by mix, without zeros

    # ---- answers -----------------------------------------------------------------------------------------------

    def prepare(self, question: str, options: AskOptions) -> Prompt:
        """The question in the model's chat format, cut to what the model can read.

        Raises:
            ValueError: for an empty question, or one for which the model has no room.
        """
        if not question.strip():
            raise ValueError("Type a question first.")
        positions = self.model.config.get_text_config().max_position_embeddings
        limit = min(PROMPT_TOKENS, positions - options.max_new_tokens)
        inputs = self._encode(question)
        length, kept = inputs["input_ids"].shape[1], question
        ids: list[int] = [] if length <= limit else self.tokenizer(question, add_special_tokens=False)["input_ids"]
        count = len(ids)
        while inputs["input_ids"].shape[1] > limit:
            ids = ids[: len(ids) - (inputs["input_ids"].shape[1] - limit)]
            if not ids:
                raise ValueError(
                    f"The model reads {positions} tokens at most, which leaves no room for a question beside an answer "
                    f"of {options.max_new_tokens}. Choose a shorter answer."
                )
            kept = str(self.tokenizer.decode(ids))
            inputs = self._encode(kept)
        note = f"The question was too long: only its first {len(ids)} of {count} tokens were read." if count else ""
        return Prompt(inputs.to(self.model.device), note)

    def _encode(self, question: str) -> BatchEncoding:
        if self.tokenizer.chat_template is None:  # a base model: it goes on writing
            return self.tokenizer(question, return_tensors="pt")
        chat = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False)

    def stream_answers(
        self, prompt: Prompt, mixes: Sequence[Mapping[str, float]], options: AskOptions
    ) -> Iterator[list[Answer]]:
        """The answers of all mixes, one row of a batch each, again and again as they grow; the last are whole.

        Args:
            prompt: from `prepare`.
            mixes: λ by axis, one mapping for each answer.
            options: how to answer.

        Raises:
            ValueError: as `model.combine_axes`.
        """
        job = _AnswerJob(prompt, [dict(mix) for mix in mixes], options)
        worker = threading.Thread(target=self._answer, args=(job,), name="demo-answers", daemon=True)
        worker.start()
        try:
            answers = [Answer() for _ in mixes]
            yield answers
            while (update := job.updates.get()) is not None:
                if isinstance(update, BaseException):
                    raise update
                answers = update
                if job.updates.empty():  # a slow reader need not see every token
                    yield answers
            yield answers
        finally:
            job.stop.set()  # for a reader that went away
            worker.join()

    def _answer(self, job: _AnswerJob) -> None:
        try:
            with self._job(), self.model.linearized(job.options.linearized):
                self._stop = job.stop
                self._generate(job)
            job.updates.put(None)
        except BaseException as error:
            job.updates.put(error)

    def _generate(self, job: _AnswerJob) -> None:
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if job.options.temperature > 0:
            sampling = {"do_sample": True, "temperature": job.options.temperature}
        ends = self._end_tokens()
        padding = self.tokenizer.pad_token_id
        rows = {name: value.expand(len(job.mixes), -1) for name, value in job.prompt.inputs.items()}
        self.model.generate(
            **rows,
            **sampling,
            axis_weights=job.mixes,
            max_new_tokens=job.options.max_new_tokens,
            pad_token_id=min(ends, default=None) if padding is None else padding,
            streamer=RowStreamer(self.tokenizer, ends, job.updates.put, job.stop.is_set),
            stopping_criteria=StoppingCriteriaList([StopOn(job.stop)]),
        )

    def stop(self) -> None:
        """Ends the answers that are being written after their next token."""
        self._stop.set()

    def _end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        found = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        return {end for end in found if end is not None}

    # ---- what a mix is worth -----------------------------------------------------------------------------------

    def warn_of(self, mix: Mapping[str, float]) -> str:
        """A sentence for a mix outside its axes' measured ranges, or ±3 without one; empty inside."""
        ranges = {axis: range_of(tangent_tuner(self.model), axis) for axis in mix}
        left = [axis for axis, found in ranges.items() if found is not None and not found.holds(mix[axis])]
        far = [axis for axis, weight in mix.items() if axis not in left and abs(weight) > SAFE_WEIGHT]
        parts = [
            f"{axis} = {mix[axis]:g} is outside its measured range, {ranges[axis]}: merged, it is another model."
            for axis in left
        ]
        if far:
            named = ", ".join(f"{axis} = {mix[axis]:g}" for axis in far)
            parts.append(f"{named}: beyond ±{SAFE_WEIGHT:g} mixes were found to break down.")
        return f"Outside the safe range: {' '.join(parts)} Read these answers with care." if parts else ""

    def measure_gap(self, mix: Mapping[str, float]) -> LinearityGap:
        """The linearity gap of a mix on `questions`; measured once for each mix."""
        known = self.known_gap(mix)
        if known is None:
            batches = [self._encode(question).to(self.model.device) for question in self.questions]
            weights = dict(_without_zeros(mix))
            with self._job(), self.model.axes(weights):
                known = self._gaps[_without_zeros(mix)] = linearity_gap(self.model, batches)
        return known

    def known_gap(self, mix: Mapping[str, float]) -> LinearityGap | None:
        """The linearity gap of a mix if it is known without the model."""
        key = _without_zeros(mix)
        return self._gaps.get(key) if key else LinearityGap({}, 0.0, 0.0, 0)

    # ---- exports -----------------------------------------------------------------------------------------------

    def export(self, folder: str, mix: Mapping[str, float], form: Form) -> str:
        """Writes a mix for other software; what was written, in plain words.

        Args:
            folder: where to; it must not exist yet, or be empty.
            mix: λ by axis; those at 0 are left out.
            form: a LoRA adapter for the base, or the whole model.

        Raises:
            ValueError: for no folder, a mix of nothing but zeros, and as `model.export_lora` and `model.export_merged`.
            OSError: for a folder that exists, or can not be written.
        """
        if not folder.strip():
            raise ValueError("Say which folder to write to.")
        weights = {axis: weight for axis, weight in mix.items() if weight}
        if not weights:
            raise ValueError("All sliders of this mix are at 0: that is the original model, and nothing to export.")
        path = Path(folder.strip()).expanduser().resolve()
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FileExistsError(f"{path} exists already, and nothing is overwritten. Choose another folder.")
        with self._job(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            if form == "lora":
                written = self.model.export_lora(path, weights)
                found = f"a LoRA adapter of rank {written.rank}, relative error {written.relative_error:.2g}"
            else:
                self.model.export_merged(path, weights, self.tokenizer)
                found = "a whole model, which plain transformers loads"
        described = ", ".join(f"{axis} {weight:+g}" for axis, weight in weights.items())
        notes = [str(warning.message) for warning in caught]
        return "\n".join([f"Wrote {found}, of the mix {described}, to {path}", *notes])

    @contextmanager
    def _job(self) -> Iterator[None]:
        """One use of the model at a time. The library's warning of λ is left to `warn_of`, which the page shows."""
        with self._lock, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="λ = ", category=UserWarning)
            yield


def _without_zeros(mix: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((axis, weight) for axis, weight in mix.items() if weight))


class _AnswerJob:
    """One question under several mixes: what was asked, where its answers go, whether to stop."""

    def __init__(self, prompt: Prompt, mixes: list[dict[str, float]], options: AskOptions) -> None:
        self.prompt, self.mixes, self.options = prompt, mixes, options
        # all answers as far as they are written, an error, or `None` at the end
        self.updates: queue.SimpleQueue[list[Answer] | BaseException | None] = queue.SimpleQueue()
        self.stop = threading.Event()
