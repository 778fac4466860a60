"""Agents on the Hugging Face Hub: `owner/name` is downloaded as a folder, and a folder is uploaded as it is.

Needs the extra `hub`. Of a repository three files are read (folder.py), whatever else it holds.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType

from .folder import CONFIG, FILES, WEIGHTS, read_folder

REPOSITORY = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")  # owner/name, or owner/name@revision


def locate(name: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of that name here, or the one that the Hub's repository of that name is downloaded to."""
    path = Path(name)
    match = REPOSITORY.fullmatch(name) if isinstance(name, str) and not path.exists() else None
    if match is None:
        if revision is not None:
            raise ValueError(f"revision={revision} is of a repository on the Hub, owner/name, and {path} is a folder.")
        return path
    repository, written = match.groups()
    if revision is not None and written not in (None, revision):
        raise ValueError(f"{name} names a revision, and revision={revision} another one: give one of them.")
    return _download(repository, revision or written)


def _hub(purpose: str) -> ModuleType:
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports] - an extra
        import huggingface_hub.errors  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f'{purpose} needs huggingface_hub: pip install "torchrl-r2dreamer[hub]".') from error
    return huggingface_hub


def _download(repository: str, revision: str | None) -> Path:
    hub = _hub(f"{repository} is no folder here; to download it as owner/name from the Hugging Face Hub")
    errors, name = hub.errors, repository if revision is None else f"{repository}@{revision}"
    try:
        folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{repository} is no folder here, and the Hub has no such repository that you may read. Check the name; a private "
            "one needs `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repository} has no revision {revision!r}; give a branch, tag or commit of it.") from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} is no folder here, the Hugging Face Hub cannot be reached, and no earlier download is in the cache. "
            "Connect, or unset HF_HUB_OFFLINE, or give a folder."
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"{name} could not be downloaded: {_first_line(error)}") from error
    lacking = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if lacking:
        raise ValueError(
            f"{name} on the Hub holds no agent of this library: it has no {' and no '.join(lacking)}. Those that "
            "save_pretrained or export writes can be loaded."
        )
    return folder


def push_to_hub(
    directory: str | os.PathLike,
    repository: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str = "Upload agent",
) -> str:
    """Uploads a folder that `save_pretrained` or export wrote, and returns the address of the commit.

    Args:
        directory: the folder.
        repository: "owner/name"; it is made where it is not there yet.
        revision: a branch, made where it is not there yet. Default: the main one.
        private: whether a repository that is made is private.
        message: of the commit.
    """
    hub = _hub("push_to_hub")
    directory = Path(directory)
    if not (directory / WEIGHTS).is_file():
        raise ValueError(f"{directory} holds no {WEIGHTS}: give a folder that save_pretrained or export wrote.")
    read_folder(directory)  # refuses what nobody could load
    api = hub.HfApi(library_name="torchrl-r2dreamer")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=list(FILES),
            revision=revision,
            commit_message=message,
        )
    except Exception as error:  # noqa: BLE001 - among them those of whatever library it sends with
        raise ValueError(
            f"{directory} could not be uploaded to {repository}: {_first_line(error)} Writing needs a connection, and `hf "
            "auth login` with a token that may."
        ) from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
