"""Streaming: one step per frame, measured from the last accepted frame."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError, VideoError
from jidm.estimation.agreement import Agreement
from jidm.estimation.analytic_measurement import AnalyticMeasurement
from jidm.estimation.learned_measurement import LearnedMeasurement
from jidm.estimation.tracker import TrackedStep, Tracker
from jidm.flow import FlowSource


class MotionStream:
    """Tracks a robot from frame to frame, without growing memory unless a history is kept; made by `JacobianIDM.stream`.

    Attributes:
        time: time of the last frame [s].
    """

    def __init__(
        self, tracker: Tracker, model: AnalyticMeasurement | LearnedMeasurement, first: Float[Tensor, "3 H W"],
        time: float, flow: FlowSource,
    ) -> None:  # fmt: skip
        self.time = time
        self._tracker, self._model, self._flow = tracker, model, flow
        self._last_accepted, self._last_accepted_index, self._count = first, 0, 1

    @property
    def q(self) -> Float[Tensor, " n"]:
        """Joint positions in the last accepted frame [rad or m]."""
        return self._tracker.q

    @property
    def position_covariance(self) -> Float[Tensor, "n n"]:
        """Covariance of `q`."""
        return self._tracker.position_covariance

    @property
    def agreement(self) -> Agreement:
        """Agreement of the frames so far with robot, camera and pose."""
        return self._model.agreement

    def push(self, frame: Float[Tensor, "3 H W"], time: float) -> TrackedStep:
        """The step from the last frame to this one.

        Args:
            frame: RGB in [0, 1]; if it is not finite, it is left out and its step is not valid.
            time: of the frame [s], not before the last one.

        Raises:
            VideoError: the frame has another size than the first or is earlier than the last. The stream is unchanged.
        """
        if frame.shape != self._last_accepted.shape:
            first = tuple(self._last_accepted.shape)
            raise VideoError(f"frame {self._count} is {tuple(frame.shape)}, the first is {first}")
        dt = time - self.time
        if not (math.isfinite(dt) and dt >= 0):
            raise VideoError(f"frame {self._count} is of {time} s, the one before of {self.time} s; time must go on")
        if not frame.isfinite().all():
            step = self._tracker.skip(dt)
        else:
            flows = self._flow.between(self._last_accepted, frame, self._last_accepted_index, self._count)
            step = self._tracker.step(self._model.letterbox(frame), dt, *map(self._model.letterbox_flow, flows))
        if step.accepted:
            self._last_accepted, self._last_accepted_index = frame, self._count
        self.time = time
        self._count += 1
        return step

    def correct(self, q: Sequence[float] | np.ndarray | Tensor, *, std: float = 1e-3) -> None:
        """Update with joint positions that the robot reported.

        Args:
            q: (n,) joint positions in the last frame [rad or m]. std: their standard deviation [rad or m].

        Raises:
            InputError: q does not have n finite elements.
        """
        measured = q if isinstance(q, Tensor) else torch.from_numpy(np.array(q, dtype=np.float64))
        if measured.shape != self.q.shape or not measured.isfinite().all():
            raise InputError(f"q must be {len(self.q)} finite joint positions, got {measured.tolist()}")
        self._tracker.correct(measured, std)

    def smooth(self, steps: Sequence[TrackedStep]) -> list[TrackedStep]:
        """Rauch-Tung-Striebel smoother: all steps since the start, given later frames as well; needs `keep_history`."""
        return self._tracker.smooth(steps)
