"""How a critic's target network follows, beside TorchRL's ``SoftUpdate``: by copies, or not at all."""

from __future__ import annotations

import torch
from torch import nn

from .value import DreamerValueLoss
from .wiring import unregistered


class CopyEvery(nn.Module):
    """Copies the critic into its target at the first update and then every ``1 / rate`` updates (Dreamer V2: 100).

    TorchRL's ``HardUpdate`` counts in Python, outside of any ``state_dict``: a resumed run would copy at other updates.

    Args:
        loss: whose critic is copied.
        rate: as fast as a ``SoftUpdate`` of this ``tau`` follows on average.
    """

    loss: DreamerValueLoss
    updates: torch.Tensor

    def __init__(self, loss: DreamerValueLoss, rate: float = 0.01):
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"rate={rate} must be in (0, 1]: 1 copies at every update, 0.01 at every hundredth.")
        unregistered(self, loss=loss)  # its owner saves it
        self.interval = round(1 / rate)
        loss._has_update_associated["value_model"] = True  # or TorchRL warns that nothing moves the target
        device = next(iter(loss.value_model_params.values(True, True))).device  # from elsewhere each copy would wait
        self.register_buffer("updates", torch.zeros((), dtype=torch.long, device=device))

    @torch.no_grad()
    def step(self) -> None:
        due = self.updates.remainder(self.interval).eq(0)  # an `if` would wait for the device
        sources = self.loss.value_model_params.values(True, True)
        for target, source in zip(self.loss.target_value_model_params.values(True, True), sources, strict=True):
            target.data.copy_(torch.where(due.to(target.device), source.data, target.data))
        self.updates += 1


class NoTarget(nn.Module):
    """For critics without a target network (Dreamer V1).

    Args:
        loss: whose critic has no target network.
    """

    def __init__(self, loss: DreamerValueLoss):
        super().__init__()

    def step(self) -> None:
        """There is nothing to move."""
