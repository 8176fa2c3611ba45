"""The motion that commands are taken from: along what frames show, inside limits, at rest where they show nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from jidm.control.commands import ActionSpace, Commands
from jidm.control.limits import MotionLimits
from jidm.control.reader import PoseMeasurement
from jidm.control.spline import LimitedSpline
from jidm.errors import InputError

_KNOT_SPACING = 0.02  # [s] the motion may change its mind so often; finer than any video
_VELOCITY_DECAY_TIME = 0.15  # [s] beyond the last frame a joint is expected to keep its velocity for about so long
_EXTRAPOLATION_TRUST_TIME = 0.08  # [s] and that is trusted for about so long
_MIN_EXTRAPOLATION_WEIGHT = 0.02
_TIME_TOLERANCE = 1e-6  # [s] nearer times are the same
_HISTORY_WAYPOINTS = 4  # frames of the past that the path is drawn through
_COMMAND_HISTORY = 2.0  # [s] of commands that measured positions may be compared with


class ReferenceTrajectory:
    """Readings in, commands out; from where it is told or the first reading shows, at rest.

    Args:
        joint_names: n of them. limits: of the joints.
        video_rate, control_rate: frames and commands a second.
        action_space: what `Commands.action` holds. grippers: columns that open and close one.
        bandwidth, ahead: as of `LimitedSpline`.
        q: (n,) where the robot is [rad or m]; the first reading tells if not given.
    """

    def __init__(
        self, joint_names: tuple[str, ...], limits: MotionLimits, *, video_rate: float, control_rate: float,
        action_space: ActionSpace, grippers: tuple[int, ...], bandwidth: float, horizon: float,
        q: NDArray[np.float64] | None = None,
    ) -> None:  # fmt: skip
        self.joint_names, self.limits = joint_names, limits
        self.video_rate, self.control_rate = video_rate, control_rate
        self.action_space, self.grippers = action_space, grippers
        self.bandwidth, self.horizon = bandwidth, horizon
        self._spline: LimitedSpline | None = None
        self._count = 0  # commands given
        self._horizon_end = 0.0  # [s] up to here frames have told what to do
        self._waypoints: list[
            tuple[float, NDArray[np.float64]]
        ] = []  # times and positions that the motion is drawn through
        self._end_velocity = np.zeros(limits.n)
        self._sent: deque[NDArray[np.float64]] = deque(maxlen=max(1, round(_COMMAND_HISTORY * control_rate)))
        self._stop_reason = self._hold_reason = ""
        if q is not None:
            self._initialize(q)

    @property
    def time(self) -> float:
        """Up to here commands were given [s]."""
        return self._count / self.control_rate

    @property
    def position(self) -> NDArray[np.float64] | None:
        """(n,) where the last command leads [rad or m]; None where nothing is known of the robot yet."""
        return None if self._spline is None else self._spline.at(self.time).position[0]

    @property
    def horizon_end(self) -> float:
        """Up to here frames have told what to do [s]."""
        return self._horizon_end

    def append(self, measurements: Sequence[PoseMeasurement], *, blend: int = 0) -> None:
        """Go to these readings; `commands` tells how.

        Args:
            blend: where they begin a new video that starts elsewhere than the motion ends, the difference is taken back
                over so many frames.
        """
        offset, blended = np.zeros(self.limits.n), blend + 1
        reasons = []
        for reading in measurements:
            self._horizon_end = (
                self._next_time() if not reading.is_first or self._stop_reason else max(self._horizon_end, self.time)
            )
            if self._stop_reason:
                reasons.append(self._stop_reason)
            elif reading.position is None or reading.velocity is None:
                reasons.append(reading.problem)
            else:
                if reading.is_first and blend and self._waypoints:
                    offset, blended = self.reference(np.array([self._horizon_end]))[0] - reading.position, 0
                blend_weight = max(0.0, 1 - blended / (blend + 1))
                self._append_waypoint(reading.position + blend_weight * offset, reading.velocity)
                blended += 1
        self._hold_reason = "; ".join(dict.fromkeys(reasons))

    def next(self, until: float | None = None) -> Commands:
        """The commands up to where readings lead, or to this time of it [s]."""
        return self._commands_until(
            self._horizon_end if until is None else min(self._horizon_end, until), self._hold_reason
        )

    def shift_reference(self, offset: NDArray[np.float64]) -> None:
        """Readings to which no commands lead yet were off by (n,) [rad or m]."""
        self._waypoints = [
            (time, q + offset if time > self.time + _TIME_TOLERANCE else q) for time, q in self._waypoints
        ]

    def reference(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M, n) where the frames want the joints [rad or m]; beyond the last one they come to rest as they were going.

        Raises:
            InputError: nothing is known of the robot yet.
        """
        if not self._waypoints:
            raise InputError("nothing is known of the robot yet: reset(q=...) or push a frame first")
        knots, q = zip(*self._waypoints, strict=True)
        time_past_end = np.maximum(0.0, times - knots[-1])[:, None]
        inside = np.clip(times, knots[0], knots[-1])
        path = PchipInterpolator(knots, np.stack(q))(inside) if len(knots) > 1 else np.repeat(q, len(times), axis=0)
        return np.asarray(
            path + self._end_velocity * _VELOCITY_DECAY_TIME * (1 - np.exp(-time_past_end / _VELOCITY_DECAY_TIME))
        )

    def hold(self, count: int, reason: str) -> Commands:
        """So many commands that brake and keep the robot where it comes to rest.

        Raises:
            InputError: nothing is known of the robot yet.
        """
        if self._spline is None:
            raise InputError("nothing is known of the robot yet: reset(q=...) or push a frame first")
        return self._commands_until(self.time + count / self.control_rate, reason)

    def observe(self, q: NDArray[np.float64], time: float | None) -> NDArray[np.float64]:
        """How far the robot at q (n,) is from where it was sent, (n,) [rad or m]; velocities and steps go on from there.

        Raises:
            InputError: nothing was sent at that time.
        """
        age = self._count - round((self.time if time is None else time) * self.control_rate)
        if self._spline is None or not 0 <= age < len(self._sent):
            raise InputError(f"no command of the last {_COMMAND_HISTORY} s ends at {time} s")
        error = q - self._sent[-1 - age]
        if self.action_space != "joint_position":
            self._spline.shift(error)
            self._sent = deque((sent + error for sent in self._sent), maxlen=self._sent.maxlen)
        return error

    def stop(self, reason: str) -> None:
        """Brake, and follow nothing any more."""
        self._stop_reason = reason
        if self._spline is not None:
            here = self._spline.at(self.time)
            self._waypoints = [(self.time, here.position[0])]
            self._end_velocity = here.velocity[0]

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _initialize(self, q: NDArray[np.float64]) -> None:
        period = 1 / self.control_rate
        knot = (
            period * round(_KNOT_SPACING / period)
            if period < _KNOT_SPACING
            else period / math.ceil(period / _KNOT_SPACING - 1e-9)
        )
        self._spline = LimitedSpline(self.limits, q, knot=knot, horizon=self.horizon, bandwidth=self.bandwidth)
        self._waypoints.append((0.0, q))

    def _next_time(self) -> float:
        """When the next frame is reached: a period after the last one, or after what was held since."""
        return max(self._horizon_end, self.time) + 1 / self.video_rate

    def _append_waypoint(self, position: NDArray[np.float64], velocity: NDArray[np.float64]) -> None:
        """Lead the path there."""
        if self._spline is None:
            self._initialize(position)
        assert self._spline is not None
        if self.time > self._waypoints[-1][0] + _TIME_TOLERANCE:  # it was held since
            self._waypoints.append((self.time, self._spline.at(self.time).position[0]))
        if self._horizon_end < self._waypoints[-1][0] + _TIME_TOLERANCE:
            self._waypoints.pop()
        self._waypoints.append((self._horizon_end, position))
        self._end_velocity = velocity

    def _commands_until(self, until: float, reason: str) -> Commands:
        """The commands up to a time, a frame's period at once: what is further off is planned when it is nearer."""
        last = math.floor(until * self.control_rate + 1e-6)
        if self._spline is None or last <= self._count:
            empty = np.zeros((0, self.limits.n))
            return self._make_commands(np.zeros(0), empty, empty, empty, np.zeros(0, dtype=bool), reason)
        before = self._spline.at(self.time).position
        times = np.arange(self._count + 1, last + 1) / self.control_rate
        holding = times > (-math.inf if self._stop_reason else self._waypoints[-1][0]) + _TIME_TOLERANCE
        tracking_error, position = (
            np.where(holding[:, None], 0.0, self.reference(times)),
            np.zeros((len(times), self.limits.n)),
        )
        step = max(1, math.ceil(self.control_rate / self.video_rate))
        for k in range(0, len(times), step):
            position[k : k + step] = self._plan(times[k : k + step], holding=bool(holding.any()))
        tracking_error[~holding] -= position[~holding]
        self._count = last
        self._sent.extend(position)
        while len(self._waypoints) > _HISTORY_WAYPOINTS and self._waypoints[_HISTORY_WAYPOINTS][0] < self.time:
            self._waypoints.pop(0)
        delta = np.diff(np.concatenate([before, position]), axis=0)
        return self._make_commands(
            times, position, delta, tracking_error, holding, (self._stop_reason or reason) if holding.any() else ""
        )

    def _plan(self, times: NDArray[np.float64], *, holding: bool) -> NDArray[np.float64]:
        """(M, n) positions at these times by what is known now; they are fixed by it."""
        assert self._spline is not None
        planned_times = self._spline.planned_times
        time_past_end = np.maximum(0.0, planned_times - self._waypoints[-1][0])
        weight = (
            np.ones(len(planned_times))
            if holding
            else np.maximum(_MIN_EXTRAPOLATION_WEIGHT, np.exp(-time_past_end / _EXTRAPOLATION_TRUST_TIME))
        )
        self._spline.replan(self.reference(planned_times), weight)
        position = self._spline.at(times).position
        self._spline.advance(max(0, math.ceil((times[-1] - self._spline.time) / self._spline.knot - 1e-6)))
        return position

    def _make_commands(
        self, times: NDArray[np.float64], position: NDArray[np.float64], delta: NDArray[np.float64],
        tracking_error: NDArray[np.float64], holding: NDArray[np.bool_], reason: str,
    ) -> Commands:  # fmt: skip
        columns = list(self.grippers)
        return Commands(
            joint_names=self.joint_names, action_space=self.action_space, time=times, position=position, delta=delta,
            velocity=delta * self.control_rate, tracking_error=tracking_error, holding=holding, reason=reason, gripper_joints=self.grippers,
            gripper_range=np.stack([self.limits.lower[columns], self.limits.upper[columns]], axis=1),
        )  # fmt: skip
