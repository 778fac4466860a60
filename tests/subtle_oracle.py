"""The paper's DMC-Subtle tasks, compiled from XML that is edited by other means than the transform's, and played."""

from r2dreamer.envs.base import gl  # isort: skip

gl.choose_gl()  # first, because dm_control reads the choice when it is imported

# ruff: noqa: E402
import xml.etree.ElementTree as ElementTree
from functools import cache, partial

import numpy as np
import pytest
import torch
from dm_control.rl import control
from dm_control.suite import ball_in_cup, cartpole, finger, point_mass, reacher
from torchrl.envs import DMControlEnv, TransformedEnv

from r2dreamer.envs import DMCSubtle

STOCK = {
    "reacher": ("reacher", "hard"),
    "finger_turn": ("finger", "turn_hard"),
    "point_mass": ("point_mass", "easy"),
    "ball_in_cup_catch": ("ball_in_cup", "catch"),
    "cartpole_swingup": ("cartpole", "swingup"),
}
SHRINK = {
    "reacher": 1 / 3,
    "finger_turn": 1 / 2,
    "point_mass": 1 / 6,
    "ball_in_cup_catch": 1 / 12,
    "cartpole_swingup": 1 / 20,
}
every_task = pytest.mark.parametrize("task", STOCK)


def edited(module, *changes):
    """A domain's physics, from its XML with attributes changed: (path of the element, attribute, text)."""
    text, assets = module.get_model_and_assets()
    root = ElementTree.fromstring(text)
    for path, attribute, value in changes:
        (element,) = root.findall(path)
        element.set(attribute, str(value))
    return module.Physics.from_xml_string(ElementTree.tostring(root, encoding="unicode"), assets)


def oracle(task, seed=0):
    """The subtle task of the paper, built from the edited XML or with the stock task's own argument."""
    k, random = SHRINK[task], np.random.RandomState(seed)
    if task == "reacher":
        return control.Environment(edited(reacher), reacher.Reacher(0.015 * k, random), time_limit=20)
    if task == "finger_turn":
        turn = finger.Turn(0.03 * k, random)
        return control.Environment(edited(finger), turn, time_limit=20, control_timestep=0.02)
    if task == "point_mass":
        sizes = [(".//geom[@name='target']", "size", 0.015 * k), (".//geom[@name='pointmass']", "size", 0.01 * k)]
        return control.Environment(edited(point_mass, *sizes), point_mass.PointMass(False, random), time_limit=20)
    if task == "ball_in_cup_catch":
        sizes = [(".//geom[@name='ball']", "size", 0.025 * k), (".//spatial[@name='string']", "width", 0.003 * k)]
        catch = ball_in_cup.BallInCup(random)
        return control.Environment(edited(ball_in_cup, *sizes), catch, time_limit=20, control_timestep=0.02)
    pole = (".//default[@class='pole']/geom", "size", 0.045 * k)
    return control.Environment(edited(cartpole, pole), cartpole.Balance(True, False, random), time_limit=10)


def stock(task, **kwargs):
    return DMControlEnv(*STOCK[task], **kwargs)


def subtle(task, *, physics="official", shrink=None, **kwargs):
    return TransformedEnv(stock(task, **kwargs), DMCSubtle(task, shrink=shrink, physics=physics))


def simulation(env):
    """The dm_control environment under a TorchRL one."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env._env


def arrays(model):
    """Everything in a compiled model, by name; copies."""
    values = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    values |= {f"stat.{name}": getattr(model.stat, name) for name in ("extent", "meanmass", "meansize", "meaninertia")}
    return {name: np.array(value) for name, value in values.items() if isinstance(value, np.ndarray | float)}


def unequal(left, right):
    assert left.keys() == right.keys()
    numbers = lambda name: {"equal_nan": left[name].dtype.kind == "f"}
    return {name for name in left if not np.array_equal(left[name], right[name], **numbers(name))}


def trajectory(env, count=20):
    """What an environment of TorchRL or of dm_control goes through under fixed actions, its seed being 5.

    Physics states and what is observed of them; rewards; the first image and every sixtieth one.
    """
    if isinstance(env, control.Environment):
        dm, step = env, lambda action: env.step(action).reward
        env.reset()  # TorchRL does this when it seeds an environment
        env.reset()
    else:
        dm = simulation(env)
        env.set_seed(5, static_seed=True)
        first = env.reset()
        step = lambda action: env.step(first.set("action", torch.from_numpy(action)))["next", "reward"].item()
    spec, random = dm.action_spec(), np.random.RandomState(11)
    observe = lambda: [dm.physics.state(), *map(np.ravel, dm.task.get_observation(dm.physics).values())]
    render = partial(dm.physics.render, 64, 64, camera_id=0)
    states, rewards, images = [np.concatenate(observe())], [], [render()]
    for number in range(1, count + 1):
        rewards.append(step(random.uniform(spec.minimum, spec.maximum)))
        states.append(np.concatenate(observe()))
        if number % 60 == 0:
            images.append(render())
    return np.array(states), np.array(rewards), np.array(images)


@cache
def run(task, kind):
    """The trajectory over 300 actions of a "stock", "oracle", "official" or "frozen" task, and its compiled model."""
    if kind == "oracle":
        env = dm = oracle(task, seed=5)
    else:
        env = stock(task) if kind == "stock" else subtle(task, physics=kind)
        dm = simulation(env)
    return trajectory(env, 300), arrays(dm.physics.model.ptr)


def assert_same(left, right, *, images=True):
    """Equal to the bit, as far as the shorter trajectory goes."""
    for name, one, other in zip(("states", "rewards", "images")[: 2 + images], left, right, strict=False):
        count = min(len(one), len(other))
        assert np.array_equal(one[:count], other[:count]), name
