"""Files of a run: they stay inside its directory, and what a full disk does not take is said with the remedy."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

OWN_NAME = re.compile(r"step_\d{9,}(_\d+)?")
REMEDY = "Free some space there, or choose another disk with logdir=PATH."


@contextlib.contextmanager
def explained(path: str | os.PathLike) -> Iterator[None]:
    """Around what writes `path` and must succeed."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}. {REMEDY}") from error


def warn(text: str) -> None:
    """On stderr, which may itself go to a file on the full disk."""
    with contextlib.suppress(OSError):
        tqdm.write(f"WARNING: {text}", file=sys.stderr)


@functools.cache
def warn_once(text: str) -> None:
    warn(text)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes the file whole or leaves the old one as it is; `write` writes the file that it is given."""
    partial = path.with_name(f".{path.name}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def replace_text(path: Path, text: str) -> None:
    replace(path, lambda partial: partial.write_text(text))


def require_room(directory: Path, size: int = 2**20) -> None:
    """Raises what a write of so many bytes would, for writers that do not say what happened to them."""
    if shutil.disk_usage(directory).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse_links(directory: str | os.PathLike) -> Path:
    """The directory, unless a symbolic link in it leads out of it: what is written there would land elsewhere.

    The directory itself may be a link.
    """
    top = os.path.realpath(directory)
    for folder, folders, files in os.walk(top):
        for path in (os.path.join(folder, name) for name in (*folders, *files)):
            if os.path.islink(path) and os.path.commonpath([top, os.path.realpath(path)]) != top:
                raise ValueError(
                    f"{path} is a link to {os.readlink(path)}, and a run writes into its own directory alone. Remove the "
                    "link; a run of your own is kept on another disk by logdir=PATH."
                )
        if folder == top and "wandb" in folders:
            folders.remove("wandb")  # W&B links its logs; nothing else writes there
    return Path(directory)


def make_output(out: Path, option: str = "out=DIR") -> None:
    """Makes the directory of a tool's results before anything is computed, and finds out whether it can be written.

    option: by which the user gives another one.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror or error}. Give another place, {option}.") from error


def own_directories(root: Path) -> list[Path]:
    """The checkpoints that a run named itself. What a user puts beside them, such as step_best, is the user's."""
    return sorted(path for path in root.glob("step_*") if OWN_NAME.fullmatch(path.name) and path.is_dir())
