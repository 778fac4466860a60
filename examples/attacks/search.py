"""The search for a patch: windows of undisturbed episodes, Adam on the attack's loss, and which patch of all is kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from omegaconf import DictConfig
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase
from tqdm import tqdm

from r2dreamer.dreamer import Agent
from r2dreamer.envs import AdversarialPatch
from r2dreamer.losses import PlanningAttackLoss, total_loss

from ..cli.script import Interrupt
from ..training.evaluation import evaluate


class Windows:
    """Records of whole episodes, one after the other; windows of them may cross from one into the next."""

    def __init__(self, records: TensorDict, length: int):
        if len(records) < length:
            raise ValueError(
                f"{len(records)} frames are fewer than context={length}, a window's length: collect more episodes."
            )
        self.records, self.length = records, length

    def at(self, starts: torch.Tensor) -> TensorDict:
        """The windows [B, T] that begin at these records [B]."""
        return self.records[starts.unsqueeze(-1) + torch.arange(self.length)]

    def sample(self, count: int, generator: torch.Generator) -> TensorDict:
        return self.at(torch.randint(len(self.records) - self.length + 1, (count,), generator=generator))

    def spread(self, count: int) -> TensorDict:
        """At most `count` windows, evenly spread over all records and always the same."""
        last = len(self.records) - self.length
        return self.at(torch.linspace(0, last, min(count, last + 1)).round().long())


def collect_episodes(environments: EnvBase, agent: Agent, *, max_steps: int | None, seed: int) -> list[TensorDict]:
    """An episode of each environment with mode actions, as records: the observation, the action and the latents before it."""
    kept = []
    names = [*agent.observations.images, *agent.observations.vectors, "state", "belief", "action", "is_init"]
    keep = lambda module, inputs, acted: kept.append(acted.select(*names).cpu().clone())
    with agent.policy.register_forward_hook(keep):
        episodes = environments.batch_size.numel()
        result = evaluate(environments, agent.policy, episodes=episodes, max_steps=max_steps, seed=seed)
    steps = torch.stack(kept, 1)  # [N, L]
    return [_records(steps[index, :length]) for index, length in enumerate(result.lengths)]


def _records(steps: TensorDict) -> TensorDict:
    """[L] observations with the action taken at each and the latents after it, as records of what came before them."""
    before = steps.select("state", "belief", "action").float().roll(1, 0)  # the first record's is zeroed by is_init
    return before.set("is_init", steps["is_init"]).set("next", steps.exclude("state", "belief", "action", "is_init"))


@dataclass
class Search:
    """The best patch so far on the windows held out, and how the search went."""

    patch: AdversarialPatch
    score: float = float("inf")
    step: int = 0
    curve: list[dict[str, float | None]] = field(default_factory=list)

    def offer(self, patch: AdversarialPatch, step: int, held_out: dict[str, float], training: float | None) -> None:
        self.curve.append({"step": step, "training_loss": training} | held_out)
        if not math.isfinite(held_out["loss"]):
            raise FloatingPointError(f"The attack's loss on the windows held out is {held_out['loss']} at step {step}.")
        if held_out["loss"] < self.score:
            self.score, self.step = held_out["loss"], step
            self.patch = copy.deepcopy(patch)  # as it was when it was scored


def measure(
    loss: PlanningAttackLoss, batches: Sequence[TensorDictBase], precision: torch.dtype, seed: int
) -> dict[str, float]:
    """Means of the loss and its diagnostics over batches of windows; the same random numbers at every call."""
    patch, sums = copy.deepcopy(loss.patch), {}
    patch.reseed(patch.seed)  # of the copy: the draws of the patch itself go on
    device = patch.delta.device
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in batches:
            pixels = batch["next", loss.tensor_keys.pixels]
            # As an environment shows it, without the draws that a loss is averaged over.
            views = [(patch.corners(len(batch), pixels.shape[-2:]), None)]
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                terms = loss(batch.to(device), views=views)
            terms.set("loss", total_loss(terms))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(batch)
    return {name: value / sum(map(len, batches)) for name, value in sums.items()}


def optimize(
    loss: PlanningAttackLoss,
    windows: Windows,
    held_out: Sequence[TensorDictBase],
    cfg: DictConfig,
    *,
    precision: torch.dtype,
    interrupt: Interrupt,
    title: str,
) -> Search:
    """Adam on the patch, projected into its bounds after each step; the best one on the windows held out is kept.

    cfg: the attack's.
    """
    patch, device = loss.patch, loss.patch.delta.device
    how, seed = cfg.optimize, cfg.seed
    optimizer = torch.optim.Adam(loss.parameters(), lr=how.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps, how.lr * how.final_lr_fraction)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    search = Search(copy.deepcopy(patch))
    search.offer(patch, 0, measure(loss, held_out, precision, seed), None)
    with tqdm(total=how.steps, desc=title, disable=not cfg.progress) as bar:
        for step in range(1, how.steps + 1):
            if interrupt.requested:
                break
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                objective = total_loss(loss(windows.sample(how.batch_size, generator).to(device)))
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
            schedule.step()
            patch.project_()
            if step % how.eval_every == 0 or step == how.steps:
                search.offer(patch, step, measure(loss, held_out, precision, seed), objective.item())
                bar.set_postfix(best=f"{search.score:.4g}", at=search.step, refresh=False)
            bar.update()
    return search
