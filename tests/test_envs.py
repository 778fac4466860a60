"""An environment keeps the contract: what it observes, how it is acted on, when its episodes end."""

import functools
import importlib.resources

import gymnasium
import hydra
import numpy as np
import pytest
import torch
from gymnasium import spaces
from launcher import config
from omegaconf import OmegaConf
from torchrl.data import Bounded, OneHot
from torchrl.envs import DMControlEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs
from toys import FACTORIES, Toy, every_factory, same, trajectory

from r2dreamer.envs import (
    RenderPixels,
    check_environment,
    env_seeds,
    make_dmc,
    make_gym,
    make_memory_maze,
    make_vector_env,
)


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
        assert env.base_env.env.unwrapped.last_action.tolist() == pytest.approx(expected)
    env = make_dmc("cartpole_balance", seed=0, from_pixels=False)
    far, edge = (env.step(env.reset().set("action", torch.tensor([value]))) for value in (50.0, 1.0))
    assert env._env.physics.control() == 1.0
    assert far["next", "reward"].isfinite().all() and edge["next", "reward"].isfinite().all()


def test_actuators_without_limits_are_not_scaled():
    spec = make_dmc("lqr_lqr_2_1", seed=0, from_pixels=False).action_spec
    assert not isinstance(spec, Bounded)


def test_bounds_too_wide_to_scale_to_are_none():
    widest = np.finfo(np.float32)
    space = spaces.Box(widest.min, widest.max, (1,))
    gymnasium.register("Toy-wide-v0", functools.partial(Toy, action_space=space))
    env = make_gym("Toy-wide-v0", seed=0)
    del gymnasium.registry["Toy-wide-v0"]
    assert not isinstance(env.action_spec, Bounded)
    env.step(env.reset().set("action", torch.tensor([0.5])))
    assert env.base_env.env.unwrapped.last_action == 0.5


def test_dimensions_with_bounds_are_scaled_where_others_have_none():
    space = spaces.Box(np.array([-2, -np.inf], np.float32), np.array([4, np.inf], np.float32))
    gymnasium.register("Toy-mixed-v0", functools.partial(Toy, action_space=space))
    env = make_gym("Toy-mixed-v0", seed=0)
    del gymnasium.registry["Toy-mixed-v0"]
    assert not isinstance(env.action_spec, Bounded)
    for action, expected in [([0.5, 0.5], [2.5, 0.5]), ([-3.0, 7.0], [-2, 7])]:
        env.step(env.reset().set("action", torch.tensor(action)))
        assert env.base_env.env.unwrapped.last_action.tolist() == expected


def test_an_environment_is_on_the_device_it_was_sent_to():
    env = make_gym("CartPole-v1", seed=0).to("meta").base_env
    assert env._reset()["observation"].device.type == "meta"  # nobody can read a flag on this device, as reset() does
    pixels = TransformedEnv(DMControlEnv("cartpole", "balance").to("meta"), RenderPixels(64))
    assert pixels.observation_spec["pixels"].device.type == "meta"


@pytest.mark.parametrize("make", [make_dmc, make_memory_maze])
def test_closing_frees_the_renderer(make):
    env = make("9x9", seed=0) if make is make_memory_maze else make("cartpole_balance", seed=0, from_pixels=True)
    env.reset()
    physics = env.base_env.maze._physics if make is make_memory_maze else env.base_env._env.physics
    contexts = physics._contexts
    assert contexts is not None
    env.close()
    assert physics._contexts is None


def test_discrete_actions_are_one_hot_and_count_from_the_spaces_start():
    env = make_gym("Toy-v0", seed=0)
    assert isinstance(env.action_spec, OneHot)
    for index, expected in enumerate((-1, 0, 1)):
        for dtype in (torch.int64, torch.float32):
            env.step(env.reset().set("action", torch.eye(3, dtype=dtype)[index]))
            assert env.base_env.env.unwrapped.last_action == expected


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


@pytest.mark.parametrize(("task", "camera"), [("quadruped_walk", 2), ("fish_swim", 3), ("cartpole_balance", 0)])
def test_each_domain_has_its_usual_camera(task, camera):
    usual, given, other = (
        make_dmc(task, seed=0, from_pixels=True, camera=each).reset()["pixels"] for each in (None, camera, -1)
    )
    assert torch.equal(usual, given) and not torch.equal(usual, other)


def test_gymnasiums_mujoco_tasks_are_seen_from_workers_of_their_own():
    factory = functools.partial(make_gym, "HalfCheetah-v5", from_pixels=True)
    workers = make_vector_env(factory, [4, 6], parallel=True)
    seen = trajectory(workers, steps=2)
    workers.close()
    assert seen["pixels"].shape == (2, 2, 3, 64, 64) and seen["pixels"].float().std() > 10
    assert config("env=gym", "env.from_pixels=true").env.parallel and not config("env=gym").env.parallel
    alone = factory(seed=4)
    assert torch.equal(alone.reset()["pixels"], seen["pixels"][0, 0])
