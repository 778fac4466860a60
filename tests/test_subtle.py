"""DMC-Subtle is the paper's, official or frozen, and so is what its factory and its configuration build."""

from r2dreamer.envs.base import gl  # isort: skip

gl.choose_gl()  # first, because dm_control reads the choice when it is imported

# ruff: noqa: E402
import importlib.resources

import hydra
import numpy as np
import pytest
import torch
from dm_control.rl import control
from omegaconf import OmegaConf
from subtle_oracle import STOCK, assert_same, every_task, oracle, run, simulation, stock, subtle, trajectory, unequal
from torchrl.envs import DMControlEnv, TransformedEnv

from r2dreamer.envs import DMCSubtle, check_environment, make_dmc_subtle

# -- the official tasks -----------------------------------------------------------------------------------------------


@every_task
def test_the_official_task_is_the_edited_xml(task):
    """States, rewards and images over 300 random actions, and then all numbers of the compiled models."""
    (ours, model), (theirs, expected) = run(task, "official"), run(task, "oracle")
    assert_same(ours, theirs)
    assert [len(part) for part in ours] == [301, 300, 6]
    # The paper sets the reacher's target in Python, so there the compiled model keeps the stock bounding sphere.
    bounds = {"reacher": {"bvh_aabb", "geom_aabb", "geom_rbound"}}
    assert unequal(model, expected) == bounds.get(task, set())


def sphere(mass, radius):
    return [2 / 5 * mass * radius**2] * 3


def capsule(mass, radius, length):
    """Inertia of a cylinder with half a ball on either end."""
    cylinder, ball = np.pi * radius**2 * length, 4 / 3 * np.pi * radius**3
    cylinder, ball = mass * cylinder / (cylinder + ball), mass * ball / (cylinder + ball)
    across = cylinder * (length**2 / 12 + radius**2 / 4)
    across += ball * (2 / 5 * radius**2 + length**2 / 4 + 3 / 8 * length * radius)
    return [across, across, cylinder * radius**2 / 2 + 2 / 5 * ball * radius**2]


@pytest.mark.parametrize(
    ("task", "sizes", "body", "mass", "inertia"),
    [
        ("reacher", {("geom_size", "target"): 0.005}, "finger", 1000 * 4 / 3 * np.pi * 0.01**3, None),
        ("finger_turn", {("site_size", "target"): 0.015}, "spinner", None, None),
        (
            "point_mass",
            {("geom_size", "target"): 0.0025, ("geom_size", "pointmass"): 0.01 / 6},
            "pointmass", 0.3, sphere(0.3, 0.01 / 6),
        ),
        (
            "ball_in_cup_catch",
            {("geom_size", "ball"): 0.025 / 12, ("tendon_width", "string"): 0.003 / 12},
            "ball", 3.8e-5, sphere(1000 * 4 / 3 * np.pi * (0.025 / 12) ** 3, 0.025 / 12),
        ),
        ("cartpole_swingup", {("geom_size", "pole_1"): 0.045 / 20}, "pole_1", 0.1, capsule(0.1, 0.045 / 20, 1)),
    ],
)  # fmt: skip
def test_sizes_masses_and_inertias_are_those_of_the_table(task, sizes, body, mass, inertia):
    model, before = run(task, "official")[1], run(task, "stock")[1]
    index = simulation(stock(task)).physics.model.name2id
    for (field, name), size in sizes.items():
        assert np.ravel(model[field][index(name, field.split("_")[0])])[0] == pytest.approx(size, rel=1e-12)
    number = index(body, "body")
    assert model["body_mass"][number] == pytest.approx(before["body_mass"][number] if mass is None else mass, rel=4e-3)
    if inertia is None:
        assert np.array_equal(model["body_inertia"], before["body_inertia"])
    else:
        assert np.sort(model["body_inertia"][number]) == pytest.approx(np.sort(inertia), rel=1e-6)
    if task == "ball_in_cup_catch":
        assert before["body_mass"][number] == pytest.approx(0.0654, rel=1e-3)


def near_the_goal(env):
    """Rewards with the thing that moves put ever farther from the one it is to reach."""
    env.reset()
    dm = simulation(env) if not isinstance(env, control.Environment) else env
    data, model, rewards = dm.physics.named.data, dm.physics.named.model, []
    for distance in np.linspace(0, 0.08, 33):
        with dm.physics.reset_context():
            if "pointmass" in model.geom_size.axes.row.names:
                data.qpos["root_x"] = distance
            elif "ball_x" in data.qpos.axes.row.names:
                data.qpos["ball_x"], data.qpos["ball_z"] = distance, 0.35
            elif "wrist" in data.qpos.axes.row.names:
                model.geom_pos["target"] = [0.24 + distance, 0, 0.01]
            else:
                model.site_pos["target"] = data.site_xpos["tip"] + [distance, 0, 0]
        rewards.append(dm.task.get_reward(dm.physics))
    return rewards


