"""What an attack is made of beside its loss: windows of clean episodes, the search, paired episodes, the report."""

import functools
from contextlib import closing

import numpy as np
import pytest

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
from agents import tiny_agent
from omegaconf import OmegaConf
from tensordict import TensorDict
from test_attack_loss import agent_loss, opinionated, patch_of
from torchrl.envs import StepCounter, TransformedEnv

from r2dreamer.envs import make_probe, make_vector_env
from r2dreamer.examples.attack import controls, play
from r2dreamer.examples.attacks.gallery import overlay, side_by_side
from r2dreamer.examples.attacks.report import compare, markdown, paired_difference, percent_drop, verdict
from r2dreamer.examples.attacks.search import Windows, collect_episodes, measure, optimize
from r2dreamer.examples.cli.script import Interrupt
from r2dreamer.examples.training.episodes import Episode
from r2dreamer.examples.training.evaluation import EvaluationResult
from r2dreamer.examples.training.loading import Trained
from r2dreamer.losses import total_loss

PROBE = functools.partial(make_probe, "remember_first_frame", image_size=16)


def uneven(seed):
    """Every frame shows another cue; an episode lasts two steps more than its seed says, 8 at most."""
    probe = make_probe("reward_from_observation", seed=seed, image_size=16)
    return TransformedEnv(probe, StepCounter(max_steps=seed + 2))


@pytest.fixture(scope="module")
def agent():
    return opinionated(tiny_agent(vectors=False, discrete=True))


@pytest.fixture(scope="module")
def episodes(agent):
    with closing(make_vector_env(uneven, [3, 5, 7], parallel=False)) as environments:
        return collect_episodes(environments, agent, max_steps=7, seed=1)


# -- windows -------------------------------------------------------------------------------------------------------------


def test_episodes_become_records_of_what_the_agent_saw_did_and_thought(agent, episodes):
    # Whole episodes, though others go on; the last is cut off.
    assert [len(episode) for episode in episodes] == [5, 7, 7]
    for seed, records in zip([3, 5, 7], episodes, strict=True):
        assert records["is_init"].flatten().tolist() == [True] + [False] * (len(records) - 1)
        env = uneven(seed)
        root = env.reset()
        for record in records:
            if not record["is_init"]:  # the action that led to the observation
                root = env.step(root.set("action", record["action"].long()))["next"]
            assert torch.equal(record["next", "pixels"], root["pixels"])
        assert set(records["next"].keys()) == {"pixels"}


def test_a_window_begins_with_the_beliefs_the_agent_had_there(agent, episodes):
    records = episodes[1]
    window = Windows(records, 3).at(torch.tensor([1]))  # records 1, 2, 3; the agent's belief at 1 is in record 2
    found = agent.world_model(window.clone())["next", "belief"][0, 0]
    assert torch.allclose(found, records["belief"][2], atol=1e-5)
    assert not torch.allclose(found, records["belief"][1], atol=1e-2)


def test_windows_are_drawn_from_everywhere_and_spread_evenly():
    records = TensorDict({"count": torch.arange(10)}, [10])
    windows = Windows(records, 4)
    drawn = windows.sample(200, torch.Generator().manual_seed(0))["count"]
    assert drawn.shape == (200, 4) and (drawn.diff(dim=1) == 1).all()
    assert drawn[:, 0].unique().tolist() == list(range(7))
    assert windows.spread(4)["count"][:, 0].tolist() == [0, 2, 4, 6]
    assert windows.spread(100)["count"][:, 0].tolist() == list(range(7))
    with pytest.raises(ValueError, match="fewer than context=11"):
        Windows(records, 11)


# -- the search ----------------------------------------------------------------------------------------------------------

SEARCH = {"steps": 8, "batch_size": 3, "lr": 0.3, "final_lr_fraction": 0.1, "eval_every": 1}
SMOOTH = {"w_return": 0.1, "w_kl": 1.0}  # the return of an agent that has learnt nothing is too rough for eight steps


def search_for(agent, episodes, patch=None, precision=torch.float32, interrupt=None, loss=None, **settings):
    loss = agent_loss(agent, patch_of(hw=(8, 8), seed=4) if patch is None else patch, **(loss or SMOOTH))
    held_out = Windows(episodes[1], 4).spread(3).split(2)
    found = optimize(
        loss,
        Windows(torch.cat(episodes[::2]), 4),
        held_out,
        OmegaConf.create({"optimize": SEARCH | settings, "seed": 0, "progress": False}),
        precision=precision,
        interrupt=Interrupt() if interrupt is None else interrupt,
        title="",
    )
    return found, loss, held_out


