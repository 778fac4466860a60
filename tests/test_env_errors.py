"""What environments say to bad input, to a missing package and to a missing renderer."""

import functools
import importlib
import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torchrl.data import Bounded, Composite, OneHot, Unbounded
from torchrl.envs import DMControlEnv, GymEnv, GymWrapper, InitTracker, StepCounter, TransformedEnv
from toys import FACTORIES, Toy

from r2dreamer.dreamer import ActionSpace, ObservationSpace
from r2dreamer.envs import (
    check_environment,
    env_seeds,
    make_atari,
    make_crafter,
    make_custom,
    make_dmc,
    make_gym,
    make_memory_maze,
    make_metaworld,
    make_probe,
    make_vector_env,
)
from r2dreamer.envs.base import gl


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


def test_arcade_games_go_by_their_gymnasium_names_too_and_what_needs_more_than_a_name_is_refused():
    code = """if True:
        from r2dreamer.envs import make_gym
        print(make_gym("ALE/Pong-v5", seed=0).action_spec.shape[-1])
        for task in ("ALE/Pnog-v5", "Meta-World/MT1"):
            try:
                make_gym(task, seed=0)
            except ValueError as error:
                print(error)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6\n") and "ALE/Pong-v5" in done.stdout
    assert "env=gym" not in done.stdout and "cannot be made from its name alone" in done.stdout


def test_a_task_of_yesterday_is_answered_with_todays():
    with pytest.raises(ValueError, match="no longer has 'Pendulum-v0'.*Pendulum-v1"), pytest.warns(DeprecationWarning):
        make_gym("Pendulum-v0", seed=0)


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
    with pytest.raises(ValueError, match=r"holds Text.* at words.*keep other entries with keys=\["):
        make_gym("Toy-text-v0", seed=0)
    kept = make_gym("Toy-text-v0", seed=0, keys=["observation_state"]).reset()  # the remedy helps
    assert kept["observation_state"].tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="'Toy-twice-v0' observes 'body_height' twice"):
        make_gym("Toy-twice-v0", seed=0)
    with pytest.raises(ValueError, match="camera=9"):
        make_dmc("walker_walk", seed=0, from_pixels=True, camera=9)
    with pytest.raises(ValueError, match="split='test'"):
        env_seeds(0, 1, "test")
    with pytest.raises(ValueError, match="3 seeds for 1 environments"):
        make_vector_env(FACTORIES["gym state"], [1], parallel=False).reseed([1, 2, 3])
    with pytest.raises(ValueError, match="seeds is empty"):
        make_vector_env(FACTORIES["gym state"], [], parallel=False)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("json:decoder.NaN.make", "float has no 'make'. It has: as_integer_ratio"),  # an object, not a module or class
        ("r2dreamer.envs:make_dcm", "r2dreamer.envs has no 'make_dcm'. It has: make_dmc"),  # imported when asked for
    ],
)
def test_a_factory_that_is_not_there_is_answered_with_what_is(factory, said):
    with pytest.raises(ValueError, match=said):
        make_custom(factory, seed=0)


def test_a_factory_that_takes_a_seed_is_given_the_environments():
    seen = []

    def seeded(seed, level=1):
        seen.append(seed)
        return make_gym("CartPole-v1", seed=0).base_env

    for factory in (
        seeded,
        functools.partial(seeded, seed=3),
        lambda seed=None: seeded(seed),
        lambda seed=5: seeded(seed),
    ):
        make_custom(factory, seed=7).close()
    assert seen == [7, 3, 7, 5]


def test_a_module_of_a_factory_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner_envs.py").write_text("import a_package_that_is_missing")
    for path, said in {
        "inner_envs:make": "inner_envs needs a_package_that_is_missing, which is not installed",
        "inner_envs.py:make": "must name a module, without .py: inner_envs:make",
        "outer_envs:make": "The module must lie in the working directory",
    }.items():
        with pytest.raises(ImportError, match=said):
            make_custom(path, seed=0)


def test_several_choices_at_once_are_not_taken_for_one():
    spec = GymEnv("Toy-space0-v0").action_spec  # MultiDiscrete([2, 3])
    whole = Bounded(0, 5, (3,), dtype=torch.int64)
    for each in (spec, whole, OneHot(3).expand(4, 3)):
        with pytest.raises(ValueError, match=f"{type(each).__name__}.* is not supported"):
            ActionSpace.from_spec(each)
    with pytest.raises(ValueError, match="'action' is several choices at once"):
        check_environment(GymEnv("Toy-space0-v0"))
    with pytest.raises(ValueError, match="give observation_spec_unbatched"):
        ObservationSpace.from_spec(make_vector_env(FACTORIES["gym state"], [0], parallel=False).observation_spec)


def test_actions_in_another_range_are_not_an_agents():
    for low, high in ((-2, 2), (0, 1)):
        spec = Bounded(low, high, (2,))
        with pytest.raises(ValueError, match=rf"Actions lie in \[{low}, {high}\].*ClippedActionScaling"):
            ActionSpace.from_spec(spec)
    for spec in (Bounded(-1, 1, (2,)), Bounded(-1e10, 1e10, (2,)), Unbounded((2,))):
        assert ActionSpace.from_spec(spec) == ActionSpace(2, discrete=False)


def test_a_metric_is_one_number():
    for metric, named in ((Unbounded(3), r"'m'\) has shape \(3,\)"), (Composite(n=Unbounded(1)), r"'m', 'n'\)")):
        env = make_gym("CartPole-v1", seed=0).base_env
        env.observation_spec = Composite({**env.observation_spec, "metrics": Composite(m=metric)})
        with pytest.raises(ValueError, match=rf"\('metrics', {named}.*: a metric is one number, directly below"):
            check_environment(env)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 84, 84, 3), np.uint8), ((84, 84, 3), np.float32), ((84, 84, 2), np.uint8)]
)
def test_what_looks_like_an_image_and_is_none_is_not_flattened(shape, dtype):
    space = spaces.Box(0, 255, shape, dtype)
    gymnasium.register("Toy-odd-image-v0", functools.partial(Toy, observation_space=space))
    try:
        with pytest.raises(ValueError, match="looks like an image and is none.*FlattenObservation"):
            make_gym("Toy-odd-image-v0", seed=0)
    finally:
        del gymnasium.registry["Toy-odd-image-v0"]


def test_a_task_that_draws_text_is_not_seen():
    with pytest.raises(ValueError, match="'Toy-ansi-v0' draws no image .str; its render modes are .'ansi'"):
        make_gym("Toy-ansi-v0", seed=0, from_pixels=True)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_closed_vector_environment_says_so(parallel):
    env = make_vector_env(FACTORIES["gym state"], [0], parallel=parallel)
    start = env.reset()
    env.close()
    for call in (env.reset, lambda: env.rand_step(start), lambda: env.reseed([1])):
        with pytest.raises(RuntimeError, match="This vector environment is closed"):
            call()
    with pytest.raises(ValueError, match="timeout=-5 must be above 0"):
        make_vector_env(FACTORIES["gym state"], [0], parallel=True, timeout=-5)


def test_the_number_of_a_step_counter_is_not_observed():
    make = lambda seed: make_custom(lambda: TransformedEnv(GymEnv("CartPole-v1"), StepCounter(5)), seed=seed)
    check_environment(make(0))
    assert ObservationSpace.from_spec(make(0).observation_spec).vectors == {"observation": 4}
    env = make_vector_env(make, [0, 1], parallel=False)
    played = env.rollout(7, break_when_any_done=False)
    assert played["next", "truncated"][:, :, 0].nonzero().tolist() == [[0, 4], [1, 4]]


def test_the_validator_names_what_is_wrong_and_the_remedy():
    with pytest.raises(ValueError, match="is_init.*InitTracker.*ClippedActionScaling"):
        check_environment(GymEnv("Pendulum-v1"))
    with pytest.raises(ValueError, match="float64.*DoubleToFloat.*'action'.*'reward'"):
        check_environment(DMControlEnv("cartpole", "swingup"))
    with pytest.raises(ValueError, match="unbatched"):
        check_environment(make_vector_env(FACTORIES["gym state"], [1], parallel=False))


class Careless(gymnasium.Env):
    """Its third step raises the given error, or returns an observation of another shape."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, error=None):
        self.error, self.steps = error, 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 3 and self.error:
            raise self.error
        return np.zeros(2 if self.error else 3, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("error", [KeyError("speed"), AssertionError("no ground"), RuntimeError("solver")], ids=repr)
def test_the_validator_lets_an_error_in_the_environments_own_code_through(error):
    env = TransformedEnv(GymWrapper(Careless(error), categorical_action_encoding=False), InitTracker())
    with pytest.raises(type(error)) as raised:
        check_environment(env)
    assert raised.value is error and "in its first steps" in error.__notes__[0]
    env = TransformedEnv(GymWrapper(Careless(), categorical_action_encoding=False), InitTracker())
    with pytest.raises(ValueError, match="not what its specs announce"):
        check_environment(env)


@pytest.mark.parametrize(
    ("module", "extra", "make"),
    [
        ("dm_control", "dmc", lambda: make_dmc("walker_walk", seed=0, from_pixels=False)),
        ("dm_control", "dmc", lambda: gymnasium.make("DMCSubtle/reacher-v0")),
        ("ale_py", "atari", lambda: make_atari("pong", seed=0)),
        ("crafter", "crafter", lambda: make_crafter("reward", seed=0)),
        ("metaworld", "metaworld", lambda: make_metaworld("reach", seed=0)),
        ("memory_maze", "memory_maze", lambda: make_memory_maze("9x9", seed=0)),
        ("dm_control", "memory_maze", lambda: make_memory_maze("9x9", seed=0)),
    ],
)
def test_a_missing_extra_is_answered_with_the_pip_line(monkeypatch, module, extra, make):
    monkeypatch.setitem(sys.modules, module, None)  # what makes Python say it cannot be imported
    for part in ("tasks", "mujoco"):
        monkeypatch.delitem(sys.modules, f"{module}.{part}", raising=False)
    with pytest.raises(ImportError, match=rf'pip install "torchrl-r2dreamer\[{extra}\]"'):
        make()


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
