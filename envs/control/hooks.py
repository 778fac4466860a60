"""How a change reaches into an environment of the DeepMind Control suite: its task's and its physics' hooks."""

from __future__ import annotations

from functools import partial
from typing import Any


def find(hook: Any, link: str, kind: type) -> Any:
    """The first hook of this kind in a chain, where each holds the one it replaced as its attribute `link`."""
    while hook is not None and not isinstance(hook, kind):
        hook = getattr(hook, link, None)
    return hook


def beginning(task: Any) -> Any:
    """What is called when an episode of a task begins."""
    return vars(task).get("initialize_episode") or partial(type(task).initialize_episode, task)
