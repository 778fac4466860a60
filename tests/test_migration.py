"""The code of the migration guide runs, and what its tables say in TorchRL's names and ours exists."""

import inspect
import pathlib
import re

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_swap import sample, torchrl_parts
from torchrl.modules import MLP
from torchrl.objectives import DreamerV3ActorLoss, DreamerV3Loss, DreamerV3ModelLoss, DreamerV3ValueLoss, SoftUpdate

from r2dreamer.losses import DreamerActorLoss, DreamerValueLoss, R2DreamerWorldModelLoss

GUIDE = (pathlib.Path(__file__).parent.parent / "examples" / "guides" / "migrate_from_torchrl.md").read_text()


@pytest.fixture(scope="module")
def names():
    """What the blocks define, executed one after another."""
    torch.manual_seed(0)
    world_model, env, actor, value = torchrl_parts()
    names = {
        **dict(torch=torch, MLP=MLP, SoftUpdate=SoftUpdate),
        **dict(TensorDictModule=TensorDictModule, TensorDictSequential=TensorDictSequential),
        **dict(world_model=world_model, env=env, actor=actor, value=value, batch=sample()),
    }
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        exec(block, names)
    return names


def test_the_code_of_the_guide_trains_every_part(names):
    assert names["total"].isfinite()
    for part in ("encoder", "rssm_rollout", "projection", "reward_head", "continue_head", "actor", "value"):
        gradients = [p.grad for p in names[part].parameters()]
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients), part


def test_torchrls_composition_takes_the_three(names):
    loss = DreamerV3Loss(names["model_loss"], names["actor_loss"], names["value_loss"])
    assert {"loss_barlow", "loss_continue", "loss_actor", "loss_value", "loss_replay_value"} <= set(
        loss(sample()).keys()
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (DreamerV3ModelLoss, R2DreamerWorldModelLoss),
        (DreamerV3ActorLoss, DreamerActorLoss),
        (DreamerV3ValueLoss, DreamerValueLoss),
    ],
)
def test_every_argument_of_torchrls_losses_is_accepted_or_refused_with_our_name(theirs, ours):
    known = inspect.signature(ours.__init__).parameters
    for name in [*inspect.signature(theirs.__init__).parameters][1:]:
        assert name in known or name in ours.renamed, name
    assert not known.keys() & ours.renamed.keys()
