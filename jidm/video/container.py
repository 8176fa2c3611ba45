"""Video containers: the stream that is the video, not a cover picture, and its frames as a player shows them.

Every reader of video files opens them here, so that all of them show the same pictures.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jidm.errors import VideoError
from jidm.git_lfs import refuse_lfs_pointer

_SIZE_NOTE = re.compile(r"jidm size (?P<width>\d+)x(?P<height>\d+)")


def open_container(path: Path) -> Any:
    """An open container of PyAV that has a video, see `best_video_stream`.

    Raises:
        VideoError: the file is not readable, is a git-LFS pointer, or has no video.
    """
    import av

    refuse_lfs_pointer(path, VideoError)
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: not a readable video ({reason(error)}); copy or encode it again") from None
    if not _video_streams(container):
        kinds = ", ".join("cover picture" if stream.type == "video" else stream.type for stream in container.streams)
        container.close()
        raise VideoError(f"{path}: holds no images ({kinds or 'no stream at all'}); copy it again or pass another file")
    return container


def best_video_stream(container: Any) -> Any:
    """The stream that a player shows: FFmpeg's choice among the video streams, cover pictures and thumbnails apart."""
    streams = _video_streams(container)
    best = container.streams.best("video")
    return next((stream for stream in streams if best is not None and stream.index == best.index), streams[0])


def _video_streams(container: Any) -> list[Any]:
    """Video streams that are no cover picture and no thumbnails."""
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    return [stream for stream in container.streams.video if not stream.disposition & pictures]


class FramePixels:
    """RGB pixels of a file's decoded frames as a player shows them: turned and mirrored by the display matrix, over black.

    Args:
        container: of PyAV. Where it notes that the video was padded to even sizes, the repeated last row or column is cut
            off.
    """

    def __init__(self, container: Any) -> None:
        self._noted = noted_size(container)
        # Reading the matrix makes PyAV's frame refer to itself, so that its memory waits for the garbage collector. A file
        # has one matrix, or one for each angle.
        self._matrices: dict[int, np.ndarray | None] = {}

    def __call__(self, frame: Any) -> UInt8[np.ndarray, "H W 3"]:
        if any(component.is_alpha for component in frame.format.components):
            array = over_black(frame.to_ndarray(format="rgba"))
        else:
            array = frame.to_ndarray(format="rgb24")
        if frame.rotation not in self._matrices:
            self._matrices[frame.rotation] = _display_matrix(frame)
        array = _as_displayed(array, self._matrices[frame.rotation])
        noted = self._noted
        # A note may have been copied by another tool to a video of another size.
        if noted is not None and all(0 <= have - want <= 1 for have, want in zip(array.shape[:2], noted, strict=True)):
            array = array[: noted[0], : noted[1]]
        return np.ascontiguousarray(array)


def size_note(height: int, width: int) -> str:
    """Comment for the file of a video that was padded to even sizes."""
    return f"jidm size {width}x{height}"


def noted_size(container: Any) -> tuple[int, int] | None:
    """(height, width) before a video was padded to even sizes; None for other files."""
    comment = {key.lower(): value for key, value in container.metadata.items()}.get("comment", "")
    match = _SIZE_NOTE.fullmatch(comment)
    return (int(match["height"]), int(match["width"])) if match else None


def over_black(rgba: UInt8[np.ndarray, "H W 4"]) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels with transparency, composited over black."""
    wide = rgba.astype(np.uint16)
    return ((wide[..., :3] * wide[..., 3:] + 127) // 255).astype(np.uint8)


def _display_matrix(frame: Any) -> np.ndarray | None:
    """The upper left (2, 2) of the frame's display matrix, rows (a, b) and (c, d): x' = a x + c y, y' = b x + d y."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a kind that PyAV does not know, such as EXIF: only the angle can be read
        angle = np.deg2rad(frame.rotation)  # counterclockwise
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return None if data is None else np.frombuffer(bytes(data), np.int32)[:9].reshape(3, 3)[:2, :2].astype(np.float64)


def _as_displayed(image: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Apply the nearest of the eight symmetries of a rectangle; v points down before and after."""
    if matrix is None:
        return image
    (a, b), (c, d) = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, flip_u, flip_v = image.swapaxes(0, 1), c < 0, b < 0
    else:
        flip_u, flip_v = a < 0, d < 0
    return image[:: -1 if flip_v else 1, :: -1 if flip_u else 1]


def reason(error: Exception) -> str:
    """What FFmpeg says, without the number and the file."""
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error)).split(":")[0].lower()
