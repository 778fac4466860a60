"""Moving backgrounds: waves that are computed, or frames that are read from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..base.errors import require

NUMBERS = {"train": range(60), "val": range(60, 90)}  # of the waves; as many as DAVIS 2017 has videos
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Waves:
    """A texture of waves that run through each other, in colours of its own; its number is its seed."""

    def __init__(self, number: int, size: int, count: int = 6):
        random = np.random.default_rng([2021, number])
        place = np.linspace(0, 2 * np.pi, size, endpoint=False, dtype=np.float32)
        # Whole periods in a face of the skybox, so that its edges meet.
        right, down = random.integers(-4, 5, (2, count, 1)) * place  # [K, S]
        self.across = right + random.uniform(0, 2 * np.pi, (count, 1))
        self.speed, weight = random.uniform(-0.2, 0.2, (count, 1)), random.uniform(0.3, 1, (count, 1))
        self.down = (weight * np.concatenate([[np.cos(down)], [np.sin(down)]])).reshape(2 * count, size)
        level = np.arange(256)[:, None] / 256
        turns, phase = random.integers(1, 3, 3), random.uniform(0, 1, 3)
        self.palette = (127.5 * (1 + np.sin(2 * np.pi * (turns * level + phase)))).astype(np.uint8)

    def frame(self, time: int) -> np.ndarray:
        """uint8 [S, S, 3]."""
        across = self.across + self.speed * time
        waves = np.concatenate([np.sin(across), np.cos(across)]).T @ self.down  # sin(a + b), summed over waves
        return self.palette[(waves * 40).astype(np.int32) & 255]


class Film:
    """The images of one folder as a texture that runs forwards and backwards."""

    def __init__(self, files: Sequence[Path], size: int):
        self.files, self.size = files, size

    def frame(self, time: int) -> np.ndarray:
        """uint8 [S, S, 3]."""
        last = len(self.files) - 1
        time %= max(2 * last, 1)
        return _image(self.files[min(time, 2 * last - time)], self.size)


@lru_cache(maxsize=2000)  # 100 MB of frames
def _image(file: Path, size: int) -> np.ndarray:
    try:
        with require("PIL.Image", "plot").open(file) as image:
            image.draft("RGB", (size, size))
            return np.array(image.convert("RGB").resize((size, size)))
    except OSError as error:  # also what Pillow says of a file that is no image
        raise ValueError(f"{file} is a frame of a background and cannot be read as an image ({error}).") from error


def films(folder: str | Path, split: str) -> list[list[Path]]:
    """The films of a folder that belong to a split, each the sorted images of one folder.

    Folders `train` and `val` inside are the splits. Otherwise every third film is for validation; of a single film it is
    the last third.
    """
    folder = Path(folder)
    divided = all((folder / name).is_dir() for name in NUMBERS)
    top = folder / split if divided else folder
    folders = sorted(path for path in [top, *top.rglob("*")] if path.is_dir())
    found = [sorted(file for file in each.iterdir() if file.suffix.lower() in SUFFIXES) for each in folders]
    found = [each for each in found if each]
    if not divided and len(found) == 1:
        cut = len(found[0]) - len(found[0]) // 3
        found = [found[0][:cut] if split == "train" else found[0][cut:]]
    elif not divided:
        found = [each for number, each in enumerate(found) if (number % 3 == 1) == (split == "val")]
    if not any(found):
        raise ValueError(
            f"The folder of background frames {str(folder)!r} "
            + (f"has no images for split={split!r}. " if folder.is_dir() else "is not there. ")
            + "Name a folder of folders, each with the frames of "
            f"one film ({', '.join(SUFFIXES)}), two films at least, or one folder with three images or more."
        )
    return found
