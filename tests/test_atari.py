"""Atari games: what the emulator does, seen through the paper's preprocessing, and scores against a human."""

import functools
import importlib.resources

import ale_py
import hydra
import numpy as np
import pytest
import torch
from launcher import config
from omegaconf import OmegaConf
from PIL import Image
from torchrl.envs.utils import check_env_specs

from r2dreamer.envs import check_environment, make_vector_env
from r2dreamer.envs.replay.records import RecordBuilder
from r2dreamer.envs.suites.atari import make_atari
from r2dreamer.envs.suites.atari_scores import SCORES, HumanNormalizedScore
from r2dreamer.examples.training.setup import check_plan


def emulator(game, seed, sticky=0.0, sticky_after=None):
    """The bare emulator in a new game; ``sticky_after`` is set after the game was loaded."""
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", seed)
    if sticky is not None:
        ale.setFloat("repeat_action_probability", sticky)
    ale.loadROM(ale_py.roms.get_rom_path(game))
    if sticky_after is not None:
        ale.setFloat("repeat_action_probability", sticky_after)
    ale.reset_game()
    return ale


def shrunk(screen):
    """Pillow's bilinear image of 64 x 64, as an int array [3, 64, 64]."""
    return (
        np.asarray(Image.fromarray(screen).resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(int)
    )


def act(env, now, choice):
    return env.step(now.set("action", torch.eye(env.action_spec.shape[-1], dtype=torch.int64)[choice]))["next"]


def choices(env, count, seed=0):
    return np.random.default_rng(seed).integers(env.action_spec.shape[-1], size=count).tolist()


def memory(env):
    return env.base_env.ale.getRAM().copy()


def trajectory(env, steps=30, seed=0):
    torch.manual_seed(seed)
    return env.rollout(steps, break_when_any_done=False)


def same(left, right):
    return all(torch.equal(left[key], right[key]) for key in left.keys(True, True))


# -- what is played ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"grayscale": True, "full_actions": True}, {"lives": "discount"}, {"sticky": 0.25}]
)
def test_it_keeps_torchrls_specs_and_the_contract(options):
    env = make_atari("breakout", seed=0, **options)
    check_env_specs(env)
    check_environment(env)
    assert env.observation_spec["pixels"].shape == (1 if "grayscale" in options else 3, 64, 64)
    assert env.action_spec.shape == (18 if "full_actions" in options else 4,)


@pytest.mark.parametrize("game", [*SCORES, "adventure", "tetris"])  # the 26, and two whose screens are others
def test_every_game_builds_and_offers_the_actions_it_reacts_to(game):
    env = make_atari(game, seed=0)
    now = act(env, env.reset(), 0)
    assert now["pixels"].shape == (3, 64, 64) and now["pixels"].float().std() > 1
    assert env.action_spec.shape == (len(emulator(game, 0).getMinimalActionSet()),)


def test_images_rewards_and_the_end_are_the_emulators():
    env = make_atari("breakout", seed=4, noops=0)
    ale = emulator("breakout", 4)
    actions, screens = ale.getMinimalActionSet(), [ale.getScreenRGB()]
    now, flickered, length = env.reset(), 0, 0
    assert abs(now["pixels"].int().numpy() - shrunk(screens[0])).max() <= 1  # Pillow rounds otherwise
    for choice in choices(env, 1000):
        reward = 0.0
        for _ in range(4):
            reward += ale.act(actions[choice])
            screens.append(ale.getScreenRGB())
            if ale.game_over():
                break
        now = act(env, now, choice)
        brighter = np.maximum(screens[-2], screens[-1])
        flickered += abs(shrunk(brighter) - shrunk(screens[-1])).max() > 1
        assert abs(now["pixels"].int().numpy() - shrunk(brighter)).max() <= 1
        assert now["reward"] == reward and np.array_equal(memory(env), ale.getRAM())
        assert now["terminated"] == ale.game_over() and not now["truncated"]
        length += 1
        if ale.game_over():
            break
    assert ale.game_over() and flickered > 10 and len(screens) - 1 < 4 * length  # the last step was a shorter one


def test_grayscale_images_are_the_luminance():
    colour, gray = (make_atari("seaquest", seed=0, noops=0, grayscale=flag).reset()["pixels"] for flag in (False, True))
    luminance = np.asarray(Image.fromarray(colour.permute(1, 2, 0).numpy()).convert("L"))
    assert abs(gray[0].int().numpy() - luminance).max() <= 1


def test_rewards_are_not_clipped():
    rewards = trajectory(make_atari("kangaroo", seed=0), 400)["next", "reward"]
    assert rewards.max() >= 100


def test_a_game_begins_with_zero_to_thirty_idle_frames():
    env = make_atari("freeway", seed=0)
    idle = []
    for _ in range(150):
        env.reset()
        idle.append(env.base_env.ale.getEpisodeFrameNumber())
    first = idle[0]
    ale = emulator("freeway", 0)
    assert ale.getEpisodeFrameNumber() == 0
    assert set(idle) >= {0, 30} and max(idle) == 30 and len(set(idle)) > 25
    env.set_seed(0, static_seed=True)
    pixels = env.reset()["pixels"]
    for _ in range(first):
        ale.act(ale_py.Action.NOOP)
    assert np.array_equal(memory(env), ale.getRAM())
    assert abs(pixels.int().numpy() - shrunk(ale.getScreenRGB())).max() <= 1


