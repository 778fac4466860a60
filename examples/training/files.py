"""What is written into a run's directory stays there, whoever made that directory."""

from __future__ import annotations

import os
from pathlib import Path


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


def output(out: str | None, directory: Path, name: str) -> Path:
    """Where a tool writes: where the user said, or into the directory of the run."""
    return Path(out) if out else refuse_links(directory) / name
