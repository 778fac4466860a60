"""A world model alone: trained on recorded episodes without actor and critic, and what its latents are there."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from tensordict import TensorDict, TensorDictBase
from tqdm import tqdm

from r2dreamer.dreamer import Agent

from ..training.learner import Learner
from ..training.metrics import Averages, rename_loss

AT_ONCE = 50  # episodes of one forward pass
REPORTED = 100  # updates that the reported losses are means over


class WorldModelLearner(Learner):
    """The trainer's learner, whose losses are those of the world model: what it updates, it updates as a run does."""

    def losses(self, batch: TensorDict) -> tuple[TensorDict, TensorDict]:
        losses, posterior = self.world_model_loss(self.augmentation(batch))
        return losses, posterior.get("next").select("state", "belief").detach()


def batch_of(agent: Agent, records: TensorDictBase, device: torch.device) -> TensorDict:
    """Whole episodes [B, T] as the world model reads them; their first record zeroes the latents before it."""
    batch = TensorDict(records.exclude("facts").to_dict(), records.shape).to(device)
    for key, size in agent.latent_sizes.items():
        batch[key] = torch.zeros(*records.shape, size, device=device)
    return batch


def train_world_model(
    agent: Agent, algorithm: DictConfig, records: TensorDictBase, seed: int, *, updates: int, batch_size: int,
    precision: torch.dtype, progress: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Trains the agent's world model in place; the last losses. The same seed draws the same batches for any agent."""
    learner = WorldModelLearner(agent, algorithm, precision)
    generator, averages = torch.Generator().manual_seed(seed), Averages()
    for update in tqdm(range(updates), desc="training", disable=not progress):
        rows = torch.randint(len(records), (batch_size,), generator=generator)
        losses, _ = learner.update(batch_of(agent, records[rows], learner.device))
        if update >= updates - REPORTED:
            averages.add(losses)
    averages.check_finite(updates, updates)
    return {rename_loss(name): value for name, value in averages.pop().items()}


@torch.no_grad()
def features(agent: Agent, records: TensorDictBase) -> dict[str, torch.Tensor]:
    """Of every record [E, T]: the ``latents``, belief beside the posterior's mean, and the ``embedding``."""
    device = next(agent.encoder.parameters()).device
    found = {"latents": [], "embedding": []}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # beliefs follow sampled states
        for rows in torch.arange(len(records)).split(AT_ONCE):
            after = agent.world_model(batch_of(agent, records[rows], device).exclude(("next", "reward")))["next"]
            state = agent.posterior.latent.expected(after["posterior_logits"])
            found["latents"].append(torch.cat([after["belief"], state], -1).float().cpu())
            found["embedding"].append(after["encoded_latents"].float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}
