"""Fills a replay with whole episodes that something else collected, each record checked against what is expected here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import unravel_key

from .buffer import RecordReplay
from .records import FLAG_KEYS, RecordBuilder


@dataclass
class Prefilled:
    """How many records of how many episodes; `left_out` episodes lack their beginning."""

    records: int = 0
    episodes: int = 0
    left_out: int = 0


def prefill(
    replay: RecordReplay,
    episodes: Iterable[TensorDictBase] | None,
    example: TensorDictBase,
    *,
    discrete: bool,
    where: str,
    share: bool = False,
) -> Prefilled:
    """Appends each episode to the stream that holds the fewest records.

    Between two records that did not follow each other an episode always ends: windows cross ends of episodes, no seams.
    An episode without its beginning is left out, for nothing says what came before it. Latents are zeros, as where no
    policy has seen an observation; the first update that samples a record writes them.

    Args:
        episodes: of records ``[m]``, or of transitions ``[n]`` with the observations at their root, in order of time.
        example: one record ``[]``, which tells keys, shapes and dtypes: `agent.example_record()`.
        discrete: whether actions are one-hot; else those of transitions lie in [-1, 1].
        where: what messages begin with.
        share: these are some of all episodes, which may be none: `refuse_none` the sum.
    """
    if episodes is None:
        raise ValueError(
            f"{where} is no recording of TorchRL or Minari, or is not there (`recorded_episodes` found none)."
        )
    if isinstance(episodes, TensorDictBase):
        raise ValueError(f"{where}: episodes is one TensorDict; give a list of episodes, for example [rollout].")
    if len(replay):
        streams = replay.rings.stored.nonzero().squeeze(-1)
        newest = replay.rings.slots(streams, replay.rings.written[streams] - 1)
        if not replay.read_slots(newest, [("next", "done")])["next", "done"].all():
            raise ValueError(
                f"{where} would go on with an episode that is under way in the replay: prefill before anything is collected, or call "
                "replay.truncate_streams() and reset the environments."
            )
    latents = replay.latents_in(example)
    nxt = cast(TensorDictBase, example["next"])
    observations = [key for key in nxt.keys(True, True) if key not in ("reward", *FLAG_KEYS)]
    observations = [key for key in observations if unravel_key(("next", key)) not in latents]
    found = Prefilled()
    for episode in episodes:
        if (begins := episode.get("is_init", None)) is None or not len(episode):
            raise ValueError(
                f"{where}: an episode of {len(episode)} records holds {sorted(map(repr, episode.keys()))}; it needs at least one, and "
                "'is_init', which says where it begins: add TorchRL's InitTracker to the environment that is recorded."
            )
        if not begins.reshape(-1)[0]:
            found.left_out += 1
            continue
        roots = observations and observations[0] in episode.keys(True, True)
        records = RecordBuilder(1, observations)(episode) if roots else episode.exclude("stream").clone()
        records = _checked(records, example.exclude(*latents), discrete, where)
        if roots and not discrete:
            _check_range(records["action"], where)
        for key in latents:
            records[key] = torch.zeros(len(records), *example[key].shape)
        last = {key: records["next", key][-1] for key in FLAG_KEYS}
        last["truncated"] |= ~last["done"]
        last["done"][:] = True
        stream = int(replay.rings.written.argmin())
        records["stream"] = torch.full((len(records),), stream)
        replay.extend(records)
        found.records += len(records)
        found.episodes += 1
    if not share:
        refuse_none(found, where)
    return found


def refuse_none(found: Prefilled, where: str) -> None:
    if not found.episodes:
        raise ValueError(
            f"{where} holds no episode from its beginning on ({found.left_out} without): nothing can be used."
        )


def _checked(records: TensorDictBase, example: TensorDictBase, discrete: bool, where: str) -> TensorDict:
    """The expected entries alone, or what is wrong with them."""
    given = records.keys(True, True)
    chosen = {}
    for key, expected in example.items(True, True):
        if key not in given:
            raise ValueError(f"{where} lacks {key!r}, which this run needs; it holds {sorted(map(repr, given))}.")
        value = records[key]
        if value.shape[1:] != expected.shape or value.dtype != expected.dtype:
            why = "it is of another task, or recorded with other settings"
            if key == "action" and discrete:
                why += ". Choices are recorded one-hot (categorical_action_encoding=False of TorchRL's environments)"
            raise ValueError(
                f"{where} has {key!r} of shape {list(value.shape[1:])} and {value.dtype}, and this run needs "
                f"{list(expected.shape)} and {expected.dtype}: {why}."
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{where} holds NaN or infinity in {key!r}.")
        chosen[key] = value
    action, first = chosen["action"], chosen["is_init"].reshape(-1)
    if discrete and not (((action == 0) | (action == 1)).all() and (action.sum(-1) == (~first).float()).all()):
        raise ValueError(f"{where} has actions that are not one choice each, one-hot over {action.shape[-1]}.")
    return TensorDict(chosen, [len(records)])


def _check_range(action: torch.Tensor, where: str) -> None:
    """Of another program's actions. Records hold what a policy drew, which the environment clipped to [-1, 1]."""
    if action.abs().max() > 1 + 1e-6:
        raise ValueError(
            f"{where} has actions between {action.min():.3g} and {action.max():.3g}, and those of this run are in [-1, 1]: "
            "scale them to that range when you record."
        )
