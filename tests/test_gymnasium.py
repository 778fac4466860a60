"""DMC-Subtle and Distracting Control in Gymnasium: the TorchRL environments step by step, without torch."""

from r2dreamer.envs.base import gl  # isort: skip

gl.choose_gl()  # first, because dm_control reads the choice when it is imported

# ruff: noqa: E402
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from subtle_oracle import STOCK
from torchrl.envs import Compose, DMControlEnv, TransformedEnv

import r2dreamer.envs
from r2dreamer.envs import DMCDistracting, DMCSubtle, RenderPixels, exports
from r2dreamer.envs.control.subtle import OFFICIAL
from r2dreamer.envs.control.suite import TASKS

SIZE = 48
SMALL = {"render_size": SIZE, "shrink": 1 / 8, "physics": "frozen"}


def played(env, seed, steps, episodes=2):
    """Images, rewards and flags of some episodes after a seed, with actions of its own."""
    random, seen = np.random.RandomState(seed), []
    for number in range(episodes):
        observation, info = env.reset(seed=None if number else seed)
        assert info == {} and observation in env.observation_space
        seen.append((observation, 0, False, False))
        for _ in range(steps):
            action = random.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            seen.append(env.step(action)[:4])
    return seen


def played_by_torchrl(env, seed, steps, episodes=2):
    random, seen = np.random.RandomState(seed), []
    env.set_seed(seed, static_seed=True)
    image = lambda now: now["pixels"].permute(1, 2, 0).numpy()
    for _ in range(episodes):
        now = env.reset()
        seen.append((image(now), 0, False, False))
        for _ in range(steps):
            action = random.uniform(-1, 1, env.action_spec.shape).astype(np.float32)
            now = env.step(now.set("action", torch.from_numpy(action).double()))["next"]
            seen.append((image(now), *(now[key].item() for key in ("reward", "terminated", "truncated"))))
    return seen


def assert_alike(ours, theirs):
    assert len(ours) == len(theirs)
    for (image, *numbers), (other, *others) in zip(ours, theirs, strict=True):
        assert np.array_equal(image, other)
        assert numbers[0] == pytest.approx(others[0], rel=1e-6) and numbers[1:] == others[1:]


@pytest.mark.parametrize("task", STOCK)
@pytest.mark.parametrize("physics", ["official", "frozen"])
def test_subtle_tasks_are_those_of_torchrl_step_by_step(task, physics):
    change = {"shrink": 1 / 4 if physics == "frozen" else None, "physics": physics}
    ours = gymnasium.make(f"DMCSubtle/{task}-v0", render_size=SIZE, **change)
    theirs = TransformedEnv(DMControlEnv(*STOCK[task], frame_skip=2), Compose(DMCSubtle(**change), RenderPixels(SIZE)))
    for seed in (0, 7):
        assert_alike(played(ours, seed, 4), played_by_torchrl(theirs, seed, 4))
    ours.close(), theirs.close()


def test_distracting_tasks_are_those_of_torchrl_step_by_step():
    change = {"difficulty": "hard", "split": "val"}
    ours = gymnasium.make("DMCDistracting/walker_walk-v0", render_size=SIZE, moving_camera=False, **change)
    transforms = Compose(DMCDistracting(camera=False, **change), RenderPixels(SIZE))
    theirs = TransformedEnv(DMControlEnv("walker", "walk", frame_skip=2), transforms)
    for seed in (0, 7):
        assert_alike(played(ours, seed, 3), played_by_torchrl(theirs, seed, 3))
    ours.close(), theirs.close()


def test_all_tasks_are_registered():
    names = {spec.id for spec in gymnasium.registry.values() if spec.namespace in ("DMCSubtle", "DMCDistracting")}
    assert names == {f"DMCSubtle/{task}-v0" for task in OFFICIAL} | {f"DMCDistracting/{task}-v0" for task in TASKS}


