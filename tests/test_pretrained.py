"""Agents are taken out of runs without their command line; configurations come back as they were saved."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from agents import tiny_agent, tiny_records
from launcher import CARTPOLE, train_here
from omegaconf import OmegaConf
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from r2dreamer.dreamer import load_pretrained, save_pretrained
from r2dreamer.dreamer.pretrained import construct
from r2dreamer.losses import R2DreamerWorldModelLoss, total_loss


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


def test_heads_of_ones_own_are_loaded_where_they_are_trusted(tmp_path, monkeypatch):
    (tmp_path / "my_heads.py").write_text(
        "from torch import nn\nfrom r2dreamer.dreamer import latent_head\n\n"
        "class Distance(nn.Module):\n"
        "    def __init__(self, features):\n        super().__init__()\n        self.linear = nn.Linear(features, 1)\n"
        "    def forward(self, state, belief):\n        return self.linear(belief)\n\n"
        'def distance(sizes):\n    return latent_head(Distance(sizes.belief), ["distance"], prefix=("next",))\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = "+algorithm.agent.heads.mine={_target_:my_heads.distance,_partial_:true}"
    trained = train_here(tmp_path / "run", *CARTPOLE, "total_frames=52", "algorithm=none", mine).agent
    with pytest.raises(ValueError, match=r"my_heads.distance is not part .* trust=\['my_heads'\]"):
        load_pretrained(tmp_path / "run")
    loaded = load_pretrained(tmp_path / "run", trust=["my_heads"])
    one, other = (agent.heads["mine"].module.linear.weight for agent in (trained, loaded))
    assert torch.equal(one, other)


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
    assert json.loads((tmp_path / "new" / "agent.json").read_text())["recipe"] == recipe
    save_pretrained(same, None, tmp_path / "again")
    assert load_pretrained(tmp_path / "again").summary() == agent.summary()
    with pytest.raises(ValueError, match="recipe=None"):
        save_pretrained(agent, None, tmp_path / "none")


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
