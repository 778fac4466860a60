"""Windows of what an undisturbed agent saw and thought: the material that a patch is optimised on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase

from r2dreamer.dreamer import Agent
from r2dreamer.envs import make_vector_env

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


def collect_episodes(
    make_environment: Callable[..., EnvBase],
    agent: Agent,
    seeds: Sequence[int],
    *,
    parallel: bool,
    max_steps: int | None,
    seed: int,
) -> list[TensorDict]:
    """One episode from each seed with mode actions, as records: the observation, the action before it, the latents before it."""
    environments = make_vector_env(make_environment, seeds, parallel=parallel)
    kept = []
    names = [*agent.observations.images, *agent.observations.vectors, "state", "belief", "action", "is_init"]
    keep = lambda module, inputs, acted: kept.append(acted.select(*names).cpu().clone())
    hook = agent.policy.register_forward_hook(keep)
    try:
        result = evaluate(environments, agent.policy, episodes=len(seeds), max_steps=max_steps, seed=seed)
    finally:
        hook.remove()
        environments.close()
    steps = torch.stack(kept, 1)  # [N, L]
    return [_records(steps[index, :length]) for index, length in enumerate(result.lengths)]


def _records(steps: TensorDict) -> TensorDict:
    """[L] observations with the action taken at each and the latents after it, as records of what came before them."""
    before = steps.select("state", "belief", "action").float().roll(1, 0)  # the first record's is zeroed by is_init
    return before.set("is_init", steps["is_init"]).set("next", steps.exclude("state", "belief", "action", "is_init"))
