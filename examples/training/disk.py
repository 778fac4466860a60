"""Files on a disk that may be full: what cannot be written is said with its path and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

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


def replace_text(path: Path, text: str) -> None:
    """Writes the file whole or leaves the old one as it is."""
    partial = path.with_name(f".{path.name}.partial")
    with explained(path):
        try:
            partial.write_text(text)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def require_room(directory: Path, size: int = 2**20) -> None:
    """Raises what a write of so many bytes would, for writers that do not say what happened to them."""
    if shutil.disk_usage(directory).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
