"""R2-Dreamer as a TorchRL component suite: `r2dreamer.dreamer`, `r2dreamer.losses`, `r2dreamer.envs`."""

from importlib.metadata import version

__version__ = version("torchrl-r2dreamer")
