"""What all inverse dynamics models share when decoding video: frames with times, start poses, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError
from jidm.estimation.result import JointMotion, stack
from jidm.video.layouts import as_video
from jidm.video.timestamps import frame_timestamps, timestamped_stream


@dataclass(frozen=True, eq=False)
class FrameStream:
    """One video, frame by frame.

    Attributes:
        frames: (3, H, W) RGB in [0, 1].
        times: time of each frame [s]; each is to be taken after its frame.
        q0: (n,) joint positions in the first frame [rad or m]; None if not given.
    """

    frames: Iterator[Float[Tensor, "3 H W"]]
    times: Iterator[float]
    q0: Float[Tensor, " n"] | None


@dataclass(frozen=True, eq=False)
class VideoStreams:
    """The videos of one call of `decode`.

    Attributes:
        streams: one for each video of the batch.
        batch: leading axes of the video; empty for a single one.
        shape: of the whole array (*batch, T, 3, H, W); None for a file, which is not read yet.
    """

    streams: list[FrameStream]
    batch: torch.Size
    shape: torch.Size | None

    def stack(self, motions: list[JointMotion]) -> JointMotion:
        """The motions of the streams as one with the video's batch shape."""
        return stack(motions, self.batch) if self.batch else motions[0]


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
    progress: bool = False,
) -> VideoStreams:
    """A video of any form as streams of frames, each with its start pose.

    Args:
        video: path of a video or a folder of images (streamed), or frames in any layout `as_video` takes, with any
            batch shape.
        q0: from `check_q0`; its batch shape is broadcast to the video's.
        fps: frames a second; taken from the file or `video.time` where not given.
        layout, value_range: as for `as_video`.
        progress: show a progress bar per stream.

    Raises:
        VideoError: the video cannot be read, has one frame, or no frame rate is known.
        InputError: q0 does not fit the video's batch shape, or fps is not positive.
    """
    if isinstance(video, (str, Path)):
        if q0 is not None and q0.dim() != 1:
            raise InputError(f"q0 must be ({q0.shape[-1]},) for one file, got shape {tuple(q0.shape)}")
        frames, times, length = timestamped_stream(video, fps)
        stream = FrameStream(_with_progress(frames, length) if progress else frames, times, q0)
        return VideoStreams([stream], torch.Size(), None)
    tensor = as_video(getattr(video, "frames", video), layout=layout, value_range=value_range, min_frames=2)
    timestamps = frame_timestamps(video, fps, tensor.shape[-4])
    batch, clips = tensor.shape[:-4], tensor.reshape(-1, *tensor.shape[-4:])
    starts: list[Tensor | None] = [None] * len(clips)
    if q0 is not None:
        if not _is_broadcastable(q0.shape[:-1], batch):
            raise InputError(f"q0 of shape {tuple(q0.shape)} does not fit a video with batch shape {tuple(batch)}")
        starts = list(q0.expand(*batch, q0.shape[-1]).reshape(-1, q0.shape[-1]))
    streams = [
        FrameStream(_with_progress(iter(clip), len(clip)) if progress else iter(clip), iter(timestamps), start)
        for clip, start in zip(clips, starts, strict=True)
    ]
    return VideoStreams(streams, batch, tensor.shape)


def _is_broadcastable(shape: torch.Size, batch: torch.Size) -> bool:
    """Whether values of this batch shape serve a video of that one."""
    return len(shape) <= len(batch) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(batch)))


def _with_progress(frames: Iterator[Tensor], total: int | None) -> Iterator[Tensor]:
    from tqdm import tqdm

    return iter(tqdm(frames, total=total, desc="decode", unit="frame"))
