"""What the documentation shows runs, its links lead somewhere, and its numbers are those of the raw data."""

import configparser
import doctest
import importlib
import json
import pathlib
import pkgutil
import re
import shlex

import pytest
import torch
import torchrl.objectives
from launcher import TINY, config, lines, train_here
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_swap import sample, torchrl_parts
from torchrl.envs import Compose, GymEnv, InitTracker, TransformedEnv
from torchrl.objectives import DreamerV3ActorLoss, DreamerV3ValueLoss, SoftUpdate
from torchrl.trainers.algorithms import DreamerV3OptimizationStepper, DreamerV3Optimizer

import r2dreamer.dreamer
import r2dreamer.envs
import r2dreamer.losses
from r2dreamer.envs import make_dmc_subtle
from r2dreamer.envs.base.gl import choose_gl
from r2dreamer.envs.suites import registry
from r2dreamer.examples.cli.main import commands

choose_gl()  # in place of MUJOCO_GL=egl, which the README speaks of
ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "results"
GUIDES = ROOT / "examples" / "guides"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *GUIDES.glob("*.md"), *RESULTS.rglob("*.md")]


def modules():
    for package in (r2dreamer.dreamer, r2dreamer.losses, r2dreamer.envs):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if ">>>" in pathlib.Path(importlib.util.find_spec(module.name).origin).read_text():
                yield module.name


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0 and result.attempted > 0


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def block_with(name, page=README):
    (block,) = (block for block in blocks(page) if name in block)
    return block


def guide(name):
    return (GUIDES / f"{name}.md").read_text()


def files_of(page):
    """The files that a guide has its reader write: `name`: and a block."""
    return dict(re.findall(r"^`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", page, re.DOTALL | re.MULTILINE))


# The README


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150 and len(README.encode()) <= 10_000


