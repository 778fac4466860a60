"""The RSSM over a sequence of records (training) and over a stream of observations (acting)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey
from torchrl.data import Unbounded
from torchrl.envs.transforms import TensorDictPrimer
from torchrl.modules import RSSMRolloutV3

from ..networks.encoders import read
from .core import RSSMPosterior, RSSMPrior


def _reset_mask(is_init: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """1 where an episode goes on, 0 at its first observation, with a trailing feature dimension."""
    while is_init.ndim < like.ndim:
        is_init = is_init.unsqueeze(-1)
    return (~is_init.bool()).float()


def _check_wrapped(name: str, module: TensorDictModule, reads: Sequence[str], writes: Sequence[str]) -> None:
    """Refuses bare networks, classes, and the modules of TorchRL's Dreamer V1, which write a mean and a deviation."""
    if isinstance(module, type) or not isinstance(module, TensorDictModuleBase):
        what = module.__name__ if isinstance(module, type) else type(module).__name__
        raise ValueError(
            f"{name} is {'the class ' if isinstance(module, type) else 'a bare '}{what}. Wrap an instance: "
            f"TensorDictModule({what}(...), in_keys=[...], out_keys=[...]).\n"
            f"In order it reads {', '.join(reads)} and writes {', '.join(writes)}, those below 'next'."
        )
    if len(module.in_keys) < len(reads) or len(module.out_keys) != len(writes):
        raise ValueError(
            f"{name} reads {len(module.in_keys)} and writes {len(module.out_keys)} entries, {module.out_keys}; RSSMRollout takes "
            f"one that reads {', '.join(reads)} and writes {', '.join(writes)}.\n"
            "A Gaussian prior of TorchRL's Dreamer V1 belongs to its rollout: from torchrl.modules import RSSMRollout."
        )


