"""The images of an episode in an mp4 file: deterministic encoding, and decoding of the episode's own frames."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jidm.datasets import stats
from jidm.errors import DatasetError, VideoError
from jidm.video.container import FramePixels, best_video_stream, open_container
from jidm.video.io import encode_h264

NEAR_LOSSLESS_CRF = 3
"""Quality of x264 (crf) that does not affect the measurement of motion; at 12, small motions are damped."""

_X264_OPTIONS = {
    "crf": str(NEAR_LOSSLESS_CRF),
    "g": "8",  # key frame interval: single frames can be read after few decoded ones
    "bf": "0",
    # One thread: x264 splits its work by the number of threads, which changes the bytes.
    "threads": "1",
    # x264's macroblock tree gives different bytes for the same frames in one of about a hundred runs, even with one
    # thread. Without it, and without the lookahead that it and scene cut detection need, files are a fifth larger.
    "x264-params": "mbtree=0:rc-lookahead=0:scenecut=0",
}


@dataclass(frozen=True)
class VideoSegment:
    """The part of a video file that holds an episode's images.

    Attributes:
        path: the video file.
        start: time of the first image [s] in a file of several episodes; None if the file is the episode's own.
    """

    path: Path
    start: float | None = None


def encode(path: Path, frames: UInt8[np.ndarray, "T H W 3"], fps: float) -> None:
    """Write RGB frames as h264 (yuv420p); the same frames give the same bytes.

    Args:
        path: the file; an existing one is overwritten.
        frames: images of even H and W.
        fps: frame k is presented at k / fps.
    """
    import av

    with av.open(str(path), "w", format="mp4") as container:
        encode_h264(container, frames, Fraction(fps).limit_denominator(1001), _X264_OPTIONS)


def copy_segment(
    segment: VideoSegment, target: Path, count: int, fps: float
) -> tuple[bool, UInt8[np.ndarray, "S H W 3"]]:
    """Write an episode's images into a file of their own that begins at 0 s, without encoding them anew if that is possible.

    A file of several episodes can be cut where no image refers to one outside; this is tested by decoding.

    Args:
        segment: where the images lie.
        target: the mp4 file to write.
        count: number of images.
        fps: rate of the data set.

    Returns:
        Whether the coded images are unchanged, and the images that `image_stats` samples.

    Raises:
        DatasetError: the video is absent or damaged, or does not contain these images.
    """
    sampled, images = set(stats.sampled_frames(count)), []
    copied = _copy_packets(segment, target, count, fps)
    written = decode(VideoSegment(target, 0.0), count, fps) if copied else iter(())
    for k, image in enumerate(decode(segment, count, fps)):
        if k in sampled:
            images.append(image)
        if copied:
            try:
                copied = np.array_equal(image, next(written))
            except DatasetError:
                copied = False
    if not copied:
        encode(target, np.stack(list(decode(segment, count, fps))), fps)
    return copied, np.stack(images)


def _copy_packets(segment: VideoSegment, target: Path, count: int, fps: float) -> bool:
    """Copy the packets of `count` images; False if the images cannot be decoded from these alone."""
    import av

    start = segment.start
    with open_video_file(segment.path) as source:
        stream = best_video_stream(source)
        if start is not None and start > 0:
            source.seek(int(start / stream.time_base), stream=stream, backward=True)
        packets = []
        for packet in source.demux(stream):
            if packet.pts is None or packet.dts is None or not packet.size:
                continue
            time = float(packet.pts * stream.time_base)
            if start is None or start - 0.5 / fps < time < start + (count - 0.5) / fps:
                packets.append(packet)
            elif len(packets) >= count:
                break
            elif packets:
                return False  # another episode's image is coded between these
        if len(packets) != count or not packets[0].is_keyframe:
            return False
        first = min(packet.pts for packet in packets)
        if start is None and first == 0 and segment.path.suffix == target.suffix:
            shutil.copyfile(segment.path, target)
            return True
        try:
            with av.open(str(target), "w", format="mp4") as output:
                output.metadata.update(source.metadata)
                copy = output.add_stream_from_template(stream)
                for packet in packets:
                    packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, copy
                    output.mux(packet)
        except (av.error.FFmpegError, ValueError):
            return False  # a codec that mp4 does not hold
    return True


def decode(segment: VideoSegment, count: int, fps: float) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Exactly `count` RGB frames of an episode, in order.

    Args:
        segment: the part of the video file.
        count: number of frames.
        fps: rate of the data set; in a file of several episodes frame k is presented at start + k / fps.

    Raises:
        DatasetError: the file is absent or damaged, or does not contain these frames.
    """
    import av

    decoded = 0
    try:
        for time, image in _timed_frames(segment, count, fps):
            if segment.start is not None and abs(time - segment.start - decoded / fps) > 0.5 / fps:
                raise DatasetError(
                    f"{segment.path}: no image at {segment.start + decoded / fps:.4f} s, the next is at {time:.4f} s; "
                    f"correct the video or from_timestamp in meta/episodes"
                )
            yield image
            decoded += 1
            if decoded == count:
                return
    except (av.error.FFmpegError, OSError) as error:
        raise DatasetError(
            f"{segment.path}: broken after {decoded} of {count} images ({error}); copy it again"
        ) from None
    raise DatasetError(f"{segment.path}: holds {decoded} images, but the table has {count} rows; leave the episode out")


def _timed_frames(segment: VideoSegment, count: int, fps: float) -> Iterator[tuple[float, np.ndarray]]:
    """Times [s] and images, from the first of the episode."""
    with open_video_file(segment.path) as container:
        stream = best_video_stream(container)
        stream.thread_type, stream.codec_context.thread_count = "AUTO", 1
        if segment.start is None and stream.frames and stream.frames != count:
            raise DatasetError(
                f"{segment.path}: holds {stream.frames} images, but the table has {count} rows; leave the episode out"
            )
        earliest = -np.inf if segment.start is None else segment.start - 0.5 / fps
        if earliest > 0:
            container.seek(int(segment.start / stream.time_base), stream=stream, backward=True)
        pixels_of, size = FramePixels(container), None
        for frame in container.decode(stream):
            time = float(frame.pts * stream.time_base) if frame.pts is not None else 0.0
            if time >= earliest:
                image = pixels_of(frame)
                if image.shape != (size := size or image.shape):
                    raise DatasetError(f"{segment.path}: the image size changes at {time:.3f} s; encode it at one size")
                yield time, image


def open_video_file(path: Path) -> Any:
    """An open video container that has a video, see `jidm.video.container`.

    Raises:
        DatasetError: it is absent, damaged or a git-LFS pointer.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: this video is missing; copy the data set again, or remove the references to it")
    try:
        return open_container(path)
    except VideoError as error:
        raise DatasetError(str(error)) from None


def displayed_size(path: Path) -> tuple[int, int]:
    """(height, width) of a video's images as they are read: turned by the display matrix. Decodes one image.

    Raises:
        DatasetError: the file is absent, damaged or a git-LFS pointer.
    """
    import av

    with open_video_file(path) as container:
        stream = best_video_stream(container)
        try:
            height, width = FramePixels(container)(next(container.decode(stream))).shape[:2]
        except (av.error.FFmpegError, StopIteration):
            return int(stream.height), int(stream.width)  # damage inside is found where all images are decoded
        return height, width