def test_the_patch_kept_is_the_one_that_was_scored_on_all_windows_held_out(agent, episodes):
    found, loss, held_out = search_for(agent, episodes)
    scores = [point["loss"] for point in found.curve]
    assert [point["step"] for point in found.curve] == list(range(9)) and len(set(scores)) > 5
    assert found.score == min(scores) < scores[0] and found.step == scores.index(min(scores))
    loss.patch.delta.data.copy_(found.patch.delta)
    assert measure(loss, held_out, torch.float32, 0)["loss"] == found.score  # neither one update earlier nor later
    one_batch = measure(loss, held_out[:1], torch.float32, 0)["loss"]
    assert one_batch != found.score
    torch.manual_seed(0)
    by_hand = 0.0
    with torch.no_grad():
        for batch in held_out:
            by_hand += total_loss(loss(batch)).item() * len(batch) / 3
    assert found.score == pytest.approx(by_hand, rel=1e-5)
    assert (
        found.curve[-1]["training_loss"] is not None and found.patch.delta.min() >= 0 and found.patch.delta.max() <= 1
    )


def test_a_score_that_is_no_number_ends_the_search(agent, episodes, monkeypatch):
    monkeypatch.setattr(
        "r2dreamer.examples.attacks.search.total_loss", lambda losses: total_loss(losses) * float("nan")
    )
    with pytest.raises(FloatingPointError, match="held out is nan at step 0"):
        search_for(agent, episodes)


def test_a_search_repeats_and_an_interrupted_one_keeps_the_best_so_far(agent, episodes):
    first, *_ = search_for(agent, episodes)
    again, *_ = search_for(agent, episodes)
    assert torch.equal(first.patch.delta, again.patch.delta) and first.curve == again.curve

    class AfterThree:
        asked = 0

        @property
        def requested(self):
            self.asked += 1
            return self.asked > 3

    stopped, *_ = search_for(agent, episodes, interrupt=AfterThree())
    assert len(stopped.curve) == 4 and stopped.score == min(point["loss"] for point in first.curve[:4])


def test_measuring_neither_draws_from_the_patch_nor_from_the_generators(agent, episodes):
    patch = patch_of(hw=(3, 3), placement="random", eot_translations=2)
    loss = agent_loss(agent, patch)
    held_out = Windows(episodes[0], 4).spread(5).split(2)
    torch.manual_seed(0)
    before = patch.draws, torch.random.get_rng_state()
    one, other = (measure(loss, held_out, torch.float32, 7) for _ in range(2))
    assert one == other and patch.draws == before[0] and torch.equal(torch.random.get_rng_state(), before[1])
    assert measure(loss, held_out, torch.float32, 8) != one


def test_half_precision_finds_a_patch_too(agent, episodes):
    found, *_ = search_for(agent, episodes, precision=torch.bfloat16)
    assert found.score < found.curve[0]["loss"] and found.patch.delta.dtype == torch.float32


# -- paired episodes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(agent):
    trained = Trained(agent, None, None, 0, PROBE)
    environments = make_vector_env(PROBE, [11, 13, 17], parallel=False)
    yield lambda patch, seeds=(11, 13, 17), **more: play(
        environments, trained, patch, list(seeds), key="pixels", seed=2, **more
    )
    environments.close()


def test_all_conditions_play_the_same_episodes_and_an_identity_patch_changes_none(played):
    clean = played(None)
    assert played(None).returns == clean.returns and np.array_equal(played(None).frames, clean.frames)
    identity = played(patch_of((16, 16), mode="perturb", eps=0.5, delta=0.0))
    assert identity.returns == clean.returns and np.array_equal(identity.frames, clean.frames)
    black = played(patch_of((16, 16), delta=0.0))
    assert black.frames.max() == 0 and played(None, max_steps=3).lengths == [3, 3, 3]
    assert played(None).returns == clean.returns  # what was pasted before is gone


def test_frames_are_saved_as_the_agent_saw_them(played):
    patch = patch_of((4, 6), seed=9)
    clean, patched = played(None), played(patch)
    shown = (patch.content().detach() * 255).round().byte().numpy()
    assert patched.frames.shape == (9, 16, 16, 3)
    assert (patched.frames[:, 12:, 5:11] == shown).all()
    assert np.array_equal(patched.frames[0, :12], clean.frames[0, :12])
    late = played(patch_of((4, 6), delta=1.0, onset=3)).frames
    assert (late[3:, 12:, 5:11] == 255).all() and np.array_equal(late[:3], clean.frames[:3])


def test_random_places_are_the_same_for_every_patch(played):
    places = [
        (played(patch_of((4, 6), delta=value, placement="random", seed=3)).frames[2] == value * 255).all(-1)
        for value in (0.0, 1.0)
    ]
    assert np.array_equal(*places) and places[0].sum() == 24


