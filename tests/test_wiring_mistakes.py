"""The wiring mistakes of a first user: each is an error of at most four lines that names the key and the remedy."""

import functools
from contextlib import contextmanager

import pytest
import torch
from agents import BELIEF, CATEGORICALS, CLASSES, tiny_agent, tiny_records
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_swap import sample, torchrl_parts
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import ParallelEnv, TransformedEnv

from r2dreamer.dreamer import (
    ActionSpace,
    ObservationSpace,
    ProjectionHead,
    build_agent,
)
from r2dreamer.envs import make_gym
from r2dreamer.losses import (
    BarlowTwins,
    CategoricalKL,
    DreamerActorLoss,
    DreamerValueLoss,
    R2DreamerWorldModelLoss,
    Reconstruction,
    total_loss,
)

LATENTS = [("next", "state"), ("next", "belief")]
FEATURES = CATEGORICALS * CLASSES + BELIEF


@contextmanager
def refused(*said, error=ValueError):
    """What is done inside is refused, in at most four lines that say all of this."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert len(message.splitlines()) <= 4 and max(map(len, message.splitlines())) <= 400, message
    for part in said:
        assert part in message, f"{part!r} is not in:\n{message}"


# --- The policy ---


def cartpole_agent():
    torch.manual_seed(0)
    sizes = dict(belief=16, hidden=8, classes=4, depth=2, categoricals=3)
    return build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, True), **sizes)


CARTPOLE = functools.partial(make_gym, "CartPole-v1", seed=0)
NO_MEMORY = ("no memory", "'state' and 'belief'", "auto_register_policy_transforms=True", "agent.primer()")


def test_a_policy_in_a_parallel_env_without_registration():
    env, agent = ParallelEnv(2, CARTPOLE, mp_start_method="fork"), cartpole_agent()
    with refused(*NO_MEMORY):
        env.rollout(3, agent.policy, break_when_any_done=False)
    remedied = TransformedEnv(env, agent.primer())
    with torch.no_grad():
        steps = remedied.rollout(12, agent.policy, break_when_any_done=False)
    for t in range(1, 12):
        previous = (steps[key][:, t - 1].float() * ~steps["is_init"][:, t] for key in ("state", "belief", "action"))
        torch.testing.assert_close(steps["belief"][:, t], agent.prior(*previous)[2].detach())
    remedied.close()


def test_a_policy_in_a_collector_without_registration():
    env, agent = ParallelEnv(2, CARTPOLE, mp_start_method="fork"), cartpole_agent()
    collector = Collector(env, agent.policy, frames_per_batch=8, total_frames=8)
    with refused(*NO_MEMORY):
        next(iter(collector))
    collector.shutdown()


def test_a_policy_called_by_hand_without_what_it_returned():
    agent = tiny_agent(images=False)
    seen = {"speed": torch.ones(2, 6), "is_init": torch.zeros(2, 1, dtype=torch.bool)}
    with refused(*NO_MEMORY):
        agent.policy(TensorDict(seen, [2]))
    seen["is_init"] = torch.tensor([[True], [False]])  # one of the two is in mid-episode
    with refused(*NO_MEMORY):
        agent.policy(TensorDict(seen, [2]))
    step = agent.policy(TensorDict(seen | {"is_init": torch.ones(2, 1, dtype=torch.bool)}, [2]))
    agent.policy(step.set("is_init", torch.zeros(2, 1, dtype=torch.bool)))


def test_an_environment_without_is_init():
    agent = tiny_agent(images=False)
    with refused("'is_init' is missing", "InitTracker"):
        agent.policy(TensorDict({"speed": torch.ones(2, 6)}, [2]))


# --- The world-model loss ---


class Joined(nn.Module):
    """A network over the latents side by side."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, *parts):
        return self.layers(torch.cat(parts, -1))


def head(network, key, in_keys=LATENTS):
    key = key if isinstance(key, tuple) else (key,)
    return TensorDictModule(Joined(network), in_keys=in_keys, out_keys=[("next", *key)])


def our_model(*heads, without=()):
    """An agent and its world model, without some of its heads and with others."""
    agent = tiny_agent(images=False)
    known = {"projection": agent.heads["projection"], "reward": agent.reward, "continue": agent.continue_}
    dropped = [network for name, network in known.items() if name in without]
    modules = [m for m in agent.world_model.module if m not in dropped and getattr(m, "module", None) not in dropped]
    return agent, TensorDictSequential(*modules, *heads)


def spoilt(agent, **entries):
    """Records with other entries below "next", or without them (None)."""
    records = tiny_records(agent)
    for key, value in entries.items():
        if value is None:
            records["next"].pop(key)
        else:
            records["next", key] = value(records["next", key]) if callable(value) else value
    return records


def latents(agent, count=15):
    return TensorDict(
        {"state": torch.zeros(count, CATEGORICALS * CLASSES), "belief": torch.rand(count, BELIEF)}, [count]
    )