def test_the_time_limit_truncates_in_mid_repeat_and_does_not_count_idle_frames():
    env = make_atari("freeway", seed=0, time_limit=10)
    for _ in range(3):
        now = env.reset()
        idle = env.base_env.ale.getEpisodeFrameNumber()
        rollout = env.rollout(9, auto_reset=False, tensordict=now)["next"]
        assert rollout["truncated"].flatten().tolist() == [False, False, True] and not rollout["terminated"].any()
        assert env.base_env.ale.getEpisodeFrameNumber() == idle + 10


# -- lives ------------------------------------------------------------------------------------------------------------


def play_game(lives, actions):
    """A whole game of Breakout in steps of one frame: its images, rewards, flags and lives, resets where it is done."""
    env = make_atari("breakout", seed=0, noops=0, action_repeat=1, lives=lives)
    now, log = env.reset(), []
    for choice in actions:
        now = act(env, now, choice)
        ended, left, frame = now["done"].item(), env.base_env.ale.lives(), now["pixels"]
        log.append((frame, now["reward"].item(), now["terminated"].item(), left))
        if ended:
            now = env.reset()
            log[-1] += (torch.equal(now["pixels"], frame), env.base_env.ale.lives())
        if env.base_env.ale.getEpisodeFrameNumber() == 0:
            break
    return env, log


def test_lives_end_nothing_or_the_episode_or_the_game():
    actions = np.random.default_rng(1).integers(4, size=3000).tolist()
    _, unused = play_game("unused", actions)
    assert [entry[2] for entry in unused].index(True) == len(unused) - 1 and unused[-1][3] == 0
    score = sum(entry[1] for entry in unused)
    assert score > 0

    env, discount = play_game("discount", actions)
    assert len(discount) == len(unused)  # the same game, to the pixel
    assert all(
        torch.equal(left[0], right[0]) and left[1] == right[1] for left, right in zip(discount, unused, strict=True)
    )
    ends = [entry for entry in discount if entry[2]]
    assert [entry[3] for entry in ends] == [4, 3, 2, 1, 0]
    assert [entry[4] for entry in ends] == [True] * 4 + [False]  # the game goes on from where the life was lost
    assert [entry[5] for entry in ends] == [4, 3, 2, 1, 5]

    _, reset = play_game("reset", actions)
    first_end = [entry[2] for entry in discount].index(True)
    assert len(reset) == first_end + 1  # then the emulator is at frame 0 again
    assert reset[-1][2:] == (True, 4, False, 5)


def test_after_a_lost_life_a_second_reset_or_a_new_seed_begins_a_new_game():
    env = make_atari("breakout", seed=0, noops=0, lives="discount")
    for again in (env.reset, lambda: env.set_seed(0, static_seed=True)):
        assert env.rollout(3000)[-1]["next", "terminated"].item()
        if again == env.reset:
            env.reset()
            assert env.base_env.ale.lives() == 4  # goes on
        again()
        env.reset()
        assert env.base_env.ale.lives() == 5 and env.base_env.ale.getEpisodeFrameNumber() == 0


def test_a_lost_life_stops_the_repeat():
    env = make_atari("breakout", seed=0, noops=0, lives="discount", action_repeat=50)
    rollout = env.rollout(100)
    frames = env.base_env.ale.getEpisodeFrameNumber()
    assert rollout[-1]["next", "terminated"].item() and env.base_env.ale.lives() == 4
    assert frames % 50 and frames < 50 * len(rollout)


def test_losing_the_last_life_but_one_counts_also_where_the_emulator_then_says_zero():
    env = make_atari("bank_heist", seed=0, noops=0, lives="discount")
    torch.manual_seed(0)
    left = []
    while not left or not env.base_env.ale.game_over():
        env.rollout(3000)
        left.append(env.base_env.ale.lives())
    assert left == [3, 2, 1, 0, 0]


def test_the_records_of_a_lost_life_say_that_nothing_follows():
    env = make_atari("breakout", seed=0, lives="discount")
    torch.manual_seed(0)
    transitions = env.rollout(300, break_when_any_done=False)
    records = RecordBuilder(1, ["pixels"])(transitions)
    ends = records["next", "terminated"].flatten().nonzero().flatten()
    ends = ends[ends < len(records) - 1]
    assert len(ends) >= 2
    assert records["is_init"][ends + 1].all() and not records["is_init"][ends].any()
    assert torch.equal(records["next", "pixels"][ends[0]], records["next", "pixels"][ends[0] + 1])
    assert records["next", "reward"].sum() == transitions["next", "reward"].sum()


