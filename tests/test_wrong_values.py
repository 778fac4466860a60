"""Every setting has a kind, and a wrong value ends every script early, in a sentence with key, value and remedy."""

import contextlib
import io
import logging
import math
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from launcher import CARTPOLE, TINY, config
from omegaconf import OmegaConf

from r2dreamer.dreamer import ActionSpace, ObservationSpace
from r2dreamer.examples.cli.script import script
from r2dreamer.examples.settings.kinds import anything
from r2dreamer.examples.settings.schema import SCRIPTS, check, kind_of, places
from r2dreamer.examples.settings.targets import SettingError, Target, annotated
from r2dreamer.examples.training import budget
from r2dreamer.examples.training.setup import make_agent

CONFIGS = Path(__file__).parent.parent / "configs"
NEEDED = {"env=custom": ["env.factory=my_module:make"], "model=dreamerv1": ["algorithm=dreamerv1"]}
NEEDED["model=dreamerv2"] = ["algorithm=dreamerv2"]


def every_choice():
    """(configuration, overrides): each script, and each choice of each group."""
    found = [(name, []) for name in SCRIPTS]
    for file in sorted(CONFIGS.glob("*/*.yaml")):
        choice = f"{file.parent.name}={file.stem}"
        if file.stem != "base":
            name = "attack" if file.parent.name == "attack" else "config"
            found.append(
                (name, NEEDED.get(choice, [choice]) if "model=dreamer" in choice else [choice, *NEEDED.get(choice, [])])
            )
    return found


@pytest.mark.parametrize("name, overrides", every_choice(), ids=lambda each: str(each))
def test_every_leaf_of_every_group_has_a_kind_and_its_default_is_of_it(name, overrides):
    cfg = config(*overrides, name=name)
    unknown = [place.key for place in places(cfg) if kind_of(place, SCRIPTS[name]) in (None, anything)]
    assert not unknown, f"say in examples/settings/schema.py what these may be: {unknown}"
    check(cfg, name)


def refuse(name, *overrides):
    """What the script prints to these overrides, in this process; it must not come to its `main`."""
    reached, printed, argv = [], io.StringIO(), sys.argv
    sys.argv = [f"{name}.py", *overrides]
    try:
        with (
            contextlib.redirect_stderr(printed),
            contextlib.redirect_stdout(printed),
            mock.patch.object(logging, "shutdown"),  # hydra's, which makes absl close the stderr that it found
            pytest.raises(SystemExit) as left,
        ):
            script("config" if name == "train" else name)(reached.append)()
    finally:
        sys.argv = argv
    assert not reached
    return left.value.code, printed.getvalue()


def in_few_words(code, text, words):
    said = " ".join(text.split())
    assert code in (1, 2), said
    assert "Traceback" not in text and len(text.strip().splitlines()) <= 6, text
    for word in words:
        assert word in said, said


