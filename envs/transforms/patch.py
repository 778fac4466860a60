"""A patch of pixels that an agent sees and that can be optimised against it."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import nn
from torch.nn.functional import avg_pool2d
from torchrl.data import Composite
from torchrl.envs.transforms import Transform

from ..base.errors import require_one_of, require_positive

MODES = ("direct", "eps", "perturb")
PLACEMENTS = ("bottom_center", "top_center", "center", "fixed", "random", "saliency")


class AdversarialPatch(Transform):
    """Pastes a rectangle into images: with gradients on batches, as bytes in an environment. One object does both.

    Called on a TensorDict (`patch(batch)`, or from a replay buffer) it turns the images of the root and of `"next"` into
    floats in [0, 1] that carry the gradient of `delta`. In an environment the images keep their dtype. Pixels outside of the
    rectangle stay as they are, to the bit. One corner is drawn for each sequence or episode.

    Args:
        patch_hw: Height and width in pixels.
        mode: What the rectangle shows. ``"direct"``: clip(delta, 0, 1). ``"eps"``: `base` + clip(delta, -eps, eps), an
            opaque sticker of low contrast. ``"perturb"``: the pixels underneath + clip(delta, -eps, eps), and never
            further from them than eps.
        eps: The bound of the last two.
        base: Grey level or colour in [0, 1]: what ``"eps"`` starts from, and the origin of the L2 norm of ``"direct"``.
        placement: ``"fixed"`` is at (x0, y0), ``"random"`` anew in each sequence and episode, ``"saliency"`` where
            :meth:`place_by_saliency` finds that it matters.
        x0: Left edge of a fixed patch.
        y0: Its top edge.
        allowed: Mask ``[H, W]`` that saliency stays inside of.
        eot_translations: Number of draws over which a loss is averaged (expectation over transformation); 0 is one, as
            it is. Environments show the patch as it is.
        eot_max_shift: Pixels by which a draw is shifted at most.
        eot_max_brightness: By how much a draw is brightened at most.
        quantize: To 8 bits, as environments do, with a straight-through gradient.
        onset: The first step of an episode at which an environment shows the patch.
        channels: Of the images.
        pixels_key: Where they are.
        seed: Of the first `delta` and of all draws, which go on whatever an environment's seed is (:meth:`reseed`). In a
            `ParallelEnv` give each worker's patch its own.

    Example:
        env = TransformedEnv(make_dmc("walker_walk", seed=0, from_pixels=True), AdversarialPatch.load("patch.npz"))

    >>> from tensordict import TensorDict
    >>> patch = AdversarialPatch((2, 5), placement="center")
    >>> seen = patch(TensorDict({"pixels": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, [4]))["pixels"]
    >>> seen.sum().backward()
    >>> patch.delta.grad.unique()  # every pixel of the patch is in each of 4 images
    tensor([4.])
    """

    low: torch.Tensor
    high: torch.Tensor
    colour: torch.Tensor
    heat: torch.Tensor | None
    found: torch.Tensor | None
    allowed: torch.Tensor | None

    def __init__(
        self, patch_hw: Sequence[int]=(16, 16), *, mode: str="direct", eps: float | None=None, base: float | Sequence[float]=0.5, placement: str="bottom_center", x0: int | None=None, y0: int | None=None,
        allowed: Any=None, eot_translations: int=0, eot_max_shift: int=2, eot_max_brightness: float=0.0, quantize: bool=True, onset: int=0, channels: int=3,
        pixels_key: str="pixels", seed: int=0,
    ):  # fmt: skip
        super().__init__(in_keys=[pixels_key], out_keys=[pixels_key])
        height, width = patch_hw
        require_positive(patch_height=height, patch_width=width, channels=channels)
        require_one_of(MODES, mode=mode)
        _require(
            (eps is None) == (mode == "direct"),
            f"eps={eps} with mode={mode!r}: eps bounds the modes 'eps' and 'perturb'; 'direct' takes eps=None.",
        )
        _require(eps is None or 1 / 255 <= eps <= 1, f"eps={eps} must lie in [1/255, 1]: images have 8 bits.")
        colour = torch.as_tensor(base, dtype=torch.float32).expand(channels).clone()
        _require((colour >= 0).all() and (colour <= 1).all(), f"base={base} must lie in [0, 1].")
        require_one_of(PLACEMENTS, placement=placement)
        _require(
            (x0 is not None and y0 is not None) if placement == "fixed" else x0 is None and y0 is None,
            f"x0={x0}, y0={y0} with placement={placement!r}: placement='fixed' needs both, the others neither.",
        )
        _require(
            allowed is None or placement == "saliency",
            f"allowed is a mask for placement='saliency', not for placement={placement!r}.",
        )
        for name, value in dict(eot_translations=eot_translations, eot_max_shift=eot_max_shift, onset=onset).items():
            _require(isinstance(value, int) and value >= 0, f"{name}={value} must be a whole number, not negative.")
        _require(0 <= eot_max_brightness <= 1, f"eot_max_brightness={eot_max_brightness} must lie in [0, 1].")
        _require(
            eot_translations or not eot_max_brightness,
            f"eot_max_brightness={eot_max_brightness} is drawn with each of eot_translations, and these are 0.",
        )
        self.settings: dict[str, Any] = dict(
            patch_hw=[height, width], mode=mode, eps=eps, base=colour.tolist(), placement=placement, x0=x0, y0=y0,
            eot_translations=eot_translations, eot_max_shift=eot_max_shift, eot_max_brightness=eot_max_brightness,
            quantize=quantize, onset=onset, channels=channels, pixels_key=pixels_key, seed=seed,
        )  # fmt: skip
        self.patch_hw, self.mode, self.placement, self.onset = (height, width), mode, placement, onset
        self.eot = eot_translations, eot_max_shift, eot_max_brightness
        self.seed, self.draws = int(seed), 0
        if mode == "direct":
            low, high = torch.zeros(channels), torch.ones(channels)
        elif mode == "eps":  # on `colour` it must stay a colour
            low, high = -colour.clamp(max=eps), (1 - colour).clamp(max=eps)
        else:  # on the 8-bit grid, so that rounding cannot leave the bound
            high = torch.full((channels,), math.floor((eps or 0) * 255 + 1e-4) / 255)
            low = -high
        middle, spread = (low + high) / 2, (high - low) / 4  # U[0.25, 0.75] in the mode "direct"
        noise = torch.rand(height, width, channels, generator=self._generator()) * 2 - 1
        self.delta = nn.Parameter(middle + spread * noise)
        for name, value in dict(low=low, high=high, colour=colour).items():
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("allowed", None if allowed is None else torch.as_tensor(allowed, dtype=torch.bool))
        self.register_buffer("heat", None)  # [H, W]
        self.register_buffer("found", None)  # the corner that saliency chose
        self._corners: Any = None  # of the episodes under way
        self._steps: Any = None

    def __repr__(self) -> str:
        return f"AdversarialPatch({self.patch_hw[0]}x{self.patch_hw[1]}, {self.mode!r}, {self.placement!r})"

    # -- what it shows

    def content(self) -> torch.Tensor:
        """[ph, pw, C]: delta within its bounds, on `colour` in the mode "eps"."""
        clipped = torch.minimum(torch.maximum(self.delta, self.low), self.high)
        return self.colour + clipped if self.mode == "eps" else clipped

    @torch.no_grad()
    def project_(self) -> None:
        """Takes delta back into its bounds, after a step of an optimiser."""
        self.delta.clamp_(self.low, self.high)

    def total_variation(self) -> torch.Tensor:
        """Mean |difference| of neighbours, vertical plus horizontal."""
        changes = [self.content().diff(dim=dim).abs() for dim in (0, 1)]
        vertical, horizontal = (change.sum() / max(change.numel(), 1) for change in changes)
        return vertical + horizontal

    def l2(self) -> torch.Tensor:
        """Mean square of what the patch adds to the pixels, or to `base`."""
        content = self.content()
        return (content if self.mode == "perturb" else content - self.colour).square().mean()

    def paste(
        self, pixels: torch.Tensor, corners: torch.Tensor, brightness: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Images [N, ..., C, H, W], bytes or floats in [0, 1], with the patch, as floats; one corner (y, x) each [N, 2]."""
        image = pixels if pixels.is_floating_point() else pixels / 255
        height, width = self.patch_hw
        self.check_image(pixels.shape[-3:])
        lead = corners.shape[:-1]
        between = (1,) * (pixels.ndim - 3 - len(lead))
        row = torch.arange(image.shape[-2], device=image.device) - corners[..., :1]  # [N, H]
        column = torch.arange(image.shape[-1], device=image.device) - corners[..., 1:]  # [N, W]
        inside = ((row >= 0) & (row < height)).unsqueeze(-1) & ((column >= 0) & (column < width)).unsqueeze(-2)
        row, column = row.clamp(0, height - 1).unsqueeze(-1), column.clamp(0, width - 1).unsqueeze(-2)
        shown = self.content()[row, column].movedim(-1, -3)  # [N, C, H, W]
        shown = shown.reshape(*lead, *between, *shown.shape[-3:])
        under = {"direct": None, "eps": self.colour[:, None, None], "perturb": image}[self.mode]
        if self.mode == "perturb":
            shown = image + shown
        if brightness is not None:
            shown = shown + brightness.reshape(*lead, *between, 1, 1, 1)
        shown = shown.clamp(0, 1)
        if self.settings["quantize"]:
            rounded = (shown.detach() * 255).round()
            if under is not None and brightness is None:  # to the nearest level that is inside the bounds
                low, high = (bound.reshape(-1, 1, 1) + under for bound in (self.low, self.high))
                rounded = rounded.clamp((low * 255 - 1e-3).ceil(), (high * 255 + 1e-3).floor()).clamp(0, 255)
            rounded = rounded / 255
            shown = rounded + (shown - shown.detach())  # in this order the value is exactly the rounded one
        return torch.where(inside.reshape(*lead, *between, 1, *inside.shape[-2:]), shown, image)

    # -- where it shows it

    def corners(self, count: int, image_hw: Sequence[int]) -> torch.Tensor:
        """One corner (y, x) for each of `count` sequences, int64 [count, 2]."""
        self.check_image((self.settings["channels"], *image_hw))
        room_y, room_x = (side - patch for side, patch in zip(image_hw, self.patch_hw, strict=True))
        if self.placement == "random":
            fractions = torch.rand(count, 2, generator=self._generator())
            return (fractions * torch.tensor([room_y + 1, room_x + 1])).long().to(self.delta.device)
        corner = {
            "bottom_center": (room_y, room_x // 2),
            "top_center": (0, room_x // 2),
            "center": (room_y // 2, room_x // 2),
            "fixed": (self.settings["y0"], self.settings["x0"]),
            "saliency": self.found,
        }[self.placement]
        _require(corner is not None, "placement='saliency' has no place yet: call place_by_saliency(heat) first.")
        return torch.as_tensor(corner, device=self.delta.device).repeat(count, 1)

    def views(self, count: int, image_hw: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """The draws (corners [count, 2], brightness [count] or None) that a loss is averaged over."""
        draws, shift, brightness = self.eot
        corners = self.corners(count, image_hw)
        if not draws:
            return [(corners, None)]
        room = torch.tensor([side - patch for side, patch in zip(image_hw, self.patch_hw, strict=True)])
        generator, views = self._generator(), []
        for _ in range(draws):
            shifted = corners.cpu() + torch.randint(-shift, shift + 1, (count, 2), generator=generator)
            brighter = brightness * (torch.rand(count, generator=generator) * 2 - 1)
            views.append((shifted.clamp_min(0).minimum(room).to(corners.device), brighter.to(corners.device)))
        return views

    def place_by_saliency(self, heat: torch.Tensor) -> None:
        """Chooses the corner below which `heat` [H, W] has the largest mean, and keeps the map."""
        _require(self.placement == "saliency", f"placement={self.placement!r} is not chosen by saliency.")
        self.check_image((self.settings["channels"], *heat.shape))
        box = lambda value: avg_pool2d(value.double()[None, None], self.patch_hw, stride=1)[0, 0]
        mean = box(heat)  # [H - ph + 1, W - pw + 1]
        if self.allowed is not None:
            _require(
                self.allowed.shape == heat.shape,
                f"allowed is a mask of {tuple(self.allowed.shape)}, the images are {tuple(heat.shape)}.",
            )
            mean = mean.masked_fill(box(self.allowed) < 1 - 1e-9, -math.inf)
        _require(mean.isfinite().any(), f"No rectangle of {self.patch_hw} lies wholly inside of the mask `allowed`.")
        self.heat = heat.detach().float().clone()
        self.found = torch.stack(torch.unravel_index(mean.argmax(), mean.shape)).to(self.delta.device)

    def showing(self, delta: torch.Tensor) -> AdversarialPatch:
        """A patch of the same size, bounds and place that shows something else."""
        other = copy.deepcopy(self)
        other.delta.data.copy_(delta)
        other.project_()
        return other

    def reseed(self, seed: int) -> None:
        """Draws begin anew, as those of a patch made with this seed."""
        self.seed, self.draws = int(seed), 1  # the first draw gave a new patch its pixels
        self.settings = self.settings | {"seed": self.seed}

    def _generator(self) -> torch.Generator:
        # A new one for each draw: a generator of torch's own cannot be sent to another process.
        self.draws += 1
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.draws)

    def check_image(self, shape: Sequence[Any]) -> None:
        """Refuses images [C, H, W] that this patch does not fit."""
        (channels, *sides), own = shape, self.settings["channels"]
        _require(channels == own, f"The images have {channels} channels, the patch has {own}: set channels={channels}.")
        _require(
            all(patch <= side for patch, side in zip(self.patch_hw, sides, strict=True)),
            f"patch_hw={self.patch_hw} is larger than the images of {tuple(sides)}; choose a smaller one.",
        )
        x0, y0 = self.settings["x0"] or 0, self.settings["y0"] or 0
        _require(
            0 <= y0 <= sides[0] - self.patch_hw[0] and 0 <= x0 <= sides[1] - self.patch_hw[1],
            f"A patch of {self.patch_hw} at x0={x0}, y0={y0} leaves the images of {tuple(sides)}.",
        )

    # -- the transform

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The images of a batch [N, ...], at the root and below "next", as floats that carry gradients."""
        (key,) = self.in_keys
        keys = [each for each in (key, ("next", key)) if tensordict.get(each, None) is not None]
        if not keys:
            raise KeyError(f"{self}: neither {key!r} nor ('next', {key!r}) is in {tensordict}.")
        pixels = tensordict.get(keys[0])
        _require(
            pixels.ndim > 3,
            f"{keys[0]!r} holds one image {list(pixels.shape)}, not a batch [N, C, H, W]: unsqueeze it.",
        )
        corners = self.corners(pixels.shape[0], pixels.shape[-2:])
        for each in keys:
            tensordict.set(each, self.paste(tensordict.get(each), corners))
        return tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        pixels = self._pixels(tensordict_reset)
        begins = tensordict.get("_reset", None)
        batch = pixels.shape[:-3]
        corners = self.corners(batch.numel(), pixels.shape[-2:]).reshape(*batch, 2)
        steps = torch.zeros(batch, dtype=torch.int64, device=corners.device)
        if begins is not None and self._steps is not None:
            begins = begins.reshape(batch).to(corners.device)
            corners = torch.where(begins.unsqueeze(-1), corners, self._corners)
            steps = torch.where(begins, steps, self._steps)
        self._corners, self._steps = corners, steps
        return self._show(tensordict_reset)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        if self._steps is None:  # stepped from a TensorDict of the caller's own
            self._reset(tensordict, next_tensordict.copy())
            assert self._steps is not None
        self._steps = self._steps + 1
        return self._show(next_tensordict)

    @torch.no_grad()
    def _show(self, tensordict: TensorDictBase) -> TensorDictBase:
        pixels = self._pixels(tensordict)
        patched = self.paste(pixels.to(self.delta.device), self._corners).to(pixels.device)
        if not pixels.is_floating_point():
            patched = (patched * 255).round().to(pixels.dtype)
        shown = (self._steps >= self.onset).reshape(*self._steps.shape, 1, 1, 1).to(pixels.device)
        return tensordict.set(self.in_keys[0], torch.where(shown, patched, pixels))

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        self.check_image(self._pixels(observation_spec).shape[-3:])
        return observation_spec

    def _pixels(self, entries: Any) -> Any:
        (key,) = self.in_keys
        pixels = entries.get(key, None)
        _require(
            pixels is not None and pixels.ndim >= 3,
            f"The environment has no images under {key!r} to patch: set pixels_key to one it has.",
        )
        return pixels

    # -- on disk

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in ("heat", "found"):  # None until saliency places a patch
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=self.delta.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes everything that it is, as an archive of plain arrays: nothing in it is executed when it is loaded."""
        path = Path(path)
        _require(path.suffix == ".npz", f"path={path} must end in .npz.")
        arrays = {name: value.numpy(force=True) for name, value in self.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        np.savez(partial, settings=json.dumps(self.settings), **arrays)
        return partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> AdversarialPatch:
        """What :meth:`save` wrote: the same pixels, placement, bounds and draws."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                settings = json.loads(archive["settings"].item())
                state = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "settings"}
            if isinstance(settings.get("pixels_key"), list):  # JSON has no tuples
                settings["pixels_key"] = tuple(settings["pixels_key"])
            if not settings.get("eot_translations"):  # older files may hold a brightness that nothing drew
                settings["eot_max_brightness"] = 0.0
            patch = cls(allowed=state.get("allowed"), **settings)
            patch.load_state_dict(state)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path} is not a patch that was saved by AdversarialPatch.save: {error}") from error
        return patch


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
