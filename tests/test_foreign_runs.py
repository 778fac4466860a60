"""Opening a run that others made runs none of their code: every payload here would leave a file behind."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
from agents import tiny_agent
from launcher import CARTPOLE, TINY, config, train_here
from omegaconf import OmegaConf
from test_suites import MAKE_ENV

import r2dreamer.configs
from r2dreamer.dreamer import load_pretrained
from r2dreamer.dreamer.pretrained import pack
from r2dreamer.dreamer.recipe import BUILDERS, check_target
from r2dreamer.examples import attack, evaluate, saliency
from r2dreamer.examples.cli.script import script
from r2dreamer.examples.training.checkpoint import Checkpoints
from r2dreamer.examples.training.loading import load_trained
from r2dreamer.examples.training.saved_config import UNUSED, plain_config, runnable_config

BUILD = dict(_target_="r2dreamer.dreamer.build_agent", belief=16, hidden=12, classes=4, categoricals=7, depth=2)
BUILD |= dict(encoder_multipliers=[1, 2], heads={})
OWN = "r2dreamer.dreamer.pretrained."
CPU = torch.device("cpu")
CONFIGS = Path(r2dreamer.configs.__file__).parent


def touch(marker):
    """A call that leaves a file behind."""
    return {"_target_": "os.system", "command": f"touch {marker}"}


def touch_by_attributes(marker):
    """The same, by what a module of ours has imported."""
    path = {"_target_": f"{OWN}Path", "_args_": [str(marker)]}
    return {"_target_": f"{OWN}Path.touch", "_args_": [path]}


# -- load_pretrained --------------------------------------------------------------------------------------------------


def save(folder, **changes):
    folder.mkdir()
    torch.save({"agent": pack(tiny_agent(heads={}), BUILD) | changes}, folder / "state.pt")
    return str(folder)


def whole(folder):
    return {"_target_": "r2dreamer.dreamer.load_pretrained", "directory": save(folder / "whole")}


def pairs(marker):
    """`pack` makes a dict with a `_target_` of them, after the check."""
    return [[*pair] for pair in touch(marker).items()]


def packed(folder, **more):
    return {"_target_": f"{OWN}pack", "agent": whole(folder), **more}


def trusting(recipe):
    return mine({"_target_": f"{OWN}construct", "recipe": recipe, "trust": ["os"]})


def mine(head):
    return {"recipe": BUILD | {"heads": {"mine": head}}}


RECIPES = {
    "construct": lambda folder, marker: trusting(
        packed(
            folder,
            recipe=[],
            more_heads={
                "mine": [pairs(marker), {"_target_": "r2dreamer.dreamer.Linear", "in_features": 1, "out_features": 1}]
            },
        )
    ),
    "pack": lambda folder, marker: trusting(packed(folder, recipe=pairs(marker))),
    "load_pretrained": lambda folder, marker: mine(
        whole(folder) | {"directory": save(folder / "other", **mine(touch(marker))), "trust": ["os"]}
    ),
    "save_pretrained": lambda folder, marker: mine(
        {"_target_": f"{OWN}save_pretrained", "agent": whole(folder), "recipe": None, "directory": str(marker)}
    ),
    "another head's recipe": lambda folder, marker: {"more_heads": {"mine": {"recipe": touch(marker), "weights": {}}}},
    "attributes of a module": lambda folder, marker: mine(touch_by_attributes(marker)),
    "the outermost call": lambda folder, marker: {"recipe": touch(marker)},
    "a list in a tuple": lambda folder, marker: {"recipe": BUILD | {"belief": ([touch(marker)],)}},
    "a partial that the builder calls": lambda folder, marker: mine({**touch(marker), "_partial_": True}),
    "a name that begins as ours do": lambda folder, marker: mine(
        {**touch(marker), "_target_": "r2dreamer.dreamer_of_others.system"}
    ),
}


@pytest.mark.parametrize("route", RECIPES)
def test_a_saved_agent_calls_builders_and_heads_alone(tmp_path, route):
    marker = tmp_path / "ran"
    folder = save(tmp_path / "foreign", **RECIPES[route](tmp_path, marker))
    with pytest.raises(ValueError, match="is not part of what a saved run may call"):
        load_pretrained(folder)
    assert not marker.exists()


class Pickled:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("file", ["state.pt", "rng.pt"])
def test_nothing_pickled_is_executed(tmp_path, run, file):
    marker, folder = tmp_path / "ran", tmp_path / "foreign"
    path = edited(run, folder, lambda config: None)
    torch.save({"agent": Pickled(marker), "config": Pickled(marker), "learner": {}}, path / file)
    if file == "state.pt":
        with pytest.raises(ValueError, match="is damaged"):
            load_pretrained(path)
    with pytest.raises(Exception, match="."):
        load_trained(str(path), CPU, images=False)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Pickled(marker))).close()
    assert marker.exists()  # so that the payload is one


def test_a_recipe_holds_plain_data(tmp_path):
    with pytest.raises(ValueError, match="A recipe holds text, numbers, lists and dicts, and this one a Tensor"):
        load_pretrained(save(tmp_path / "foreign", recipe=BUILD | {"belief": torch.tensor(16)}))


def test_trust_is_for_what_a_module_defines_and_not_for_what_it_imports(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(
        "import os\nfrom os import system\nfrom r2dreamer.dreamer import load_pretrained\n\n"
        "def head(): pass\n\nclass Head:\n    @classmethod\n    def of(cls): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_module.head", "my_module:head", "my_module.Head", "my_module.Head.of"):
        check_target(name, BUILDERS, ["my_module"])
        with pytest.raises(ValueError, match=r"if my_module is yours, .* trust=\['my_module'\]"):
            check_target(name, BUILDERS, ["my_modul", "mine"])
    for name in ("my_module.system", "my_module.os.system", "my_module:os.system", "my_module.load_pretrained"):
        with pytest.raises(ValueError, match="is not part of what a saved run may call"):
            check_target(name, BUILDERS, ["my_module"])
    with pytest.raises(ValueError, match="is not part of what a saved run may call"):
        check_target("r2dreamer.dreamer.load_pretrained", BUILDERS, ["r2dreamer", "r2dreamer.dreamer"])


# -- evaluate.py, saliency.py, attack.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_here(folder, *CARTPOLE, "total_frames=52", "eval.every=1000")
    return folder


def edited(run, folder, change):
    """The run's checkpoint with a changed configuration, every checksum right."""
    state = copy.deepcopy(Checkpoints(run).load(run, replay=False).state)
    change(state["config"])
    return Checkpoints(folder / "checkpoints").save(52, state)


