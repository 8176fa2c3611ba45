"""Video files and folders of images: read completely, read as a stream of bounded memory, write.

Videos are decoded and encoded by PyAV, images by Pillow. Frames are returned as `(T, 3, H, W)` RGB, with the presentation times [s] of the
container. Missing frames and frames that the codec marks as corrupt are refused. Damage that decodes without a mark
cannot be detected here; it appears as motion that no joint explains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from jidm.atomic_io import atomic_write
from jidm.errors import VideoError
from jidm.video.container import FramePixels, best_video_stream, open_container, reason, size_note
from jidm.video.image_file import read_image
from jidm.video.image_folder import image_files
from jidm.video.layouts import as_video

_BT601 = 5  # AVCOL_SPC_BT470BG
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif")


def list_videos(folder: Path) -> list[Path]:
    """The video files in a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)


@dataclass(frozen=True, eq=False)
class Video:
    """Decoded frames and their presentation times.

    Attributes:
        pixels: (T, 3, H, W) uint8 RGB (a quarter of the memory of `frames`).
        time: (T,) float64 presentation time [s], strictly increasing; None for images without a stated rate.
    """

    pixels: UInt8[Tensor, "T 3 H W"]
    time: Float[Tensor, " T"] | None

    @property
    def frames(self) -> Float[Tensor, "T 3 H W"]:
        """(T, 3, H, W) float32 RGB in [0, 1], converted on each access."""
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


def _resample(frames: Iterable[tuple[float, Tensor]], fps: float) -> Iterator[tuple[float, Tensor]]:
    """The frame nearest in time to each tick of a regular clock that starts at the first frame; one frame in memory.

    Frames are selected, never blended: a blend of two frames shows the motion of neither. Times are those of the clock,
    so they deviate from a frame's own by at most half the local frame interval.
    """
    start, count, last = 0.0, 0, None
    for time, pixels in frames:
        start = time if last is None else start
        while last is not None and (tick := start + count / fps) < (last[0] + time) / 2:
            yield tick, last[1]
            count += 1
        last = (time, pixels)
    while last is not None and (tick := start + count / fps) <= last[0] + 1e-6:
        yield tick, last[1]
        count += 1


def _check_fps(fps: float) -> None:
    if not (np.isfinite(fps) and fps > 0):
        raise VideoError(f"fps={fps} must be a positive number of frames per second")


# ---- reading --------------------------------------------------------------------------------------------------------


class VideoStream:
    """Frames of one video, decoded on demand; memory does not grow with length.

    Iteration yields `(3, H, W)` float32 RGB in [0, 1]; each iteration starts again at the first frame.

    Attributes:
        path: the file or folder.
        length: number of frames the container declares (edit lists may hide a few); None if it declares none or the
            stream is resampled.
        fps: nominal rate [1/s]; None if unknown.
        height, width: image size [px] as shown, turned by the file's display matrix.
    """

    def __init__(self, path: str | Path, *, fps: float | None = None) -> None:
        if fps is not None:
            _check_fps(fps)
        self.path = Path(path)
        self._requested_fps = fps
        if not self.path.exists():
            raise VideoError(f"{self.path}: no such file or folder")
        self._images = image_files(self.path) if self.path.is_dir() else None
        self.length: int | None = None
        self.fps: float | None = fps
        if self._images is not None:
            self.length = len(self._images)
        elif fps is None:
            with open_container(self.path) as container:
                stream = best_video_stream(container)
                self.length = stream.frames or None
                rate = stream.average_rate or stream.guessed_rate
                self.fps = float(rate) if rate else None
        first = next(self.pixels())[1]
        self.height, self.width = int(first.shape[-2]), int(first.shape[-1])

    def __iter__(self) -> Iterator[Float[Tensor, "3 H W"]]:
        for _, pixels in self.pixels():
            yield pixels.to(torch.float32) / 255.0

    def pixels(self, *, start: float | None = None) -> Iterator[tuple[float | None, UInt8[Tensor, "3 H W"]]]:
        """Pairs of presentation time [s] (None for images without fps) and (3, H, W) uint8 RGB.

        Args:
            start: frames before this time [s] are left out; decoding of a file starts at the key frame before it.
        """
        if self._images is not None:
            pairs = _decode_images(self._images, self._requested_fps)
            return pairs if start is None else (pair for pair in pairs if pair[0] is None or pair[0] >= start)
        frames = _decode_container(self.path, start)
        return frames if self._requested_fps is None else _resample(frames, self._requested_fps)


