"""Several environments as one batched TorchRL environment, each with its own seed, in this process or in workers.

    seeds = env_seeds(run_seed, 16, "train")
    env = make_vector_env(functools.partial(make_dmc, "walker_walk", from_pixels=True), seeds, parallel=True)

A worker that dies or hangs becomes a `WorkerError` with its task, index, seed and traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from ..base.errors import require_linux, require_one_of
from .steppers import LocalPool

if TYPE_CHECKING:
    from .workers import WorkerPool


def env_seeds(seed: int, count: int, split: str, generation: int = 0) -> list[int]:
    """Distinct seeds below 2**31; those of ``"train"`` are even and those of ``"eval"`` odd, so they never meet.

    Args:
        seed: The run's seed.
        count: How many seeds.
        split: ``"train"`` or ``"eval"``.
        generation: Counts the restarts of one run; each gives its environments other seeds.
    """
    require_one_of(("train", "eval"), split=split)
    base = int(np.random.SeedSequence([seed, generation]).generate_state(1)[0])
    # Multiplying by an odd number permutes the numbers below 2**30: seeds are distinct, and do not look consecutive.
    return [(base + index) * 0x9E3779B1 % 2**30 * 2 + (split == "eval") for index in range(count)]


def make_vector_env(
    factory: Callable[..., EnvBase], seeds: Sequence[int], *, parallel: bool | int | str, timeout: float = 120.0
) -> VectorEnv:
    """One batched environment of ``factory(seed=seed)`` for each seed.

    Args:
        factory: One of this package's makers, ``functools.partial(make_dmc, ...)`` for example; picklable if parallel.
        seeds: One for each environment.
        parallel: ``False`` steps them in this process, ``True`` each in a worker of its own, a number in so many
            workers. ``"auto"`` takes as many workers as there are cores, and none for a single environment. Workers
            need Linux.
        timeout: Seconds the environments of one worker may take for a step, a reset or their construction.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("seeds is empty: a vector environment needs one seed for each of its environments.")
    workers = count_workers(parallel, len(seeds))
    if not workers:
        return VectorEnv(LocalPool(factory, dict(enumerate(seeds))), seeds)
    require_linux("Stepping environments in workers", "Use parallel=False, which steps them in this process.")
    if not timeout > 0:
        raise ValueError(f"timeout={timeout} must be above 0: seconds that a worker may take.")
    from .workers import WorkerPool  # not at the top: other systems lack what it imports

    return VectorEnv(WorkerPool(factory, seeds, workers, timeout), seeds)


def count_workers(parallel: bool | int | str, environments: int) -> int:
    """How many workers step so many environments; 0 means this process."""
    if parallel == "auto":
        has_workers = environments > 1 and sys.platform.startswith("linux")
        parallel = len(os.sched_getaffinity(0)) if has_workers else False
    if isinstance(parallel, bool):
        return environments if parallel else 0
    if not isinstance(parallel, int) or parallel < 1:
        raise ValueError(f"parallel={parallel!r} must be true, false, auto or a number of workers of at least 1.")
    return min(parallel, environments)


