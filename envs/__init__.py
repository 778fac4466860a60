"""The benchmarks: TorchRL environments and transforms."""

from .gl import check_chosen_gl  # isort: skip

check_chosen_gl()  # first, because the other modules import TorchRL, and TorchRL imports MuJoCo

# ruff: noqa: E402
from .check import check_environment
from .dmc import RenderPixels, make_dmc
from .errors import WorkerError
from .gym import make_gym
from .probes import PROBES, make_probe
from .simulator import Simulator
from .transforms import ClippedActionScaling, FiniteCheck
from .vector import env_seeds, make_vector_env, reseed

__all__ = [
    "ClippedActionScaling",
    "FiniteCheck",
    "PROBES",
    "RenderPixels",
    "Simulator",
    "WorkerError",
    "check_environment",
    "env_seeds",
    "make_dmc",
    "make_gym",
    "make_probe",
    "make_vector_env",
    "reseed",
]
