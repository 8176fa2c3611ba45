"""The action decoder: frames in, commands at a controller's rate out, continuous whatever the frames do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.control.commands import Commands, as_action_space
from jidm.control.limits import MotionLimits
from jidm.control.reader import PoseMeasurement, PoseTracker
from jidm.control.reference_trajectory import ReferenceTrajectory
from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.idm import JacobianIDM


class ActionDecoder:
    """Turns frames into commands, one block for each frame that comes.

    Frame by frame the pose is followed, and the motion is steered toward it by a spline that keeps the limits of position,
    velocity, acceleration and jerk at every instant (`LimitedSpline`). When nothing fresh and finite comes, the robot is
    braked inside the same limits and kept where it is.

    The first frame after `reset` or `begin` shows where the robot is; each later one gives the commands that lead to it.

    Args:
        idm: decodes; its field's robot is the one commanded.
        video_rate: frames a second. control_rate: commands a second; any ratio goes.
        chunk: so many frames are waited for before commands are given. They are smoother then, and later.
        action_space: what `Commands.action` holds.
        limits: of the joints; the robot's own if not given.
        bandwidth: motion faster than this is smoothed away [Hz].
        ahead: how far ahead the motion is planned [s]: long enough to brake from the speed that is wanted.
        most_behind: a robot that reports to be further from where it was sent is held [rad or m]; never if None.

    Attributes:
        reader: reads joint positions off frames; `push` is `follow(reader.read(frames))`, and the two may be called apart,
            reading in another thread while commands are executed.

    Raises:
        InputError: the robot is unknown and no limits are given, or a rate is not positive.
    """

    def __init__(
        self, idm: JacobianIDM, *, video_rate: float = 12.5, control_rate: float = 50.0, chunk: int = 1,
        action_space: str = "joint_velocity", limits: MotionLimits | None = None, bandwidth: float = 4.0,
        horizon: float = 0.8, max_tracking_error: float | None = None,
    ) -> None:  # fmt: skip
        if not all(math.isfinite(rate) and rate > 0 for rate in (video_rate, control_rate)):
            raise InputError(f"video_rate and control_rate must be positive, got {video_rate} and {control_rate}")
        if chunk < 1:
            raise InputError(f"a chunk has at least one frame, got {chunk}")
        robot = idm.embodiment
        if limits is None:
            if robot is None:
                raise InputError("this checkpoint names no robot whose limits are known: pass limits=MotionLimits(...)")
            limits = MotionLimits.from_embodiment(robot)
        if limits.n != len(idm.joint_names):
            raise InputError(f"limits are of {limits.n} joints, the field moves {len(idm.joint_names)}")
        self.idm, self.limits = idm, limits
        self.video_rate, self.control_rate, self.chunk = video_rate, control_rate, chunk
        self.action_space, self.max_tracking_error = as_action_space(action_space), max_tracking_error
        self._bandwidth, self._horizon = bandwidth, horizon
        self._grippers = () if robot is None else tuple(int(k) for k in np.flatnonzero(robot.gripper_mask))
        self.pose_tracker = PoseTracker(idm, video_rate)
        self.reset()

    # ---- state ------------------------------------------------------------------------------------------------------

    def reset(self, q: ArrayLike | None = None) -> None:
        """Forget everything. The robot is at rest.

        Args:
            q: (n,) where it is [rad or m], shown in the next frame. If not given, that frame tells, to the accuracy of the
                field: good enough for velocities and steps, refused for positions.

        Raises:
            InputError: q is not n finite numbers.
        """
        start = None if q is None else self._checked(q)
        self._trajectory = ReferenceTrajectory(
            self.idm.joint_names, self.limits, video_rate=self.video_rate, control_rate=self.control_rate,
            action_space=self.action_space, grippers=self._grippers, bandwidth=self._bandwidth, horizon=self._horizon, q=start,
        )  # fmt: skip
        self.start_video(q)

    def start_video(self, q: ArrayLike | None = None) -> None:
        """The next frame begins a new video, a planner's next dream for instance; the robot's motion goes on as it was.

        Args:
            q: (n,) what the joints are in that frame [rad or m]; read off the picture if not given.

        Raises:
            InputError: q is not n finite numbers.
        """
        self.pose_tracker.start_video(None if q is None else self._checked(q))
        self._pending: list[PoseMeasurement] = []

    @property
    def time(self) -> float:
        """Up to here commands were given [s of the motion]."""
        return self._trajectory.time

    @property
    def horizon_end(self) -> float:
        """Up to here frames have told what to do [s of the motion]."""
        return self._trajectory.horizon_end

    @property
    def position(self) -> NDArray[np.float64] | None:
        """(n,) where the last command leads [rad or m]; None where nothing is known of the robot yet."""
        return self._trajectory.position

    # ---- frames in, commands out ------------------------------------------------------------------------------------

    def push(self, frames: Any, *, q: ArrayLike | None = None, layout: str | None = None) -> Commands:
        """Commands that lead to these frames.

        Args:
            frames: one frame or several, in any layout `as_video` takes.
            q: (n,) what the robot measured in the last of them, where they are real and it reports it [rad or m].
            layout: as for `as_video`.

        Returns:
            control_rate / video_rate commands for each frame but a video's first; none while a chunk is not full. Frames
            that cannot be followed give held commands that say why; nothing is raised for them.

        Raises:
            InputError: q is not n finite numbers; positions are asked for and `reset` was not told where the robot is.
        """
        measured = None if q is None else self._checked(q)
        if self.action_space == "joint_position" and self.position is None:
            raise InputError("positions are commanded from where the robot is: tell it by reset(q=...)")
        self._pending += self.pose_tracker.measure(frames, layout)
        if measured is not None and self._pending[-1].position is not None:
            self.pose_tracker.correct(measured)
            self._pending[-1] = replace(self._pending[-1], position=measured)
        if sum(not reading.is_first for reading in self._pending) < self.chunk and not self._pending[-1].is_first:
            return self.follow([])
        measurements, self._pending = self._pending, []
        return self.follow(measurements)

    def follow(self, measurements: Sequence[PoseMeasurement], *, blend: int = 0) -> Commands:
        """Commands that lead to what `reader` has read; see `push`.

        Args:
            blend: where they begin a new video that starts elsewhere than the motion ends, the difference is taken back
                over so many frames.
        """
        self.append(measurements, blend=blend)
        return self.next()

    def append(self, measurements: Sequence[PoseMeasurement], *, blend: int = 0) -> None:
        """Take in what `reader` has read, for `more` to give the commands; `follow` does both."""
        self._trajectory.append(measurements, blend=blend)

    def next(self, until: float | None = None) -> Commands:
        """Commands up to where readings lead, or to this time of the motion [s]; none where they have been given."""
        return self._trajectory.next(until)

    def shift_reference(self, offset: ArrayLike) -> None:
        """What frames showed was read wrong: the readings to which no commands lead yet move.

        Args:
            offset: (n,) by so much [rad or m].

        Raises:
            InputError: off is not n finite numbers.
        """
        self._trajectory.shift_reference(self._checked(offset))

    def reference(self, times: ArrayLike) -> NDArray[np.float64]:
        """(M, n) where frames want the joints [rad or m].

        Args:
            times: (M,) of the motion [s].

        Raises:
            InputError: nothing is known of the robot yet.
        """
        return self._trajectory.reference(np.array(times, dtype=np.float64))

    def hold(self, count: int, reason: str = "no frame came") -> Commands:
        """So many commands without a frame: the motion is braked and the robot kept where it comes to rest.

        Raises:
            InputError: nothing is known of the robot yet.
        """
        return self._trajectory.hold(count, reason)

    def observe(self, q: ArrayLike, *, time: float | None = None) -> float:
        """What the robot measured while it executes.

        Commands of velocity or steps go on from there; positions do not jump. A robot that is further from where it was
        sent than `most_behind` is held until `reset`.

        Args:
            q: (n,) [rad or m].
            time: when, in the time of the motion [s]; at the end of the last command if not given.

        Returns:
            The largest distance of a joint from where it was sent [rad or m].

        Raises:
            InputError: q is not n finite numbers, or nothing was sent at that time.
        """
        error = np.abs(self._trajectory.observe(self._checked(q), time))
        furthest = int(error.argmax())
        if self.max_tracking_error is not None and error[furthest] > self.max_tracking_error:
            name = self.idm.joint_names[furthest]
            self._trajectory.stop(f"{name} is {error[furthest]:.3g} from where it was sent; reset(q) to go on")
        return float(error[furthest])

    def _checked(self, q: ArrayLike) -> NDArray[np.float64]:
        values = np.array(q, dtype=np.float64)
        if values.shape != (self.limits.n,) or not np.isfinite(values).all():
            raise InputError(f"q must be {self.limits.n} finite joint positions, got {values}")
        return values