def test_no_projection_head():
    _, model = our_model(without=["projection"])
    with refused("'projected_latents'", "a projection head", "ProjectionHead", "set_keys"):
        R2DreamerWorldModelLoss(model)


def test_forgotten_set_keys():
    world_model, *_ = torchrl_parts()
    loss = R2DreamerWorldModelLoss(world_model)  # its encoder writes "encoded"
    with refused("'encoded_latents'", "the encoder", "set_keys(encoded_latents='encoded')"):
        loss(sample())
    loss.set_keys(encoded_latents="encoded")
    assert total_loss(loss(sample())[0]).isfinite()


def test_set_keys_with_a_misspelt_key():
    loss = R2DreamerWorldModelLoss(tiny_agent(images=False).world_model)
    with refused("projcted_latents", "did you mean projected_latents"):
        loss.set_keys(projcted_latents="projected_latents")


def test_set_keys_with_a_misspelt_entry():
    loss = R2DreamerWorldModelLoss(torchrl_parts()[0])
    with refused("encoded_latents='encodded'", "writes no ('next', 'encodded')", "Did you mean 'encoded'?"):
        loss.set_keys(encoded_latents="encodded")
    value = DreamerValueLoss(tiny_agent(images=False).value_model)
    with refused("value='state_valeu'", "Did you mean 'state_value'?"):
        value.set_keys(value="state_valeu")


def test_set_keys_with_a_tuple():
    loss = R2DreamerWorldModelLoss(torchrl_parts()[0])
    with refused("below 'next' already", "set_keys(encoded_latents='encoded')"):
        loss.set_keys(encoded_latents=("next", "encoded"))
    with refused("encoded_latents=3", "a string"):
        loss.set_keys(encoded_latents=3)


def test_a_class_in_place_of_an_instance():
    agent = tiny_agent(images=False)
    with refused("representation=BarlowTwins is a class", "BarlowTwins(...)"):
        R2DreamerWorldModelLoss(agent.world_model, BarlowTwins)
    with refused("kl=CategoricalKL is a class"):
        R2DreamerWorldModelLoss(agent.world_model, kl=CategoricalKL)
    with refused("value_model=TensorDictModule is a class"):
        DreamerValueLoss(TensorDictModule)


def test_a_bare_network_in_place_of_a_module_with_keys():
    with refused("value_model is a Linear", "TensorDictModule(network, in_keys=[...], out_keys=[...])"):
        DreamerValueLoss(nn.Linear(4, 1))
    with refused("world_model is a Linear", "TensorDictModule(network"):
        R2DreamerWorldModelLoss(nn.Linear(4, 1))


@pytest.mark.parametrize(("key", "said"), [("reward", "the environment"), ("terminated", "the environment")])
def test_records_without(key, said):
    agent = tiny_agent(images=False)
    with refused(f"('next', '{key}')", said, f"set_keys({key}="):
        R2DreamerWorldModelLoss(agent.world_model)(spoilt(agent, **{key: None}))


@pytest.mark.parametrize("key", ["is_init", "state", "action"])
def test_transitions_in_place_of_records(key):
    agent = tiny_agent(images=False)
    with refused(f"reads '{key}'", "RecordBuilder"):
        R2DreamerWorldModelLoss(agent.world_model)(tiny_records(agent).exclude(key))


def test_a_reward_that_would_broadcast():
    agent = tiny_agent(images=False)
    square = tiny_records(agent, batch=4, time=4)  # where [B, T] against [B, T, 1] gives [B, T, T]
    square["next", "reward"] = square["next", "reward"].squeeze(-1)
    scalar, both = our_model(head(nn.Linear(FEATURES, 1), "reward"), without=["reward"])[1], agent.world_model
    for model in (scalar, both):
        with refused("('next', 'reward') has shape [4, 4]", "expected [B, T, 1]", ".unsqueeze(-1)"):
            R2DreamerWorldModelLoss(model)(square)


def test_rewards_that_are_not_numbers():
    agent = tiny_agent(images=False)
    records = tiny_records(agent)
    records["next", "reward"][1, 2] = torch.nan
    with refused("reward holds 1 values that are NaN or Inf", "environment"):
        R2DreamerWorldModelLoss(agent.world_model)(records)
    replayed = records.select("state", "belief").set("bootstrap", torch.zeros(records.shape))
    replayed["next"] = records["next"].select("reward", "done", "terminated")
    with refused("reward holds 1 values"):
        DreamerValueLoss(agent.value_model).replay_value_loss(replayed)


def test_observations_that_are_not_numbers():
    agent = tiny_agent(images=False)
    records = tiny_records(agent)
    records["next", "speed"][1, 2] = torch.inf
    with refused("'speed')", "NaN or Inf", "environment"):
        R2DreamerWorldModelLoss(agent.world_model)(records)


@pytest.mark.parametrize("name", ["reward_weight", "continue_weight"])
def test_a_negative_weight(name):
    with refused(f"{name}=-1", "0 switches"):
        R2DreamerWorldModelLoss(tiny_agent(images=False).world_model, **{name: -1.0})


