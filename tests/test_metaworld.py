"""Meta-World: upstream's tasks, seeded, and images that stay right beside other renderers.

Upstream renders here only in a process of its own: in this one it would take the place of others' OpenGL contexts.
"""

import functools
import gc
import importlib.resources
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import hydra
import metaworld
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchrl.envs.utils import check_env_specs

from r2dreamer.envs import check_environment, make_dmc, make_vector_env
from r2dreamer.envs.suites.metaworld import UPSIDE_DOWN, _build, make_metaworld

ACTIONS = np.random.default_rng(0).uniform(-1, 1, (2, 2, 4)).astype(np.float32)  # two episodes of two steps


def upstream(task, seed, **rendering):
    """The first train task of MT1 as upstream gives it, with new goals from the generator that `seed` seeds."""
    name = f"{task}-v3"
    benchmark = metaworld.MT1(name, seed=0)
    env = benchmark.train_classes[name](**rendering)
    env.set_task(benchmark.train_tasks[0])
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env.seed(seed)
    return env


def play_upstream(task, seed, actions, repeat):
    """Images (as upstream renders them), rewards of the repeated actions, and hands; nothing of ours is called."""
    env = upstream(task, seed, render_mode="rgb_array", camera_name="corner2", width=64, height=64)
    env.model.cam_pos[2] = [0.75, 0.075, 0.7]
    images, rewards = [], []
    for episode in actions:
        env.reset()
        images.append(env.render())
        for action in episode:
            rewards.append(sum(env.step(action)[1] for _ in range(repeat)))
            images.append(env.render())
    return np.stack(images), np.array(rewards)


def play(env, actions):
    images, rewards = [], []
    for episode in actions:
        now = env.reset()
        images.append(now["pixels"])
        for action in episode:
            now = env.step(now.set("action", torch.from_numpy(action)))["next"]
            rewards.append(now["reward"])
            images.append(now["pixels"])
    return torch.stack(images), torch.cat(rewards)


def goal(env):
    return env.base_env.upstream._target_pos.copy()


def same(left, right):
    return all(torch.equal(left[key], right[key]) for key in left.keys(True, True))


@pytest.fixture(scope="module")
def reach():
    env = make_metaworld("reach", seed=3)
    yield env
    env.close()


# -- what is played ---------------------------------------------------------------------------------------------------


def test_it_keeps_torchrls_specs_and_the_contract(reach):
    check_env_specs(reach)
    check_environment(reach)
    assert reach.action_spec.shape == (4,)
    assert set(reach.observation_spec.keys(True, True)) == {"pixels", "is_init", ("metrics", "success")}


@pytest.fixture(scope="module")
def elsewhere():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


@pytest.mark.parametrize("task", ["reach", "drawer-open"])
def test_images_and_rewards_are_upstreams_with_the_image_turned_over(task, elsewhere):
    # In one process, one task after the other is fine; going back to the first would not be.
    expected, rewards = elsewhere.submit(play_upstream, task, 3, ACTIONS, 2).result()
    env = make_metaworld(task, seed=3)
    images, ours = play(env, ACTIONS)
    env.close()
    assert ours.tolist() == pytest.approx(rewards, rel=1e-6) and len(set(rewards)) == rewards.size
    assert torch.equal(images, torch.from_numpy(expected[:, ::-1].copy()).permute(0, 3, 1, 2))
    assert not torch.equal(images[0], images[3])  # another goal


def test_the_cameras_that_are_turned_over_are_those_that_hang_upside_down():
    env = _build("reach-v3", metaworld.ALL_V3_ENVIRONMENTS["reach-v3"], 64)
    env.seed(0)
    env.reset()
    cameras = [env.model.camera(index).name for index in range(env.model.ncam)]
    height_of_their_up = {name: env.data.camera(name).xmat.reshape(3, 3)[2, 1] for name in cameras}
    assert {name for name, height in height_of_their_up.items() if height < 0} == set(UPSIDE_DOWN)


def test_all_fifty_tasks_build_reset_and_step_as_mt1s():
    names = list(metaworld.MT1.ENV_NAMES)
    assert len(names) == 50
    for name in names:
        env = _build(name, metaworld.ALL_V3_ENVIRONMENTS[name], 64)
        env.seed(1)
        env.reset()
        first = env._target_pos.copy(), env.data.qpos.copy(), env.model.body_pos.copy()
        _, reward, _, _, info = env.step(np.ones(4, np.float32))
        assert np.isfinite(reward) and info["success"] in (0, 1), name
        env.reset()
        second = env._target_pos, env.data.qpos, env.model.body_pos
        assert not all(map(np.array_equal, first, second)), name  # goal or object moved


@pytest.mark.parametrize("name", ["door-open", "door-open-v3"])
def test_tasks_go_by_their_name_with_or_without_version(name):
    env = make_metaworld(name, seed=0)
    assert type(env.base_env.upstream) is metaworld.ALL_V3_ENVIRONMENTS["door-open-v3"]
    assert env.task == name
    env.close()


def test_success_of_any_repeat_counts_and_ends_nothing():
    # Straight through the goal and beyond: 60 frames of one action, successful only in the middle.
    env = upstream("reach", 3)
    env.reset()
    way = env._target_pos - env.data.body("hand").xpos
    action = np.append(way / abs(way).max(), 0).astype(np.float32)
    frames = [env.step(action)[4]["success"] for _ in range(60)]
    assert frames[-1] == 0 and sum(frames) > 0
    ours = make_metaworld("reach", seed=3, action_repeat=60)
    start = ours.reset()
    passed = ours.step(start.clone().set("action", torch.from_numpy(action)))["next"]
    assert start["metrics", "success"] == 0 and passed["metrics", "success"] == 1
    assert not passed["done"]
    assert ours.reset()["metrics", "success"] == 0
    ours.close()


