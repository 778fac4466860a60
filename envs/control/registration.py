"""The names under which Gymnasium makes the environments of this package."""

from __future__ import annotations

from gymnasium import register

from .subtle import OFFICIAL
from .suite import TASKS

MODULE = f"{__package__}.environments"


def register_environments() -> None:
    for task in OFFICIAL:
        register(f"DMCSubtle/{task}-v0", f"{MODULE}:SubtleEnv", kwargs={"task": task})
    for task in TASKS:
        register(f"DMCDistracting/{task}-v0", f"{MODULE}:DistractingEnv", kwargs={"task": task})
