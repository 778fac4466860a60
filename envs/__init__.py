"""The benchmarks: TorchRL environments and transforms."""

from .gl import check_chosen_gl  # isort: skip

check_chosen_gl()  # first, because the other modules import TorchRL, and TorchRL imports MuJoCo

# ruff: noqa: E402
from .atari import make_atari
from .atari_scores import HumanNormalizedScore
from .check import check_environment
from .collecting import VectorCollector
from .crafter import CrafterScores, crafter_score, make_crafter
from .custom import make_custom
from .dmc import RenderPixels, make_dmc
from .errors import WorkerError
from .gym import make_gym
from .memory_maze import make_memory_maze
from .metaworld import make_metaworld
from .patch import AdversarialPatch
from .probes import PROBES, make_probe
from .records import RecordBuilder
from .replay import RecordReplay, make_replay
from .simulator import Simulator
from .subtle import DMCSubtle, make_dmc_subtle
from .transforms import ClippedActionScaling, FiniteCheck
from .vector import VectorEnv, count_workers, env_seeds, make_vector_env, reseed

__all__ = [
    "AdversarialPatch",
    "ClippedActionScaling",
    "CrafterScores",
    "DMCSubtle",
    "FiniteCheck",
    "HumanNormalizedScore",
    "PROBES",
    "RecordBuilder",
    "RecordReplay",
    "RenderPixels",
    "Simulator",
    "VectorCollector",
    "VectorEnv",
    "WorkerError",
    "check_environment",
    "count_workers",
    "env_seeds",
    "make_atari",
    "crafter_score",
    "make_crafter",
    "make_custom",
    "make_dmc",
    "make_dmc_subtle",
    "make_gym",
    "make_memory_maze",
    "make_metaworld",
    "make_probe",
    "make_replay",
    "make_vector_env",
    "reseed",
]
