"""How a scalar is predicted: two-hot logits over symexp-spaced values, or one number in symlog space."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules import SymExpTwoHot
from torchrl.modules.functional import symlog


class TwoHotLikelihood(nn.Module):
    """Cross-entropy of logits [..., bins] against the two-hot code of the target [..., 1] -> [...]."""

    def __init__(self, num_bins: int = 255):
        super().__init__()
        self.two_hot = SymExpTwoHot(num_bins)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.two_hot.loss(logits.float(), target.float())


class SymlogMSE(nn.Module):
    """Squared error between symlog(prediction) and symlog(target), both [..., 1] -> [...]; for scalar heads."""

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (symlog(prediction.float()) - symlog(target.float())).square().squeeze(-1)


class ScalarPrediction(nn.Module):
    """A likelihood together with the entry it reads: the logits if the head writes them, else its decoded value."""

    def __init__(self, out_keys: list[NestedKey], logits_key: NestedKey, num_bins: int):
        super().__init__()
        self.reads_logits = logits_key in out_keys
        self.likelihood = TwoHotLikelihood(num_bins) if self.reads_logits else SymlogMSE()

    def forward(
        self, tensordict: TensorDictBase, logits_key: NestedKey, value_key: NestedKey, target: torch.Tensor
    ) -> torch.Tensor:
        return self.likelihood(tensordict.get(logits_key if self.reads_logits else value_key), target)
