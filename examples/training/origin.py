"""The command and the version that made a run or a result."""

from __future__ import annotations

import contextlib
import functools
import shlex
import subprocess
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from .manifest import program

EXAMPLES = Path(__file__).parent.parent
PLACES = ("logdir", "resume", "replay.place.directory", "hydra.run.dir")  # of the machine: they say nothing elsewhere


@functools.cache
def commit() -> str:
    """As git describes this source; of an installed copy, the version."""
    git = ["git", "-C", str(EXAMPLES)]
    found = ""
    with contextlib.suppress(OSError):
        # A copy may be installed inside somebody else's repository.
        if not subprocess.run([*git, "ls-files", "--error-unmatch", "train.py"], capture_output=True).returncode:
            found = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout
    return found.strip() or program()


def train_command() -> str:
    """What was typed to train, without the places on this machine; empty where no command line began it."""
    if not HydraConfig.initialized():
        return ""
    overrides = [each for each in HydraConfig.get().overrides.task if each.partition("=")[0].lstrip("+") not in PLACES]
    return shlex.join(["r2dreamer", "train", *overrides])
