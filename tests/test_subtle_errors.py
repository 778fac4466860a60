"""What DMCSubtle says to a size, a name or an environment that it cannot work with."""

import re
import sys
from functools import partial

import pytest
from subtle_oracle import assert_same, run, stock, subtle, trajectory
from subtle_user import RENAMED, SMALLER, user_env, written
from torchrl.envs import DMControlEnv, GymEnv, ParallelEnv, SerialEnv, TransformedEnv

from r2dreamer.envs import DMCSubtle, RenderPixels, make_dmc, make_dmc_subtle
from r2dreamer.examples import contact_sheet


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
        (user_env, {"geoms": "trunk", **SMALLER, "xml": "model.xml"}, "xml='model.xml' is no XML.*read_text"),
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "dmc_distracting", "--shrink", "1/20"], "--shrink 1/20 is of --suite dmc_subtle"),
        (["--size", "0"], "--size 0 must be at least 1"),
        (["--out", "sheet.txt"], "must end like a picture"),
        (["--shrink", "7"], "shrink='7' must be a number above 0 and at most 1"),
    ],
)
def test_a_contact_sheet_that_cannot_be_drawn_is_refused(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["contact_sheet.py", *arguments])
    with pytest.raises(SystemExit) as left:
        contact_sheet.main()
    assert says in f"{left.value} {capsys.readouterr().err}" and not any(tmp_path.iterdir())


def test_an_image_is_rendered_of_a_control_environment_alone():
    gym = GymEnv("CartPole-v1")
    for env, name in ((gym, "GymEnv"), (SerialEnv(2, partial(stock, "reacher")), "SerialEnv")):
        with pytest.raises(ValueError, match=f"RenderPixels works on a DMControlEnv.*not on {name}.*inside its worker"):
            TransformedEnv(env, RenderPixels(16)).reset()
    ours = make_dmc("reacher_easy", seed=0, from_pixels=False)
    assert TransformedEnv(ours, RenderPixels(16)).reset()["pixels"].shape == (3, 16, 16)
