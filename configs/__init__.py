"""Hydra configuration groups, reachable as `pkg://r2dreamer.configs`."""
