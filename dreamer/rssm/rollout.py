"""The RSSM over a sequence of records (training) and over a stream of observations (acting)."""

import warnings
from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey
from torchrl.data import Unbounded
from torchrl.envs.transforms import TensorDictPrimer
from torchrl.modules import RSSMRolloutV3

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
        reset_key: the flag of an episode's first record.

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

    def __init__(
        self, rssm_prior: TensorDictModule, rssm_posterior: TensorDictModule, reset_key: NestedKey = "is_init"
    ):
        super().__init__()
        _check_wrapped("rssm_prior", rssm_prior, ("state", "belief", "action"), ("prior_logits", "state", "belief"))
        _check_wrapped("rssm_posterior", rssm_posterior, ("belief", "encoded_latents"), ("posterior_logits", "state"))
        self.rssm_prior, self.rssm_posterior, self.reset_key = rssm_prior, rssm_posterior, reset_key
        self.state_key, self.belief_key, self.action_key = rssm_prior.in_keys
        self.embedding_key = rssm_posterior.in_keys[-1]
        self.prior_logits_key, _, self.next_belief_key = rssm_prior.out_keys
        self.posterior_logits_key, self.next_state_key = rssm_posterior.out_keys
        self.in_keys: list[NestedKey] = [
            self.state_key,
            self.belief_key,
            self.action_key,
            reset_key,
            self.embedding_key,
        ]
        self.out_keys: list[NestedKey] = [
            self.prior_logits_key,
            self.posterior_logits_key,
            self.next_state_key,
            self.next_belief_key,
        ]
        ours = isinstance(rssm_prior.module, RSSMPrior) and isinstance(rssm_posterior.module, RSSMPosterior)
        self.general = None if ours else RSSMRolloutV3(rssm_prior, rssm_posterior, reset_key=reset_key)
        if not ours:
            names = f"{type(rssm_prior.module).__name__} and {type(rssm_posterior.module).__name__}"
            warnings.warn(
                f"RSSMRollout of {names} steps one by one, which is slower: the fast pass takes RSSMPrior and RSSMPosterior of "
                "r2dreamer.dreamer, and subclasses of them.",
                stacklevel=2,
            )

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        lost = [key for key in self.in_keys if tensordict.get(key, None) is None]
        if lost:
            present = sorted(str(key) for key in tensordict.keys(True, True))
            raise ValueError(
                f"RSSMRollout reads {', '.join(map(repr, lost))}, which {'is' if len(lost) == 1 else 'are'} missing.\n"
                f"There is {', '.join(present[:12])}{' and more' if len(present) > 12 else ''}.\n"
                "Records hold state, belief, action and is_init at the root; r2dreamer.envs.replay.records.RecordBuilder makes them. "
                "The encoder writes the embedding."
            )
        if self.general is not None:
            return self.general(tensordict)
        prior, posterior = self.rssm_prior.module, self.rssm_posterior.module
        action = tensordict.get(self.action_key)
        keep = _reset_mask(tensordict.get(self.reset_key), action)  # [B, T, 1]
        # Once for the whole sequence: nothing here depends on the recurrence.
        actions = prior.project_action(action * keep).unbind(-2)
        embeddings = posterior.project_embedding(tensordict.get(self.embedding_key)).unbind(-2)
        state = tensordict.get(self.state_key)[..., 0, :].float()
        belief = tensordict.get(self.belief_key)[..., 0, :].float()
        states, beliefs, logits = self.unroll(self.step, state, belief, keep.unbind(-2), actions, embeddings)
        tensordict.set(self.prior_logits_key, prior.logits(beliefs))
        tensordict.set(self.posterior_logits_key, logits)
        tensordict.set(self.next_state_key, states)
        tensordict.set(self.next_belief_key, beliefs)
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
    a fresh environment does not have yet count as zeros, and ``is_init`` zeroes them per environment. Latents that are
    absent in mid-episode were lost on the way: an error.

    Args:
        prior: the network that ``rssm_prior`` of the rollout wraps.
        posterior: the network that ``rssm_posterior`` wraps.
        state_size: size of the state (stochastic latent).
        belief_size: size of the belief (deterministic latent).
        action_size: entries of an action.
        in_keys: names of state, belief, action, embedding and flag.
        out_keys: names of state and belief.
    """

    def __init__(
        self,
        prior: torch.nn.Module,
        posterior: torch.nn.Module,
        *,
        state_size: int,
        belief_size: int,
        action_size: int,
        in_keys: tuple[NestedKey, ...] = ("state", "belief", "action", "encoded_latents", "is_init"),
        out_keys: tuple[NestedKey, ...] = ("state", "belief"),
    ):
        super().__init__()
        self.prior, self.posterior = prior, posterior
        self.sizes = (state_size, belief_size, action_size)
        self.keys = in_keys
        self.out_keys: list[NestedKey] = list(out_keys)
        # Only these must exist beforehand: the three recurrent entries begin as zeros.
        self.in_keys: list[NestedKey] = list(in_keys[3:])

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """What a collector appends to the environment (``auto_register_policy_transforms=True``).

        A batched environment hands back only entries of its own specs; without this a ``ParallelEnv`` would drop the
        latents after every step.

        What a reset writes is never read (``is_init``), so it is -1, a value no latent takes: a TorchRL 0.14 collector
        with a ``policy_device`` carries on only those outputs of which, at its first step, no element equals the input,
        and would drop a one-hot ``state`` that came in as zeros, silently again.
        """
        latents = {key: Unbounded(size) for key, size in zip(self.out_keys, self.sizes, strict=False)}
        return TensorDictPrimer(latents, default_value=-1.0, expand_specs=True)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        embedding, is_init = (tensordict.get(key, None) for key in self.keys[3:])
        if is_init is None:
            raise ValueError(
                f"{self.keys[4]!r} is missing, which says where an episode begins: add TorchRL's InitTracker to the "
                "environment, or set it yourself, True at an episode's first observation and False after it."
            )
        keep = _reset_mask(is_init, embedding)
        found = [tensordict.get(key, None) for key in self.keys[:3]]
        if found[0] is None or found[1] is None:
            self._check_memory(is_init)
        previous = []
        for value, size in zip(found, self.sizes, strict=True):
            if value is None:
                value = embedding.new_zeros(*embedding.shape[:-1], size, dtype=torch.float32)
            # where, not a product: a fresh buffer may hold anything, NaN included.
            previous.append(torch.where(keep.bool(), value.float(), 0.0))
        state, belief, action = previous
        belief = (
            self.prior.core(state, belief, action)
            if isinstance(self.prior, RSSMPrior)
            else (self.prior(state, belief, action)[2])
        )
        _, state = self.posterior(belief, embedding)
        tensordict.set(self.out_keys[0], state.float())
        return tensordict.set(self.out_keys[1], belief.float())

    def _check_memory(self, is_init: torch.Tensor) -> None:
        """Refuses absent latents in mid-episode: the policy has lost its memory."""
        if torch.compiler.is_compiling() or (is_init.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if not is_init.all():
            raise ValueError(
                f"The policy has no memory: {self.keys[0]!r} and {self.keys[1]!r} of the step before are absent, and "
                f"{self.keys[4]!r} is false. A batched environment hands back only entries of its own.\n"
                "In a collector pass auto_register_policy_transforms=True. Elsewhere use "
                "TransformedEnv(env, agent.primer()), or pass on the TensorDict that the policy returned."
            )
