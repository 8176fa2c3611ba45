"""Frames with their timestamps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError, VideoError
from jidm.video.io import open_video

TimedFrame = tuple[float, Float[Tensor, "3 H W"]]
"""Timestamp [s] and RGB in [0, 1] of one frame."""


def timed_frames(path: str | Path, fps: float | None) -> tuple[Iterator[TimedFrame], int | None]:
    """The frames of a video file or folder of images, read one after the other, and their number if the file declares it.

    Args:
        path: the file or folder.
        fps: frames per second; the file's own timestamps if not given.

    Raises:
        VideoError: no frame rate is known.
    """
    source = open_video(path, fps=fps if Path(path).is_dir() else None)
    rate = fps or source.fps
    if rate is None:
        raise VideoError(f"{path} states no frame rate; pass fps=")

    def frames() -> Iterator[TimedFrame]:
        for k, (time, pixels) in enumerate(source.pixels()):
            timestamp = float(time) if fps is None and time is not None else k / rate
            yield timestamp, pixels.to(torch.float32) / 255.0

    return frames(), source.length


def frame_timestamps(video: Any, fps: float | None, length: int) -> list[float]:
    """Timestamps of `length` frames [s], from `fps` or from `video.time`.

    Raises:
        InputError: fps is not positive.
        VideoError: neither is given.
    """
    if fps is not None:
        if not (math.isfinite(fps) and fps > 0):
            raise InputError(f"fps must be positive, got {fps}")
        return [k / fps for k in range(length)]
    time = getattr(video, "time", None)
    if time is None:
        raise VideoError("frames without timestamps: pass fps= (frames per second), velocities need it")
    return [float(t) for t in time]
