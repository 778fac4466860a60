"""The networks of Dreamer V1 and V2 that V3 replaced: strided convolutions, a GRU, ELU layers, a squashed actor."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torch.nn import GRUCell  # noqa: F401 - named in a config, as NormGRUCell is
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import TanhNormal

from ..networks.distributions import BoundedNormal, OneHotAction
from ..networks.heads import ActorNetwork, NormalParameters, OneHotParameters, probabilistic_head
from ..networks.layers import Linear, bounded, elu_mlp, init_convolution, split_linear


class ConvEncoder(nn.Module):
    """Four 4x4 convolutions of stride 2 with ReLU, ``depth * (1, 2, 4, 8)`` channels: images [..., C, H, W] to [..., E]."""

    compiles = ("forward",)

    def __init__(self, image_shape: tuple[int, int, int], depth: int = 32):
        super().__init__()
        channels, height, width = image_shape
        widths = [channels, *(depth * factor for factor in (1, 2, 4, 8))]
        for _ in range(4):
            height, width = (height - 4) // 2 + 1, (width - 4) // 2 + 1
        if min(height, width) < 1:
            raise ValueError(
                f"Images of {image_shape[1]}x{image_shape[2]} are too small for four 4x4 convolutions of stride 2, which "
                "need 46 pixels a side; resize the observation (env.make.image_size in the example trainer)."
            )
        convolutions = [nn.Conv2d(widths[i], widths[i + 1], 4, 2) for i in range(4)]
        for each in convolutions:  # torch's own initialisation shrinks the images' differences tenfold
            init_convolution(each, each.in_channels * 4**2)
        self.layers = nn.Sequential(*(layer for each in convolutions for layer in (each, nn.ReLU())))
        self.out_features = widths[-1] * height * width

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        scaled = [image / 255 if not image.is_floating_point() else image for image in images]
        value = torch.cat(scaled, -3).to(next(self.parameters()).dtype) - 0.5  # [..., C, H, W]
        return self.layers(value.reshape(-1, *value.shape[-3:])).reshape(*value.shape[:-3], self.out_features)


class ConvDecoder(nn.Module):
    """(state, belief) -> images [..., C, 64, 64]: a Linear, then four transposed convolutions of stride 2 with ReLU.

    The last one is linear: what it writes is the mean of a Gaussian, around the grey 0.5 that the encoder subtracts.
    """

    compiles = ("forward",)

    def __init__(self, features: int, image_shape: tuple[int, int, int], depth: int = 32):
        super().__init__()
        channels, height, width = image_shape
        if (height, width) != (64, 64):
            raise ValueError(f"The decoder of V1 and V2 draws images of 64x64, not {height}x{width}: resize them.")
        widths = [32 * depth, 4 * depth, 2 * depth, depth, channels]
        self.first = Linear(features, widths[0])
        convolutions = [nn.ConvTranspose2d(widths[i], widths[i + 1], (5, 5, 6, 6)[i], 2) for i in range(4)]
        for each in convolutions:
            # Of stride 2: a quarter of the kernel's weights adds to one pixel. The first draws from a single position.
            init_convolution(each, each.in_channels * (1 if each is convolutions[0] else each.kernel_size[0] ** 2 / 4))
        self.layers = nn.Sequential(
            *(layer for each in convolutions[:-1] for layer in (each, nn.ReLU())), convolutions[-1]
        )

    def forward(self, state: torch.Tensor, belief: torch.Tensor) -> torch.Tensor:
        value = self.first(torch.cat([state, belief.to(state.dtype)], -1))
        image = self.layers(value.reshape(-1, value.shape[-1], 1, 1)).float() + 0.5
        return image.reshape(*state.shape[:-1], *image.shape[1:])


class NormGRUCell(nn.Module):
    """The GRU cell of Dreamer V2: one Linear over [input, belief], LayerNorm over all gates, an update biased to keep.

    Args:
        input_size: size of the input.
        belief_size: size of the belief (deterministic latent).
    """

    def __init__(self, input_size: int, belief_size: int):
        super().__init__()
        self.linear = Linear(input_size + belief_size, 3 * belief_size, bias=False)
        self.norm = nn.LayerNorm(3 * belief_size)

    def forward(self, value: torch.Tensor, belief: torch.Tensor) -> torch.Tensor:
        reset, candidate, update = self.norm(self.linear(torch.cat([value, belief], -1))).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(belief, candidate, torch.sigmoid(update - 1))


class GRUCore(nn.Module):
    """Dense recurrence: (state, belief, action) -> belief; state and action pass Linear -> ELU, then a GRU cell in float32.

    cell: of (input size, belief size), for example ``torch.nn.GRUCell`` or :class:`NormGRUCell`.
    """

    compiles = ("advance",)

    def __init__(self, state_size: int, action_size: int, belief_size: int, hidden: int, cell):
        super().__init__()
        self.belief_size = belief_size
        self.state_in, self.action_in = split_linear(state_size, action_size, hidden)
        self.cell = cell(hidden, belief_size)

    def project_action(self, action: torch.Tensor) -> torch.Tensor:
        return self.action_in(bounded(action.float()))  # [..., hidden]

    def advance(self, state: torch.Tensor, belief: torch.Tensor, projected_action: torch.Tensor) -> torch.Tensor:
        value = F.elu(self.state_in(state) + projected_action)
        with torch.autocast(belief.device.type, enabled=False):  # half a mantissa loses what a GRU keeps for long
            flat = self.cell(value.float().reshape(-1, value.shape[-1]), belief.float().reshape(-1, self.belief_size))
        return flat.view(belief.shape)

    def forward(self, state: torch.Tensor, belief: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.advance(state, belief, self.project_action(action))


class SquashedParameters(NormalParameters):
    """Network output [..., 2A] -> mean = 5 tanh(./5), std = softplus(. + c) + 1e-4, which is 5 where the output is 0."""

    def forward(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loc, scale = parameters.chunk(2, -1)
        return 5 * torch.tanh(loc / 5), F.softplus(scale + math.log(math.exp(5) - 1)) + 1e-4


class SquashedNormal(TanhNormal):
    """tanh of a Normal: actions in (-1, 1)."""

    def __init__(self, loc: torch.Tensor, scale: torch.Tensor):
        # As numbers the bounds would be copied to the device anew each time, which no CUDA graph can record.
        low, high = (torch.full((), bound, device=loc.device) for bound in (-1.0, 1.0))
        super().__init__(loc, scale, low=low, high=high, event_dims=1)


class StraightThroughAction(OneHotAction):
    """One-hot samples with the gradient of the probabilities."""

    has_rsample = True

    def rsample(self, *shape: torch.Size) -> torch.Tensor:
        return self.sample(*shape) + (self.probs - self.probs.detach())


def elu_actor_head(
    features: int, units: int, layers: int, action_size: int, *, discrete: bool, squashed: bool
) -> ProbabilisticTensorDictSequential:
    """A policy through which gradients pass: straight-through one-hot, a squashed Normal (V1) or a bounded one (V2)."""
    if discrete:
        parameters, distribution = OneHotParameters(0.0), StraightThroughAction
    elif squashed:
        parameters, distribution = SquashedParameters(), SquashedNormal
    else:
        parameters, distribution = NormalParameters(), BoundedNormal
    network = ActorNetwork(features, units, layers, action_size, parameters, make_layers=elu_mlp)
    return probabilistic_head(network, distribution)


class ExplorationNoise(TensorDictModuleBase):
    """While exploring, N(0, ``amount``) on continuous actions, clipped to [-1, 1]; of choices, this share at random."""

    in_keys: list[NestedKey] = ["action"]
    out_keys: list[NestedKey] = ["action"]

    def __init__(self, amount: float, discrete: bool):
        super().__init__()
        if amount < 0 or (discrete and amount > 1):
            raise ValueError(f"noise={amount} must be at least 0, and at most 1 for discrete actions.")
        self.amount, self.discrete = amount, discrete

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        exploring = exploration_type() in (None, ExplorationType.RANDOM)  # None: as the actor, which samples
        if not exploring or not self.amount:
            return tensordict
        action = tensordict.get("action")
        if not self.discrete:
            return tensordict.set("action", (action + self.amount * torch.randn_like(action)).clamp(-1, 1))
        choice = torch.randint(action.shape[-1], action.shape[:-1], device=action.device)
        random = F.one_hot(choice, action.shape[-1]).to(action.dtype)
        explores = torch.rand(action.shape[:-1], device=action.device) < self.amount
        return tensordict.set("action", torch.where(explores.unsqueeze(-1), random, action))
