"""The pictures of an episode: frames into an mp4, and an episode's own frames out of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jidm.errors import DatasetError

NEAR_LOSSLESS_CRF = 3
"""Quality of x264 (crf) as good as without loss for measuring motion; at 12 pictures hold small motions back."""

_BT601 = 5  # AVCOL_SPC_BT470BG: what swscale converts to; unsaid, players assume BT.709 for HD
_KEY_FRAME_INTERVAL = 8  # distance of key frames: readers that want single frames need not decode far

# x264's macroblock tree gives other bytes for the same frames every hundredth time or so, even with one thread. Without
# it, and without the look ahead that it and the search for scene cuts rest on, files are a fifth larger.
_DETERMINISTIC_X264 = "mbtree=0:rc-lookahead=0:scenecut=0"


@dataclass(frozen=True)
class VideoSegment:
    """Where an episode's pictures lie.

    Attributes:
        path: the video file.
        start: time of the first picture [s] in a file of several episodes; None if the file is the episode's own.
    """

    path: Path
    start: float | None = None


def encode(path: Path, frames: UInt8[np.ndarray, "T H W 3"], fps: float, *, crf: int = NEAR_LOSSLESS_CRF) -> None:
    """Write RGB frames as h264 (yuv420p); the same frames give the same bytes.

    Args:
        path: where to; any existing file is overwritten.
        frames: even H and W.
        fps: frame k is shown at k / fps.
        crf: quality of x264, 0 (finest) to 51.
    """
    import av

    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        # One thread: x264 splits its work by the number of threads, and the bytes with it.
        stream.options = {
            "crf": str(crf),
            "g": str(_KEY_FRAME_INTERVAL),
            "bf": "0",
            "threads": "1",
            "x264-params": _DETERMINISTIC_X264,
        }
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = 1 / rate
        stream.codec_context.colorspace = _BT601
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = k, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decode(segment: VideoSegment, count: int, fps: float, *, threads: int = 1) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Exactly `count` RGB frames of an episode, in order.

    Args:
        fps: rate of the data set; in a file of several episodes frame k is the one shown at start + k / fps.
        threads: of the decoder; 0 lets it choose.

    Raises:
        DatasetError: the file is absent or damaged, or does not hold these frames.
    """
    import av

    decoded = 0
    try:
        for time, image in _timed_frames(segment, count, fps, threads):
            if segment.start is not None and abs(time - segment.start - decoded / fps) > 0.5 / fps:
                raise DatasetError(
                    f"{segment.path}: no picture at {segment.start + decoded / fps:.4f} s, the next is at {time:.4f} s; "
                    f"mend the video or from_timestamp in meta/episodes"
                )
            yield image
            decoded += 1
            if decoded == count:
                return
    except (av.error.FFmpegError, OSError) as error:
        raise DatasetError(
            f"{segment.path}: broken after {decoded} of {count} pictures ({error}); copy it again"
        ) from None
    raise DatasetError(
        f"{segment.path}: holds {decoded} pictures where the table has {count} rows; leave the episode out"
    )


def _timed_frames(segment: VideoSegment, count: int, fps: float, threads: int) -> Iterator[tuple[float, np.ndarray]]:
    """Times [s] and pictures from the episode's first on."""
    with open_video_file(segment.path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        if segment.start is None and stream.frames and stream.frames != count:
            raise DatasetError(
                f"{segment.path}: holds {stream.frames} pictures where the table has {count} rows; leave the episode out"
            )
        earliest = -np.inf if segment.start is None else segment.start - 0.5 / fps
        if earliest > 0:
            container.seek(int(segment.start / stream.time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            time = float(frame.pts * stream.time_base) if frame.pts is not None else 0.0
            if time >= earliest:
                yield time, frame.to_ndarray(format="rgb24")


def open_video_file(path: Path) -> Any:
    """An open video container with at least one video stream.

    Raises:
        DatasetError: it is absent or damaged.
    """
    import av

    if not path.is_file():
        raise DatasetError(f"{path}: this video is missing; copy the data set again, or take out what refers to it")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise DatasetError(f"{path}: not a readable video ({error}); copy it again") from None
    if not container.streams.video:
        container.close()
        raise DatasetError(f"{path}: holds no pictures; copy it again")
    return container