WRONG = [
    # (script, overrides, what the message names)
    ("train", "compile=all", "compile=all null parts"),
    ("train", "compile=true", "compile=true parts"),
    ("train", "checkpoint.replay=abc", "checkpoint.replay=abc true false"),
    ("train", "checkpoint.exact=abc", "checkpoint.exact=abc true false"),
    ("train", "eval.video=maybe", "eval.video=maybe true false"),
    ("train", "progress=abc", "progress=abc progress=true"),
    ("train", "algorithm.optimizer.lr=-1", "algorithm.optimizer.lr=-1 above algorithm.optimizer.lr=4e-05"),
    ("train", "algorithm.optimizer.lr=abc", "algorithm.optimizer.lr=abc number algorithm.optimizer.lr=4e-05"),
    ("train", "logdir=''", 'logdir="" empty logdir=runs/'),
    ("train", "logdir=null", "logdir=null given logdir=runs/"),
    ("train", "algorithm.kl.free_nats=abc", "algorithm.kl.free_nats=abc number algorithm.kl.free_nats=1.0"),
    ("train", "algorithm.final_lr_fraction=abc", "algorithm.final_lr_fraction=abc most"),
    ("train", "algorithm.actor.imagination_horizon=abc", "algorithm.actor.imagination_horizon=abc whole"),
    ("train", "algorithm.actor.imagination_horizon=0", "algorithm.actor.imagination_horizon=0 whole 15"),
    ("train", "algorithm.actor.lmbda=1.5", "algorithm.actor.lmbda=1.5 most 1"),
    ("train", "algorithm.representation.weight=abc", "algorithm.representation.weight=abc number"),
    ("train", "seed=100000000000000000000", "seed=100000000000000000000 most"),
    ("train", "train_ratio=nan", "train_ratio=NaN number train_ratio=512"),
    ("train", "batch_size=1e400", "batch_size=Infinity whole"),
    ("train", "batch_size=10**9", "batch_size=10**9 whole"),
    ("train", "batch_size={a: 1}", 'batch_size={"a": whole section'),
    ("train", "eval=3", "eval=3 section"),
    ("train", "env.make=3", "env.make=3 section"),
    ("train", "algorithm.kl=null", "algorithm.kl=null section"),
    ("train", "algorithm.agent.heads.projection=3", "algorithm.agent.heads.projection=3 section"),
    ("train", "model=5", "model=5 size12M model.KEY"),
    ("train", "logger=null", "logger=null none, tensorboard, wandb"),
    ("train", "algorithm=nope", "algorithm/nope r2dreamer"),
    ("train", "experiment=nope", "experiment/nope ablation"),
    ("train", "algorithm=base", "algorithm.representation missing"),
    ("train", "model=base", "model.belief missing +model.belief"),
    ("train", "+new.key=1", "new.key=1 nothing Leave"),
    ("train", "+batch_sise=1", "batch_sise=1 mean batch_size"),
    ("train", "train_ratoi=3", "train_ratoi mean train_ratio"),
    ("train", "+algorithm.kl.foo=3", "algorithm.kl.foo=3 free_nats"),
    ("train", "+env.make.imag_size=3", "env.make.imag_size=3 mean image_size"),
    ("train", "algorithm.kl._target_=nope.Nope", "algorithm.kl._target_=nope.Nope imported r2dreamer.losses.CategoricalKL"),
    ("train", "algorithm.kl._target_=math.pi", "algorithm.kl._target_=math.pi class"),
    ("train", "name=${nope}", "name=${nope} nope found name=dmc_vision-walker_walk"),
    ("train", "model.belief=${model.belief}", "model.belief=${model.belief} Recursive"),
    ("train", "env=[gym", "[gym key=value"),
    ("train", "seed", "'seed' key=value"),
    ("train", "--foo", "--foo key=value"),
    ("train", "env=custom", "env.factory my_module:make_env"),
    ("train", "env=custom env.factory=5", "env.factory=5 my_module:make_env"),
    ("train", "env=custom env.factory=nope", "env.factory=nope my_module:make_env"),
    ("train", "env=atari100k env.lives=nine", "env.lives=nine unused, discount, reset env.lives=unused"),
    ("train", "env=gym env.make.keys=abc", "env.make.keys=abc list null"),
    ("train", "env.parallel=0", "env.parallel=0 auto"),
    ("train", "device=gpu", "device=gpu auto, cpu"),
    ("train", "replay.place.storage=tape", "replay.place.storage=tape memmap"),
    ("train", "resume=[1]", "resume=[1] auto"),
    ("train", "logger=wandb logger.wandb.mode=sometimes", "logger.wandb.mode=sometimes offline"),
    ("evaluate", "seed=-1", "seed=-1 whole null"),
    ("evaluate", "episodes=abc", "episodes=abc whole null"),
    ("evaluate", "video=maybe", "video=maybe true"),
    ("saliency", "occlusion.fill=red", "occlusion.fill=red blur grey"),
    ("saliency", "colour=[1,2]", "colour=[1, 2] list of 3"),
    ("saliency", "max_steps=0", "max_steps=0 whole max_steps=250"),
    ("attack", "collect.held_out=1", "collect.held_out=1 below collect.held_out=0.25"),
    ("attack", "optimize.lr=nan", "optimize.lr=NaN above"),
    ("attack", "attack.patch.patch_hw=[16]", "attack.patch.patch_hw=[16] list of 2"),
    ("attack", "attack.patch.mode=blend", "attack.patch.mode=blend perturb"),
    ("attack", "attack.loss.belief=dirty", "attack.loss.belief=dirty clean patched"),
    ("attack", "beside=both", "beside=both patched null"),
    ("benchmark", "repeats=0", "repeats=0 whole null"),
    ("benchmark", "measure=[update,speed]", 'measure=["update", "speed"] acting'),
    ("benchmark", "other.kl.free_nats=-3", "other.kl.free_nats=-3 number"),
    ("benchmark", "compare=jax", "compare=jax torchrl"),
    ("benchmark", "counts=[0]", "counts=[0] list counts=[1, 4, 16]"),
    ("benchmark", "seconds=0", "seconds=0 above"),
    ("doctor", "steps=-1", "steps=-1 whole steps=100"),
    ("latents", "shrinks=[half]", 'shrinks=["half"] fraction 1/3'),
    ("latents", "shrinks=[1/0]", 'shrinks=["1/0"] fraction 1/3'),
    ("latents", "record.episodes=1", "record.episodes=1 at least 2 record.episodes=400"),
]  # fmt: skip