def test_a_stale_projection_in_the_batch():
    """A head that writes another key leaves the one of an earlier pass to be trained on."""
    agent, model = our_model(head(nn.Linear(FEATURES, 12), "projection"), without=["projection"])
    loss = R2DreamerWorldModelLoss(model)
    records = tiny_records(agent)
    records["next", "projected_latents"] = torch.randn(*records.shape, agent.encoder.out_features)
    with refused("('next', 'projected_latents')", "earlier pass", "a projection head"):
        loss(records)


def test_another_number_of_bins():
    agent = tiny_agent(images=False, num_bins=63)
    with refused("63", "255", "num_reward_bins"):
        R2DreamerWorldModelLoss(agent.world_model)(tiny_records(agent))


def test_logits_where_a_scalar_is_read():
    agent, model = our_model(head(nn.Linear(FEATURES, 255), "reward"), without=["reward"])
    with refused("reward has shape [3, 5, 255]", "expected [3, 5, 1]", "'reward_logits'"):
        R2DreamerWorldModelLoss(model)(tiny_records(agent))
    value = TensorDictModule(Joined(nn.Linear(FEATURES, 255)), in_keys=["state", "belief"], out_keys=["state_value"])
    with refused("state_value has shape [15, 3, 255]", "expected [15, 3, 1]", "'state_value_logits'"):
        DreamerActorLoss(agent.actor, value, agent.imagination, imagination_horizon=3)(latents(agent))


def test_no_reward_head():
    _, model = our_model(without=["reward"])
    with refused("'reward_logits'", "the reward head"):
        R2DreamerWorldModelLoss(model)


def test_a_projection_of_another_size():
    agent, model = our_model(without=["projection"])
    projection = TensorDictModule(
        ProjectionHead(FEATURES, 5), in_keys=LATENTS, out_keys=[("next", "projected_latents")]
    )
    with refused("'projected_latents' has 5 features", "embedding's size"):
        R2DreamerWorldModelLoss(TensorDictSequential(*model.module, projection))(tiny_records(agent))


def test_a_divergence_in_place_of_the_objective():
    with refused("representation=CategoricalKL", "['dynamics', 'representation']", "BarlowTwins()"):
        R2DreamerWorldModelLoss(tiny_agent(images=False).world_model, CategoricalKL())


def test_reconstruction_without_a_decoder_or_with_other_names():
    agent = tiny_agent(images=False)
    with refused('("next", "reconstruction")', "ObservationDecoder"):
        R2DreamerWorldModelLoss(agent.world_model, Reconstruction())(tiny_records(agent))
    _, model = our_model(head(nn.Linear(FEATURES, 6), ("reconstruction", "sped")))
    with refused("['sped']", "no observation of that name"):
        R2DreamerWorldModelLoss(model, Reconstruction())(tiny_records(agent))


@pytest.mark.parametrize("shape", [lambda batch: batch[:, 0], lambda batch: batch.reshape(-1)])
def test_a_batch_without_time(shape):
    """Its samples would be unrolled as one sequence."""
    agent = tiny_agent(images=False)
    with refused("('next', 'reward') has shape", "expected [B, T, 1]", "SliceSampler"):
        R2DreamerWorldModelLoss(agent.world_model)(shape(tiny_records(agent)))


def test_a_choice_by_its_index():
    agent = tiny_agent(images=False, discrete=True)
    records = tiny_records(agent)
    records["action"] = records["action"].argmax(-1, keepdim=True)
    with refused("The action has shape", "expected 2 numbers", "one-hot"):
        R2DreamerWorldModelLoss(agent.world_model)(records)


def test_a_reward_of_two_numbers():
    agent = tiny_agent(images=False)
    batch = tiny_records(agent)
    batch["next", "reward"] = batch["next", "reward"].expand(*batch.shape, 2).clone()
    with refused("('next', 'reward') has shape", "one number for each step"):
        R2DreamerWorldModelLoss(agent.world_model)(batch)


def test_an_observation_that_is_not_in_the_batch():
    agent = tiny_agent(images=False)
    key = agent.encoder.in_keys[0]
    with refused(f"The encoder reads {key!r}, which is missing", "below 'next'"):
        R2DreamerWorldModelLoss(agent.world_model)(tiny_records(agent).exclude(key))


def test_no_flag_is_proposed_for_another():
    """A head that learns to continue from truncations would be wrong, and nothing would say so."""
    agent = tiny_agent(images=False)
    with refused("terminated is missing", 'set_keys(terminated="its name")'):
        R2DreamerWorldModelLoss(agent.world_model)(tiny_records(agent).exclude(("next", "terminated")))


def test_the_name_of_an_objective_in_its_place():
    with refused("representation='barlow' is text", "pass an instance"):
        R2DreamerWorldModelLoss(tiny_agent(images=False).world_model, "barlow")


def test_a_sum_of_no_losses():
    with refused("No entry begins with 'loss_'", "'state'"):
        total_loss(TensorDict({"state": torch.zeros(3)}))
