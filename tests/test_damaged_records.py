"""What an environment returns is checked as it is stored: no wrong shape, no number that float32 cannot hold."""

import functools

import gymnasium
import numpy as np
import pytest
import torch
from faulty import Faulty
from gymnasium import spaces
from launcher import TINY, config, train_here

from r2dreamer.envs import make_custom, make_dmc, make_gym, make_vector_env
from r2dreamer.examples import train
from r2dreamer.examples.training.checkpoint import Checkpoints


class Wrong(gymnasium.Env):
    """Observes four float64 numbers; its third step returns what `observation` and `reward` say."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)

    def __init__(self, observation=None, reward=1.0):
        self.wrong = np.zeros(4) if observation is None else np.asarray(observation), reward

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(4), {}

    def step(self, action):
        self.steps += 1
        observation, reward = self.wrong if self.steps == 3 else (np.zeros(4), 1.0)
        return observation, reward, False, False, {}


for name, wrong in {
    "huge": {"observation": [0, 0, 1e300, 0]},
    "huge_reward": {"reward": -1e300},
    "one": {"observation": [5.0]},
    "batch": {"observation": np.zeros((2, 4))},
}.items():
    gymnasium.register(f"Wrong-{name}-v0", Wrong, kwargs=wrong)


def make_wrong_dmc(fault, seed):
    """dm_control's pendulum, whose third step is spoilt."""
    env = make_dmc("pendulum_swingup", seed=seed, from_pixels=False, action_repeat=1)
    control, steps = env.base_env._env, []
    step = control.step

    def spoilt(action):
        now = step(action)
        steps.append(1)
        if len(steps) != 3:
            return now
        if fault == "huge_reward":
            return now._replace(reward=1e300)
        spoilt = {"huge": np.full(1, 1e300), "one": np.zeros(2), "batch": np.zeros((4, 1))}[fault]
        return now._replace(observation={**now.observation, "velocity": spoilt})

    control.step = spoilt
    return env


def make_faulty(fault, seed):
    return make_custom(functools.partial(Faulty, fault, at=3), seed=seed, task="mine")


ROUTES = {
    "gym": lambda fault, seed: make_gym(f"Wrong-{fault}-v0", seed=seed),
    "dm_control": make_wrong_dmc,
    "torchrl": make_faulty,
}
FAULTS = {
    "huge": "observation .* is not finite at step 3 .*above 3.4e38 are infinite",
    "huge_reward": "reward is not finite at step 3 .*1e[+]300",
    "one": r"observation .* is float\d\d of shape \[\d\] at step 3 .*promise float32 of shape \[\d\]",
    "batch": r"observation .* is float\d\d of shape \[\d(, \d)?\] at step 3 .*promise float32 of shape \[\d\]",
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # 1e300 as float32 is the fault under test
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("route", ROUTES)
def test_a_spoilt_step_is_an_error_with_key_task_and_seed_and_is_not_stored(route, fault):
    env = make_vector_env(functools.partial(ROUTES[route], fault), [40, 42], parallel=False)
    env.reset()
    for _ in range(2):
        env.step_arrays(torch.zeros_like(env.action))
    with pytest.raises(ValueError, match=FAULTS[fault]) as caught:
        env.step_arrays(torch.zeros_like(env.action))
    assert "environment seed 40" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("fault", ["huge", "huge_reward"])
def test_an_environment_stepped_alone_is_checked_too(fault):
    with pytest.raises(ValueError, match=FAULTS[fault]):
        make_faulty(fault, 0).rollout(5)


@pytest.mark.filterwarnings("ignore:Casting complex values")  # a complex observation is the fault under test
@pytest.mark.parametrize(("fault", "said"), [("missing", "is missing"), ("complex", "is complex64")])
def test_an_entry_that_is_missing_or_of_another_kind_in_mid_run_is_named(fault, said):
    env = make_vector_env(functools.partial(make_faulty, fault), [40], parallel=False)
    with pytest.raises(ValueError, match=f"observation 'position' {said}.* at step 3 of an episode of task 'mine'"):
        env.rollout(5)


def test_a_damaged_record_is_in_no_checkpoint_and_a_mended_environment_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fault").write_text("huge 45")
    task = ["env=custom", "env.factory=faulty:make", *TINY, "env.parallel=false", f"logdir={tmp_path / 'log'}"]
    with pytest.raises(SystemExit) as ended:
        train.main(config(*task))
    message = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1 and "observation 'position' is not finite" in message and "seed" in message
    assert Checkpoints(tmp_path / "log" / "checkpoints").load().step == 88  # the fault came with the 90th frame
    (tmp_path / "fault").unlink()
    trainer = train_here(tmp_path / "log", *task, "total_frames=120")
    rings = trainer.replay.rings
    for stream, count in enumerate(rings.stored.tolist()):
        records = trainer.replay.read_slots(rings.slots(torch.full((count,), stream), torch.arange(count)))
        assert count > 60 and all(value.isfinite().all() for value in records.values(True, True))
    assert Checkpoints(tmp_path / "log" / "checkpoints").load().step == 120
