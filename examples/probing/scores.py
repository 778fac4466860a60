"""Every fact of a recording asked of a model's features, of raw pixels, and of the other facts."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from r2dreamer.dreamer import Agent

from .ridge import heldout_r2, products
from .worldmodel import features

FEW = 2000  # records that raw pixels are read from: a solver's time grows with their cube

Scores = dict[str, dict[str, dict[str, float]]]  # by what is read, then by fact


def varying(records: TensorDictBase) -> dict[str, torch.Tensor]:
    """The facts that change: a target that stands still in all episodes cannot be asked for."""
    facts = {name: value.float() for name, value in records["facts"].items()}
    return {name: value for name, value in facts.items() if (value.flatten(0, 1).std(0) > 1e-6).all()}


def model_scores(agent: Agent, records: TensorDictBase, episodes: int) -> Scores:
    """Of latents and embedding; the first ``episodes`` rows are the training episodes, here and below."""
    read, facts = features(agent, records), varying(records)
    return {
        name: {fact: heldout_r2(value, truth, episodes) for fact, truth in facts.items()}
        for name, value in read.items()
    }


def baseline_scores(records: TensorDictBase, keys: list[str], episodes: int) -> Scores:
    """Of raw observations, and of the other facts with their products: what these say, no image is needed for."""
    every = -(-records.numel() // FEW)
    few = records[:, every // 2 :: every] if every < records.shape[1] else records[:, -1:]
    raw = torch.cat([few["next", key].flatten(2).float() for key in keys], -1)
    scores: Scores = {"pixels": {}, "other facts": {}}
    for fact, truth in varying(few).items():
        scores["pixels"][fact] = heldout_r2(raw, truth, episodes)
    facts = varying(records)
    for fact, truth in facts.items():
        if others := [value for other, value in facts.items() if other != fact]:
            scores["other facts"][fact] = heldout_r2(products(torch.cat(others, -1)), truth, episodes)
    return scores
