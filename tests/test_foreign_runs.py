"""Opening a run that others made runs none of their code: every payload here would leave a file behind."""

import copy
import pickle
from pathlib import Path

import pytest

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
from agents import tiny_agent
from launcher import CARTPOLE, TINY, config, train_here
from omegaconf import OmegaConf
from test_attack_script import SEEING
from test_suites import MAKE_ENV

import r2dreamer.configs
from r2dreamer.dreamer import load_pretrained, save_pretrained
from r2dreamer.dreamer.pretrained import BUILDERS, check_target, pack
from support.checkpoint import Checkpoints
from support.files import refuse_links
from support.stored import UNUSED, plain_config, runnable_config
from support.trained import load_trained

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


def as_pairs(folder, marker):
    """`pack` makes the dict with a `_target_` of them, after the check."""
    return {"_target_": f"{OWN}pack", "agent": whole(folder), "recipe": [[*pair] for pair in touch(marker).items()]}


def mine(head):
    return {"recipe": BUILD | {"heads": {"mine": head}}}


RECIPES = {
    "construct": lambda folder, marker: mine(
        {"_target_": f"{OWN}construct", "recipe": as_pairs(folder, marker), "trust": ["os"]}
    ),
    "pack": lambda folder, marker: mine(
        {"_target_": f"{OWN}unpack", "packed": as_pairs(folder, marker), "trust": ["os"]}
    ),
    "load_pretrained": lambda folder, marker: mine(
        whole(folder) | {"directory": save(folder / "other", recipe=touch(marker)), "trust": ["os"]}
    ),
    "save_pretrained": lambda folder, marker: mine(
        {"_target_": f"{OWN}save_pretrained", "agent": whole(folder), "recipe": None, "directory": str(marker)}
    ),
    "another head's recipe": lambda folder, marker: {
        "more_heads": {"mine": {"recipe": touch(marker), "weights": {}}},
    },
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


def test_a_saved_agent_does_not_overwrite_what_a_link_leads_to(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "foreign"
    save(folder)
    agent = load_pretrained(folder)
    (folder / "agent.json").symlink_to(precious)
    with pytest.raises(ValueError, match="agent.json is a link"):
        save_pretrained(agent, None, folder)
    assert precious.read_text() == "mine"


# -- evaluate.py, saliency.py, attack.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_here(folder, *CARTPOLE, "total_frames=52", "eval.every=1000")
    return folder


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    train_here(folder, *SEEING, "total_frames=60", "eval.every=1000")
    return folder


def edited(run, folder, change):
    """The run's checkpoint with a changed configuration, every checksum right."""
    state = copy.deepcopy(Checkpoints(run).load(run, replay=False).state)
    change(state["config"])
    return Checkpoints(folder / "checkpoints").save(52, state)


def custom(marker, **changes):
    return {
        "_target_": "r2dreamer.envs.make_custom",
        "_partial_": True,
        "factory": "os:system",
        "command": f"touch {marker}",
        **changes,
    }


def file_handler(marker):
    """Harmless in name, so that no list of harmful ones holds it."""
    return {"_target_": "logging.FileHandler", "filename": str(marker)}


ROUTES = {
    "an environment's factory": ("env.make_evaluation", custom),
    "a path to a factory": ("env.make_evaluation", lambda marker: custom(marker, factory="json:codecs.os.system")),
    "a positional factory": (
        "env.make_evaluation",
        lambda marker: {
            "_target_": "r2dreamer.envs.make_custom",
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
        lambda marker: {"_target_": f"{OWN}save_pretrained", "directory": str(marker)},
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
    with pytest.raises(ValueError, match="is not part of what a saved run may call|train.py saves"):
        load_trained(str(path), CPU, images=False)
    assert not marker.exists()


@pytest.mark.parametrize("script", ["evaluate", "saliency", "attack"])
def test_every_tool_refuses_and_says_what_to_add(server, run, tmp_path, script):
    path = edited(run, tmp_path / "foreign", lambda config: config["env"].update(make_evaluation=custom("ran")))
    opened = server.run(tmp_path, f"checkpoint={path}", script=script)
    said = " ".join(opened.stderr.split())
    assert opened.status == 1 and "env.make_evaluation.factory=os:system is not part of what a saved run" in said
    assert "if os is yours, or you have read it, add trust=os." in said and "Traceback" not in said
    assert not list(tmp_path.rglob("ran"))


def test_nothing_is_looked_up_while_a_configuration_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    path = edited(run, tmp_path / "foreign", lambda config: config.update(name="${oc.env:TOKEN}"))
    with pytest.raises(ValueError, match="config.name=.* is no text, number or flag") as refused:
        load_trained(str(path), CPU, images=False)
    assert "secret" not in str(refused.value)
    for broken in ([], "a: 1", {"name": torch.zeros(1)}):
        with pytest.raises(ValueError, match="train.py saves"):
            plain_config(broken, "here")


@pytest.mark.parametrize("group", ["env", "algorithm", "augmentation", "probe_decoder"])
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


def test_a_run_in_an_environment_of_ones_own_opens_where_that_is_trusted(server, tmp_path, monkeypatch):
    (tmp_path / "my_envs.py").write_text(MAKE_ENV)
    monkeypatch.syspath_prepend(tmp_path)
    mine = ["env=custom", "env.factory=my_envs:make_env", "env.parallel=false", *TINY]
    train_here(tmp_path / "log", *mine, "total_frames=52", "eval.every=1000")
    refused = server.run(tmp_path, f"checkpoint={tmp_path}/log", script="evaluate")
    assert refused.status == 1 and "add trust=my_envs." in " ".join(refused.stderr.split())
    for trust in ("trust=my_envs", "trust=[other,my_envs]"):
        opened = server.run(tmp_path, f"checkpoint={tmp_path}/log", trust, "episodes=1", script="evaluate")
        assert opened.status == 0 and "episode 0: return" in opened.stdout, opened.stderr


def test_no_module_is_searched_for_where_a_tool_is_started(server, run, tmp_path):
    """One may have gone into the directory of the run; hydra's plugins and the workers' first imports lie in wait."""
    marker, folder = tmp_path / "ran", tmp_path / "foreign"
    edited(run, folder, lambda config: config["env"].update(parallel=1))
    (folder / "hydra_plugins").mkdir()
    for name in ("hydra_plugins/plugin.py", "selectors.py", "socket.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'a').write({name!r})")
    opened = server.run(folder, "checkpoint=.", "episodes=1", "video=false", script="evaluate")
    assert opened.status == 0 and "episode 0: return" in opened.stdout, opened.stderr
    assert not marker.exists(), marker.read_text()


# -- links ------------------------------------------------------------------------------------------------------------

WRITTEN = [
    ".lock",
    "metrics.jsonl",
    "metrics.superseded.jsonl",
    "config.yaml",
    "wandb_run.json",
    "curve.png",
    "eval.mp4",
]
WRITTEN += ["tensorboard", "checkpoints", "checkpoints/journal", "checkpoints/journal/00000009-records.bin", "wandb"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_writes_through_no_link_that_leads_out_of_its_directory(tmp_path, name):
    outside, logdir = tmp_path / "outside", tmp_path / "log"
    link = logdir / name
    link.parent.mkdir(parents=True)
    if "." in name:
        outside.write_text("mine")
    else:
        outside.mkdir()
    for target in (outside, "../" * name.count("/") + "../outside"):
        link.symlink_to(target)
        with pytest.raises(ValueError, match=f"{link.name} is a link to .*outside, and a run writes"):
            train_here(logdir, *CARTPOLE)
        link.unlink()
    link.symlink_to(tmp_path / "nothing")  # which opening would make
    with pytest.raises(ValueError, match="is a link to .*nothing"):
        train_here(logdir, *CARTPOLE)
    assert not (tmp_path / "nothing").exists()
    assert outside.read_text() == "mine" if outside.is_file() else not list(outside.iterdir())
    assert not (logdir / ".lock").exists()


def test_links_that_stay_inside_and_those_of_wandb_are_none_of_its_business(tmp_path):
    logdir = tmp_path / "log"
    (logdir / "checkpoints" / "step_000000052").mkdir(parents=True)
    (logdir / "checkpoints" / "best").symlink_to("step_000000052")
    (logdir / "wandb").mkdir()
    (logdir / "wandb" / "debug.log").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(logdir)
    assert refuse_links(tmp_path / "linked") == tmp_path / "linked"
    assert refuse_links(tmp_path / "nowhere") == tmp_path / "nowhere"


@pytest.mark.parametrize(
    "script, name", [("evaluate", "eval.mp4"), ("evaluate", ".eval.mp4"), ("saliency", "saliency")]
)
def test_the_tools_write_into_the_run_alone(server, seeing, tmp_path, script, name):
    folder, outside = tmp_path / "foreign", tmp_path / "outside"
    edited(seeing, folder, lambda config: None)
    (folder / name).symlink_to(outside)
    opened = server.run(tmp_path, f"checkpoint={folder}", script=script)
    assert opened.status == 1 and f"{name} is a link to" in " ".join(opened.stderr.split()), opened.stderr
    assert not outside.exists()
