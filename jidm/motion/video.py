"""Video files and folders of images: read whole, read as a bounded stream, write.

Decoding and encoding go through PyAV. Pictures leave as `(T, 3, H, W)` RGB, times as seconds from the container.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from jidm.errors import VideoError
from jidm.motion.layout import as_video

__all__ = ["Video", "VideoStream", "as_video", "open_video", "read_video", "write_video"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Video:
    """Decoded frames and when they were shown.

    Attributes:
        pixels: (T, 3, H, W) uint8 RGB (a quarter of the memory of `frames`).
        time: (T,) float64 presentation time [s], strictly increasing; None for images without a stated rate.
    """

    pixels: UInt8[Tensor, "T 3 H W"]
    time: Float[Tensor, " T"] | None

    @property
    def frames(self) -> Float[Tensor, "T 3 H W"]:
        """(T, 3, H, W) float32 RGB in [0, 1], made anew on each access."""
        return self.pixels.to(torch.float32) / 255.0

    @property
    def fps(self) -> float | None:
        """Mean frame rate [1/s]; None for one frame or without times."""
        if self.time is None or len(self) < 2:
            return None
        return (len(self) - 1) / float(self.time[-1] - self.time[0])

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def __getitem__(self, index: slice) -> Video:
        return Video(self.pixels[index], None if self.time is None else self.time[index])

    def resampled(self, fps: float) -> Video:
        """The frame nearest in time to each tick of a regular clock of `fps` [1/s], started at the first frame.

        Frames are chosen, never mixed: a blend of two pictures moves like neither. `time` is the clock's, so a
        moved frame is off by at most half the local frame distance.
        """
        if self.time is None:
            raise VideoError("images without a stated rate cannot be resampled: read them with fps=")
        return Video(*_resample_tensors(self.pixels, self.time, fps))


def _resample_tensors(pixels: Tensor, time: Tensor, fps: float) -> tuple[Tensor, Tensor]:
    _check_fps(fps)
    ticks = time[0] + torch.arange(int((time[-1] - time[0]) * fps + 1e-6) + 1, dtype=time.dtype) / fps
    after = torch.searchsorted(time, ticks).clamp(max=len(time) - 1)
    before = (after - 1).clamp(min=0)
    nearest = torch.where((time[after] - ticks) < (ticks - time[before]), after, before)
    return pixels[nearest], ticks


def _check_fps(fps: float) -> None:
    if not (np.isfinite(fps) and fps > 0):
        raise VideoError(f"fps={fps} must be a positive number of frames per second")


# ---- reading --------------------------------------------------------------------------------------------------------


class VideoStream:
    """Frames of one video, decoded as they are asked for; memory does not grow with length.

    Iterating gives `(3, H, W)` float32 RGB in [0, 1]; each iteration starts anew from the first frame.

    Attributes:
        path: the file or folder.
        length: number of frames the container declares; None when it does not (count while iterating).
        fps: nominal rate [1/s], None when unknown.
        height, width: picture size [px], rotation applied.
    """

    def __init__(self, path: str | Path, *, fps: float | None = None) -> None:
        if fps is not None:
            _check_fps(fps)
        self.path = Path(path)
        self._rate = fps
        if not self.path.exists():
            raise VideoError(f"{self.path}: no such file or folder")
        self._images = _image_files(self.path) if self.path.is_dir() else None
        self.length: int | None = None
        self.fps: float | None = fps
        if self._images is not None:
            self.length = len(self._images)
        else:
            with _open_container(self.path) as container:
                stream = container.streams.video[0]
                self.length = stream.frames or None
                rate = stream.average_rate or stream.guessed_rate
                self.fps = float(rate) if rate else None
        first = next(self.pixels())[1]
        self.height, self.width = first.shape[-2:]

    def __iter__(self) -> Iterator[Float[Tensor, "3 H W"]]:
        for _, pixels in self.pixels():
            yield pixels.to(torch.float32) / 255.0

    def pixels(self) -> Iterator[tuple[float | None, UInt8[Tensor, "3 H W"]]]:
        """Pairs of presentation time [s] (None for images without fps) and (3, H, W) uint8 RGB."""
        if self._images is not None:
            yield from _decode_images(self._images, self._rate)
        else:
            yield from _decode_container(self.path)


def open_video(path: str | Path, *, fps: float | None = None) -> VideoStream:
    """A stream over a video file or a folder of images, for videos that do not fit in memory.

    Args:
        fps: rate of a folder of images [1/s].

    Raises:
        VideoError: the file is missing, corrupt, truncated or holds no pictures.
    """
    return VideoStream(path, fps=fps)


def read_video(path: str | Path, *, fps: float | None = None, min_frames: int = 1) -> Video:
    """All frames of a video file or a folder of images (natural order of names).

    Args:
        fps: for a file, resample to this rate [1/s]; for a folder, the rate its images were taken at.
        min_frames: fewest frames accepted; motion needs 2.

    Raises:
        VideoError: the file is missing, corrupt, truncated, holds no pictures or fewer than min_frames.
    """
    stream = open_video(path, fps=fps if Path(path).is_dir() else None)
    times, frames = zip(*stream.pixels(), strict=True)
    if len(frames) < min_frames:
        raise VideoError(
            f"{path}: {len(frames)} frame(s), at least {min_frames} are needed: motion lies between frames"
        )
    known = [t for t in times if t is not None]
    time = torch.tensor(known, dtype=torch.float64) if len(known) == len(times) else None
    video = Video(torch.stack(frames), time)
    return video.resampled(fps) if fps is not None and not Path(path).is_dir() else video


def _open_container(path: Path) -> Any:
    import av

    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: not a readable video ({_reason(error)}); copy or encode it again") from None
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path}: holds no pictures, only {', '.join(s.type for s in container.streams) or 'nothing'}")
    return container


def _reason(error: Exception) -> str:
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error)).split(":")[0].lower()


def _decode_container(path: Path) -> Iterator[tuple[float, Tensor]]:
    import av

    count, last = 0, -np.inf
    with _open_container(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        declared, rate = stream.frames, stream.average_rate or stream.guessed_rate or Fraction(30)
        end = float(stream.duration * stream.time_base) if stream.duration else None
        start = float((stream.start_time or 0) * stream.time_base)
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise VideoError(f"{path}: frame {count} is damaged; copy or encode the file again")
                time = frame.time if frame.time is not None else count / float(rate)
                if time <= last:
                    raise VideoError(
                        f"{path}: frame {count} at {time:.6f} s does not follow {last:.6f} s; encode it again"
                    )
                count, last = count + 1, time
                yield time, _frame_pixels(frame)
        except av.error.FFmpegError as error:
            raise VideoError(
                f"{path}: broken after frame {count} ({_reason(error)}); copy or encode it again"
            ) from None
    if count == 0:
        raise VideoError(f"{path}: no frame could be decoded; copy or encode it again")
    # Both must fall short: an edit list alone may hide frames the container still counts.
    if count < declared and end is not None and last - start < end - 2.5 / float(rate):
        raise VideoError(f"{path}: truncated, {count} of {declared} frames are there; copy it again")


def _frame_pixels(frame: Any) -> Tensor:
    """(3, H, W) uint8 RGB, upright, composited over black."""
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
        array = ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        array = frame.to_ndarray(format="rgb24")
    if frame.rotation % 90 == 0 and frame.rotation:
        array = np.rot90(array, frame.rotation // 90)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _image_files(folder: Path) -> list[Path]:
    files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")]
    if not files:
        raise VideoError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")

    def natural(path: Path) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]

    return sorted(files, key=natural)


def _decode_images(files: list[Path], fps: float | None) -> Iterator[tuple[float | None, Tensor]]:
    import av

    size = None
    for index, file in enumerate(files):
        with _open_container(file) as container:
            try:
                pixels = _frame_pixels(next(container.decode(video=0)))
            except (av.error.FFmpegError, StopIteration):
                raise VideoError(f"{file}: not a readable image; save it again or take it out of the folder") from None
        size = size or pixels.shape
        if pixels.shape != size:
            raise VideoError(
                f"{file}: {pixels.shape[-1]}x{pixels.shape[-2]}, but {files[0].name} is {size[-1]}x{size[-2]}; "
                "all images of a folder must be of one size"
            )
        yield None if fps is None else index / fps, pixels


# ---- writing --------------------------------------------------------------------------------------------------------


def write_video(path: str | Path, frames: Any, fps: float, *, crf: int = 18) -> None:
    """Write RGB frames as h264 (yuv420p); the file appears whole or not at all.

    Args:
        path: where to; the suffix chooses the container (.mp4, .mkv, ...).
        frames: any video `as_video` understands without batch axes, or an iterator of frames, each (3, H, W) or
            (H, W, 3), uint8 or float in [0, 1]. Odd sizes are padded by one repeated row or column, because
            yuv420p has even sizes only. Non-finite pixels are written black.
        fps: frames per second.
        crf: quality of x264, 0 (lossless in yuv420p) to 51.

    Raises:
        VideoError: no frames, frames of different size, a value out of range, or a container PyAV cannot write.
    """
    import av

    _check_fps(fps)
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with av.open(str(temporary), "w") as container:
            _encode(container, _frames_to_write(frames), Fraction(fps).limit_denominator(100_000), crf)
        os.replace(temporary, path)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{path}: cannot write the video ({_reason(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _encode(container: Any, frames: Iterable[np.ndarray], rate: Fraction, crf: int) -> None:
    import av

    stream = None
    for frame in frames:
        if stream is None:
            stream = container.add_stream("libx264", rate=rate)
            stream.height, stream.width, stream.pix_fmt = frame.shape[0], frame.shape[1], "yuv420p"
            stream.options = {"crf": str(crf)}
            stream.codec_context.colorspace = (
                5  # swscale converts by BT.601 (bt470bg); say so, or HD players assume BT.709
            )
        if frame.shape[:2] != (stream.height, stream.width):
            raise VideoError(
                f"frames differ in size: {frame.shape[1]}x{frame.shape[0]} after {stream.width}x{stream.height}"
            )
        for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
            container.mux(packet)
    if stream is None:
        raise VideoError("there are no frames to write")
    for packet in stream.encode():
        container.mux(packet)


def _frames_to_write(frames: Any) -> Iterator[np.ndarray]:
    """Even-sized (H, W, 3) uint8, one at a time."""
    if isinstance(frames, (Tensor, np.ndarray, list, tuple, Video)):
        frames = as_video(frames)
        if frames.ndim != 4:
            raise VideoError(f"cannot write a batch of shape {tuple(frames.shape)} into one file; pass one video")
    for frame in frames:
        image = as_video([frame])[0].detach().nan_to_num(0.0)
        array = (image * 255.0).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        odd_height, odd_width = array.shape[0] % 2, array.shape[1] % 2
        yield np.ascontiguousarray(np.pad(array, ((0, odd_height), (0, odd_width), (0, 0)), mode="edge"))
