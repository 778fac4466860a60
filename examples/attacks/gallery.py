"""Pictures of an attack: the patch, how it was found, and what the agent saw under each condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from r2dreamer.envs import AdversarialPatch

from ..figures.curves import new_figure
from ..training.video import enlarge

GAP = 4  # frames between two films


def side_by_side(films: Sequence[np.ndarray]) -> np.ndarray:
    """Films [T, H, W, 3] of unequal lengths as one; a shorter one rests on its last frame."""
    length = max(map(len, films))
    films = [np.concatenate([film, film[-1:].repeat(length - len(film), 0)]) for film in films]
    gap = np.full((*films[0].shape[:2], GAP, 3), 255, np.uint8)
    return np.concatenate([part for film in films for part in (film, gap)][:-1], 2)


def contact_sheet(films: Mapping[str, np.ndarray], path: Path) -> None:
    """A row of frames, evenly spread over each film; one condition a row."""
    columns = 6
    figure = new_figure(columns * 1.1 + 1.2, len(films) * 1.15)
    if figure is None:
        return
    axes = figure.subplots(len(films), columns, squeeze=False)
    for row, (name, film) in zip(axes, films.items(), strict=True):
        for axis, index in zip(row, np.linspace(0, len(film) - 1, columns).round().astype(int), strict=True):
            axis.imshow(film[index], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=80)


def draw_patch(patch: AdversarialPatch, path: Path) -> None:
    """What the patch shows (in the mode "perturb": adds, around grey), and beside it the map that placed it."""
    content = patch.content().detach().cpu()
    if patch.mode == "perturb":
        content = 0.5 + content / (2 * patch.high.cpu().max())
    if content.shape[-1] != 3:
        content = content[..., -1:].expand(*content.shape[:-1], 3)
    pictures = {"patch": enlarge((content * 255).byte().numpy()[None])[0]}
    if patch.heat is not None:
        pictures["|d return / d pixel|"] = patch.heat.cpu().numpy()
    figure = new_figure(2.2 * len(pictures), 2.4)
    if figure is None:
        return
    axes = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture, interpolation="nearest", cmap="magma")
        axis.set_title(name, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=80)


def draw_search(curves: Mapping[str, list[dict]], path: Path) -> None:
    """The imagined return on the windows held out, under each patch and undisturbed."""
    figure = new_figure(6, 3.5)
    if figure is None:
        return
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.plot([point["step"] for point in curve], [point["imagined_return"] for point in curve], label=name)
        axis.axhline(curve[0]["clean_return"], color="#8a8a8a", linestyle="--", linewidth=1)
    axis.set_xlabel("step")
    axis.set_ylabel("imagined return, held out")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=80)


def overlay(frame: np.ndarray, heat: torch.Tensor, mask: np.ndarray | None = None) -> np.ndarray:
    """A uint8 frame [H, W, 3] with a map [H, W] in [0, 1] in red, and the outline of a mask in green."""
    grey = frame.mean(-1, keepdims=True).repeat(3, -1) * 0.6
    weight = heat.clamp(0, 1).cpu().numpy()[..., None]
    image = grey * (1 - weight) + np.array([255.0, 40.0, 20.0]) * weight
    if mask is not None:
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        image[mask & ~inner] = (30, 230, 90)
    return image.round().astype(np.uint8)