def open_video(path: str | Path, *, fps: float | None = None) -> VideoStream:
    """A stream over a video file or a folder of images, for videos that do not fit in memory.

    Args:
        path: the file or folder.
        fps: of a file, the rate [1/s] to resample to: each tick takes the frame nearest in time. Of a folder of images
            (in natural order of names), the rate at which they were taken.

    Raises:
        VideoError: the file is missing, corrupt, truncated or holds no images, or the order of images is ambiguous.
    """
    return VideoStream(path, fps=fps)


def read_video(path: str | Path, *, fps: float | None = None, max_bytes: int = 4 * 2**30) -> Video:
    """All frames of a video file or a folder of images.

    Args:
        path, fps: as for `open_video`.
        max_bytes: upper bound of the memory of the pixels; read longer videos by `open_video`.

    Raises:
        VideoError: the file is missing, corrupt, truncated, too long or holds no images.
    """
    times, frames, size = [], [], 0
    for time, pixels in open_video(path, fps=fps).pixels():
        times.append(time)
        frames.append(pixels)
        size += pixels.nbytes
        if size > max_bytes:
            raise VideoError(
                f"{path}: more than {max_bytes / 2**20:.0f} MiB of pixels; "
                "stream it with open_video or raise max_bytes="
            )
    known = [t for t in times if t is not None]
    time_axis = torch.tensor(known, dtype=torch.float64) if len(known) == len(times) else None
    return Video(torch.stack(frames), time_axis)


