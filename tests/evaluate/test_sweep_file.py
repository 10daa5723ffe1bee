"""A saved sweep comes back as it was, is never half written, and what is wrong with a file is said."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tangent_peft.evaluate import SweepPoint, load_sweep, save_sweep


POINTS = [
    SweepPoint({"help": 1.0, "verb": -0.5}, "linearized", {"length": 3.5}, ["Süß", ""], [7, 0], gap=0.25),
    SweepPoint({}, "merged", {"length": 4.0}, ["a", "b"], [4, 4]),
]


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sweep.json"
    save_sweep(path, POINTS, ["Why?", "How?"], {"length": "tokens"})
    saved = load_sweep(path)
    assert (saved.points, saved.questions, saved.labels) == (POINTS, ["Why?", "How?"], {"length": "tokens"})
    save_sweep(path, POINTS[:1])
    assert load_sweep(path).points == POINTS[:1]
    assert os.listdir(path.parent) == ["sweep.json"]


def test_an_interrupted_call_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.json"
    save_sweep(path, POINTS)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_sweep(path, POINTS[:1])
    assert load_sweep(path).points == POINTS
    assert os.listdir(tmp_path) == ["sweep.json"]


def test_refuses_what_could_not_be_read_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no points"):
        save_sweep(tmp_path / "a.json", [])
    bad = SweepPoint({"help": 1.0}, "merged", {"length": math.nan}, ["a"], [1])
    with pytest.raises(ValueError, match="not finite"):
        save_sweep(tmp_path / "a.json", [bad])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, "not a saved sweep"),
        ({"version": 99}, "version 99"),
        ({"points": []}, "no points"),
        ({"points": [{"weights": {}}]}, "damaged.*evaluation"),
        ({"points": [POINTS[0].to_dict() | {"evaluation": "guessed"}]}, "damaged.*guessed"),
        ({"points": [POINTS[0].to_dict() | {"weights": {"help": "much"}}]}, "damaged.*much"),
        ({"points": [POINTS[0].to_dict() | {"scores": {"length": math.inf}}]}, "damaged.*length"),
        ({"questions": None}, "damaged"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "sweep.json"
    save_sweep(path, POINTS)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_sweep(path)
    assert str(path) in str(caught.value)


def test_no_such_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no saved sweep"):
        load_sweep(tmp_path / "sweep.json")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="can not be read as JSON"):
        load_sweep(tmp_path / "picture.png")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="not a saved sweep"):
        load_sweep(tmp_path / "list.json")