@pytest.mark.parametrize(("repeat", "frames"), [(250, [250, 250]), (300, [300, 200])])
def test_an_episode_is_truncated_after_500_frames_also_in_mid_repeat(repeat, frames):
    action = np.full(4, 0.3, np.float32)
    env = upstream("reach", 3)
    env.reset()
    rewards = [sum(env.step(action)[1] for _ in range(count)) for count in frames]
    with pytest.raises(ValueError, match="must reset"):  # why we stop there ourselves
        env.step(action)
    ours = make_metaworld("reach", seed=3, action_repeat=repeat)
    hold = lambda tensordict: tensordict.set("action", torch.from_numpy(action))
    rollout = ours.rollout(5, hold)["next"]
    ours.close()
    assert rollout["truncated"].flatten().tolist() == [False, True] and not rollout["terminated"].any()
    assert rollout["reward"].flatten().tolist() == pytest.approx(rewards, rel=1e-6)


# -- seeds ------------------------------------------------------------------------------------------------------------


def test_the_seed_alone_decides_and_numpys_generator_stays_as_it_is(reach):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    reach.set_seed(8, static_seed=True)
    first, first_goal = play(reach, ACTIONS), goal(reach)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(1)
    new = make_metaworld("reach", seed=8)  # as good as reseeded, after any history
    again, again_goal = play(new, ACTIONS), goal(new)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert np.array_equal(first_goal, again_goal)
    new.set_seed(9, static_seed=True)
    other = play(new, ACTIONS)
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    assert not np.array_equal(first_goal, goal(new))
    new.close()


# -- images beside other renderers ------------------------------------------------------------------------------------


def test_environments_of_one_process_show_what_each_shows_in_its_own():
    factory = functools.partial(make_metaworld, "door-open")
    serial = make_vector_env(factory, [1, 2], parallel=False)
    parallel = make_vector_env(factory, [1, 2], parallel=True)
    for seeds in ([1, 2], [6, 7]):
        rollouts = []
        for env in (serial, parallel):
            env.reseed(seeds)
            torch.manual_seed(0)
            rollouts.append(env.rollout(2))
        assert same(*rollouts)
        assert not torch.equal(rollouts[0]["pixels"][0], rollouts[0]["pixels"][1])
    parallel.close()
    serial.close()


def test_neither_dm_control_nor_another_task_nor_its_end_disturbs_an_image(reach):
    walker = make_dmc("walker_walk", seed=0, from_pixels=True)
    expected_walker, expected = walker.reset()["pixels"], reach.reset()["pixels"]

    def undisturbed():
        walker.set_seed(0, static_seed=True)
        image = torch.from_numpy(reach.base_env.image())
        return torch.equal(image, expected) and torch.equal(walker.reset()["pixels"], expected_walker)

    other = make_metaworld("hammer", seed=0)
    assert undisturbed()
    assert not torch.equal(other.reset()["pixels"], expected)
    assert undisturbed()
    other.close()
    assert undisturbed()
    walker.close()


def test_a_closed_or_forgotten_environment_leaves_no_thread():
    closed, forgotten = (make_metaworld("reach", seed=0) for _ in range(2))
    threads = [env.base_env.viewer.thread for env in (closed, forgotten)]
    closed.close()
    del forgotten
    gc.collect()  # a recursive function inside TorchRL's specs refers to the environment
    threads[1].join(10)
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(RuntimeError, match="was closed"):
        closed.reset()


@pytest.mark.filterwarnings("ignore:.*fork.*")  # forking beside threads is what this test is about
def test_a_forked_process_is_told_that_it_has_no_renderer(reach):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a hang would otherwise be one of the whole run
        try:
            reach.reset()
        except RuntimeError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- bad input and config ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "nearest"), [("raech", "reach"), ("door_open", "door-open"), ("drawer-opn-v3", "drawer-open")]
)
def test_an_unknown_task_is_answered_with_the_nearest(task, nearest):
    with pytest.raises(ValueError, match=f"Meta-World has no task '{task}'.*{nearest}"):
        make_metaworld(task, seed=0)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="camera='corner9'.*topview.*corner2"):
        make_metaworld("reach", seed=0, camera="corner9")
    for size in ("image_size", "action_repeat"):
        with pytest.raises(ValueError, match=f"{size}=0"):
            make_metaworld("reach", seed=0, **{size: 0})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Gymnasium's half-made viewer
def test_a_missing_renderer_is_answered_with_variable_and_package(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(ImportError, match="(?s)MUJOCO_GL is nonsense. Set MUJOCO_GL=egl.*apt-get install") as caught:
        make_metaworld("reach", seed=0)
    del caught
    gc.collect()


def test_the_config_builds_the_environment():
    file = importlib.resources.files("r2dreamer.configs") / "env" / "metaworld.yaml"
    config = OmegaConf.create({"env": OmegaConf.create(file.read_text())}).env
    assert (config.total_frames, config.action_repeat, config.train_ratio, config.num_envs) == (1_000_000, 2, 512, 16)
    factory = hydra.utils.instantiate(config.make, _target_="r2dreamer.envs.suites.metaworld.make_metaworld")
    env = factory(seed=0)
    assert env.base_env.repeat == 2
    env.close()
