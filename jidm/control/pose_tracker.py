"""Joint positions measured in frames as they arrive. A frame that cannot be measured gives a reason, not an exception."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from jidm.control.limits import LARGEST_POSITION
from jidm.errors import Cancelled, JidmError, VideoError
from jidm.video.layouts import as_video

if TYPE_CHECKING:
    from jidm.estimation.tracker import TrackedStep
    from jidm.idm import JacobianIDM, MotionStream


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PoseMeasurement:
    """The pose measured in one frame.

    Attributes:
        is_first: whether this is the first frame of a video. It shows the initial pose; no time passes before it.
        position, velocity: (n,) of the joints [rad or m, and per s]; None if the frame could not be measured.
        problem: why it could not.
    """

    is_first: bool
    position: NDArray[np.float64] | None = None
    velocity: NDArray[np.float64] | None = None
    problem: str = ""


Observer = Callable[[Tensor, float, "MotionStream", "TrackedStep | None"], None]
"""Called with a frame (3, H, W), its time [s], the stream that tracks the video, and the step to the frame; None if it is the
first."""


class PoseTracker:
    """Tracks the robot through one video after another.

    Args:
        idm: decodes the joint positions.
        video_rate: frames per second.

    Attributes:
        observer: called for every frame that is tracked, in the thread that measures it; None for nobody.
        cancelled: set by any thread to end `measure` before its next frame, now and later.
    """

    def __init__(self, idm: JacobianIDM, video_rate: float) -> None:
        self._idm, self._rate = idm, video_rate
        self.observer: Observer | None = None
        self.cancelled = False
        self.start_video()

    def start_video(self, q: NDArray[np.float64] | None = None) -> None:
        """Expect the first frame of a new video.

        Args:
            q: (n,) joint positions in that frame [rad or m]; estimated from the frame if not given.
        """
        self._stream: MotionStream | None = None
        self._q0, self._frame_index = q, 0

    def measure(self, frames: Any, layout: str | None = None) -> list[PoseMeasurement]:
        """One measurement per frame, at least one.

        Args:
            frames: one or several, in any layout `as_video` takes.
            layout: as for `as_video`.

        Raises:
            Cancelled: `cancelled` was set.
        """
        try:
            video = as_frames(frames, layout)
        except VideoError as error:
            index, self._frame_index = self._frame_index, self._frame_index + 1  # it takes the time of a frame
            return [PoseMeasurement(index == 0, problem=str(error))]
        return [self._measure(frame) for frame in video]

    def correct(self, q: NDArray[np.float64]) -> None:
        """Replace the estimate for the last frame by the robot's own joint positions q (n,) [rad or m]."""
        if self._stream is not None:
            self._stream.correct(q)

    def _measure(self, frame: Float[Tensor, "3 H W"]) -> PoseMeasurement:
        if self.cancelled:
            raise Cancelled(f"stopped before frame {self._frame_index}")
        index, self._frame_index = self._frame_index, self._frame_index + 1
        is_first = index == 0
        try:
            if self._stream is None:  # so far no frame could be measured
                stream = self._idm.stream(frame, time=index / self._rate, q0=self._q0)
                if stream.agreement.unrelated:
                    return PoseMeasurement(is_first, problem=f"frame {index}: {stream.agreement.verdict}")
                self._stream = stream
                position, velocity = self._stream.q, 0 * self._stream.q
                self._observe(frame, index, None)
            else:
                step = self._stream.push(frame, index / self._rate)
                self._observe(frame, index, step)
                if not step.accepted:
                    return PoseMeasurement(is_first, problem=f"frame {index} shows nothing that can be tracked")
                if step.agreement.unrelated:
                    return PoseMeasurement(is_first, problem=f"frame {index}: {step.agreement.verdict}")
                if not step.valid:
                    return PoseMeasurement(is_first, problem=f"frame {index} does not follow from the one before")
                position, velocity = step.position, step.delta_q * self._rate
        except (Exception, SystemExit) as error:  # no frame may stop the control loop: the robot brakes instead
            reason = str(error) if isinstance(error, JidmError) else f"{type(error).__name__}: {error}".rstrip(": ")
            return PoseMeasurement(is_first, problem=f"frame {index}: {reason}")
        q, speed = (x.detach().double().cpu().numpy() for x in (position, velocity))
        if problem := self._find_problem(q, speed):
            return PoseMeasurement(is_first, problem=f"frame {index} gives {problem}")
        return PoseMeasurement(is_first, q, speed)

    def _find_problem(self, q: NDArray[np.float64], speed: NDArray[np.float64]) -> str:
        """Why this measurement cannot be used; empty if it can."""
        n = len(self._idm.joint_names)
        if q.shape != (n,) or speed.shape != (n,):
            return f"positions and velocities of shapes {q.shape} and {speed.shape}, not of {n} joints"
        if not (np.isfinite(q).all() and np.isfinite(speed).all()):
            return "positions that are not finite"
        if (largest := float(np.abs(q).max())) > LARGEST_POSITION:
            return f"a position of {largest:.3g}"
        return ""

    def _observe(self, frame: Tensor, index: int, step: TrackedStep | None) -> None:
        """Tell the observer; what it raises ends its observing, not the robot's motion."""
        if self.observer is None or self._stream is None:
            return
        try:
            self.observer(frame, index / self._rate, self._stream, step)
        except (Exception, SystemExit):
            _LOG.exception("the observer of the pose tracker failed and is not called again")
            self.observer = None


def as_frames(frames: Any, layout: str | None = None) -> Float[Tensor, "T 3 H W"]:
    """One frame or several, in any layout `as_video` takes.

    Raises:
        VideoError: they are not frames of one video.
    """
    single = len(getattr(frames, "shape", ())) == 3 and not {"T", "F"} & set(layout or "")
    full_layout = f"T{layout}" if single and layout is not None else layout
    video = as_video(frames[None] if single else frames, layout=full_layout)
    if video.dim() != 4:
        raise VideoError(f"one video at a time: got frames of shape {tuple(video.shape)}")
    return video
