"""Frames prepared for decoding: turned upright, freed from lens distortion, reduced to a size that decodes quickly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from jidm.errors import VideoError
from jidm.video.letterbox import scaled_size

MAX_SIZE = 1280
"""Longer side [px] above which decoding reduces frames, if nothing else is said."""

ROTATIONS = (90, 180, 270)
"""Clockwise turns [degrees]."""


@runtime_checkable  # so that annotations can be checked in tests
class FrameSource(Protocol):
    """What a `VideoStream` and a `PreparedVideo` have in common."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def length(self) -> int | None:
        """Number of frames, if the file declares it."""
        ...

    @property
    def fps(self) -> float | None:
        """Nominal rate [1/s]; None if unknown."""
        ...

    @property
    def height(self) -> int:
        """Of the frames [px]."""
        ...

    @property
    def width(self) -> int:
        """Of the frames [px]."""
        ...

    def pixels(self) -> Iterator[tuple[float | None, UInt8[Tensor, "3 H W"]]]:
        """Pairs of presentation time [s] and frame, from the first one on."""
        ...

    def __iter__(self) -> Iterator[Float[Tensor, "3 H W"]]: ...


@dataclass(frozen=True, eq=False)
class PreparedVideo:
    """A video whose frames are changed one by one while they are read; made by the functions below.

    Attributes:
        source: the video.
        height, width: of the changed frames [px].
        change: of one frame.
    """

    source: FrameSource
    height: int
    width: int
    change: Callable[[Tensor], Tensor]

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.source.path

    @property
    def length(self) -> int | None:
        """Number of frames, if the file declares it."""
        return self.source.length

    @property
    def fps(self) -> float | None:
        """Nominal rate [1/s]; None if unknown."""
        return self.source.fps

    def pixels(self) -> Iterator[tuple[float | None, UInt8[Tensor, "3 H W"]]]:
        """Pairs of presentation time [s] (None for images without fps) and (3, H, W) uint8 RGB."""
        for time, frame in self.source.pixels():
            yield time, self.change(frame)

    def __iter__(self) -> Iterator[Float[Tensor, "3 H W"]]:
        for _, frame in self.pixels():
            yield frame.to(torch.float32) / 255.0


def rotated(video: FrameSource, degrees: int) -> FrameSource:
    """The video turned clockwise, for cameras that lay on their side.

    Args:
        video: any stream.
        degrees: 0, 90, 180 or 270.

    Raises:
        VideoError: another angle.
    """
    if degrees == 0:
        return video
    if degrees not in ROTATIONS:
        raise VideoError(f"a video is rotated by 90, 180 or 270 degrees, not by {degrees}")
    size = (video.height, video.width) if degrees == 180 else (video.width, video.height)
    # torch.rot90 from the row axis to the column axis is counterclockwise.
    return PreparedVideo(video, *size, lambda frame: torch.rot90(frame, -degrees // 90, (-2, -1)).contiguous())


def undistorted(video: FrameSource, K: Float[Tensor, "3 3"], distortion: Sequence[float]) -> FrameSource:
    """The video as a pinhole camera with the same intrinsics sees it; what that camera sees beyond the lens is black.

    Args:
        video: any stream.
        K: intrinsics of the camera in pixels of the video.
        distortion: k1, k2, p1, p2 and optionally k3 of OpenCV's model.

    Raises:
        VideoError: not four or five finite coefficients.
    """
    coefficients = np.array(distortion, dtype=np.float64)
    if coefficients.shape not in ((4,), (5,)) or not np.isfinite(coefficients).all():
        raise VideoError(f"lens distortion is k1 k2 p1 p2 or k1 k2 p1 p2 k3, got {list(distortion)}")
    import cv2

    matrix = K.detach().cpu().double().numpy()
    size = (video.width, video.height)
    map_u, map_v = cv2.initUndistortRectifyMap(matrix, coefficients, np.eye(3), matrix, size, cv2.CV_32FC1)

    def change(frame: Tensor) -> Tensor:
        image = cv2.remap(_to_image(frame), map_u, map_v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        return _from_image(image)

    return PreparedVideo(video, video.height, video.width, change)


def reduced(video: FrameSource, max_size: int) -> FrameSource:
    """The video at `reduced_size`, each pixel the mean of the area that it covers."""
    height, width = reduced_size(video.height, video.width, max_size)
    if (height, width) == (video.height, video.width):
        return video
    return PreparedVideo(video, height, width, lambda frame: area_average(frame, height, width))


def reduced_size(height: int, width: int, max_size: int) -> tuple[int, int]:
    """(height, width) with a longer side of at most `max_size` [px] and the same shape; 0 keeps every size.

    Raises:
        VideoError: max_size is negative.
    """
    if max_size < 0:
        raise VideoError(f"max_size must be a number of pixels, or 0 for full size; got {max_size}")
    return scaled_size(height, width, max_side=max_size, multiple=1) if max_size else (height, width)


def area_average(frame: Shaped[Tensor, "3 H W"], height: int, width: int) -> Shaped[Tensor, "3 {height} {width}"]:
    """A smaller image whose pixels are the means of the areas that they cover.

    Args:
        frame: uint8, float32 or float64. A pixel that is not finite spoils those that it is part of.
        height, width: of the result, not larger than the frame.
    """
    import cv2

    small = cv2.resize(_to_image(frame), (width, height), interpolation=cv2.INTER_AREA)
    return _from_image(small).to(frame.device)


def _to_image(frame: Tensor) -> np.ndarray:
    return np.ascontiguousarray(frame.detach().cpu().permute(1, 2, 0).numpy())


def _from_image(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
