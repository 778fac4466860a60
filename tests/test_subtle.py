"""DMC-Subtle against models compiled here from XML that is edited by other means than the transform's."""

from r2dreamer.envs import gl  # isort: skip

gl.choose_gl()  # first, because dm_control reads the choice when it is imported

# ruff: noqa: E402
import importlib.resources
import pickle
import re
import xml.etree.ElementTree as ElementTree
from functools import cache, partial

import hydra
import numpy as np
import pytest
import torch
from dm_control import suite
from dm_control.mujoco import Physics
from dm_control.rl import control
from dm_control.suite import ball_in_cup, base, cartpole, finger, point_mass, reacher
from omegaconf import OmegaConf
from torchrl.envs import CatFrames, Compose, DMControlEnv, DMControlWrapper, GymEnv, ParallelEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs

from r2dreamer.envs import DMCSubtle, RenderPixels, check_environment, make_dmc_subtle

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


# -- any shrink, on anything ------------------------------------------------------------------------------------------


@every_task
def test_shrink_one_is_the_stock_task(task):
    for physics in ("official", "frozen"):
        assert_same(trajectory(subtle(task, physics=physics, shrink=1), 60), run(task, "stock")[0])


@pytest.mark.parametrize("shrink", [1 / 2, "1/20"])
def test_the_shrink_multiplies_the_size_the_environment_has(shrink):
    factor = {1 / 2: 0.5, "1/20": 0.05}[shrink]
    for name, radius in (("easy", 0.05), ("hard", 0.015)):
        env = TransformedEnv(DMControlEnv("reacher", name), DMCSubtle("reacher", shrink=shrink))
        for _ in range(3):  # the task writes its own size every time
            env.reset()
            assert simulation(env).physics.named.model.geom_size["target", 0] == radius * factor
            assert simulation(env).physics.named.model.geom_size["finger", 0] == 0.01


def test_the_smaller_the_less_is_seen():
    dots = []
    for shrink in (1, 1 / 2, 1 / 5, 1 / 20):
        env = DMControlEnv("reacher", "easy", from_pixels=True)
        env = TransformedEnv(env, DMCSubtle(geoms="target", shrink=shrink, physics="frozen"))
        image = trajectory(env, 0)[2][0].astype(int)
        dots.append((image[..., 0] - image[..., 1] > 40).sum())  # red is the target's alone
    assert dots[0] > dots[1] > dots[2] > dots[3]


MODEL = """
<mujoco>
  <include file="floor.xml"/>
  <asset>
    <mesh name="rock" scale="{mesh} {mesh} {mesh}" vertex="0 0 0  .2 0 0  0 .3 0  0 0 .4"/>
  </asset>
  <default>
    <default class="limb">
      <geom type="capsule" size="{limb}" density="700"/>
      <default class="toe"><geom size="{toe}"/></default>
    </default>
  </default>
  <worldbody>
    <geom name="floor" class="ground" type="plane" size="{floor} .5"/>
    <site name="goal" type="ellipsoid" size="{goal}" pos="1 1 1"/>
    <body name="trunk" pos="0 0 1" childclass="limb">
      <freejoint/>
      <geom name="trunk" type="box" size="{trunk}" mass="2"/>
      <geom fromto="0 0 0 .3 0 0"/>
      <body pos=".3 0 0">
        <joint name="knee" axis="0 1 0" range="-45 45"/>
        <geom name="shank" fromto="0 0 0 0 0 -.4"/>
        <geom name="toe" class="toe" fromto="0 0 -.4 .1 0 -.4"/>
        <geom name="calf" size="{calf}" pos="0 .1 -.2"/>
        <geom name="rock" type="mesh" mesh="rock" pos=".5 .1 0" euler="10 20 30"/>
        <site name="heel" pos="0 0 -.4" size="{heel}"/>
      </body>
    </body>
    <body name="weight" pos="0 1 1">
      <joint type="slide" axis="0 0 1"/>
      <inertial pos="0 0 0" mass="3" diaginertia=".1 .2 .25"/>
      <geom name="weight" type="cylinder" size="{weight}"/>
      <geom name="beam" type="box" fromto="0 0 .2 .3 .1 .5" size="{beam}"/>
    </body>
  </worldbody>
  <tendon><spatial name="rope" width="{rope}"><site site="heel"/><site site="goal"/></spatial></tendon>
  <actuator><motor name="knee" joint="knee" gear="3" ctrlrange="-1 1"/></actuator>
</mujoco>
"""
ASSETS = {"floor.xml": b'<mujoco><default><default class="ground"><geom rgba="0 1 0 1"/></default></default></mujoco>'}
WRITTEN = {
    "limb": [0.04], "toe": [0.02], "goal": [0.1, 0.2, 0.3], "trunk": [0.1, 0.2, 0.05], "calf": [0.06, 0.1],
    "weight": [0.1, 0.07], "heel": [0.005], "beam": [0.06], "rope": [0.01], "mesh": [1.5], "floor": [3, 2],
}  # fmt: skip
LIMB = ["limb", "trunk", "calf", "mesh", "heel"]