class VectorEnv(EnvBase):
    """N environments [N], stepped without TensorDicts of their own; what they return lies in one set of arrays.

    TorchRL's ParallelEnv has each worker step a TensorDict through specs and transforms, which takes ten times as long as
    a step of a simple simulator. As there, an environment whose episode ends is reset when TorchRL resets it
    (`step_and_maybe_reset`, collectors, `rollout`); here its next episode begins within the same call to its worker.

    Args:
        pool: What steps the environments.
        seeds: The seeds that the pool gave them.
    """

    action: torch.Tensor
    reward: torch.Tensor
    observations: dict[Any, torch.Tensor]
    first_observations: dict[Any, torch.Tensor]
    current: dict[Any, torch.Tensor]
    flags: dict[str, torch.Tensor]
    auto_reset: torch.Tensor

    def __init__(self, pool: LocalPool | WorkerPool, seeds: Sequence[int]):
        super().__init__(device="cpu", batch_size=torch.Size([len(seeds)]))
        self.pool, self.seeds, self._ended = pool, seeds, False
        of_one = pool.specs["output_spec"]
        batched = lambda name: of_one[name].expand(self.batch_size).to("cpu")
        self.observation_spec = batched("full_observation_spec")
        self.full_done_spec, self.full_reward_spec = batched("full_done_spec"), batched("full_reward_spec")
        self.full_action_spec = pool.specs["input_spec", "full_action_spec"].expand(self.batch_size).to("cpu")
        arrays = pool.allocate()
        tensors = lambda group: {key: torch.from_numpy(array) for key, array in group.items()}
        self.action, self.reward = torch.from_numpy(arrays.action), torch.from_numpy(arrays.reward)
        self.observations, self.flags = tensors(arrays.observations), tensors(arrays.flags)
        self.first_observations = tensors(arrays.first_observations)
        self.current = dict(self.first_observations)  # the observations at which the environments are
        self.auto_reset = torch.zeros(len(seeds), dtype=torch.bool)  # those whose next episode began with the last step

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        after = self._step(tensordict)
        tensordict.set("next", after)
        root = tensordict.exclude("next")  # with whatever a policy carries from step to step
        self._clear_flags(self.auto_reset)
        self.auto_reset.zero_()
        flags = {flag: torch.zeros_like(value) for flag, value in self.flags.items()}
        return tensordict, self._fill(root, self.current, flags)

    def step_arrays(self, action: torch.Tensor) -> None:
        """Steps all environments without a TensorDict; the next call overwrites what it wrote.

        `observations`, `reward` and `flags` hold the outcome, `current` the observations to act on.
        """
        self._check_open()
        if action.shape != self.action.shape:
            raise ValueError(
                f"The actions have shape {list(action.shape)}, and these environments take {list(self.action.shape)}."
            )
        if action.is_floating_point() and not self.action.is_floating_point():  # choices that are weighed, or NaN
            if not action.isfinite().all():
                raise ValueError("The actions hold NaN or Inf: the policy that chose them has diverged.")
            action = torch.zeros_like(self.action).scatter_(-1, action.argmax(-1, keepdim=True).cpu(), 1)
        self.action.copy_(action)
        self.pool.step()
        done = self.flags["done"][:, 0]
        self.auto_reset.copy_(done)
        self.current.update(self.observations)
        if done.any():
            self.current.update(
                (key, _where(done, self.first_observations[key], tensor)) for key, tensor in self.observations.items()
            )

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.step_arrays(tensordict.get("action"))
        copies = lambda tensors: {key: tensor.clone() for key, tensor in tensors.items()}
        flags, observed = copies(self.flags), copies(self.observations)
        if not self.auto_reset.any():
            self.current.update(observed)
        after = self._fill(TensorDict({}, self.batch_size, "cpu"), observed, flags)
        return after.set("reward", self.reward.clone())

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        asked = torch.ones_like(self.auto_reset)
        if tensordict is not None and "_reset" in tensordict:
            asked = tensordict.get("_reset").reshape(asked.shape).to(asked.device)
        to_reset = asked & ~self.auto_reset
        if to_reset.any():
            self._check_open()
            self.pool.reset(to_reset.nonzero()[:, 0].tolist())
            self.current.update(
                (key, _where(to_reset, self.first_observations[key], tensor)) for key, tensor in self.current.items()
            )
        self.auto_reset &= ~asked
        self._clear_flags(asked)
        flags = {flag: tensor.clone() for flag, tensor in self.flags.items()}
        observed = {key: tensor.clone() for key, tensor in self.current.items()}
        return self._fill(TensorDict({}, self.batch_size, "cpu"), observed, flags)

    def _clear_flags(self, begun: torch.Tensor) -> None:
        """Whose episode has begun is not done, until its next step says so."""
        if begun.any():
            for flag in self.flags.values():
                flag[begun] = False

    @staticmethod
    def _fill(tensordict: Any, observations: dict, flags: dict) -> Any:
        for key, value in (observations | flags).items():
            tensordict.set(key, value)
        return tensordict

    def _set_seed(self, seed: int | None) -> None:
        """Every environment gets a new seed of its own split: training and evaluation stay apart."""
        drawn = {split: env_seeds(seed or 0, len(self.seeds), split) for split in ("train", "eval")}
        self.reseed([drawn["eval" if old % 2 else "train"][number] for number, old in enumerate(self.seeds)])

    def reseed(self, seeds: Sequence[int]) -> None:
        """The next reset gives what a new vector environment with these seeds would."""
        seeds = [int(seed) for seed in seeds]
        if len(seeds) != len(self.seeds):
            raise ValueError(f"{len(seeds)} seeds for {len(self.seeds)} environments: give one seed for each.")
        self._check_open()
        self.pool.seed(dict(enumerate(seeds)))
        self.seeds = seeds
        self.auto_reset.zero_()

    def _check_open(self) -> None:
        if self._ended:  # is_closed is true of a new environment, too
            raise RuntimeError("This vector environment is closed. Make a new one with make_vector_env.")

    def close(self, *, raise_if_closed: bool = True) -> None:
        super().close(raise_if_closed=raise_if_closed)
        self._ended = True
        self.pool.close()


def _where(rows: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(rows.reshape(-1, *(1,) * (one.ndim - 1)), one, other)
