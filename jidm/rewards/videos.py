"""Videos as callers hand them over: one at a time, with their clock and first pose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError, VideoError
from jidm.rewards.eva import MIN_FRAMES
from jidm.video.io import read_video
from jidm.video.layouts import as_video
from jidm.video.timestamps import frame_timestamps


def split_videos(
    videos: Any, fps: float | None, layout: str | None, value_range: tuple[float, float] | None
) -> tuple[Sequence[Any], str | None, tuple[float, float] | None]:
    """One video per item, as light as they came, and how to read them."""
    if isinstance(videos, (str, Path)) or isinstance(getattr(videos, "pixels", None), Tensor):
        singles: Sequence[Any] = [videos]
    elif isinstance(videos, (list, tuple)) and not (videos and hasattr(videos[0], "getbands")):
        singles = videos
    else:
        batch = as_video(videos, layout=layout, value_range=value_range)
        singles, layout, value_range = list(batch.reshape(-1, *batch.shape[-4:])), "TCHW", (0.0, 1.0)
    for video in singles:
        if fps is None and not isinstance(video, (str, Path)) and getattr(video, "time", None) is None:
            raise VideoError("frames without a clock: pass fps= (frames a second), velocities need it")
    return singles, layout, value_range


def load_frames(video: Any, fps: float | None, layout: Any, value_range: Any) -> tuple[Float[Tensor, "T 3 H W"], float]:
    """One video's frames in canonical form and the time between them [s].

    Raises:
        VideoError: it cannot be read, is too short, or holds NaN.
    """
    if isinstance(video, (str, Path)):
        video = read_video(video)
    frames = as_video(getattr(video, "frames", video), layout=layout, value_range=value_range)
    if frames.dim() != 4:
        raise VideoError(f"one video has shape (T, 3, H, W), got {tuple(frames.shape)}")
    if len(frames) < MIN_FRAMES:
        raise VideoError(f"the video has {len(frames)} frames; at least {MIN_FRAMES} can be judged")
    bad = (~frames.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise VideoError(f"frames {', '.join(map(str, bad[:5]))}{' and more' * (len(bad) > 5)} hold NaN or infinity")
    time = frame_timestamps(video, fps, len(frames))
    return frames, (time[-1] - time[0]) / (len(time) - 1)


def split_initial_poses(q0: Any, count: int) -> list[Any]:
    """The first pose of each of so many videos, None where nobody told it.

    Raises:
        InputError: q0 holds poses for another number of videos.
    """
    if q0 is None:
        return [None] * count
    if isinstance(q0, (list, tuple)) and not (q0 and np.isscalar(q0[0])):
        starts = list(q0)
    else:
        array = q0 if isinstance(q0, Tensor) else np.asarray(q0, dtype=np.float64)
        if array.ndim == 1:
            return [array] * count
        starts = list(array)
    if len(starts) != count:
        raise InputError(f"q0 holds {len(starts)} poses for {count} videos")
    return starts
