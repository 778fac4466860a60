"""The camera image of a DeepMind Control environment of TorchRL's."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.data import Bounded, Composite
from torchrl.envs.transforms import Transform

from ..base.errors import require_positive
from ..control.rendering import render_pixels
from .hooks import simulation_and_task


class RenderPixels(Transform):
    """The camera image of a DeepMind Control environment of TorchRL's under "pixels", uint8 [3, size, size].

    As a transform it renders once after a repeated action; TorchRL's `from_pixels` renders every frame in between too,
    which takes most of a step's time.
    """

    def __init__(self, size: int = 64, camera: int | str = 0):
        require_positive(size=size)
        super().__init__(out_keys=["pixels"])
        self.size, self.camera = size, camera

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        simulation, _ = simulation_and_task(self.parent, type(self).__name__)
        pixels = render_pixels(simulation.physics, self.size, self.camera)
        return next_tensordict.set("pixels", torch.from_numpy(pixels))

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        observation_spec["pixels"] = Bounded(
            0, 255, torch.Size([3, self.size, self.size]), device=observation_spec.device, dtype=torch.uint8
        )
        return observation_spec
