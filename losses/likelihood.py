"""How a scalar is predicted: two-hot logits over symexp-spaced values, or one number, in symlog space or as it is."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules import SymExpTwoHot
from torchrl.modules.functional import symlog

from .functional import two_hot_nll
from .wiring import check_scalar, entry


class TwoHotLikelihood(nn.Module):
    """Cross-entropy of logits [..., bins] against the two-hot codes of targets [..., n] -> [..., n].

    Args:
        num_bins: number of values.
    """

    compiles = ("forward",)

    def __init__(self, num_bins: int = 255):
        super().__init__()
        self.two_hot = SymExpTwoHot(num_bins)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return two_hot_nll(logits.float(), targets.float(), self.two_hot.get_buffer("bins"))


class SymlogMSE(nn.Module):
    """Squared error between symlog of prediction [..., 1] and targets [..., n] -> [..., n]; for scalar heads."""

    def forward(self, prediction: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (symlog(prediction.float()) - symlog(targets.float())).square()


class UnitGaussian(nn.Module):
    """Half the squared error of prediction [..., 1] and targets [..., n] -> [..., n]: a Gaussian of variance 1."""

    def forward(self, prediction: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 0.5 * (prediction.float() - targets.float()).square()


class ScalarPrediction(nn.Module):
    """The logits of a head whose ``out_keys`` hold them, read two-hot, or its value, by ``scalar``: :class:`SymlogMSE`."""

    def __init__(
        self, out_keys: list[NestedKey], logits_key: NestedKey, num_bins: int, scalar: nn.Module | None = None
    ):
        super().__init__()
        self.reads_logits = logits_key in out_keys
        scalar = SymlogMSE() if scalar is None else scalar
        self.likelihood = TwoHotLikelihood(num_bins) if self.reads_logits else scalar

    def forward(
        self, tensordict: TensorDictBase, keys: Any, value: str, targets: torch.Tensor, prefix: tuple[str, ...] = ()
    ) -> torch.Tensor:
        """The loss of the accepted key ``value``, whose logits are ``<value>_logits``, against targets [..., n]."""
        name = f"{value}_logits" if self.reads_logits else value
        prediction = entry(tensordict, keys, name, prefix)
        if not self.reads_logits:
            check_scalar(prediction.shape, prediction.shape, value)
        if targets.shape[:-1] != prediction.shape[:-1]:
            check_scalar(targets.shape, prediction.shape, f"the target of {value}")
        return self.likelihood(prediction, targets)
