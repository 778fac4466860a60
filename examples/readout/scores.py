"""A world model alone on recorded episodes, and every fact asked of its features, of raw pixels, and of the other facts."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from tensordict import TensorDict, TensorDictBase
from tqdm import tqdm

from r2dreamer.dreamer import Agent

from ..training.learner import Learner
from ..training.metrics import Averages, rename_loss
from .ridge import heldout_r2, products

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


FEW = 2000  # records that raw pixels are read from: a solver's time grows with their cube

Scores = dict[str, dict[str, dict[str, float]]]  # by what is read, then by fact


def varying(records: TensorDictBase) -> dict[str, torch.Tensor]:
    """What changes of each fact: a target that stands still in all episodes cannot be asked for, nor its constant height."""
    facts = {name: value.float() for name, value in records["facts"].items()}
    moving = {name: value.flatten(0, 1).std(0) > 1e-6 for name, value in facts.items()}
    return {name: value[..., moving[name]] for name, value in facts.items() if moving[name].any()}


def model_scores(agent: Agent, records: TensorDictBase, episodes: int) -> Scores:
    """Of latents and embedding; the first ``episodes`` rows are the training episodes, here and below."""
    read, facts = features(agent, records), varying(records)
    return {
        name: {fact: heldout_r2(value, truth, episodes) for fact, truth in facts.items()}
        for name, value in read.items()
    }


def baseline_scores(records: TensorDictBase, keys: list[str], episodes: int) -> Scores:
    """Of raw observations, and of the other facts with their products: what these say, no image is needed for."""
    every = -(-records.numel() // FEW)
    few = records[:, every // 2 :: every] if every < records.shape[1] else records[:, -1:]
    raw = torch.cat([few["next", key].flatten(2).float() for key in keys], -1)
    scores: Scores = {"pixels": {}, "other facts": {}}
    for fact, truth in varying(few).items():
        scores["pixels"][fact] = heldout_r2(raw, truth, episodes)
    facts = varying(records)
    for fact, truth in facts.items():
        if others := [value for other, value in facts.items() if other != fact]:
            scores["other facts"][fact] = heldout_r2(products(torch.cat(others, -1)), truth, episodes)
    return scores
