"""Dreamer V1 and V2: the way of the actor's gradient, and the critic that its returns come from."""

import pytest
import torch
from agents import tiny_agent, tiny_records
from launcher import CARTPOLE, config
from tensordict.nn import TensorDictModule
from test_classic import actor_loss, every_generation, made, model_loss, start_of
from test_losses import has_gradient
from torch import nn

from r2dreamer.dreamer import ActionSpace, Imagination, ObservationSpace, latent_head
from r2dreamer.examples import train
from r2dreamer.examples.training.setup import make_agent
from r2dreamer.losses import CopyEvery, DreamerValueLoss, DynamicsActorLoss, NoTarget, UnitGaussian, lambda_return


@every_generation
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_actors_gradient_passes_the_dynamics_and_moves_nothing_but_the_actor(generation, discrete, autocast):
    agent = made(generation, discrete=discrete)
    loss = actor_loss(agent, entropy_bonus=0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model_loss(agent, generation)(tiny_records(agent))  # casts its weights first, as in an update
        losses, imagined = loss(start_of(agent))
    assert not any(value.requires_grad for value in imagined.values(True, True))
    losses["loss_actor"].backward()
    assert has_gradient(agent.actor) == {True}
    for name, part in agent.parts().items():
        assert name == "actor" or all(p.grad is None and p.requires_grad for p in part.parameters()), name
    agent.actor.zero_grad()
    with torch.no_grad():  # a world that ignores actions teaches nothing
        agent.prior.core.action_in.weight.zero_()
    loss(start_of(agent))[0]["loss_actor"].backward()
    assert has_gradient(agent.actor) == {False}


def test_the_gradient_through_the_dynamics_equals_finite_differences():
    agent = made("v1")
    for head in (agent.reward, agent.value):
        head.layers[-1].weight.data.normal_()
    loss = actor_loss(agent, imagination_horizon=4)
    bias = agent.actor[0].module.layers[-1].bias

    def value():
        torch.manual_seed(5)
        return loss(start_of(agent))[0]["loss_actor"]

    value().backward()
    step = 1e-2
    for i in range(len(bias)):
        both = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[i] += sign * step
                both.append(value().item())
                bias[i] -= sign * step
        assert bias.grad[i].item() == pytest.approx((both[0] - both[1]) / (2 * step), rel=0.03, abs=1e-5)


def test_two_hot_heads_pass_the_gradient_and_heads_that_cut_it_are_refused():
    """The agent of build_agent, whose heads decode logits, in a dream that is differentiated."""
    agent = tiny_agent()
    for head in (agent.reward, agent.value):
        head.layers[-1].weight.data.normal_()
    state, belief = torch.randn(4, agent.latent_sizes["state"]), torch.randn(4, agent.latent_sizes["belief"])
    state.requires_grad_()
    logits, value = agent.reward(state, belief)
    bins = agent.reward.two_hot.get_buffer("bins")
    (expected,) = torch.autograd.grad((logits.softmax(-1) * bins).sum(), state, retain_graph=True)
    (found,) = torch.autograd.grad(value.sum(), state)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())

    dream = Imagination(agent.prior, latent_head(agent.reward, ["reward_logits", "reward"]), differentiable=True)
    options = dict(imagination_horizon=2, entropy_bonus=0.0)
    DynamicsActorLoss(agent.actor, agent.value_model, dream, **options)(start_of(agent))[0]["loss_actor"].backward()
    assert has_gradient(agent.actor) == {True}
    cut = lambda state, belief: agent.reward(state, belief)[1].detach()
    dream = Imagination(agent.prior, latent_head(cut, ["reward"]), differentiable=True)
    with pytest.raises(ValueError, match="the imagined reward passes no gradient"):
        DynamicsActorLoss(agent.actor, agent.value_model, dream, **options)(start_of(agent))


