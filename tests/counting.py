"""Environments whose every number says where it belongs, so that a misplaced one shows."""

import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

NO_ACTION = 0.0


def action_after(observation: torch.Tensor) -> torch.Tensor:
    """The action taken on seeing an observation (stream, episode, step, counter), never zero."""
    stream, episode, step, counter = observation.double().unbind(-1)
    return torch.stack([1 + counter, 1 + stream * 100 + step], -1).float()


def reward_of(observation: torch.Tensor) -> torch.Tensor:
    return (observation[..., 3:] * 0.5 + observation[..., :1] + 1).float()


def latents_of(observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(state, belief), exact in float16."""
    counter, stream = observation[..., 3:].float(), observation[..., :1].float()
    return torch.cat([counter % 512, stream], -1), torch.cat([counter % 256, stream, counter // 256], -1)


class CountingStreams:
    """Stands in for a collector over N environments; writes every batch into the same memory, as collectors may."""

    def __init__(self, num_streams: int, max_episode: int, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.max_episode = max_episode
        self.now = torch.zeros(num_streams, 4, dtype=torch.int64)  # stream, episode, step, counter
        self.now[:, 0] = torch.arange(num_streams)
        self.length = self._draw(num_streams)
        self.finished_lengths: list[int] = []
        self.history: list[list[tuple]] = [[] for _ in range(num_streams)]  # every observation, in order, per stream
        for row in self.now.tolist():
            self.history[row[0]].append(tuple(row))
        self.memory: dict[int, TensorDict] = {}

    def _draw(self, count: int) -> torch.Tensor:
        return torch.randint(1, self.max_episode + 1, (count,), generator=self.generator)

    def restart(self) -> None:
        self._new_episode(torch.ones(len(self.now), dtype=torch.bool))

    def _new_episode(self, which: torch.Tensor) -> None:
        self.now[which, 1] += 1
        self.now[which, 2] = 0
        self.now[which, 3] += 1
        self.length[which] = self._draw(int(which.sum()))
        for row in self.now[which].tolist():
            self.history[row[0]].append(tuple(row))

    def step(self) -> TensorDict:
        root = self.now.clone()
        state, belief = latents_of(root)
        after = root.clone()
        after[:, 2:] += 1
        done = after[:, 2:3] == self.length.unsqueeze(1)
        truncated = done & (after[:, 1:2] % 2 == 1)
        transition = TensorDict(
            {
                "count": root,
                "pixels": pixels_of(root),
                "state": state,
                "belief": belief,
                "is_init": root[:, 2:3] == 0,
                "action": action_after(root),
                "next": {
                    "count": after,
                    "pixels": pixels_of(after),
                    "reward": reward_of(after),
                    "done": done,
                    "terminated": done & ~truncated,
                    "truncated": truncated,
                },
            },
            batch_size=[len(root)],
        )
        self.now = after.clone()
        for row in after.tolist():
            self.history[row[0]].append(tuple(row))
        self.finished_lengths += self.length[done[:, 0]].tolist()
        self._new_episode(done[:, 0])
        return transition

    def collect(self, k: int) -> TensorDict:
        batch = torch.stack([self.step() for _ in range(k)], 1)  # [N, k]
        if k not in self.memory:
            self.memory[k] = batch.clone()
        return self.memory[k].update_(batch)


def pixels_of(observation: torch.Tensor) -> torch.Tensor:
    value = (observation[..., 3] * 7 + observation[..., 0] * 31) % 256
    return value.to(torch.uint8)[..., None, None, None].expand(*observation.shape[:-1], 1, 2, 2).contiguous()


class CountingEnv(EnvBase):
    """A real TorchRL environment with the same observations; its episodes last 1 + (episode % 5) steps."""

    def __init__(self, stream: int = 0):
        super().__init__(batch_size=[])
        self.stream, self.episode, self.steps, self.counter = stream, -1, 0, -1
        self.observation_spec = Composite(count=Unbounded((4,), dtype=torch.int64))
        self.action_spec = Bounded(-1e9, 1e9, (2,))
        self.reward_spec = Unbounded((1,))
        self.done_spec = Composite(
            {key: Binary(1, dtype=torch.bool, shape=(1,)) for key in ("done", "terminated", "truncated")}
        )

    def _observation(self) -> torch.Tensor:
        return torch.tensor([self.stream, self.episode, self.steps, self.counter])

    def _reset(self, tensordict=None, **kwargs):
        self.episode, self.steps, self.counter = self.episode + 1, 0, self.counter + 1
        return TensorDict({"count": self._observation()}, [])

    def _step(self, tensordict):
        expected = action_after(self._observation())
        assert torch.equal(tensordict["action"], expected), (tensordict["action"], expected)
        self.steps, self.counter = self.steps + 1, self.counter + 1
        done = torch.tensor([self.steps == 1 + self.episode % 5])
        observation = self._observation()
        flags = {"done": done, "terminated": done.clone(), "truncated": torch.zeros_like(done)}
        return TensorDict({"count": observation, "reward": reward_of(observation), **flags}, [])

    def _set_seed(self, seed):
        pass


def check_records(records: TensorDict, no_latents_at_end: bool = True) -> None:
    """Asserts that everything in a batch of records belongs to its observation."""
    nxt = records["next"]
    count = nxt["count"]
    first = count[..., 2] == 0
    before = count - torch.tensor([0, 0, 1, 1])
    assert torch.equal(records["is_init"][..., 0], first)
    led = torch.where(first.unsqueeze(-1), NO_ACTION, action_after(before))
    assert torch.equal(records["action"], led)
    assert torch.equal(nxt["reward"], torch.where(first.unsqueeze(-1), 0.0, reward_of(count)))
    assert torch.equal(nxt["done"], nxt["terminated"] | nxt["truncated"])
    if "pixels" in nxt:
        assert torch.equal(nxt["pixels"], pixels_of(count))
