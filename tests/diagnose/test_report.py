"""A report holds everything that its diagnoses say, in one page that needs no other file; hostile names stay text."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
from stub_reports import HOSTILE, Stub, Undrawable, report

from tangent_peft.diagnose.report import Part, Section, write_report


class Reader(HTMLParser):
    """What a page says: tags with their attributes, text, tables."""

    VOID: ClassVar = {"meta", "link", "img", "br"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open, f"never closed: {reader.open}"
    return reader


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "out"
    write_report(report(), folder)
    return folder


def test_the_page_needs_nothing_else(written: Path) -> None:
    reader = read((written / "report.html").read_text(encoding="utf-8"))
    for tag, attributes in reader.tags:
        assert tag not in {"script", "iframe", "object", "embed", "video", "audio"}
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), f"{tag} {name}={value[:60]}"
        assert not any(name.startswith("on") for name in attributes)
    styles = (written / "report.html").read_text(encoding="utf-8")
    assert "url(" not in styles and "@import" not in styles
    anchors = {a["href"][1:] for tag, a in reader.tags if tag == "a" and a["href"]}  # type: ignore[index]
    assert anchors <= {a.get("id") for _, a in reader.tags}
    assert {"one", "two", "three", "four", "settings"} <= anchors


def test_the_page_says_everything(written: Path) -> None:
    reader = read((written / "report.html").read_text(encoding="utf-8"))
    for line in [
        "A report 1 January 2030",
        "1 warning, 1 unknown, 1 fine, 2 not done.",
        f"Who knows {HOSTILE}.",
        f"tangent-peft diagnose {HOSTILE}",
        "What it asks.",
        "A note.",
        "Not done: too few prompts: 3",
        "Left out: needs tangent axes",
        "Not done: no pairs",
        "Peak memory of the process: 1.5 GiB",
        "1.2 s",
    ]:
        assert line in reader.words, line
    words = reader.words
    assert words.index("▲ warning But not here.") < words.index("? unknown Who") < words.index("✓ fine All is well.")
    assert words.count("But not here.") == 2, "on top, and in its section"
    assert (reader.tables[0][:3]) == [
        ["name", "value", "count", "none"],
        ["row 0", "0.1235", "0", "–"],
        ["row 1", "–", "1", "–"],
    ]
    assert reader.tables[0][3] == ["row 2", "-2.5", "2", "–"]
    settings = dict(row for table in reader.tables for row in table if len(row) == 2)
    assert settings["seed"] == "7" and settings["torch"] == "9.9" and settings["axes"] == '["help"]'
    flush = [a.get("class") for tag, a in reader.tags if tag == "th"][:4]
    assert flush == [None, "number", "number", "number"]


def test_figures_are_inside_and_beside(written: Path) -> None:
    reader = read((written / "report.html").read_text(encoding="utf-8"))
    (image,) = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert image["alt"] == "First: a b"
    kind, _, data = str(image["src"]).partition(";base64,")
    name = {"data:image/svg+xml": "a_b.svg", "data:image/png": "a_b.png"}[kind]
    files = {file.name: file for file in (written / "figures" / "one").iterdir()}
    assert set(files) == {"a_b.png", "a_b.svg"}
    assert base64.b64decode(data) == files[name].read_bytes()
    assert len(data) <= 4 * (min(file.stat().st_size for file in files.values()) + 2) / 3


def test_json_holds_every_result_whole(written: Path) -> None:
    record = json.loads((written / "report.json").read_text(encoding="utf-8"))
    made = report()
    for section, saved in zip(made.sections, record["sections"], strict=True):
        assert (section.key, section.failed, section.reason) == (saved["key"], saved["failed"], saved["reason"])
        for part, entry in zip(section.parts, saved["parts"], strict=True):
            assert entry["result"] == (None if part.result is None else json.loads(json.dumps(part.result.to_dict())))
    assert record["sections"][0]["parts"][0]["result"]["numbers"] == [0.123456, None, -2.5]
    assert [verdict["finding"] for verdict in record["verdicts"]] == ["warning", "unknown", "fine"]
    assert record["not_done"] == ["Second, verb: too few prompts: 3", "Fourth: no pairs"]
    assert record["settings"] == {"seed": 7, "axes": ["help"]}
    assert record["run"]["seconds"] == {"one": 1.25, "two": 0.0} and record["run"]["peak_memory_gb"] == 1.5
    assert set(record["files"]) == {"report.html", "figures/one/a_b.png", "figures/one/a_b.svg"}


def test_the_same_report_is_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_report(report(), tmp_path / "again")
    for name in ("report.html", "report.json", "figures/one/a_b.svg", "figures/one/a_b.png"):
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes()


def test_a_folder_is_replaced_only_if_it_is_an_earlier_report(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_report(report(), folder)
    with pytest.raises(FileExistsError, match="exists and holds"):
        write_report(report(), folder)
    write_report(report(title="Another"), folder, overwrite=True)
    assert json.loads((folder / "report.json").read_text())["title"] == "Another"
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        write_report(report(), folder, overwrite=True)
    assert (folder / "mine.txt").is_file() and (folder / "report.html").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError):
        write_report(report(), tmp_path / "other", overwrite=True)


def test_what_can_not_be_drawn_is_said(tmp_path: Path) -> None:
    made = report(sections=(Section("one", "First", parts=(Part("", Undrawable([1.0], [])),)),))
    record = write_report(made, tmp_path / "out")
    assert (
        "could not be drawn: ValueError: nothing but NaN" in read((tmp_path / "out" / "report.html").read_text()).words
    )
    part = record["sections"][0]["parts"][0]
    assert part["figures"] == [] and part["not_drawn"] == ["ValueError: nothing but NaN"]
    assert not (tmp_path / "out" / "figures").exists()


def test_a_report_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Broken(Stub):
        def plot(self, folder: str | Path) -> list[Path]:
            raise KeyError("a mistake in the program")

    made = report(sections=(Section("one", "First", parts=(Part("", Broken([1.0], [])),)),))
    with pytest.raises(KeyError):
        write_report(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_parts_whose_names_look_alike_keep_their_figures_apart(tmp_path: Path) -> None:
    parts = tuple(Part(name, Stub([1.0], [], pictures=["p"])) for name in ("a b", "a-b", "λ"))
    record = write_report(report(sections=(Section("one", "First", parts=parts),)), tmp_path / "out")
    figures = [figure for part in record["sections"][0]["parts"] for figure in part["figures"]]
    assert len(set(figures)) == 6 and all((tmp_path / "out" / figure).is_file() for figure in figures)


def test_a_warning_is_told_from_the_rest_without_colors(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    assert '<span aria-hidden="true">▲</span> warning' in html and '<span aria-hidden="true">✓</span> fine' in html
    assert "prefers-color-scheme: dark" in html and "@media print" in html
