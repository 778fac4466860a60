"""Agents are taken out of runs without their command line; configurations come back as they were saved."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from agents import tiny_agent, tiny_records
from launcher import CARTPOLE, train_here
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from r2dreamer.dreamer import ModelCard, load_pretrained, save_pretrained
from r2dreamer.dreamer.recipe import construct
from r2dreamer.losses import R2DreamerWorldModelLoss, total_loss

RECIPE = dict(_target_="r2dreamer.dreamer.build_agent", belief=16, hidden=12, classes=4, categoricals=7, depth=2)
RECIPE |= dict(encoder_multipliers=[1, 2], heads={})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_pretrained(tiny_agent(heads={}), RECIPE, tmp_path_factory.mktemp("saved") / "agent")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train_here(folder, *CARTPOLE, "total_frames=100", "checkpoint.keep=9")


def test_the_configuration_round_trips(run):
    folder, trainer = run
    saved = OmegaConf.load(folder / "config.yaml")
    assert saved == OmegaConf.create(OmegaConf.to_container(trainer.cfg, resolve=True))
    state = torch.load(folder / "checkpoints" / "step_000000100" / "state.pt", weights_only=True)
    assert yaml.safe_load(OmegaConf.to_yaml(saved)) == state["config"]


def test_loading_needs_neither_hydra_nor_the_environment(run):
    code = f"""
import sys
for name in ("hydra", "omegaconf", "gymnasium"):
    sys.modules[name] = None
from r2dreamer.dreamer import load_pretrained
print(load_pretrained({str(run[0])!r}).policy.in_keys)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['observation', 'is_init']", done.stderr


def test_the_newest_checkpoint_or_the_one_that_is_named(run):
    folder, trainer = run
    weights = lambda agent: next(agent.encoder.parameters())
    newest, oldest = (load_pretrained(folder / "checkpoints" / step) for step in ("step_000000100", "step_000000052"))
    assert torch.equal(weights(load_pretrained(folder)), weights(newest))
    assert torch.equal(weights(load_pretrained(folder / "checkpoints")), weights(trainer.agent))
    assert not torch.equal(weights(newest), weights(oldest))


def test_the_newest_is_the_one_that_was_saved_last(run, tmp_path):
    """A run resumed from an older checkpoint and stopped early has saved fewer frames than it once had."""
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints")
    older = tmp_path / "checkpoints" / "step_000000052"
    manifest = json.loads((older / "manifest.json").read_text())
    manifest["manifest"]["serial"] = 99
    (older / "manifest.json").write_text(json.dumps(manifest))
    expected, found = load_pretrained(older), load_pretrained(tmp_path)
    assert torch.equal(next(found.encoder.parameters()), next(expected.encoder.parameters()))


def test_a_copy_that_a_user_made_beside_the_checkpoints_is_opened_by_its_name_alone(run, tmp_path):
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints")
    older, copy = tmp_path / "checkpoints" / "step_000000052", tmp_path / "checkpoints" / "step_best"
    shutil.copytree(older, copy)
    (copy / "manifest.json").unlink()  # by the manifest it would be as old as its original
    weights = lambda path: next(load_pretrained(path).encoder.parameters())
    assert torch.equal(weights(copy), weights(older))
    assert torch.equal(weights(tmp_path), weights(run[0]))


def test_a_policy_remembers_in_its_tensordict_and_asks_where_episodes_begin(run):
    agent = load_pretrained(run[0])
    observation = TensorDict({"observation": torch.randn(2, 4)}, [2])
    with pytest.raises(ValueError, match="'is_init' is missing.*InitTracker"):
        agent.policy(observation.copy())
    step, beliefs = observation.copy(), []
    for begins in (True, False, True):
        step["is_init"] = torch.full((2, 1), begins)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            step = agent.policy(step)
        beliefs.append(step["belief"])
    assert torch.equal(beliefs[0], beliefs[2]) and not torch.allclose(beliefs[0], beliefs[1])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    oldest, newest = sorted(tmp_path.glob("checkpoints/step_*/state.pt"))
    newest.write_bytes(newest.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="step_000000100.* is damaged"):
        agent = load_pretrained(tmp_path)
    expected = load_pretrained(folder / "checkpoints" / oldest.parent.name)
    assert torch.equal(next(agent.encoder.parameters()), next(expected.encoder.parameters()))
    content = bytearray((folder / "checkpoints" / newest.parent.name / "state.pt").read_bytes())
    content[len(content) // 2] ^= 64  # torch.load would not notice
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="step_000000100.* is damaged"):
        agent = load_pretrained(tmp_path)
    assert torch.equal(next(agent.encoder.parameters()), next(expected.encoder.parameters()))
    oldest.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="step_000000052.* is damaged .* no other one"):
        load_pretrained(tmp_path)


