"""The world-model loss: representation objective + KL + reward + continue.

L = L_objective(k, sg e) + 1.0 max(1, KL(sg q || p)) + 0.1 max(1, KL(q || sg p)) - ln p(r) - ln p(continue)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.modules import RSSMRollout as GaussianRollout  # Dreamer V1's

from .continuation import check_logit, continue_name
from .kl import CategoricalKL, GaussianKL
from .likelihood import ScalarPrediction
from .objectives.barlow import BarlowTwins
from .objectives.base import Objective, check_results
from .wiring import (
    ENVIRONMENT,
    NEXT,
    DreamerLoss,
    check_finite,
    check_records,
    entry,
    listed,
    read_key,
    require_instances,
    require_modules,
    require_not_negative,
    writer_of,
)

HEAD = {"model": "world_model", "prefix": NEXT}
ROLLOUT = "the RSSM rollout in the world model"
PREDICTION = "a prediction head in the world model (next_embedding_head or belief_prediction_head)"
PROJECTION = "a projection head in the world model (r2dreamer.dreamer.ProjectionHead)"


class R2DreamerWorldModelLoss(DreamerLoss):
    """Trains a world model on records [B, T]; takes the place of TorchRL's ``DreamerV3ModelLoss``, without a decoder.

    Runs ``world_model`` (TorchRL's or ours, anything on the key contract) and returns the pair (losses, posterior):
    scalar ``loss_dynamics``, ``loss_representation``, ``loss_<objective>``, ``loss_reward`` and, if the model predicts
    it, ``loss_continue``, already weighted, plus detached diagnostics; and the records with everything the model wrote,
    still attached to the graph (``detach_output=False``) so that a replay-value loss can train the representation.

    A head that writes ``reward_logits`` is trained two-hot, one that writes only a scalar ``reward`` by
    ``scalar_likelihood``, by default in symlog space. The continue head writes ``continue_pred``, a logit, or
    ``continuation``, a probability (TorchRL's name for one).

    Args:
        world_model: encoder, RSSM rollout, projection head, reward head and, optionally, continue head.
        representation: the objective that replaces reconstruction; default :class:`BarlowTwins`.
        kl: the divergence between posterior and prior; default :class:`CategoricalKL`.
        reward_weight: of ``loss_reward``.
        continue_weight: of ``loss_continue``.
        num_reward_bins: of a reward head that writes logits.
        scalar_likelihood: of a reward head without logits. Default: squared error in symlog space.
        continue_target_scale: of the continue head's targets. At ``1 - 1/333`` the head learns the discount as well: the
            actor then takes ``discount=1``.
        detach_output: whether the second result is detached.

    Example:
        >>> from tensordict.nn import TensorDictModule, TensorDictSequential
        >>> def head(key, *layers):
        ...     network = nn.Sequential(nn.Linear(3, 6), *layers)
        ...     return TensorDictModule(network, in_keys=[("next", "position")], out_keys=[("next", key)])
        >>> world_model = TensorDictSequential(  # in earnest: encoder, RSSM rollout, projection, reward head
        ...     head("encoded_latents"), head("projected_latents"), head("reward", nn.Linear(6, 1)),
        ...     *(head(f"{name}_logits", nn.Unflatten(-1, (2, 3))) for name in ("prior", "posterior")))
        >>> records = TensorDict({"next": {"position": torch.randn(5, 7, 3), "reward": torch.zeros(5, 7, 1)}}, [5, 7])
        >>> losses, posterior = R2DreamerWorldModelLoss(world_model)(records)
        >>> sorted(key for key in losses.keys() if key.startswith("loss_"))
        ['loss_barlow', 'loss_dynamics', 'loss_representation', 'loss_reward']
    """

    @dataclass
    class _AcceptedKeys(DreamerLoss._AcceptedKeys):
        """Entries read below ``"next"``, except ``is_init``, by the name they have in the key contract."""

        reward: NestedKey = read_key("reward", ENVIRONMENT, prefix=NEXT)
        reward_logits: NestedKey = read_key("reward_logits", "the reward head in the world model", **HEAD)
        true_reward: NestedKey = "true_reward"
        prior_logits: NestedKey = read_key("prior_logits", ROLLOUT, **HEAD)
        posterior_logits: NestedKey = read_key("posterior_logits", ROLLOUT, **HEAD)
        encoded_latents: NestedKey = read_key("encoded_latents", "the encoder in the world model", **HEAD)
        projected_latents: NestedKey = read_key("projected_latents", PROJECTION, **HEAD)
        predicted_latents: NestedKey = read_key("predicted_latents", PREDICTION, **HEAD)
        continue_pred: NestedKey = read_key("continue_pred", "the continue head in the world model", **HEAD)
        continuation: NestedKey = read_key("continuation", "the continue head in the world model", **HEAD)
        is_init: NestedKey = read_key("is_init", ENVIRONMENT)
        done: NestedKey = read_key("done", ENVIRONMENT, prefix=NEXT)
        terminated: NestedKey = read_key("terminated", ENVIRONMENT, prefix=NEXT)
        # The observation; only TorchRL's DreamerV3Loss asks for it, to list what it needs.
        pixels: NestedKey | list[NestedKey] = "pixels"

    renamed = {
        "lambda_kl": "weigh the two terms, kl=CategoricalKL(dynamics=..., representation=...)",
        "lambda_dynamic": "say kl=CategoricalKL(dynamics=...)",
        "lambda_representation": "say kl=CategoricalKL(representation=...)",
        "kl_mode": "the two terms are always separate; leave it out",
        "kl_alpha": "say kl=CategoricalKL(dynamics=alpha, representation=1 - alpha)",
        "free_bits": "say kl=CategoricalKL(free_nats=...)",
        "unimix": "say kl=CategoricalKL(unimix=...)",
        "lambda_reward": "say reward_weight=...",
        "lambda_continue": "say continue_weight=...",
        "lambda_reco": "no decoder is needed; the objective has a weight, representation=BarlowTwins(weight=...)",
        "reco_loss": "no decoder is needed; with one, representation=Reconstruction()",
        "reco_symlog": "no decoder is needed; with one, representation=Reconstruction()",
        "reward_two_hot": "a head that writes reward_logits is trained two-hot, one that writes reward as a scalar",
        "global_average": "losses are sums over features and means over batch and time; leave it out",
    }
    world_model: TensorDictModuleBase
    world_model_params: TensorDictParams
    target_world_model_params: TensorDictParams

    def __init__(
        self,
        world_model: TensorDictModuleBase,
        representation: Objective | None = None,
        *,
        kl: nn.Module | None = None,
        reward_weight: float = 1.0,
        continue_weight: float = 1.0,
        num_reward_bins: int = 255,
        scalar_likelihood: nn.Module | None = None,
        continue_target_scale: float = 1.0,
        detach_output: bool = False,
        **renamed: object,
    ):
        self._refuse(renamed)
        require_modules(world_model=world_model)
        require_instances(representation=representation, kl=kl, scalar_likelihood=scalar_likelihood)
        if not 0 < continue_target_scale <= 1:
            raise ValueError(f"continue_target_scale={continue_target_scale} must be in (0, 1]; 1 changes no target.")
        require_not_negative(reward_weight=reward_weight, continue_weight=continue_weight)
        super().__init__()
        self.convert_to_functional(cast(Any, world_model), "world_model")
        self.representation = BarlowTwins() if representation is None else representation
        self.kl = CategoricalKL() if kl is None else kl
        self.reward_weight, self.continue_weight = reward_weight, continue_weight
        self.continue_target_scale = continue_target_scale
        self.num_reward_bins, self.detach_output = num_reward_bins, detach_output
        self.scalar_likelihood = scalar_likelihood
        self._check_parts()
        self._read_heads()

    def _check_parts(self) -> None:
        both = {*getattr(self.kl, "terms", ())} & {*getattr(self.representation, "terms", ())}
        if both:
            raise ValueError(
                f"kl={type(self.kl).__name__} and representation={type(self.representation).__name__} both write "
                f"{sorted(both)}. Pass an objective as representation, BarlowTwins() for example, and a divergence as kl."
            )
        for part in (self.kl, self.representation):
            reads = getattr(part, "reads", ())
            unknown = [name for name in reads if not hasattr(self.tensor_keys, name)]
            if unknown:
                raise ValueError(
                    f"{type(part).__name__}.reads={reads!r}: expected a tuple of accepted keys, of which {unknown[0]!r} is none.\n"
                    f"They are {listed(vars(self.tensor_keys), most=20)}."
                )
        kinds = {module.categorical for module in self.world_model.modules() if hasattr(module, "categorical")}
        fits = {CategoricalKL: True, GaussianKL: False}.get(type(self.kl))
        if fits is not None and (not fits) in kinds:
            state, kl = ("Gaussian", "GaussianKL") if fits else ("categorical", "CategoricalKL")
            raise ValueError(
                f"kl={type(self.kl).__name__} does not fit the world model, whose state is {state}: pass kl={kl}(...)."
            )
        categorical = self._next(self.tensor_keys.prior_logits)
        for module in self.world_model.modules():
            if isinstance(module, GaussianRollout) and categorical in module.out_keys:
                raise ValueError(
                    "The world model's rollout is TorchRL's RSSMRollout, which is Dreamer V1's and runs on across the ends of "
                    "episodes (it reads no is_init).\n"
                    "Use: from r2dreamer.dreamer import RSSMRollout, or TorchRL's RSSMRolloutV3."
                )

    def _read_heads(self) -> None:
        keys, at = self.tensor_keys, self._next
        written = [unravel_key(key) for key in self.world_model.out_keys]
        prediction = ScalarPrediction(
            self.world_model, at(keys.reward), at(keys.reward_logits), self.num_reward_bins, self.scalar_likelihood
        )
        self.reward_prediction = self._beside_parameters(prediction)
        needed = [*getattr(self.kl, "reads", ()), *getattr(self.representation, "reads", ())]
        self.unwritten = [name for name in needed if at(getattr(keys, name)) not in written]
        if at(keys.encoded_latents) in [unravel_key(key) for key in self.world_model.in_keys]:
            # Features that come with the batch.
            self.unwritten = [name for name in self.unwritten if name != "encoded_latents"]
        missing, self.writes_reward = list(self.unwritten), at(keys.reward) in written
        if not self.writes_reward and not self.reward_prediction.reads_logits:
            missing.append("reward_logits")
        self._check_written(missing, written)
        self.continue_name = continue_name(keys, self.world_model, NEXT)

    def _check_written(self, missing: list[str], written: list[NestedKey]) -> None:
        """Refuses at construction what no ``set_keys`` afterwards could mend: more is missing than has an unknown name."""
        known = {self._next(key) for key in vars(self.tensor_keys).values() if not isinstance(key, list)}
        known |= {self._next("state"), self._next("belief")}
        unknown = [key for key in written if isinstance(key, tuple) and key[0] == "next" and key not in known]
        if len(missing) > len(unknown):
            keys = self.tensor_keys
            lacks = [f"{self._next(getattr(keys, name))!r}, from {writer_of(keys, name)}" for name in missing]
            raise ValueError(
                f"The world model lacks {'; '.join(lacks)}.\n"
                f"Below 'next' it writes {listed(key for key in written if key[0] == 'next')}.\n"
                "Add the head to the world model; for another name call set_keys(...) on the loss."
            )

    @staticmethod
    def _next(key: NestedKey) -> NestedKey:
        return unravel_key(("next", key))

    @property
    def predicts_continue(self) -> bool:
        return self.continue_name is not None

    def _reads(self) -> list[NestedKey]:
        keys = self.tensor_keys
        wanted = [*self.world_model.in_keys, self._next(keys.reward)]
        if self.predicts_continue:
            wanted.append(self._next(keys.terminated))
        return list(dict.fromkeys(unravel_key(key) for key in wanted))

    def _writes(self) -> list[NestedKey]:
        terms = [*getattr(self.kl, "terms", ()), *getattr(self.representation, "terms", ()), "reward"]
        return [f"loss_{name}" for name in (*terms, *["continue"] * self.predicts_continue)]

    def forward(self, tensordict: TensorDictBase) -> tuple[TensorDict, TensorDictBase]:
        keys, at = self.tensor_keys, self._next
        reward = entry(tensordict, keys, "reward", NEXT)
        check_records(reward, at(keys.reward))
        check_finite(reward, "reward")
        self._check_fresh(tensordict)
        # The reward head writes its prediction under the reward's own key: hand the model a shallow copy, without it,
        # unless the model observes the reward.
        records = tensordict.select(*tensordict.keys(True, True))
        observes_reward = at(keys.reward) in map(unravel_key, self.world_model.in_keys)
        if not observes_reward:
            records = records.exclude(at(keys.reward))
        steps = reward.shape[:-1]
        if records.batch_size != steps:  # [B, T]: rollouts and decoders tell time and features apart by it
            of_steps = {key: value for key, value in records.items(True, True) if value.shape[:2] == steps}
            records = TensorDict(of_steps, steps, device=records.device)  # without the indices of a replay, for example
        for key in self.world_model.in_keys:
            # Observations; latents and actions at the root are of the policy, which diverges where training does.
            value = records.get(key, None) if key[0] == "next" else None
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                check_finite(value, repr(key))
        with self.world_model_params.to_module(self.world_model):
            posterior = self.world_model(records)
        if not self.writes_reward:  # a reward that the model observes is no prediction
            posterior = posterior.exclude(at(keys.reward))
        posterior.set(at(keys.true_reward), reward)

        for name in self.unwritten:  # no module says that it writes it, so one that does not say so must
            entry(posterior, keys, name, NEXT)
        terms, diagnostics = self.kl(posterior, keys)
        seen = posterior.copy().set(at(keys.reward), reward) if observes_reward else posterior  # not the prediction
        results = self.representation(seen, keys)
        own_terms = {*terms, "reward", *["continue"] * self.predicts_continue}
        objective_terms, objective_diagnostics = check_results(self.representation, results, own_terms, {*diagnostics})
        terms |= objective_terms
        diagnostics |= objective_diagnostics

        reward_loss = self.reward_prediction(posterior, keys, "reward", reward, NEXT)
        terms["reward"] = self.reward_weight * reward_loss.mean()
        if self.continue_name is not None:
            continue_loss = self._continue_loss(posterior, tensordict, self.continue_name)
            terms["continue"] = self.continue_weight * continue_loss

        losses = TensorDict({f"loss_{name}": term for name, term in terms.items()}, [])
        losses.update({name: value.detach() for name, value in diagnostics.items()})
        self._clear_weakrefs(tensordict, losses)
        return losses, posterior.detach() if self.detach_output else posterior

    def _check_fresh(self, tensordict: TensorDictBase) -> None:
        """Refuses what is in the batch but written by no head: it is of an earlier pass, and nothing trains it."""
        for name in self.unwritten:
            key = self._next(getattr(self.tensor_keys, name))
            if tensordict.get(key, None) is not None:
                raise ValueError(
                    f"The batch holds {key!r}, of an earlier pass, and the world model writes none: no head would be trained.\n"
                    f"It has to be written by {writer_of(self.tensor_keys, name)}; and keep it out of the replay."
                )

    def _continue_loss(self, posterior: TensorDictBase, records: TensorDictBase, name: str) -> torch.Tensor:
        prediction = entry(posterior, self.tensor_keys, name, NEXT)
        logit = prediction.float()
        if name == "continuation":
            logit = torch.logit(logit, eps=1e-6)
        else:
            check_logit(prediction, self.tensor_keys.continue_pred)
        alive = 1 - entry(records, self.tensor_keys, "terminated", NEXT).float().reshape(logit.shape)
        return F.binary_cross_entropy_with_logits(logit, self.continue_target_scale * alive)


def total_loss(losses: TensorDictBase) -> torch.Tensor:
    """The training objective: the sum of all ``loss_*`` entries.

    Args:
        losses: what a loss, or several, returned.
    """
    terms = [value for key, value in losses.items() if key.startswith("loss_")]
    if not terms:
        raise ValueError(f"No entry begins with 'loss_' in {listed(losses.keys())}. Pass what a loss returned first.")
    first, *others = terms
    return sum(others, first)
