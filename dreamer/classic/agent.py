"""Builds agents of Dreamer V1 and V2 from the parts of V3 and the networks that V3 replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from ..agent import Agent, HeadFactory, assemble
from ..networks.decoders import ObservationDecoder
from ..networks.encoders import ObservationEncoder, VectorEncoder
from ..networks.heads import FeatureMLP
from ..networks.layers import elu_mlp
from ..rssm.core import RSSMPosterior, RSSMPrior
from ..rssm.latents import Latent
from ..sizes import ActionSpace, ObservationSpace, Sizes, check_sizes
from .networks import ConvDecoder, ConvEncoder, ExplorationNoise, GRUCore, elu_actor_head


def build_classic_agent(
    observations: ObservationSpace,
    actions: ActionSpace,
    *,
    belief: int,
    hidden: int,
    depth: int,
    categoricals: int,
    classes: int,
    vector_layers: int,
    reward_layers: int,
    actor_layers: int,
    value_layers: int,
    units: int | None = None,
    continue_layers: int | None = None,
    vector_frequencies: Sequence[float] | None = None,
    latent: Callable[[int, int], Latent],
    cell: Callable[[int, int], nn.Module],
    squashed_actions: bool,
    noise: float,
    heads: Mapping[str, HeadFactory],
    fast: bool | Sequence[str] = True,
) -> Agent:
    """An agent of Dreamer V1 or V2; the widths are the keys of ``configs/model/dreamerv1.yaml`` and ``dreamerv2.yaml``.

    Args:
        observations: images and vectors of the environment.
        actions: its actions.
        belief: size of the belief (deterministic latent).
        hidden: width of the layers inside the RSSM.
        depth: channels of the image encoder's first stage.
        categoricals: number of categoricals, or first factor of a Gaussian's size.
        classes: classes of each, or second factor.
        vector_layers: layers of the vector encoder.
        reward_layers: hidden layers of the reward head.
        actor_layers: hidden layers of the actor.
        value_layers: hidden layers of the critic.
        units: width of the heads' layers. Default: ``hidden``.
        continue_layers: None makes no continue head: every step is discounted alike, ends of episodes included.
        vector_frequencies: as in ``build_agent``.
        latent: of (categoricals, classes), the distribution of z_t; a Gaussian has as many dimensions as their product.
        cell: of (input size, belief size), the recurrent cell.
        squashed_actions: tanh of a Normal (V1), or a Normal that the environment clips.
        noise: on the policy's actions while it explores; 0 leaves exploring to the policy.
        heads: functions of :class:`Sizes` that build the objective's heads, by name.
        fast: as in ``build_agent``.
    """
    units = hidden if units is None else units
    widths = dict(belief=belief, hidden=hidden, classes=classes, depth=depth, categoricals=categoricals, units=units)
    layers = dict(vector=vector_layers, reward=reward_layers, actor=actor_layers, value=value_layers)
    check_sizes(widths, {**layers, "continue": continue_layers or 0})
    encoder = ObservationEncoder(
        observations.images,
        observations.vectors,
        depth=depth,
        units=units,
        make_image=partial(ConvEncoder, depth=depth),
        make_vector=lambda size: VectorEncoder(size, units, vector_layers, vector_frequencies or (), elu_mlp),
    )
    z = latent(categoricals, classes)
    core = GRUCore(z.size, actions.size, belief, hidden, cell)
    sizes = Sizes(
        state=z.size,
        belief=belief,
        embedding=encoder.out_features,
        images=observations.images,
        vectors=observations.vectors,
        units=units,
        depth=depth,
        multipliers=(1, 2, 4, 8),
        vector_layers=vector_layers,
        blocks=1,
        actions=actions.size,
    )
    scalar = lambda layers: FeatureMLP(sizes.features, units, layers, 1, make_layers=elu_mlp)
    return assemble(
        observations,
        actions,
        sizes,
        encoder=encoder,
        prior=RSSMPrior(core, z, hidden, layers=1, make_layers=elu_mlp),
        posterior=RSSMPosterior(belief, encoder.out_features, z, hidden, norm=nn.ELU()),
        heads={name: factory(sizes) for name, factory in heads.items()},
        reward=scalar(reward_layers),
        continue_=None if continue_layers is None else scalar(continue_layers),
        value=scalar(value_layers),
        actor=elu_actor_head(
            sizes.features, units, actor_layers, actions.size, discrete=actions.discrete, squashed=squashed_actions
        ),
        exploration=ExplorationNoise(noise, actions.discrete) if noise else None,
        differentiable=True,
        fast=fast,
    )


def classic_decoder(sizes: Sizes) -> ObservationDecoder:
    """The decoder of V1 and V2 as a head: transposed convolutions for images, ELU layers for vectors.

    Args:
        sizes: of the agent.
    """
    return ObservationDecoder(
        sizes,
        make_image=lambda sizes, shape: ConvDecoder(sizes.features, shape, sizes.depth),
        make_vector=lambda sizes, size: FeatureMLP(
            sizes.features, sizes.units, sizes.vector_layers, size, make_layers=elu_mlp
        ),
    )