def test_a_checkpoint_holds_the_agents_weights_once(run):
    folder, trainer = run
    size = (folder / "checkpoints" / "step_000000100" / "state.pt").stat().st_size
    state = torch.load(folder / "checkpoints" / "step_000000100" / "state.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "agent"}, folder / "without.pt")
    weights = 4 * sum(trainer.agent.parameter_counts().values())
    assert size - (folder / "without.pt").stat().st_size < 0.5 * weights


def test_an_agent_is_saved_alone(tmp_path):
    recipe = dict(_target_="r2dreamer.dreamer.build_agent", belief=16, hidden=12, classes=4, categoricals=7, depth=2)
    recipe |= dict(encoder_multipliers=[1, 2], heads={})
    agent = tiny_agent(heads={})
    save_pretrained(agent, recipe, tmp_path / "new")
    before = torch.get_rng_state()
    same = load_pretrained(tmp_path / "new")
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(agent.parts().values(), same.parts().values(), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.yaml", "model.safetensors", "README.md"}
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["recipe"] == recipe
    save_pretrained(same, None, tmp_path / "again")
    assert load_pretrained(tmp_path / "again").summary() == agent.summary()
    with pytest.raises(ValueError, match="recipe=None"):
        save_pretrained(agent, None, tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="README.md is of something else"):
        save_pretrained(same, None, tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


ACT = """
import sys, torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type
from r2dreamer.dreamer import load_pretrained
from test_pretrained import actions
torch.save(actions(load_pretrained(sys.argv[1])), sys.argv[2])
"""


def actions(agent):
    """Of twenty steps, sampled and not, with the latents that were remembered at the end."""
    torch.manual_seed(3)
    observations, found = torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(0)), []
    step = TensorDict({}, [2])
    for number, observation in enumerate(observations):
        step["observation"], step["is_init"] = observation, torch.full((2, 1), number % 7 == 0)
        kind = ExplorationType.RANDOM if number % 2 else ExplorationType.DETERMINISTIC
        with set_exploration_type(kind), torch.no_grad():
            step = agent.policy(step)
        found.append(step["action"].clone())
    return [torch.stack(found), step["state"], step["belief"]]


def test_a_saved_agent_acts_in_a_fresh_process_bit_for_bit_as_the_trained_one(run, tmp_path):
    trained, cfg = run[1].agent, OmegaConf.to_container(run[1].cfg, resolve=True)
    save_pretrained(trained, cfg["algorithm"]["agent"] | cfg["model"], tmp_path / "agent")
    command = [sys.executable, "-c", ACT, str(tmp_path / "agent"), str(tmp_path / "actions.pt")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for part in trained.parts().values():
        part.eval()
    expected, found = actions(trained), torch.load(tmp_path / "actions.pt")
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert expected[0].unique(dim=0).shape[0] > 1  # not one action for all


SPOILT = {
    "a pickle": ("model.safetensors", lambda content: pickle.dumps(Pickled()), "is no whole file of safetensors"),
    "cut short": ("model.safetensors", lambda content: content[:-9], "is no whole file of safetensors"),
    "empty": ("model.safetensors", lambda content: b"", "is no whole file of safetensors"),
    "other shapes": ("config.yaml", lambda content: content.replace(b"belief: 16", b"belief: 24"), "size mismatch"),
    "no recipe": ("config.yaml", lambda content: content.replace(b"recipe:", b"receipt:"), "it has no recipe"),
    "a list": ("config.yaml", lambda content: b"[1]", "it has no format"),
    "an alias": ("config.yaml", lambda content: content + b"a: &a [1]\nb: *a\n", "an alias in line"),
    "no YAML": ("config.yaml", lambda content: b"a: [", "config.yaml cannot be read"),
    "another format": ("config.yaml", lambda content: content.replace(b"format: 1", b"format: 2"), "has format 2"),
    "an object of Python": (
        "config.yaml",
        lambda content: content + b"x: !!python/object/apply:os.getcwd []",
        "cannot be read",
    ),
    "a call": (
        "config.yaml",
        lambda content: content.replace(b"r2dreamer.dreamer.build_agent", b"os.system"),
        "os.system is not part",
    ),
    "another part": ("config.yaml", lambda content: content.replace(b"  heads: {}\n", b""), "do not fit together"),
    "an argument": (
        "config.yaml",
        lambda content: content.replace(b"categoricals", b"categories"),
        "do not fit together",
    ),
}


class Pickled:
    ran = False

    def __reduce__(self):
        return setattr, (Pickled, "ran", True)


@pytest.mark.parametrize("what", SPOILT)
def test_a_folder_that_is_not_as_it_was_saved_is_refused_and_executes_nothing(saved, tmp_path, what):
    file, spoil, says = SPOILT[what]
    folder = shutil.copytree(saved, tmp_path / "folder")
    content = (folder / file).read_bytes()
    assert spoil(content) != content
    (folder / file).write_bytes(spoil(content))
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        load_pretrained(folder)
    assert len(str(refused.value)) < 480 and not Pickled.ran
    pickle.loads(pickle.dumps(Pickled()))
    assert Pickled.ran  # so that the payload is one
    Pickled.ran = False


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(lambda value: value.to(torch.int8), "is torch.int8"), (lambda value: value.log(), "NaN or Inf")],
)
def test_weights_that_are_no_numbers_to_compute_with_are_refused(saved, tmp_path, spoil, says):
    folder = shutil.copytree(saved, tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    save_file(weights | {name: spoil(weights[name] - 1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{re.escape(name)} .*{says}"):
        load_pretrained(folder)


def test_a_folder_without_its_configuration_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "folder")
    (folder / "config.yaml").unlink()
    with pytest.raises(ValueError, match="has model.safetensors and no config.yaml"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="revision=v1 is of a repository on the Hub"):
        load_pretrained(saved, revision="v1")


def test_a_model_card_says_what_is_known_and_what_is_not(tmp_path):
    known = ModelCard("walker", "dmc-walker_walk", (450.25, 31.5), 10, 3, 100_000, "r2dreamer train", "abc", ["Slow."])
    for name, card in (("known", known), ("unknown", None)):
        save_pretrained(tiny_agent(heads={}), RECIPE, tmp_path / name, card=card)
    numbers = sum(value.numel() for value in load_file(tmp_path / "known" / "model.safetensors").values())
    _, front, text = (tmp_path / "known" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    (result,) = front["model-index"][0]["results"]
    assert front["library_name"] == "torchrl-r2dreamer" and result["dataset"]["name"] == "dmc-walker_walk"
    assert result["metrics"][0]["value"] == "450.25 +/- 31.50"
    for row in (
        "greedy return | 450.2 ± 31.5",
        "episodes of that return | 10",
        "training seed | 3",
        "frames | 100,000",
        f"numbers in `model.safetensors` | {numbers:,}",
    ):
        assert f"{row} |" in text
    assert "`r2dreamer train`" in text and "- Slow." in text and "| commit | abc |" in text
    text = (tmp_path / "unknown" / "README.md").read_text()
    assert "model-index" not in text and "greedy return | not measured" in text and "command | not stated" in text


def test_a_loaded_agent_can_be_trained_on(tmp_path):
    recipe = dict(_target_="r2dreamer.dreamer.build_agent", belief=16, hidden=12, classes=4, categoricals=7, depth=2)
    save_pretrained(tiny_agent(), recipe | dict(encoder_multipliers=[1, 2]), tmp_path)
    agent = load_pretrained(tmp_path, trainable=True)
    assert all(part.training for part in agent.parts().values())
    losses, _ = R2DreamerWorldModelLoss(agent.world_model)(tiny_records(agent))
    total_loss(losses).backward()
    assert all(p.grad is not None for p in agent.world_model.parameters())


def test_what_holds_no_agent_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no agent"):
        load_pretrained(tmp_path)
    torch.save({"model": {}}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="and no agent"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="os.system is not part of"):
        construct({"heads": [{"_target_": "os.system", "command": "true"}]})
