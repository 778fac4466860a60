"""The probes: their best return is what a player who sees everything gets, and each hides what it claims to hide."""

import pytest
import torch
from torch.nn.functional import one_hot
from torchrl.envs.utils import check_env_specs

from r2dreamer.envs import PROBES, make_probe

VARIANTS = [{}, {"actions": 3}, {"continuous": True}]


def play(env, choose, episodes):
    """Mean return when `choose(env)` gives the choice."""
    total = 0.0
    for _ in range(episodes):
        tensordict, done = env.reset(), False
        while not done:
            choice = choose(env)
            action = torch.tensor([choice - 0.5]) if env.continuous else one_hot(torch.tensor(choice), env.actions)
            tensordict = env.step(tensordict.set("action", action))["next"]
            total += tensordict["reward"].item()
            done = tensordict["done"].item()
    return total / episodes


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("task", PROBES)
def test_a_player_who_sees_everything_gets_the_optimum_and_chance_gets_the_random_return(task, variant):
    env = make_probe(task, seed=1, image_size=16, **variant)
    check_env_specs(env)
    assert play(env, lambda env: env.best_choice(), 3) == pytest.approx(env.optimum)
    torch.manual_seed(0)
    mean = play(env, lambda env: int(torch.randint(env.actions, ())), 120)
    assert mean == pytest.approx(env.random_return, rel=0.25, abs=0.2)
    assert env.random_return < 0.6 * env.optimum


@pytest.mark.parametrize("task", PROBES)
def test_no_blind_policy_with_a_fixed_choice_beats_what_the_probe_asks_for(task):
    env = make_probe(task, seed=2, image_size=16, actions=2)
    best_blind = max(play(env, lambda env, fixed=choice: fixed, 60) for choice in range(2))
    if task in ("reward_from_observation", "remember_first_frame", "small_target"):
        assert best_blind < 0.75 * env.optimum
    else:  # one choice is right all along
        assert best_blind > 0.95 * env.optimum


def test_the_cue_to_remember_is_in_the_first_frame_only():
    env = make_probe("remember_first_frame", seed=0, image_size=16)
    by_cue = {}
    for _ in range(30):
        frames = env.rollout(20)["pixels"]
        by_cue.setdefault(env.cue, frames)
    assert not torch.equal(by_cue[0][0], by_cue[1][0])
    assert torch.equal(by_cue[0][1:], by_cue[1][1:])


def test_leaving_and_late_payments_terminate_and_all_else_truncates():
    env = make_probe("ending", seed=0, image_size=16)
    leave = env.step(env.reset().set("action", torch.tensor([0, 1])))["next"]
    assert leave["terminated"].item() and not leave["truncated"].item() and leave["reward"].item() == 1.5
    for task in PROBES:
        stay = lambda tensordict: tensordict.set("action", torch.tensor([1, 0]))
        last = make_probe(task, seed=0, image_size=16).rollout(99, stay)[-1]["next"]
        late = task in ("delayed_reward", "remember_first_frame")
        assert (last["truncated"].item(), last["terminated"].item()) == (not late, late), task


def test_the_small_target_is_four_white_pixels_in_the_band_of_the_right_choice():
    env = make_probe("small_target", seed=0, actions=4)
    seen, backgrounds = set(), []
    for _ in range(50):
        pixels = env.reset()["pixels"]
        backgrounds.append(torch.where((pixels == 255).all(0), 0, pixels))
        rows, columns = (pixels == 255).all(0).nonzero(as_tuple=True)
        assert len(rows) == 4 and rows.max() - rows.min() == columns.max() - columns.min() == 1
        assert set((columns * 4 // 64).tolist()) == {env.cue}
        seen.add(env.cue)
    assert seen == {0, 1, 2, 3}
    assert all((a != b).any(0).sum() <= 8 for a, b in zip(backgrounds, backgrounds[1:], strict=False))
    assert backgrounds[0].float().std() > 30  # busy


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"task": "delayed_rewards"}, "delayed_reward"),
        ({"actions": 5}, "actions=5"),
        ({"actions": 3, "continuous": True}, "continuous"),
        ({"image_size": 4}, "image_size=4"),
        ({"image_size": 0}, "image_size=0"),
        ({"action_repeat": 2}, "action_repeat=2"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        make_probe(**{"task": "ending", "seed": 0, **arguments})