def tool(script, checkpoint, *overrides):
    """The script in this process, as if it began and ended there."""
    with pytest.MonkeyPatch.context() as before:
        before.setenv("PYTHONSAFEPATH", "")
        before.setattr(sys, "path", list(sys.path))
        script.main(config(f"checkpoint={checkpoint}", *overrides, name=script.__name__.rpartition(".")[2]))


def refusal(script, checkpoint, capsys, *overrides):
    with pytest.raises(SystemExit) as left:
        tool(script, checkpoint, *overrides)
    assert left.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def custom(marker, **changes):
    made = {"_target_": "r2dreamer.envs.make_custom", "_partial_": True, **changes}
    return made if "factory" in made else {**made, "factory": "os:system", "command": f"touch {marker}"}


def file_handler(marker):
    """Harmless in name, so that no list of harmful ones holds it."""
    return {"_target_": "logging.FileHandler", "filename": str(marker)}


ROUTES = {
    "an environment's factory": ("env.make_evaluation", custom),
    "a path to a factory": (
        "env.make_evaluation",
        lambda marker: custom(marker, factory="json:codecs.builtins.open", file=str(marker), mode="w"),
    ),
    "a positional factory": (
        "env.make_evaluation",
        lambda marker: {
            "_target_": "r2dreamer.envs.make_custom",
            "_partial_": True,
            "_args_": ["os:system"],
            "command": f"touch {marker}",
        },
    ),
    "a module that registers a task": ("env.make_evaluation.task", lambda marker: "leaving:CartPole-v1"),
    "a positional task": (
        "env.make_evaluation",
        lambda marker: {"_target_": "r2dreamer.envs.make_gym", "_partial_": True, "_args_": ["leaving:CartPole-v1"]},
    ),
    "an environment as augmentation": (
        "algorithm.augmentation",
        lambda marker: custom(marker, _partial_=False, seed=0),
    ),
    "an environment's call": ("env.make_evaluation", touch),
    "an argument": ("env.make_evaluation.image_size", file_handler),
    "a score": ("env.scores", file_handler),
    "a head": ("algorithm.agent.heads", lambda marker: {"mine": file_handler(marker)}),
    "an objective": ("algorithm.representation", file_handler),
    "a value in a list": ("algorithm.kl.free_nats", lambda marker: [[file_handler(marker)]]),
    "attributes of our modules": ("algorithm.augmentation", touch_by_attributes),
    "a function of ours": (
        "algorithm.augmentation",
        lambda marker: {
            "_target_": f"{OWN}save_pretrained",
            "agent": {"_target_": f"{OWN}load_pretrained", "directory": str(marker.parent / "foreign")},
            "recipe": None,
            "directory": str(marker),
        },
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_stored_configuration_calls_our_own_parts_alone(run, tmp_path, monkeypatch, route):
    marker, (key, payload) = tmp_path / "ran", ROUTES[route]
    (tmp_path / "leaving.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)

    def change(config):
        *sections, last = key.split(".")
        for section in sections:
            config = config[section]
        config[last] = payload(marker)

    path = edited(run, tmp_path / "foreign", change)
    with pytest.raises(ValueError, match="is not part of what a saved run may call|is not written by train.py"):
        load_trained(str(path), CPU, images=False)
    assert not marker.exists()


def test_a_run_on_our_own_gymnasium_environments_opens():
    cfg = config("env=gym", "env.task=r2dreamer.envs:DMCSubtle/reacher-v0")
    stored = OmegaConf.to_container(cfg, resolve=True)
    assert runnable_config(stored, "here").env.task == "r2dreamer.envs:DMCSubtle/reacher-v0"


@pytest.mark.parametrize("script", [evaluate, saliency, attack])
def test_every_tool_refuses_and_says_what_to_add(run, tmp_path, script, capsys):
    marker = tmp_path / "ran"
    change = lambda config: config["env"].update(make_evaluation=custom(marker))
    said = refusal(script, edited(run, tmp_path / "foreign", change), capsys)
    assert "env.make_evaluation.factory=os:system is not part of what a saved run may call" in said
    assert "if os is yours, or you have read it, add trust=os. (" in said
    assert not marker.exists()


def test_a_run_saved_under_former_module_names_is_evaluated_and_resumed(run, tmp_path, capsys):
    def change(config):
        config["collector"] = {"_target_": "support.streams.Alternating"}
        config["logger"] = {"tensorboard": {"_target_": "support.metrics.TensorBoardLogger"}}

    path = edited(run, tmp_path, change)
    tool(evaluate, path, "episodes=1", "video=false")
    assert "episode 0: return" in capsys.readouterr().out
    trainer = train_here(tmp_path, *CARTPOLE, "total_frames=104", "eval.every=1000")
    assert trainer.saved.path == path and trainer.frames == 104


def test_nothing_is_looked_up_while_a_configuration_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    path = edited(run, tmp_path / "foreign", lambda config: config.update(name="${oc.env:TOKEN}"))
    with pytest.raises(ValueError, match="config.name=.* is no text, number or flag") as refused:
        load_trained(str(path), CPU, images=False)
    assert "secret" not in str(refused.value)
    for broken in ([], "a: 1", {"name": torch.zeros(1)}):
        with pytest.raises(ValueError, match="train.py saves"):
            plain_config(broken, "here")


@pytest.mark.parametrize("group", ["env", "algorithm", "augmentation", "detached_decoder"])
def test_every_call_in_our_own_configurations_is_known(group):
    own = ["env.factory=my_module:make_env"]
    for file in sorted((CONFIGS / group).glob("[!b]*.yaml")):  # base.yaml is part of the others
        overrides = [f"{group}={file.stem}", *(own if file.stem == "custom" else ())]
        complete = OmegaConf.to_container(config(*overrides), resolve=True)
        if file.stem == "custom":
            with pytest.raises(ValueError, match="add trust=my_module"):
                runnable_config(complete, "here")
        else:
            assert runnable_config(complete, "here") == {k: v for k, v in complete.items() if k not in UNUSED}


def test_a_configuration_with_former_names_is_read_under_the_new_ones():
    complete = OmegaConf.to_container(config("detached_decoder=observation"), resolve=True)
    former = {**complete, "algorithm": {**complete["algorithm"]}}
    section = former["algorithm"].pop("detached_decoder")
    former["algorithm"]["probe"] = {**section, "_target_": "r2dreamer.losses.ProbeDecoder.of"}
    assert plain_config(former, "here") == complete
    assert runnable_config(former, "here").algorithm == complete["algorithm"]


def test_a_model_may_name_an_encoder_of_ours_and_nothing_else(tmp_path):
    complete = OmegaConf.to_container(config("experiment=dmc_small"), resolve=True)
    assert runnable_config(complete, "here").model.image_encoder._target_ == "r2dreamer.dreamer.StridedEncoder"
    complete["model"]["image_encoder"] = {"_target_": "os.system", "command": f"touch {tmp_path}/payload"}
    with pytest.raises(ValueError, match="model.image_encoder._target_=os.system is not part"):
        runnable_config(complete, "here")


def test_a_run_in_an_environment_of_ones_own_opens_where_that_is_trusted(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_envs.py").write_text(MAKE_ENV)
    monkeypatch.chdir(tmp_path)
    mine = ["env=custom", "env.factory=my_envs:make_env", "env.parallel=false", *TINY]
    train_here("log", *mine, "total_frames=52", "eval.every=1000")
    sys.path.remove(str(tmp_path))
    del sys.modules["my_envs"]
    assert "add trust=my_envs." in refusal(evaluate, "log", capsys)
    for trust in ("trust=my_envs", "trust=[other,my_envs]"):
        tool(evaluate, "log", trust, "episodes=1", "video=false")
        assert "episode 0: return" in capsys.readouterr().out


@pytest.mark.parametrize("foreign", [True, False])
def test_no_module_is_searched_for_in_the_run_that_a_tool_is_started_in(tmp_path, monkeypatch, foreign):
    """Such as hydra's plugins, or what Python imports first in a worker; a trainer's directory is the user's own."""
    (tmp_path / "socket.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    searched = []
    script("evaluate", foreign=foreign)(lambda cfg: searched.extend(sys.path))(config(name="evaluate"))
    assert searched and (str(tmp_path) in searched) is not foreign
    subprocess.run([sys.executable, "-c", "import socket"])  # as multiprocessing begins a worker
    assert (tmp_path / "ran").exists() is not foreign
