"""What happens on the demo's page: each event's handler, from values of components to values of components.

A handler never raises: what goes wrong becomes a sentence on the page. What is done is in `demo_session.py`, where the
components lie in `demo_page.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from tangent_peft.cli.demo_pictures import View, gauge, sweep_picture
from tangent_peft.cli.demo_session import AskOptions, DemoSession
from tangent_peft.cli.demo_stream import Answer


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, and whenever it would report

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(
        f'The demo needs {error.name}, which is not installed: pip install "tangent-peft[demo]"'
    ) from error


MIXES = ("A", "B")
EXPECTED = (ValueError, OSError, ImportError, NotImplementedError)

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_LIGHT: dict[str, Any] = {**_QUIET, "queue": False}  # touches no model
# Each change is answered, in order. Gradio's "always_last" dispatches a change that came during another one for ever.
_IN_ORDER: dict[str, Any] = {**_QUIET, "trigger_mode": "multiple", "concurrency_limit": 1}
_HEAVY: dict[str, Any] = {**_QUIET, "concurrency_id": "model", "concurrency_limit": 1}
_STATES = {
    "waiting": "Reading the question …",
    "writing": "Writing …",
    "complete": "The model ended here",
    "cut off": "Cut off at the longest answer allowed",
    "stopped": "Stopped",
}

logger = logging.getLogger(__name__)


@dataclass
class Card:
    """The components of one mix, filled by the layout."""

    sliders: list[gr.Slider] = field(default_factory=list)
    warning: Any = None
    answer: Any = None
    status: Any = None
    gauge: Any = None


@dataclass
class Parts:
    """All components that events read or write, filled by the layout; `picture` stays `None` without a sweep."""

    cards: dict[str, Card] = field(default_factory=lambda: {name: Card() for name in MIXES})
    question: Any = None
    evaluation: Any = None
    tokens: Any = None
    temperature: Any = None
    ask: Any = None
    stop: Any = None
    message: Any = None
    picture: Any = None
    scores: list[Any] = field(default_factory=list)
    target: Any = None
    export: list[Any] = field(default_factory=list)
    save: Any = None
    saved: Any = None

    @property
    def sliders(self) -> list[gr.Slider]:
        """Those of mix A, then those of mix B."""
        return [slider for card in self.cards.values() for slider in card.sliders]


def connect(page: gr.Blocks, parts: Parts, session: DemoSession) -> None:
    """Ties the components to the session."""
    handlers = Handlers(session)
    cards = list(parts.cards.values())
    written = [component for card in cards for component in (card.answer, card.status)]
    asked = [parts.question, parts.evaluation, parts.tokens, parts.temperature, *parts.sliders]
    gauges = [card.gauge for card in cards]
    gr.on([parts.ask.click, parts.question.submit], handlers.ask, asked, [*written, parts.message], **_HEAVY).then(
        handlers.measure, parts.sliders, gauges, **_HEAVY
    )
    parts.stop.click(handlers.stop, **_LIGHT)
    parts.save.click(handlers.export, [*parts.export, *parts.sliders], parts.saved, **_HEAVY)
    for card in cards:
        gr.on(
            [slider.change for slider in card.sliders],
            handlers.moved,
            [card.answer, *card.sliders],
            [card.warning, card.status, card.gauge],
            **_IN_ORDER,
        )
    released = [slider.release for slider in parts.sliders]
    gr.on([page.load, *released], handlers.measure, parts.sliders, gauges, **_IN_ORDER, concurrency_id="model")
    if parts.picture is not None:
        drawn = [parts.evaluation, *parts.scores, *parts.sliders]
        changes = [component.change for component in drawn]
        gr.on([page.load, *changes], handlers.draw, drawn, parts.picture, **_IN_ORDER)
        parts.picture.select(handlers.choose, [parts.target, *parts.sliders], parts.sliders, **_LIGHT).then(
            handlers.measure, parts.sliders, gauges, **_HEAVY
        )


class Handlers:
    """The handlers of one session; `*weights` are the sliders of mix A, then those of mix B."""

    def __init__(self, session: DemoSession) -> None:
        self.session = session

    def mixes(self, weights: Sequence[float | None]) -> list[dict[str, float]]:
        """λ by axis of every mix; an emptied number field counts as 0."""
        axes, numbers = self.session.axes, [float(weight or 0.0) for weight in weights]
        rows = [numbers[start : start + len(axes)] for start in range(0, len(numbers), len(axes))]
        return [dict(zip(axes, row, strict=True)) for row in rows]

    def ask(
        self, question: str, evaluation: str, tokens: float, temperature: float, *weights: float
    ) -> Iterator[tuple[Any, ...]]:
        """Answer and status of both mixes, then the message, again and again as the answers grow."""
        options = AskOptions(evaluation == "linearized", int(tokens), float(temperature))
        try:
            prompt = self.session.prepare(question, options)
            for answers in self.session.stream_answers(prompt, self.mixes(weights), options):
                yield *(shown for answer in answers for shown in _show(answer)), _note(prompt.note)
        except Exception as error:
            yield *(gr.skip() for _ in range(2 * len(MIXES))), problem(error)

    def stop(self) -> None:
        """Ends the answers that are being written."""
        self.session.stop()

    def moved(self, answer: str, *weights: float) -> tuple[str, str, str]:
        """Warning, status and gauge of a mix whose sliders move: its answer is of another mix now."""
        (mix,) = self.mixes(weights)
        known = self.session.known_gap(mix)
        status = _line("The mix has changed since this answer; ask again.") if answer else ""
        return _note(self.session.warn_of(mix)), status, gauge(None if known is None else known.gap)

    def measure(self, *weights: float) -> list[str]:
        """The gauges of both mixes."""
        try:
            return [gauge(self.session.measure_gap(mix).gap) for mix in self.mixes(weights)]
        except Exception as error:
            return [problem(error) for _ in MIXES]

    def draw(self, evaluation: str, x: str, y: str, *weights: float) -> str:
        """The sweep, with the places of both mixes."""
        assert self.session.sweep is not None
        try:
            marked = dict(zip(MIXES, self.mixes(weights), strict=True))
            return sweep_picture(self.session.sweep, View(x, y, evaluation, marked))
        except Exception as error:
            return problem(error)

    def choose(self, event: gr.EventData, target: str, *weights: float) -> list[float]:
        """The sliders after a click on a point of the sweep: those of the mix `target` are the point's."""
        assert self.session.sweep is not None
        mixes = dict(zip(MIXES, self.mixes(weights), strict=True))
        mixes[target] = self.session.sweep.points[event.index].weights
        return [mix.get(axis, 0.0) for mix in mixes.values() for axis in self.session.axes]

    def export(self, target: str, form: Any, folder: str, *weights: float) -> str:
        """What was written, or why nothing was."""
        mixes = dict(zip(MIXES, self.mixes(weights), strict=True))
        try:
            return _banner("good", self.session.export(folder, mixes[target], form))
        except Exception as error:
            return problem(error)


# ---- words on the page -----------------------------------------------------------------------------------------------


def problem(error: Exception) -> str:
    """An error as a message; one that nobody foresaw also goes to the log with its traceback."""
    if isinstance(error, EXPECTED):
        return _banner("bad", str(error))
    logger.error("unexpected", exc_info=error)
    return _banner("bad", f"Something went wrong ({type(error).__name__}: {error}). The terminal has the details.")


def _show(answer: Answer) -> tuple[str, str]:
    words = _STATES[answer.state]
    if answer.state == "complete" and not answer.tokens:
        words = "The model ended at once: it has nothing to say at this mix"
    tokens = f" · {answer.tokens} tokens" if answer.tokens else ""
    return answer.text, _line(words + tokens, answer.state in ("waiting", "writing"))


def _line(text: str, busy: bool = False) -> str:
    return f'<div class="status{" busy" if busy else ""}">{escape(text)}</div>'


def _note(text: str) -> str:
    return _banner("note", text) if text else ""


def _banner(kind: str, text: str) -> str:
    return f'<div class="banner {kind}" role="status">{escape(text)}</div>'
