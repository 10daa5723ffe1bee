"""A folder appears whole or not at all, and takes no other folder's place unasked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tangent_peft.tuner.export.atomic import files_in, fresh_folder


MARKER = "record.json"


def write(path: Path, text: str = "new", overwrite: bool = False) -> None:
    with fresh_folder(path, overwrite, MARKER) as folder:
        (folder / MARKER).write_text(record(text))
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text(text)


def record(text: str) -> str:
    return json.dumps({"text": text, "files": ["inner/weights"]})


def content(path: Path) -> dict[str, str]:
    return {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*") if file.is_file()}


NEW = {MARKER: record("new"), "inner/weights": "new"}
OLD = {MARKER: record("old"), "inner/weights": "old"}


@pytest.mark.parametrize("existing", [False, True])
def test_new_folder(existing: bool, tmp_path: Path) -> None:
    """Where there is none, with the folders above it, and where an empty one stands."""
    place = tmp_path / "a" / "b"
    if existing:
        place.mkdir(parents=True)
    write(place)
    assert content(tmp_path) == {f"a/b/{name}": text for name, text in NEW.items()}
    umask = os.umask(0)
    os.umask(umask)
    assert place.stat().st_mode & 0o777 == 0o777 & ~umask


def test_overwriting_leaves_nothing_of_the_old_folder(tmp_path: Path) -> None:
    with fresh_folder(tmp_path / "out", False, MARKER) as folder:
        (folder / "model-00002-of-00002").write_text("an old shard")
        (folder / MARKER).write_text(json.dumps({"files": [MARKER, "model-00002-of-00002"]}))
    with pytest.raises(FileExistsError, match=r"holds \['model-00002.*\(2 entries\).*overwrite=True"):
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == NEW and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds \['thesis.tex'\].*no record\.json.*remove it yourself"):
        write(tmp_path, overwrite=True)
    assert content(tmp_path) == {"thesis.tex": "years of work"}


@pytest.mark.parametrize("added", ["notes.txt", "inner/axis.safetensors", "verb/LOADING.md", ".cache/etag"])
def test_what_was_added_to_a_folder_is_never_deleted(added: str, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "empty").mkdir()
    place = tmp_path / "out" / added
    place.parent.mkdir(exist_ok=True)
    place.write_text("years of work")
    with pytest.raises(
        FileExistsError, match=rf"\['{added}'\] \(1 files\).*record\.json does not list.*move them away"
    ):
        write(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == OLD | {added: "years of work"}
    place.unlink()
    write(tmp_path / "out", overwrite=True)
    assert content(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}


def test_a_link_in_a_folder_is_a_file_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    assert files_in(tmp_path / "out") == {MARKER, "inner/weights", "link"}
    with pytest.raises(FileExistsError, match=r"\['link'\]"):
        write(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("text", ["", "{}", "[]", "not JSON"])
def test_a_record_that_lists_no_files(text: str, tmp_path: Path) -> None:
    """Nobody knows what belongs to it: only a folder with nothing else in it is replaced."""
    write(tmp_path / "out", "old")
    (tmp_path / "out" / MARKER).write_text(text)
    with pytest.raises(FileExistsError, match=r"inner/weights"):
        write(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "inner" / "weights").unlink()
    write(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == NEW


def test_places_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        write(tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match="mount point"):
        write(Path("/"))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    for path in (Path(), Path("..")):
        with pytest.raises(ValueError, match="working directory"):
            write(path)


def test_a_link_keeps_pointing(tmp_path: Path) -> None:
    write(tmp_path / "v1", "old")
    (tmp_path / "latest").symlink_to(tmp_path / "v1")
    write(tmp_path / "latest", overwrite=True)
    assert (tmp_path / "latest").is_symlink() and content(tmp_path / "v1") == NEW


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_inside(error: BaseException, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    for place in ("out", "other"):
        with pytest.raises(type(error)), fresh_folder(tmp_path / place, True, MARKER) as folder:
            (folder / MARKER).write_text("half")
            raise error
    assert content(tmp_path / "out") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_while_moving(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the two renames loses the old folder."""
    write(tmp_path / "out", "old")
    rename, calls = Path.rename, []

    def unreliable(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError("device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", unreliable)
    with pytest.raises(OSError, match="busy"):
        write(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_someone_faster(tmp_path: Path) -> None:
    """A folder that appeared meanwhile is not replaced."""
    with pytest.raises(FileExistsError, match="exists"), fresh_folder(tmp_path / "out", False, MARKER) as folder:
        (folder / MARKER).write_text("slow")
        write(tmp_path / "out", "fast")
    assert content(tmp_path / "out")["inner/weights"] == "fast"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_process(tmp_path: Path) -> None:
    """Nothing tidies up after it: what it leaves is hidden and named partial, and the old folder is as it was."""
    write(tmp_path / "out", "old")
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        "spec = spec_from_file_location('atomic', sys.argv[1]); module = module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"with module.fresh_folder(Path(sys.argv[2]), True, {MARKER!r}) as folder:\n"
        f"    (folder / {MARKER!r}).write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    source = Path(sys.modules[fresh_folder.__module__].__file__ or "")
    run = subprocess.run([sys.executable, "-c", script, str(source), str(tmp_path / "out")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert content(tmp_path / "out") == OLD
    left = [path.name for path in tmp_path.iterdir() if path.name != "out"]
    assert len(left) == 1 and left[0].startswith(".out.") and left[0].endswith(".partial")