def test_no_torch_is_imported_on_the_way():
    code = """if True:
        import sys
        import gymnasium
        env = gymnasium.make("r2dreamer.envs:DMCSubtle/reacher-v0", shrink=1/8, physics="frozen", render_size=64)
        assert env.reset(seed=0)[0].shape == (64, 64, 3) and env.step(env.action_space.sample())[1] >= 0
        gymnasium.make("DMCDistracting/cartpole_balance-v0").reset()
        print([name for name in ("torch", "torchrl", "tensordict") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_what_needs_torch_is_imported_when_it_is_asked_for():
    names = {}
    exec("from r2dreamer.envs import *", names)
    assert set(exports.__all__) <= names.keys() and set(exports.__all__) <= set(dir(r2dreamer.envs))
    with pytest.raises(AttributeError, match="'r2dreamer.envs' has no attribute 'DMCSubtel'"):
        r2dreamer.envs.DMCSubtel  # noqa: B018


@pytest.fixture(scope="module")
def reacher():
    env = gymnasium.make("DMCSubtle/reacher-v0", render_mode="rgb_array", **SMALL)
    yield env
    env.close()


OF_DM_CONTROL = "Setting the shape on a NumPy array"  # with NumPy 2.5 dm_control itself warns of this


def test_the_checker_of_gymnasium_finds_nothing(reacher):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OF_DM_CONTROL, DeprecationWarning)
        check_env(reacher.unwrapped)
    state = gymnasium.make("DMCSubtle/reacher-v0", observation="state")
    check_env(state.unwrapped, skip_render_check=True)
    assert state.observation_space.shape == (6,)


@pytest.fixture
def sb3():
    return pytest.importorskip("stable_baselines3", reason="stable-baselines3 comes with the extra test")


def test_the_checker_of_stable_baselines_finds_nothing(reacher, sb3):
    from stable_baselines3.common.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OF_DM_CONTROL, DeprecationWarning)
        check_env(reacher.unwrapped)
        check_env(gymnasium.make("DMCSubtle/point_mass-v0", observation="state").unwrapped)


def test_it_renders_what_it_observes_and_its_vector_is_what_torchrl_observes(reacher):
    observed, _ = reacher.reset(seed=3)
    assert np.array_equal(reacher.render(), observed) and reacher.metadata["render_fps"] == 25
    state = gymnasium.make("DMCSubtle/reacher-v0", observation="state", action_repeat=1, **SMALL)
    theirs = TransformedEnv(DMControlEnv("reacher", "hard"), DMCSubtle(shrink=1 / 8, physics="frozen"))
    theirs.set_seed(3, static_seed=True)
    now = theirs.reset()
    vector = np.concatenate([now[key].numpy() for key in ("position", "to_target", "velocity")])
    assert np.array_equal(state.reset(seed=3)[0], vector.astype(np.float32))


def test_a_closed_environment_says_that_it_is_closed():
    env = gymnasium.make("DMCSubtle/reacher-v0", observation="state")
    env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(gymnasium.error.ClosedEnvironmentError, match="Make a new one"):
        env.unwrapped.reset()


def test_an_episode_is_truncated_at_the_limit_of_the_task_or_of_the_user():
    env = gymnasium.make("DMCSubtle/cartpole_swingup-v0", observation="state", action_repeat=250)
    env.reset(seed=0)
    assert [env.step(np.zeros(1, np.float32))[2:4] for _ in range(4)] == [(False, False)] * 3 + [(False, True)]
    with pytest.raises(gymnasium.error.ResetNeeded, match="after an episode's end"):
        env.step(np.zeros(1, np.float32))
    env = gymnasium.make("DMCSubtle/cartpole_swingup-v0", observation="state", max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(np.zeros(1, np.float32))[3] for _ in range(3)] == [False, False, True]


def test_without_a_seed_every_environment_begins_differently():
    one, two = (gymnasium.make("DMCSubtle/reacher-v0", observation="state").reset()[0] for _ in range(2))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_several_at_once_are_each_as_if_it_were_alone(mode, reacher):
    start = {"vector_kwargs": {"context": "spawn"}} if mode == "async" else {}  # a fork would share this renderer
    envs = gymnasium.make_vec("DMCSubtle/reacher-v0", num_envs=2, vectorization_mode=mode, **start, **SMALL)
    try:
        first, _ = envs.reset(seed=[3, 4])
        assert first.shape == (2, SIZE, SIZE, 3)
        after, rewards, *_ = envs.step(np.full((2, 2), 0.5, np.float32))
    finally:
        envs.close()
    for index, seed in enumerate((3, 4)):
        assert np.array_equal(first[index], reacher.reset(seed=seed)[0])
        image, reward, *_ = reacher.step(np.full(2, 0.5, np.float32))
        assert np.array_equal(after[index], image) and rewards[index] == reward


@pytest.mark.parametrize(
    ("name", "arguments", "error", "said"),
    [
        ("DMCSubtle/reecher-v0", {}, gymnasium.error.NameNotFound, "Did you mean: `reacher`"),
        ("DMCDistracting/walker_wlak-v0", {}, gymnasium.error.NameNotFound, "Did you mean: `walker_walk`"),
        ("DMCSubtle/reacher-v0", {"shrink": 3}, ValueError, r"shrink=3 must be .* shrink=1/3"),
        ("DMCSubtle/reacher-v0", {"physics": "frozn"}, ValueError, "nearest: frozen"),
        ("DMCSubtle/reacher-v0", {"observation": "stat"}, ValueError, "one of pixels, state. The nearest: state"),
        ("DMCSubtle/reacher-v0", {"render_mode": "rgb"}, ValueError, "must be one of rgb_array"),
        ("DMCSubtle/reacher-v0", {"camera": "cam7"}, ValueError, "not among this model's cameras: .*fixed"),
        ("DMCSubtle/reacher-v0", {"render_size": 0}, ValueError, "whole number of at least 1"),
        ("DMCSubtle/reacher-v0", {"image_size": 64}, TypeError, "unexpected keyword argument 'image_size'"),
        ("DMCDistracting/reacher_easy-v0", {"split": "test"}, ValueError, "must be one of train, val"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*render_mode")  # Gymnasium warns of an unknown one before our error says so
def test_a_mistake_is_named_with_its_remedy(name, arguments, error, said):
    with pytest.raises(error, match=said):
        gymnasium.make(name, **arguments)


def test_any_seed_that_gymnasium_takes_begins_an_episode():
    env = gymnasium.make("DMCSubtle/reacher-v0", observation="state")
    first, _ = env.reset(seed=2**32 + 7)
    assert env.step(env.action_space.sample())[0].shape == first.shape
    assert np.array_equal(first, env.reset(seed=2**32 + 7)[0])


def test_the_code_of_the_guide_runs(sb3):
    guide = Path(__file__).parent.parent / "examples" / "guides" / "gymnasium.md"
    names = {}
    for block in re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL):
        exec(block, names)
    assert names["pixels"].shape == (64, 64, 3) and names["pixels"].dtype == np.uint8
    assert names["distracted"].spec.kwargs["task"] == "walker_walk" and names["agent"].num_timesteps == 40


@pytest.mark.slow
def test_sac_of_stable_baselines_learns_to_swing_a_pole_up(sb3):
    """From about 20, what an untrained agent gets of 1000, to more than 120 in 1500 steps."""
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    small = {"shrink": 1 / 8, "physics": "frozen", "observation": "state", "action_repeat": 8}
    made = lambda: Monitor(gymnasium.make("DMCSubtle/cartpole_swingup-v0", **small))
    settings = {"learning_rate": 1e-3, "gamma": 0.98, "batch_size": 128, "learning_starts": 250}
    agent = sb3.SAC("MlpPolicy", made(), seed=0, policy_kwargs={"net_arch": [64, 64]}, **settings)
    score = lambda: evaluate_policy(agent, made(), n_eval_episodes=3)[0]
    before = score()
    agent.learn(1500)
    assert before < 60 and score() > 120
    sees = gymnasium.make("DMCSubtle/cartpole_swingup-v0", shrink=1 / 8, physics="frozen")
    agent = sb3.SAC("CnnPolicy", sees, seed=0, buffer_size=100, batch_size=8, learning_starts=20).learn(40)
    assert np.isfinite(agent.logger.name_to_value["train/critic_loss"])