# -- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sticky": 0.25, "noops": 0}], ids=["idle frames", "sticky actions"])
def test_the_seed_decides_also_after_another_one(options):
    make = functools.partial(make_atari, "pong", **options)
    old = make(seed=5)
    first = trajectory(old)
    assert same(first, trajectory(make(seed=5)))
    assert not same(first, trajectory(make(seed=6)))
    old.set_seed(6, static_seed=True)
    assert same(trajectory(old), trajectory(make(seed=6)))


def test_sticky_actions_are_the_emulators():
    env, ale, plain = make_atari("pong", seed=7, noops=0, sticky=0.25), emulator("pong", 7, 0.25), emulator("pong", 7)
    actions = ale.getMinimalActionSet()
    now = env.reset()
    for choice in choices(env, 40):
        now = act(env, now, choice)
        for _ in range(4):
            ale.act(actions[choice])
            plain.act(actions[choice])
    assert np.array_equal(memory(env), ale.getRAM()) and not np.array_equal(memory(env), plain.getRAM())


def test_sticky_actions_turned_off_after_the_game_is_loaded_stay_at_a_quarter():
    """So the published curves were played; env.sticky=0.25 plays the same."""
    env, published = make_atari("pong", seed=7, noops=0, sticky=0.25), emulator("pong", 7, None, sticky_after=0.0)
    now = env.reset()
    for choice in choices(env, 40):
        now = act(env, now, choice)
        for _ in range(4):
            published.act(published.getMinimalActionSet()[choice])
    assert np.array_equal(memory(env), published.getRAM())


@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_one_key_makes_training_and_evaluation_sticky(sticky):
    cfg = config("env=atari100k", *([f"env.sticky={sticky}"] if sticky else []))
    check_plan(cfg)
    assert cfg.env.make.sticky == cfg.env.make_evaluation.sticky == sticky
    with pytest.raises(ValueError, match=r"env\.make\.sticky=0\.5, but env\.sticky=.*say env\.sticky=0\.5"):
        check_plan(config("env=atari100k", "env.make.sticky=0.5"))


def test_workers_play_what_one_process_plays_also_after_reseeding():
    factory = functools.partial(make_atari, "ms_pacman", sticky=0.25)
    serial = make_vector_env(factory, [1, 2], parallel=False)
    parallel = make_vector_env(factory, [1, 2], parallel=True)
    assert same(trajectory(serial), trajectory(parallel))
    for env in (serial, parallel):
        env.reseed([6, 7])
    assert same(trajectory(serial), trajectory(parallel))
    parallel.close()


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_measured_between_random_and_human():
    assert len(SCORES) == 26
    for game, (random, human) in SCORES.items():
        score = HumanNormalizedScore(game)
        assert score([random, random], {}) == {"human_normalized": 0}
        assert score([human], {}) == {"human_normalized": 1}
    # Breakout: 1.7 and 30.5; 16.1 lies half way, the mean of 1.7 and 59.3 is 30.5.
    assert HumanNormalizedScore("breakout")([16.1], {})["human_normalized"] == pytest.approx(0.5)
    assert HumanNormalizedScore("breakout")([1.7, 59.3], {})["human_normalized"] == pytest.approx(1)
    assert HumanNormalizedScore("boxing")([-5.9], {})["human_normalized"] == pytest.approx(-0.5)


def test_games_without_reference_and_single_lives_have_no_score():
    assert HumanNormalizedScore("tetris")([3.0], {}) == {}
    assert HumanNormalizedScore("breakout", lives="discount")([3.0], {}) == {}


# -- bad input and config ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "nearest"), [("Alien", "alien"), ("bankheist", "bank_heist"), ("pongg", "pong")])
def test_an_unknown_game_is_answered_with_the_nearest(task, nearest):
    with pytest.raises(ValueError, match=f"Atari has no task '{task}'.*{nearest}"):
        make_atari(task, seed=0)


def test_a_game_for_two_players_is_refused_instead_of_ending_the_process():
    with pytest.raises(ValueError, match="two players only"):
        make_atari("combat", seed=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lives", "none"), ("sticky", 1.0), ("sticky", -0.1), ("noops", -1), ("noops", 2.5)]
    + [(name, 0) for name in ("image_size", "action_repeat", "time_limit")],
)
def test_mistakes_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        make_atari("pong", seed=0, **{name: value})


def test_the_config_builds_environment_and_score():
    file = importlib.resources.files("r2dreamer.configs") / "env" / "atari100k.yaml"
    cfg = OmegaConf.create({"env": OmegaConf.create(file.read_text())}).env
    assert (cfg.total_frames, cfg.action_repeat, cfg.train_ratio, cfg.num_envs) == (400_000, 4, 128, 1)
    env = hydra.utils.instantiate(cfg.make, _target_="r2dreamer.envs.suites.atari.make_atari")(seed=0)
    assert env.base_env.repeat == 4 and env.base_env.time_limit == 108_000
    score = hydra.utils.instantiate(cfg.scores, _target_="r2dreamer.envs.suites.atari_scores.HumanNormalizedScore")
    assert score([7127.7], {}) == {"human_normalized": 1}
