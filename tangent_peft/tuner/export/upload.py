"""Uploading an exported folder to the Hugging Face Hub. Knows folders, no models."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TypedDict, Unpack

from huggingface_hub import CommitInfo, HfApi


class UploadOptions(TypedDict, total=False):
    """What every `push_to_hub` of the Hugging Face libraries takes."""

    private: bool
    revision: str
    create_pr: bool
    commit_message: str


def upload(
    folder: Path, repo_id: str, base: Path | None, token: str | bool | None, **options: Unpack[UploadOptions]
) -> CommitInfo:
    """Uploads a folder as one commit.

    Args:
        folder: what to upload.
        repo_id: name of the repository, made if it is not there.
        base: a base model in the folder that its LoRA needs: it goes to a repository of its own, `repo_id` with "-base"
            appended, which the uploaded LoRA names as its base.
        token: of the Hub; `None`: the one that is stored.
        options: see `UploadOptions`.

    Returns:
        What the Hub says of the commit.

    Raises:
        TypeError: for another option.
    """
    unknown = sorted(set(options) - set(UploadOptions.__annotations__))
    if unknown:
        raise TypeError(f"`push_to_hub` does not know {unknown}; it takes {['token', *UploadOptions.__annotations__]}.")
    api = HfApi(token=token)
    if base is None:
        return _commit(api, folder, repo_id, **options)
    base_id = _commit(api, base, f"{repo_id}-base", **options).repo_url.repo_id
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "lora", ignore=shutil.ignore_patterns(base.name)))
        _name_base(copy, base_id)
        return _commit(api, copy, repo_id, **options)


def _commit(api: HfApi, folder: Path, repo_id: str, **options: Unpack[UploadOptions]) -> CommitInfo:
    repo = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
    revision = options.get("revision")
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        commit_message=options.get("commit_message", "Upload an export of tangent_peft"),
        revision=revision,
        create_pr=options.get("create_pr"),
    )


def _name_base(folder: Path, base_id: str) -> None:
    """Puts the repository of the base model in the place of its path."""
    settings = folder / "adapter_config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    path, config["base_model_name_or_path"] = config["base_model_name_or_path"], base_id
    settings.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(path, base_id), encoding="utf-8")
