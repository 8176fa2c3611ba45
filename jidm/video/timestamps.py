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
from jidm.video.preparation import FrameSource

TimedFrame = tuple[float, Float[Tensor, "3 H W"]]
"""Timestamp [s] and RGB in [0, 1] of one frame."""


def open_source(video: str | Path | FrameSource, fps: float | None) -> FrameSource:
    """A stream over a video file or a folder of images that states a frame rate, or `fps` gives it; streams stay as they are.

    Raises:
        InputError: fps is not positive.
        VideoError: it cannot be read, or no frame rate is known.
    """
    _check_fps(fps)
    if isinstance(video, (str, Path)):
        video = open_video(video, fps=fps if Path(video).is_dir() else None)
    if (fps or video.fps) is None:
        raise VideoError(f"{video.path} states no frame rate; pass fps=")
    return video


def timed_frames(source: FrameSource, fps: float | None) -> Iterator[TimedFrame]:
    """The frames of a video, read one after the other.

    Args:
        source: from `open_source`.
        fps: frames per second; the file's own timestamps if not given.
    """
    rate = fps or source.fps
    assert rate is not None
    for k, (time, pixels) in enumerate(source.pixels()):
        timestamp = float(time) if fps is None and time is not None else k / rate
        yield timestamp, pixels.to(torch.float32) / 255.0


def frame_timestamps(video: Any, fps: float | None, length: int) -> list[float]:
    """Timestamps of `length` frames [s], from `fps` or from `video.time`.

    Raises:
        InputError: fps is not positive.
        VideoError: neither is given.
    """
    _check_fps(fps)
    if fps is not None:
        return [k / fps for k in range(length)]
    time = getattr(video, "time", None)
    if time is None:
        raise VideoError("frames without timestamps: pass fps= (frames per second), velocities need it")
    return [float(t) for t in time]


def _check_fps(fps: float | None) -> None:
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise InputError(f"fps must be positive, got {fps}")
