"""Short episodes of a scripted policy, as records, with what the simulator knew at each of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp
from tqdm import tqdm

from r2dreamer.envs.base.errors import require_positive
from r2dreamer.envs.replay.records import FLAG_KEYS

from .facts import facts


def record(
    env: EnvBase,
    keys: Iterable[str],
    seed: int,
    *,
    episodes: int,
    steps: int,
    lead: int = 0,
    keep: float = 0.75,
    progress: bool = False,
) -> TensorDict:
    """[episodes, steps] records, and ``("facts", name)`` beside each.

    The policy draws an action uniformly and holds it for some steps, so that things move far. An episode that ends before
    ``steps`` records is followed by another one in its row.

    Args:
        keys: of the observations.
        lead: at most so many steps are played before a row begins, drawn anew for each: episodes begin in more states.
        keep: the chance that an action is held for another step.
    """
    require_positive(episodes=episodes, steps=steps)
    rows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        env.set_seed(seed, static_seed=True)
        for _ in tqdm(range(episodes), desc="recording", disable=not progress):
            rows.append(_row(env, list(keys), steps, int(torch.randint(lead + 1, ())), keep))
    return torch.stack(rows).contiguous()


def _row(env: EnvBase, keys: list[str], steps: int, lead: int, keep: float) -> TensorDict:
    now, action, first, records = env.reset(), env.action_spec.rand(), True, []
    for step in range(lead + steps):
        if first or step == lead:  # what came before a row's first record is not told
            first, arrived, reward = True, torch.zeros_like(action).float(), torch.zeros(1)
        if step >= lead:
            after = {key: now[key] for key in (*keys, *FLAG_KEYS)} | {"reward": reward}
            entries = {"action": arrived, "is_init": torch.tensor([first]), "next": after, "facts": facts(env)}
            records.append(TensorDict(entries).clone())
        if now["done"].any():
            now, first = env.reset(), True
            continue
        action = action if torch.rand(()) < keep else env.action_spec.rand()
        played = env.step(now.clone().set("action", action))
        arrived, reward, first = action.float(), played["next", "reward"].float().reshape(1), False
        now = step_mdp(played)
    last = records[-1]["next"]
    last["truncated"] |= ~last["done"]  # the row is cut here
    last["done"] = torch.ones_like(last["done"])
    return torch.stack(records)


def recorded(path: Path, make: Callable[[], TensorDictBase]) -> TensorDictBase:
    """What was recorded in this directory; recorded now if nothing was."""
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        make().memmap(partial)
        partial.rename(path)
    return TensorDict.load_memmap(path)