def written(*small, shrink=1.0):
    """The model with the sizes called `small` multiplied."""
    factor = {name: shrink if name in small else 1.0 for name in WRITTEN}
    return MODEL.format(**{name: " ".join(repr(n * factor[name]) for n in sizes) for name, sizes in WRITTEN.items()})


SMALLER = {"shrink": 0.5, "xml": written(), "assets": ASSETS}
RENAMED = written().replace('name="calf"', 'name="foot"')


class Wander(base.Task):
    """A user's own task: a goal of a random size every episode, from which its reward is computed."""

    resizes = False

    def initialize_episode(self, physics):
        if self.resizes:
            self.drawn = self.random.uniform(0.1, 0.4)
            physics.named.model.site_size["goal", 0] = self.drawn
        super().initialize_episode(physics)

    def get_observation(self, physics):
        return {"position": physics.position()}

    def get_reward(self, physics):
        return float(physics.named.model.site_size["goal", 0])


class Body(Physics):
    """A user's own physics, from a module that is not of the suite."""


def user_env(text=None, resizes=False):
    physics = Body.from_xml_string(written() if text is None else text, ASSETS)
    task = Wander(random=0)
    task.resizes = resizes
    return DMControlWrapper(control.Environment(physics, task))


@pytest.mark.parametrize(
    ("names", "small"),
    [
        ({"geoms": "trunk"}, ["trunk"]),  # explicit mass, beside a geom that has a density
        ({"geoms": "calf"}, ["calf"]),  # both numbers of a capsule that is not given by its ends
        ({"geoms": "toe"}, ["toe"]),  # its size stands in a class below another
        ({"geoms": "weight"}, ["weight"]),  # its body's inertia is given: only the size changes
        ({"geoms": ["beam", "floor"]}, ["beam", "floor"]),  # a box given by its ends; a plane without its grid
        ({"geoms": "rock"}, ["mesh"]),
        ({"sites": "goal", "tendons": ["rope"]}, ["goal", "rope"]),
        ({"classes": "limb"}, LIMB),  # with those that have a size of their own
        ({"classes": "limb", "geoms": ["calf", "toe"]}, [*LIMB, "toe"]),  # the calf once, though named twice
    ],
)
def test_anything_shrinks_as_if_it_were_written_smaller(names, small):
    env = user_env()
    physics, expected = env._env.physics, user_env(written(*small, shrink=0.3))._env.physics
    plain, seen = arrays(physics.model.ptr), physics.render(96, 96)
    TransformedEnv(env, DMCSubtle(**names, shrink=0.3, xml=written(), assets=ASSETS))
    assert unequal(plain, arrays(expected.model.ptr))
    assert not unequal(arrays(physics.model.ptr), arrays(expected.model.ptr))
    assert np.array_equal(physics.render(96, 96), expected.render(96, 96))
    assert (seen != expected.render(96, 96)).any()


@pytest.mark.parametrize(
    ("domain", "task", "geom"),
    [("manipulator", "bring_ball", "ball"), ("swimmer", "swimmer6", "target"), ("cartpole", "two_poles", "pole_2")],
)
def test_tasks_that_write_their_xml_in_python_are_shrunk_too(domain, task, geom):
    for env in (DMControlEnv(domain, task), DMControlWrapper(suite.load(domain, task))):
        model = env._env.physics.named.model
        before, mass = model.geom_size[geom].copy(), env._env.physics.model.body_mass.copy()
        TransformedEnv(env, DMCSubtle(geoms=geom, shrink=0.5)).rollout(2)
        changes = model.geom_size[geom] / np.where(before, before, 1)
        assert 0.5 in changes and set(changes) <= {0, 0.5, 1}
        assert (env._env.physics.model.body_mass != mass).any() == (
            domain == "manipulator"
        )  # a target has none, a pole's is given


def test_a_size_the_task_draws_anew_is_shrunk_anew():
    plain, env = user_env(resizes=True), user_env(resizes=True)
    env = TransformedEnv(env, DMCSubtle(sites="goal", shrink=0.25, xml=written(), assets=ASSETS))
    rewards = []
    for each in (plain, env):
        each.set_seed(3, static_seed=True)
        rewards.append([each.rollout(2)["next", "reward"][-1].item() for _ in range(3)])
    assert len(set(rewards[0])) == 3 and [reward * 0.25 for reward in rewards[0]] == rewards[1]


