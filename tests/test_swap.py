"""Our losses inside TorchRL's own DreamerV3 example (the docstring of torchrl.objectives.DreamerV3Loss)."""

import pytest
import torch
from agents import tiny_agent, tiny_records
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.model_based import DreamerEnv
from torchrl.modules import MLP, RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3, TanhNormal, WorldModelWrapper
from torchrl.modules.functional import symlog
from torchrl.objectives import DreamerV3ActorLoss, DreamerV3Loss, DreamerV3ValueLoss, SoftUpdate
from torchrl.trainers.algorithms import DreamerV3OptimizationStepper, DreamerV3Optimizer

from r2dreamer.dreamer import ObservationDecoder, ProjectionHead
from r2dreamer.losses import DreamerActorLoss, DreamerValueLoss, R2DreamerWorldModelLoss, Reconstruction, total_loss


def torchrl_parts():
    """TorchRL's networks of its smallest example, sized alike; in place of its decoder, our projection head."""
    sizes = dict(hidden_dim=8, rnn_hidden_dim=8, num_categoricals=2, num_classes=2)
    prior_net = RSSMPriorV3(action_shape=(1,), action_dim=1, **sizes)
    posterior_net = RSSMPosteriorV3(obs_embed_dim=8, **sizes)
    prior = TensorDictModule(
        prior_net,
        in_keys=["state", "belief", "action"],
        out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
    )
    posterior = TensorDictModule(
        posterior_net,
        in_keys=[("next", "belief"), ("next", "encoded")],
        out_keys=[("next", "posterior_logits"), ("next", "state")],
    )
    latents = [("next", "state"), ("next", "belief")]
    reward_net = MLP(in_features=12, out_features=1, num_cells=8, depth=1)
    world_model = TensorDictSequential(
        TensorDictModule(torch.nn.Linear(3, 8), in_keys=[("next", "observation")], out_keys=[("next", "encoded")]),
        RSSMRolloutV3(prior, posterior, reset_key="is_init"),
        TensorDictModule(ProjectionHead(12, 8), in_keys=latents, out_keys=[("next", "projected_latents")]),
        TensorDictModule(reward_net, in_keys=latents, out_keys=[("next", "reward")]),
    )
    imagination = WorldModelWrapper(
        TensorDictModule(prior_net, in_keys=["state", "belief", "action"], out_keys=["_", "state", "belief"]),
        TensorDictModule(reward_net, in_keys=["state", "belief"], out_keys=["reward"]),
    )
    env = DreamerEnv(imagination, prior_shape=(4,), belief_shape=(8,))
    env.observation_spec = Composite(state=Unbounded(4), belief=Unbounded(8))
    env.state_spec = env.observation_spec.clone()
    env.action_spec = Bounded(-1, 1, (1,))
    env.reward_spec = Unbounded((1,))
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(
            MLP(in_features=12, out_features=2, num_cells=8, depth=1), in_keys=["state", "belief"], out_keys=["params"]
        ),
        TensorDictModule(NormalParamExtractor(), in_keys=["params"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], distribution_class=TanhNormal, return_log_prob=True
        ),
    )
    value = TensorDictModule(
        MLP(in_features=12, out_features=1, num_cells=8, depth=1), in_keys=["state", "belief"], out_keys=["state_value"]
    )
    return world_model, env, actor, value


def sample():
    flag = torch.zeros(2, 3, 1, dtype=torch.bool)
    return TensorDict(
        {
            "state": torch.zeros(2, 3, 4),
            "belief": torch.zeros(2, 3, 8),
            "action": torch.zeros(2, 3, 1),
            "is_init": flag,
            "next": {
                "observation": torch.randn(2, 3, 3),
                "reward": torch.randn(2, 3, 1),
                "done": flag.clone(),
                "terminated": flag.clone(),
            },
        },
        [2, 3],
    )


def composed(*, our_actor, our_value):
    world_model, env, actor, value = torchrl_parts()
    model_loss = R2DreamerWorldModelLoss(world_model)
    model_loss.set_keys(pixels="observation", encoded_latents="encoded")
    if our_actor:
        actor_loss = DreamerActorLoss(actor, value, env, imagination_horizon=3)
    else:
        actor_loss = DreamerV3ActorLoss(actor, value, env, imagination_horizon=3)
    if our_value:
        value_loss = DreamerValueLoss(value)
    else:
        value_loss = DreamerV3ValueLoss(value, actor_loss=actor_loss, slow_critic_regularization=1.0)
    return DreamerV3Loss(model_loss, actor_loss, value_loss), SoftUpdate(value_loss, tau=0.02)


