"""Returns and lengths of the training episodes, from the collector's batches."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase


class EpisodeReturns:
    """Sums rewards per environment; :meth:`pop` gives the mean over episodes that ended since the last call."""

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.latest = float("nan")
        self.finished: list[tuple[float, int]] = []
        self.reset()

    def reset(self) -> None:
        """The environments begin new episodes; the ones under way do not count."""
        self.reward = torch.zeros(self.num_envs, dtype=torch.float64)
        self.length = torch.zeros(self.num_envs, dtype=torch.int64)

    def add(self, transitions: TensorDictBase) -> None:
        rewards = transitions["next", "reward"].reshape(self.num_envs, -1).double()  # [N, k]
        ends = transitions["next", "done"].reshape(self.num_envs, -1)
        for reward, end in zip(rewards.unbind(1), ends.unbind(1), strict=True):
            self.reward += reward
            self.length += 1
            if end.any():
                self.finished += zip(self.reward[end].tolist(), self.length[end].tolist(), strict=True)
                self.latest = self.finished[-1][0]
                self.reward[end], self.length[end] = 0.0, 0

    def pop(self) -> dict[str, float]:
        if not self.finished:
            return {}
        returns, lengths = zip(*self.finished, strict=True)
        self.finished = []
        count = len(returns)
        return {"train/return": sum(returns) / count, "train/length": sum(lengths) / count, "train/episodes": count}

    def state_dict(self) -> dict:
        return {"finished": [list(episode) for episode in self.finished], "latest": self.latest}

    def load_state_dict(self, state: dict) -> None:
        self.finished = [tuple(episode) for episode in state["finished"]]
        self.latest = state["latest"]
