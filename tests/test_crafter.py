"""Crafter: upstream's game beside ours, the same episode in every process, and the score worked by hand."""

import collections
import hashlib
import os
import pickle
import subprocess
import sys

import crafter
import hydra
import pytest
import torch
from launcher import config
from torch.nn.functional import one_hot
from torchrl.data import OneHot

from r2dreamer.envs import check_environment
from r2dreamer.envs.suites.crafter import CrafterScores, crafter_score, make_crafter

ACTIONS = crafter.constants.actions


def play(env, tensordict, action):
    return env.step(tensordict.set("action", one_hot(torch.tensor(action), len(ACTIONS))))["next"]


def achieved(tensordict):
    return {name.removeprefix("achievement_") for name, value in tensordict["metrics"].items() if value.item() == 1}


class Upstream:
    """The package's own environment; only its sets iterate by place instead of by memory address."""

    class ByPlace(set):
        def __iter__(self):
            return iter(sorted(super().__iter__(), key=lambda creature: (creature.pos[0], creature.pos[1])))

    def __init__(self, seed, **arguments):
        self.env = crafter.Env(seed=seed, **arguments)
        self.reset_world, self.env._world.reset = self.env._world.reset, self.reset_with_order

    def reset_with_order(self, seed):
        self.reset_world(seed)
        self.env._world._chunks = collections.defaultdict(self.ByPlace)


# -- beside upstream --------------------------------------------------------------------------------------------------


def test_it_keeps_torchrls_specs_and_the_contract():
    env = make_crafter("noreward", seed=3)
    check_environment(env)  # and TorchRL's check_env_specs with it
    assert isinstance(env.action_spec, OneHot) and env.action_spec.shape == (17,)
    assert env.observation_spec["pixels"].shape == (3, 64, 64)
    expected = {f"achievement_{name}" for name in crafter.constants.achievements}
    assert set(env.observation_spec["metrics"].keys()) == expected and len(expected) == 22


@pytest.mark.parametrize(("repeat", "seed", "steps_after"), [(1, 2, 20), (3, 4, 0)])
def test_it_plays_what_upstream_plays_to_the_death_and_into_the_next_world(repeat, seed, steps_after):
    env, upstream = make_crafter("reward", seed=seed, action_repeat=repeat), Upstream(seed).env
    choices, paid, died, unlocked = torch.Generator().manual_seed(seed), 0, None, set()
    tensordict, image = env.reset(), upstream.reset()
    for step in range(2000):
        assert torch.equal(tensordict["pixels"].permute(1, 2, 0), torch.from_numpy(image)), step
        if died is not None and step == died + 1 + steps_after:
            break
        if tensordict["done"].item():
            tensordict, image = env.reset(), upstream.reset()
            assert torch.equal(tensordict["pixels"].permute(1, 2, 0), torch.from_numpy(image))
            assert not achieved(tensordict)
        action = int(torch.randint(len(ACTIONS), (), generator=choices))
        tensordict, rewards = play(env, tensordict, action), []
        for _ in range(repeat):
            image, reward, done, info = upstream.step(action)
            rewards.append(reward)
            if done:
                died = step
                break
        assert tensordict["reward"].item() == pytest.approx(sum(rewards)), step
        assert achieved(tensordict) == {name for name, count in info["achievements"].items() if count}, step
        assert tensordict["done"].item() == tensordict["terminated"].item() == done
        assert not tensordict["truncated"].item()
        paid, unlocked = paid + (sum(rewards) != 0), unlocked | achieved(tensordict)
    assert died > 30 and len(unlocked) >= 3 and paid > 5


def test_the_image_stands_upright_with_the_inventory_below():
    pixels = make_crafter("reward", seed=0).reset()["pixels"].float().mean(0)
    assert pixels[-7:, :36].std() == 0 and pixels[-14:-7, :36].std() > 20  # an empty row below the four needs
    assert pixels[:49, 63].std() == 0 and pixels[:49, :63].mean() > 40  # cells of 7 pixels leave the last column black


# -- episodes ---------------------------------------------------------------------------------------------------------

# Seed 2 draws which of several creatures vanishes at steps 10 and 30 of its first episode.
EPISODES = """
import hashlib, sys, torch
import r2dreamer.envs.suites.crafter
assert "crafter" not in sys.modules
env = r2dreamer.envs.suites.crafter.make_crafter("reward", seed=2)
torch.manual_seed(0)
rollout = env.rollout(600, break_when_any_done=False)
digest = lambda step: hashlib.md5(b"".join(value.numpy().tobytes() for value in step.values(True, True))).hexdigest()
print("\\n".join(digest(step) for step in rollout))
"""


def test_600_steps_are_the_same_in_a_process_with_other_addresses_and_hashes():
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONMALLOC": "malloc"}
    other = subprocess.Popen([sys.executable, "-c", EPISODES], env=environment, stdout=subprocess.PIPE, text=True)
    env = make_crafter("reward", seed=2)
    torch.manual_seed(0)
    rollout = env.rollout(600, break_when_any_done=False)
    ours = [hashlib.md5(b"".join(value.numpy().tobytes() for value in step.values(True, True))) for step in rollout]
    theirs = other.communicate()[0].split()
    assert len(theirs) == 600
    assert [digest.hexdigest() for digest in ours] == theirs
    assert rollout["is_init"].sum() >= 3


