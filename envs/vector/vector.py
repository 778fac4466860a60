"""Several environments as one batched TorchRL environment, each with its own seed, in this process or in workers.

    seeds = env_seeds(run_seed, 16, "train")
    env = make_vector_env(functools.partial(make_dmc, "walker_walk", from_pixels=True), seeds, parallel=True)

A worker that dies or hangs becomes a `WorkerError` with its task, index, seed and traceback.
"""

import os
import sys

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase

from ..base.errors import require_linux
from .players import Squad


def env_seeds(seed, count, split, generation=0):
    """`count` distinct seeds below 2**31; "train" ones are even and "eval" ones odd, so they never meet.

    generation: counts the restarts of one run; each gives its environments other seeds.
    """
    if split not in ("train", "eval"):
        raise ValueError(f'split={split!r} must be "train" or "eval".')
    base = int(np.random.SeedSequence([seed, generation]).generate_state(1)[0])
    # Multiplying by an odd number permutes the numbers below 2**30: seeds are distinct, and do not look consecutive.
    return [(base + index) * 0x9E3779B1 % 2**30 * 2 + (split == "eval") for index in range(count)]


def split_of(seed):
    return "eval" if seed % 2 else "train"


def make_vector_env(factory, seeds, *, parallel, timeout=120.0):
    """A batched environment of `factory(seed=seed)` for each seed, started.

    factory: one of this package's, `functools.partial(make_dmc, ...)` for example; picklable if parallel.
    parallel: false steps them in this process, true each in a worker of its own, a number in so many workers; "auto" in as
        many as there are cores, and a single environment in this process. Workers need Linux.
    timeout: seconds the environments of one worker may take for a step, a reset or their construction.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("seeds is empty: a vector environment needs one seed for each of its environments.")
    workers = count_workers(parallel, len(seeds))
    if not workers:
        return VectorEnv(Squad(factory, dict(enumerate(seeds))), seeds)
    require_linux("Stepping environments in workers", "Use parallel=False, which steps them in this process.")
    from .workers import Workers  # not at the top: it imports what other systems lack

    return VectorEnv(Workers(factory, seeds, workers, timeout), seeds)


def count_workers(parallel, environments):
    """In how many workers so many environments are stepped; 0: in this process."""
    if parallel == "auto":
        has_workers = environments > 1 and sys.platform.startswith("linux")
        parallel = len(os.sched_getaffinity(0)) if has_workers else False
    if isinstance(parallel, bool):
        return environments if parallel else 0
    if not isinstance(parallel, int) or parallel < 1:
        raise ValueError(f"parallel={parallel!r} must be true, false, auto or a number of workers of at least 1.")
    return min(parallel, environments)


def reseed(env, seeds):
    """Seed a running vector environment: its next reset is what a new one with these seeds would give."""
    seeds = [int(seed) for seed in seeds]
    if len(seeds) != env.batch_size[0]:
        raise ValueError(f"{len(seeds)} seeds for {env.batch_size[0]} environments: give one seed for each.")
    env.reseed(seeds)


class VectorEnv(EnvBase):
    """N environments [N], stepped without TensorDicts of their own; what they return lies in one set of arrays.

    TorchRL's ParallelEnv has each worker step a TensorDict through specs and transforms, which takes ten times as long as
    a step of a simple simulator. As there, an environment whose episode ends is reset when TorchRL resets it
    (`step_and_maybe_reset`, collectors, `rollout`); here its next episode begins within the same call to its worker.

    squad: a `Squad` or `Workers`.
    """

    def __init__(self, squad, seeds):
        super().__init__(device="cpu", batch_size=[len(seeds)])
        self.squad, self.seeds = squad, seeds
        of_one = squad.specs["output_spec"]
        batched = lambda name: of_one[name].expand(len(seeds)).to("cpu")
        self.observation_spec = batched("full_observation_spec")
        self.full_done_spec, self.full_reward_spec = batched("full_done_spec"), batched("full_reward_spec")
        self.full_action_spec = squad.specs["input_spec", "full_action_spec"].expand(len(seeds)).to("cpu")
        arrays = squad.allocate()
        tensors = lambda group: {key: torch.from_numpy(array) for key, array in group.items()}
        self.action, self.reward = torch.from_numpy(arrays.action), torch.from_numpy(arrays.reward)
        self.observed, self.began, self.flags = tensors(arrays.observed), tensors(arrays.began), tensors(arrays.flags)
        self.latest = dict(self.began)  # the observations at which the environments are
        self.fresh = torch.zeros(len(seeds), dtype=torch.bool)  # whose next episode has begun without being asked for

    def step_and_maybe_reset(self, tensordict):
        after = self._step(tensordict)
        tensordict.set("next", after)
        root = tensordict.exclude("next")  # with whatever a policy carries from step to step
        self.fresh.zero_()
        return tensordict, self._fill(
            root, self.latest, {flag: torch.zeros_like(self.flags[flag]) for flag in self.flags}
        )

    def play(self, action):
        """One step of all. `observed`, `reward` and `flags` hold what came of it, `latest` where the environments are now.

        All of them are overwritten by the next call.
        """
        self.action.copy_(action)
        self.squad.step()
        done = self.flags["done"][:, 0]
        self.fresh.copy_(done)
        self.latest.update(self.observed)
        if done.any():
            self.latest.update((key, _where(done, self.began[key], tensor)) for key, tensor in self.observed.items())

    def _step(self, tensordict):
        self.play(tensordict.get("action"))
        copies = lambda tensors: {key: tensor.clone() for key, tensor in tensors.items()}
        flags, observed = copies(self.flags), copies(self.observed)
        if not self.fresh.any():
            self.latest.update(observed)
        after = self._fill(TensorDict({}, self.batch_size, "cpu"), observed, flags)
        return after.set("reward", self.reward.clone())

    def _reset(self, tensordict=None, **kwargs):
        asked = torch.ones_like(self.fresh)
        if tensordict is not None and "_reset" in tensordict:
            asked = tensordict.get("_reset").reshape(asked.shape)
        stale = asked & ~self.fresh
        if stale.any():
            self.squad.begin(stale.nonzero()[:, 0].tolist())
            self.latest.update((key, _where(stale, self.began[key], tensor)) for key, tensor in self.latest.items())
        self.fresh &= ~asked
        flags = {flag: _where(~asked, tensor, torch.zeros_like(tensor)) for flag, tensor in self.flags.items()}
        observed = {key: tensor.clone() for key, tensor in self.latest.items()}
        return self._fill(TensorDict({}, self.batch_size, "cpu"), observed, flags)

    @staticmethod
    def _fill(tensordict, observations, flags):
        for key, value in (observations | flags).items():
            tensordict.set(key, value)
        return tensordict

    def _set_seed(self, seed):
        """Every environment draws anew from the seeds of its own split: training and evaluation stay apart."""
        drawn = {split: env_seeds(seed, len(self.seeds), split) for split in ("train", "eval")}
        self.reseed([drawn[split_of(old)][number] for number, old in enumerate(self.seeds)])

    def reseed(self, seeds):
        self.squad.seed(dict(enumerate(seeds)))
        self.seeds = seeds
        self.fresh.zero_()

    def close(self, *, raise_if_closed=True):
        super().close(raise_if_closed=raise_if_closed)
        self.squad.close()


def _where(rows, one, other):
    return torch.where(rows.reshape(-1, *(1,) * (one.ndim - 1)), one, other)
