"""Any form of video as streams of timed frames, each with the pose that it starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError
from jidm.estimation.result import JointMotion, stack
from jidm.video.io import VideoStream
from jidm.video.layouts import as_video
from jidm.video.preparation import PreparedVideo, area_average, reduced_size
from jidm.video.timestamps import TimedFrame, frame_timestamps, open_source, timed_frames


@dataclass(frozen=True, eq=False)
class FrameStream:
    """One video, frame by frame.

    Attributes:
        frames: timestamp and image of each.
        q0: (n,) joint positions in the first frame [rad or m]; None if not given.
    """

    frames: Iterator[TimedFrame]
    q0: Float[Tensor, " n"] | None


@dataclass(frozen=True, eq=False)
class StreamBatch:
    """The streams of one call of `decode`.

    Attributes:
        streams: one for each video of the batch.
        batch: leading axes of the video; empty for a single one.
        shape: of the whole array (*batch, T, 3, H, W); None for a file, which is not read yet.
        video_size: (height, width) of the video [px].
        frame_size: (height, width) of the streams' frames [px].
    """

    streams: list[FrameStream]
    batch: torch.Size
    shape: torch.Size | None
    video_size: tuple[int, int]
    frame_size: tuple[int, int]

    def stack(self, motions: list[JointMotion]) -> JointMotion:
        """The motions of the streams as one with the video's batch shape; its provenance states the sizes."""
        motion = stack(motions, self.batch) if self.batch else motions[0]
        sizes = {"video_size": list(self.video_size[::-1]), "frame_size": list(self.frame_size[::-1])}
        return replace(motion, provenance={**motion.provenance, **sizes})


def check_q0(
    q0: Sequence[float] | np.ndarray | Tensor | None, joint_names: Sequence[str]
) -> Float[Tensor, "*batch n"] | None:
    """Joint positions of first frames as a tensor [rad or m]; float64 unless they were one. None if not given.

    Raises:
        InputError: they are not n finite numbers in the last axis.
    """
    if q0 is None:
        return None
    start = q0 if isinstance(q0, Tensor) else torch.from_numpy(np.array(q0, dtype=np.float64))
    if start.shape[-1:] != (len(joint_names),):
        raise InputError(
            f"q0 must hold {len(joint_names)} joints ({', '.join(joint_names)}), got shape {tuple(start.shape)}"
        )
    if not start.isfinite().all():
        raise InputError("q0 holds NaN or infinity; give the joint positions of the first frame")
    return start


def open_streams(
    video: Any,
    q0: Float[Tensor, "*batch n"] | None = None,
    *,
    fps: float | None = None,
    layout: str | None = None,
    value_range: tuple[float, float] | None = None,
    max_size: int = 0,
    progress: bool = False,
) -> StreamBatch:
    """A video of any form as streams, each with its start pose.

    Args:
        video: path of a video or a folder of images, or a stream over one, or frames in any layout `as_video` takes, with
            any batch shape.
        q0: from `check_q0`; its batch shape is broadcast to the video's.
        fps: frames a second; taken from the file or `video.time` where not given.
        layout, value_range: as for `as_video`.
        max_size: longer side above which frames are reduced [px]; 0 keeps every size.
        progress: show a progress bar per stream.

    Raises:
        VideoError: the video cannot be read, has one frame, or no frame rate is known.
        InputError: q0 does not fit the video's batch shape, or fps is not positive.
    """
    from tqdm import tqdm

    def show(frames: Iterator[TimedFrame], total: int | None) -> Iterator[TimedFrame]:
        return iter(tqdm(frames, total=total, desc="decode", unit="frame", disable=not progress))

    def reduce(frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
        return frames if size == full else ((time, area_average(frame, *size)) for time, frame in frames)

    if isinstance(video, (str, Path, VideoStream, PreparedVideo)):
        if q0 is not None and q0.dim() != 1:
            raise InputError(f"q0 must be ({q0.shape[-1]},) for one file, got shape {tuple(q0.shape)}")
        source = open_source(video, fps)
        full = (source.height, source.width)
        size = reduced_size(*full, max_size)
        frames = show(reduce(timed_frames(source, fps)), source.length)
        return StreamBatch([FrameStream(frames, q0)], torch.Size(), None, full, size)
    tensor = as_video(video, layout=layout, value_range=value_range, min_frames=2)
    full = (tensor.shape[-2], tensor.shape[-1])
    size = reduced_size(*full, max_size)
    timestamps = frame_timestamps(video, fps, tensor.shape[-4])
    batch, clips = tensor.shape[:-4], tensor.reshape(-1, *tensor.shape[-4:])
    starts: list[Tensor | None] = [None] * len(clips)
    if q0 is not None:
        if not _is_broadcastable(q0.shape[:-1], batch):
            raise InputError(f"q0 of shape {tuple(q0.shape)} does not fit a video with batch shape {tuple(batch)}")
        starts = list(q0.expand(*batch, q0.shape[-1]).reshape(-1, q0.shape[-1]))
    streams = [
        FrameStream(show(reduce(zip(timestamps, clip, strict=True)), tensor.shape[-4]), start)
        for clip, start in zip(clips, starts, strict=True)
    ]
    return StreamBatch(streams, batch, tensor.shape, full, size)


def _is_broadcastable(shape: torch.Size, batch: torch.Size) -> bool:
    """Whether values of this batch shape serve a video of that one."""
    return len(shape) <= len(batch) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(batch)))
