"""Environments keep the contract, singly and in numbers, and say what is wrong when they cannot."""

import functools
import importlib.resources
import os
import signal
import subprocess
import sys
import time

import gymnasium
import hydra
import numpy as np
import pytest
import torch
from gymnasium import spaces
from omegaconf import OmegaConf
from torchrl.data import Bounded, OneHot
from torchrl.envs import DMControlEnv, GymEnv
from torchrl.envs.utils import check_env_specs

from r2dreamer.envs import (
    WorkerError,
    check_environment,
    env_seeds,
    gl,
    make_dmc,
    make_gym,
    make_probe,
    make_vector_env,
    reseed,
)


class Toy(gymnasium.Env):
    """Observes an image, a vector and a choice; the reward counts the steps; goes wrong on demand at its third."""

    action_space = spaces.Discrete(3, start=-1)
    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (20, 30, 3), np.uint8),
            "body": spaces.Dict({"angles": spaces.Box(-9, 9, (2, 2), np.float64), "height": spaces.Box(0, 1, ())}),
            "state": spaces.Discrete(4),
        }
    )

    def __init__(self, trouble=None, action_space=None):
        self.trouble = trouble
        self.action_space = self.action_space if action_space is None else action_space

    def _observe(self, angle=0.0):
        image = np.full((20, 30, 3), 7, np.uint8)
        body = {"angles": np.full((2, 2), angle), "height": np.float32(self.np_random.random())}
        return {"camera": image[::-1], "body": body, "state": 2}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        self.last_action = action
        now = self.steps == 3
        if now and self.trouble == "raise":
            raise ArithmeticError("the toy broke")
        if now and self.trouble == "hang":
            time.sleep(60)
        if now and self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        reward = np.inf if now and self.trouble == "reward" else float(self.steps)
        return self._observe(np.nan if now and self.trouble == "nan" else 0.0), reward, self.steps == 5, False, {}


for trouble in ("raise", "hang", "kill", "nan", "reward"):
    gymnasium.register(f"Toy-{trouble}-v0", Toy, kwargs={"trouble": trouble})
gymnasium.register("Toy-v0", Toy)
for number, space in enumerate((spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2), spaces.Tuple([]), spaces.Text(3))):
    gymnasium.register(f"Toy-space{number}-v0", Toy, kwargs={"action_space": space})
gymnasium.register(
    "Toy-box-v0", Toy, kwargs={"action_space": spaces.Box(np.float64([-1, 0]), np.float64([3, 10]), dtype=np.float64)}
)

FACTORIES = {
    "gym state": functools.partial(make_gym, "CartPole-v1"),
    "gym pixels": functools.partial(make_gym, "CartPole-v1", from_pixels=True),
    "gym continuous": functools.partial(make_gym, "Pendulum-v1", action_repeat=2),
    "gym dict": functools.partial(make_gym, "test_envs:Toy-v0"),
    "dmc proprio": functools.partial(make_dmc, "cartpole_swingup", from_pixels=False),
    "dmc matrices": functools.partial(make_dmc, "manipulator_bring_ball", from_pixels=False),
    "dmc vision": functools.partial(make_dmc, "reacher_easy", from_pixels=True),
    "probe": functools.partial(make_probe, "small_target", continuous=True),
}
every_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


def trajectory(env, steps=6, seed=0):
    """Observations, rewards and flags under random actions drawn with `seed`."""
    torch.manual_seed(seed)
    return env.rollout(steps, break_when_any_done=False)


def same(left, right):
    return all(torch.equal(left[key], right[key]) for key in left.keys(True, True))


# -- one environment --------------------------------------------------------------------------------------------------


@every_factory
def test_it_keeps_torchrls_specs_and_the_contract(factory):
    env = factory(seed=3)
    check_env_specs(env)
    check_environment(env)
    assert isinstance(env.action_spec, (OneHot, Bounded))


@every_factory
def test_the_seed_decides_the_trajectory(factory):
    first = trajectory(factory(seed=5))
    assert same(first, trajectory(factory(seed=5)))
    assert not same(first, trajectory(factory(seed=6)))


def test_every_space_becomes_a_flat_image_or_vector():
    observation = make_gym("Toy-v0", seed=0).reset()
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in observation.items()}
    assert shapes["camera"] == ((3, 64, 64), torch.uint8) and (observation["camera"] == 7).all()
    assert shapes["body_angles"] == ((4,), torch.float32) and shapes["body_height"] == ((1,), torch.float32)
    assert observation["observation_state"].tolist() == [0, 0, 1, 0]  # "state" is the agent's own name
    kept = make_gym("Toy-v0", seed=0, keys=["camera"], image_size=None, grayscale=True)
    assert kept.observation_spec["camera"].shape == (1, 20, 30)
    assert set(kept.observation_spec.keys()) == {"camera", "is_init"}