@pytest.mark.parametrize("task", ["reacher", "finger_turn", "point_mass", "ball_in_cup_catch"])
def test_the_rewarded_region_shrinks_with_the_target_unless_it_is_frozen(task):
    official, plain = near_the_goal(oracle(task)), near_the_goal(stock(task))
    assert official != plain and max(plain) == 1
    assert near_the_goal(subtle(task)) == official
    assert near_the_goal(subtle(task, physics="frozen")) == plain


@pytest.mark.parametrize(("task", "easier"), [("reacher", "easy"), ("finger_turn", "turn_easy")])
def test_the_default_is_the_official_task_also_on_the_easier_one(task, easier):
    env = TransformedEnv(DMControlEnv(STOCK[task][0], easier), DMCSubtle())
    assert_same(trajectory(env), run(task, "oracle")[0])


# -- frozen -----------------------------------------------------------------------------------------------------------


@every_task
def test_frozen_is_the_stock_task_but_for_what_is_seen(task):
    (ours, model), (theirs, plain) = run(task, "frozen"), run(task, "stock")
    assert_same(ours, theirs, images=False)
    assert all((seen != usual).any() for seen, usual in zip(ours[2], theirs[2], strict=True))
    assert not unequal(model, plain)


@pytest.mark.parametrize("task", [task for task in STOCK if task != "ball_in_cup_catch"])  # it begins elsewhere
def test_frozen_looks_like_the_official_task(task):
    frozen, official = run(task, "frozen")[0], run(task, "official")[0]
    assert np.array_equal(frozen[2][0], official[2][0])


# -- the factory ------------------------------------------------------------------------------------------------------


@every_task
def test_the_factory_gives_the_official_task_on_the_contract(task):
    env = make_dmc_subtle(task, seed=5)
    check_environment(env)
    env.set_seed(5, static_seed=True)
    expected = oracle(task, seed=5)
    expected.reset(), expected.reset()
    tensordict = env.reset()
    image = lambda: torch.from_numpy(expected.physics.render(64, 64, camera_id=0).copy()).permute(2, 0, 1)
    assert torch.equal(tensordict["pixels"], image())
    action = np.full(expected.action_spec().shape, 0.5)
    result = env.step(tensordict.set("action", torch.from_numpy(action).float()))["next"]
    reward = sum(expected.step(action).reward for _ in range(2))
    assert torch.equal(result["pixels"], image()) and result["reward"].item() == pytest.approx(reward)
    assert set(env.observation_spec.keys()) == {"pixels", "is_init"}


def test_the_factory_passes_on_shrink_physics_camera_and_vectors():
    env = make_dmc_subtle("reacher", seed=0, shrink="1/5", physics="frozen", from_pixels=False)
    env.reset()
    assert set(env.observation_spec.keys()) == {"position", "to_target", "velocity", "is_init"}
    assert simulation(env).physics.named.model.geom_size["target", 0] == 0.015
    env = make_dmc_subtle("finger_turn", seed=0, shrink=0.2, camera="cam1", image_size=32, action_repeat=1)
    pixels = env.reset()["pixels"]
    assert simulation(env).physics.named.model.site_size["target", 0] == 0.03 * 0.2
    assert np.array_equal(pixels.permute(1, 2, 0), simulation(env).physics.render(32, 32, camera_id="cam1"))


def test_the_seed_decides_the_trajectory():
    first, again, other = (make_dmc_subtle("ball_in_cup_catch", seed=seed, from_pixels=False) for seed in (1, 1, 2))
    assert torch.equal(first.reset()["position"], again.reset()["position"])
    assert not torch.equal(first.reset()["position"], other.reset()["position"])


def test_the_config_builds_it():
    file = importlib.resources.files("r2dreamer.configs") / "env" / "dmc_subtle.yaml"
    config = OmegaConf.create({"env": OmegaConf.create(file.read_text())})
    config.env.task, config.env.shrink, config.env.physics = "point_mass", "1/2", "official"
    env = hydra.utils.instantiate(config.env.make)(seed=3)
    check_environment(env)
    assert simulation(env).physics.named.model.geom_size["pointmass", 0] == 0.005
    assert config.env.total_frames == 1_000_000 and config.env.action_repeat == 2 and config.env.num_envs == 16
