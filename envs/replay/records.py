"""From a collector's transitions to replay records: one record per observation.

An episode of n steps has n transitions and n + 1 observations::

    transitions       (o0, a0) -> (r1, o1)      (o1, a1) -> (r2, o2, done)
    records     (0, o0, 0, is_init)     (a0, o1, r1)     (a1, o2, r2, done)

Every transition emits the record of its *root* observation, whose action and reward are those of the transition
before it; one that ends an episode emits the record of its last observation too, which is no transition's root.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key

from ..base.errors import require_positive

FLAG_KEYS = ("done", "terminated", "truncated")


class RecordBuilder:
    """Turns batches of transitions ``[N, k]`` of N streams (one per environment) into records ``[M]``.

    Reads: the observation keys, ``"is_init"``, ``"action"``, the latent keys where the policy wrote them, and
    ``("next", observation keys | "reward" | "done" | "terminated" | "truncated")``.

    Writes, per record, ordered in time within each stream:
        ``"stream"`` int64 ``[M]``; ``"action"`` float32 ``[M, A]``, which led to the observation; ``"is_init"``
        ``[M, 1]``; ``("next", ...)``: the observation, float32 ``"reward"`` ``[M, 1]``, the three flags ``[M, 1]``,
        and the latents *at* that observation: zeros where no policy has seen it (the last one of an episode).

    The newest action and reward of each stream wait here for the observation they led to, which the next batch brings.
    A batch that does not begin with that observation is refused: it was given twice, or one before it never.

    Args:
        latent_sizes: widths of the latents, needed only if the first batches come from a policy that writes none
            (random actions while the replay fills). Otherwise learned from the first batch that has them.

    Example: a plain TorchRL buffer. A batch of transitions would lose the first one of every episode to the loss: its
    ``is_init`` is true, which zeroes the action. Records have one more observation, and lose none.

        >>> from r2dreamer.envs import make_probe
        >>> from torchrl.collectors import Collector
        >>> from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
        >>> collector = Collector(make_probe("ending", seed=0), frames_per_batch=50, total_frames=100)
        >>> builder = RecordBuilder(num_streams=1, observation_keys=["pixels"])  # more streams: frames_per_batch of many steps
        >>> sampler = SliceSampler(slice_len=5, traj_key="stream")  # slices may cross ends of episodes, not streams
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), sampler=sampler, batch_size=20)
        >>> for transitions in collector:
        ...     _ = buffer.extend(builder(transitions))
        >>> batch = buffer.sample().reshape(4, 5)  # [B, T], for R2DreamerWorldModelLoss
        >>> batch["state"], batch["belief"] = torch.zeros(4, 5, 12), torch.zeros(4, 5, 8)  # a slice begins from zeros
        >>> bool(batch["action"][~batch["is_init"][..., 0]].any(-1).all())  # every action that was taken is there
        True
    """

    def __init__(
        self,
        num_streams: int,
        observation_keys: Iterable[NestedKey],
        latent_keys: Iterable[NestedKey] = ("state", "belief"),
        latent_sizes: Mapping[str, int] | Mapping[NestedKey, int] | None = None,
    ):
        require_positive(num_streams=num_streams)
        self.num_streams = num_streams
        self.observation_keys = [unravel_key(key) for key in observation_keys]
        self.latent_keys = [unravel_key(key) for key in latent_keys]
        self._latent_shapes = {unravel_key(key): (size,) for key, size in (latent_sizes or {}).items()}
        self.reset()

    def reset(self) -> None:
        """Forgets the waiting actions and rewards: the environments are about to be restarted."""
        self._has_pending = torch.zeros(self.num_streams, dtype=torch.bool)
        self._pending_action: torch.Tensor | None = None  # [N, A]
        self._pending_reward: torch.Tensor | None = None  # [N, 1]
        self._pending_observations: dict[NestedKey, torch.Tensor] = {}  # [N, ...], to which they led

    def __call__(self, transitions: TensorDictBase) -> TensorDict:
        if transitions.ndim == 1 and self.num_streams == 1:
            transitions = transitions.unsqueeze(0)
        if transitions.ndim != 2 or transitions.shape[0] != self.num_streams:
            raise ValueError(
                f"transitions of {self.num_streams} streams have the shape [{self.num_streams}, k], got "
                f"{list(transitions.shape)}; num_streams is the number of environments of the collector."
            )
        self._refuse_missing(transitions)
        nxt = cast(TensorDictBase, transitions["next"])
        is_init = transitions["is_init"]  # [N, k, 1]
        done = nxt["done"]  # [N, k, 1]
        self._refuse_gaps(transitions)
        action, reward = self._with_arrivals(transitions["action"].float(), nxt["reward"].float(), is_init, done)

        # A collector writes its next batch into the same memory.
        self._pending_observations = {key: nxt[key][:, -1].clone() for key in self.observation_keys}

        # Two slots per transition: its root observation, and the observation that ends the episode.
        mask = torch.stack([torch.ones_like(done), done], 2).squeeze(-1)  # [N, k, 2]

        def merge(root: torch.Tensor, end: torch.Tensor | None) -> torch.Tensor:
            both = torch.stack([root, torch.zeros_like(root) if end is None else end], 2)  # [N, k, 2, ...]
            return both[mask].to(torch.float32 if root.dtype == torch.float64 else root.dtype)  # [M, ...]

        records = TensorDict({}, batch_size=[int(mask.sum())], device=transitions.device)
        streams = torch.arange(self.num_streams, device=done.device).unsqueeze(1).expand(done.shape[:2])  # [N, k]
        records["stream"] = merge(streams, streams)
        records["action"] = merge(action, transitions["action"].float())
        records["is_init"] = merge(is_init, None)
        records["next", "reward"] = merge(reward, nxt["reward"].float())
        for key in FLAG_KEYS:
            records["next", key] = merge(torch.zeros_like(done), nxt[key])
        for key in self.observation_keys:
            records[unravel_key(("next", key))] = merge(transitions[key], nxt[key])
        for key in self.latent_keys:
            latent = self._latent(transitions, key)
            if latent is not None:
                records[unravel_key(("next", key))] = merge(latent, None)
        return records

    def _refuse_missing(self, transitions: TensorDictBase) -> None:
        after: list[NestedKey] = [unravel_key(("next", key)) for key in (*self.observation_keys, "reward", *FLAG_KEYS)]
        missing = [
            key for key in (*self.observation_keys, "is_init", "action", *after) if key not in transitions.keys(True)
        ]
        if missing:
            raise ValueError(
                f"The transitions lack {', '.join(map(repr, missing))}. They hold {sorted(map(str, transitions.keys(True, True)))}.\n"
                "'is_init' is written by torchrl's InitTracker transform, in the environment; observation_keys is a list of keys."
            )

    def _refuse_gaps(self, transitions: TensorDictBase) -> None:
        """A batch must begin where the last one ended: else action and reward would go to a wrong observation."""
        first = cast(TensorDictBase, transitions[:, 0])
        jumps = first["is_init"].reshape(self.num_streams)  # [N]
        for key, expected in self._pending_observations.items():
            before = expected.to(first[key].device)
            differs = (first[key] != before) & ~((first[key] != first[key]) & (before != before))  # NaN is no gap
            jumps = jumps | differs.reshape(self.num_streams, -1).any(-1)
        jumps = jumps & self._has_pending.to(jumps.device)
        if jumps.any():
            raise ValueError(
                f"stream {int(jumps.nonzero()[0])}: this batch does not begin with the observation that the last batch "
                "ended with. It was given twice, or a batch before it was left out, or the environments were reset. Give "
                "every batch once and in order, and call reset() of this builder when environments are reset."
            )

    def _with_arrivals(
        self, action: torch.Tensor, reward: torch.Tensor, is_init: torch.Tensor, done: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The action and the reward that arrived with each root observation; zeros with an initial one."""
        if self._pending_action is None or self._pending_reward is None:
            self._pending_action = torch.zeros_like(action[:, 0])
            self._pending_reward = torch.zeros_like(reward[:, 0])
        has_pending = self._has_pending.to(done.device).unsqueeze(1)  # [N, 1]
        continued = torch.cat([has_pending, ~done[:, :-1, 0]], 1)  # [N, k]
        orphan = ~is_init[..., 0] & ~continued
        if orphan.any():
            stream, step = orphan.nonzero()[0].tolist()
            raise ValueError(
                f"stream {stream}, step {step} of the batch: the observation is neither the first of an episode nor "
                "the successor of a known one. The environment needs torchrl's InitTracker transform; give every batch once "
                "and in order; after reset() of this builder reset the environments as well."
            )
        arrived_action = torch.cat([self._pending_action.unsqueeze(1), action[:, :-1]], 1)  # [N, k, A]
        arrived_reward = torch.cat([self._pending_reward.unsqueeze(1), reward[:, :-1]], 1)  # [N, k, 1]
        self._has_pending = ~done[:, -1, 0].cpu()
        # A collector writes its next batch into the same memory.
        self._pending_action = action[:, -1].clone()
        self._pending_reward = reward[:, -1].clone()
        return _zero_where(is_init, arrived_action), _zero_where(is_init, arrived_reward)

    def _latent(self, transitions: TensorDictBase, key: NestedKey) -> torch.Tensor | None:
        latent = transitions.get(key, default=None)  # [N, k, D]
        if latent is not None:
            self._latent_shapes[key] = tuple(latent.shape[2:])
        elif key in self._latent_shapes:
            latent = torch.zeros(*transitions.shape, *self._latent_shapes[key], device=transitions.device)
        return latent

    def state_dict(self) -> dict[str, Any]:
        return {
            "has_pending": self._has_pending,
            "action": self._pending_action,
            "reward": self._pending_reward,
            "observations": list(self._pending_observations.items()),
            "latent_shapes": [[key, list(shape)] for key, shape in self._latent_shapes.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._has_pending = state["has_pending"].clone()
        self._pending_action = state["action"].clone() if state["action"] is not None else None
        self._pending_reward = state["reward"].clone() if state["reward"] is not None else None
        self._pending_observations = {unravel_key(key): value.clone() for key, value in state["observations"]}
        self._latent_shapes = {unravel_key(key): tuple(shape) for key, shape in state["latent_shapes"]}


def _zero_where(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return value.masked_fill(mask.reshape(mask.shape[:2] + (1,) * (value.ndim - 2)), 0)
