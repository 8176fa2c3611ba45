"""The motion that commands are taken from: along what frames show, inside limits, at rest where they show nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from jidm.adapters.decoder.commands import ActionSpace, Commands
from jidm.adapters.decoder.limits import MotionLimits
from jidm.adapters.decoder.reader import Reading
from jidm.adapters.decoder.spline import LimitedSpline
from jidm.errors import InputError

_KNOT = 0.02  # [s] the motion may change its mind so often; finer than any video
_GOES_ON = 0.15  # [s] beyond the last frame a joint is expected to keep its velocity for about so long
_TRUSTED = 0.08  # [s] and that is trusted for about so long
_LEAST_TRUST = 0.02
_INSTANT = 1e-6  # [s] nearer times are the same
_HISTORY = 4  # frames of the past that the path is drawn through
_REMEMBERED = 2.0  # [s] of commands that measured positions may be compared with


class Motion:
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
        action_space: ActionSpace, grippers: tuple[int, ...], bandwidth: float, ahead: float,
        q: NDArray[np.float64] | None = None,
    ) -> None:  # fmt: skip
        self.joint_names, self.limits = joint_names, limits
        self.video_rate, self.control_rate = video_rate, control_rate
        self.action_space, self.grippers = action_space, grippers
        self.bandwidth, self.ahead = bandwidth, ahead
        self._spline: LimitedSpline | None = None
        self._count = 0  # commands given
        self._shown = 0.0  # [s] up to here frames have told what to do
        self._path: list[tuple[float, NDArray[np.float64]]] = []  # times and positions that the motion is drawn through
        self._speed = np.zeros(limits.n)
        self._sent: deque[NDArray[np.float64]] = deque(maxlen=max(1, round(_REMEMBERED * control_rate)))
        self._stopped = self._reason = ""
        if q is not None:
            self._begin(q)

    @property
    def time(self) -> float:
        """Up to here commands were given [s]."""
        return self._count / self.control_rate

    @property
    def position(self) -> NDArray[np.float64] | None:
        """(n,) where the last command leads [rad or m]; None where nothing is known of the robot yet."""
        return None if self._spline is None else self._spline.at(self.time).position[0]

    @property
    def led(self) -> float:
        """Up to here frames have told what to do [s]."""
        return self._shown

    def lead(self, readings: Sequence[Reading], *, blend: int = 0) -> None:
        """Go to these readings; `commands` tells how.

        Args:
            blend: where they begin a new video that starts elsewhere than the motion ends, the difference is taken back
                over so many frames.
        """
        off, faded = np.zeros(self.limits.n), blend + 1
        reasons = []
        for reading in readings:
            self._shown = self._next_time() if not reading.begins or self._stopped else max(self._shown, self.time)
            if self._stopped:
                reasons.append(self._stopped)
            elif reading.position is None or reading.velocity is None:
                reasons.append(reading.problem)
            else:
                if reading.begins and blend and self._path:
                    off, faded = self.wanted(np.array([self._shown]))[0] - reading.position, 0
                share = max(0.0, 1 - faded / (blend + 1))
                self._take(reading.position + share * off, reading.velocity)
                faded += 1
        self._reason = "; ".join(dict.fromkeys(reasons))

    def commands(self, until: float | None = None) -> Commands:
        """The commands up to where readings lead, or to this time of it [s]."""
        return self._commands(self._shown if until is None else min(self._shown, until), self._reason)

    def move_ahead(self, off: NDArray[np.float64]) -> None:
        """Readings to which no commands lead yet were off by (n,) [rad or m]."""
        self._path = [(time, q + off if time > self.time + _INSTANT else q) for time, q in self._path]

    def wanted(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M, n) where the frames want the joints [rad or m]; beyond the last one they come to rest as they were going.

        Raises:
            InputError: nothing is known of the robot yet.
        """
        if not self._path:
            raise InputError("nothing is known of the robot yet: reset(q=...) or push a frame first")
        known, q = zip(*self._path, strict=True)
        beyond = np.maximum(0.0, times - known[-1])[:, None]
        inside = np.clip(times, known[0], known[-1])
        path = PchipInterpolator(known, np.stack(q))(inside) if len(known) > 1 else np.repeat(q, len(times), axis=0)
        return np.asarray(path + self._speed * _GOES_ON * (1 - np.exp(-beyond / _GOES_ON)))

    def coast(self, count: int, reason: str) -> Commands:
        """So many commands that brake and keep the robot where it comes to rest.

        Raises:
            InputError: nothing is known of the robot yet.
        """
        if self._spline is None:
            raise InputError("nothing is known of the robot yet: reset(q=...) or push a frame first")
        return self._commands(self.time + count / self.control_rate, reason)

    def measured(self, q: NDArray[np.float64], time: float | None) -> NDArray[np.float64]:
        """How far the robot at q (n,) is from where it was sent, (n,) [rad or m]; velocities and steps go on from there.

        Raises:
            InputError: nothing was sent at that time.
        """
        back = self._count - round((self.time if time is None else time) * self.control_rate)
        if self._spline is None or not 0 <= back < len(self._sent):
            raise InputError(f"no command of the last {_REMEMBERED} s ends at {time} s")
        off = q - self._sent[-1 - back]
        if self.action_space != "joint_position":
            self._spline.move_by(off)
            self._sent = deque((sent + off for sent in self._sent), maxlen=self._sent.maxlen)
        return off

    def stop(self, reason: str) -> None:
        """Brake, and follow nothing any more."""
        self._stopped = reason
        if self._spline is not None:
            here = self._spline.at(self.time)
            self._path = [(self.time, here.position[0])]
            self._speed = here.velocity[0]

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _begin(self, q: NDArray[np.float64]) -> None:
        period = 1 / self.control_rate
        knot = period * round(_KNOT / period) if period < _KNOT else period / math.ceil(period / _KNOT - 1e-9)
        self._spline = LimitedSpline(self.limits, q, knot=knot, ahead=self.ahead, bandwidth=self.bandwidth)
        self._path.append((0.0, q))

    def _next_time(self) -> float:
        """When the next frame is reached: a period after the last one, or after what was held since."""
        return max(self._shown, self.time) + 1 / self.video_rate

    def _take(self, position: NDArray[np.float64], velocity: NDArray[np.float64]) -> None:
        """Lead the path there."""
        if self._spline is None:
            self._begin(position)
        assert self._spline is not None
        if self.time > self._path[-1][0] + _INSTANT:  # it was held since
            self._path.append((self.time, self._spline.at(self.time).position[0]))
        if self._shown < self._path[-1][0] + _INSTANT:
            self._path.pop()
        self._path.append((self._shown, position))
        self._speed = velocity

    def _commands(self, until: float, reason: str) -> Commands:
        """The commands up to a time, a frame's period at once: what is further off is planned when it is nearer."""
        last = math.floor(until * self.control_rate + 1e-6)
        if self._spline is None or last <= self._count:
            none = np.zeros((0, self.limits.n))
            return self._told(np.zeros(0), none, none, none, np.zeros(0, dtype=bool), reason)
        before = self._spline.at(self.time).position
        times = np.arange(self._count + 1, last + 1) / self.control_rate
        held = times > (-math.inf if self._stopped else self._path[-1][0]) + _INSTANT
        behind, position = np.where(held[:, None], 0.0, self.wanted(times)), np.zeros((len(times), self.limits.n))
        step = max(1, math.ceil(self.control_rate / self.video_rate))
        for k in range(0, len(times), step):
            position[k : k + step] = self._planned(times[k : k + step], holds=bool(held.any()))
        behind[~held] -= position[~held]
        self._count = last
        self._sent.extend(position)
        while len(self._path) > _HISTORY and self._path[_HISTORY][0] < self.time:
            self._path.pop(0)
        delta = np.diff(np.concatenate([before, position]), axis=0)
        return self._told(times, position, delta, behind, held, (self._stopped or reason) if held.any() else "")

    def _planned(self, times: NDArray[np.float64], *, holds: bool) -> NDArray[np.float64]:
        """(M, n) positions at these times by what is known now; they are fixed by it."""
        assert self._spline is not None
        planned = self._spline.planned
        beyond = np.maximum(0.0, planned - self._path[-1][0])
        trusted = np.ones(len(planned)) if holds else np.maximum(_LEAST_TRUST, np.exp(-beyond / _TRUSTED))
        self._spline.steer(self.wanted(planned), trusted)
        position = self._spline.at(times).position
        self._spline.advance(max(0, math.ceil((times[-1] - self._spline.time) / self._spline.knot - 1e-6)))
        return position

    def _told(
        self, times: NDArray[np.float64], position: NDArray[np.float64], delta: NDArray[np.float64],
        behind: NDArray[np.float64], held: NDArray[np.bool_], reason: str,
    ) -> Commands:  # fmt: skip
        columns = list(self.grippers)
        return Commands(
            joint_names=self.joint_names, action_space=self.action_space, time=times, position=position, delta=delta,
            velocity=delta * self.control_rate, behind=behind, held=held, reason=reason, gripper_joints=self.grippers,
            gripper_range=np.stack([self.limits.lower[columns], self.limits.upper[columns]], axis=1),
        )  # fmt: skip