def test_what_the_user_or_the_task_changed_in_the_model_stays():
    env = stock("ball_in_cup_catch")
    env._env.physics.model.opt.gravity[2] = -3
    env._env.physics.named.model.geom_rgba["cup_part_0"] = [0, 1, 0, 1]
    env = TransformedEnv(env, DMCSubtle())
    env.reset()
    model = simulation(env).physics.named.model
    assert simulation(env).physics.model.opt.gravity[2] == -3
    assert model.geom_rgba["cup_part_0"].tolist() == [0, 1, 0, 1]
    assert model.geom_size["ball", 0] == 0.025 * (1 / 12)


# -- with other transforms, workers and copies ------------------------------------------------------------------------


def stacked(physics="official", shrink=None):
    transform = Compose(
        DMCSubtle(physics=physics, shrink=shrink), RenderPixels(64), CatFrames(2, -3, in_keys=["pixels"])
    )
    return TransformedEnv(stock("reacher"), transform)


def from_pixels(physics="official"):
    return subtle("reacher", physics=physics, from_pixels=True, pixels_only=False)


@pytest.mark.parametrize("physics", ["official", "frozen"])
@pytest.mark.parametrize("make", [stacked, from_pixels])
def test_it_goes_with_other_transforms_and_keeps_its_specs(make, physics):
    env = make(physics)
    check_env_specs(env)
    env.set_seed(5, static_seed=True)
    pixels = env.reset()["pixels"]
    pixels = pixels[-3:].permute(1, 2, 0) if make is stacked else pixels
    expected = oracle("reacher")
    for number in range(2):  # TorchRL resets an environment that it seeds
        expected.task._random = expected.task.random if number else np.random.RandomState(5)
        expected.reset()
    height, width = pixels.shape[:2]
    assert np.array_equal(pixels.numpy(), expected.physics.render(height, width, camera_id=0))
    assert (
        simulation(env).physics.named.model.geom_size["target", 0]
        == {"official": 0.015 * (1 / 3), "frozen": 0.015}[physics]
    )


def test_two_of_them_shrink_two_things():
    env = TransformedEnv(stock("point_mass"), DMCSubtle(geoms="target", shrink=1 / 6))
    env.append_transform(DMCSubtle(geoms="pointmass", shrink=1 / 6))
    assert_same(trajectory(env), run("point_mass", "oracle")[0])
    mixed = TransformedEnv(
        stock("ball_in_cup_catch"),
        Compose(DMCSubtle(geoms="ball", shrink=1 / 12, physics="frozen"), DMCSubtle(tendons="string", shrink=1 / 12)),
    )
    assert_same(trajectory(mixed, 60), run("ball_in_cup_catch", "frozen")[0])
    user = user_env()
    for name in ("calf", "toe"):  # the masses of one body
        TransformedEnv(user, DMCSubtle(geoms=name, **SMALLER))
    expected = user_env(written("calf", "toe", shrink=0.5))
    assert not unequal(*(arrays(env._env.physics.model.ptr) for env in (user, expected)))


def test_workers_give_what_one_process_gives():
    small = partial(stacked, "frozen")
    workers = ParallelEnv(1, small, mp_start_method="spawn")
    try:
        workers.set_seed(4)
        torch.manual_seed(0)
        rollout = workers.rollout(6)
    finally:
        workers.close()
    for make, alike in ((small, True), (partial(stacked, "frozen", shrink=1), False)):
        env, taken = make(), iter(rollout[0]["action"])
        env.set_seed(4)
        repeated = env.rollout(6, policy=lambda tensordict: tensordict.set("action", next(taken)))  # noqa: B023
        assert torch.equal(rollout[0]["next", "position"], repeated["next", "position"])
        assert torch.equal(rollout[0]["next", "pixels"], repeated["next", "pixels"]) == alike


@pytest.mark.parametrize("physics", ["official", "frozen"])
def test_it_survives_pickling_on_and_off_an_environment(physics):
    transform = DMCSubtle("reacher", shrink="1/3", physics=physics)
    alone = TransformedEnv(stock("reacher"), pickle.loads(pickle.dumps(transform)))
    together = pickle.loads(pickle.dumps(TransformedEnv(stock("reacher"), transform)))
    assert_same(trajectory(alone), run("reacher", physics)[0])
    assert_same(trajectory(together), run("reacher", physics)[0])


