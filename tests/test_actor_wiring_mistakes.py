"""The wiring mistakes of a first user around continuing, actor and value, and with TorchRL's names."""

import pytest
import torch
import torchrl.modules
from agents import rssm_modules, tiny_agent, tiny_records
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_swap import composed, sample
from test_wiring_mistakes import FEATURES, LATENTS, Joined, head, latents, our_model, refused
from torch import nn
from torchrl.objectives import DreamerV3ActorLoss, ValueEstimators

from r2dreamer.dreamer import (
    RSSMPosterior,
    RSSMPrior,
    RSSMRollout,
)
from r2dreamer.losses import (
    DreamerActorLoss,
    DreamerValueLoss,
    R2DreamerWorldModelLoss,
    total_loss,
)

# --- Continuing ---


def actor_loss(agent, continue_model, settings=None, **keys):
    parts = agent.actor, agent.value_model, agent.imagination
    loss = DreamerActorLoss(*parts, continue_model=continue_model, imagination_horizon=3, **(settings or {}))
    loss.set_keys(**keys)
    return loss


def continuing(key, *layers, network=None):
    network = Joined(nn.Linear(FEATURES, 1), *layers) if network is None else network
    return TensorDictModule(network, in_keys=["state", "belief"], out_keys=[key])


def weights(loss, agent):
    torch.manual_seed(0)
    return loss(latents(agent))[1]["discount_weight"]


def test_a_probability_and_its_logit_weigh_alike():
    agent = tiny_agent(images=False)
    logit = continuing("continue_pred")
    probability = continuing("continuation", network=Joined(logit.module.layers, nn.Sigmoid()))
    torch.testing.assert_close(weights(actor_loss(agent, logit), agent), weights(actor_loss(agent, probability), agent))
    own = TensorDictModule(logit.module, in_keys=["state", "belief"], out_keys=["alive"])
    torch.testing.assert_close(
        weights(actor_loss(agent, logit), agent), weights(actor_loss(agent, own, continue_pred="alive"), agent)
    )


