"""Plays a trained policy: every episode's return, their mean and standard deviation, a video.

python examples/evaluate.py checkpoint=runs/quickstart/seed0 episodes=20
"""

from __future__ import annotations

from contextlib import closing

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch
import r2dreamer.envs  # isort: skip  # before TorchRL, which imports MuJoCo
import hydra
import torch
from omegaconf import DictConfig

from r2dreamer.dreamer import compile_parts
from r2dreamer.examples.cli.script import script
from r2dreamer.examples.training.devices import resolve_device
from r2dreamer.examples.training.evaluation import evaluate_seeds
from r2dreamer.examples.training.loading import load_trained
from r2dreamer.examples.training.video import write_video


@script("evaluate", foreign=True)
def main(cfg: DictConfig) -> None:
    device = resolve_device(cfg.device)
    trained = load_trained(cfg.checkpoint, device, cfg.trust, images=False)
    run, agent = trained.run, trained.agent
    out = trained.output(cfg.out, "eval.mp4") if cfg.video else None
    seed = run.seed if cfg.seed is None else cfg.seed
    episodes = run.eval.episodes if cfg.episodes is None else cfg.episodes
    max_steps = trained.max_steps if cfg.max_steps is None else cfg.max_steps
    if run.threads:
        torch.set_num_threads(run.threads)
    if cfg.compile:
        compile_parts(agent.rollout, *agent.parts().values())

    seeds = r2dreamer.envs.env_seeds(seed, episodes, "eval")
    how = {"record": cfg.video, "make_environment": trained.make_environment, "timeout": run.timeout}
    together = seeds[: run.eval.episodes]  # no more environments at once than the run's own evaluations had
    with closing(trained.environments(together)) as environments:
        result = evaluate_seeds(environments, agent, seeds, seed=seed, max_steps=max_steps, **how)

    for episode, (score, length) in enumerate(zip(result.returns, result.lengths, strict=True)):
        print(f"episode {episode}: return {score:.6g}, {length} steps")
    for name, value in result.summary(hydra.utils.instantiate(run.env.scores)).items():
        if name not in ("eval/return", "eval/return_std", "eval/length"):
            print(f"{name.removeprefix('eval/')}: {value:.4g}")
    print(f"{run.name} at {trained.step} frames: {result.mean:.6g} +- {result.std:.4g} over {episodes} episodes")
    if result.frames is not None and (film := write_video(out, result.frames, fps=30)):
        print(f"video: {film}")


if __name__ == "__main__":
    main()
