"""The demo's page: layout and words. `demo_events.py` says what happens on it.

The words are for somebody who has never trained a model. Nothing on the page comes from elsewhere than this machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from typing import Any

from tangent_peft.cli.demo_events import MIXES, Card, Parts, connect, gr
from tangent_peft.cli.demo_pictures import gauge
from tangent_peft.cli.demo_session import DemoSession
from tangent_peft.tuner.axes import SAFE_WEIGHT


HOST = "127.0.0.1"
_GLOSSARY = f"""<dl class="glossary">
<dt>Preference, axis</dt><dd>A direction in which the model was trained to change, once. A mix adds directions, each
times the number on its slider.</dd>
<dt>As trained (linearized)</dt><dd>The model in the form in which the directions were trained. Here a slider has an
even effect: twice the number moves the model's scores for each word exactly twice as far.</dd>
<dt>As exported (ordinary weights)</dt><dd>The ordinary model that an export writes, for other software to run. It is
close to the trained form while the numbers are small.</dd>
<dt>Linearity gap</dt><dd>How far the two forms are apart, measured on a few questions: the difference between them,
as a share of all that the mix changes. Up to 0.1 they say the same; up to 0.5 read the answers of both; beyond that
the export has to be judged on its own.</dd>
<dt>Safe range</dt><dd>Up to ±{SAFE_WEIGHT:g}: farther out, mixes were found to break down.</dd>
</dl>
"""
REACH = 4.0  # of a slider, so that the edge of the safe range can be seen

_CLICKED = """
const choose = event => {
  const point = event.target.closest('[data-point]');
  if (!point || (event.type === 'keydown' && event.key !== 'Enter' && event.key !== ' ')) return;
  event.preventDefault();
  trigger('select', {index: Number(point.dataset.point)});
};
element.addEventListener('click', choose);
element.addEventListener('keydown', choose);
"""


def build_page(session: DemoSession) -> gr.Blocks:
    """The page of a session, not yet served."""
    parts = Parts()
    with gr.Blocks(title="tangent-peft demo", analytics_enabled=False, fill_width=False) as page:
        _html(_introduction(session))
        _lay_out_question(session, parts)
        with gr.Row(equal_height=False):
            for name in MIXES:  # A: the original model; B: the first axis as it was trained
                weights = [float(name != MIXES[0] and axis == session.axes[0]) for axis in session.axes]
                _lay_out_card(session, name, parts.cards[name], weights)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=420, elem_classes="card"):
                _lay_out_sweep(session, parts)
            with gr.Column(scale=2, min_width=320, elem_classes="card"):
                _lay_out_export(parts)
        with gr.Accordion("What the words mean", open=False):
            _html(_GLOSSARY)
        connect(page, parts, session)
    return page


def serve(page: gr.Blocks, port: int, browser: bool, ready: Callable[[str], None]) -> None:
    """Serves the page on this machine's loopback address until the process is interrupted.

    Args:
        page: from `build_page`.
        port: TCP port; no other one is taken in its place.
        browser: whether to open a browser window.
        ready: called with the address once the page can be opened.
    """
    for name in ("NO_PROXY", "no_proxy"):  # Gradio asks itself whether it is up, which no proxy must answer
        os.environ[name] = ",".join(filter(None, [os.environ.get(name, ""), HOST]))
    page.launch(
        server_name=HOST,
        server_port=port,
        inbrowser=browser,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        theme=_theme(),
        css=resources.files("tangent_peft").joinpath("cli", "demo.css").read_text(encoding="utf-8"),
    )
    ready(f"http://{HOST}:{port}")
    page.block_thread()


def _theme() -> gr.themes.Base:
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # of the machine; none is fetched
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    return theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")


# ---- layout ----------------------------------------------------------------------------------------------------------


def _introduction(session: DemoSession) -> str:
    axes = ", ".join(f"<b>{escape(axis)}</b>" for axis in session.axes)
    count = f"{len(session.axes)} trained {'preference' if len(session.axes) == 1 else 'preferences'}"
    return (
        '<div class="introduction"><h1>Steer the answers</h1>'
        f"<p>This is <b>{escape(session.base_name)}</b> with {count}: {axes}. Each slider turns one up or down: at "
        "<b>0</b> it is off, at <b>1</b> it acts as it was trained, below 0 it pushes the other way. "
        "Set two mixes, ask a question, and compare. Nothing is retrained.</p></div>"
    )


def _lay_out_question(session: DemoSession, parts: Parts) -> None:
    parts.question = gr.Textbox(
        label="Your question",
        lines=1,
        max_lines=6,
        placeholder="Ask anything …",
        value=session.questions[0],
        elem_id="question",
    )
    gr.Examples([[q] for q in session.questions], parts.question, label="Or take one of these", elem_id="examples")
    with gr.Row(equal_height=True, elem_id="controls"):
        parts.evaluation = gr.Radio(
            [("As trained (linearized)", "linearized"), ("As exported (ordinary weights)", "merged")],
            value="linearized",
            label="Which form of the model answers",
            scale=5,
            min_width=460,
            elem_id="evaluation",
        )
        parts.ask = gr.Button("Ask both mixes", variant="primary", scale=3, min_width=180, elem_id="ask")
        parts.stop = gr.Button("Stop", scale=1, min_width=90, elem_id="stop")
    with gr.Accordion("More settings", open=False, elem_id="settings"), gr.Row():
        parts.tokens = _forgiving(
            gr.Slider(
                8,
                256,
                96,
                step=8,
                label="Longest answer",
                info="In tokens; one is about ¾ of a word.",
                elem_id="tokens",
            )
        )
        parts.temperature = _forgiving(
            gr.Slider(0, 1.5, 0, step=0.1, label="Variation", info="0: always the same answer.", elem_id="temperature")
        )
    parts.message = _html("", elem_id="message")


def _forgiving(slider: gr.Slider) -> gr.Slider:
    """Takes an emptied number field for 0, and what lies beyond a limit for that limit; Gradio fails on both.

    A subclass would not do: Gradio writes an interface file beside the source of each one.
    """
    read = slider.preprocess

    def preprocess(payload: float | None) -> float:
        return read(min(max(payload or 0.0, slider.minimum), slider.maximum))

    slider.preprocess = preprocess  # type: ignore[method-assign]
    return slider


def _lay_out_card(session: DemoSession, name: str, card: Card, weights: Sequence[float]) -> None:
    reach, letter = _reach(session), name.lower()
    edge = 50 - 50 * SAFE_WEIGHT / reach
    with gr.Column(min_width=320, elem_classes=["card", f"mix-{letter}"]):
        _html(f'<h2><span class="badge">{name}</span> Mix {name}</h2>')
        with gr.Group(elem_classes="axes"):
            for index, (axis, weight) in enumerate(zip(session.axes, weights, strict=True)):
                slider = gr.Slider(
                    -reach, reach, weight, step=0.01, label=axis, elem_id=f"{letter}-{index}", elem_classes="axis"
                )
                card.sliders.append(_forgiving(slider))
        _html(
            f'<div class="range"><span style="left:0">−{reach:g}</span><span style="left:{edge:g}%">−{SAFE_WEIGHT:g}'
            '</span><span style="left:50%">0</span>'
            f'<span style="left:{100 - edge:g}%">+{SAFE_WEIGHT:g}</span><span style="left:100%">+{reach:g}</span>'
            f'<i style="left:{edge:g}%;right:{edge:g}%">safe range</i></div>'
        )
        card.warning = _html("", elem_id=f"warning-{letter}")
        card.answer = gr.Textbox(
            label=f"Answer of mix {name}",
            lines=11,
            max_lines=11,
            interactive=False,
            placeholder="Press “Ask both mixes”.",
            buttons=["copy"],
            elem_id=f"answer-{letter}",
        )
        card.status = _html("", elem_id=f"status-{letter}")
        card.gauge = _html(gauge(None), elem_id=f"gauge-{letter}")


def _html(text: str, **options: Any) -> gr.HTML:
    return gr.HTML(text, apply_default_css=False, **options)


def _reach(session: DemoSession) -> float:
    """Up to where the sliders go: past the safe range, and to every point of the sweep."""
    points = [] if session.sweep is None else session.sweep.points
    return max(REACH, math.ceil(max((abs(w) for p in points for w in p.weights.values()), default=0.0)))


def _lay_out_sweep(session: DemoSession, parts: Parts) -> None:
    _html("<h2>Trade-offs that were measured</h2>")
    if session.sweep is None:
        _html(
            '<p class="hint">Start the demo with <code>--sweep FILE</code> to see here what the answers of many mixes '
            "scored, and to set the sliders by a click.</p>"
        )
        return
    moved = {axis for point in session.sweep.points for axis, weight in point.weights.items() if weight}
    numbers = f"The numbers are weights of <b>{escape(moved.pop())}</b>. " if len(moved) == 1 else ""
    _html(
        '<p class="hint">Each dot is a mix that was tried; up and to the right is better, a line joins those that no '
        f"other beats. {numbers}Pale dots belong to the other form of the model. <b>Click a dot</b> to set the "
        "sliders.</p>"
    )
    names = list(session.sweep.points[0].scores)
    with gr.Row(visible=len(names) > 2):
        choices = [(session.sweep.labels.get(name, name), name) for name in names]
        parts.scores = [
            gr.Dropdown(choices, value=names[min(index, len(names) - 1)], label=label)
            for index, label in enumerate(("To the right", "Up"))
        ]
    parts.target = gr.Radio(list(MIXES), value="B", label="A click sets mix", elem_id="target")
    parts.picture = _html("", js_on_load=_CLICKED, elem_id="sweep")


def _lay_out_export(parts: Parts) -> None:
    _html(
        "<h2>Take a mix along</h2>"
        '<p class="hint">Writes the mix as a folder that other software loads without this package.</p>'
    )
    parts.export = [
        gr.Radio(list(MIXES), value="B", label="Mix", elem_id="export-mix"),
        gr.Radio(
            [
                ("LoRA adapter: small, used beside the original model", "lora"),
                ("Whole model: large, stands alone", "merged"),
            ],
            value="lora",
            label="As",
            elem_id="export-form",
        ),
        gr.Textbox("exported-mix", label="New folder", max_lines=1, elem_id="export-folder"),
    ]
    parts.save = gr.Button("Export", elem_id="export")
    parts.saved = _html("", elem_id="exported")
