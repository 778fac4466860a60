"""How a transform reaches into an environment of the DeepMind Control suite: its base, its task's and its physics' hooks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torchrl.envs import TransformedEnv
from torchrl.envs.transforms import Transform


class ControlTransform(Transform):
    """A transform that changes a DMControlEnv itself, as soon as it is put on one; subclasses define `put_on`."""

    def set_container(self, container: Any) -> None:
        super().set_container(container)
        env = container
        while isinstance(env, Transform):  # a Compose, perhaps not on an environment yet: then this is called again
            env = env.__dict__["_container"]
            env = None if env is None else env()
        if env is None:
            return
        while isinstance(env, TransformedEnv):
            env = env.base_env
        self.put_on(env)

    def put_on(self, env: Any) -> None:
        raise NotImplementedError  # this is what a transform of the simulator is

    def physics_of(self, env: Any) -> Any:
        """The physics of an environment that holds one of dm_control's."""
        physics = getattr(vars(env).get("_env"), "physics", None)
        if physics is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} works on a DMControlEnv or DMControlWrapper of this process, not on {type(env).__name__}. "
                "Of several environments each gets its own, inside its worker: ParallelEnv(4, lambda: TransformedEnv("
                f'DMControlEnv("reacher", "easy", from_pixels=True), {name}())).'
            )
        return physics


def find(hook: Any, link: str, kind: type) -> Any:
    """The first hook of this kind in a chain, where each holds the one it replaced as its attribute `link`."""
    while hook is not None and not isinstance(hook, kind):
        hook = getattr(hook, link, None)
    return hook


def beginning(task: Any) -> Any:
    """What is called when an episode of a task begins."""
    return vars(task).get("initialize_episode") or partial(type(task).initialize_episode, task)
