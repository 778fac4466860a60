"""Writes uint8 frames [T, H, W, 3] as MP4 or GIF. A missing encoder is a notice, never the end of a training."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path

import numpy as np

from .files import replace


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float) -> Path | None:
    """Writes an MP4 (GIF where only Pillow is installed) and returns its path; None, with a notice, if neither can."""
    path = Path(path)
    frames = enlarge(np.asarray(frames))
    try:
        if importlib.util.find_spec("imageio") and importlib.util.find_spec("imageio_ffmpeg"):
            import imageio.v2 as imageio

            path = with_ending(path, ".mp4")
            replace(path, lambda partial: imageio.mimwrite(partial, list(frames), fps=fps, macro_block_size=1))
            return path
        gif = encode_gif(frames, fps)
        if gif is None:
            print('No video: encoding one needs pip install "torchrl-r2dreamer[plot]"')
            return None
        path = with_ending(path, ".gif")
        replace(path, lambda partial: partial.write_bytes(gif))
        return path
    except Exception as error:  # noqa: BLE001 - encoders fail in many ways, and none is worth a lost run
        said = (str(error).splitlines() or [""])[0]  # ffmpeg's errors go on with its command
        print(f"No video: {type(error).__name__}: {said}")
        return None


def with_ending(path: Path, ending: str) -> Path:
    """In place of a film's ending, or after any other name: "lr0.01" and "lr0.03" are two films."""
    is_film = path.suffix.lower() in (".mp4", ".gif", ".avi", ".mov", ".mkv", ".webm")
    return path.with_suffix(ending) if is_film else path.with_name(path.name + ending)


def encode_gif(frames: np.ndarray, fps: float) -> bytes | None:
    """An endlessly repeating GIF; None without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        return None
    # Pillow's own choice of colours looks slightly better and takes ten times as long.
    images = [Image.fromarray(frame).quantize(method=Image.Quantize.FASTOCTREE) for frame in frames]
    # GIF counts in hundredths of a second, and viewers slow down what is shown for less than two of them.
    duration = max(20, round(1000 / fps))
    file = io.BytesIO()
    images[0].save(file, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)
    return file.getvalue()


def enlarge(frames: np.ndarray, size: int = 256) -> np.ndarray:
    """Repeats pixels until the shorter side has about `size`, and makes both sides even, which MP4 needs."""
    factor = max(1, size // min(frames.shape[1:3]))
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
