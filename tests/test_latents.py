"""examples/latents.py: readouts score what features hold and no more, on a toy whose image shows one fact and hides another."""

import json
import re
import shutil

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import numpy as np
import pytest
import torch
from agents import tiny_agent
from launcher import TINY, config, train_here
from tensordict import TensorDict

from r2dreamer.envs import make_dmc, make_dmc_subtle
from r2dreamer.envs.base.contract import apply_contract
from r2dreamer.envs.base.simulator import Simulator
from r2dreamer.examples import latents
from r2dreamer.examples.readout.facts import facts
from r2dreamer.examples.readout.recording import record
from r2dreamer.examples.readout.report import markdown
from r2dreamer.examples.readout.ridge import heldout_r2
from r2dreamer.examples.readout.scores import baseline_scores, model_scores, train_world_model, varying
from r2dreamer.examples.training.setup import build

SIZE = 16
RECORD = dict(episodes=120, steps=6, lead=2, keep=0.5)


class Square(Simulator):
    """A bright square that stands still in an episode: its place is shown; a number is hidden; `acted` is the last action."""

    def __init__(self, ends=100):
        super().__init__(observations={"pixels": (3, SIZE, SIZE)}, actions=(np.full(2, -1), np.full(2, 1)))
        self.ends = ends
        self.set_seed(0, static_seed=True)

    def seed(self, number):
        self.random = np.random.default_rng(number)

    def begin(self):
        self.place, self.hidden = self.random.integers(SIZE - 3, size=2), self.random.normal(size=1)
        self.acted = np.zeros(2)
        return self.observe()

    def advance(self, action):
        self.acted = action
        return self.observe(), float(action[0]), False, self.step_count >= self.ends

    def observe(self):
        pixels = np.zeros((3, SIZE, SIZE), np.uint8)
        x, y = self.place
        pixels[:, y : y + 4, x : x + 4] = 255
        return {"pixels": pixels}

    def facts(self):
        return {"shown": self.place, "hidden": self.hidden, "acted": self.acted}


def square(ends=100):
    return Square(ends)


TOY = ["experiment=latents", "env=custom", "env.factory=test_latents:square", "model.belief=32", "model.hidden=12",
       "model.classes=4", "model.categoricals=8", "model.depth=2", "model.encoder_multipliers=[2,4]", "env.parallel=false"]  # fmt: skip


@pytest.fixture(scope="module")
def recording():
    return record(apply_contract(square(), "square", 0), ["pixels"], 0, **RECORD)


def agent_of(member):
    run = config(*TOY, f"algorithm={member}")
    return build(lambda seed: apply_contract(square(), "square", seed), run, torch.device("cpu"))[0], run


def test_a_readout_finds_what_is_linear_and_scores_nothing_for_noise():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 4, 9, generator=generator)
    weights = torch.nn.functional.normalize(torch.randn(9, 2, generator=generator), dim=0)
    linear = features @ weights + 3  # of variance 1, as the noise
    noise = torch.randn(200, 4, 2, generator=generator)
    wide = torch.cat([features, torch.zeros(200, 4, 800)], -1)  # more features than samples
    for given in (features, wide):
        assert heldout_r2(given, linear, 160)["r2"] > 0.999
    half = heldout_r2(features, linear + noise, 160)
    assert 0.35 < half["low"] < half["r2"] < half["high"] < 0.65
    assert -0.1 < heldout_r2(features, noise, 160)["r2"] < 0.1
    with pytest.raises(ValueError, match="never changes"):
        heldout_r2(features, torch.ones(200, 4, 1), 160)


def test_what_stands_still_in_an_episode_is_scored_on_other_episodes():
    generator = torch.Generator().manual_seed(0)
    names = torch.randn(30, 1, 200, generator=generator).expand(30, 8, 200)  # tells episodes apart and nothing else
    fact = torch.randn(30, 1, 1, generator=generator).expand(30, 8, 1)
    assert heldout_r2(names, fact, 20)["r2"] < 0.3


def test_records_hold_the_action_that_led_to_them_and_rows_begin_anew():
    records = record(apply_contract(square(ends=5), "square", 0), ["pixels"], 3, episodes=20, steps=9, lead=4)
    begins = records["is_init"].squeeze(-1)
    assert begins[:, 0].all() and begins[:, 1:].any() and records["next", "done"][:, -1].all()
    arrived = records["action"][~begins]
    assert torch.equal(arrived, records["facts", "acted"][~begins]) and arrived.abs().min() > 0
    assert torch.equal(records["next", "reward"][~begins], arrived[:, :1])
    assert not records["action"][begins].any() and not records["next", "reward"][begins].any()
    assert torch.equal(begins[:, 1:], records["next", "done"][:, :-1].squeeze(-1))
    again = record(apply_contract(square(ends=5), "square", 9), ["pixels"], 3, episodes=20, steps=9, lead=4)
    assert all(torch.equal(records[key], again[key]) for key in records.keys(True, True))


