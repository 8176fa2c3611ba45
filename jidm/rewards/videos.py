"""Input of the reward: videos in any form, one at a time, with their frame rates and initial poses."""

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
from jidm.video.layouts import as_video, is_pipeline_output
from jidm.video.timestamps import frame_timestamps


def split_videos(
    videos: Any, fps: float | None, layout: str | None, value_range: tuple[float, float] | None
) -> tuple[Sequence[Any], str | None, tuple[float, float] | None]:
    """The single videos, not loaded yet, and the layout and value range to load them with.

    Args:
        videos: a path, a batch of frames in any layout `as_video` takes, the output of a diffusers pipeline, or a sequence
            of paths, videos, arrays or outputs.
        fps: frames per second, if given.
        layout, value_range: as for `as_video`.

    Raises:
        VideoError: frames without a frame rate, pictures in place of videos, or a batch that cannot be read.
    """
    if isinstance(videos, (str, Path)) or isinstance(getattr(videos, "pixels", None), Tensor):
        singles: Sequence[Any] = [videos]
    elif isinstance(videos, (list, tuple)) and not (videos and hasattr(videos[0], "getbands")):
        singles, layout = videos, None if layout is None else layout.upper().replace("B", "")
        if any(is_pipeline_output(video) for video in videos):
            clips = [_as_batch(video, layout, value_range) for video in videos]
            singles, layout, value_range = [clip for batch in clips for clip in batch], "TCHW", (0.0, 1.0)
    else:
        singles, layout, value_range = list(_as_batch(videos, layout, value_range)), "TCHW", (0.0, 1.0)
    for video in singles:
        if fps is None and not isinstance(video, (str, Path)) and getattr(video, "time", None) is None:
            raise VideoError("frames without a frame rate: pass fps= (frames per second)")
    return singles, layout, value_range


def _as_batch(videos: Any, layout: str | None, value_range: tuple[float, float] | None) -> Float[Tensor, "N T 3 H W"]:
    shape = getattr(videos, "shape", None)
    if layout is not None and "B" in layout.upper() and shape is not None and len(shape) < len(layout):
        raise VideoError(
            f"shape {tuple(shape)} has fewer axes than layout '{layout}': these are pictures, or one video; a batch of videos "
            "has an axis for the batch and one for time"
        )
    batch = as_video(videos, layout=layout, value_range=value_range)
    return batch.reshape(-1, *batch.shape[-4:])


def load_frames(video: Any, fps: float | None, layout: Any, value_range: Any) -> tuple[Float[Tensor, "T 3 H W"], float]:
    """One video's frames, RGB in [0, 1], and the time between them [s].

    Raises:
        VideoError: it cannot be read, is too short, or holds NaN.
    """
    if isinstance(video, (str, Path)):
        video = read_video(video)
    frames = as_video(video, layout=layout, value_range=value_range)
    if is_pipeline_output(video) and frames.dim() == 5 and len(frames) == 1:
        frames = frames[0]  # a pipeline gives a batch, also of one video
    if frames.dim() != 4:
        raise VideoError(f"one video must have shape (T, 3, H, W), got {tuple(frames.shape)}")
    if len(frames) < MIN_FRAMES:
        raise VideoError(f"the video has {len(frames)} frames; at least {MIN_FRAMES} are needed")
    bad = (~frames.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise VideoError(f"frames {', '.join(map(str, bad[:5]))}{' and more' * (len(bad) > 5)} hold NaN or infinity")
    time = frame_timestamps(video, fps, len(frames))
    return frames, (time[-1] - time[0]) / (len(time) - 1)


def split_initial_poses(q0: Any, count: int) -> list[Any]:
    """The initial pose of each of this many videos; None if it is not given.

    Args:
        q0: (n,) for all videos, or one per video.
        count: number of videos.

    Raises:
        InputError: q0 holds poses for another number of videos.
    """
    if q0 is None:
        return [None] * count
    if isinstance(q0, (list, tuple)) and not (q0 and np.isscalar(q0[0])):
        poses = list(q0)
    else:
        array = q0 if isinstance(q0, Tensor) else np.asarray(q0, dtype=np.float64)
        if array.ndim == 1:
            return [array] * count
        poses = list(array)
    if len(poses) != count:
        raise InputError(f"q0 holds {len(poses)} poses for {count} videos")
    return poses
