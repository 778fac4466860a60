"""A transform that changes an environment of the DeepMind Control suite itself."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torchrl.envs import TransformedEnv
from torchrl.envs.transforms import Transform


class ControlTransform(Transform):
    """Puts a change of `envs.control` on a DMControlEnv, as soon as it is put on one itself."""

    def __init__(self, change: Any):
        super().__init__()
        self.change = change

    def __repr__(self) -> str:
        values = {field: getattr(self.change, field.name) for field in fields(self.change) if field.repr}
        given = [f"{field.name}={value!r}" for field, value in values.items() if value != field.default]
        return f"{type(self).__name__}({', '.join(given)})"

    def set_container(self, container: Any) -> None:
        super().set_container(container)
        env = container
        while isinstance(env, Transform):  # a Compose, perhaps not on an environment yet: then this is called again
            env = env.__dict__["_container"]
            env = None if env is None else env()
        if env is not None:
            self.change.put_on(*simulation_and_task(env, type(self).__name__))


def simulation_and_task(env: Any, name: str) -> tuple[Any, str | None]:
    """The environment of dm_control below `env`, and its task; the error says where the transform `name` belongs."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    simulation = vars(env).get("_env")
    if getattr(simulation, "physics", None) is None:
        raise ValueError(
            f"{name} works on a DMControlEnv or DMControlWrapper of this process, not on {type(env).__name__}. "
            "Of several environments each gets its own, inside its worker: ParallelEnv(4, lambda: TransformedEnv("
            f'DMControlEnv("reacher", "easy", from_pixels=True), {name}())).'
        )
    return simulation, getattr(env, "task_name", None)
