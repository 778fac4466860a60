"""DreamerValueLoss: on imagined rollouts, and along replayed sequences."""

import pytest
import torch
from agents import BATCH, TIME, tiny_agent, tiny_records
from tensordict import TensorDict
from test_losses import all_losses, has_gradient, start_latents
from torchrl.objectives import SoftUpdate

from r2dreamer.losses import TwoHotLikelihood, lambda_return


def test_the_value_loss_trains_the_value_and_its_slow_copy_only_follows():
    agent = tiny_agent()
    _, actor, loss = all_losses(agent, imagination_horizon=4)
    updater = SoftUpdate(loss, tau=0.25)
    _, imagined = actor(start_latents(agent))
    losses, _ = loss(imagined)
    losses["loss_value"].backward()
    assert has_gradient(agent.value) == {True, False}  # the output layer starts at zero and hides the others this once
    assert has_gradient(agent.actor) == has_gradient(agent.prior) == {False}
    slow = [p for name, p in loss.named_buffers() if "target" in name and p.ndim]
    slow += [p for name, p in loss.named_parameters() if "target" in name]
    assert slow and not any(p.requires_grad for p in slow)
    before = [p.clone() for p in slow]
    with torch.no_grad():
        for parameter in agent.value.parameters():
            parameter.add_(1)
    assert all(torch.equal(p, old) for p, old in zip(slow, before, strict=True))
    updater.step()
    moved = [(p - old).mean().item() for p, old in zip(slow, before, strict=True)]
    assert sum(abs(step - 0.25) < 1e-3 for step in moved) == len(list(agent.value.parameters()))


def test_the_replay_value_loss_reaches_the_world_model_and_follows_the_formula():
    agent = tiny_agent()
    agent.value.layers[-1].weight.data.normal_(std=0.1)
    world_model_loss, _, loss = all_losses(agent)
    records = tiny_records(agent)
    _, posterior = world_model_loss(records)
    replay = posterior["next"].select("state", "belief")
    replay["bootstrap"] = torch.randn(BATCH, TIME, 1)
    replay["next"] = records["next"].select("reward", "done", "terminated")
    value = loss.replay_value_loss(replay, horizon=10.0, lmbda=0.7)["loss_replay_value"]
    flags = (records["next", "done"], records["next", "terminated"])
    target = lambda_return(records["next", "reward"], replay["bootstrap"], *flags, discount=0.9, lmbda=0.7)
    logits, slow = agent.value(replay["state"], replay["belief"])
    nll = TwoHotLikelihood()
    per_step = (nll(logits[:, :-1], target) + nll(logits[:, :-1], slow[:, :-1])).squeeze(
        -1
    )  # the slow copy starts equal
    expected = (per_step * ~records["next", "done"][:, :-1, 0]).mean()
    torch.testing.assert_close(value, expected)
    value.backward()
    assert has_gradient(agent.posterior) == {True}
    assert has_gradient(agent.prior.core) == {True}
    assert has_gradient(agent.prior.head) == has_gradient(agent.actor) == {False}


def test_the_replay_value_loss_says_which_latents_it_lacks():
    agent = tiny_agent()
    replay = tiny_records(agent).set("bootstrap", torch.randn(BATCH, TIME, 1)).exclude("state")
    with pytest.raises(ValueError, match="'state' is missing, which the critic reads: there is 'action', 'belief'"):
        all_losses(agent)[2].replay_value_loss(replay)


def test_the_replay_value_loss_needs_no_batch_size_of_two():
    agent = tiny_agent()
    loss = all_losses(agent)[2]
    replay = tiny_records(agent).set("bootstrap", torch.randn(BATCH, TIME, 1))
    flat = TensorDict(replay.to_dict(), [BATCH])
    assert torch.equal(*(loss.replay_value_loss(each)["loss_replay_value"] for each in (replay, flat)))
