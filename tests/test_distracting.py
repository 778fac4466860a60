"""Distracting Control: only images change, as seed, split and difficulty say, and nothing of it stays."""

from r2dreamer.envs.base import gl  # isort: skip

gl.choose_gl()  # first, because dm_control reads the choice when it is imported

# ruff: noqa: E402
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.envs import Compose, DMControlEnv, ParallelEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs

from r2dreamer.envs import (
    DMCDistracting,
    DMCSubtle,
    RenderPixels,
    check_environment,
    make_dmc_distracting,
    make_vector_env,
)
from r2dreamer.envs.control.distracting import BACKGROUNDS, SCALES, Background, DistractedRender, Distracting
from r2dreamer.envs.control.hooks import find
from r2dreamer.envs.control.subtle import SmallRender
from r2dreamer.envs.control.textures import NUMBERS, Waves, films

SIZE, STEPS = 32, 3


def made(*transforms, task=("reacher", "easy")):
    return TransformedEnv(DMControlEnv(*task, frame_skip=2), Compose(*transforms, RenderPixels(SIZE)))


def made_distracted():
    return made(DMCDistracting())


def played(env, seed=3, steps=STEPS):
    """Everything of two episodes after a seed, with actions of its own."""
    env.set_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    episodes = []
    for _ in range(2):
        now, seen = env.reset(), []
        for _ in range(steps):
            now["action"] = torch.rand(env.action_spec.shape, generator=generator, dtype=torch.float64) * 2 - 1
            before, now = env.step_and_maybe_reset(now)
            seen.append(before["next"])
        episodes += seen
    return torch.stack(episodes)


def model_of(env):
    return env.base_env._env.physics.model


@pytest.fixture(scope="module")
def stock():
    env = made()
    yield env
    env.close()


@pytest.fixture(scope="module")
def distracted():
    env = made(DMCDistracting(difficulty="hard"))
    yield env
    env.close()


@pytest.fixture(scope="module")
def film(distracted):
    return played(distracted)


def same_but_for_pixels(ours, theirs):
    keys = [key for key in theirs.keys(True, True) if key != "pixels"]
    assert "reward" in keys and all(torch.equal(ours[key], theirs[key]) for key in keys)
    assert (ours["pixels"] != theirs["pixels"]).flatten(1).any(1).all()


def test_states_and_rewards_are_the_stock_tasks_to_the_bit_while_every_image_differs(stock, film):
    same_but_for_pixels(film, played(stock))


def test_the_same_seed_gives_the_same_film_and_another_seed_another(distracted, film):
    again = played(distracted)["pixels"]
    assert torch.equal(again, film["pixels"])
    assert not torch.equal(played(distracted, seed=4)["pixels"], film["pixels"])
    first, second = film["pixels"][:STEPS], film["pixels"][STEPS:]
    assert (first != second).flatten(1).any(1).all()  # and two episodes of a seed are not alike


def test_nothing_of_it_stays_in_the_model_when_an_image_is_drawn(stock, distracted, film):
    ours, plain = model_of(distracted), model_of(stock)
    for field in ("mat_rgba", "geom_rgba", "tex_data", "tex_width", "tex_height", "cam_pos", "cam_quat", "cam_fovy"):
        assert np.array_equal(getattr(ours, field), getattr(plain, field)), field
    data = distracted.base_env._env.physics.data
    poses = data.cam_xpos.copy(), data.cam_xmat.copy()
    distracted.base_env._env.physics.render(SIZE, SIZE, camera_id=0)
    assert np.array_equal(poses[0], data.cam_xpos) and np.array_equal(poses[1], data.cam_xmat)


def test_an_image_follows_from_the_moment_and_not_from_how_often_it_is_drawn(distracted):
    physics = distracted.base_env._env.physics
    distracted.reset()
    one, two = (physics.render(SIZE, SIZE, camera_id="fixed") for _ in range(2))
    assert np.array_equal(one, two)


@pytest.mark.parametrize("axis", ["background", "colour", "camera"])
def test_each_axis_alone_changes_images_and_moves_only_when_dynamic(axis, stock):
    others = dict.fromkeys({"background", "colour", "camera"} - {axis}, False)
    env = made(DMCDistracting(**others, difficulty="hard"))
    same_but_for_pixels(moving := played(env), played(stock))
    still = made(DMCDistracting(**others, difficulty="hard", dynamic=False))
    assert not torch.equal(played(still)["pixels"], moving["pixels"])
    still.reset()
    physics = still.base_env._env.physics
    image = physics.render(SIZE, SIZE, camera_id=0)
    physics.data.time += 1
    assert np.array_equal(physics.render(SIZE, SIZE, camera_id=0), image)
    env.close(), still.close()


def test_it_goes_with_subtle_in_either_order(stock):
    subtle = lambda: DMCSubtle(shrink=1 / 8, physics="frozen")
    one, two = made(subtle(), DMCDistracting()), made(DMCDistracting(), subtle())
    ours = played(one)
    assert torch.equal(ours["pixels"], played(two)["pixels"])
    same_but_for_pixels(ours, played(stock))
    alone = made(DMCDistracting())
    same_but_for_pixels(ours, played(alone))  # the target is smaller
    for env in (one, two):
        render = env.base_env._env.physics.render
        assert find(find(render, "render", SmallRender).render, "render", SmallRender) is None
        assert find(find(render, "render", DistractedRender).render, "render", DistractedRender) is None
    for env in (one, two, alone):
        env.close()