@pytest.mark.parametrize("name", ["gym", "probe", "dmc_proprio", "dmc_vision"])
def test_every_config_builds_a_factory(name):
    file = importlib.resources.files("r2dreamer.configs") / "env" / f"{name}.yaml"
    config = OmegaConf.create({"env": OmegaConf.create(file.read_text())})
    check_environment(hydra.utils.instantiate(config.env.make)(seed=env_seeds(0, 1, "train")[0]))


def test_pixels_only_environments_hold_no_vectors_and_proprio_ones_no_pixels():
    for name in ("gym pixels", "dmc vision"):
        assert set(FACTORIES[name](seed=0).observation_spec.keys()) == {"pixels", "is_init"}
    proprio = FACTORIES["dmc proprio"](seed=0)
    assert set(proprio.observation_spec.keys()) == {"position", "velocity", "is_init"}


def test_the_pole_is_visible_at_64_pixels():
    pixels = make_gym("CartPole-v1", seed=0, from_pixels=True).reset()["pixels"]
    red, blue = pixels[0].int(), pixels[2].int()
    assert (red - blue > 50).sum() > 12  # the pole is the only brown thing


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    env = make_gym("Toy-v0", seed=0, action_repeat=2)
    rollout = env.rollout(9)
    assert rollout["next", "reward"].flatten().tolist() == [1 + 2, 3 + 4, 5]
    assert rollout["next", "terminated"].flatten().tolist() == [False, False, True]
    once, twice = (make_dmc("walker_stand", seed=1, from_pixels=False, action_repeat=repeat) for repeat in (1, 2))
    hold = lambda tensordict: tensordict.set("action", torch.full((6,), 0.3))
    single, double = once.rollout(4, hold), twice.rollout(2, hold)
    expected = single["next", "reward"].view(2, 2).sum(1)
    assert torch.allclose(double["next", "reward"].flatten(), expected)
    assert torch.equal(double["next", "velocity"], single["next", "velocity"][1::2])


def test_continuous_actions_are_scaled_and_clipped():
    env = make_gym("Toy-box-v0", seed=0)
    for action, expected in [([-1.0, -1.0], [-1, 0]), ([0.0, 0.5], [1, 7.5]), ([-7.0, 9.0], [-1, 10])]:
        env.step(env.reset().set("action", torch.tensor(action)))
        assert env.unwrapped.last_action.tolist() == pytest.approx(expected)
    env = make_dmc("cartpole_balance", seed=0, from_pixels=False)
    far, edge = (env.step(env.reset().set("action", torch.tensor([value]))) for value in (50.0, 1.0))
    assert env._env.physics.control() == 1.0
    assert far["next", "reward"].isfinite().all() and edge["next", "reward"].isfinite().all()


def test_discrete_actions_are_one_hot_and_count_from_the_spaces_start():
    env = make_gym("Toy-v0", seed=0)
    assert isinstance(env.action_spec, OneHot)
    for index, expected in enumerate((-1, 0, 1)):
        for dtype in (torch.int64, torch.float32):
            env.step(env.reset().set("action", torch.eye(3, dtype=dtype)[index]))
            assert env.unwrapped.last_action == expected


def test_falling_terminates_and_time_truncates():
    push = lambda tensordict: tensordict.set("action", torch.tensor([1, 0]))
    fallen = make_gym("CartPole-v1", seed=0).rollout(500, push)[-1]["next"]
    assert fallen["terminated"].item() and not fallen["truncated"].item()
    limited = make_gym("CartPole-v1", seed=0, time_limit=6, action_repeat=4).rollout(500, push)
    assert limited["next", "truncated"].flatten().tolist() == [False, True]  # 4 frames, then the last 2
    assert limited["next", "reward"].flatten().tolist() == [4, 2]
    assert not limited["next", "terminated"].any()
    episode = make_dmc("cartpole_balance", seed=0, from_pixels=False).rollout(600)
    assert episode.shape == (500,) and episode[-1]["next", "truncated"].item()
    assert not episode["next", "terminated"].any() and episode[0]["is_init"].item() and not episode[1:]["is_init"].any()


# -- several environments ---------------------------------------------------------------------------------------------


