"""What a user writes with the public API. A type checker reads it against an installed copy: py.typed is a promise."""

# pyright: strict
# torch, tensordict and TorchRL leave types of theirs open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase

from r2dreamer.dreamer import ActionSpace, Agent, ObservationSpace, build_agent, load_pretrained, save_pretrained
from r2dreamer.envs import RecordBuilder, RecordReplay, env_seeds, make_gym, make_probe, make_replay, make_vector_env
from r2dreamer.losses import (
    BarlowTwins,
    DreamerActorLoss,
    DreamerOptimizer,
    DreamerValueLoss,
    R2DreamerWorldModelLoss,
    lambda_return,
    total_loss,
)


def small_agent() -> Agent:
    observations, actions = ObservationSpace({}, {"observation": 4}), ActionSpace(2, discrete=True)
    return build_agent(observations, actions, belief=16, hidden=8, classes=4, depth=2)


def world_model_loss(agent: Agent, records: TensorDictBase) -> torch.Tensor:
    loss = R2DreamerWorldModelLoss(agent.world_model, BarlowTwins(), reward_weight=2.0)
    optimizer = DreamerOptimizer(loss.parameters(), lr=1e-3, warmup_steps=0)
    total = total_loss(loss(records))
    total.backward()
    optimizer.step()
    return total


def losses_of_behaviour(agent: Agent) -> tuple[DreamerActorLoss, DreamerValueLoss]:
    actor = DreamerActorLoss(agent.actor, agent.value_model, agent.imagination, imagination_horizon=3)
    return actor, DreamerValueLoss(agent.value_model)


def collect(agent: Agent) -> RecordReplay:
    make = partial(make_probe, "reward_from_action")
    environments = make_vector_env(make, env_seeds(0, 2, "train"), parallel=False)
    records = RecordBuilder(2, agent.policy.in_keys, latent_sizes=agent.latent_sizes)
    replay = make_replay(1000, 2, 4, 8)
    replay.extend(records(environments.rollout(10, agent.policy)))
    return replay


def dream(folder: Path) -> TensorDictBase:
    agent = load_pretrained(folder)
    save_pretrained(agent, None, folder)
    step = TensorDict({"observation": torch.zeros(1, 4), "is_init": torch.ones(1, 1, dtype=torch.bool)}, [1])
    return agent.imagination.rollout(15, agent.actor, tensordict=agent.policy(step).select("state", "belief"))


reward = torch.ones(2, 3, 1)
target: torch.Tensor = lambda_return(reward, reward, reward > 0, reward > 0)
frames: int = make_gym("CartPole-v1", seed=0).observation_spec["observation"].shape[-1]
sizes: dict[str, int] = small_agent().latent_sizes
