"""Frames with their timestamps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jidm.errors import InputError, VideoError


def timestamped_stream(path: str | Path, fps: float | None) -> tuple[Iterator[Tensor], Iterator[float], int | None]:
    """A video file or folder of images as a stream of frames and one of timestamps.

    Args:
        path: the file or folder.
        fps: frames per second; the file's own timestamps if not given.

    Returns:
        Frames (3, H, W) in [0, 1]; timestamps [s], each available after its frame; the number of frames, if the file
        declares it.

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