def test_controls_have_the_size_place_and_bounds_of_the_patch():
    patch = patch_of((4, 6), seed=9)
    found = controls(patch, seed=0)
    assert list(found) == ["grey", "black", "white", "noise", "shuffled"]
    assert (
        (found["grey"].content() == 0.5).all()
        and (found["black"].content() == 0).all()
        and (found["white"].content() == 1).all()
    )
    assert 0 <= found["noise"].delta.min() < 0.1 and 0.9 < found["noise"].delta.max() <= 1
    rows = lambda each: sorted(map(tuple, each.content().flatten(0, 1).tolist()))
    assert rows(found["shuffled"]) == rows(patch) and not torch.equal(found["shuffled"].delta, patch.delta)
    assert all(each.settings == patch.settings and each.patch_hw == (4, 6) for each in found.values())
    sticker = controls(patch_of((4, 6), mode="eps", eps=0.1, base=0.05), seed=0)
    assert sticker["black"].content().min() == 0 and sticker["noise"].content().max() <= 0.15 + 1e-6
    identity = controls(patch_of((4, 6), mode="perturb", eps=0.1), seed=0)["grey"]
    image = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(identity.paste(image, identity.corners(2, (16, 16))), image / 255)


# -- the report ----------------------------------------------------------------------------------------------------------


def result(*returns):
    return EvaluationResult([Episode(value, 1, {}) for value in returns])


def test_differences_are_paired_by_episode():
    # Unpaired these two overlap: what differs is the same in each episode.
    one, other = [1.0, 11.0, 21.0, 31.0], [2.0, 12.0, 22.0, 32.0]
    assert paired_difference(one, other) == {"mean": -1.0, "low": -1.0, "high": -1.0}
    generator = np.random.default_rng(0)
    noise = generator.normal(-0.5, 1.0, 400)
    found = paired_difference(list(noise), [0.0] * 400)
    half = 1.96 * noise.std() / 20
    assert found["mean"] == pytest.approx(noise.mean())
    assert found["low"] == pytest.approx(noise.mean() - half, abs=0.02)
    assert found["high"] == pytest.approx(noise.mean() + half, abs=0.02)
    assert paired_difference(list(noise), [0.0] * 400) == found
    with pytest.raises(ValueError, match="not paired"):
        paired_difference(one, other[:3])
    assert percent_drop(-15.0, -10.0) == 50 and percent_drop(3.0, 4.0) == 25 and percent_drop(1.0, 0.0) is None


def test_the_verdict_counts_only_intervals_that_lie_below_zero():
    results = {
        "clean": result(9, 9, 9),
        "optimized": result(1, 3, 2),
        "grey": result(8, 9, 9),
        "black": result(2, 1, 3),
        "noise": result(9, 8, 8),
    }
    drops = {"clean": {"percent_drop": 12.0}, "patched": {"percent_drop": None}}
    conditions = compare(results, dict.fromkeys(results, drops))
    assert conditions["optimized"]["percent_drop"] == pytest.approx(100 * 7 / 9)
    assert conditions["grey"]["optimized_minus_this"]["mean"] == pytest.approx(-20 / 3)
    assert verdict(conditions) == (
        "The optimised patch: lower real return than grey, noise; not shown to be lower than black; "
        "no patch of another agent was given (other=DIR)."
    )
    lines = markdown(conditions).splitlines()
    assert len(lines) == 7 and all(line.count("|") == 7 for line in lines)
    assert lines[2].startswith("| clean | 9 ± 0 |  | -7 [-8, -6] |")
    assert lines[3] == "| optimized | 2 ± 0.816 | 77.8 % |  | 12.0 % |  |"


def test_films_of_unequal_length_stand_side_by_side_and_overlays_mark_the_object():
    films = [np.full((length, 4, 6, 3), value, np.uint8) for length, value in ((3, 10), (5, 20))]
    films[0][2] = 11
    film = side_by_side(films)
    assert film.shape == (5, 4, 16, 3)
    assert (film[4, :, :6] == 11).all() and (film[0, :, 10:] == 20).all() and (film[:, :, 6:10] == 255).all()
    heat, mask = torch.zeros(5, 5), np.zeros((5, 5), bool)
    heat[0, 0], mask[1:4, 1:4] = 1.0, True
    image = overlay(np.full((5, 5, 3), 100, np.uint8), heat, mask)
    assert image[0, 0].tolist() == [255, 40, 20] and image[0, 4].tolist() == [60, 60, 60]
    assert image[1, 1].tolist() == [30, 230, 90] and image[2, 2].tolist() == [60, 60, 60]
