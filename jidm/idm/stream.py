"""One robot followed through frames as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError, VideoError
from jidm.estimation.analytic_tracker import AnalyticTracker, TrackedStep
from jidm.estimation.learned_tracker import LearnedTracker
from jidm.flow import Flow, FlowSource


class MotionStream:
    """Follows a robot from frame to frame; memory does not grow, unless it remembers. Made by `JacobianIDM.stream`.

    Attributes:
        time: of the last frame [s].
    """

    def __init__(
        self, tracker: AnalyticTracker | LearnedTracker, first: Float[Tensor, "3 H W"], time: float,
        letterbox: Callable[[Tensor], Tensor], letterbox_flow: Callable[[Flow], Flow], flow: FlowSource,
    ) -> None:  # fmt: skip
        self.time = time
        self._tracker, self._letterbox, self._letterbox_flow, self._flow = tracker, letterbox, letterbox_flow, flow
        self._last_accepted, self._last_accepted_index, self._count = first, 0, 1

    @property
    def q(self) -> Float[Tensor, " n"]:
        """Joint positions in the last frame that was measured [rad or m]."""
        return self._tracker.q

    @property
    def position_covariance(self) -> Float[Tensor, "n n"]:
        """Of `q`."""
        return self._tracker.position_covariance

    def push(self, frame: Float[Tensor, "3 H W"], time: float) -> TrackedStep:
        """The step from the last frame to this one.

        Args:
            frame: RGB in [0, 1]; one that is not finite is left out, and its step is not valid.
            time: of the frame [s], later than the last one's.

        Raises:
            VideoError: the frame has another size than the first, or does not come after the last. Nothing is changed.
        """
        if frame.shape != self._last_accepted.shape:
            raise VideoError(
                f"frame {self._count} is {tuple(frame.shape)}, the first is {tuple(self._last_accepted.shape)}"
            )
        dt = time - self.time
        if not (math.isfinite(dt) and dt >= 0):
            raise VideoError(f"frame {self._count} is of {time} s, the one before of {self.time} s; time must go on")
        if not frame.isfinite().all():
            step = self._tracker.skip(dt)
        else:
            flows = self._flow.between(self._last_accepted, frame, self._last_accepted_index, self._count)
            step = self._tracker.step(self._letterbox(frame), dt, *map(self._letterbox_flow, flows))
        if step.accepted:
            self._last_accepted, self._last_accepted_index = frame, self._count
        self.time = time
        self._count += 1
        return step

    def correct(self, q: Sequence[float] | np.ndarray | Tensor, *, std: float = 1e-3) -> None:
        """Anchor to what the robot measured.

        Args:
            q: (n,) joint positions in the last frame [rad or m]. std: how well they are known [rad or m].

        Raises:
            InputError: they are not n finite numbers.
        """
        measurement = q if isinstance(q, Tensor) else torch.from_numpy(np.array(q, dtype=np.float64))
        if measurement.shape != self.q.shape or not measurement.isfinite().all():
            raise InputError(f"q must be {len(self.q)} finite joint positions, got {measurement.tolist()}")
        self._tracker.correct(measurement, std)

    def smooth(self, steps: Sequence[TrackedStep]) -> list[TrackedStep] | None:
        """All steps since the start, told by the frames after them as well; None where the field is not learned."""
        return self._tracker.smooth(steps) if isinstance(self._tracker, LearnedTracker) else None
