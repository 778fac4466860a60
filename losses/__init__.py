"""The objectives of R2-Dreamer: LossModules on TorchRL's DreamerV3 keys, and their maths as pure functions.

TorchRL has two losses of the same names with another meaning: ``torchrl.objectives.DreamerActorLoss`` and
``torchrl.objectives.DreamerValueLoss`` are Dreamer V1's. Import from one of the two packages, or give one another name::

    from torchrl.objectives import DreamerActorLoss as DreamerV1ActorLoss
    from r2dreamer.losses import DreamerActorLoss
"""

from .actor import DreamerActorLoss
from .attack import PlanningAttackLoss
from .collapse import collapse_metrics, effective_rank
from .dynamics import DynamicsActorLoss
from .functional import (
    barlow_twins_loss,
    categorical_entropy,
    categorical_kl,
    imagination_weight,
    info_nce_loss,
    lambda_return,
    sinkhorn,
    two_hot_nll,
)
from .kl import CategoricalKL, GaussianKL
from .likelihood import SymlogMSE, TwoHotLikelihood, UnitGaussian
from .objectives.barlow import BarlowTwins
from .objectives.base import Objective
from .objectives.detached_decoder import DetachedDecoder
from .objectives.dreamercdp import DreamerCDP
from .objectives.dreamerpro import DreamerPro
from .objectives.infonce import InfoNCE
from .objectives.nextembedding import NextEmbedding
from .objectives.none import NoObjective
from .objectives.reconstruction import Reconstruction
from .objectives.sigreg import SIGReg
from .objectives.vicreg import VICReg
from .optimizer import DreamerOptimizer, GroupedAdam
from .ranks import gather_ranks, sum_ranks
from .targets import CopyEvery, NoTarget
from .value import DreamerValueLoss
from .world_model import R2DreamerWorldModelLoss, total_loss

__all__ = [
    "BarlowTwins",
    "CategoricalKL",
    "CopyEvery",
    "DreamerActorLoss",
    "DreamerCDP",
    "DreamerOptimizer",
    "DreamerPro",
    "DreamerValueLoss",
    "DynamicsActorLoss",
    "GaussianKL",
    "GroupedAdam",
    "InfoNCE",
    "NextEmbedding",
    "NoObjective",
    "NoTarget",
    "Objective",
    "DetachedDecoder",
    "PlanningAttackLoss",
    "R2DreamerWorldModelLoss",
    "Reconstruction",
    "SIGReg",
    "SymlogMSE",
    "TwoHotLikelihood",
    "UnitGaussian",
    "VICReg",
    "barlow_twins_loss",
    "categorical_entropy",
    "categorical_kl",
    "collapse_metrics",
    "effective_rank",
    "gather_ranks",
    "imagination_weight",
    "info_nce_loss",
    "lambda_return",
    "sinkhorn",
    "sum_ranks",
    "total_loss",
    "two_hot_nll",
]