def test_train_and_eval_seeds_never_meet():
    train, evaluation = set(), set()
    for run in range(20):
        for generation in range(3):
            mine = env_seeds(run, 16, "train", generation)
            assert len(set(mine)) == 16 and mine[:4] == env_seeds(run, 4, "train", generation)
            train.update(mine)
            evaluation.update(env_seeds(run, 16, "eval", generation))
    assert not train & evaluation and max(train | evaluation) < 2**31
    assert len(train) == 20 * 3 * 16


@every_factory
def test_a_reseeded_environment_is_as_good_as_new(factory):
    old = make_vector_env(factory, [1, 2], parallel=False)
    trajectory(old, 3)
    reseed(old, [8, 9])
    new = make_vector_env(factory, [8, 9], parallel=False)
    assert new.batch_size == (2,)
    assert same(trajectory(old), trajectory(new))


@pytest.mark.parametrize("name", ["gym dict", "dmc vision", "probe"])
def test_workers_give_what_one_process_gives_also_after_reseeding(name):
    serial = make_vector_env(FACTORIES[name], [1, 2], parallel=False)
    threads = torch.get_num_threads()
    parallel = make_vector_env(FACTORIES[name], [1, 2], parallel=True)
    assert same(trajectory(serial), trajectory(parallel))
    for env in (serial, parallel):
        reseed(env, [6, 7])
    assert same(trajectory(serial), trajectory(parallel))
    parallel.close()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("raise", "the toy broke"),
        ("hang", r"did not answer within 2 seconds.*in step"),
        ("kill", "killed by SIGKILL"),
        ("nan", "observation 'body_angles' is not finite at step 3"),
    ],
)
def test_a_worker_that_fails_is_named_with_its_seed_and_traceback(trouble, said):
    task = f"test_envs:Toy-{trouble}-v0"
    env = make_vector_env(functools.partial(make_gym, task), [40, 42], parallel=True, timeout=2)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=f"(?s)environment [01] .*{task}.*seed 4[02].*{said}"):
        env.rollout(5)
    assert time.monotonic() - started < 6
    env.close()


def test_one_failing_worker_among_healthy_ones_is_the_one_named():
    env = make_vector_env(FACTORIES["gym state"], [4, 5, 6], parallel=True)
    env.reset()
    os.kill(env._workers[1].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="environment 1 .*CartPole-v1.*seed 5"):
        env.rollout(2)
    env = make_vector_env(FACTORIES["gym state"], [4, 5, 6], parallel=True)
    os.kill(env._workers[2].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="environment 2 .*seed 6"):
        reseed(env, [1, 2, 3])


def builds_only_here(task, parent, trouble, seed):
    """A factory that works in the process that made it and fails in every worker."""
    if os.getpid() != parent:
        if trouble == "hang":
            time.sleep(60)
        raise RuntimeError("no simulator here")
    return make_gym(task, seed=seed)


@pytest.mark.parametrize(("trouble", "said"), [("raise", "no simulator here"), ("hang", "in builds_only_here")])
def test_a_worker_that_cannot_be_built_is_named_too(trouble, said):
    factory = functools.partial(builds_only_here, "CartPole-v1", os.getpid(), trouble)
    with pytest.raises(WorkerError, match=f"(?s)environment 0 .*CartPole-v1.*seed 12.*{said}"):
        make_vector_env(factory, [12], parallel=True, timeout=3)


def test_an_exception_without_workers_carries_task_and_seed():
    env = make_vector_env(functools.partial(make_gym, "Toy-raise-v0"), [40, 42], parallel=False)
    with pytest.raises(ArithmeticError) as caught:
        env.rollout(5)
    assert "Toy-raise-v0" in caught.value.__notes__[0] and "seed 40" in caught.value.__notes__[0]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trouble", "said"), [("nan", "observation 'body_angles'"), ("reward", "reward")])
def test_numbers_that_are_not_finite_are_refused_by_name_step_and_task(trouble, said):
    env = make_gym(f"Toy-{trouble}-v0", seed=0)
    with pytest.raises(ValueError, match=f"{said} is not finite at step 3.*Toy-{trouble}-v0"):
        env.rollout(5)


@pytest.mark.parametrize(
    ("make", "task", "nearest"),
    [
        (make_gym, "cartpole-v1", "CartPole-v1"),
        (make_gym, "Pendulumm-v1", "Pendulum-v1"),
        (functools.partial(make_dmc, from_pixels=False), "walker_wlak", "walker_walk"),
        (functools.partial(make_dmc, from_pixels=False), "ball_in_cup_cach", "ball_in_cup_catch"),
        (make_probe, "small_targets", "small_target"),
    ],
)
def test_an_unknown_task_is_answered_with_the_nearest(make, task, nearest):
    with pytest.raises(ValueError, match=f"has no task '{task}'.*{nearest}"):
        make(task, seed=0)


