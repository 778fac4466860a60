"""Memory Maze: upstream's task beside ours, the same maze in every process, ends that come when they should."""

import hashlib
import os
import subprocess
import sys

import hydra
import numpy as np
import pytest
import torch
from launcher import config
from memory_maze import tasks
from torch.nn.functional import one_hot
from torchrl.data import OneHot

from r2dreamer.envs import check_environment
from r2dreamer.envs.suites.memory_maze import make_memory_maze

FORWARD = 1


def play(env, tensordict, action):
    return env.step(tensordict.set("action", one_hot(torch.tensor(action), 6)))["next"]


def carry_to_target(maze):
    """Move the ball onto the target that is asked for."""
    task, physics = maze.task, maze.physics
    x, y, _ = physics.bind(task._targets[task._current_target_ix].geom).xpos
    task._walker.set_pose(physics, [x, y, 0])


def test_it_keeps_torchrls_specs_and_the_contract():
    env = make_memory_maze("9x9", seed=3)
    check_environment(env)  # and TorchRL's check_env_specs with it
    assert isinstance(env.action_spec, OneHot) and env.action_spec.shape == (6,)
    assert env.observation_spec["pixels"].shape == (3, 64, 64)
    assert list(env.observation_spec["metrics"].keys()) == ["targets_reached"]


@pytest.mark.parametrize(("task", "repeat", "episodes"), [("9x9", 1, 2), ("15x15", 3, 1)])
def test_it_walks_as_upstream_does_and_counts_the_targets_it_is_paid_for(task, repeat, episodes):
    env, upstream = make_memory_maze(task, seed=7, action_repeat=repeat), getattr(tasks, f"memory_maze_{task}")(seed=7)
    choices = torch.Generator().manual_seed(0)
    for steps, carried in ((10, (2, 3, 7)), (4, ()))[:episodes]:
        tensordict, now, total = env.reset(), upstream.reset(), 0.0
        assert tensordict["metrics", "targets_reached"].item() == 0
        for step in range(steps):
            assert torch.equal(tensordict["pixels"].permute(1, 2, 0), torch.from_numpy(now.observation["image"])), step
            if step in carried:
                carry_to_target(env.base_env.maze)
                carry_to_target(upstream)
            action = int(torch.randint(6, (), generator=choices))
            tensordict, reward = play(env, tensordict, action), 0.0
            for _ in range(repeat):
                now = upstream.step(action)
                reward += now.reward
            total += reward
            assert tensordict["reward"].item() == reward, step
            assert tensordict["metrics", "targets_reached"].item() == total == upstream.task._targets_obtained
            assert not tensordict["done"].item()
        assert total >= len(carried)
    upstream.close()


MAZES = """
import hashlib, sys, numpy, torch
import r2dreamer.envs.suites.memory_maze
assert "memory_maze" not in sys.modules
numpy.random.seed(5)  # upstream builds its first walls with numpy's global generator
env = r2dreamer.envs.suites.memory_maze.make_memory_maze("9x9", seed=2)
torch.manual_seed(0)
rollouts = [env.rollout(25), env.rollout(5)]
digest = lambda step: hashlib.md5(b"".join(value.numpy().tobytes() for value in step.values(True, True))).hexdigest()
print("\\n".join(digest(step) for rollout in rollouts for step in rollout))
"""


def test_mazes_and_pixels_are_the_same_in_a_process_with_other_addresses_and_hashes():
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONMALLOC": "malloc"}
    other = subprocess.Popen([sys.executable, "-c", MAZES], env=environment, stdout=subprocess.PIPE, text=True)
    np.random.seed(6)
    env = make_memory_maze("9x9", seed=2)
    torch.manual_seed(0)
    steps = [step for length in (25, 5) for step in env.rollout(length)]
    ours = [hashlib.md5(b"".join(value.numpy().tobytes() for value in step.values(True, True))) for step in steps]
    theirs = other.communicate()[0].split()
    assert len(theirs) == 30
    assert [digest.hexdigest() for digest in ours] == theirs
    assert not torch.equal(steps[0]["pixels"], steps[25]["pixels"])


