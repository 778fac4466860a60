"""What falls while a run goes on."""

from __future__ import annotations

import torch

from r2dreamer.losses import DreamerActorLoss


class LinearFall:
    """Learning rates and entropy bonus, linearly to their final fractions: ``schedule(progress)``, done at 1."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, actor_loss: DreamerActorLoss, final_lr: float, final_entropy: float
    ):
        self.optimizer, self.actor_loss = optimizer, actor_loss
        self.final_lr, self.final_entropy = final_lr, final_entropy
        self.learning_rates = [group["lr"] for group in optimizer.param_groups]
        self.entropy_bonus = actor_loss.entropy_bonus
        if self.entropy_bonus and final_entropy != 1:
            # Filled anew as it falls: graphs, captured or compiled, take a number for a constant.
            device = next(actor_loss.parameters()).device
            actor_loss.entropy_bonus = torch.tensor(float(self.entropy_bonus), device=device)

    def __call__(self, progress: float) -> None:
        rate, entropy = (1 + (final - 1) * min(progress, 1.0) for final in (self.final_lr, self.final_entropy))
        for group, initial in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = initial * rate
        if torch.is_tensor(self.actor_loss.entropy_bonus):
            self.actor_loss.entropy_bonus.fill_(self.entropy_bonus * entropy)
