"""Every suite trains end to end through the example, with its own config, shrunk only in model, batch and budget."""

import csv
import importlib.resources
import json
import os
import subprocess
import sys

import hydra
import pytest
from launcher import TINY, config, train_here

from r2dreamer.envs import make_dmc, make_gym, make_probe
from r2dreamer.examples.training.metrics import read_metrics

MAKE_ENV = """
import torch
from torchrl.envs import GymEnv, TransformedEnv, RewardSum

def make_env(task="CartPole-v1"):
    return GymEnv(task, categorical_action_encoding=False)

def summed():
    return TransformedEnv(make_env(), RewardSum())  # a second reward: "episode_reward" of one number, as an observation

def indexed():
    return GymEnv("CartPole-v1", categorical_action_encoding=True)

def counted():
    from torchrl.envs import InitTracker, ObservationNorm
    broken = ObservationNorm(loc=float("nan"), scale=1.0, in_keys=["observation"])
    return TransformedEnv(TransformedEnv(make_env(), InitTracker()), broken)  # begins episodes itself, and is ill

def nothing():
    return object()

def hanging():
    import time
    time.sleep(60)
"""
# Beside `eval/return`: what a user of the suite looks for.
REPORTED = {
    "dmc_vision": (),
    "dmc_proprio": (),
    "dmc_subtle": (),
    "dmc_distracting": (),
    "metaworld": ("eval/success",),
    "atari100k": ("eval/human_normalized",),
    "crafter": ("eval/crafter_score", "eval/achievement_wake_up", "train/crafter_score"),
    "memory_maze": ("eval/targets_reached",),
    "probe": (),
    "custom": (),
}
# Sizes that keep an evaluation short; each suite's own limits are tested with the suite.
CUT = "eval.max_steps=30"
SHORT = {
    "dmc_vision": [CUT],
    "dmc_proprio": [CUT],
    "dmc_subtle": [CUT],
    "dmc_distracting": [CUT],
    "atari100k": ["env.task=pong", "env.make.time_limit=600"],
    "memory_maze": ["replay.place.storage=memmap", "total_frames=60", "eval.every=1000", "checkpoint.every=40", CUT],
    "metaworld": ["total_frames=60", "eval.every=1000", CUT],
    "custom": ["env.factory=my_envs:make_env", "env.parallel=false"],
}


@pytest.mark.parametrize("suite", REPORTED)
def test_a_few_hundred_frames_train_and_report_what_the_suite_is_about(tmp_path, monkeypatch, suite):
    (tmp_path / "my_envs.py").write_text(MAKE_ENV)
    tiny = [each for each in TINY if not each.startswith("name=")]
    episodes = ["env.num_envs=1", "env.eval_episodes=1", "eval.every=100000"]
    monkeypatch.syspath_prepend(tmp_path)
    train_here(tmp_path / "log", f"env={suite}", *tiny, *episodes, *SHORT.get(suite, ()))
    sys.modules.pop("my_envs", None)  # other tests have one of their own
    lines = list(read_metrics(tmp_path / "log"))
    first, last = (line for line in lines if "eval/return" in line)
    assert (first["step"], last["step"] >= 60) == (0, True)
    assert any("loss/barlow" in line for line in lines)
    together = {key for line in lines for key in line}
    assert together >= {key for key in REPORTED[suite] if key.startswith("eval/")}
    if "train/return" in together:
        assert together >= {*REPORTED[suite]}


@pytest.mark.parametrize(("suite", "count"), [("dmc_vision", 20), ("dmc_proprio", 18)])
def test_every_task_of_the_published_benchmarks_steps(suite, count):
    table = importlib.resources.files("r2dreamer.configs").joinpath("reference_curves.csv").read_text()
    rows = csv.DictReader(table.splitlines())
    tasks = sorted({row["task"].removeprefix("dmc_") for row in rows if row["suite"] == suite})
    assert len(tasks) == count
    for task in tasks:
        env = make_dmc(task, seed=1, from_pixels=suite == "dmc_vision")
        observed = env.rollout(2)["next"]
        names = {key for key in observed.keys() if key not in ("reward", "done", "terminated", "truncated", "is_init")}
        assert (names == {"pixels"}) == (suite == "dmc_vision"), task
        assert all(observed[name].float().isfinite().all() for name in names)
        env.close()


def test_budgets_repeats_and_ratios_are_those_of_the_papers_table():
    table = {  # frames, repeat, train ratio
        "dmc_proprio": (500_000, 2, 512),
        "dmc_vision": (1_000_000, 2, 512),
        "dmc_subtle": (1_000_000, 2, 512),
        "dmc_distracting": (1_000_000, 2, 512),
        "metaworld": (1_000_000, 2, 512),
        "atari100k": (400_000, 4, 128),
        "crafter": (1_000_000, 1, 512),
        "memory_maze": (100_000_000, 1, 512),
    }
    for suite, numbers in table.items():
        cfg = config(f"env={suite}")
        assert (cfg.total_frames, cfg.env.action_repeat, cfg.train_ratio) == numbers, suite
        assert cfg.env.suite == suite


