"""DMCSubtle shrinks anything in any model as if it were written smaller, also beside other transforms and copied."""

from r2dreamer.envs.base import gl  # isort: skip

gl.choose_gl()  # first, because dm_control reads the choice when it is imported

# ruff: noqa: E402
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from dm_control import suite
from subtle_oracle import arrays, assert_same, every_task, oracle, run, simulation, stock, subtle, trajectory, unequal
from subtle_user import ASSETS, LIMB, SMALLER, user_env, written
from torchrl.envs import CatFrames, Compose, DMControlEnv, DMControlWrapper, ParallelEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs

from r2dreamer.envs import DMCSubtle, RenderPixels

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


def test_a_size_that_the_task_sets_to_what_is_small_already_is_shrunk_all_the_same():
    """0.3 of the 0.05 in the XML is the 0.015 that reacher's hard task sets in every episode."""
    env = TransformedEnv(DMControlEnv("reacher", "hard"), DMCSubtle(geoms="target", shrink=0.3))
    for _ in range(3):
        env.reset()
        assert env._env.physics.named.model.geom_size["target", 0] == pytest.approx(0.3 * 0.015)


def test_a_task_that_sets_one_side_of_a_box_leaves_the_others_small():
    env = DMControlEnv("cartpole", "balance")
    task, sizes = env._env.task, env._env.physics.named.model.geom_size
    begin, stock = task.initialize_episode, np.array(sizes["cart"])

    def begin_with_one_side(physics):
        begin(physics)
        physics.named.model.geom_size["cart", 1] = 2 * stock[1]

    task.initialize_episode = begin_with_one_side
    env = TransformedEnv(env, DMCSubtle(geoms="cart", shrink=1 / 2))
    for _ in range(3):
        env.reset()
        np.testing.assert_array_equal(env._env.physics.named.model.geom_size["cart"], stock * [0.5, 1, 0.5])


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
