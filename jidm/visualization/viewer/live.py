"""A run that grows while a robot is tracked: what a server decodes, for the viewer beside it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.step_columns import StepColumns
from jidm.fields.free import LearnedField
from jidm.flow import DisFlow
from jidm.visualization.viewer.viewed_run import ViewedRun, recorded_motion, reduced

if TYPE_CHECKING:
    from jidm.estimation.tracker import TrackedStep
    from jidm.idm import JacobianIDM, MotionStream

_MAX_FRAMES = 600
"""Frames that are kept; then the older half is forgotten."""

Version = tuple[int, int]
"""Number of the video, which changes when frames were forgotten, too, and number of frames."""


class LiveFeed:
    """Collects frames and steps from tracking threads, for one viewer. If several videos are tracked, the one that started
    last is shown.

    Args:
        idm: the decoder.
        title: one line."""

    def __init__(self, idm: JacobianIDM, title: str) -> None:
        self._idm, self._title = idm, title
        self._lock = threading.Lock()
        self._stream: MotionStream | None = None
        self._frames: list[Tensor] = []
        self._times: list[float] = []
        self._steps: list[TrackedStep] = []
        self._start: tuple[Tensor, Tensor] | None = None
        self._size, self._episode = (0, 0), 0

    def observe(
        self, frame: Float[Tensor, "3 H W"], time: float, stream: MotionStream, step: TrackedStep | None
    ) -> None:
        """Take one frame; returns at once, and never waits for a viewer.

        Args:
            frame: RGB in [0, 1].
            time: of the frame [s].
            stream: that tracks the video.
            step: to this frame; None if the frame is the first of its video.
        """
        pixels = reduced((frame.detach().cpu().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8))
        with self._lock:
            if step is None:
                self._stream, self._start = stream, (stream.q, stream.position_covariance)
                self._frames, self._times, self._steps = [], [], []
                self._size, self._episode = (frame.shape[-1], frame.shape[-2]), self._episode + 1
            elif stream is not self._stream:
                return
            else:
                self._steps.append(step)
            self._frames.append(pixels)
            self._times.append(time)
            if len(self._frames) > _MAX_FRAMES:
                half = _MAX_FRAMES // 2
                last = self._steps[half - 1]
                self._start = last.position, last.position_covariance
                self._frames, self._times, self._steps = self._frames[half:], self._times[half:], self._steps[half:]
                self._episode += 1

    def run_since(self, version: Version | None) -> tuple[Version, ViewedRun] | None:
        """The frames so far as a run, and their version; None if nothing changed since that version, or there is no step yet."""
        with self._lock:
            now = self._episode, len(self._frames)
            if now == version or self._start is None or not self._steps:
                return None
            start, times, steps = self._start, list(self._times), list(self._steps)
            frames, (width, height) = list(self._frames), self._size
        motion = self._idm.assemble(*start, times, StepColumns(steps))
        return now, self._view(frames, width, height, motion)

    def waiting(self) -> ViewedRun:
        """A run of one gray frame with the robot at home, until frames arrive."""
        robot = self._idm.embodiment
        n = len(self._idm.joint_names)
        q = np.zeros((1, n)) if robot is None else np.array(robot.home)[None]
        types = ("revolute",) * n if robot is None else robot.joint_types
        motion = recorded_motion(self._idm.joint_names, types, np.zeros(1), q)
        camera = getattr(self._idm.field, "camera", None)
        width, height = (320, 240) if camera is None else (camera.width, camera.height)
        gray = reduced(torch.full((3, height, width), 200, dtype=torch.uint8))
        return self._view([gray], width, height, motion, decoded=False, notes=("Waiting for the first frames.",))

    def _view(self, frames: list[Tensor], width: int, height: int, motion: Any, **more: Any) -> ViewedRun:
        idm = self._idm
        flow = idm.flow or (None if isinstance(idm.field, LearnedField) else DisFlow())
        camera = getattr(idm.field, "camera", None)
        return ViewedRun(self._title, frames, width, height, motion, idm.embodiment, camera, idm.field, flow, **more)
