"""Plays a trained policy: every episode's return, their mean and standard deviation, a video.

python examples/evaluate.py checkpoint=runs/quickstart/seed0 episodes=20
"""

from __future__ import annotations

from pathlib import Path

import support  # noqa: F401  # isort: skip  # before torch
import r2dreamer.envs  # isort: skip  # before TorchRL, which imports MuJoCo
import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from train import Learner

from support.checkpoint import Checkpoints, LoadedCheckpoint
from support.devices import resolve_device
from support.film import evaluate_seeds
from support.script import script
from support.setup import build
from support.video import write_video


def load(path: str | None) -> tuple[LoadedCheckpoint, DictConfig]:
    """A checkpoint without its replay, and the configuration of the run that saved it."""
    if path is None:
        raise ValueError("checkpoint=DIR is missing: give a run's directory, or one of its checkpoints.")
    loaded = Checkpoints(path).load(path, replay=False)
    if not {"config", "learner"} <= loaded.state.keys():
        raise ValueError(f"{loaded.path} holds {sorted(loaded.state)}; it was not saved by examples/train.py.")
    return loaded, OmegaConf.create(loaded.state["config"])


@script("evaluate")
def main(cfg: DictConfig) -> None:
    device = resolve_device(cfg.device)
    loaded, run = load(cfg.checkpoint)
    seed = run.seed if cfg.seed is None else cfg.seed
    episodes = run.eval.episodes if cfg.episodes is None else cfg.episodes
    if run.threads:
        torch.set_num_threads(run.threads)

    make_environment = hydra.utils.instantiate(run.env.make_evaluation)
    agent, _ = build(make_environment, run, device)
    Learner(agent, run.algorithm, torch.float32).load_state_dict(loaded.state["learner"]["model"])
    seeds = r2dreamer.envs.env_seeds(seed, episodes, "eval")
    environments = r2dreamer.envs.make_vector_env(make_environment, seeds, parallel=run.env.parallel)
    try:
        result = evaluate_seeds(
            environments, agent, seeds, seed=seed, record=cfg.video, make_environment=make_environment
        )
    finally:
        environments.close()

    for episode, (score, length) in enumerate(zip(result.returns, result.lengths, strict=True)):
        print(f"episode {episode}: return {score:.6g}, {length} steps")
    for name, value in result.summary(hydra.utils.instantiate(run.env.scores)).items():
        if name not in ("eval/return", "eval/return_std", "eval/length"):
            print(f"{name.removeprefix('eval/')}: {value:.4g}")
    print(f"{run.name} at {loaded.step} frames: {result.mean:.6g} +- {result.std:.4g} over {episodes} episodes")
    if result.frames is not None:
        run_directory = loaded.path.parent.parent if loaded.path.parent.name == "checkpoints" else Path()
        print(f"video: {write_video(cfg.out or run_directory / 'eval.mp4', result.frames, fps=30)}")


if __name__ == "__main__":
    main()
