"""Joint positions read off frames as they come; what cannot be read is told, never raised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import VideoError
from jidm.video.layouts import as_video

if TYPE_CHECKING:
    from jidm.idm import JacobianIDM, MotionStream


@dataclass(frozen=True, eq=False)
class PoseMeasurement:
    """What one frame shows.

    Attributes:
        is_first: whether it is the first of a video: it shows where the robot is, no time passes until it.
        position, velocity: (n,) of the joints [rad or m, and per s]; None where the frame cannot be followed.
        problem: why it cannot.
    """

    is_first: bool
    position: NDArray[np.float64] | None = None
    velocity: NDArray[np.float64] | None = None
    problem: str = ""


class PoseTracker:
    """Follows the robot through one video after another.

    Args:
        idm: reads. video_rate: frames a second.
    """

    def __init__(self, idm: JacobianIDM, video_rate: float) -> None:
        self._idm, self._rate = idm, video_rate
        self.start_video()

    def start_video(self, q: NDArray[np.float64] | None = None) -> None:
        """The next frame is the first of a video.

        Args:
            q: (n,) joint positions it shows [rad or m]; read off the picture if not given.
        """
        self._stream: MotionStream | None = None
        self._q0, self._frame_index = q, 0

    @property
    def started(self) -> bool:
        """Whether a first frame was seen that shows the robot."""
        return self._stream is not None

    def measure(self, frames: Any, layout: str | None = None) -> list[PoseMeasurement]:
        """A reading of each frame, one at least.

        Args:
            frames: one or several, in any layout `as_video` takes. layout: as for `as_video`.
        """
        try:
            video = as_frames(frames, layout)
        except VideoError as error:
            return [PoseMeasurement(not self.started, problem=str(error))]
        return [self._measure(frame) for frame in video]

    def correct(self, q: NDArray[np.float64]) -> None:
        """What the robot itself says its joints were in the last frame (n,) [rad or m]."""
        if self._stream is not None:
            self._stream.correct(q)

    def _measure(self, frame: Float[Tensor, "3 H W"]) -> PoseMeasurement:
        number, self._frame_index = self._frame_index, self._frame_index + 1
        is_first = self._stream is None
        try:
            if self._stream is None:
                self._stream = self._idm.stream(frame, time=number / self._rate, q0=self._q0)
                position, velocity = self._stream.q, 0 * self._stream.q
            else:
                step = self._stream.push(frame, number / self._rate)
                if not step.accepted:
                    return PoseMeasurement(False, problem=f"frame {number} shows nothing that can be followed")
                position, velocity = step.position, step.delta_q * self._rate
        except Exception as error:  # whatever goes wrong with a picture, the robot is braked
            return PoseMeasurement(is_first, problem=f"frame {number}: {str(error) or type(error).__name__}")
        q, speed = position.double().cpu().numpy(), velocity.double().cpu().numpy()
        if not (np.isfinite(q).all() and np.isfinite(speed).all()):
            return PoseMeasurement(is_first, problem=f"frame {number} tells positions that are not finite")
        return PoseMeasurement(is_first, q, speed)


def as_frames(frames: Any, layout: str | None = None) -> Float[Tensor, "T 3 H W"]:
    """One frame or several, in any layout `as_video` takes.

    Raises:
        VideoError: they are none.
    """
    single = len(getattr(frames, "shape", ())) == 3 and not {"T", "F"} & set(layout or "")
    named = f"T{layout}" if single and layout is not None else layout
    video = as_video(frames[None] if single else frames, layout=named)
    if video.dim() != 4:
        raise VideoError(f"one video at a time: got frames of shape {tuple(video.shape)}")
    return video