def _decode_container(path: Path, start: float | None = None) -> Iterator[tuple[float, Tensor]]:
    import av

    count, last, size = 0, -np.inf, None
    with open_container(path) as container:
        stream = best_video_stream(container)
        stream.thread_type = "AUTO"
        declared, rate = stream.frames, float(stream.average_rate or stream.guessed_rate or 30)
        origin = float((stream.start_time or 0) * stream.time_base)
        end = origin + float(stream.duration * stream.time_base) if stream.duration else None
        pixels_of = FramePixels(container)
        try:
            if start is not None:
                container.seek(max(0, int(start / stream.time_base)), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise VideoError(f"{path}: damaged or cut off after frame {count}; copy or encode the file again")
                time = frame.time if frame.time is not None else origin + count / rate
                if time <= last:
                    raise VideoError(
                        f"{path}: frame {count} at {time:.6f} s does not follow {last:.6f} s; encode it again"
                    )
                count, last = count + 1, time
                if start is not None and time < start - 1e-6:
                    continue
                pixels = _channels_first(pixels_of(frame))
                size = size or pixels.shape
                if pixels.shape != size:
                    raise VideoError(f"{path}: the image size changes at {time:.3f} s; encode it again at one size")
                yield time, pixels
        except av.error.FFmpegError as error:
            raise VideoError(f"{path}: broken after frame {count} ({reason(error)}); copy or encode it again") from None
    if count == 0:
        raise VideoError(f"{path}: no frame could be decoded; copy or encode it again")
    # Both must fall short: an edit list hides frames that the container counts, and a last frame may last long.
    if start is None and count < declared and end is not None and last < end - 1.5 / rate:
        raise VideoError(f"{path}: truncated, {count} of {declared} frames are there; copy it again")


def _decode_images(files: list[Path], fps: float | None) -> Iterator[tuple[float | None, Tensor]]:
    size = None
    for index, file in enumerate(files):
        pixels = _channels_first(read_image(file, str(file)))
        size = size or pixels.shape
        if pixels.shape != size:
            raise VideoError(
                f"{file}: {pixels.shape[-1]}x{pixels.shape[-2]}, but {files[0].name} is {size[-1]}x{size[-2]}; "
                "all images of a folder must be of one size"
            )
        yield None if fps is None else index / fps, pixels


def _channels_first(image: np.ndarray) -> Tensor:
    """(3, H, W) of (H, W, 3)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


# ---- writing --------------------------------------------------------------------------------------------------------


def write_video(path: str | Path, frames: Any, fps: float, *, crf: int = 18, layout: str | None = None) -> None:
    """Write RGB frames as h264 (yuv420p), atomically.

    yuv420p has even sizes only: an odd size is padded by one repeated row or column and noted in the file, so that
    `read_video` returns the original size.

    Args:
        path: the file; its suffix selects the container (.mp4, .mkv, ...).
        frames: any video without batch axes that `as_video` accepts, or an iterator of frames, each (3, H, W) or
            (H, W, 3) uint8, float in [0, 1], or PIL. Non-finite pixels are written black.
        fps: frames per second.
        crf: quality of x264, 0 (best) to 51.
        layout: of a tensor or array whose layout `as_video` cannot infer.

    Raises:
        InputError: the folder does not exist.
        VideoError: no frames, frames of different size, a value out of range, or a path that cannot be written.
    """
    import av

    _check_fps(fps)
    try:
        with atomic_write(path) as temporary, _create_container(temporary, Path(path)) as container:
            rate = Fraction(fps).limit_denominator(1001)
            encode_h264(container, _frames_to_write(frames, layout), rate, {"crf": str(crf)})
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{path}: writing failed ({reason(error)}); check the space on the disk and the suffix"
        ) from None


def _create_container(temporary: Path, path: Path) -> Any:
    import av

    try:
        return av.open(str(temporary), "w")
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise VideoError(
            f"{path}: cannot be written ({reason(error)}); use a suffix like .mp4 and a folder that can be written"
        ) from None


def encode_h264(container: Any, frames: Iterable[np.ndarray], rate: Fraction, options: Mapping[str, str]) -> None:
    """Encode (H, W, 3) uint8 RGB frames of one size into an open output container of PyAV, as h264 (yuv420p).

    Args:
        container: the output.
        frames: the frames; odd sizes are padded and noted in the container's comment.
        rate: frames per second.
        options: of x264; `threads` also limits the threads of the codec.

    Raises:
        VideoError: there are no frames, or they differ in size.
    """
    import av

    stream, size = None, (0, 0)
    for index, image in enumerate(frames):
        if stream is None:
            size = image.shape[:2]
            stream = container.add_stream("libx264", rate=rate)
            stream.height, stream.width, stream.pix_fmt = size[0] + size[0] % 2, size[1] + size[1] % 2, "yuv420p"
            stream.options = dict(options)
            if "threads" in options:
                stream.codec_context.thread_count = int(options["threads"])
            stream.codec_context.time_base = 1 / rate
            # The matrix of swscale's conversion; without this tag players assume BT.709 for HD.
            stream.codec_context.colorspace = _BT601
            if size != (stream.height, stream.width):
                container.metadata["comment"] = size_note(*size)
        if image.shape[:2] != size:
            raise VideoError(f"frames differ in size: {image.shape[1]}x{image.shape[0]} after {size[1]}x{size[0]}")
        padded = np.pad(image, ((0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
        frame.pts, frame.time_base = index, 1 / rate
        container.mux(stream.encode(frame))
    if stream is None:
        raise VideoError("there are no frames to write")
    container.mux(stream.encode())


def _frames_to_write(frames: Any, layout: str | None) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8, one at a time."""
    if isinstance(frames, Video):
        frames, layout = frames.pixels, "TCHW"
    elif isinstance(frames, (Tensor, np.ndarray, list, tuple)):
        frames = as_video(frames, layout=layout)
        if frames.ndim != 4:
            raise VideoError(f"cannot write a batch of shape {tuple(frames.shape)} into one file; pass one video")
        layout = "TCHW"
    for frame in frames:
        if isinstance(frame, Tensor):
            is_float = frame.is_floating_point()
        else:
            is_float = isinstance(frame, np.ndarray) and frame.dtype.kind == "f"
        value_range = (0.0, 1.0) if is_float else None
        image = as_video([frame], layout=layout, value_range=value_range)[0].detach().nan_to_num(0.0)
        yield (image * 255.0).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
