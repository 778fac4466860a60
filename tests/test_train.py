"""The example itself: it runs on what it is given, logs what it did, and repeats."""

import os
import re
import subprocess
import sys

import pytest
import torch
from agents import tiny_agent, tiny_records
from launcher import CARTPOLE, EXAMPLES, PENDULUM, TINY, config, lines, steps, train_here

from r2dreamer.examples import train


@pytest.mark.parametrize(("discount", "scale", "expected"), [(0.9, 1.0, 0.9), (1.0, 0.9, 0.9), (1.0, 1.0, 1.0)])
def test_replayed_returns_are_discounted_wherever_the_discount_stands(discount, scale, expected, monkeypatch):
    algorithm = config(
        f"algorithm.actor.discount={discount}", f"+algorithm.world_model.continue_target_scale={scale}"
    ).algorithm
    agent = tiny_agent(images=False)
    learner = train.Learner(agent, algorithm, torch.float32)
    used = []
    loss = learner.value_loss.replay_value_loss
    monkeypatch.setattr(
        learner.value_loss,
        "replay_value_loss",
        lambda *args, **settings: (used.append(settings), loss(*args, **settings))[1],
    )
    losses, _ = learner.update(tiny_records(agent))
    assert 1 - 1 / used[0]["horizon"] == pytest.approx(expected) and losses["loss_replay_value"].isfinite()


