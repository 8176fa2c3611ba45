"""The reference trajectory: an interpolation of measured poses, followed by a spline inside the joint limits.

Measured poses are waypoints. A shape-preserving piecewise cubic (PCHIP) through them is the reference; beyond the last
waypoint it continues at the measured velocity, which decays exponentially. `LimitedSpline` follows the reference, and
commands are samples of the spline. Without new measurements the spline brakes to rest.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator

from jidm.control.commands import Commands, as_action_space
from jidm.control.config import ControlConfig
from jidm.control.limits import MotionLimits
from jidm.control.pose_tracker import PoseMeasurement
from jidm.control.spline import LimitedSpline
from jidm.errors import Cancelled, InputError

_KNOT_SPACING = 0.02  # [s] time resolution of the spline, finer than any video's
_VELOCITY_DECAY_TIME = 0.15  # [s] time constant of the extrapolated velocity beyond the last frame
_EXTRAPOLATION_TRUST_TIME = 0.08  # [s] time constant of the weight of the extrapolation
_MIN_EXTRAPOLATION_WEIGHT = 0.02
_TIME_TOLERANCE = 1e-6  # [s] times closer than this are equal
_HISTORY_WAYPOINTS = 4  # past waypoints kept for the interpolation
_UNKNOWN_POSE = "the joint positions are unknown: call reset(q=...) or push a frame first"
_COMMAND_HISTORY = 2.0  # [s] of past commands that measured positions can be compared with


class ReferenceTrajectory:
    """Takes pose measurements and gives commands. Starts at rest, at q or at the first measurement.

    Args:
        joint_names: n names.
        limits: of the joints.
        config: rates, action space, smoothness and the largest tracking error.
        gripper_joints: columns that open and close a gripper.
        q: (n,) initial joint positions [rad or m]; those of the first measurement if not given.

    Attributes:
        horizon_end: the time up to which measurements define the motion [s].
        cancelled: set by any thread to end planning before its next frame period, now and later.
    """

    def __init__(
        self, joint_names: tuple[str, ...], limits: MotionLimits, config: ControlConfig, *,
        gripper_joints: tuple[int, ...] = (), q: NDArray[np.float64] | None = None,
    ) -> None:  # fmt: skip
        self.joint_names, self.limits, self.config, self.gripper_joints = joint_names, limits, config, gripper_joints
        self.horizon_end = 0.0
        self.cancelled = False
        self._spline: LimitedSpline | None = None
        self._count = 0  # commands given so far
        self._waypoints: list[tuple[float, NDArray[np.float64]]] = []
        self._end_velocity = np.zeros(limits.n)  # at the last waypoint
        self._sent: deque[NDArray[np.float64]] = deque(maxlen=max(1, round(_COMMAND_HISTORY * config.control_rate)))
        self._stop_reason = self._hold_reason = ""
        if q is not None:
            self._initialize(q)

    @property
    def time(self) -> float:
        """End of the last command, in trajectory time [s]."""
        return self._count / self.config.control_rate

    @property
    def position(self) -> NDArray[np.float64] | None:
        """(n,) joint positions after the last command [rad or m]; None while the initial pose is unknown."""
        return None if self._spline is None else self._spline.at(self.time).position[0]

    def append(self, measurements: Sequence[PoseMeasurement], *, blend: int = 0) -> None:
        """Extend the reference by these measurements, one frame period each; `next` gives the commands.

        Args:
            measurements: of consecutive frames; none changes nothing.
            blend: if they begin a new video at another pose than the reference, the offset is removed linearly over
                this many frames.
        """
        offset, blended = np.zeros(self.limits.n), blend + 1
        reasons = []
        for measurement in measurements:
            self.horizon_end = max(self.horizon_end, self.time)  # the robot may have been held since the last frame
            if not measurement.is_first and self._spline is not None:
                self.horizon_end += 1 / self.config.video_rate
            if self._stop_reason:
                reasons.append(self._stop_reason)
            elif measurement.position is None or measurement.velocity is None:
                reasons.append(measurement.problem)
            else:
                if measurement.is_first and blend and self._waypoints:
                    offset, blended = self.reference([self.horizon_end])[0] - measurement.position, 0
                blend_weight = max(0.0, 1 - blended / (blend + 1))
                self._append_waypoint(measurement.position + blend_weight * offset, measurement.velocity)
                blended += 1
        if measurements:
            self._hold_reason = "; ".join(dict.fromkeys(reasons))

    def next(self, until: float | None = None) -> Commands:
        """The commands not yet given, up to the end of the reference.

        Args:
            until: stop at this trajectory time [s].

        Raises:
            Cancelled: `cancelled` was set.
        """
        end = self.horizon_end if until is None else min(self.horizon_end, until)
        return self._commands_until(end, self._hold_reason)

    def shift_reference(self, offset: ArrayLike) -> None:
        """Move the waypoints beyond the last command.

        Args:
            offset: (n,) added to each [rad or m].

        Raises:
            InputError: offset is not n finite numbers.
        """
        added = self.limits.as_positions(offset)
        self._waypoints = [
            (time, q + added if time > self.time + _TIME_TOLERANCE else q) for time, q in self._waypoints
        ]

    def reference(self, times: ArrayLike) -> NDArray[np.float64]:
        """(M, n) reference positions [rad or m]: interpolated, and with decaying velocity beyond the last waypoint.

        Args:
            times: (M,) trajectory times [s].

        Raises:
            InputError: the initial pose is unknown.
        """
        if not self._waypoints:
            raise InputError(_UNKNOWN_POSE)
        at = np.array(times, dtype=np.float64)
        knots, q = zip(*self._waypoints, strict=True)
        time_past_end = np.maximum(0.0, at - knots[-1])[:, None]
        inside = np.clip(at, knots[0], knots[-1])
        path = PchipInterpolator(knots, np.stack(q))(inside) if len(knots) > 1 else np.repeat(q, len(at), axis=0)
        return np.asarray(
            path + self._end_velocity * _VELOCITY_DECAY_TIME * (1 - np.exp(-time_past_end / _VELOCITY_DECAY_TIME))
        )

    def hold(self, count: int, reason: str = "no frame came") -> Commands:
        """Commands that brake the robot and keep it where it comes to rest.

        Args:
            count: how many.
            reason: stated in the commands.

        Raises:
            InputError: the initial pose is unknown.
        """
        if self._spline is None:
            raise InputError(_UNKNOWN_POSE)
        return self._commands_until(self.time + count / self.config.control_rate, reason)

    def observe(self, q: ArrayLike, *, time: float | None = None) -> float:
        """Compare the robot's measured positions with the command.

        Commands of velocity or steps continue from the measured positions, unless the planned motion would then leave the
        limits; position commands do not jump. A robot whose largest error exceeds `config.max_tracking_error` is held until
        `reset`.

        Args:
            q: (n,) measured joint positions [rad or m].
            time: trajectory time of the measurement [s]; the end of the last command if not given.

        Returns:
            Largest error of a joint [rad or m].

        Raises:
            InputError: q is no pose of this robot, or no command of the last 2 s ends at that time.
        """
        at = self.time if time is None else time
        command = at * self.config.control_rate
        age = self._count - round(command) if math.isfinite(command) else -1
        measured = self.limits.as_pose(q, self.joint_names)
        if self._spline is None or not 0 <= age < len(self._sent):
            raise InputError(f"no command of the last {_COMMAND_HISTORY} s ends at {time} s")
        error = measured - self._sent[-1 - age]
        if self.config.action_space != "joint_position":
            applied = self._spline.shift(error)
            self._sent = deque((sent + applied for sent in self._sent), maxlen=self._sent.maxlen)
        worst = int(np.abs(error).argmax())
        largest = float(abs(error[worst]))
        if self.config.max_tracking_error is not None and largest > self.config.max_tracking_error:
            self.stop(f"{self.joint_names[worst]} is {largest:.3g} from its command; call reset(q) to continue")
        return largest

    def stop(self, reason: str) -> None:
        """Brake, and ignore all further measurements; the reason is stated in the commands."""
        self._stop_reason = reason
        self._end_at_last_command()

    def drop_reference(self) -> None:
        """Forget the reference beyond the last command, so that the robot brakes until there is a new one."""
        self.horizon_end = min(self.horizon_end, self.time)
        self._end_at_last_command()

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _end_at_last_command(self) -> None:
        """Leave only the present state as a waypoint."""
        if self._spline is not None:
            state = self._spline.at(self.time)
            self._waypoints = [(self.time, state.position[0])]
            self._end_velocity = state.velocity[0]

    def _initialize(self, q: NDArray[np.float64]) -> None:
        """Start the spline at q. Its knots and the control periods are multiples of one another."""
        period = 1 / self.config.control_rate
        if period < _KNOT_SPACING:
            knot = period * round(_KNOT_SPACING / period)
        else:
            knot = period / math.ceil(period / _KNOT_SPACING - 1e-9)
        self._spline = LimitedSpline(
            self.limits, q, knot=knot, horizon=self.config.horizon, bandwidth=self.config.bandwidth
        )
        self._waypoints.append((0.0, q))

    def _append_waypoint(self, position: NDArray[np.float64], velocity: NDArray[np.float64]) -> None:
        """Add a waypoint at `horizon_end`; the first one is the start, which lies inside the limits as the robot does."""
        if self._spline is None:
            position = np.clip(position, self.limits.lower, self.limits.upper)
            self._initialize(position)
        assert self._spline is not None
        if self.time > self._waypoints[-1][0] + _TIME_TOLERANCE:  # the robot was held since the last waypoint
            self._waypoints.append((self.time, self._spline.at(self.time).position[0]))
        if self.horizon_end < self._waypoints[-1][0] + _TIME_TOLERANCE:
            self._waypoints.pop()
        self._waypoints.append((self.horizon_end, position))
        self._end_velocity = np.clip(velocity, -self.limits.velocity, self.limits.velocity)

    def _commands_until(self, until: float, reason: str) -> Commands:
        """The commands up to a time. The spline is replanned for each frame period, with the reference known now."""
        last = math.floor(until * self.config.control_rate + 1e-6)
        if self._spline is None or last <= self._count:
            empty = np.zeros((0, self.limits.n))
            return self._make_commands(np.zeros(0), empty, empty, empty, np.zeros(0, dtype=bool), reason)
        before = self._spline.at(self.time).position
        times = np.arange(self._count + 1, last + 1) / self.config.control_rate
        holding = times > (-math.inf if self._stop_reason else self._waypoints[-1][0]) + _TIME_TOLERANCE
        tracking_error = np.where(holding[:, None], 0.0, self.reference(times))
        position = np.zeros((len(times), self.limits.n))
        step = max(1, math.ceil(self.config.control_rate / self.config.video_rate))
        for k in range(0, len(times), step):
            if self.cancelled:
                raise Cancelled(f"stopped before command {self._count + k}")
            position[k : k + step] = self._plan(times[k : k + step], holding=bool(holding.any()))
        tracking_error[~holding] -= position[~holding]
        self._count = last
        self._sent.extend(position)
        while len(self._waypoints) > _HISTORY_WAYPOINTS and self._waypoints[_HISTORY_WAYPOINTS][0] < self.time:
            self._waypoints.pop(0)
        delta = np.diff(np.concatenate([before, position]), axis=0)
        hold_reason = (self._stop_reason or reason) if holding.any() else ""
        return self._make_commands(times, position, delta, tracking_error, holding, hold_reason)

    def _plan(self, times: NDArray[np.float64], *, holding: bool) -> NDArray[np.float64]:
        """(M, n) positions at these times. The spline is replanned, then fixed up to the last of them."""
        assert self._spline is not None
        planned_times = self._spline.planned_times
        time_past_end = np.maximum(0.0, planned_times - self._waypoints[-1][0])
        weight = np.maximum(_MIN_EXTRAPOLATION_WEIGHT, np.exp(-time_past_end / _EXTRAPOLATION_TRUST_TIME))
        if holding:
            weight = np.ones_like(weight)
        self._spline.replan(self.reference(planned_times), weight)
        position = self._spline.at(times).position
        self._spline.advance(max(0, math.ceil((times[-1] - self._spline.time) / self._spline.knot - 1e-6)))
        return position

    def _make_commands(
        self, times: NDArray[np.float64], position: NDArray[np.float64], delta: NDArray[np.float64],
        tracking_error: NDArray[np.float64], holding: NDArray[np.bool_], reason: str,
    ) -> Commands:  # fmt: skip
        columns = list(self.gripper_joints)
        return Commands(
            joint_names=self.joint_names, action_space=as_action_space(self.config.action_space), time=times,
            position=position, delta=delta, velocity=delta * self.config.control_rate, tracking_error=tracking_error,
            holding=holding, reason=reason, gripper_joints=self.gripper_joints,
            gripper_range=np.stack([self.limits.lower[columns], self.limits.upper[columns]], axis=1),
        )  # fmt: skip
