"""The networks of R2-Dreamer: TensorDictModules on TorchRL's DreamerV3 keys.

``belief`` is h_t, the deterministic latent; ``state`` is z_t, the stochastic one.

TorchRL has classes of the same names with another meaning: ``RSSMPrior``, ``RSSMPosterior`` and ``RSSMRollout`` of
``torchrl.modules`` are Dreamer V1's, with a Gaussian state. What is interchangeable with ours ends in V3 there:
``RSSMPriorV3``, ``RSSMPosteriorV3``, ``RSSMRolloutV3``.
"""

from .agent import Agent, assemble, build_agent
from .card import ModelCard
from .classic.agent import build_classic_agent, classic_decoder
from .classic.networks import GRUCell, NormGRUCell
from .fast.compiling import compile_parts
from .hub import push_to_hub
from .networks.augmentation import RandomShift
from .networks.decoders import ImageDecoder, ObservationDecoder
from .networks.distributions import BoundedNormal, OneHotAction, unimix_probs
from .networks.encoders import ImageEncoder, ObservationEncoder, StridedEncoder, VectorEncoder
from .networks.heads import (
    FeatureMLP,
    NormalParameters,
    OneHotParameters,
    ProjectionHead,
    TwoHotMLP,
    actor_head,
    latent_head,
    projection_head,
)
from .networks.layers import BlockLinear, Linear, NormSiLU, joint_positions, mlp, normed_linear
from .networks.prediction import belief_prediction_head, next_embedding_head
from .pretrained import load_pretrained, save_pretrained
from .rssm.core import BlockGRU, RSSMPosterior, RSSMPrior
from .rssm.imagination import Imagination
from .rssm.latents import CategoricalLatent, GaussianLatent
from .rssm.rollout import RSSMRollout, RSSMStateEstimator
from .sizes import ActionSpace, ObservationSpace, Sizes

__all__ = [
    "ActionSpace",
    "Agent",
    "BlockGRU",
    "BlockLinear",
    "BoundedNormal",
    "CategoricalLatent",
    "FeatureMLP",
    "GRUCell",
    "GaussianLatent",
    "ImageDecoder",
    "ImageEncoder",
    "Imagination",
    "Linear",
    "ModelCard",
    "NormGRUCell",
    "NormalParameters",
    "ObservationDecoder",
    "ObservationEncoder",
    "ObservationSpace",
    "OneHotAction",
    "OneHotParameters",
    "ProjectionHead",
    "NormSiLU",
    "RSSMPosterior",
    "RSSMPrior",
    "RSSMRollout",
    "RSSMStateEstimator",
    "RandomShift",
    "Sizes",
    "StridedEncoder",
    "TwoHotMLP",
    "VectorEncoder",
    "actor_head",
    "belief_prediction_head",
    "assemble",
    "build_agent",
    "build_classic_agent",
    "classic_decoder",
    "compile_parts",
    "joint_positions",
    "latent_head",
    "load_pretrained",
    "mlp",
    "next_embedding_head",
    "normed_linear",
    "projection_head",
    "push_to_hub",
    "save_pretrained",
    "unimix_probs",
]
