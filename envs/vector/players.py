"""Environments stepped one after another in one process, each reading and writing its own rows of shared arrays."""

from dataclasses import dataclass

import numpy as np
import torch
from torchrl.envs.utils import step_mdp

from ..base.contract import ContractEnv, with_task
from ..base.errors import fits, not_finite, unexpected

FLAGS = ("done", "terminated", "truncated")


@dataclass
class Arrays:
    """What N environments exchange with whoever batches them; observations by key, `began` where an episode ended."""

    action: np.ndarray  # [N, A]
    observed: dict  # key -> [N, ...], after the action
    began: dict  # key -> [N, ...], the first observation of the next episode; old where none began
    reward: np.ndarray  # [N, 1]
    flags: dict  # done, terminated, truncated -> [N, 1]

    @classmethod
    def layout(cls, env):
        """The shapes and dtypes of one environment's rows, by the place they have here."""
        dtype = lambda spec: torch.empty(0, dtype=spec.dtype).numpy().dtype.str
        rows = {"action": env.action_spec, "reward": env.reward_spec}
        rows |= {("flags", name): env.full_done_spec[name] for name in FLAGS}
        for key, spec in env.observation_spec.items(True, True):
            rows |= {("observed", key): spec, ("began", key): spec}
        return {place: (tuple(spec.shape), dtype(spec)) for place, spec in rows.items()}

    @classmethod
    def allocate(cls, layout, count, memory=None):
        """Of new memory, or as views of `memory`, `size_of(layout, count)` bytes."""
        arrays, offset = cls(None, {}, {}, None, {}), 0
        for place, (shape, dtype) in layout.items():
            shape, dtype = (count, *shape), np.dtype(dtype)
            size = dtype.itemsize * int(np.prod(shape))
            array = (
                np.zeros(shape, dtype) if memory is None else memory[offset : offset + size].view(dtype).reshape(shape)
            )
            offset += -(-size // 64) * 64
            if isinstance(place, str):
                setattr(arrays, place, array)
            else:
                getattr(arrays, place[0])[place[1]] = array
        return arrays

    @staticmethod
    def size_of(layout, count):
        sizes = (np.dtype(dtype).itemsize * int(np.prod((count, *shape))) for shape, dtype in layout.values())
        return sum(-(-size // 64) * 64 for size in sizes)

    def row(self, index):
        """The rows of one environment, as views."""
        of = lambda arrays: {key: array[index] for key, array in arrays.items()}
        return Arrays(self.action[index], of(self.observed), of(self.began), self.reward[index], of(self.flags))


class SimulatorPlayer:
    """Steps a bare simulator, without a TensorDict."""

    def __init__(self, env):
        self.env, self.simulator = env, env.base_env

    def seed(self, number):
        self.env.set_seed(number, static_seed=True)

    def begin(self, row):
        self._write(self.simulator.start(), row.began)
        row.began["is_init"][0] = True

    def step(self, row):
        observation, row.reward[0], terminated, truncated = self.simulator.play(row.action)
        self._write(observation, row.observed)
        flags = row.flags
        flags["terminated"][0], flags["truncated"][0], flags["done"][0] = terminated, truncated, terminated or truncated
        if terminated or truncated:
            self.begin(row)

    def _write(self, observation, row):
        for name, value in observation.items():
            row[name][...] = value
        for name, value in self.simulator.metrics.items():
            row["metrics", name][0] = value


class EnvPlayer:
    """Steps any TorchRL environment."""

    def __init__(self, env):
        self.env = env
        self.root, self.played = None, 0

    def seed(self, number):
        self.env.set_seed(number, static_seed=True)

    def begin(self, row):
        self.root, self.played = self.env.reset(), 0
        self._write(self.root, row.began)

    def step(self, row):
        stepped = self.env.step(self.root.set("action", torch.from_numpy(row.action.copy())))
        after, self.played = stepped["next"], self.played + 1
        self._write(after, row.observed | {"reward": row.reward} | row.flags)
        if row.flags["done"][0]:
            self.begin(row)
        else:
            self.root = step_mdp(stepped)

    def _write(self, tensors, row):
        """Checked as it is stored: an assignment would broadcast a wrong shape and make a large float64 infinite."""
        for key, array in row.items():
            tensor, task = tensors.get(key, None), getattr(self.env, "task", type(self.env).__name__)
            value = None if tensor is None else tensor.numpy(force=True)
            if not fits(value, array.shape, array.dtype):
                raise unexpected(key, value, array.shape, array.dtype, self.played, task)
            with np.errstate(over="ignore"):
                array[...] = value
            # What stands below "metrics" is reported, not learned from.
            if array.dtype.kind == "f" and isinstance(key, str) and not np.isfinite(array).all():
                raise not_finite(key, value, self.played, task)


class Squad:
    """Environments of this process, by the numbers they have among all."""

    def __init__(self, factory, seeds, at=lambda number: None):
        """at: told the number of each environment before it does something."""
        self.at, self.players = at, {}
        for number, seed in seeds.items():
            at(number)
            env = factory(seed=seed)
            # A transform put on top passes unknown attributes on to what is below it, `bare` as well.
            bare = type(env) is ContractEnv and env.bare
            self.players[number] = SimulatorPlayer(env) if bare else EnvPlayer(env)
        self.layout, self.specs = self.describe()

    def describe(self):
        """What one environment reads and writes: the layout of its rows, and its specs."""
        env = next(iter(self.players.values())).env
        return Arrays.layout(env), env.specs

    def allocate(self):
        arrays = Arrays.allocate(self.layout, len(self.players))
        self.attach(arrays)
        return arrays

    def attach(self, arrays):
        self.rows = {number: arrays.row(number) for number in self.players}

    def step(self):
        for number, player in self.players.items():
            self.at(number)
            with_task(player.step, "step", player.env, self.rows[number])

    def begin(self, numbers):
        for number in numbers:
            self.at(number)
            player = self.players[number]
            with_task(player.begin, "reset", player.env, self.rows[number])

    def seed(self, seeds):
        for number, seed in seeds.items():
            self.at(number)
            self.players[number].seed(seed)

    def close(self):
        for player in self.players.values():
            player.env.close(raise_if_closed=False)