def test_the_world_model_loss_trains_either_alike():
    layer, found = nn.Linear(FEATURES, 1), []
    for key, layers in (("continue_pred", []), ("continuation", [nn.Sigmoid()])):
        agent, model = our_model(head(nn.Sequential(layer, *layers), key), without=["continue"])
        torch.manual_seed(0)
        losses = R2DreamerWorldModelLoss(model)(tiny_records(agent))[0]
        found.append((losses["loss_continue"], *torch.autograd.grad(losses["loss_continue"], layer.weight)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_probability_read_as_a_logit():
    agent = tiny_agent(images=False)
    with refused("continue_pred", "sigmoid", 'set_keys(continuation="...")'):
        actor_loss(agent, continuing("alive", nn.Sigmoid()), continue_pred="alive")
    with refused("continue_pred", "sigmoid"):
        actor_loss(agent, continuing("continue_pred", nn.Sigmoid()))
    with refused("continue_pred", "'continuation'", "a probability"):  # a sigmoid that no module shows
        hidden = continuing("continuation", network=lambda state, belief: state.mean(-1, keepdim=True).sigmoid())
        actor_loss(agent, hidden, continue_pred="continuation")
    for network in (nn.Sequential(nn.Linear(FEATURES, 1), nn.Sigmoid()), Hidden()):
        _, model = our_model(head(network, "continue_pred"), without=["continue"])
        with refused("continue_pred", "sigmoid"):
            R2DreamerWorldModelLoss(model)(tiny_records(agent))


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, 1)

    def forward(self, value):
        return torch.sigmoid(self.layer(value))


def test_a_logit_read_as_a_probability():
    agent = tiny_agent(images=False)
    logit = continuing("alive")
    logit.module.layers[0].bias.data.fill_(3.0)
    with refused("continuation holds", "a probability", 'set_keys(continue_pred="...")'):
        weights(actor_loss(agent, logit, continuation="alive"), agent)


def test_a_continue_model_of_another_key():
    agent = tiny_agent(images=False)
    with refused("continue_pred is missing", "continue_model", "set_keys(continue_pred="):
        weights(actor_loss(agent, continuing("alive")), agent)


@pytest.mark.parametrize("fused", [False, True])
def test_a_continue_head_that_nothing_trains(fused):
    """Its key is given to the actor loss, and forgotten for the world-model loss. A fused optimiser leaves no versions."""
    network = Joined(nn.Linear(FEATURES, 1))
    ends = TensorDictModule(network, in_keys=LATENTS, out_keys=[("next", "alive")])
    for named in (False, True):
        agent, model = our_model(ends, without=["continue"])
        world = R2DreamerWorldModelLoss(model)
        if named:
            world.set_keys(continue_pred="alive")
        actor = actor_loss(agent, continuing("alive", network=network), continue_pred="alive")
        own = {*network.parameters()}
        others = [p for p in [*world.parameters(), *actor.parameters()] if p not in own]
        optimizers = torch.optim.Adam(others, lr=1e-4), torch.optim.Adam(own, lr=1e-4, fused=fused)

        def train(world=world, actor=actor, agent=agent, optimizers=optimizers):
            for _ in range(15):
                (total_loss(world(tiny_records(agent, time=2))[0]) + actor(latents(agent))[0]["loss_actor"]).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

        if named:
            train()
        else:
            with refused("continue head is not trained", 'set_keys(continue_pred="its key")', "requires_grad_(False)"):
                train()
            network.requires_grad_(False)
            train()
            network.requires_grad_(True)


# --- Actor and value ---


def test_actor_and_value_in_the_wrong_order():
    agent = tiny_agent(images=False)
    with refused("without get_dist", "actor_model, value_model, model_based_env"):
        DreamerActorLoss(agent.value_model, agent.actor, agent.imagination)


def test_the_world_model_in_place_of_the_imagined_environment():
    agent = tiny_agent(images=False)
    with refused("model_based_env", "no rollout", "agent.imagination"):
        DreamerActorLoss(agent.actor, agent.value_model, agent.world_model)


def test_latents_that_are_not_where_imagination_begins():
    agent = tiny_agent(images=False)
    posterior = R2DreamerWorldModelLoss(agent.world_model)(tiny_records(agent))[1]
    with refused("state is missing", "the world model", "set_keys(state="):
        actor_loss(agent, agent.continue_model)(posterior.exclude("state", "belief"))


def test_latents_of_records_that_were_not_flattened():
    agent = tiny_agent(images=False)
    starts = R2DreamerWorldModelLoss(agent.world_model)(tiny_records(agent))[1]["next"].select("state", "belief")
    with refused("'state' has shape", "[N, features]", ".flatten(0, 1)"):
        actor_loss(agent, agent.continue_model)(starts)


@pytest.mark.parametrize("wrong", [{"discount": 1.5}, {"gamma": -0.1}, {"lmbda": 2}, {"return_rate": 0}])
def test_a_share_that_is_none(wrong):
    with refused("must be in"):
        actor_loss(tiny_agent(images=False), None, wrong)


def test_the_value_loss_before_the_actor_loss():
    agent = tiny_agent(images=False)
    imagined = latents(agent).unsqueeze(1)
    with refused("lambda_target is missing", "the actor loss", "set_keys(lambda_target="):
        DreamerValueLoss(agent.value_model)(imagined)
    loss = DreamerValueLoss(agent.value_model)
    loss.set_keys(discount_weight="weihgt")
    with refused("discount_weight is missing", "'weihgt'"):
        loss(imagined.set("lambda_target", torch.zeros(15, 1, 1)))


def test_a_replayed_sequence_without_its_bootstrap():
    agent = tiny_agent(images=False)
    with refused("bootstrap is missing", "lambda_target"):
        DreamerValueLoss(agent.value_model).replay_value_loss(tiny_records(agent))


def test_a_replayed_sequence_of_one_step():
    agent = tiny_agent(images=False)
    replayed = tiny_records(agent, time=1).set("bootstrap", torch.zeros(3, 1))
    with refused("shape [3, 1, 1]", "at least 2", "longer sequences"):
        DreamerValueLoss(agent.value_model).replay_value_loss(replayed)


def test_a_critic_of_logits_alone():
    logits = TensorDictModule(Joined(nn.Linear(FEATURES, 255)), ["state", "belief"], ["state_value_logits"])
    imagined = latents(tiny_agent(images=False)).set("lambda_target", torch.zeros(15, 1)).unsqueeze(1)
    for weight in (0.0, 1.0):
        with refused("there is no 'state_value'", "value_model"):
            DreamerValueLoss(logits, slow_critic_regularization=weight)(imagined)


def test_logits_of_another_name():
    """The head's value is decoded from its logits: read as a scalar it would be trained as none."""
    agent, model = our_model(without=["reward"])
    after = [("next", key) for key in ("my_logits", "reward")]
    loss = R2DreamerWorldModelLoss(TensorDictSequential(model, TensorDictModule(agent.reward, LATENTS, after)))
    with refused("reward is read as a number", "('next', 'my_logits')", "set_keys(reward_logits='my_logits')"):
        loss(tiny_records(agent))
    with torch.no_grad():
        assert loss(tiny_records(agent))[0]["loss_reward"].isfinite()
    loss.set_keys(reward_logits="my_logits")
    assert loss(tiny_records(agent))[0]["loss_reward"].requires_grad

    value = TensorDictModule(agent.value, ["state", "belief"], ["my_logits", "state_value"])
    loss, imagined = DreamerValueLoss(value), latents(agent).set("lambda_target", torch.zeros(15, 1)).unsqueeze(1)
    with refused("value is read as a number", "'my_logits'", "set_keys(value_logits='my_logits')"):
        loss(imagined)
    loss.set_keys(value_logits="my_logits")
    assert loss(imagined)[0]["loss_value"].requires_grad


def test_a_head_that_is_frozen_on_purpose():
    agent, model = our_model(without=["reward", "continue"])
    both = nn.Linear(FEATURES, 2)
    split = lambda *latents: both(torch.cat(latents, -1)).split(1, -1)
    frozen = lambda *latents: (split(*latents)[0].detach(), split(*latents)[1])
    written = [("next", key) for key in ("reward", "continue_pred")]
    loss = R2DreamerWorldModelLoss(TensorDictSequential(model, TensorDictModule(frozen, LATENTS, written)))
    losses, _ = loss(tiny_records(agent))
    assert not losses["loss_reward"].requires_grad and losses["loss_continue"].requires_grad


# --- TorchRL's names ---


def test_torchrls_actor_loss_in_place_of_ours_and_the_other_way_round():
    agent = tiny_agent(images=False)
    parts = agent.actor, agent.value_model, agent.imagination
    with refused("discount_loss", "from torchrl.objectives import DreamerActorLoss", error=TypeError):
        DreamerActorLoss(*parts, discount_loss=True)
    with refused("discount_loss", "from torchrl.objectives import DreamerValueLoss", error=TypeError):
        DreamerValueLoss(agent.value_model, discount_loss=True)
    with refused("continue_model", error=TypeError):  # TorchRL's own words
        torchrl.objectives.DreamerActorLoss(*parts, continue_model=agent.continue_model)
    loss = torchrl.objectives.DreamerActorLoss(*parts, imagination_horizon=3)
    with pytest.warns(UserWarning, match="passes no gradients.* DreamerActorLoss of r2dreamer.losses"):
        loss(latents(agent))
    with pytest.warns(UserWarning, match="use_reinforce=True"):  # trains the entropy alone
        DreamerV3ActorLoss(*parts, imagination_horizon=3)(latents(agent))


def test_torchrls_rssm_of_dreamer_v1_in_place_of_ours():
    with refused("action_spec", "from torchrl.modules import RSSMPrior", error=TypeError):
        RSSMPrior(action_spec=None, hidden_dim=8, rnn_hidden_dim=8, state_dim=3)
    with refused("hidden_dim", "from torchrl.modules import RSSMPosterior", error=TypeError):
        RSSMPosterior(hidden_dim=8, state_dim=3)
    agent = tiny_agent(images=False)
    gaussian = TensorDictModule(
        nn.Identity(), in_keys=["state", "belief", "action"], out_keys=["mean", "std", "state", "belief"]
    )
    with refused("rssm_prior reads 3 and writes 4", "from torchrl.modules import RSSMRollout"):
        RSSMRollout(gaussian, rssm_modules(agent)[1])
    rollout = torchrl.modules.RSSMRollout(*rssm_modules(agent))
    modules = [rollout if isinstance(module, RSSMRollout) else module for module in agent.world_model.module]
    with refused("TorchRL's RSSMRollout", "is_init", "from r2dreamer.dreamer import RSSMRollout"):
        R2DreamerWorldModelLoss(TensorDictSequential(*modules))


def test_bare_networks_in_the_rollout():
    agent = tiny_agent(images=False)
    with refused("rssm_prior is a bare RSSMPrior", "TensorDictModule(RSSMPrior(...)"):
        RSSMRollout(agent.prior, agent.posterior)
    with refused("rssm_prior is the class RSSMPrior"):
        RSSMRollout(RSSMPrior, RSSMPosterior)


def test_a_prior_of_another_class_says_once_that_it_is_slow():
    agent = tiny_agent(images=False)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = agent.prior

        def forward(self, *inputs):
            return self.inner(*inputs)

    with pytest.warns(UserWarning, match="Own and RSSMPosterior steps one by one"):
        RSSMRollout(*rssm_modules(agent, prior=Own()))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("free_bits", 1.0, "CategoricalKL(free_nats="),
        ("lambda_dynamic", 1.0, "CategoricalKL(dynamics="),
        ("lambda_representation", 0.1, "CategoricalKL(representation="),
        ("lambda_kl", 1.0, "CategoricalKL(dynamics="),
        ("unimix", 0.01, "CategoricalKL(unimix="),
        ("kl_mode", "separate", "always separate"),
        ("lambda_continue", 1.0, "continue_weight="),
        ("lambda_reward", 1.0, "reward_weight="),
        ("lambda_reco", 1.0, "no decoder"),
        ("reward_two_hot", True, "reward_logits"),
    ],
)
def test_arguments_of_torchrls_model_loss(name, value, said):
    with refused(name, said, "migrate_from_torchrl.md", error=TypeError):
        R2DreamerWorldModelLoss(tiny_agent(images=False).world_model, **{name: value})