def test_a_task_of_another_suite_is_sent_there():
    for make, task, suite in (
        (make_gym, "walker_walk", "env=dmc_vision or env=dmc_proprio or env=dmc_distracting"),
        (make_dmc, "door-open", "env=metaworld"),
        (make_dmc, "door-open-v3", "env=metaworld"),
        (make_probe, "alien", "env=atari100k"),
        (make_dmc, "9x9", "env=memory_maze"),
    ):
        with pytest.raises(ValueError, match="another suite") as refused:
            make(task, seed=0, **({"from_pixels": False} if make is make_dmc else {}))
        assert f"use {suite} env.task={task}." in str(refused.value)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("my_envs", "must be"),
        ("other_envs:make_env", "No module named"),
        ("my_envs:make_envs", "has no 'make_envs'. It has:"),
        ("my_envs:nothing", "returned a object, not a TorchRL environment"),
        ("my_envs:indexed", "make it OneHot"),
    ],
)
def test_a_factory_that_does_not_fit_is_answered_with_what_is_wrong(server, tmp_path, factory, said):
    (tmp_path / "my_envs.py").write_text(MAKE_ENV)
    run = server.run(tmp_path, "env=custom", f"env.factory={factory}", *TINY)
    assert run.status == 1 and said in " ".join(run.stderr.split()), run.stderr
    assert "Traceback" not in run.stderr


def test_a_first_environment_that_never_comes_back_ends_the_run_with_its_stack_and_the_way_out(server, tmp_path):
    (tmp_path / "my_envs.py").write_text(MAKE_ENV)
    run = server.run(tmp_path, "env=custom", "env.factory=my_envs:hanging", *TINY, "timeout=1.5", timeout=40)
    assert run.status == 1 and "in hanging" in run.stderr, run.stderr
    assert "did not come back within 1.5 seconds" in run.stderr and "MUJOCO_GL is" in run.stderr, run.stderr


def test_a_custom_environment_with_its_own_is_init_is_watched_like_any_other(server, tmp_path):
    (tmp_path / "my_envs.py").write_text(MAKE_ENV)
    run = server.run(tmp_path, "env=custom", "env.factory=my_envs:counted", *TINY)
    assert run.status == 1 and "observation 'observation' is not finite" in run.stderr, run.stderr


def test_a_custom_environment_needs_a_factory(server, tmp_path):
    run = server.run(tmp_path, "env=custom", *TINY)
    assert run.status == 1 and "env.factory" in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_evaluation_plays_whole_games_where_training_ends_them_with_a_life():
    cfg = config("env=atari100k", "env.task=breakout", "env.lives=discount")
    train, evaluation = (hydra.utils.instantiate(cfg.env[key])(seed=0) for key in ("make", "make_evaluation"))
    assert (train.base_env.lives, evaluation.base_env.lives) == ("discount", "unused")
    returns = [2.0, 4.0]
    assert "human_normalized" in hydra.utils.instantiate(cfg.env.scores)(returns, {})
    assert hydra.utils.instantiate(cfg.env.train_scores)(returns, {}) == {}


# -- examples/doctor.py -----------------------------------------------------------------------------------------------


def doctor(server, folder, *overrides, **more):
    run = server.run(folder, "steps=5", "model=size1M", *overrides, script="doctor", **more)
    return run.status, run.stdout + run.stderr


def test_the_doctor_finds_a_healthy_suite_healthy(server, tmp_path):
    status, said = doctor(server, tmp_path, "env=dmc_vision", "env.task=reacher_easy", "env.num_envs=5")
    assert status == 0, said
    for part in (
        "ms for a 64x64 image",
        "frames/s",
        "5 of them in parallel",
        " MB each",
        "a record x 500000 records",
        "Renderer of MuJoCo",
        "works.",
    ):
        assert part in said, said


def test_the_doctor_says_what_is_ill_and_how_to_mend_it(server, tmp_path):
    for overrides, without, remedy in (
        (["env=crafter"], "crafter", 'pip install "torchrl-r2dreamer[crafter]"'),
        (["env=gym", "env.task=CartPole-v9"], None, "CartPole-v1"),
    ):
        status, said = doctor(server, tmp_path, *overrides, without=without)
        assert status == 1 and remedy in " ".join(said.split()), said
    status, said = doctor(server, tmp_path, "env=gym", "env.eval_episodes=10000000", "replay.capacity=1000000000000")
    said = " ".join(said.split())
    assert status == 1 and "use fewer, env.num_envs=N env.eval_episodes=M" in said and "does not fit" in said, said
    assert "in parallel" not in said  # nor would those be started that do not fit


def test_the_doctor_reports_a_renderer_that_cannot_be_loaded_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "r2dreamer.examples.cli.main", "doctor"]
    command += ["env=gym", "env.task=CartPole-v1", "steps=5", "model=size1M"]
    environment = {**os.environ, "MUJOCO_GL": "nonsense"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = " ".join(done.stdout.split())
    assert done.returncode == 1 and "MUJOCO_GL is nonsense. Set MUJOCO_GL=egl" in said and "frames/s" in said, (
        done.stderr
    )


def test_a_driver_that_does_not_render_is_a_problem_with_a_way_out(tmp_path):
    code = "import r2dreamer.examples.cli.machine as m, json; print(json.dumps(m.opengl(0.01)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line, problem = json.loads(out.stdout)
    assert "hangs" in line and "MUJOCO_GL=osmesa" in problem
