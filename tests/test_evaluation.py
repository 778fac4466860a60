"""Evaluation plays whole first episodes greedily, carries the policy's memory, and touches nothing else."""

import functools
import json
import random

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, ParallelEnv, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, exploration_type

from r2dreamer.examples.training import evaluation
from r2dreamer.examples.training.episodes import EpisodeReturns
from r2dreamer.examples.training.evaluation import evaluate


class Countdown(EnvBase):
    """Episodes of `length` steps, then of one more each time; the reward is the action; shows the time as an image."""

    def __init__(self, length, pixels=True):
        super().__init__(device="cpu")
        self.length, self.pixels, self.time, self.episode = length, pixels, 0, -1
        spec = {"time": Unbounded(1), "metrics": Composite(success=Unbounded(1))}
        if pixels:
            spec["pixels"] = Bounded(0, 255, (3, 4, 6), dtype=torch.uint8)
        self.observation_spec = Composite(spec)
        self.action_spec = Bounded(-100, 100, (1,))
        self.reward_spec = Unbounded(1)

    def _observation(self):
        success = {"success": torch.tensor([float(self.time == 2)])}
        values = {"time": torch.tensor([float(self.time)]), "metrics": TensorDict(success)}
        if self.pixels:
            values["pixels"] = torch.full((3, 4, 6), self.time, dtype=torch.uint8)
        return values

    def _reset(self, tensordict=None, **_):
        self.time, self.episode = 0, self.episode + 1
        return TensorDict({**self._observation(), "done": torch.zeros(1, dtype=torch.bool)})

    def _step(self, tensordict):
        self.time += 1
        done = torch.tensor([self.time >= self.length + self.episode])
        return TensorDict({**self._observation(), "reward": tensordict["action"].clone(), "done": done})

    def _set_seed(self, seed):
        pass


def short():
    return TransformedEnv(Countdown(2), InitTracker())


def long():
    return TransformedEnv(Countdown(4), InitTracker())


class CountingPolicy(TensorDictModuleBase):
    """Its action is how many steps it remembers, so returns are 1 + 2 + ... + n only if its memory is carried."""

    in_keys, out_keys = ["time", "is_init"], ["action", "belief"]

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
        self.layers[1].eval()

    def forward(self, tensordict):
        assert exploration_type() == ExplorationType.DETERMINISTIC
        assert not torch.is_grad_enabled() and not self.training and not self.layers.training
        torch.rand(3), np.random.rand(), random.random()  # a policy that samples its latents
        belief = tensordict.get("belief", torch.zeros_like(tensordict["time"]))
        belief = torch.where(tensordict["is_init"], 0.0, belief) + 1
        assert (belief == tensordict["time"] + 1).all()
        return tensordict.set("belief", belief).set("action", belief)


@pytest.mark.parametrize("kind", [SerialEnv, functools.partial(ParallelEnv, mp_start_method="fork")])
def test_first_episode_of_each_environment(kind):
    env = kind(2, [short, long])
    try:
        result = evaluate(env, CountingPolicy(), episodes=2, record=True)
        again = evaluate(env, CountingPolicy(), episodes=2)
    finally:
        env.close()
    # The short one ends twice before the long one ends once; its second episode does not count.
    assert result.returns == [3.0, 10.0] and result.lengths == [2, 4]
    assert [episode.metrics for episode in result.episodes] == [{"success": 1.0}, {"success": 1.0}]
    assert result.frames.shape == (3, 4, 6, 3) and result.frames.dtype == np.uint8
    assert result.frames[:, 0, 0, 0].tolist() == [0, 1, 2]  # with the first and the terminal observation
    assert result.mean == 6.5 and result.std == 3.5 and result.summary()["eval/length"] == 3
    assert result.summary()["eval/success"] == 1.0 and result.summary()["eval/return"] == 6.5
    assert again.lengths[0] > 2  # what it left in mid-episode was reset


def test_fewer_environments_than_episodes_play_several_rounds():
    env = SerialEnv(2, [short, long])
    result = evaluate(env, CountingPolicy(), episodes=3)
    assert len(result.returns) == 3 and result.lengths[:2] == [2, 4] and result.frames is None


def test_one_unbatched_environment_without_is_init_or_pixels():
    env = Countdown(3, pixels=False)
    result = evaluate(env, CountingPolicy(), episodes=2, record=True)
    assert result.returns == [6.0, 15.0] and result.lengths == [3, 5]  # an episode that ends is reset, then all are
    assert result.frames is None


def test_max_steps_cuts_an_episode_off():
    result = evaluate(SerialEnv(2, [short, long]), CountingPolicy(), episodes=2, max_steps=3)
    assert result.lengths == [2, 3] and [episode.cut_off for episode in result.episodes] == [False, True]


def test_generators_and_training_modes_are_left_alone():
    policy = CountingPolicy()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for seed in (None, 3):
        evaluate(SerialEnv(2, [short, long]), policy, episodes=2, seed=seed)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    assert policy.training and policy.layers.training and not policy.layers[1].training


def test_generators_are_restored_when_the_policy_fails():
    class Failing(CountingPolicy):
        def forward(self, tensordict):
            super().forward(tensordict)
            raise RuntimeError("as planned")

    policy, state = Failing(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="as planned"):
        evaluate(SerialEnv(1, short), policy, episodes=1)
    assert torch.equal(torch.get_rng_state(), state) and policy.training


def test_the_seed_decides_what_the_policy_samples():
    class Sampling(CountingPolicy):
        def forward(self, tensordict):
            return tensordict.set("action", torch.randn_like(tensordict["time"]))

    def returns(seed):
        return evaluate(SerialEnv(2, [short, long]), Sampling(), episodes=2, seed=seed).returns

    first = returns(1)
    torch.rand(5)
    assert returns(1) == first != returns(2)


def test_stops_before_the_next_step_when_asked():
    asked = iter([False, False, False, True, True])  # before the round, and before each step
    result = evaluate(SerialEnv(2, [short, long]), CountingPolicy(), episodes=4, stop=lambda: next(asked))
    assert result.lengths == [2, 2]


def test_refuses_no_episodes():
    with pytest.raises(ValueError, match="episodes=0"):
        evaluate(Countdown(1), CountingPolicy(), episodes=0)


def test_training_episodes_sum_up_with_metrics_and_the_suites_own_scores():
    best = lambda returns, metrics: {"best": max(returns), "successes": sum(metrics["success"])}
    episodes = EpisodeReturns(2, best)
    reward = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])[..., None]
    done = torch.tensor([[False, True, False], [False, False, True]])[..., None]
    success = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])[..., None]
    batch = TensorDict({"next": {"reward": reward, "done": done, "metrics": {"success": success}}}, [2, 3])
    episodes.add(batch)
    restored = EpisodeReturns(2, best)
    restored.load_state_dict(json.loads(json.dumps(episodes.state_dict())))
    for each in (episodes, restored):
        line = each.pop()
        assert line.pop("train/episodes") == 2 and each.pop() == {}
        assert line == {
            "train/return": (3 + 56) / 2,
            "train/length": 2.5,
            "train/success": 0.5,
            "train/best": 56,
            "train/successes": 1,
        }
    episodes.add(batch)  # the first environment was in mid-episode, with 4 so far and no success in it
    assert episodes.pop()["train/return"] == (4 + 3 + 56) / 2


def test_a_film_is_not_longer_than_anybody_watches(monkeypatch):
    monkeypatch.setattr(evaluation, "LONGEST_FILM", 2)
    assert len(evaluate(SerialEnv(2, [short, long]), CountingPolicy(), episodes=2, record=True).frames) == 2