def test_a_decoder_teaches_latents_what_is_shown_and_nothing_what_is_hidden(recording):
    untrained, _ = agent_of("dreamer")
    agent, run = agent_of("dreamer")
    before = model_scores(untrained, recording, 90)
    train_world_model(agent, run.algorithm, recording[:90], 0, updates=250, batch_size=16, precision=torch.float32)
    after = model_scores(agent, recording, 90)
    assert after["latents"]["shown"]["r2"] > max(0.85, before["latents"]["shown"]["r2"] + 0.2)
    assert all(scores["hidden"]["r2"] < 0.1 for scores in (*before.values(), *after.values()))
    baselines = baseline_scores(recording, ["pixels"], 90)
    assert baselines["pixels"]["shown"]["r2"] > 0.95 and baselines["pixels"]["hidden"]["r2"] < 0.1
    assert max(score["r2"] for score in baselines["other facts"].values()) < 0.1


def test_facts_are_the_simulators_own():
    env = make_dmc_subtle("reacher", seed=3, from_pixels=False)
    for _ in range(3):
        seen, known = env.reset(), facts(env)
        assert np.allclose(known["target"] - known["finger"], seen["to_target"], atol=1e-5)
    env = make_dmc_subtle("cartpole_swingup", seed=3, from_pixels=False)
    seen, known = env.reset(), facts(env)
    assert np.allclose(np.concatenate([known["cart"], known["pole"]]), seen["position"], atol=1e-5)
    env = make_dmc_subtle("finger_turn", seed=3, from_pixels=False)
    env.reset()
    known, physics = facts(env), env.base_env._env.physics
    tip = physics.named.data.xpos["spinner", ["x", "z"]] + 0.13 * known["spinner"][[1, 0]]
    assert np.allclose(known["target"] - tip, physics.to_target(), atol=1e-5)
    for joint, moved in (("proximal", "fingertip"), ("distal", "fingertip"), ("hinge", "spinner")):
        physics.named.data.qpos[joint] += 0.5
        physics.forward()
        known, before = facts(env), known
        assert [name for name in known if not np.allclose(known[name], before[name], atol=1e-5)] == [moved]
    assert facts(make_dmc("walker_walk", seed=0, from_pixels=False)).keys() == {"orientations", "height", "velocity"}


def test_with_frozen_physics_sizes_differ_in_sight_alone():
    stock, small = (
        record(make_dmc_subtle("reacher", seed=0, shrink=s, physics="frozen"), ["pixels"], 0, episodes=2, steps=3)
        for s in (1, 1 / 3)
    )
    differ = [key for key in stock.keys(True, True) if not torch.equal(stock[key], small[key])]
    assert differ == [("next", "pixels")]


def test_an_environment_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match=r"method facts\(\)"):
        facts(r2dreamer.envs.make_probe("small_target", seed=0))


def test_of_a_fact_the_numbers_that_change_are_asked():
    still = torch.zeros(3, 4, 2)
    place = torch.stack([torch.arange(12.0).view(3, 4), torch.ones(3, 4)], -1)
    records = TensorDict({"facts": {"place": place, "still": still}}, [3, 4])
    found = varying(records)
    assert list(found) == ["place"] and torch.equal(found["place"], place[..., :1])