def test_arguments_of_torchrls_other_losses_and_unknown_ones():
    agent = tiny_agent(images=False)
    parts = agent.actor, agent.value_model, agent.imagination
    with refused("continuation_model", "continue_model=", error=TypeError):
        DreamerActorLoss(*parts, continuation_model=agent.continue_model)
    with refused("value_loss", "two-hot", error=TypeError):
        DreamerValueLoss(agent.value_model, value_loss="two_hot")
    with refused("'entropy_bonsu'", "Did you mean entropy_bonus?", error=TypeError):
        DreamerActorLoss(*parts, entropy_bonsu=0.1)
    with refused("discount=..., lmbda=...", "make_value_estimator"):
        DreamerActorLoss(*parts).make_value_estimator(ValueEstimators.TDLambda, gamma=0.99)
    assert DreamerActorLoss(*parts, gamma=0.9).discount == 0.9
    with refused("gamma=0.9 and discount=0.8"):
        DreamerActorLoss(*parts, gamma=0.9, discount=0.8)


def test_the_continue_head_may_learn_the_discount_as_in_torchrl():
    agent = tiny_agent(images=False)
    records = tiny_records(agent)
    losses = R2DreamerWorldModelLoss(agent.world_model, continue_target_scale=0.9)
    torch.manual_seed(0)
    found, posterior = losses(records)
    logit = posterior["next", "continue_pred"]
    target = 0.9 * (1 - records["next", "terminated"].float())
    torch.testing.assert_close(found["loss_continue"], nn.functional.binary_cross_entropy_with_logits(logit, target))
    with refused("continue_target_scale=1.5"):
        R2DreamerWorldModelLoss(agent.world_model, continue_target_scale=1.5)


def test_nothing_of_this_is_said_where_all_is_right(recwarn):
    loss, _ = composed(our_actor=True, our_value=True)
    losses = loss(sample())
    assert sum(value for key, value in losses.items() if key.startswith("loss_")).isfinite()
    assert not [each for each in recwarn if "r2dreamer" in str(each.message)]
