"""Builds every part of an agent from the specs of an environment; the results have names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import nn
from torchrl.envs.transforms import TensorDictPrimer

from .fast import TRICKS, speed_up
from .networks.encoders import Encoder, ObservationEncoder, VectorEncoder
from .networks.heads import FeatureMLP, TwoHotMLP, actor_head, latent_head, projection_head
from .rssm.core import BlockGRU, RSSMPosterior, RSSMPrior, check_core
from .rssm.imagination import Imagination
from .rssm.latents import CategoricalLatent
from .rssm.rollout import RSSMRollout, RSSMStateEstimator
from .sizes import ActionSpace, ObservationSpace, Sizes, check_names, check_sizes

PARTS = ("encoder", "rssm", "reward", "continue", "value", "actor")  # of any agent, beside the objective's heads
HeadFactory = Callable[[Sizes], TensorDictModuleBase]


@dataclass
class Agent:
    """Every part by its name. Parts share parameters; ``parts()`` lists each of them once.

    Args:
        observations: what the agent sees.
        actions: what it does.
        sizes: widths that heads are built from.
        encoder: observation -> embedding, below ``"next"``.
        prior: the network from latents and action to the next latents.
        posterior: the network from belief and embedding to the state.
        rollout: prior and posterior along a sequence.
        heads: what the objective needs, by name.
        reward: the reward network.
        continue_: the continue network, or None.
        value: the critic's network.
        actor: latents -> action.
        world_model: encoder, rollout and heads on records [B, T].
        value_model: the critic, at the root.
        continue_model: the continue head at the root, or None.
        imagination: rollouts in latent space.
        policy: observation -> action; it carries its latents in the TensorDict.
        recipe: what :func:`load_pretrained` built the agent by.
        more_heads: recipes of heads that were added to it.
    """

    observations: ObservationSpace
    actions: ActionSpace
    sizes: Sizes
    encoder: ObservationEncoder
    prior: RSSMPrior
    posterior: RSSMPosterior
    rollout: RSSMRollout
    heads: dict[str, TensorDictModuleBase]
    reward: FeatureMLP
    continue_: FeatureMLP | None
    value: FeatureMLP
    actor: ProbabilisticTensorDictSequential
    world_model: TensorDictSequential
    value_model: TensorDictModule
    continue_model: TensorDictModule | None
    imagination: Imagination
    policy: TensorDictSequential
    recipe: Mapping[str, Any] | None = None  # what load_pretrained built it by
    more_heads: Mapping[str, Any] = field(default_factory=dict)  # and recipes of heads that were added to it

    @property
    def latent_sizes(self) -> dict[str, int]:
        return {"state": self.sizes.state, "belief": self.sizes.belief}

    def primer(self) -> TensorDictPrimer:
        """Makes the policy's latents entries of an environment: ``TransformedEnv(env, agent.primer())``.

        A collector does it by itself with ``auto_register_policy_transforms=True``.
        """
        (estimator,) = (module for module in self.policy.modules() if isinstance(module, RSSMStateEstimator))
        return estimator.make_tensordict_primer()

    def parts(self) -> dict[str, nn.Module]:
        parts = {
            "encoder": self.encoder,
            "rssm": nn.ModuleList([self.prior, self.posterior]),
            **self.heads,
            "reward": self.reward,
            "continue": self.continue_,
            "value": self.value,
            "actor": self.actor,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def example_record(self) -> TensorDict:
        """One record of zeros as the replay stores it: its size is what memory is planned by."""
        observation = {key: torch.zeros(shape, dtype=torch.uint8) for key, shape in self.observations.images.items()}
        observation |= {key: torch.zeros(size) for key, size in self.observations.vectors.items()}
        latents = {key: torch.zeros(size) for key, size in self.latent_sizes.items()}
        flags = {key: torch.zeros(1, dtype=torch.bool) for key in ("done", "terminated", "truncated")}
        return TensorDict(
            {
                "action": torch.zeros(self.actions.size),
                "is_init": torch.zeros(1, dtype=torch.bool),
                "next": {**observation, **latents, **flags, "reward": torch.zeros(1)},
            }
        )

    def parameter_counts(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.parts().items()}

    def summary(self) -> str:
        """Parameters of every part and of all, a line each."""
        counts = self.parameter_counts()
        return "\n".join(f"{name:<12}{count:>14,}" for name, count in {**counts, "total": sum(counts.values())}.items())


def build_agent(
    observations: ObservationSpace,
    actions: ActionSpace,
    *,
    belief: int,
    hidden: int,
    classes: int,
    depth: int,
    units: int | None = None,
    categoricals: int = 32,
    blocks: int = 8,
    unimix: float = 0.01,
    encoder_multipliers: tuple[int, ...] = (2, 3, 4, 4),
    image_encoder: Callable[[tuple[int, int, int]], Encoder] | None = None,
    core: Callable[[int, int, int, int], nn.Module] | None = None,
    vector_layers: int = 3,
    vector_frequencies: Sequence[float] | None = None,
    reward_layers: int = 1,
    continue_layers: int | None = 1,
    actor_layers: int = 3,
    value_layers: int = 3,
    num_bins: int = 255,
    heads: Mapping[str, HeadFactory] | None = None,
    fast: bool | Sequence[str] = True,
) -> Agent:
    """Builds a whole agent; the keyword arguments are the keys of ``configs/model/size*.yaml``.

    Args:
        observations: images and vectors of the environment.
        actions: its actions.
        belief: size of the belief (deterministic latent).
        hidden: width of the layers inside the RSSM.
        classes: classes of each categorical.
        depth: channels of the image encoder's first stage, before its multiplier.
        units: width of the heads' and vector encoder's layers. Default: ``hidden``.
        categoricals: number of categoricals in the state.
        blocks: blocks of the block-diagonal GRU.
        unimix: share of the uniform distribution in every categorical.
        encoder_multipliers: channels of each stage of the image encoder, times ``depth``.
        image_encoder: builds an encoder for an image's shape in the place of the paper's, for example
            :class:`StridedEncoder`.
        core: builds, from (state, action, belief, hidden) sizes, a module (state, belief, action) -> belief in the
            place of :class:`BlockGRU`.
        vector_layers: layers of the vector encoder.
        vector_frequencies: of sines and cosines of a vector's entries, which the encoder then reads as well.
        reward_layers: hidden layers of the reward head.
        continue_layers: hidden layers of the continue head. None makes no such head: imagined episodes never end.
        actor_layers: hidden layers of the actor.
        value_layers: hidden layers of the critic.
        num_bins: bins of reward and critic.
        heads: functions of :class:`Sizes` that build the objective's heads, by name. Default: ``{"projection":
            projection_head}``.
        fast: False leaves out what exists for speed only; a list of names from ``dreamer.fast.TRICKS`` keeps those.
            Results are the same to rounding.

    Example:
        >>> agent = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, discrete=True),
        ...                     belief=16, hidden=8, classes=4, depth=2, categoricals=3)
        >>> agent.policy.in_keys
        ['observation', 'is_init']
    """
    units = hidden if units is None else units
    widths = dict(belief=belief, hidden=hidden, classes=classes, depth=depth, categoricals=categoricals, blocks=blocks)
    layers = dict(vector=vector_layers, reward=reward_layers, actor=actor_layers, value=value_layers)
    check_sizes({**widths, "units": units}, {**layers, "continue": continue_layers or 0})
    encoder = ObservationEncoder(
        observations.images,
        observations.vectors,
        depth=depth,
        units=units,
        multipliers=tuple(encoder_multipliers),
        make_image=image_encoder,
        make_vector=lambda size: VectorEncoder(size, units, vector_layers, vector_frequencies or ()),
    )
    latent = CategoricalLatent(categoricals, classes, unimix)
    try:
        cell = (core or partial(BlockGRU, num_blocks=blocks))(latent.size, actions.size, belief, hidden)
    except TypeError as error:
        raise ValueError(
            f"The recurrent core (model.core) cannot be built from the sizes of state, action, belief and hidden layers: {error}."
        ) from error
    check_core(cell, latent.size, belief, actions.size)
    prior = RSSMPrior(cell, latent, hidden, belief_size=belief)
    posterior = RSSMPosterior(belief, encoder.out_features, latent, hidden)
    sizes = Sizes(
        state=latent.size,
        belief=belief,
        embedding=encoder.out_features,
        images=observations.images,
        vectors=observations.vectors,
        units=units,
        depth=depth,
        multipliers=tuple(encoder_multipliers),
        vector_layers=vector_layers,
        blocks=blocks,
        actions=actions.size,
    )
    factories = {"projection": projection_head} if heads is None else heads
    features = sizes.features
    return assemble(
        observations,
        actions,
        sizes,
        encoder=encoder,
        prior=prior,
        posterior=posterior,
        heads={name: factory(sizes) for name, factory in factories.items()},
        reward=TwoHotMLP(features, units, reward_layers, num_bins),
        continue_=None if continue_layers is None else FeatureMLP(features, units, continue_layers, 1),
        value=TwoHotMLP(features, units, value_layers, num_bins),
        actor=actor_head(features, units, actor_layers, actions.size, discrete=actions.discrete, unimix=unimix),
        fast=fast,
    )


def assemble(
    observations: ObservationSpace,
    actions: ActionSpace,
    sizes: Sizes,
    *,
    encoder: ObservationEncoder,
    prior: RSSMPrior,
    posterior: RSSMPosterior,
    heads: Mapping[str, TensorDictModuleBase],
    reward: FeatureMLP,
    continue_: FeatureMLP | None,
    value: FeatureMLP,
    actor: ProbabilisticTensorDictSequential,
    exploration: TensorDictModuleBase | None = None,
    differentiable: bool = False,
    fast: bool | Sequence[str] = True,
) -> Agent:
    """Wires networks on the key contract; any of them may be another implementation with the same signature.

    Args:
        observations: images and vectors of the environment.
        actions: its actions.
        sizes: widths that the networks have.
        encoder: observation -> embedding.
        prior: (state, belief, action) -> (prior logits, state, belief).
        posterior: (belief, embedding) -> (posterior logits, state).
        heads: the objective's heads, by name.
        reward: the reward network.
        continue_: the continue network. None: episodes are taken to go on.
        value: the critic's network.
        actor: latents -> action.
        exploration: follows the actor in the policy, not in imagination.
        differentiable: lets gradients pass through what is imagined.
        fast: as in :func:`build_agent`.
    """
    if taken := [name for name in heads if name in PARTS or "." in name]:
        raise ValueError(
            f"heads has {taken[0]!r}, but weights are saved by name, and {', '.join(PARTS)} name other parts; a dot has "
            "a meaning there, too. Choose another name."
        )
    for name, head in heads.items():
        if not hasattr(head, "in_keys") or not hasattr(head, "out_keys"):
            raise ValueError(
                f"The head {name!r} is a {type(head).__name__}, which has no in_keys and out_keys. Wrap the network: "
                "TensorDictModule(network, in_keys=[...], out_keys=[...])."
            )
    after = ("next",)
    rollout = RSSMRollout(
        TensorDictModule(
            prior,
            in_keys=["state", "belief", "action"],
            out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
        ),
        TensorDictModule(
            posterior,
            in_keys=[("next", "belief"), ("next", "encoded_latents")],
            out_keys=[("next", "posterior_logits"), ("next", "state")],
        ),
    )
    predictions = [latent_head(reward, reward.keys("reward"), prefix=after)]
    if continue_ is not None:
        predictions.append(latent_head(continue_, ["continue_pred"], prefix=after))
    world_model = TensorDictSequential([encoder, rollout, *heads.values(), *predictions])
    estimator = RSSMStateEstimator(
        prior, posterior, state_size=sizes.state, belief_size=sizes.belief, action_size=actions.size
    )
    after_actor = [] if exploration is None else [exploration]
    policy = TensorDictSequential([encoder.at_root(), estimator, actor, *after_actor])
    check_names(observations, [*policy.out_keys, *world_model.out_keys])
    agent = Agent(
        observations=observations,
        actions=actions,
        sizes=sizes,
        encoder=encoder,
        prior=prior,
        posterior=posterior,
        rollout=rollout,
        heads=dict(heads),
        reward=reward,
        continue_=continue_,
        value=value,
        actor=actor,
        world_model=world_model,
        value_model=latent_head(value, value.keys("state_value")),
        continue_model=None if continue_ is None else latent_head(continue_, ["continue_pred"]),
        imagination=Imagination(prior, latent_head(reward, reward.keys("reward")), differentiable=differentiable),
        policy=policy,
    )
    tricks = fast if not isinstance(fast, bool) else TRICKS if fast else ()
    speed_up(agent.rollout, agent.imagination, *agent.parts().values(), tricks=tricks)
    return agent
