"""Pushing to the Hub: an axis by PEFT's own verb, an export by its result. Nothing is uploaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cases import config, tangent_model
from huggingface_hub import CommitOperationAdd, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import hub

from tangent_peft.tuner.export import upload


pytestmark = pytest.mark.filterwarnings("ignore:The head '.*' is tied to the input embedding")


class Hub:
    """Copies what would be uploaded into a folder per repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], **options: Any) -> Any:
        for operation in operations:
            target = self.root / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(operation.path_or_fileobj), target)
        return SimpleNamespace(repo_url=SimpleNamespace(repo_id=repo_id))

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> Any:
        self.calls.append(("upload_folder", {"repo_id": repo_id, **options}))
        shutil.copytree(folder_path, self.root / repo_id)
        return SimpleNamespace(repo_url=SimpleNamespace(repo_id=repo_id))


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")

    def no_card(*args: Any, **kwargs: Any) -> Any:
        raise EntryNotFoundError("README.md")

    monkeypatch.setattr(hub, "hf_api", lambda: found)
    monkeypatch.setattr(ModelCard, "load", no_card)
    monkeypatch.setattr(upload, "HfApi", lambda token: found)
    return found


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("axis", ["default", "verb"])
def test_an_axis(axis: str, remote: Hub, tmp_path: Path) -> None:
    """What `save_pretrained` saves, and the note on loading, though transformers writes its own README over ours."""
    model = tangent_model("llama", "shared", axis=axis)
    model.save_pretrained(tmp_path / "saved")
    model.push_to_hub("me/axis")
    uploaded = remote.root / "me/axis"
    assert names(uploaded) == names(tmp_path / "saved") | {"README.md"}
    beside = uploaded if axis == "default" else uploaded / axis
    for file in ("adapter_config.json", "adapter_model.safetensors", "LOADING.md"):
        own = tmp_path / "saved" / ("" if axis == "default" else axis) / file
        assert (beside / file).read_bytes() == own.read_bytes()
    assert "import tangent_peft" in (beside / "LOADING.md").read_text()


@pytest.mark.parametrize("verb", ["export_lora", "export_merged"])
def test_an_export(verb: str, remote: Hub, tmp_path: Path) -> None:
    model = tangent_model("llama", "shared", axis="help")
    export = {"export_lora": model.export_lora, "export_merged": model.export_merged}[verb](tmp_path / "out")
    export.push_to_hub("me/mix", private=True, revision="v1", commit_message="a mix")
    assert names(remote.root / "me/mix") == names(tmp_path / "out")
    calls = dict(remote.calls)
    assert calls["create_repo"] == {"repo_id": "me/mix", "private": True, "exist_ok": True}
    assert calls["create_branch"]["branch"] == "v1"
    assert calls["upload_folder"]["commit_message"] == "a mix" and calls["upload_folder"]["revision"] == "v1"


def test_a_lora_with_a_base_of_its_own(remote: Hub, tmp_path: Path) -> None:
    """The base goes to a repository beside it, which the uploaded LoRA names; the folder here stays as it was."""
    model = tangent_model("llama", "shared", axis="help")
    export = model.export_lora(tmp_path / "out", head="merge")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    export.push_to_hub("me/mix")
    uploaded = remote.root / "me/mix"
    assert "config.json" in names(remote.root / "me/mix-base") and "base" not in {p.name for p in uploaded.iterdir()}
    assert json.loads((uploaded / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/mix-base"
    card = (uploaded / "README.md").read_text()
    assert "me/mix-base" in card and str(tmp_path) not in card
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == before


def test_an_option_that_is_none(remote: Hub, tmp_path: Path) -> None:
    model = tangent_model("llama", "shared", axis="help")
    export = model.export_lora(tmp_path / "out", calibration=False)
    with pytest.raises(TypeError, match="visibility"):
        export.push_to_hub("me/mix", visibility="private")


def test_a_folder_is_no_base_model_to_the_hub(tmp_path: Path) -> None:
    """The Hub refuses a card whose `base_model` is no repository."""
    model = tangent_model("llama", "shared", axis="help")
    for name, written in [("me/base", True), (str(tmp_path), False), ("relative/path/of/three", False)]:
        model.get_base_model().name_or_path = name
        model.export_lora(tmp_path / "out", overwrite=True, calibration=False)
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("base_model:" in card) == written


def test_config_can_be_pushed_twice(remote: Hub, tmp_path: Path) -> None:
    """A second saving into the same folder writes the note once."""
    for _ in range(2):
        config("shared").save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text().count("import tangent_peft") == 1