@pytest.mark.parametrize("number", range(4))
def test_an_action_space_that_is_not_supported_is_named(number):
    with pytest.raises(
        ValueError, match="action space.*(MultiDiscrete|MultiBinary|Tuple|Text).*Supported are Discrete"
    ):
        make_gym(f"Toy-space{number}-v0", seed=0)


@pytest.mark.parametrize("size", ["image_size", "action_repeat", "time_limit"])
@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_sizes_are_positive_whole_numbers(size, value):
    with pytest.raises(ValueError, match=f"{size}={value}"):
        make_gym("CartPole-v1", seed=0, **{size: value})
    if size != "time_limit":
        with pytest.raises(ValueError, match=f"{size}={value}"):
            make_dmc("walker_walk", seed=0, from_pixels=True, **{size: value})


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match=r"keys=\['cam'\].*camera"):
        make_gym("Toy-v0", seed=0, keys=["cam"])
    with pytest.raises(ValueError, match="camera=9"):
        make_dmc("walker_walk", seed=0, from_pixels=True, camera=9)
    with pytest.raises(ValueError, match="split='test'"):
        env_seeds(0, 1, "test")
    with pytest.raises(ValueError, match="3 seeds for 1 environments"):
        reseed(make_vector_env(FACTORIES["gym state"], [1], parallel=False), [1, 2, 3])
    with pytest.raises(ValueError, match="seeds is empty"):
        make_vector_env(FACTORIES["gym state"], [], parallel=False)


def test_the_validator_names_what_is_wrong_and_the_remedy():
    with pytest.raises(ValueError, match="is_init.*InitTracker.*ClippedActionScaling"):
        check_environment(GymEnv("Pendulum-v1"))
    with pytest.raises(ValueError, match="float64.*DoubleToFloat.*'action'.*'reward'"):
        check_environment(DMControlEnv("cartpole", "swingup"))
    with pytest.raises(ValueError, match="unbatched"):
        check_environment(make_vector_env(FACTORIES["gym state"], [1], parallel=False))


@pytest.mark.parametrize(("module", "extra"), [("gymnasium", "gym"), ("dm_control", "dmc")])
def test_a_missing_extra_is_answered_with_the_pip_line(monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # what makes Python say it cannot be imported
    with pytest.raises(ImportError, match=rf'pip install "torchrl-r2dreamer\[{extra}\]"'):
        make_gym("CartPole-v1", seed=0) if extra == "gym" else make_dmc("walker_walk", seed=0, from_pixels=False)


def test_a_missing_renderer_is_answered_with_variable_and_package(monkeypatch):
    from dm_control.mujoco import Physics

    def broken(*args, **kwargs):
        raise RuntimeError("No OpenGL rendering backend is available.")

    monkeypatch.setattr(Physics, "render", broken)
    with pytest.raises(ImportError, match="(?s)MUJOCO_GL=egl.*osmesa.*apt-get install libegl1 libgl1 libgles2"):
        make_dmc("walker_walk", seed=0, from_pixels=True)
    monkeypatch.undo()
    monkeypatch.setattr(importlib, "import_module", _import_without_gl(importlib.import_module))
    with pytest.raises(ImportError, match="MUJOCO_GL"):
        make_dmc("walker_walk", seed=0, from_pixels=False)


def test_a_renderer_chosen_by_the_user_that_does_not_work_is_explained_on_import():
    environment = {**os.environ, "MUJOCO_GL": "nonsense"}
    command = [sys.executable, "-c", "import r2dreamer.envs"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "MUJOCO_GL is nonsense. Set MUJOCO_GL=egl" in result.stderr


def _import_without_gl(real):
    def import_module(name, *args):
        if name == "dm_control.suite":
            raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")
        return real(name, *args)

    return import_module


@pytest.mark.parametrize(
    ("environment", "chosen"), [({}, "egl"), ({"DISPLAY": ":0"}, None), ({"MUJOCO_GL": "osmesa"}, "osmesa")]
)
def test_egl_is_chosen_only_without_a_display_and_a_wish(monkeypatch, environment, chosen):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gl.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(gl.sys, "platform", "linux")
    gl.choose_gl()
    assert os.environ.get("MUJOCO_GL") == chosen
