"""The action decoder: frames in, commands at the controller's rate out, as one continuous motion."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.control.commands import Commands
from jidm.control.config import ControlConfig
from jidm.control.limits import MotionLimits
from jidm.control.pose_tracker import PoseMeasurement, PoseTracker
from jidm.control.reference_trajectory import ReferenceTrajectory
from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.idm import JacobianIDM


class ActionDecoder:
    """Turns frames into commands.

    A `PoseTracker` measures the joint positions in each frame. A `ReferenceTrajectory` steers toward them with a B-spline
    that keeps the limits of position, velocity, acceleration and jerk at every instant. Without a new valid frame the robot
    brakes inside the same limits and stays at rest.

    The first frame after `reset` or `start_video` shows the initial pose; each later frame gives the commands that lead to
    it.

    Args:
        idm: measures the joint positions; the robot of its field is the one commanded.
        config: rates, action space and smoothness; the defaults if not given.
        limits: of the joints; those of the IDM's robot if not given.

    Attributes:
        pose_tracker: measures joint positions in frames. It may run in another thread while commands are executed.
        gripper_joints: columns that open and close a gripper, between limits.
        trajectory: takes measurements and gives commands: `trajectory.append(pose_tracker.measure(frames))`, then
            `trajectory.next()`. `push` does both. It also holds, observes and shifts; `reset` replaces it.

    Raises:
        InputError: the robot is unknown and no limits are given, or they are of another number of joints.
    """

    def __init__(
        self, idm: JacobianIDM, config: ControlConfig | None = None, *, limits: MotionLimits | None = None
    ) -> None:
        robot = idm.embodiment
        if limits is None:
            if robot is None:
                raise InputError("this checkpoint names no robot whose limits are known: pass limits=MotionLimits(...)")
            limits = MotionLimits.from_embodiment(robot)
        if limits.n != len(idm.joint_names):
            raise InputError(f"limits are of {limits.n} joints, the field has {len(idm.joint_names)}")
        self.idm, self.limits, self.config = idm, limits, config or ControlConfig()
        span = limits.upper - limits.lower
        has_opening = np.isfinite(span) & (span > 0) & (False if robot is None else robot.gripper_mask)
        self.gripper_joints = tuple(int(k) for k in np.flatnonzero(has_opening))
        self.pose_tracker = PoseTracker(idm, self.config.video_rate)
        self.reset()

    def reset(self, q: ArrayLike | None = None) -> None:
        """Start again, with the robot at rest.

        Args:
            q: (n,) its joint positions [rad or m], shown in the next frame. If not given they are estimated from that
                frame. That is accurate enough for velocities and steps, but refused for positions.

        Raises:
            InputError: q is no pose of this robot.
        """
        start = None if q is None else self._as_pose(q)
        self.trajectory = ReferenceTrajectory(
            self.idm.joint_names, self.limits, self.config, gripper_joints=self.gripper_joints, q=start
        )
        self.start_video(start)

    def start_video(self, q: ArrayLike | None = None) -> None:
        """Expect the first frame of a new video, such as a planner's next generated video. The robot's motion continues.

        Args:
            q: (n,) joint positions in that frame [rad or m]; estimated from the frame if not given.

        Raises:
            InputError: q is no pose of this robot.
        """
        self.pose_tracker.start_video(None if q is None else self._as_pose(q))
        self._pending: list[PoseMeasurement] = []

    def cancel(self) -> None:
        """Stop work under way in another thread before its next frame; it raises `Cancelled`, as all later work does."""
        self.trajectory.cancelled = self.pose_tracker.cancelled = True

    def push(self, frames: Any, *, q: ArrayLike | None = None, layout: str | None = None) -> Commands:
        """Commands that lead to these frames.

        Args:
            frames: one frame or several, in any layout `as_video` takes.
            q: (n,) joint positions measured by the robot in the last of them, if the frames are real [rad or m].
            layout: as for `as_video`.

        Returns:
            control_rate / video_rate commands for each frame but the first of a video; none while a chunk is incomplete.
            Frames that cannot be measured, and a q that is no pose of this robot, give holding commands with a reason; they
            raise nothing.

        Raises:
            InputError: the action space is positions and `reset` was not given any.
            Cancelled: `cancel` was called.
        """
        if self.config.action_space == "joint_position" and self.trajectory.position is None:
            raise InputError("position commands need to know where the robot is: call reset(q=...) first")
        self._pending += self.pose_tracker.measure(frames, layout)
        last = self._pending[-1]
        if q is not None and last.position is not None:
            last = self._pending[-1] = self._correct(last, q)
        incomplete = sum(not m.is_first for m in self._pending) < self.config.chunk and not last.is_first
        measurements = [] if incomplete else self._pending
        self._pending = self._pending if incomplete else []
        self.trajectory.append(measurements)
        return self.trajectory.next()

    def _correct(self, measurement: PoseMeasurement, q: ArrayLike) -> PoseMeasurement:
        """The measurement of the last frame with the robot's own joint positions; the robot brakes if they are none."""
        try:
            measured = self._as_pose(q)
        except InputError as error:
            return PoseMeasurement(measurement.is_first, problem=f"the robot reports {error}")
        self.pose_tracker.correct(measured)
        return replace(measurement, position=measured)

    def _as_pose(self, q: ArrayLike) -> NDArray[np.float64]:
        return self.limits.as_pose(q, self.idm.joint_names)