@pytest.mark.parametrize("our_actor", [False, True])
@pytest.mark.parametrize("our_value", [False, True])
def test_torchrls_dreamer_trains_with_our_losses(our_actor, our_value):
    torch.manual_seed(0)
    loss_module, target_updater = composed(our_actor=our_actor, our_value=our_value)
    data = sample()
    losses = loss_module(data)
    total = sum(value for key, value in losses.items() if key.startswith("loss_"))
    total.backward()
    gradients = [p.grad for p in loss_module.parameters() if p.grad is not None]
    assert total.isfinite() and gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert not losses["replay_context", "state"].requires_grad

    optimizer = DreamerV3Optimizer(loss_module.parameters(), lr=3e-3, warmup_steps=0)
    stepper = DreamerV3OptimizationStepper(loss_module, optimizer, target_updater, warmup_steps=1)
    stepper.warmup(data)
    barlow = []
    for _ in range(60):
        metrics = stepper.step(None, data)
        assert all(value.isfinite().all() for value in metrics.values())
        barlow.append(metrics["loss_barlow"].item())
    assert sum(barlow[-10:]) < 0.8 * sum(barlow[:10])  # latents are sampled: the loss of one update tells little


@pytest.mark.parametrize("batch_size", [[2], []])
def test_records_without_time_in_their_batch_size_are_read_all_the_same(batch_size):
    world_model = torchrl_parts()[0]
    loss = R2DreamerWorldModelLoss(world_model)
    loss.set_keys(encoded_latents="encoded")
    decoder = tiny_agent(images=False, heads={"decoder": ObservationDecoder})
    reconstruction = R2DreamerWorldModelLoss(decoder.world_model, Reconstruction())
    for each, records in ((loss, sample()), (reconstruction, tiny_records(decoder, batch=2))):
        results = []
        for given in (records, TensorDict(records.to_dict(), batch_size)):
            if given is not records:  # what a replay buffer adds
                given["index"] = torch.zeros(2, dtype=torch.int64)
            torch.manual_seed(0)
            losses, posterior = each(given)
            results.append(total_loss(losses))
            assert posterior.batch_size == records.batch_size
        assert given.batch_size == torch.Size(batch_size) and torch.equal(*results)


def test_a_world_model_may_observe_the_reward_that_it_predicts():
    _, *others = torchrl_parts()[0].module
    seen = []

    def encode(observation, reward):
        seen.append(reward)
        return torch.cat([observation, reward, observation, reward], -1)

    encoder = TensorDictModule(encode, [("next", "observation"), ("next", "reward")], [("next", "encoded")])
    loss, records = R2DreamerWorldModelLoss(TensorDictSequential(encoder, *others)), sample()
    loss.set_keys(encoded_latents="encoded")
    losses, posterior = loss(records)
    assert torch.equal(*seen, records["next", "reward"]) and losses["loss_reward"].requires_grad
    assert torch.equal(posterior["next", "true_reward"], *seen) and not torch.equal(posterior["next", "reward"], *seen)
    decoder = TensorDictModule(
        lambda belief: belief[..., :1], [("next", "belief")], [("next", "reconstruction", "reward")]
    )
    loss = R2DreamerWorldModelLoss(TensorDictSequential(encoder, *others, decoder), Reconstruction())
    loss.set_keys(encoded_latents="encoded")
    losses, posterior = loss(records)  # what is reconstructed was observed, not predicted
    drawn, observed = posterior["next", "reconstruction", "reward"], symlog(records["next", "reward"])
    torch.testing.assert_close(losses["reconstruction_reward"], (drawn - observed).square().mean())
    *others, head = others
    renamed = TensorDictModule(head.module, head.in_keys, [("next", "reward_hat")])
    loss = R2DreamerWorldModelLoss(TensorDictSequential(encoder, *others, renamed))
    loss.set_keys(encoded_latents="encoded")
    with pytest.raises(
        ValueError, match=r"set_keys\(reward=.reward_hat"
    ):  # the observed reward is not taken for a prediction
        loss(records)
