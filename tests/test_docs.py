"""What the documentation shows runs: examples in docstrings, the swap in the README."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest
import torch
import torchrl.objectives
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_swap import sample, torchrl_parts
from torchrl.objectives import DreamerV3ActorLoss, DreamerV3ValueLoss, SoftUpdate
from torchrl.trainers.algorithms import DreamerV3OptimizationStepper, DreamerV3Optimizer

import r2dreamer.dreamer
import r2dreamer.envs
import r2dreamer.losses
from r2dreamer.envs import make_dmc_subtle
from r2dreamer.envs.base.gl import choose_gl

choose_gl()  # in place of the `export` that the README speaks of
README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def modules():
    for package in (r2dreamer.dreamer, r2dreamer.losses, r2dreamer.envs):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            yield module.name


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).failed == 0


def block_with(name):
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if name in block)
    return block


def test_the_agent_in_the_readme_acts_and_dreams(tmp_path, monkeypatch):
    sizes = dict(belief=16, hidden=8, classes=4, depth=2)
    spaces = r2dreamer.dreamer.ObservationSpace({}, {"observation": 4}), r2dreamer.dreamer.ActionSpace(2, discrete=True)
    agent = r2dreamer.dreamer.build_agent(*spaces, **sizes)
    recipe = {"_target_": "r2dreamer.dreamer.build_agent", **sizes}
    r2dreamer.dreamer.save_pretrained(agent, recipe, tmp_path / "runs" / "quickstart" / "seed0")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block_with("load_pretrained"), names)
    assert names["dream"].shape == (1, 15, 1) and names["step"]["action"].sum() == 1
    assert names["step"]["state"].sum() == 32


def test_the_transform_in_the_readme_steps():
    names = {}
    exec(block_with("DMCSubtle"), names)
    assert names["episode"].shape == (10,) and names["episode"]["action"].std() > 0
    assert names["env"].transform[0].__class__.__name__ == "DMCSubtle"
    paper = make_dmc_subtle("reacher", seed=5)
    names["env"].set_seed(5, static_seed=True)
    assert torch.equal((names["env"].reset()["pixels"] * 255).round().byte(), paper.reset()["pixels"])


def test_the_swap_in_the_readme_trains():
    torch.manual_seed(0)
    world_model, env, actor, value = torchrl_parts()
    encoder, rssm_rollout, _, reward_head = world_model.module
    actor_loss = DreamerV3ActorLoss(actor, value, env, imagination_horizon=3)
    value_loss = DreamerV3ValueLoss(value, actor_loss=actor_loss, slow_critic_regularization=1.0)
    names = {
        **vars(torchrl.objectives),
        "TensorDictModule": TensorDictModule,
        "TensorDictSequential": TensorDictSequential,
        "DreamerV3OptimizationStepper": DreamerV3OptimizationStepper,
        "DreamerV3Optimizer": DreamerV3Optimizer,
        "encoder": encoder,
        "rssm_rollout": rssm_rollout,
        "reward_head": reward_head,
        "actor_loss": actor_loss,
        "value_loss": value_loss,
        "target_updater": SoftUpdate(value_loss, tau=0.02),
    }
    exec(block_with("R2DreamerWorldModelLoss"), names)
    metrics = names["stepper"].step(None, sample())
    assert metrics["loss_barlow"].isfinite()


def test_the_commands_of_the_readme_are_one_line_each():
    for marker in ("quickstart command", "test command"):
        (command,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)```", README, re.DOTALL)
        assert len(command.strip().splitlines()) == 1
