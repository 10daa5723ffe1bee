"""The demo without its page: streamed answers are those of `generate`, errors are sentences, exports are whole."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import QUESTIONS
from peft import PeftModel
from strong_axes import two_axes
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tangent_peft.cli.demo_session import AskOptions, DemoSession
from tangent_peft.cli.demo_stream import Answer, RowStreamer
from tangent_peft.diagnose import linearity_gap
from tangent_peft.evaluate import generate_answers
from tangent_peft.tuner.axes import tangent_tuner
from tangent_peft.tuner.safe_range import StoredRange, store_range


MIXES = [{"help": 0.0, "verb": 0.0}, {"help": 1.0, "verb": -0.5}]
SHORT = AskOptions(max_new_tokens=6)


@pytest.fixture
def session(tiny_llama: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> DemoSession:
    model = two_axes(tiny_llama())
    return DemoSession(model, tokenizer, "tiny")


def ask(session: DemoSession, question: str, options: AskOptions = SHORT) -> list[list[Answer]]:
    return list(session.stream_answers(session.prepare(question, options), MIXES, options))


@pytest.mark.parametrize("linearized", [True, False])
def test_streams_the_answers_of_generate(session: DemoSession, linearized: bool) -> None:
    before = session.model.axis_weights
    options = AskOptions(linearized=linearized, max_new_tokens=6)
    updates = ask(session, QUESTIONS[0], options)
    for index, mix in enumerate(MIXES):
        with session.model.axes(mix), session.model.linearized(linearized):
            (expected,) = generate_answers(session.model, session.tokenizer, QUESTIONS[:1], 6)
        assert updates[-1][index].text.strip() == expected
        grown = [update[index].tokens for update in updates]
        assert grown == sorted(grown) and grown[0] == 0
    assert updates[-1][0].text != updates[-1][1].text
    assert {answer.state for answer in updates[-1]} <= {"complete", "cut off"}
    assert len(updates) > 3, "nothing was streamed"
    assert session.model.axis_weights == before


def test_stop_ends_both_answers(session: DemoSession) -> None:
    options = AskOptions(max_new_tokens=200)
    updates = []
    for answers in session.stream_answers(session.prepare(QUESTIONS[0], options), MIXES, options):
        updates.append(answers)
        if answers[0].tokens:
            session.stop()
    assert [answer.state for answer in updates[-1]] == ["stopped", "stopped"]
    assert all(0 < answer.tokens < 200 for answer in updates[-1])


def test_a_reader_that_leaves_blocks_nobody(session: DemoSession) -> None:
    options = AskOptions(max_new_tokens=200)
    stream = session.stream_answers(session.prepare(QUESTIONS[0], options), MIXES, options)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert ask(session, QUESTIONS[1])[-1][1].text


def test_two_readers_at_once_do_not_mix(session: DemoSession) -> None:
    alone = [ask(session, question)[-1] for question in QUESTIONS[:2]]
    together: dict[int, list[Answer]] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.update({i: ask(session, QUESTIONS[i])[-1]})) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[0], together[1]] == alone


def test_an_error_reaches_the_reader(session: DemoSession) -> None:
    with pytest.raises(ValueError, match="Unknown axis 'safe'"):
        list(session.stream_answers(session.prepare(QUESTIONS[0], SHORT), [{"safe": 1.0}], SHORT))
    assert ask(session, QUESTIONS[0])[-1][0].text


def test_temperature_samples(session: DemoSession) -> None:
    found = {ask(session, QUESTIONS[0], AskOptions(max_new_tokens=6, temperature=1.5))[-1][0].text for _ in range(4)}
    assert len(found) > 1


def test_questions_that_can_not_be_read(session: DemoSession) -> None:
    for empty in ("", " \n"):
        with pytest.raises(ValueError, match="Type a question"):
            session.prepare(empty, SHORT)
    assert session.prepare(QUESTIONS[0], SHORT).note == ""
    long = session.prepare("Why is it so, and how? " * 500, SHORT)
    assert "too long" in long.note and long.inputs["input_ids"].shape[1] <= 256 - 6
    frame = session.prepare("Why", SHORT).inputs["input_ids"][0].tolist()
    kept = long.inputs["input_ids"][0].tolist()
    assert kept[:4] == frame[:4] and kept[-8:] == frame[-8:], "the chat format was cut"
    with pytest.raises(ValueError, match="no room"):
        session.prepare(QUESTIONS[0], AskOptions(max_new_tokens=256))


def test_a_base_without_a_chat_format_goes_on_writing(session: DemoSession) -> None:
    session.tokenizer = copy.deepcopy(session.tokenizer)
    session.tokenizer.chat_template = None
    prompt = session.prepare("What is rain", SHORT)
    assert prompt.inputs["input_ids"][0].tolist() == session.tokenizer("What is rain")["input_ids"]


def test_the_gap_is_measured_once(session: DemoSession, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [session.prepare(question, SHORT).inputs for question in session.questions]
    with session.model.axes(verb=0.5):
        expected = linearity_gap(session.model, batches).gap
    assert session.known_gap({"verb": 0.5}) is None
    assert session.measure_gap({"verb": 0.5, "help": 0.0}).gap == pytest.approx(expected) and expected > 0
    assert session.known_gap({"verb": 0.5}) is not None
    monkeypatch.setattr(session.model, "forward", None)  # a second measurement would need it
    assert session.measure_gap({"verb": 0.5}).gap == pytest.approx(expected)
    assert session.measure_gap({"verb": 0.0}).gap == 0.0


def test_warns_outside_the_safe_range(session: DemoSession) -> None:
    assert session.warn_of({"help": 3.0, "verb": -3.0}) == ""
    assert "verb = -3.5" in session.warn_of({"help": 1.0, "verb": -3.5})


def test_warns_outside_a_range_that_is_kept_with_an_axis(session: DemoSession) -> None:
    tuner = tangent_tuner(session.model)
    store_range(tuner, "help", StoredRange(-1.0, 2.0, True, True, 0.5, "logits", 1.0))
    try:
        said = session.warn_of({"help": 2.5, "verb": 3.5})
        assert "help = 2.5" in said and "from −1 to 2" in said and "verb = 3.5: beyond ±3" in said
        assert session.warn_of({"help": -1.0}) == ""
    finally:
        store_range(tuner, "help", None)


def test_exports_load_without_this_package(
    session: DemoSession, tiny_llama: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    mix = {"help": 0.5, "verb": 0.0}
    said = session.export(str(tmp_path / "lora"), mix, "lora")
    assert "help +0.5" in said and "rank 4" in said and str(tmp_path / "lora") in said
    assert "whole model" in session.export(str(tmp_path / "merged"), mix, "merged")
    lora = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(lora(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_exports_that_are_refused(session: DemoSession, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OSError, match="exists already"):
        session.export(str(tmp_path / "mine"), {"help": 1.0}, "merged")
    with pytest.raises(OSError, match="exists already"):
        session.export(str(tmp_path / "mine" / "thesis.txt"), {"help": 1.0}, "lora")
    with pytest.raises(ValueError, match="original model"):
        session.export(str(tmp_path / "new"), {"help": 0.0, "verb": 0.0}, "lora")
    with pytest.raises(ValueError, match="folder"):
        session.export("  ", {"help": 1.0}, "lora")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_streamer_keeps_rows_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    """Row 0 ends early and is padded from then on; row 1 has a character of several tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    texts = ["a sea", "ü €"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows[0] += [end]
    width = max(map(len, rows)) + 1
    rows[0] += [pad] * (width - len(rows[0]))
    rows[1] += [end] * (width - len(rows[1]))
    seen: list[list[Answer]] = []
    streamer = RowStreamer(tokenizer, [end], lambda answers: seen.append(list(answers)), lambda: False)
    streamer.put(torch.zeros(2, 5, dtype=torch.long))  # the prompts
    for column in zip(*rows, strict=True):
        streamer.put(torch.tensor(column))
    streamer.end()
    assert [answer.text for answer in seen[-1]] == texts
    assert {answer.state for answer in seen[-1]} == {"complete"}
    assert all("\ufffd" not in answer.text for answers in seen for answer in answers)
    assert seen[0][0].state == "writing"