def test_specs_hold_alone_in_workers_and_in_our_vector_environment(distracted):
    check_env_specs(distracted)
    workers = ParallelEnv(1, made_distracted, mp_start_method="spawn")  # a fork would share this process' renderer
    assert workers.rollout(2)["next", "pixels"].shape == (1, 2, 3, SIZE, SIZE)
    workers.close()
    make = partial(make_dmc_distracting, "reacher_easy", image_size=SIZE)
    alone = make(seed=7)
    check_environment(alone)
    vector = make_vector_env(make, [7, 8], parallel=False)
    assert vector.rollout(2)["next", "pixels"].shape == (2, 2, 3, SIZE, SIZE)
    vector.close(), alone.close()


def test_the_splits_never_share_a_background_and_harder_means_more_of_them(distracted):
    pictures = {number: Waves(number, 16).frame(0).tobytes() for split in NUMBERS.values() for number in split}
    assert len(set(pictures.values())) == len(pictures) == 90
    assert not set(NUMBERS["train"]) & set(NUMBERS["val"])
    physics, chosen = distracted.base_env._env.physics, {}
    for split in NUMBERS:
        for difficulty in SCALES:
            settings = Distracting(True, False, False, difficulty, True, split, None)
            seen = {
                Background(np.random.default_rng(seed), physics, settings).texture.palette.tobytes()
                for seed in range(60)
            }
            chosen[split, difficulty] = seen
            assert difficulty == "hard" or len(seen) == BACKGROUNDS[difficulty]
    assert not chosen["train", "hard"] & chosen["val", "hard"] and len(chosen["train", "hard"]) > 20


def test_frames_of_a_folder_are_films_and_are_split(tmp_path, stock):
    image = pytest.importorskip("PIL.Image")
    for number in range(4):
        (tmp_path / f"film{number}").mkdir()
        for frame in range(3):
            colour = (60 * number, 80 * frame, 200)
            image.new("RGB", (40, 30), colour).save(tmp_path / f"film{number}" / f"{frame}.png")
    train, val = (films(tmp_path, split) for split in ("train", "val"))
    assert [files[0].parent.name for files in train + val] == ["film0", "film2", "film3", "film1"]
    single = [films(tmp_path / "film0", split) for split in ("train", "val")]
    assert [[file.stem for file in part[0]] for part in single] == [["0", "1"], ["2"]]
    env = made(DMCDistracting(frames=tmp_path, split="val", colour=False, camera=False))
    sky = played(env)["pixels"]
    assert (sky[:, 2] == 200).flatten(1).any(1).all()
    assert set(sky[:, 0, 2, 2].tolist()) == {60}  # the corner shows the wall
    env.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"difficulty": "eazy"}, "The nearest: easy"),
        ({"split": "test"}, "must be one of train, val"),
        ({"background": False, "colour": False, "camera": False}, "nothing to do"),
        ({"frames": "/nowhere"}, "Name a folder of folders"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(arguments, said):
    with pytest.raises(ValueError, match=said):
        DMCDistracting(**arguments)


def test_a_frame_that_is_no_image_and_an_image_too_large_are_named_and_no_renderer_is_blamed(tmp_path, stock):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"\d\.png is a frame of a background and cannot be read as an image"):
        made(DMCDistracting(frames=tmp_path)).reset()
    with pytest.raises(ValueError, match="An image of 512x512 is larger than .* 640x480: render at most 480"):
        TransformedEnv(stock.base_env, RenderPixels(512)).reset()
    with pytest.raises(ValueError, match=r"size=\(48, 64\) must be a whole number"):
        RenderPixels((48, 64))


def test_one_environment_has_one_set_of_distractions(distracted):
    with pytest.raises(ValueError, match="Build a new environment"):
        TransformedEnv(distracted.base_env, DMCDistracting(difficulty="medium"))
    with pytest.raises(ValueError, match="of this process"):
        TransformedEnv(ParallelEnv(1, made), DMCDistracting())


def test_an_image_costs_at_most_1_3_times_the_stock_one(stock, distracted):
    """In processor time of this process, alternating, so that a busy machine does not decide."""
    renders = [env.base_env._env.physics.render for env in (stock, distracted)]
    data = distracted.base_env._env.physics.data
    for env in (stock, distracted):
        env.reset()

    def cost(render):
        begin = time.process_time()
        render(64, 64, camera_id=0)
        return time.process_time() - begin

    ratios = []
    for _ in range(15):
        plain = cost(renders[0])
        data.time += 0.04  # another frame of the film
        ratios.append(cost(renders[1]) / plain)
    assert statistics.median(ratios) <= 1.3, ratios


def test_the_code_of_the_guide_runs():
    guide = Path(__file__).parent.parent / "examples" / "guides" / "distracting.md"
    names = {}
    exec(guide.read_text().partition("```python\n")[2].partition("```")[0], names)
    assert names["pixels"].shape == (3, 64, 64)
    names["env"].close()
