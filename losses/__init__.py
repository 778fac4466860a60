"""The objectives of R2-Dreamer: LossModules on TorchRL's DreamerV3 keys, and their maths as pure functions."""

from .actor import DreamerActorLoss
from .attack import PlanningAttackLoss
from .functional import barlow_twins_loss, categorical_entropy, imagination_weight, lambda_return, two_hot_nll
from .kl import CategoricalKL
from .likelihood import SymlogMSE, TwoHotLikelihood
from .representation import BarlowTwins
from .value import DreamerValueLoss
from .world_model import R2DreamerWorldModelLoss, total_loss

__all__ = [
    "BarlowTwins",
    "CategoricalKL",
    "DreamerActorLoss",
    "DreamerValueLoss",
    "PlanningAttackLoss",
    "R2DreamerWorldModelLoss",
    "SymlogMSE",
    "TwoHotLikelihood",
    "barlow_twins_loss",
    "categorical_entropy",
    "imagination_weight",
    "lambda_return",
    "total_loss",
    "two_hot_nll",
]
