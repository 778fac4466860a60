"""What `r2dreamer.envs` exports."""

from .base.check import check_environment
from .base.contract import ClippedActionScaling, FiniteCheck
from .base.errors import WorkerError
from .base.simulator import Simulator
from .replay.buffer import RecordReplay, make_replay
from .replay.prefill import prefill
from .replay.recorded import recorded_episodes
from .replay.records import RecordBuilder
from .suites.atari import make_atari
from .suites.atari_scores import HumanNormalizedScore
from .suites.crafter import CrafterScores, crafter_score, make_crafter
from .suites.custom import make_custom
from .suites.dmc import make_dmc
from .suites.dmc_distracting import make_dmc_distracting
from .suites.dmc_subtle import make_dmc_subtle
from .suites.gym import make_gym
from .suites.memory_maze import make_memory_maze
from .suites.metaworld import make_metaworld
from .suites.probes import PROBES, make_probe
from .transforms.distracting import DMCDistracting
from .transforms.patch import AdversarialPatch
from .transforms.rendering import RenderPixels
from .transforms.subtle import DMCSubtle
from .vector.collector import VectorCollector
from .vector.environment import VectorEnv, count_workers, env_seeds, make_vector_env

__all__ = [
    "AdversarialPatch",
    "ClippedActionScaling",
    "CrafterScores",
    "DMCDistracting",
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
    "prefill",
    "recorded_episodes",
    "make_atari",
    "crafter_score",
    "make_crafter",
    "make_custom",
    "make_dmc",
    "make_dmc_distracting",
    "make_dmc_subtle",
    "make_gym",
    "make_memory_maze",
    "make_metaworld",
    "make_probe",
    "make_replay",
    "make_vector_env",
]
