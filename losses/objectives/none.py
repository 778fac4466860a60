"""No objective: the ablation."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase

from .base import Objective, Terms


class NoObjective(Objective):
    """Nothing but reward, continuation and KL teach the latents: the ablation in which they may collapse.

    ``weight`` weighs nothing; it is there because experiments set it for every objective alike.
    """

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        return {}, {}