TOO = {"record.episodes": 12, "record.heldout": 6, "record.steps": 4, "record.lead": 0, "updates": 2}
SMALL = [f"{key}={value}" for key, value in TOO.items()] + ["progress=false", "device=cpu", "precision=fp32"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs latents.main on the toy in the place of DMC-Subtle."""
    place = lambda cell, overrides: config(*TOY, f"algorithm={cell.member if cell.member in MEMBERS else 'none'}")
    monkeypatch.setattr(latents, "composed", place)

    def run(*overrides):
        latents.main.__wrapped__(config(*SMALL, f"out={tmp_path}", *overrides, name="latents"))
        return tmp_path

    return run


MEMBERS = ("r2dreamer", "dreamer")
GRID = ["tasks=[reacher]", "shrinks=[1]", "seeds=[0]", "members=[r2dreamer,dreamer]"]


def test_an_environment_of_which_nothing_changes_is_refused(command, monkeypatch):
    monkeypatch.setattr(Square, "facts", lambda self: {"still": np.ones(2)})
    with pytest.raises(ValueError, match=r"None of reacher's facts \(still\) changes"):
        command(*GRID)


def test_the_command_writes_lines_table_and_figure_and_repeats_nothing(command, monkeypatch):
    with pytest.raises(ValueError, match="reacherr"):  # and leaves the directory to the right command
        command("tasks=[reacherr]", "updates=3")
    with pytest.raises(OSError, match=r"/dev/null/x cannot be written: Not a directory. Give another place, out=DIR"):
        command(*GRID, "out=/dev/null/x")
    out = command(*GRID, "threads=null")
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["member"] for line in lines] == ["baselines", "untrained", *MEMBERS]
    assert all(line["commit"] and line["command"] and line["seed"] == 0 for line in lines)
    assert "dreamer, embedding" in (out / "table.md").read_text() and (out / "latents.png").exists()
    (out / "cells" / "reacher-1-seed0-dreamer.json").unlink()
    for name in ("train_world_model", "record"):
        monkeypatch.setattr(latents, name, lambda *args, **kwargs: pytest.fail("made again"))
    command(*GRID)
    again = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["scores"] for line in again] == [line["scores"] for line in lines]
    with pytest.raises(ValueError, match="updates=2"):
        command(*GRID, "updates=3")


def test_a_checkpoint_is_asked_the_same(tmp_path):
    logdir = tmp_path / "run"
    arguments = ["env=custom", "env.factory=test_latents:square", *TINY, "model.encoder_multipliers=[2,4]", "env.parallel=false", "env.total_frames=60", "total_frames=60", "checkpoint.every=60"]  # fmt: skip
    train_here(logdir, *arguments)
    ask = lambda: latents.main.__wrapped__(config(*SMALL, f"checkpoint={logdir}", "trust=test_latents", name="latents"))
    ask()
    lines = [json.loads(line) for line in (logdir / "latents" / "results.jsonl").read_text().splitlines()]
    assert [line["member"] for line in lines] == ["baselines", "untrained", "tiny"]
    other = tmp_path / "other"
    train_here(other, *arguments, "seed=1")
    shutil.rmtree(logdir / "checkpoints")
    shutil.copytree(other / "checkpoints", logdir / "checkpoints")
    with pytest.raises(ValueError, match="holds results with checkpoint="):  # another agent in the place of the first
        ask()
    assert lines[2]["scores"] != lines[1]["scores"] and lines[2]["scores"]["latents"].keys() == {
        "shown",
        "hidden",
        "acted",
    }


def test_each_task_has_a_table_of_means_over_seeds_and_their_range():
    line = lambda task, fact, seed, r2: {"task": task, "level": 1 / 3, "member": "dreamer", "seed": seed,
                                         "scores": {"latents": {fact: {"r2": r2}}}}  # fmt: skip
    results = [
        line("reacher", "target", 0, 0.25),
        line("finger_turn", "finger", 0, 1.0),
        line("reacher", "target", 1, 0.75),
    ]
    reacher, finger = markdown(results).split("\n\n")
    assert "target, 0.3333 |" in reacher and "| dreamer, latents | 0.50 (0.25 to 0.75) |" in reacher
    assert finger.splitlines()[-1] == "| dreamer, latents | 1.00 |" and "reacher" not in finger


def test_sizes_and_members_make_the_grid():
    cfg = config(*GRID[2:], "tasks=[reacher,cartpole_swingup]", "shrinks=[1,1/2,paper]", name="latents")
    made = latents.cells(cfg)
    assert len(made) == len(set(made)) == 2 * 3 * 4
    assert sorted({cell.level for cell in made if cell.task == "cartpole_swingup"}) == [1 / 20, 1 / 2, 1]


def test_distractions_make_the_grid_and_none_of_them_is_the_stock_task():
    cfg = config("suite=dmc_distracting", "tasks=[reacher_easy]", "members=[dreamer]", "seeds=[3]", name="latents")
    made = latents.cells(cfg)
    assert [cell.level for cell in made[2::3]] == ["none", "easy", "hard"]
    runs = [latents.composed(cell, []) for cell in made[2::3]]
    assert [run.env.suite for run in runs] == ["dmc_vision", "dmc_distracting", "dmc_distracting"]
    assert [run.env.get("difficulty") for run in runs] == [None, "easy", "hard"]
    assert all(run.env.task == "reacher_easy" and run.seed == 3 for run in runs)
    assert (runs[1].env.make.split, runs[1].env.make_evaluation.split) == ("train", "val")
    with pytest.raises(ValueError, match="no task 'reacher'.*reacher_easy"):
        latents.cells(config("suite=dmc_distracting", "tasks=[reacher]", name="latents"))


def test_a_member_that_is_no_algorithm_is_refused_by_name():
    with pytest.raises(ValueError, match="'dreamerv9', which is no algorithm. There are: dreamer, .*, vicreg"):
        latents.cells(config("members=[r2dreamer,dreamerv9]", name="latents"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["suite=dmc_distracting", "tasks=[reacher_easy]", "shrinks=[1/2]"],
        ["suite=dmc_subtle", "tasks=[reacher]", "difficulties=[easy]"],
        ["checkpoint=run", "seeds=[3]"],
        ["checkpoint=run", "updates=7"],
    ],
)
def test_a_setting_that_would_not_be_read_is_refused(overrides):
    cfg = config(*overrides, name="latents")
    with pytest.raises(ValueError, match=re.escape(f"{overrides[-1]} is not read: {overrides[0].partition('=')[0]}")):
        latents.refuse_unread(cfg, overrides)
    latents.refuse_unread(cfg, overrides[:-1])


def test_settings_of_every_member_are_checked_and_read():
    cell = latents.Cell("reacher", 1.0, "r2dreamer", 0)
    assert latents.composed(cell, ["batch_size=1e1"]).batch_size == 10
    with pytest.raises(ValueError, match="algorithm.actor.discount=7 must be"):
        latents.composed(cell, ["algorithm.actor.discount=7"])
    with pytest.raises(ValueError, match=r"overrides=\[seed=3\] is not read: say seeds=... beside it"):
        latents.refuse_unread(config("overrides=['seed=3']", name="latents"), [])
    for override, name in {"algorithm=dreamer": "members", "env.shrink=1": "shrinks", "env.task=a": "tasks"}.items():
        with pytest.raises(ValueError, match=f"is not read: say {name}=... beside it"):
            latents.refuse_unread(config(f"overrides=['{override}']", name="latents"), [])
    for override in ("compile=parts", "batch_length=8", "++replay.capacity=9"):
        with pytest.raises(ValueError, match=f"{re.escape(override)}. is not read: .* those of experiment, env, model"):
            latents.refuse_unread(config(f"overrides=['{override}']", name="latents"), [])
    latents.refuse_unread(config("overrides=['+model.mine=1','~algorithm.kl','batch_size=3']", name="latents"), [])


def test_a_run_whose_name_has_directories_is_in_the_results(tmp_path):
    cell = latents.Cell("reacher", 1.0, "mine/lr1", 0)
    assert latents.result_path(cell, tmp_path).parent == tmp_path / "cells"


def test_members_are_asked_what_they_know_behind_moving_backgrounds(tmp_path):
    grid = ["suite=dmc_distracting", "tasks=[reacher_easy]", "difficulties=[easy]", "seeds=[0]"]
    sizes = ("belief=16", "hidden=8", "classes=4", "depth=2", "categoricals=4")
    small = "overrides=[" + ",".join(f"'model.{size}'" for size in sizes) + "]"
    members = ["members=[r2dreamer,dreamer,dreamerpro]", "record.episodes=4", "record.heldout=2", "updates=1"]
    latents.main.__wrapped__(config(*SMALL, *grid, *members, small, f"out={tmp_path}", name="latents"))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["member"] for line in lines] == ["baselines", "untrained", "r2dreamer", "dreamer", "dreamerpro"]
    assert all(line["level"] == "easy" for line in lines)
    assert all({"finger", "target"} == line["scores"]["latents"].keys() for line in lines[1:])
    assert "reacher_easy, R2" in (tmp_path / "table.md").read_text() and (tmp_path / "latents.png").exists()


def test_a_directory_is_claimed_by_the_settings_that_a_command_reads(tmp_path):
    latents.claim(tmp_path, {"record": {}, "updates": 7, "checkpoint": "run"})
    latents.claim(tmp_path, {"record": {}, "checkpoint": "run"})
    with pytest.raises(ValueError, match="holds results with checkpoint=run, and this command says other"):
        latents.claim(tmp_path, {"record": {}, "checkpoint": "other"})


def test_a_world_model_that_a_gpu_trained_is_read_without_one(tmp_path, monkeypatch):
    agent, path = tiny_agent(), tmp_path / "weights.pt"
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"weights": agent.world_model.state_dict(), "losses": {"kl": 1.0}}, path)
    assert latents.fitted(agent, None, None, None, path) == {"kl": 1.0}