def test_the_commands_of_the_readme_are_one_line_each():
    for marker in ("quickstart command", "test command"):
        (command,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)```", README, re.DOTALL)
        assert len(command.strip().splitlines()) == 1


def shown(page):
    """Every `r2dreamer COMMAND key=value ...` of a page, as a list of words."""
    page = page.replace("\\\n", " ")  # a command on two lines
    found = re.findall(r"`(r2dreamer \w[^`]*)`|^(?:.*&& )?(r2dreamer \w.*)$", page, re.MULTILINE)
    return [shlex.split(inline or line, comments=True)[1:] for inline, line in found]


@pytest.mark.parametrize("words", [each for page in PAGES for each in shown(page.read_text())], ids=" ".join)
def test_every_command_shown_exists_and_its_settings_compose(words):
    name, *overrides = words
    if name in ("X", "COMMAND"):
        return
    assert name in commands()
    placeholder = r"^--|^resume=DIR|\.\.\.|\b(mine|my_\w+|corridor|long)\b"  # files and tasks that a guide makes
    overrides = [each for each in overrides if not re.search(placeholder, each)]
    if name in ("compare", "curves", "contact_sheet", "export"):  # commands with a parser of their own
        return
    config(*overrides, name="config" if name == "train" else name)


def test_the_suites_of_the_readme_are_those_there_are():
    table = README[README.index("| suite |") : README.index("| feature |")]
    named = set(re.findall(r"train (?:env|experiment)=(\w+)", table))
    assert named == {file.stem for file in (ROOT / "configs" / "env").glob("*.yaml")}


def test_the_swap_in_the_readme_trains():
    torch.manual_seed(0)
    world_model, env, actor, value = torchrl_parts()
    actor_loss = DreamerV3ActorLoss(actor, value, env, imagination_horizon=3)
    value_loss = DreamerV3ValueLoss(value, actor_loss=actor_loss, slow_critic_regularization=1.0)
    names = {
        **vars(torchrl.objectives),
        "TensorDictModule": TensorDictModule,
        "TensorDictSequential": TensorDictSequential,
        "world_model": world_model,
        "actor_loss": actor_loss,
        "value_loss": value_loss,
    }
    exec(block_with("R2DreamerWorldModelLoss"), names)
    optimizer = DreamerV3Optimizer(names["loss"].parameters())
    metrics = DreamerV3OptimizationStepper(names["loss"], optimizer, SoftUpdate(value_loss, tau=0.02)).step(
        None, sample()
    )
    assert metrics["loss_barlow"].isfinite()


def test_the_transform_in_the_readme_steps():
    names = {}
    exec(block_with("DMCSubtle"), names)
    assert names["episode"].shape == (10,) and names["episode"]["pixels"].shape[1:] == (3, 64, 64)
    assert names["env"].transform[0].__class__.__name__ == "DMCSubtle"
    paper = make_dmc_subtle("reacher", seed=5)
    names["env"].set_seed(5, static_seed=True)
    assert torch.equal((names["env"].reset()["pixels"] * 255).round().byte(), paper.reset()["pixels"])


# All pages


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


# The guides


def write_files_of(name, folder):
    for file, text in files_of(guide(name)).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


def test_the_objective_of_the_guide_learns(server, tmp_path):
    write_files_of("objective", tmp_path)
    fast = ["algorithm.optimizer.lr=1e-2", "algorithm.optimizer.warmup_steps=1", "algorithm.representation.weight=10"]
    run = server.run(tmp_path, "--config-dir=.", "experiment=quickstart", "algorithm=mine", *TINY, *fast, "logdir=run")
    assert run.status == 0, run.stderr
    logged = lines(tmp_path / "run", '"train/cosine"')
    assert logged[-1]["loss/cosine"] == pytest.approx(-10 * logged[-1]["train/cosine"], rel=1e-4)
    assert logged[-1]["train/cosine"] > logged[0]["train/cosine"]
    grid = ["hydra.searchpath=[file://.]", "experiment=quickstart", "algorithm=mine", "seed=0,1", "--status"]
    status = server.run(tmp_path, *grid, script="compare")
    assert status.status == 0 and "2 runs: 0 done" in status.stdout, status.stderr


def test_the_objectives_of_the_guide_are_those_there_are():
    table = guide("objective").partition("## The objectives that exist")[2]
    members = {file.stem for file in (ROOT / "configs" / "algorithm").glob("*.yaml")} - {"base"}
    assert set(re.findall(r"^\| `(\w+)`(?:, `(\w+)`)?", table, re.MULTILINE)) == {(each, "") for each in members}


def test_the_core_of_the_guide_learns(server, tmp_path):
    write_files_of("core", tmp_path)
    mine = ["experiment=quickstart", "+model.core._target_=my_core.GRU", "+model.core._partial_=true"]
    run = server.run(tmp_path, *mine, *TINY, "total_frames=60", "checkpoint.every=60", "logdir=run")
    assert run.status == 0, run.stderr
    read = server.run(tmp_path / "reads", "checkpoint=../run", "episodes=1", script="evaluate")
    assert read.status == 1 and "trust=my_core" in read.stderr
    names = {}
    exec((tmp_path / "my_core.py").read_text(), names)
    spaces = r2dreamer.dreamer.ObservationSpace({}, {"observation": 4}), r2dreamer.dreamer.ActionSpace(2, discrete=True)
    agent = r2dreamer.dreamer.build_agent(*spaces, belief=16, hidden=8, classes=4, depth=2, core=names["GRU"])
    records = agent.example_record().expand(3, 5).clone()
    latents = {key: torch.zeros(3, 5, size) for key, size in agent.latent_sizes.items()}
    records.update({**latents, "action": torch.ones(3, 5, 2)})
    agent.world_model(records)["next", "belief"].square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in agent.prior.core.parameters())
    alone = TransformedEnv(
        GymEnv("CartPole-v1", categorical_action_encoding=False), Compose(InitTracker(), agent.primer())
    )
    assert alone.batch_size == () and len(alone.rollout(3, agent.policy, break_when_any_done=False)) == 3


def test_the_suite_of_the_guide_trains(tmp_path, monkeypatch):
    write_files_of("suite", tmp_path)
    monkeypatch.setattr(registry, "_SUITES", dict(registry._SUITES))
    monkeypatch.setattr(
        r2dreamer.envs.suites, "__path__", [*r2dreamer.envs.suites.__path__, str(tmp_path / "envs/suites")]
    )
    where = f"hydra.searchpath=[file://{tmp_path}/configs]"
    tiny = [each for each in TINY if "total_frames" not in each]
    train_here(tmp_path / "run", where, "env=corridor", *tiny, "total_frames=60")
    assert lines(tmp_path / "run", '"loss/barlow"') and lines(tmp_path / "run", '"eval/return"')
    assert registry.suites_with("long") == ["corridor"] and "`env=corridor`" in registry.table()


def test_the_table_of_suites_is_the_registrys():
    assert registry.table() in guide("suite")


def test_the_loop_of_the_guide_trains(tmp_path, monkeypatch):
    (script,) = blocks(guide("own_loop"))
    assert len(script.splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(script, {"__name__": "own_loop"})
    logged = lines(tmp_path / "run")
    assert logged[-1]["loss_reward"] < logged[0]["loss_reward"]  # every reward is 1


def test_the_code_of_the_data_flow_holds():
    names = {}
    exec(*blocks(guide("data_flow")), names)
    assert names["transitions"]["next", "done"].sum() > 1 and names["batch"].shape == (2, 5)


def test_the_recording_of_the_guide_begins_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(*blocks(guide("prefill")), names)
    found = names["found"]
    assert found.records == len(names["replay"]) == 200 + found.episodes > 202
    task = ["env=gym", "env.task=CartPole-v1", *TINY, "eval.every=1000", "total_frames=40"]
    assert train_here("log", *task, "replay.prefill=demonstrations").count["prefilled"] == found.records


def test_the_agent_of_the_guide_acts_and_dreams(tmp_path, monkeypatch):
    sizes = dict(belief=16, hidden=8, classes=4, depth=2)
    spaces = r2dreamer.dreamer.ObservationSpace({}, {"observation": 4}), r2dreamer.dreamer.ActionSpace(2, discrete=True)
    agent = r2dreamer.dreamer.build_agent(*spaces, **sizes)
    recipe = {"_target_": "r2dreamer.dreamer.build_agent", **sizes}
    r2dreamer.dreamer.save_pretrained(agent, recipe, tmp_path / "runs" / "quickstart" / "seed0")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block_with("load_pretrained", guide("running")), names)
    assert names["dream"].shape == (1, 15, 1) and names["step"]["action"].sum() == 1
    assert names["step"]["state"].sum() == 32


# The numbers


def rows(page, beginning):
    """The cells of a table's rows, from the row that begins so on."""
    after = page[page.index(beginning) :].partition("\n\n")[0]
    return [[cell.strip(" *") for cell in row.strip("| ").split("|")] for row in after.splitlines()]


def final(folder):
    return [lines(run, '"eval/return"')[-1]["eval/return"] for run in sorted(folder.glob("seed*"))]


def test_the_returns_in_the_results_are_those_of_the_raw_runs():
    page = (RESULTS / "README.md").read_text()
    assert [float(each) for each in rows(page, "| at 42,048 | 500")[0][1:]] == [
        round(each) for each in final(RESULTS / "quickstart")
    ]
    names = ["baseline", "dreamer", "dreamerv2", "dreamerv1", "dreamerpro", "infonce", "vicreg"]
    names.append("dreamer_no_reconstruction")
    table = rows(page, "| R2-Dreamer (baseline) | 500")
    for name, row in zip(names, table, strict=True):
        assert [float(each) for each in row[1:4]] == pytest.approx(
            final(RESULTS / "family" / "quickstart" / name), abs=0.51
        )
    table = rows(page, "| R2-Dreamer (baseline) | **7.94")
    for name, row in zip(names, table, strict=False):
        shown = [float(each) for each in re.findall(r"[\d.]+", row[1])]
        assert shown == pytest.approx(final(RESULTS / "family" / "probes" / f"small_target-{name}"), abs=0.01)


def test_the_gpu_times_in_the_results_are_those_of_the_raw_lines():
    raw = [json.loads(line) for line in (RESULTS / "gpu" / "updates.jsonl").read_text().splitlines()]
    table = rows((RESULTS / "README.md").read_text(), "| captured, the default |")
    assert len(table) == 4
    for _, ours, theirs, _, arguments, commit in table:
        of_row = [
            each for each in raw if each["commit"] == commit and each["command"].endswith(f"{arguments.strip('`')}")
        ]
        (line,) = [each for each in of_row if ("compile=parts" in each["command"]) == ("compile=parts" in arguments)]
        times = [line[key]["median_s"] * 1000 for key in ("update", "other_update")]
        assert [float(cell.strip("* ").split()[0].strip("*")) for cell in (ours, theirs)] == pytest.approx(
            times, abs=0.51
        )


def test_the_extras_in_the_readme_install():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    table = README[README.index("| suite |") : README.index("| feature |")]
    extras = {row.strip("| ").split("|")[-1].strip(" `") for row in table.splitlines()[2:]} - {""}
    assert {each for each in extras if "r2dreamer" not in each} <= set(setup["options.extras_require"])