@pytest.mark.parametrize("dynamics", [0.0, 0.3, 1.0])
def test_the_actor_loss_equals_the_formula(dynamics):
    agent = made("v2")
    loss = actor_loss(agent, dynamics=dynamics, entropy_bonus=0.01)
    losses, imagined = loss(start_of(agent))
    states, beliefs = (
        torch.cat([imagined[key][:, :1], imagined["next", key]], 1).detach() for key in ("state", "belief")
    )
    value, reward = agent.value(states, beliefs), agent.reward(states, beliefs)
    alive = agent.continue_(states, beliefs).sigmoid()
    returns = lambda_return(reward, value, terminal=1 - alive, discount=0.9, lmbda=0.8)
    policy = agent.actor.get_dist(imagined.select("state", "belief"))
    score = policy.log_prob(imagined["action"]).unsqueeze(-1) * (returns - value[:, :-1])
    weight = (0.9 * alive).cumprod(1)[:, :-1]
    objective = dynamics * returns + (1 - dynamics) * score + 0.01 * policy.entropy().unsqueeze(-1)
    torch.testing.assert_close(losses["loss_actor"], -(weight * objective).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(imagined["lambda_target"], returns, rtol=1e-4, atol=1e-5)


def test_without_dynamics_the_gradient_is_reinforces():
    agent = made("v2")
    losses, imagined = actor_loss(agent, dynamics=0.0)(start_of(agent))
    losses["loss_actor"].backward()
    found = [p.grad.clone() for p in agent.actor.parameters()]
    agent.actor.zero_grad()
    states, beliefs = (torch.cat([imagined[key][:, :1], imagined["next", key]], 1) for key in ("state", "belief"))
    advantage = imagined["lambda_target"] - agent.value(states, beliefs)[:, :-1]
    policy = agent.actor.get_dist(imagined.select("state", "belief"))
    score = policy.log_prob(imagined["action"]).unsqueeze(-1) * advantage.detach()
    (-(imagined["discount_weight"] * score).mean()).backward()
    for gradient, parameter in zip(found, agent.actor.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_returns_bootstrap_from_the_copy_which_follows_every_interval():
    agent = made("v2")
    loss = DreamerValueLoss(
        agent.value_model, slow_critic_regularization=0.0, bootstrap_target=True, scalar_likelihood=UnitGaussian()
    )
    slow = CopyEvery(loss, rate=1 / 3)
    latents, value = start_of(agent), lambda model: model(start_of(agent))["state_value"].detach()
    copies = []
    for _ in range(7):
        with torch.no_grad():
            agent.value.layers[-1].bias.add_(1.0)
        copies.append(torch.equal(value(loss.bootstrap_model), value(agent.value_model)))
        slow.step()
        copies[-1] = (copies[-1], torch.equal(value(loss.bootstrap_model), value(agent.value_model)))
    assert copies == [(False, step % 3 == 0) for step in range(7)]
    imagined = latents.unsqueeze(1).expand(6, 3).clone()
    imagined["lambda_target"] = torch.randn(6, 3, 1)
    expected = (agent.value(imagined["state"], imagined["belief"]) - imagined["lambda_target"]).square().mean() / 2
    torch.testing.assert_close(loss(imagined)[0]["loss_value"], expected)  # no regulariser
    assert DreamerValueLoss(agent.value_model).bootstrap_model is agent.value_model


def test_a_copy_takes_counters_along_and_no_nan_of_before():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    loss = DreamerValueLoss(TensorDictModule(network, in_keys=["belief"], out_keys=["state_value"]))
    target, slow = loss.target_value_model_params, CopyEvery(loss, rate=0.5)
    network[1].num_batches_tracked.fill_(7)
    target["module", "0", "weight"].data.fill_(torch.nan)
    slow.step()
    assert target["module", "1", "num_batches_tracked"] == 7
    assert torch.equal(target["module", "0", "weight"], network[0].weight)
    network[1].num_batches_tracked.fill_(9)
    slow.step()
    assert target["module", "1", "num_batches_tracked"] == 7  # not due


def test_reinforce_alone_needs_no_differentiable_world(recwarn):
    agent = made("v2")
    plain = Imagination(agent.prior, agent.imagination.reward)
    loss = DynamicsActorLoss(agent.actor, agent.value_model, plain, dynamics=0.0, imagination_horizon=2)
    loss(start_of(agent))[0]["loss_actor"].backward()
    assert not [each for each in recwarn if "passes no gradients" in str(each.message)]


def test_an_update_of_the_second_generation_bootstraps_from_the_copy():
    cfg = config(*CARTPOLE, "algorithm=dreamerv2", "experiment=quickstart_dreamerv2")
    observations, actions = ObservationSpace({}, {"observation": 4}), ActionSpace(2, True)
    agent = make_agent(cfg.algorithm, cfg.model, observations, actions)
    learner = train.Learner(agent, cfg.algorithm, torch.float32)
    targets = []

    def imagine():
        torch.manual_seed(4)
        targets.append(learner.actor_loss(start_of(agent))[1]["lambda_target"])

    imagine()
    learner.slow_critic.step()
    with torch.no_grad():
        agent.value.layers[-1].bias.add_(1.0)
    imagine()
    assert torch.equal(targets[0], targets[1])  # what was learnt since the last copy is not there yet
    for _ in range(round(1 / cfg.algorithm.slow_critic_rate)):
        learner.slow_critic.step()
    imagine()
    assert (targets[2] > targets[1] + 0.05).all()


def test_a_critic_without_the_slow_one_learns():
    cfg = config(*CARTPOLE, "algorithm.value.slow_critic_regularization=0")
    agent = make_agent(cfg.algorithm, cfg.model, ObservationSpace({}, {"observation": 4}), ActionSpace(2, True))
    learner = train.Learner(agent, cfg.algorithm, torch.float32)
    learner.slow_critic.step()
    assert isinstance(learner.slow_critic, NoTarget) and not list(learner.slow_critic.parameters())


def test_a_world_through_which_no_gradient_passes_is_refused():
    agent = tiny_agent()
    with pytest.raises(ValueError, match="dynamics=1.0: .* differentiable=True"):
        actor_loss(agent)
    actor_loss(agent, dynamics=0.0)  # REINFORCE asks for none


def test_reinforce_of_squashed_actions_is_refused():
    agent = made("v1")
    with pytest.raises(ValueError, match="dynamics=0.5 .* squashed"):
        actor_loss(agent, dynamics=0.5)(start_of(agent))