class RSSMRollout(TensorDictModuleBase):
    """Filters [B, T] records: prior and posterior at every step, latents zeroed where ``is_init``.

    Takes the two wrapped modules as TorchRL's ``RSSMRolloutV3`` does. With :class:`RSSMPrior` and
    :class:`RSSMPosterior` only what truly recurs is done per step; with any other modules TorchRL's rollout does it.

    Reads ``state`` and ``belief`` (the latents before the first record, index 0 of T), ``action``, ``is_init``,
    ``("next", "encoded_latents")``; writes ``("next", ...)`` ``prior_logits`` and ``posterior_logits`` [B, T, S, K],
    ``state`` [B, T, S*K] and ``belief`` [B, T, D].

    Args:
        rssm_prior: the wrapped prior.
        rssm_posterior: the wrapped posterior.

    Example:
        >>> from tensordict import TensorDict
        >>> from r2dreamer.dreamer import ActionSpace, ObservationSpace, build_agent
        >>> agent = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, discrete=True),
        ...                     belief=16, hidden=8, classes=4, depth=2)
        >>> keys = ["state", "belief", "action"]
        >>> after = lambda *names: [("next", name) for name in names]
        >>> prior = TensorDictModule(agent.prior, keys, after("prior_logits", "_", "belief"))
        >>> posterior = TensorDictModule(agent.posterior, after("belief", "encoded_latents"), after("posterior_logits", "state"))
        >>> rollout = RSSMRollout(prior, posterior)  # agent.rollout is the same
        >>> records = TensorDict({"state": torch.zeros(3, 5, 128), "belief": torch.zeros(3, 5, 16),
        ...     "action": torch.zeros(3, 5, 2), "is_init": torch.zeros(3, 5, 1, dtype=torch.bool),
        ...     "next": {"encoded_latents": torch.randn(3, 5, agent.encoder.out_features)}}, [3, 5])
        >>> rollout(records)["next", "prior_logits"].shape
        torch.Size([3, 5, 32, 4])
    """

    compiles = ("step",)

    def __init__(self, rssm_prior: TensorDictModule, rssm_posterior: TensorDictModule):
        super().__init__()
        _check_wrapped("rssm_prior", rssm_prior, ("state", "belief", "action"), ("prior_logits", "state", "belief"))
        _check_wrapped("rssm_posterior", rssm_posterior, ("belief", "encoded_latents"), ("posterior_logits", "state"))
        self.rssm_prior, self.rssm_posterior = rssm_prior, rssm_posterior
        prior_logits, _, belief = rssm_prior.out_keys
        self.in_keys: list[NestedKey] = [*rssm_prior.in_keys, "is_init", rssm_posterior.in_keys[-1]]
        self.out_keys: list[NestedKey] = [prior_logits, *rssm_posterior.out_keys, belief]
        ours = isinstance(rssm_prior.module, RSSMPrior) and isinstance(rssm_posterior.module, RSSMPosterior)
        self.general = None if ours else RSSMRolloutV3(rssm_prior, rssm_posterior)
        if not ours:
            names = f"{type(rssm_prior.module).__name__} and {type(rssm_posterior.module).__name__}"
            warnings.warn(
                f"RSSMRollout of {names} steps one by one, which is slower: the fast pass takes RSSMPrior and RSSMPosterior of "
                "r2dreamer.dreamer, and subclasses of them.",
                stacklevel=2,
            )

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        remedy = (
            "r2dreamer.envs.RecordBuilder makes records, with action and is_init. state and belief are the latents before them: the "
            "replay of make_replay samples both; beside another buffer set zeros. The encoder writes the embedding."
        )
        values = read(tensordict, self.in_keys, "RSSMRollout", remedy)
        if self.general is not None:
            return self.general(tensordict)
        state, belief, action, is_init, embedding = values
        prior, posterior = self.rssm_prior.module, self.rssm_posterior.module
        keep = _reset_mask(is_init, action)  # [B, T, 1]
        # where, not a product: what is there before an episode may be anything, NaN included.
        goes_on = keep.bool()
        action = torch.where(goes_on, action.float(), 0)
        first = (
            torch.where(goes_on[..., 0, :], state[..., 0, :].float(), 0),
            torch.where(goes_on[..., 0, :], belief[..., 0, :].float(), 0),
        )
        # Once for the whole sequence: nothing here depends on the recurrence.
        actions = prior.project_action(action).unbind(-2)
        embeddings = posterior.project_embedding(embedding).unbind(-2)
        states, beliefs, logits = self.unroll(self.step, *first, keep.unbind(-2), actions, embeddings)
        for key, value in zip(self.out_keys, (prior.logits(beliefs), logits, states, beliefs), strict=True):
            tensordict.set(key, value)
        return tensordict

    def unroll(
        self,
        step: Callable[..., tuple[torch.Tensor, ...]],
        state: torch.Tensor,
        belief: torch.Tensor,
        *sequences: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Applies ``step`` along the sequences; states, beliefs and posterior logits of all steps, [B, T, ...] each."""
        latent, time = self.rssm_posterior.module.latent, state.ndim - 1
        steps = []
        for inputs in zip(*sequences, strict=True):
            noise = latent.noise(state.shape[:-1], state.device)
            state, belief, logits = step(state, belief, *inputs, noise)
            steps.append((state, belief, logits))
        return [torch.stack(values, time) for values in zip(*steps, strict=True)]

    def step(
        self,
        state: torch.Tensor,
        belief: torch.Tensor,
        keep: torch.Tensor,
        action: torch.Tensor,
        embedding: torch.Tensor,
        noise: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step, from a projected action and embedding: state, belief, posterior logits."""
        belief = self.rssm_prior.module.advance(state * keep, belief * keep, action)
        posterior = self.rssm_posterior.module
        logits = posterior.logits(belief, embedding)
        return posterior.latent.draw(logits, noise), belief, logits


class RSSMStateEstimator(TensorDictModuleBase):
    """Acting-time filter: previous latents, previous action and the embedding of what is seen now -> latents now.

    Reads and overwrites ``state`` and ``belief``; ``action`` still holds the previous action when it is called. Entries
    a fresh environment does not have yet count as zeros, and ``is_init`` zeroes them per environment. What is absent in
    mid-episode was lost on the way: an error.

    Args:
        prior: the network that ``rssm_prior`` of the rollout wraps.
        posterior: the network that ``rssm_posterior`` wraps.
        state_size: size of the state (stochastic latent).
        belief_size: size of the belief (deterministic latent).
        action_size: entries of an action.
    """

    in_keys: list[NestedKey] = ["encoded_latents", "is_init"]  # the three recurrent entries may be absent at first
    out_keys: list[NestedKey] = ["state", "belief"]

    def __init__(
        self, prior: torch.nn.Module, posterior: torch.nn.Module, *, state_size: int, belief_size: int, action_size: int
    ):
        super().__init__()
        self.prior, self.posterior = prior, posterior
        self.sizes = {"state": state_size, "belief": belief_size, "action": action_size}

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """What a collector appends to the environment (``auto_register_policy_transforms=True``).

        A batched environment hands back only entries of its own specs; without this a ``ParallelEnv`` would drop the
        latents after every step.

        A reset writes 1e-12, as good as zero: random actions (``init_random_frames``) leave it in the data, where zeros mean
        that no policy has been there. It is not 0, since a TorchRL 0.14 collector with a ``policy_device`` carries on only
        those outputs of which, at its first step, no element equals the input. It would drop a one-hot ``state``, silently.
        """
        latents = {key: Unbounded(self.sizes[key]) for key in ("state", "belief")}
        return TensorDictPrimer(latents, default_value=1e-12, expand_specs=True)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        embedding, is_init = (tensordict.get(key, None) for key in self.in_keys)
        if is_init is None:
            raise ValueError(
                "'is_init' is missing, which says where an episode begins: add TorchRL's InitTracker to the environment, or "
                "set it yourself, True at an episode's first observation and False after it."
            )
        keep = _reset_mask(is_init, embedding)
        found = {name: tensordict.get(name, None) for name in self.sizes}
        if absent := [name for name, value in found.items() if value is None]:
            self._check_memory(is_init, absent)
        previous = []
        for name, value in found.items():
            if value is None:
                value = embedding.new_zeros(*embedding.shape[:-1], self.sizes[name], dtype=torch.float32)
            # where, not a product: a fresh buffer may hold anything, NaN included.
            previous.append(torch.where(keep.bool(), value.float(), 0.0))
        belief = self.prior.core(*previous) if isinstance(self.prior, RSSMPrior) else self.prior(*previous)[2]
        _, state = self.posterior(belief, embedding)
        return tensordict.set("state", state.float()).set("belief", belief.float())

    def _check_memory(self, is_init: torch.Tensor, absent: list[str]) -> None:
        """Refuses absent entries in mid-episode: the policy has lost its memory."""
        if torch.compiler.is_compiling() or (is_init.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if not is_init.all():
            if absent == ["action"]:
                raise ValueError(
                    "The action of the step before is absent, and 'is_init' is false: TorchRL's step_mdp drops it, and the policy "
                    "remembers by it. Use env.step_mdp(td), or step_mdp(td, exclude_action=False)."
                )
            raise ValueError(
                "The policy has no memory: 'state' and 'belief' of the step before are absent, and 'is_init' is false. A "
                "batched environment hands back only entries of its own.\n"
                "In a collector pass auto_register_policy_transforms=True. Elsewhere use "
                "TransformedEnv(env, agent.primer()), or pass on the TensorDict that the policy returned."
            )