@pytest.mark.parametrize("name, overrides, words", WRONG, ids=lambda each: each if isinstance(each, str) else None)
def test_a_wrong_value_is_refused_before_anything_is_built(name, overrides, words):
    given = [overrides] if "{" in overrides else overrides.split(" ")
    in_few_words(*refuse(name, *given), words.split(" "))


FORKED = {
    "warm-up to the end": ("train", [*CARTPOLE, "warmup_steps=200"], ["warmup_steps=200", "total_frames=200"]),
    "collecting all at once": ("train", [*CARTPOLE, "collect_steps=1000000000"], ["collect_steps=1000000000", "At most"]),
    "more environments than frames": ("train", [*CARTPOLE, "total_frames=1"], ["total_frames=1.", "Use more frames"]),
    "a batch too large": ("train", [*CARTPOLE, "batch_size=1000000000"], ["batch_size=1000000000", "GB", "At most"]),
    "a model too large": (
        "train", [*CARTPOLE, "model.belief=1000000"], ["model.belief=1000000", "GB", "free", "model=size1M"],
    ),
    "episodes that do not fit": (
        "train", [*CARTPOLE, "env.eval_episodes=1000000000"], ["eval.episodes=1000000000", "GB", "enough for"],
    ),
    "a model too large to time": ("benchmark", ["model.belief=1000000"], ["model.belief=1000000", "GB", "model=size1M"]),
    "a replay on no GPU": ("train", [*CARTPOLE, "replay.place.storage=cuda:9"], ["replay.place.storage=cuda:9"]),
    "a factory that needs arguments": (
        "train", ["env=custom", "env.factory=os:system", *TINY], ["env.factory='os:system'", "command", "+env.make.NAME"],
    ),
    "a factory that is none": ("train", ["env=custom", "env.factory=math:pi", *TINY], ["env.factory='math:pi'", "float"]),
    "a factory that is not there": (
        "train", ["env=custom", "env.factory=math:sqtr", *TINY], ["env.factory='math:sqtr'", "sqrt"],
    ),
    "no checkpoint given": ("evaluate", [], ["checkpoint=DIR"]),
    "a task in workers": (
        "benchmark", ["measure=[environment]", "env=gym", "env.task=nope", "env.parallel=true"], ["task 'nope'", "Some it has"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORKED)
def test_what_cannot_work_is_refused_by_the_script_itself(server, tmp_path, name):
    program, overrides, words = FORKED[name]
    run = server.run(tmp_path, *overrides, script=program)
    in_few_words(run.status, run.stderr, words)
    assert not (tmp_path / "runs").exists() or not list(tmp_path.rglob("checkpoints"))


def test_the_doctor_says_in_a_sentence_that_there_is_no_such_task(server, tmp_path):
    run = server.run(tmp_path, "env=gym", "env.task=nope", script="doctor")
    problems = [line for line in run.stdout.splitlines() if "PROBLEM" in line]
    assert run.status == 1 and len(problems) == 1 and "Gymnasium has no task 'nope'" in problems[0]
    assert "Traceback" not in run.stdout + run.stderr and "  File" not in run.stdout


COMMANDS = {
    "curves . --out x.xyz": ["--out", "x.xyz", "png"],
    "compare seed=0,abc": ["seed=abc", "whole"],
    "compare model=5": ["model=5", "size12M"],
    "compare seed=0 --out x.xyz": ["--out", "x.xyz", "png"],
    "compare train_ratoi=3 --jobs 2": ["train_ratoi", "train_ratio"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_of_curves_and_compare(server, tmp_path, command):
    program, *arguments = command.split()
    run = server.run(tmp_path, *arguments, script=program)
    in_few_words(run.status, run.stdout + run.stderr, COMMANDS[command])
    assert {file.name for file in tmp_path.iterdir()} == {"stdout", "stderr"}


def test_numbers_are_written_back_as_they_are_used():
    cfg = config("total_frames=1e6", "batch_size=8.0", "env.num_envs=2e0", "name=5")
    check(cfg, "config")
    used = cfg.total_frames, cfg.batch_size, cfg.env.num_envs, cfg.name
    assert used == (1_000_000, 8, 2, "5") and [type(each) for each in used] == [int, int, int, str]


OWN = """
from __future__ import annotations
from typing import Literal

class Mine:
    def __init__(self, weight: float = 1.0, steps: int | None = None, how: Literal["mean", "sum"] = "mean", more=None):
        pass

def make(task, *, seed, level: int = 3, **kwargs):
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_parts", None)


def section(text):
    cfg = config("env.task=x")
    OmegaConf.set_struct(cfg, False)
    cfg.algorithm.representation = OmegaConf.create(text)
    return cfg


def test_arguments_of_a_user_s_own_class_are_held_to_their_annotations(own):
    accepted = {"_target_": "own_parts.Mine", "weight": -1, "steps": None, "how": "sum", "more": {"a": [1, "b"]}}
    check(section(accepted), "config")
    for name, value in {"weight": "abc", "steps": 1.5, "how": "median", "weigth": 1}.items():
        with pytest.raises(SettingError, match=f"algorithm.representation.{name}={value}"):
            check(section({"_target_": "own_parts.Mine", name: value}), "config")


def test_a_factory_s_missing_argument_is_named(own):
    cfg = config("env.make._target_=own_parts.make", "+env.make.level=2", "+env.make.anything=x")
    check(cfg, "config")
    OmegaConf.set_struct(cfg, False)
    del cfg.env.make.task
    with pytest.raises(SettingError, match=r"env.make.task is missing, which own_parts.make needs"):
        check(cfg, "config")


def test_a_key_of_one_s_own_is_accepted_where_something_refers_to_it():
    check(config("+mine.level=3", "name=level-${mine.level}"), "config")
    with pytest.raises(SettingError, match="mine.level=3 means nothing"):
        check(config("+mine.level=3", "name=other"), "config")


@pytest.mark.parametrize(
    "annotation, yes, no",
    [
        (int, [1, 2.0, -3], [1.5, "a", None, True, math.inf]),
        (float, [1, 0.5], ["1", None, math.nan, False]),
        (bool, [True], [1, "true"]),
        (int | None, [None, 3], ["a"]),
        (list, [[1], "a", None], []),
    ],
)
def test_annotations_name_kinds(annotation, yes, no):
    kind = annotated(annotation)
    for value in yes:
        assert kind.read(value) == value
    for value in no:
        with pytest.raises(ValueError):
            kind.read(value)


def test_arguments_that_a_class_passes_on_are_those_of_its_base():
    passed_on = Target("algorithm.actor", "r2dreamer.losses.DynamicsActorLoss")
    assert {"dynamics", "imagination_horizon"} <= set(passed_on.arguments) and not passed_on.open
    assert Target("logger.wandb", "r2dreamer.examples.training.metrics.WandbLogger").open


@pytest.mark.parametrize("algorithm", ["r2dreamer", "dreamer", "dreamerv1", "dreamerv2"])
def test_the_memory_of_an_update_is_estimated_from_below_and_to_a_factor_of_five(algorithm):
    from r2dreamer.examples import train
    from r2dreamer.examples.benchmark import synthetic_records

    sizes = ["model.belief=32", "model.hidden=16", "model.classes=4", "model.categoricals=8", "model.depth=4"]
    cfg = config(f"algorithm={algorithm}", *sizes, "algorithm.actor.imagination_horizon=3")
    agent = make_agent(
        cfg.algorithm, cfg.model, ObservationSpace({"pixels": (3, 64, 64)}, {}), ActionSpace(6, discrete=False)
    )
    learner = train.Learner(agent, cfg.algorithm, torch.float32, None, False)
    weights = {
        tensor.untyped_storage().data_ptr() for tensor in learner.state_dict().values() if torch.is_tensor(tensor)
    }
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses, _ = learner.losses(synthetic_records(agent, 2, 4, torch.device("cpu")))
    needed = sum(size for place, size in saved.items() if place not in weights)
    estimate = 2 * 4 * budget.activation_bytes(agent, 3, torch.float32)
    assert needed / 5 < estimate < needed


def test_what_fits_is_a_size_that_passes(monkeypatch):
    import re

    from r2dreamer.examples.training.setup import check_fits

    spaces = ObservationSpace({}, {"observation": 4}), ActionSpace(2, discrete=True)
    monkeypatch.setattr(budget, "free_bytes", lambda device: (10**9, device))
    cfg = config("model=size1M", "batch_size=1000000")
    with pytest.raises(MemoryError, match="batch_size=1000000") as refused:
        check_fits(cfg, *spaces, torch.device("cpu"), torch.float32)
    largest = int(re.search(r"At most batch_size=(\d+) fits", str(refused.value))[1])
    cfg.batch_size = largest
    assert "free" in check_fits(cfg, *spaces, torch.device("cpu"), torch.float32)
    cfg.batch_size = largest + 1
    with pytest.raises(MemoryError):
        check_fits(cfg, *spaces, torch.device("cpu"), torch.float32)
