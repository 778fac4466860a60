"""Tiny agents and record batches for the tests; B, T, S, K, D, E and A all differ."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from r2dreamer.dreamer import ActionSpace, ObservationSpace, build_agent

BATCH, TIME, CATEGORICALS, CLASSES, BELIEF, ACTIONS = 3, 5, 7, 4, 16, 2
WIDTHS = dict(belief=BELIEF, hidden=12, classes=CLASSES, categoricals=CATEGORICALS, depth=2, encoder_multipliers=(1, 2))


def tiny_agent(*, discrete=False, images=True, vectors=True, seed=0, **overrides):
    torch.manual_seed(seed)
    observations = ObservationSpace({"pixels": (3, 16, 16)} if images else {}, {"speed": 6} if vectors else {})
    return build_agent(observations, ActionSpace(ACTIONS, discrete), **{**WIDTHS, **overrides})


def tiny_records(agent, *, batch=BATCH, time=TIME, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, time)
    observation = {
        key: torch.randint(0, 256, (*shape, *size), dtype=torch.uint8, generator=generator)
        for key, size in agent.observations.images.items()
    }
    observation |= {
        key: torch.randn(*shape, size, generator=generator) for key, size in agent.observations.vectors.items()
    }
    done = torch.zeros(*shape, 1, dtype=torch.bool)
    done[0, time // 2] = True
    is_init = torch.zeros_like(done)
    is_init[0, time // 2 + 1 :][:1] = True
    if agent.actions.discrete:
        choice = torch.randint(0, agent.actions.size, shape, generator=generator)
        action = torch.nn.functional.one_hot(choice, agent.actions.size).float()
    else:
        action = torch.rand(*shape, agent.actions.size, generator=generator) * 2 - 1
    return TensorDict(
        {
            "state": torch.zeros(*shape, agent.latent_sizes["state"]),
            "belief": torch.rand(*shape, agent.latent_sizes["belief"], generator=generator) * 2 - 1,
            "action": action,
            "is_init": is_init,
            "next": {
                **observation,
                "reward": torch.randn(*shape, 1, generator=generator),
                "done": done,
                "terminated": done.clone(),
                "truncated": torch.zeros_like(done),
            },
        },
        shape,
    )


def rssm_modules(agent, prior=None, posterior=None):
    return (
        TensorDictModule(
            prior or agent.prior,
            in_keys=["state", "belief", "action"],
            out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
        ),
        TensorDictModule(
            posterior or agent.posterior,
            in_keys=[("next", "belief"), ("next", "encoded_latents")],
            out_keys=[("next", "posterior_logits"), ("next", "state")],
        ),
    )
