"""Several environments as one batched TorchRL environment, each with its own seed, in this process or in workers.

    seeds = env_seeds(run_seed, 16, "train")
    env = make_vector_env(functools.partial(make_dmc, "walker_walk", from_pixels=True), seeds, parallel=True)

A worker that dies or hangs becomes a `WorkerError` with its task, index, seed and traceback.
"""

import tempfile

import numpy as np
import torch
from torchrl.envs import SerialEnv

from .workers import WatchedParallelEnv, Worker, start_fork_server


def env_seeds(seed, count, split, generation=0):
    """`count` distinct seeds below 2**31; "train" ones are even and "eval" ones odd, so they never meet.

    generation: counts the restarts of one run; each gives its environments other seeds.
    """
    if split not in ("train", "eval"):
        raise ValueError(f'split={split!r} must be "train" or "eval".')
    base = int(np.random.SeedSequence([seed, generation]).generate_state(1)[0])
    # Multiplying by an odd number permutes the numbers below 2**30: seeds are distinct, and do not look consecutive.
    return [(base + index) * 0x9E3779B1 % 2**30 * 2 + (split == "eval") for index in range(count)]


def make_vector_env(factory, seeds, *, parallel, timeout=120.0):
    """A batched environment of `factory(seed=seed)` for each seed, started.

    factory: picklable if parallel (a `functools.partial`, a module-level function).
    timeout: seconds a worker may take for one step, reset or its construction.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("seeds is empty: a vector environment needs one seed for each of its environments.")
    kwargs = [{"seed": seed} for seed in seeds]
    if not parallel:
        env = SerialEnv(len(seeds), factory, create_env_kwargs=kwargs)
        env.start()
        return env
    start_fork_server()
    reports = tempfile.TemporaryDirectory(prefix="r2dreamer-workers-")
    worker = Worker(factory, reports.name)
    env = WatchedParallelEnv(
        len(seeds),
        worker,
        create_env_kwargs=[{**each, "index": index} for index, each in enumerate(kwargs)],
        # A forked copy of a process with torch threads and a GL context can hang; spawning imports torch once for each
        # worker, which takes seconds of CPU. The fork server imports it once and forks from a clean process.
        mp_start_method="forkserver",
        # TorchRL would otherwise take one thread for each worker away from the learner, here and when closing.
        num_threads=torch.get_num_threads(),
    )
    env.watch(worker, seeds, timeout, reports)
    env.start()
    return env


def reseed(env, seeds):
    """Seed a running vector environment: its next reset is what a new one with these seeds would give."""
    seeds = [int(seed) for seed in seeds]
    if len(seeds) != env.num_workers:
        raise ValueError(f"{len(seeds)} seeds for {env.num_workers} environments: give one seed for each.")
    if isinstance(env, WatchedParallelEnv):
        env.reseed_workers(seeds)
    else:
        for single, seed in zip(env._envs, seeds, strict=True):
            single.set_seed(seed, static_seed=True)
