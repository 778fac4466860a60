"""Whether a training fits into memory, estimated before anything large is made.

The estimates are lower bounds: what they refuse cannot fit, and what they let pass may still not.
"""

from __future__ import annotations

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from r2dreamer.dreamer import Agent, ImageEncoder, ObservationSpace
from r2dreamer.envs import count_workers
from r2dreamer.envs.replay.place import free_bytes

ENVIRONMENT, WORKER = 30_000, 20_000_000  # bytes: CartPole, the smallest of all, alone and in a process of its own
LEARNT = 4 * 4  # bytes of a parameter: its value, its gradient and the optimiser's two moments


def check_environments(cfg: DictConfig, observations: ObservationSpace) -> None:
    """Refuses more environments, or more steps of them at a time, than fit."""
    free, _ = free_bytes("cpu")
    remote = hydra.utils.get_class(cfg.collector._target_).remote
    counts = 0 if remote else cfg.env.num_envs, cfg.eval.episodes
    workers = sum(count_workers(cfg.env.parallel, count) for count in counts)
    needed = sum(counts) * ENVIRONMENT + workers * WORKER
    if needed > free:
        raise MemoryError(
            f"env.num_envs={counts[0]} and eval.episodes={counts[1]} do not fit: each episode has an environment of its own. "
            f"They take at least {gigabytes(needed)} and {gigabytes(free)} are free, enough for "
            f"{sum(counts) * free // needed} in all. Use fewer, env.num_envs=N env.eval_episodes=M."
        )
    step = cfg.env.num_envs * observation_bytes(observations)
    if cfg.collect_steps * step > free:
        raise MemoryError(
            f"collect_steps={cfg.collect_steps} does not fit: the observations of {cfg.env.num_envs} environments take "
            f"{gigabytes(cfg.collect_steps * step)} and {gigabytes(free)} are free. At most collect_steps={free // step} fit."
        )


def check_update(cfg: DictConfig, agent: Agent, device: torch.device, precision: torch.dtype) -> str:
    """One line that says what an update takes, of an agent that may lie on the device "meta"; refuses one too large."""
    free, where = free_bytes(str(device))
    fixed = LEARNT * sum(agent.parameter_counts().values())
    horizon = OmegaConf.select(cfg, "algorithm.actor.imagination_horizon", default=0)
    each = activation_bytes(agent, horizon, precision) * cfg.batch_length
    needed = fixed + cfg.batch_size * each
    line = f"at least {gigabytes(needed)}, of which model and optimiser {gigabytes(fixed)}; {gigabytes(free)} free on {where}"
    if fixed > free:
        widths = ", ".join(f"model.{name}={value}" for name, value in cfg.model.items() if type(value) is int)
        raise MemoryError(
            f"the model does not fit: an update takes {line}. Use smaller widths than {widths}; model=size1M is the smallest."
        )
    if needed > free:
        raise MemoryError(
            f"batch_size={cfg.batch_size} with batch_length={cfg.batch_length} does not fit: an update takes {line}. "
            f"At most batch_size={(free - fixed) // each} fits now; shorter windows or a smaller model leave room for more."
        )
    return line


def activation_bytes(agent: Agent, horizon: int, precision: torch.dtype) -> int:
    """What the backward pass needs of one record and of the states imagined from it."""
    sizes = agent.sizes
    latents = 4 * sizes.belief + 2 * (sizes.belief + sizes.state) + 8 * sizes.units  # gates, features, heads
    images, first = 0, 0 if any(isinstance(part, ImageEncoder) for part in agent.encoder.modules()) else 1
    for channels, height, width in sizes.images.values():
        images += channels * height * width
        for stage, multiplier in enumerate(sizes.multipliers):
            shift = stage + first  # ours convolves at full size and then pools, others stride
            images += 2 * sizes.depth * multiplier * (height >> shift) * (width >> shift)
    return (images + 2 * sizes.embedding + (1 + horizon) * latents) * precision.itemsize


def observation_bytes(observations: ObservationSpace) -> int:
    images = sum(channels * height * width for channels, height, width in observations.images.values())
    return images + 4 * sum(observations.vectors.values())


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