def test_a_clone_or_the_same_again_shrinks_nothing_twice():
    env = subtle("ball_in_cup_catch")
    TransformedEnv(env.base_env, env.transform.clone())
    TransformedEnv(env.base_env, DMCSubtle("ball_in_cup_catch"))
    env.reset()
    assert simulation(env).physics.named.model.geom_size["ball", 0] == 0.025 * (1 / 12)


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


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [0, -0.5, float("nan"), float("inf"), 3, True, "a third", "1/0", [0.5]])
def test_a_shrink_is_a_number_above_zero_and_at_most_one(shrink):
    with pytest.raises(ValueError, match=rf"^shrink={re.escape(repr(shrink))} must be .* a third .*shrink=1/3"):
        DMCSubtle("reacher", shrink=shrink)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"task": "reecher"}, "no task 'reecher'.*nearest: reacher"),
        ({"physics": "frozn"}, "physics='frozn' must be 'official'.*nearest: frozen"),
        ({"geoms": "ball"}, r"geom 'ball'.*shrink=None.*such as shrink=1/20"),
        ({"task": "reacher", "sites": ["target"], "shrink": 0.5}, "site 'target'.*task='reacher'.*without a task"),
    ],
)
def test_mistakes_are_named_before_there_is_an_environment(arguments, said):
    with pytest.raises(ValueError, match=said):
        DMCSubtle(**arguments)
    if "task" in arguments and len(arguments) == 1:
        with pytest.raises(ValueError, match=said):
            make_dmc_subtle(arguments["task"], seed=0)


@pytest.mark.parametrize(
    ("make", "subtle", "said"),
    [
        (lambda: stock("reacher"), {"geoms": "targt", "shrink": 0.5}, "no geom called 'targt'. The nearest: target."),
        (lambda: stock("finger_turn"), {"geoms": "target", "shrink": 0.5}, "a site of that name: sites='target'"),
        (
            lambda: stock("cartpole_swingup"),
            {"classes": "Pole", "shrink": 0.5},
            "no class.*nearest: pole.*: main, pole",
        ),
        (lambda: stock("reacher"), {"tendons": "string", "shrink": 0.5}, "tendons: none that has a name"),
        (
            lambda: stock("reacher"),
            {"task": "finger_turn"},
            "one of the domain 'reacher'.*no task 'finger_turn': that is one of 'finger'",
        ),
        (
            lambda: DMControlEnv("walker", "walk"),
            {},
            "of the domain 'walker', for which it has no task. Its tasks: reacher.*geoms=",
        ),
        (user_env, {}, "one that is not of the suite.*geoms="),
        (user_env, {"geoms": "trunk", "shrink": 0.5}, "only for the suite's tasks can.*xml=text, assets=files"),
        (
            user_env,
            {"geoms": "toe", **SMALLER, "xml": written("trunk", shrink=0.5)},
            "would overwrite .*dof_M0.*after it is put on",
        ),
        (user_env, {"geoms": "trunk", **SMALLER, "xml": "<mujoco/>"}, "compiles to another model.*xml="),
        (user_env, {"geoms": "foot", **SMALLER, "xml": RENAMED}, "compiles to another model"),
        (
            user_env,
            {"geoms": "rock", "physics": "frozen", **SMALLER},
            "the mesh 'rock', which only physics='official' can",
        ),
        (lambda: stock("ball_in_cup_catch"), {"shrink": 1e-4}, "does not compile.*geom 'ball'.*frozen"),
        (lambda: GymEnv("Pendulum-v1"), {}, "not on GymEnv.*ParallelEnv"),
        (
            lambda: subtle("ball_in_cup_catch"),
            {"geoms": "ball", "shrink": 0.01},
            "already has geom 'ball', tendon 'string' shrunk to 0.0833.*make that geom 'ball'",
        ),
        (
            lambda: subtle("reacher"),
            {"shrink": 0.5},
            "already has geom 'target' shrunk to 0.33.*to 0.5.*new environment",
        ),
    ],
)
def test_what_does_not_fit_the_environment_is_named_with_its_remedy(make, subtle, said):
    with pytest.raises(ValueError, match=f"(?s){said}") as caught:
        TransformedEnv(make(), DMCSubtle(**subtle), auto_unwrap=False)
    assert "\n" not in str(caught.value)


def test_what_is_frozen_may_be_smaller_than_any_mass_compiles_to():
    env = TransformedEnv(stock("ball_in_cup_catch"), DMCSubtle(shrink=1e-4, physics="frozen"))
    assert_same(trajectory(env), run("ball_in_cup_catch", "stock")[0], images=False)


def test_workers_are_told_to_carry_it_inside():
    with pytest.raises(ValueError, match="inside its worker"):
        TransformedEnv(ParallelEnv(2, partial(stock, "reacher")), DMCSubtle())