def test_every_episode_is_another_world_and_reseeding_is_building_anew():
    env = make_crafter("reward", seed=5)
    worlds, rollouts = [env.reset()["pixels"]], []
    env.set_seed(6, static_seed=True)
    for again in (env, make_crafter("reward", seed=6)):
        torch.manual_seed(0)
        rollouts.append(again.rollout(40))
    reseeded, new = rollouts
    assert all(torch.equal(reseeded[key], new[key]) for key in new.keys(True, True))
    worlds += [new[0]["pixels"], env.reset()["pixels"]]
    assert not any(torch.equal(worlds[left], worlds[right]) for left, right in ((0, 1), (1, 2), (0, 2)))


def test_10000_frames_truncate_also_within_a_repeat_and_death_terminates_also_at_the_last():
    env = make_crafter("reward", seed=0, action_repeat=2)
    ends = []
    for frame, health in ((9_997, 9), (9_999, 0)):
        tensordict, step = env.reset(), 0
        env.base_env.game._step = frame
        env.base_env.game._player.health = health
        while not tensordict["done"].item():
            tensordict, step = play(env, tensordict, 0), step + 1
        ends.append((step, tensordict["terminated"].item(), tensordict["truncated"].item()))
    assert ends == [(2, False, True), (1, True, False)]
    assert env.base_env.game._step == 10_000


@pytest.mark.parametrize(("task", "reward"), [("reward", 1.0), ("noreward", 0.0)])
def test_an_achievement_is_paid_once_and_reported_until_the_episode_ends(task, reward):
    env = make_crafter(task, seed=0)
    tensordict = env.reset()
    env.base_env.game._player.inventory["sapling"] = 2
    assert not achieved(tensordict)
    seen = []
    for name in ("place_plant", "noop", "move_left", "place_plant", "noop"):
        tensordict = play(env, tensordict, ACTIONS.index(name))
        seen.append(tensordict["reward"].item())
        assert achieved(tensordict) == {"place_plant"}
    assert seen == [reward, 0, 0, 0, 0]
    assert env.base_env.game._player.achievements["place_plant"] == 2  # upstream counts


# -- the score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "score"),
    [
        ([1.0] * 22, 100),
        ([0.0] * 22, 0),
        ([1.0] + [0.0] * 21, 101 ** (1 / 22) - 1),
        ([0.03, 0.0, 0.08], 36 ** (1 / 3) - 1),  # (4 x 1 x 9)^(1/3) - 1
        ([0.5, 1.0], 5151**0.5 - 1),  # sqrt(51 x 101) - 1
    ],
)
def test_the_score_is_the_geometric_mean_of_success_percentages(rates, score):
    assert crafter_score(rates) == pytest.approx(score, abs=1e-9)


def test_scores_come_from_the_metrics_of_episodes_and_survive_pickling():
    metrics = {"achievement_a": [1.0, 0.0], "achievement_b": [1.0, 1.0], "success": [0.0, 0.0]}
    scores = pickle.loads(pickle.dumps(CrafterScores()))
    assert scores([2.1, 0.9], metrics) == {"crafter_score": pytest.approx(5151**0.5 - 1)}
    assert scores([2.1, 0.9], metrics) == {"crafter_score": pytest.approx(5151**0.5 - 1)}  # remembers nothing
    assert scores([], {name: [] for name in metrics}) == {} == scores([1.0], {"success": [1.0]})


def test_the_training_score_counts_all_episodes_so_far_also_after_a_resume():
    scores = CrafterScores(cumulative=True)
    assert scores([], {}) == {}
    assert scores([1.0], {"achievement_a": [1.0], "achievement_b": [0.0]})["crafter_score"] == pytest.approx(
        101**0.5 - 1
    )
    resumed = CrafterScores(cumulative=True)
    resumed.load_state_dict(scores.state_dict())
    for each in (scores, resumed):
        found = each([0.0] * 3, {"achievement_a": [0.0] * 3, "achievement_b": [1.0, 0.0, 0.0]})["crafter_score"]
        assert found == pytest.approx(26.0 - 1)  # a quarter of four episodes each


def test_the_configuration_builds_the_environment_and_its_scores():
    env = config("env=crafter", "env.task=noreward").env
    made = hydra.utils.instantiate(env.make)(seed=1)
    assert made.task == "noreward" and made.base_env.repeat == 1
    metrics = {name: [1.0] for name in made.observation_spec["metrics"].keys()}
    assert hydra.utils.instantiate(env.scores)([0.0], metrics)["crafter_score"] == pytest.approx(100)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"task": "rewards"}, "Crafter has no task 'rewards'. The nearest: reward"),
        ({"task": "no_reward"}, "noreward"),
        ({"image_size": 17}, "image_size=17 is too small.*at least 18"),
        ({"image_size": 0}, "image_size=0"),
        ({"action_repeat": 1.5}, "action_repeat=1.5"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        make_crafter(**{"task": "reward", "seed": 0, **arguments})


def test_the_smallest_image_shows_the_world():
    assert make_crafter("reward", seed=0, image_size=18).reset()["pixels"].float().std() > 20
