"""What learns: the losses of an agent, its optimiser and its slow critic, in one update step."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import hydra
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import nn

from r2dreamer.dreamer import Agent, compile_parts, joint_positions
from r2dreamer.dreamer.fast.capture import captured
from r2dreamer.losses import (
    DreamerActorLoss,
    NoTarget,
    Objective,
    R2DreamerWorldModelLoss,
    collapse_metrics,
    total_loss,
)

from .ranks import Ranks


class Learner(nn.Module):
    """Three losses, one optimiser, one slow critic.

    Args:
        algorithm: the section of that name of a configuration, ``configuration("algorithm=r2dreamer").algorithm``.
        precision: what losses are computed in; weights stay float32.
        compile: None or "parts", as the setting of that name. capture: "auto", True or False, likewise.
        ranks: the processes that learn together. Default: this one alone.

    Example:
        >>> learner = Learner(agent, configuration("algorithm=r2dreamer").algorithm)  # doctest: +SKIP
        >>> losses, latents = learner.update(replay.sample())  # doctest: +SKIP
    """

    def __init__(
        self,
        agent: Agent,
        algorithm: DictConfig,
        precision: torch.dtype = torch.float32,
        compile=None,
        capture="auto",
        ranks: Ranks | None = None,
    ):
        super().__init__()
        self.ranks = ranks or Ranks()
        make = hydra.utils.instantiate
        self.world_model_loss = R2DreamerWorldModelLoss(
            agent.world_model,
            objective(algorithm.representation, agent),
            kl=make(algorithm.kl),
            num_reward_bins=agent.reward.num_bins,
            **make(algorithm.world_model),
        )
        self.posterior_mean = agent.posterior.latent.expected
        self.augmentation = make(algorithm.augmentation)
        value_loss = make(algorithm.value)(agent.value_model, num_value_bins=agent.value.num_bins)
        bootstrap, ends = value_loss.bootstrap_model, agent.continue_model
        self.actor_loss = make(algorithm.actor)(agent.actor, bootstrap, agent.imagination, continue_model=ends)
        self.value_loss = value_loss
        # Last: with it or without, all else begins the same.
        self.detached_decoder = objective(algorithm.detached_decoder, agent)
        self.register_load_state_dict_pre_hook(_former_names)
        device = next(agent.encoder.parameters()).device
        self.to(device)  # the losses have buffers of their own
        self.replay_value_weight = algorithm.replay_value_weight
        apart = algorithm.optimizer.get("lr_factors") or ()
        self.optimizer = make(algorithm.optimizer, parameter_groups(self, agent, apart))
        fractions = algorithm.final_lr_fraction, algorithm.final_entropy_fraction
        self.anneal = LinearFall(self.optimizer, self.actor_loss, *fractions)
        self.slow_critic = (make(algorithm.slow_critic) if value_loss.has_target else NoTarget)(value_loss)
        self.precision, self.device = precision, device
        if compile == "parts":
            compile_parts(agent.rollout, *agent.parts().values(), self)
        self.gradients = captured(self.losses_and_gradients, device, capture)

    def losses(self, batch: TensorDict) -> tuple[TensorDict, TensorDict]:
        """Every loss on records [B, T], and the detached posterior latents [B, T] for the replay."""
        losses, posterior = self.world_model_loss(self.augmentation(batch))
        drawn, _ = self.detached_decoder(posterior, self.world_model_loss.tensor_keys)
        losses.update({f"loss_{name}": term for name, term in drawn.items()})
        latents = posterior.get("next").select("state", "belief")
        start = latents.detach().flatten(0, 1)  # imagination begins at every posterior state and trains none of them
        actor_losses, imagined = self.actor_loss(start)
        value_losses, _ = self.value_loss(imagined)
        losses.update(actor_losses).update(value_losses)
        if self.replay_value_weight:
            losses.set("loss_replay_value", self.replay_value_weight * self.replay_value_loss(batch, latents, imagined))
        embedding = posterior.get(("next", "encoded_latents"))
        # Not the samples, which vary also where the posterior knows nothing.
        expected = self.posterior_mean(posterior.get(("next", "posterior_logits")).detach())
        losses.update(collapse_metrics(embedding=embedding, state=expected))
        return losses, latents.detach()

    def replay_value_loss(self, batch: TensorDict, latents: TensorDict, imagined: TensorDict) -> torch.Tensor:
        """The critic along the replayed sequence; the latents are attached, so that its error reaches the world model."""
        replayed = latents.copy()
        replayed.set("bootstrap", imagined.get("lambda_target")[:, 0].reshape(*batch.shape, 1))
        replayed.set("next", batch.get("next").select("reward", "done", "terminated", strict=False))
        # The official contdisc: the discount is in the continue head's targets, which these returns do not read.
        discount = self.actor_loss.discount * self.world_model_loss.continue_target_scale
        horizon = math.inf if discount == 1 else 1 / (1 - discount)
        loss = self.value_loss.replay_value_loss(replayed, horizon=horizon, lmbda=self.actor_loss.lmbda)
        return loss.get("loss_replay_value")

    def update(self, batch: TensorDict) -> tuple[TensorDict, TensorDict]:
        """One step of the one optimiser over everything, then the slow critic moves."""
        losses, latents = self.gradients(batch)
        self.ranks.average_gradients(self.parameters())  # outside of what is captured
        self.optimizer.step()  # clips each tensor's gradient by its norm (AGC), then LaProp
        self.slow_critic.step()
        self.world_model_loss.representation.after_update()
        return losses, latents

    def losses_and_gradients(self, batch: TensorDict) -> tuple[TensorDict, TensorDict]:
        """Nothing in here may wait for the device: on a GPU it is captured, and runs without Python from then on."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            losses, latents = self.losses(batch)
        self.optimizer.zero_grad()
        total_loss(losses).backward()
        return losses.detach(), latents