def test_the_command_trains_from_nothing_to_a_curve(tmp_path):
    command = [sys.executable, EXAMPLES / "train.py", *CARTPOLE, "env.action_repeat=2", "logger=tensorboard"]
    command += ["eval.video=true", "progress=true"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    logdir = tmp_path / "runs" / "tiny" / "seed0"
    for name in ("config.yaml", "metrics.jsonl", "curve.png", "eval.mp4", "tensorboard", "checkpoints/step_000000200"):
        assert (logdir / name).exists(), name
    assert done.stdout.splitlines()[-1].startswith("tiny seed 0: finished at 200 frames, eval return ")
    assert "Replay: " in done.stdout and "200/200" in done.stderr

    logged = lines(logdir, '"count/updates"', timings=True)
    expected = {"step", "train/return", "train/length", "train/episodes", "count/policy_steps", "count/updates"}
    expected |= {"count/train_ratio", "speed/fps", "speed/updates_per_second", "train/kl"}
    losses = ("barlow", "dynamics", "representation", "reward", "continue", "actor", "value", "replay_value")
    expected |= {f"loss/{name}" for name in losses}
    assert expected <= {name for line in logged for name in line}
    assert all(line["step"] == 2 * line["count/policy_steps"] for line in logged)  # the action repeat
    assert logged[-1]["step"] == 200
    evaluated = lines(logdir, '"eval/return"')
    assert [line["step"] for line in evaluated] == [0, 80, 160, 200]
    assert {"eval/return", "eval/return_std", "eval/length"} <= evaluated[0].keys()


def test_learning_rate_and_entropy_bonus_fall_to_their_final_fractions():
    algorithm = config("algorithm.final_lr_fraction=0.5", "algorithm.final_entropy_fraction=0.1").algorithm
    learner = train.Learner(tiny_agent(images=False), algorithm, torch.float32)
    for progress, rate, entropy in ((0.0, 1.0, 1.0), (0.5, 0.75, 0.55), (2.0, 0.5, 0.1)):
        learner.anneal(progress)
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(rate * algorithm.optimizer.lr)
        assert learner.actor_loss.entropy_bonus == pytest.approx(entropy * algorithm.actor.entropy_bonus)


def test_a_posterior_that_ignores_what_is_seen_has_no_spread_though_its_samples_have():
    agent = tiny_agent()
    learner = train.Learner(agent, config().algorithm, torch.float32)
    alive, _ = learner.losses(tiny_records(agent))
    with torch.no_grad():
        agent.posterior.out.weight.zero_()
    dead, latents = learner.losses(tiny_records(agent))
    assert alive["state_std"] > 0.01 and dead["state_std"] < 1e-6
    assert latents["state"].flatten(0, 1).std(0).mean() > 0.1


def test_the_train_ratio_is_kept_once_past_the_warmup(tmp_path):
    ratio, replayed_per_update = 7.5, 3 * 5
    train_here(tmp_path, *CARTPOLE, f"train_ratio={ratio}", "total_frames=300", "eval.every=300")
    logged = lines(tmp_path, '"count/updates"')
    first, last = logged[0], logged[-1]
    updates, policy_steps = (last[key] - first[key] for key in ("count/updates", "count/policy_steps"))
    assert updates * replayed_per_update / policy_steps == pytest.approx(ratio, rel=0.02)
    assert last["count/updates"] == pytest.approx(
        (last["count/policy_steps"] - 20) * ratio / replayed_per_update, rel=0.02
    )
    assert last["count/train_ratio"] == last["count/updates"] * replayed_per_update / last["count/policy_steps"]


class InterruptedSoon:
    """Stands in for Ctrl-C after a few steps; before it is entered nobody handles one."""

    def __init__(self):
        self.asked, self.entered = 0, False

    def __enter__(self):
        self.entered = True
        return self

    def __exit__(self, *_):
        pass

    @property
    def requested(self):
        self.asked += self.entered
        return self.asked > 5


def test_a_run_cut_short_says_when_its_evaluation_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("r2dreamer.examples.train.Interrupt", InterruptedSoon)
    rare = ["eval.every=1000", "checkpoint.every=1000"]
    trainer = train_here(tmp_path, *CARTPOLE, *rare)
    (said,) = re.findall(
        r"interrupted, .* at (\d+) frames, eval return [\d.]+ \+- [\d.]+ at (\d+) frames", capsys.readouterr().out
    )
    assert said == (str(trainer.frames), "0") and trainer.frames > 0
    train_here(tmp_path, *CARTPOLE, *rare)
    assert "eval return not measured since the run was resumed" in capsys.readouterr().out


CAMERA = """
import gymnasium
import numpy as np
from gymnasium import spaces

class CameraAndSpeed(gymnasium.Env):
    observation_space = spaces.Dict(
        camera=spaces.Box(0, 255, (40, 48, 3), np.uint8), speed=spaces.Box(-1, 1, (4,)), gear=spaces.Discrete(3)
    )
    action_space = spaces.Box(-2, 3, (2, 3))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.see(), {}

    def see(self):
        image = self.np_random.integers(0, 256, (40, 48, 3), np.uint8)
        return {"camera": image, "speed": np.zeros(4, np.float32), "gear": self.steps % 3}

    def step(self, action):
        self.steps += 1
        return self.see(), float(action.sum()), self.steps >= 7, False, {}

gymnasium.register("CameraAndSpeed-v0", CameraAndSpeed)
"""


def test_a_dict_of_image_vector_and_choice_with_a_box_of_actions(tmp_path, monkeypatch):
    (tmp_path / "camera_and_speed.py").write_text(CAMERA)
    monkeypatch.syspath_prepend(tmp_path)
    task = "env.task=camera_and_speed:CameraAndSpeed-v0"
    trainer = train_here(tmp_path / "log", "env=gym", *TINY, task, "total_frames=60", "eval.video=true")
    assert trainer.agent.observations.images == {"camera": (3, 64, 64)}
    assert trainer.agent.observations.vectors == {"speed": 4, "gear": 3}
    assert (trainer.agent.actions.size, trainer.agent.actions.discrete) == (6, False)
    assert trainer.count["updates"] > 10 and (tmp_path / "log" / "eval.mp4").exists()  # the film shows the camera


SHORT = ["env.action_repeat=25", "total_frames=1500"]  # episodes of 40 steps


@pytest.mark.parametrize(
    "overrides",
    [
        ["env=gym", "env.task=CartPole-v1", *TINY, "env.from_pixels=true", "total_frames=60"],
        [*PENDULUM, "total_frames=60"],
        ["env=dmc_proprio", "env.task=walker_walk", *TINY, *SHORT, "env.parallel=true"],
        ["env=dmc_vision", "env.task=cartpole_swingup", *TINY, *SHORT, "env.parallel=false"],
        ["env=probe", "env.task=ending", *TINY, "total_frames=60"],
        [*CARTPOLE, "replay.place.storage=memmap", "total_frames=60"],
        [*CARTPOLE, "precision=bf16", "total_frames=60"],
    ],
    ids=["gym pixels", "continuous actions", "dmc_proprio in workers", "dmc_vision", "probe", "memmap", "bf16"],
)
def test_it_runs_on(tmp_path, overrides):
    once = ["eval.every=1000000", "env.eval_episodes=1", "checkpoint.every=1000000"]
    trainer = train_here(tmp_path, *overrides, *once)
    assert trainer.count["updates"] >= 2
    assert steps(tmp_path, "eval/return") == [0, trainer.frames]


def test_two_runs_with_one_seed_are_identical_and_with_another_not(tmp_path):
    few = [*PENDULUM, "total_frames=80"]
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        train_here(tmp_path / name, *few, f"seed={seed}")
    assert lines(tmp_path / "one") == lines(tmp_path / "two") != lines(tmp_path / "other")
