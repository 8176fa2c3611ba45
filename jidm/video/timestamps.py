"""Frames and the time of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jidm.errors import InputError, VideoError


def timestamped_stream(path: str | Path, fps: float | None) -> tuple[Iterator[Tensor], Iterator[float], int | None]:
    """Frames of a video file or a folder of images one after another, and the time of each.

    Args:
        fps: frames a second; the file's own clock if not given.

    Returns:
        Frames (3, H, W) in [0, 1]; times [s], to be asked for after their frame; how many frames, where the file says.

    Raises:
        VideoError: no frame rate is known.
    """
    from jidm.video.io import open_video

    source = open_video(path, fps=fps if Path(path).is_dir() else None)
    if fps is None and source.fps is None:
        raise VideoError(f"{path} states no frame rate; pass fps=")
    timestamps: list[float] = []

    def frames() -> Iterator[Tensor]:
        for k, (time, pixels) in enumerate(source.pixels()):
            timestamps.append(k / fps if fps is not None else float(time if time is not None else k / source.fps))  # type: ignore[operator]
            yield pixels.to(torch.float32) / 255.0

    def times() -> Iterator[float]:
        while True:
            yield timestamps.pop(0)

    return frames(), times(), source.length


def frame_timestamps(video: Any, fps: float | None, length: int) -> list[float]:
    """Time of each of `length` frames [s]: by fps, or as `video.time` tells.

    Raises:
        InputError: fps is not positive.
        VideoError: nobody knows the time.
    """
    if fps is not None:
        if not (math.isfinite(fps) and fps > 0):
            raise InputError(f"fps must be positive, got {fps}")
        return [k / fps for k in range(length)]
    time = getattr(video, "time", None)
    if time is None:
        raise VideoError("frames without a clock: pass fps= (frames a second), velocities need it")
    return [float(t) for t in time]
