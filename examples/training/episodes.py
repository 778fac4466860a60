"""Returns, lengths and metrics of the training episodes, from the collector's batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase

Scores = Callable[[list[float], dict[str, list[float]]], dict[str, float]]


@dataclass
class Episode:
    """What one episode amounts to; of a metric, the largest value it had."""

    reward: float
    length: int
    metrics: dict[str, float]
    cut_off: bool = False  # it had not ended when no more steps were played


def summarise(episodes: Sequence[Episode], scores: Scores | None) -> dict[str, float]:
    """Means over the episodes, and the suite's own `scores` of them: a function of their returns and metrics."""
    returns = [episode.reward for episode in episodes]
    metrics = {name: [episode.metrics[name] for episode in episodes] for name in episodes[0].metrics}
    values = {"return": returns, "length": [episode.length for episode in episodes]} | metrics
    means = {name: sum(each) / len(episodes) for name, each in values.items()}
    return means | (scores(returns, metrics) if scores else {})


def reported(observed: TensorDictBase, shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """What the environments report beside the reward, below "metrics": by name, each of `shape`."""
    entries = observed.get("metrics", None)
    return {} if entries is None else {name: value.reshape(shape).double().cpu() for name, value in entries.items()}


class EpisodeReturns:
    """Sums rewards per environment; :meth:`pop` sums up the episodes that ended since the last call."""

    def __init__(self, num_envs: int, scores: Scores | None = None):
        self.num_envs, self.scores = num_envs, scores
        self.latest = float("nan")
        self.finished: list[Episode] = []
        self.reset()

    def reset(self) -> None:
        """The environments begin new episodes; the ones under way do not count."""
        self.reward = torch.zeros(self.num_envs, dtype=torch.float64)
        self.length = torch.zeros(self.num_envs, dtype=torch.int64)
        self.metrics: dict[str, torch.Tensor] = {}

    def add(self, transitions: TensorDictBase) -> None:
        after = transitions.get("next")
        rewards = after.get("reward").reshape(self.num_envs, -1).double()  # [N, k]
        ends = after.get("done").reshape(self.num_envs, -1)
        metrics = reported(after, rewards.shape)
        for step, (reward, end) in enumerate(zip(rewards.unbind(1), ends.unbind(1), strict=True)):
            self.reward += reward
            self.length += 1
            for name, value in metrics.items():
                lowest = torch.full_like(reward, -torch.inf)
                self.metrics[name] = torch.maximum(self.metrics.get(name, lowest), value[:, step])
            for index in end.nonzero().flatten().tolist():
                self._finish(index)

    def _finish(self, index: int) -> None:
        metrics = {name: value[index].item() for name, value in self.metrics.items()}
        self.finished.append(Episode(self.reward[index].item(), int(self.length[index]), metrics))
        self.latest = self.finished[-1].reward
        self.reward[index], self.length[index] = 0.0, 0
        for value in self.metrics.values():
            value[index] = -torch.inf

    def pop(self) -> dict[str, float]:
        if not self.finished:
            return {}
        line = summarise(self.finished, self.scores) | {"episodes": len(self.finished)}
        self.finished = []
        return {f"train/{name}": value for name, value in line.items()}

    def state_dict(self) -> dict:
        scores = getattr(self.scores, "state_dict", dict)()
        return {"finished": [vars(episode) for episode in self.finished], "latest": self.latest, "scores": scores}

    def load_state_dict(self, state: dict) -> None:
        self.finished = [Episode(**episode) for episode in state["finished"]]
        self.latest = state["latest"]
        if state.get("scores"):
            scores: Any = self.scores
            scores.load_state_dict(state["scores"])
