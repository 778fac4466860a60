"""How a scalar is predicted: two-hot logits over symexp-spaced values, or one number, in symlog space or as it is."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from tensordict.utils import NestedKey, unravel_key
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
    """The logits of a head whose ``model`` writes them, read two-hot, or its value, by ``scalar``: :class:`SymlogMSE`."""

    def __init__(
        self,
        model: nn.Module,
        value_key: NestedKey,
        logits_key: NestedKey,
        num_bins: int,
        scalar: nn.Module | None = None,
    ):
        super().__init__()
        self.reads_logits, value_key = unravel_key(logits_key) in _written(model), unravel_key(value_key)
        scalar = SymlogMSE() if scalar is None else scalar
        self.likelihood = TwoHotLikelihood(num_bins) if self.reads_logits else scalar
        self.num_bins = num_bins
        modules = [each for each in model.modules() if isinstance(each, TensorDictModule)]
        heads = [_written(each) for each in modules if not isinstance(each, TensorDictSequential)]
        self.beside = [key for keys in heads if value_key in keys for key in keys if key != value_key]

    def forward(
        self, tensordict: TensorDictBase, keys: Any, value: str, targets: torch.Tensor, prefix: tuple[str, ...] = ()
    ) -> torch.Tensor:
        """The loss of the accepted key ``value``, whose logits are ``<value>_logits``, against targets [..., n]."""
        name = f"{value}_logits" if self.reads_logits else value
        prediction = entry(tensordict, keys, name, prefix)
        if not self.reads_logits:
            check_scalar(prediction.shape, prediction.shape, value)
            if torch.is_grad_enabled():
                self._check_logits(tensordict, value, len(prefix))
        if targets.shape[:-1] != prediction.shape[:-1]:
            check_scalar(targets.shape, prediction.shape, f"the target of {value}")
        return self.likelihood(prediction, targets)

    def _check_logits(self, tensordict: TensorDictBase, value: str, depth: int) -> None:
        """Refuses a scalar that is written beside bins: logits of another name, which two-hot targets would train."""
        for key in self.beside:
            bins = tensordict.get(key, None)
            if isinstance(bins, torch.Tensor) and bins.requires_grad and bins.shape[-1] == self.num_bins:
                name = unravel_key(key[depth:]) if depth and isinstance(key, tuple) else key
                raise ValueError(
                    f"{value} is read as a number, and {key!r}, which the same head writes, has {self.num_bins} entries as logits have.\n"
                    f"If they are its logits, call set_keys({value}_logits={name!r}) on the loss; if not, give the loss another number "
                    "of bins."
                )


def _written(model: Any) -> list[NestedKey]:
    return [unravel_key(key) for key in model.out_keys]