def _former_names(learner: nn.Module, state: dict, *_: object) -> None:
    for name in [name for name in state if name.startswith("probe.")]:
        state[f"detached_decoder.{name.removeprefix('probe.')}"] = state.pop(name)


class LinearFall:
    """Learning rates and entropy bonus, linearly to their final fractions: ``schedule(progress)``, done at 1."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, actor_loss: DreamerActorLoss, final_lr: float, final_entropy: float
    ):
        self.optimizer, self.actor_loss = optimizer, actor_loss
        self.final_lr, self.final_entropy = final_lr, final_entropy
        self.learning_rates = [group["lr"] for group in optimizer.param_groups]
        self.entropy_bonus = actor_loss.entropy_bonus
        if self.entropy_bonus and final_entropy != 1:
            # Filled anew as it falls: graphs, captured or compiled, take a number for a constant.
            device = next(actor_loss.parameters()).device
            actor_loss.entropy_bonus = torch.tensor(float(self.entropy_bonus), device=device)

    def __call__(self, progress: float) -> None:
        rate, entropy = (1 + (final - 1) * min(progress, 1.0) for final in (self.final_lr, self.final_entropy))
        for group, initial in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = initial * rate
        if torch.is_tensor(self.actor_loss.entropy_bonus):
            self.actor_loss.entropy_bonus.fill_(self.entropy_bonus * entropy)


def objective(section: DictConfig, agent: Agent) -> Objective:
    """What the section names; of a partial, the one whose own networks are made for this agent."""
    made = hydra.utils.instantiate(section)
    return made(agent) if isinstance(made, functools.partial) else made


def parameter_groups(learner: nn.Module, agent: Agent, apart: Iterable[str] = ()) -> list[dict]:
    """Of the optimiser, by name: the model, actor, value, and a detached decoder, which must not count in the model's norm.

    The agent's parts that ``apart`` names are groups of their own. ``joint`` names the parameters that are pieces of one
    tensor, for an optimiser that clips each tensor.
    """
    groups = {"model": [], "actor": [], "value": [], "detached_decoder": []} | {name: [] for name in apart}
    unknown = {*apart} - {*agent.parts()}
    if unknown:
        known = ", ".join(agent.parts())
        raise ValueError(f"algorithm.optimizer.lr_factors names {', '.join(unknown)}; the agent has {known}.")
    owned = {parameter: name for name in apart for parameter in agent.parts()[name].parameters()}
    owners = {"actor_loss": "actor", "value_loss": "value", "detached_decoder": "detached_decoder"}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            group = owned.get(parameter) or owners.get(name.partition(".")[0], "model")
            groups[group].append(parameter)
    pieces = lambda parameters: joint_positions(parameters, *agent.parts().values())
    return [{"name": name, "params": each, "joint": pieces(each)} for name, each in groups.items() if each]


def parameter_counts(agent: Agent, learner: Learner) -> dict[str, int]:
    """Of the agent's parts and of what trains beside it: an objective's prototypes and projections, a detached decoder."""
    beside = {"objective": learner.world_model_loss.representation, "detached_decoder": learner.detached_decoder}
    counts = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in beside.items()}
    return agent.parameter_counts() | {name: count for name, count in counts.items() if count}


def check_weights(agent: Agent, step: int, updates: int) -> None:
    """A finite loss can have a NaN gradient, which would be saved, or end in NaN actions."""
    for name, part in agent.parts().items():
        if not all(parameter.isfinite().all() for parameter in part.parameters()):
            raise FloatingPointError(f"The weights of the {name} are NaN or Inf at frame {step:,}, update {updates:,}.")
