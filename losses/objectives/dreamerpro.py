"""DreamerPro: latents and embeddings must agree on which prototypes an observation belongs to (arXiv 2110.14565).

Two augmented copies of the records are encoded and filtered. With u = unit(P e) and v = unit(Q [z, h]) their projections,
q = softmax(C u / tau) over the prototypes C, and y = Sinkhorn(C unit(P' e')) of the slowly following P' and encoder:

    swapped   -1/2 [y_2 ln q_1 + y_1 ln q_2]      each copy's embedding predicts the other's assignment
    temporal  -y ln softmax(C v / tau)            the latents predict their own copy's assignment
    norm      (|P e| - 1)^2 + (|Q [z, h]| - 1)^2
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from ..functional import sinkhorn
from ..ranks import gather_ranks, own_rows, ranks, sum_ranks
from ..wiring import unregistered
from .base import Objective, Terms


class DreamerPro(Objective):
    """Clusters in place of pixels: prototypes, assigned by a slow encoder, that embeddings and latents must predict.

    Encoder and rollout are the world model's, used a second time and not owned. Targets carry no gradient, and for the first
    ``frozen_updates`` the prototypes get none. After every update the slow copies move by ``ema_rate`` (at the first they
    become copies) and the prototypes return to length 1.

    Reads the records [B, T] among what the world model wrote: the rollout's and the encoder's inputs.

    Args:
        encoder: observation -> embedding, on records.
        rollout: records with embeddings -> ``("next", "state")`` and ``("next", "belief")``.
        embedding_size: size of the embedding.
        latent_size: size of state and belief together.
        weight: of each term.
        prototypes: number of them.
        size: of the space the prototypes live in.
        temperature: of the predicted assignments.
        sinkhorn_eps: as ``eps`` of :func:`sinkhorn`.
        sinkhorn_iterations: as ``iterations`` there.
        ema_rate: share by which the slow copies move.
        frozen_updates: updates before the prototypes learn.
        dropped_steps: at the window's begin, where the latents come from the replay, not from the augmented copy.
        augmentation: records -> records, called once for each copy; None leaves both as they are.
    """

    terms = ("swapped", "temporal", "norm")
    encoder: Any
    rollout: Any
    updates: torch.Tensor

    def __init__(
        self,
        encoder: TensorDictModuleBase,
        rollout: TensorDictModuleBase,
        embedding_size: int,
        latent_size: int,
        *,
        weight: float = 1.0,
        prototypes: int = 2500,
        size: int = 32,
        temperature: float = 0.1,
        sinkhorn_eps: float = 0.05,
        sinkhorn_iterations: int = 3,
        ema_rate: float = 0.05,
        frozen_updates: int = 10_000,
        dropped_steps: int = 1,
        augmentation: nn.Module | None = None,
    ):
        super().__init__(weight)
        positive = {"prototypes": prototypes, "size": size, "temperature": temperature}
        positive |= {"sinkhorn_eps": sinkhorn_eps, "sinkhorn_iterations": sinkhorn_iterations}
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name}={value} of DreamerPro must be positive.")
        for name, value in {"dropped_steps": dropped_steps, "frozen_updates": frozen_updates}.items():
            if value < 0:
                raise ValueError(f"{name}={value} of DreamerPro must not be negative.")
        if not 0 < ema_rate <= 1:
            raise ValueError(f"ema_rate={ema_rate} must be in (0, 1]; 1 makes the slow encoder a copy every update.")
        self.temperature, self.ema_rate = temperature, ema_rate
        self.sinkhorn_eps, self.sinkhorn_iterations = sinkhorn_eps, sinkhorn_iterations
        self.frozen_updates, self.dropped_steps = frozen_updates, dropped_steps
        self.augmentation = nn.Identity() if augmentation is None else augmentation
        unregistered(self, encoder=encoder, rollout=rollout)  # the world model's
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, size), dim=-1))
        self.embedding_projection = nn.Linear(embedding_size, size)
        self.latent_projection = nn.Linear(latent_size, size)
        self.slow_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.slow_projection = copy.deepcopy(self.embedding_projection).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @classmethod
    def of(cls, agent: Any, **options: Any) -> DreamerPro:
        """For an agent with ``encoder``, ``rollout`` and ``latent_sizes``."""
        return cls(
            agent.encoder, agent.rollout, agent.encoder.out_features, sum(agent.latent_sizes.values()), **options
        )

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        if tensordict.shape[1] <= self.dropped_steps:
            raise ValueError(
                f"Records of {tensordict.shape[1]} steps, of which DreamerPro drops {self.dropped_steps}: none is left. "
                "Use a longer batch_length."
            )
        embedding_key = self.encoder.out_keys[0]
        needed = [key for key in [*self.encoder.in_keys, *self.rollout.in_keys] if key != embedding_key]
        records = tensordict.select(*dict.fromkeys(needed))
        copies: Any = torch.cat([self.augmentation(records), self.augmentation(records)])  # [2B, T]
        with torch.no_grad():
            slow = self.slow_projection(self.slow_encoder(copies.copy()).get(embedding_key))
        self.rollout(self.encoder(copies))
        latents = torch.cat([copies.get(("next", "state")), copies.get(("next", "belief"))], -1)
        embedded, latent = self.embedding_projection(copies.get(embedding_key)), self.latent_projection(latents)

        with torch.autocast(slow.device.type, enabled=False):
            targets = [self._assign(each) for each in slow.chunk(2)]  # each copy by itself, [B*T', K]
            prototypes = self._trained_prototypes()
            by_embedding, by_latents = (
                F.log_softmax(cosines(self._rows(projected), prototypes) / self.temperature, -1).chunk(2)
                for projected in (embedded, latent)
            )
            cross_entropy = lambda target, logits: -(target * logits).sum(-1).mean()
            first, second = cross_entropy(targets[1], by_embedding[0]), cross_entropy(targets[0], by_embedding[1])
            terms = {
                "swapped": (first + second) / 2,
                "temporal": cross_entropy(torch.cat(targets), torch.cat(by_latents)),
                "norm": sum((each.float().norm(dim=-1) - 1).square().mean() for each in (embedded, latent)),
            }
            used = 1 / (sum_ranks(torch.cat(targets).mean(0)) / ranks()).square().sum()
        return {name: self.weight * term for name, term in terms.items()}, {"prototypes_used": used}

    def _rows(self, projected: torch.Tensor) -> torch.Tensor:
        """Samples [N, D] without the dropped steps."""
        return projected[:, self.dropped_steps :].float().flatten(0, 1)

    def _assign(self, projected: torch.Tensor) -> torch.Tensor:
        """Which prototypes the samples belong to, [N, K]; those of all ranks share every prototype equally."""
        scores = cosines(gather_ranks(self._rows(projected)), self.prototypes.detach())
        return own_rows(sinkhorn(scores.T, eps=self.sinkhorn_eps, iterations=self.sinkhorn_iterations).T)

    def _trained_prototypes(self) -> torch.Tensor:
        """The prototypes, with a gradient of 0 while they are frozen; the counter stays on its device."""
        constant = self.prototypes.detach()
        return constant + (self.updates >= self.frozen_updates) * (self.prototypes - constant)

    @torch.no_grad()
    def after_update(self) -> None:
        rate = torch.where(self.updates.eq(0), 1.0, self.ema_rate)
        followed = zip(
            [*self.slow_encoder.parameters(), *self.slow_projection.parameters()],
            [*self.encoder.parameters(), *self.embedding_projection.parameters()],
            strict=True,
        )
        for slow, fast in followed:
            slow.lerp_(fast, rate)
        self.prototypes.copy_(F.normalize(self.prototypes, dim=-1))
        self.updates += 1


def cosines(rows: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Of every row with every prototype, [N, K]."""
    return F.normalize(rows, dim=-1) @ F.normalize(prototypes, dim=-1).T
