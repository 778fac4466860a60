"""The LossModules: values against their parts, gradient routes present and absent, keys, state, targets."""

import pytest
import torch
from agents import ACTIONS, BELIEF, CATEGORICALS, CLASSES, tiny_agent, tiny_records
from tensordict import TensorDict
from torch import nn
from torchrl.objectives import categorical_kl_terms

from r2dreamer.dreamer import FeatureMLP, latent_head
from r2dreamer.losses import (
    BarlowTwins,
    DreamerActorLoss,
    DreamerValueLoss,
    R2DreamerWorldModelLoss,
    TwoHotLikelihood,
    barlow_twins_loss,
    categorical_kl,
    lambda_return,
    total_loss,
    two_hot_nll,
)


def all_losses(agent, **actor):
    return (
        R2DreamerWorldModelLoss(agent.world_model),
        DreamerActorLoss(
            agent.actor, agent.value_model, agent.imagination, continue_model=agent.continue_model, **actor
        ),
        DreamerValueLoss(agent.value_model),
    )


def has_gradient(module):
    return {p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()}


def start_latents(agent, count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = torch.zeros(count, CATEGORICALS, CLASSES)
    state[..., 1] = 1
    belief = torch.rand(count, BELIEF, generator=generator) * 2 - 1
    return TensorDict({"state": state.flatten(1), "belief": belief}, [count])


def test_the_world_model_loss_has_every_term_and_each_is_what_it_says():
    agent = tiny_agent()
    loss = R2DreamerWorldModelLoss(agent.world_model, BarlowTwins(weight=0.2, redundancy_weight=0.3))
    records = tiny_records(agent)
    losses, posterior = loss(records)
    names = ["loss_barlow", "loss_continue", "loss_dynamics", "loss_representation", "loss_reward"]
    assert sorted(key for key in losses.keys() if key.startswith("loss_")) == names
    assert sorted(loss.out_keys) == names
    k, e = (posterior["next", key].flatten(0, 1) for key in ("projected_latents", "encoded_latents"))
    torch.testing.assert_close(losses["loss_barlow"], 0.2 * sum(barlow_twins_loss(k, e, 0.3)))
    reward = TwoHotLikelihood()(posterior["next", "reward_logits"], records["next", "reward"]).mean()
    torch.testing.assert_close(losses["loss_reward"], reward)
    alive = 1 - records["next", "terminated"].float()
    probability = posterior["next", "continue_pred"].sigmoid()
    expected = -(alive * probability.log() + (1 - alive) * (1 - probability).log()).mean()
    torch.testing.assert_close(losses["loss_continue"], expected)
    q, p = (0.99 * posterior["next", f"{name}_logits"].softmax(-1) + 0.01 / CLASSES for name in ("posterior", "prior"))
    divergence = (q * (q.log() - p.log())).sum((-1, -2))
    torch.testing.assert_close(losses["kl"], divergence.mean())  # the diagnostic is not clipped
    kl = divergence.clamp_min(1).mean()
    assert not torch.allclose(kl, divergence.mean())
    torch.testing.assert_close(losses["loss_dynamics"], kl)
    torch.testing.assert_close(losses["loss_representation"], 0.1 * kl)
    assert all(not value.requires_grad for key, value in losses.items() if not key.startswith("loss_"))
    torch.testing.assert_close(total_loss(losses), sum(losses[name] for name in names))


def test_the_input_is_left_as_it_was():
    agent = tiny_agent()
    records = tiny_records(agent)
    before = records.clone()
    R2DreamerWorldModelLoss(agent.world_model)(records)
    assert set(records.keys(True, True)) == set(before.keys(True, True))
    assert (records == before).all()


def test_barlow_reaches_latents_and_projection_but_not_the_target():
    agent = tiny_agent()
    losses, posterior = R2DreamerWorldModelLoss(agent.world_model)(tiny_records(agent))
    posterior["next", "encoded_latents"].retain_grad()
    losses["loss_barlow"].backward(retain_graph=True)
    assert has_gradient(agent.heads["projection"]) == {True}
    assert has_gradient(agent.posterior) == {True}
    assert has_gradient(agent.encoder) == {True}  # through the posterior
    assert has_gradient(agent.reward) == has_gradient(agent.prior.head) == {False}

    k, e = (torch.randn(9, 4, requires_grad=True) for _ in range(2))
    pair = TensorDict({"next": {"projected_latents": k, "encoded_latents": e}}, [9])
    keys = R2DreamerWorldModelLoss.default_keys()
    BarlowTwins()(pair, keys)[0]["barlow"].backward()
    assert k.grad is not None and e.grad is None
    BarlowTwins(detach_target=False)(pair, keys)[0]["barlow"].backward()
    assert e.grad.abs().sum() > 0


def test_each_kl_term_trains_its_own_side():
    for term, prior, posterior in (("loss_dynamics", True, False), ("loss_representation", False, True)):
        agent = tiny_agent()
        loss = R2DreamerWorldModelLoss(agent.world_model)
        loss.kl.free_nats = 0.0
        # One step: through earlier states the prior's side would reach the posterior's networks, too.
        loss(tiny_records(agent, time=1))[0][term].backward()
        assert has_gradient(agent.prior.head) == {prior}
        assert has_gradient(agent.posterior.out) == {posterior}


def test_what_is_not_a_number_stays_so_and_flags_may_have_any_type():
    """An index beyond the bins would hide which loss it was."""
    logits, support = torch.zeros(2, 5), torch.linspace(-2, 2, 5)
    assert two_hot_nll(logits, torch.tensor([[float("nan")], [1.0]]), support).isnan().tolist() == [[True], [False]]
    assert lambda_return(torch.ones(3, 1, 1), torch.ones(3, 1, 1)).shape == (3, 0, 1)
    agent, found = tiny_agent(), []
    for dtype in (torch.bool, torch.uint8, torch.float32):
        records = tiny_records(agent)
        records["next", "terminated"] = records["next", "terminated"].to(dtype)
        torch.manual_seed(0)
        found.append(R2DreamerWorldModelLoss(agent.world_model)(records)[0]["loss_continue"].item())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("gap", [0.0, 90.0, 500.0])
def test_categorical_kl_is_finite_and_right_without_a_mix(gap):
    one = torch.tensor([[0.0, gap, -gap]], dtype=torch.float64).requires_grad_()
    two = torch.tensor([[gap, 0.0, 0.5 * gap]], dtype=torch.float64).requires_grad_()
    kl = categorical_kl(one, two)
    p, q = (torch.distributions.Categorical(logits=each) for each in (one, two))
    assert kl.item() == pytest.approx(torch.distributions.kl_divergence(p, q).item(), rel=1e-5)
    assert all(each.isfinite().all() for each in torch.autograd.grad(kl, [one, two]))
    logits = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    expected = categorical_kl_terms(*logits, 0.0, 0.01)[0]
    torch.testing.assert_close(categorical_kl(*logits, 0.01).mean(), expected)


def test_free_nats_silence_the_kl():
    agent = tiny_agent()
    loss = R2DreamerWorldModelLoss(agent.world_model)
    loss.kl.free_nats = 1e6
    losses, _ = loss(tiny_records(agent))
    (losses["loss_dynamics"] + losses["loss_representation"]).backward()
    assert has_gradient(agent.prior) == has_gradient(agent.posterior) == {False}


def test_the_actor_loss_trains_the_actor_and_nothing_else():
    for discrete in (False, True):
        agent = tiny_agent(discrete=discrete)
        _, loss, _ = all_losses(agent, imagination_horizon=4)
        agent.value.layers[-1].weight.data.normal_()
        latents = start_latents(agent)
        latents["belief"].requires_grad_()
        losses, imagined = loss(latents)
        losses["loss_actor"].backward()
        assert has_gradient(agent.actor) == {True}
        assert latents["belief"].grad is None
        for name in ("encoder", "prior", "posterior", "reward", "continue_", "value"):
            assert has_gradient(getattr(agent, name)) == {False}, name
        assert has_gradient(agent.heads["projection"]) == {False}
        owned = {id(p) for p in loss.parameters()}
        assert owned == {id(p) for p in agent.actor.parameters()}
        assert imagined["lambda_target"].shape == imagined["discount_weight"].shape == (6, 4, 1)


def test_the_actor_loss_equals_the_formula():
    agent = tiny_agent()
    for head in (agent.value, agent.reward, agent.continue_):
        head.layers[-1].weight.data.normal_(std=0.05)
    _, loss, _ = all_losses(agent, imagination_horizon=3, entropy_bonus=0.01, discount=0.9, lmbda=0.8)
    losses, imagined = loss(start_latents(agent))
    states = torch.cat([imagined["state"][:, :1], imagined["next", "state"]], 1)
    beliefs = torch.cat([imagined["belief"][:, :1], imagined["next", "belief"]], 1)
    value = agent.value(states, beliefs)[1]
    alive = agent.continue_(states, beliefs).sigmoid()
    reward = agent.reward(states, beliefs)[1]
    returns = lambda_return(reward, value, terminal=1 - alive, discount=0.9, lmbda=0.8)
    low, high = torch.quantile(returns, 0.05) * 0.01, torch.quantile(returns, 0.95) * 0.01
    scale = max(1.0, (high - low).item())
    weight = (0.9 * alive).cumprod(1)[:, :-1]
    policy = agent.actor.get_dist(imagined.select("state", "belief"))
    score = policy.log_prob(imagined["action"]).unsqueeze(-1) * (returns - value[:, :-1]) / scale
    expected = -(weight * (score + 0.01 * policy.entropy().unsqueeze(-1))).mean()
    torch.testing.assert_close(losses["loss_actor"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(imagined["lambda_target"], returns, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(imagined["discount_weight"], weight)


def test_better_actions_become_more_likely():
    """A world that pays for the first action only: after some steps of the actor loss it is nearly always taken."""
    agent = tiny_agent(discrete=True)

    class PaysForTheFirst:
        def reset(self, tensordict):
            return tensordict

        def rollout(self, steps, policy, *, tensordict, **_):
            imagined = agent.imagination.rollout(steps, policy, tensordict=tensordict)
            imagined["next", "reward"] = imagined["action"][..., :1]
            return imagined

    loss = DreamerActorLoss(agent.actor, agent.value_model, PaysForTheFirst(), imagination_horizon=3)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss(start_latents(agent, 32))[0]["loss_actor"].backward()
        optimizer.step()
    assert agent.actor.get_dist(start_latents(agent)).probs[:, 0].min() > 0.9


def test_set_keys_leaves_the_loss_on_its_device():
    with torch.device("meta"):
        agent = tiny_agent()
    bins = R2DreamerWorldModelLoss(agent.world_model), DreamerValueLoss(agent.value_model)
    for loss, name in zip(bins, ("reward_prediction", "prediction"), strict=True):
        for _ in range(2):
            assert [buffer.device.type for buffer in getattr(loss, name).buffers()] == ["meta"]
            loss.set_keys(**({"reward": "reward"} if name == "reward_prediction" else {"value": "state_value"}))


def test_records_of_more_dimensions_are_refused():
    """Objectives tell sequences and steps apart by their place."""
    agent = tiny_agent()
    records = torch.stack([tiny_records(agent), tiny_records(agent)])
    with pytest.raises(ValueError, match=r"(?s)expected \[B, T, 1\].*\.flatten\(0, 1\)"):
        R2DreamerWorldModelLoss(agent.world_model)(records)


def test_keys_can_be_renamed_everywhere():
    agent = tiny_agent()
    records = tiny_records(agent)
    reference = R2DreamerWorldModelLoss(agent.world_model)
    renamed = R2DreamerWorldModelLoss(agent.world_model)
    renamed.set_keys(reward="my_reward", terminated="over")
    # The model still writes "reward"; only the target and the flag come under other names.
    renamed.reward_prediction = reference.reward_prediction
    moved = records.clone()
    moved.rename_key_(("next", "reward"), ("next", "my_reward"))
    moved.rename_key_(("next", "terminated"), ("next", "over"))
    torch.manual_seed(0)
    expected = total_loss(reference(records)[0])
    torch.manual_seed(0)
    torch.testing.assert_close(total_loss(renamed(moved)[0]), expected)
    assert ("next", "over") in renamed.in_keys and ("next", "terminated") not in renamed.in_keys

    _, actor, value = all_losses(agent, imagination_horizon=3)
    actor.set_keys(lambda_target="target", discount_weight="weight")
    value.set_keys(lambda_target="target", discount_weight="weight")
    _, imagined = actor(start_latents(agent))
    assert "target" in imagined.keys() and "lambda_target" not in imagined.keys()
    assert value(imagined)[0]["loss_value"].isfinite()
    with pytest.raises(ValueError, match="nonsense"):
        value.set_keys(nonsense="x")


def test_in_keys_are_all_that_is_read():
    agent = tiny_agent()
    for loss, data in zip(
        all_losses(agent, imagination_horizon=3)[:2], (tiny_records(agent), start_latents(agent)), strict=True
    ):
        loss(data.select(*loss.in_keys))


def test_state_dict_holds_parameters_once_and_restores_them():
    agent = tiny_agent(seed=0)
    losses = nn.ModuleList(all_losses(agent, imagination_horizon=3))
    losses[1](start_latents(agent))
    state = {key: value.clone() for key, value in losses.state_dict().items()}
    trained = sum(p.numel() for p in losses.parameters() if p.requires_grad)
    assert trained == sum(agent.parameter_counts().values())
    stored = sum(value.numel() for key, value in state.items() if "params" in key and "target" not in key)
    assert stored <= trained + 2 * 255  # and the two-hot supports
    other_agent = tiny_agent(seed=1)
    others = nn.ModuleList(all_losses(other_agent, imagination_horizon=3))
    others.load_state_dict(state)
    latents = start_latents(agent)
    for one, other in (
        (agent.value_model, other_agent.value_model),
        (agent.continue_model, other_agent.continue_model),
    ):
        key = one.out_keys[-1]
        assert torch.equal(one(latents.copy())[key], other(latents.copy())[key])
    assert torch.equal(losses[1].return_norm.high, others[1].return_norm.high)


def test_scalar_heads_are_trained_in_symlog_space():
    agent = tiny_agent()
    scalar = latent_head(FeatureMLP(CATEGORICALS * CLASSES + BELIEF, 8, 1, 1), ["state_value"])
    loss = DreamerValueLoss(scalar)
    imagined = start_latents(agent, 4).unsqueeze(1).expand(4, 3).clone()
    imagined["lambda_target"] = torch.randn(4, 3, 1)
    symlog = lambda x: x.sign() * x.abs().log1p()
    value = scalar(imagined.clone())["state_value"]
    expected = (symlog(value) - symlog(imagined["lambda_target"])).square().mean()  # the slow copy agrees: no term
    torch.testing.assert_close(loss(imagined)[0]["loss_value"], expected)


def test_bad_arguments_are_refused_at_construction():
    agent = tiny_agent()
    with pytest.raises(ValueError, match="imagination_horizon"):
        DreamerActorLoss(agent.actor, agent.value_model, agent.imagination, imagination_horizon=0)
    with pytest.raises(ValueError, match="slow_critic_regularization"):
        DreamerValueLoss(agent.value_model, slow_critic_regularization=-1.0)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_losses_under_autocast_stay_near_float32(precision):
    agent = tiny_agent()
    records = tiny_records(agent)
    values = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", precision, enabled=enabled):
            losses, _ = R2DreamerWorldModelLoss(agent.world_model)(records)
        assert all(value.dtype == torch.float32 for value in losses.values())
        values.append(losses["loss_reward"] + losses["loss_continue"])
    torch.testing.assert_close(*values, rtol=0.02, atol=0.02)


def test_actions_have_the_size_of_the_space():
    assert tiny_agent(discrete=True).actor.get_dist(start_latents(None)).probs.shape == (6, ACTIONS)