def test_reseeding_is_building_anew_also_with_another_environment_in_between():
    env = make_memory_maze("9x9", seed=5)
    first = env.reset()["pixels"]
    env.set_seed(6, static_seed=True)
    other = make_memory_maze("9x9", seed=6)
    left, right = env.reset(), other.reset()
    assert not torch.equal(left["pixels"], first)
    for action in (1, 1, 4, 2, 2, 1, 5, 1):
        assert torch.equal(left["pixels"], right["pixels"])
        left, right = (play(each, now, action) for each, now in ((env, left), (other, right)))
    assert not torch.equal(env.reset()["pixels"], first)
    assert not torch.equal(left["pixels"], other.reset()["pixels"])  # every episode is another maze


@pytest.mark.parametrize(
    ("task", "frames", "image_size"), [("9x9", 1000, 32), ("11x11", 2000, 64), ("13x13", 3000, 48), ("15x15", 4000, 96)]
)
def test_each_size_truncates_at_its_own_limit_and_frames_images_of_every_size(task, frames, image_size):
    env = make_memory_maze(task, seed=1, image_size=image_size)
    tensordict = env.reset()
    pixels = tensordict["pixels"].float()
    for edge in (pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]):
        assert edge.std(1).max() < (10 if image_size < 48 else 1e-3)  # small ones blend in some of what they frame
    assert pixels[:, 3:-3, 3:-3].mean(0).std() > 5
    env.base_env.maze.physics.data.time = (frames - 3) / 4  # upstream counts its time; a frame is a quarter of a second
    for last in (False, False, True):
        tensordict = play(env, tensordict, FORWARD)
        assert tensordict["truncated"].item() == tensordict["done"].item() == last
        assert not tensordict["terminated"].item()


def test_only_an_end_with_a_discount_of_zero_terminates():
    env = make_memory_maze("9x9", seed=1, action_repeat=3)
    tensordict = env.reset()
    env.base_env.maze.physics.data.time = (1000 - 5) / 4
    env.base_env.maze.task._discount = 0.0
    ends = []
    while not tensordict["done"].item():
        tensordict = play(env, tensordict, FORWARD)
        ends.append((tensordict["terminated"].item(), tensordict["truncated"].item()))
    assert ends == [(False, False), (True, False)]
    assert env.base_env.maze.physics.time() == pytest.approx(250)  # the second action was repeated no further


def test_the_configuration_builds_the_environment_with_its_replay_on_disk():
    cfg = config("env=memory_maze", "env.task=13x13")
    make = hydra.utils.instantiate(cfg.env.make)
    assert make.func is make_memory_maze and make.keywords == {"task": "13x13", "image_size": 64, "action_repeat": 1}
    assert cfg.total_frames == 100_000_000 and cfg.replay.place.storage == "memmap"
    assert config("env=memory_maze", "replay.place.storage=cpu").replay.place.storage == "cpu"  # the user's word counts
    assert config("env=gym").replay.place.storage == "cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"task": "9x10"}, "Memory Maze has no task '9x10'. The nearest: 9x9"),
        ({"task": 15}, "has no task 15. The nearest: 15x15"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 64.0}, "image_size=64.0"),
        ({"action_repeat": 0}, "action_repeat=0"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        make_memory_maze(**{"task": "9x9", "seed": 0, **arguments})


def test_a_missing_renderer_is_explained_and_the_choice_left_to_whoever_has_a_display():
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"} | {"DISPLAY": ":77"}
    command = """
import os
from r2dreamer.envs.suites.memory_maze import make_memory_maze
try:
    make_memory_maze("9x9", seed=0)
except ImportError as error:  # there is no display 77
    print(error)
print("left:", os.environ.get("MUJOCO_GL"))
"""
    result = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert "MuJoCo could not render" in result.stdout and "MUJOCO_GL is unset. Set MUJOCO_GL=egl" in result.stdout
    assert "left: None" in result.stdout  # upstream would set it to egl, for every process started from here
