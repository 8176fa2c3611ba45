"""The action decoder: frames in, commands at a controller's rate out, continuous whatever the frames do."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from jidm.adapters.decoder.commands import ActionSpace, Commands, as_action_space
from jidm.adapters.decoder.limits import MotionLimits
from jidm.adapters.decoder.spline import LimitedSpline
from jidm.errors import InputError, VideoError
from jidm.motion.layout import as_video

if TYPE_CHECKING:
    from jidm.idm import JacobianIDM, MotionStream

_KNOT = 0.02  # [s] the motion may change its mind so often; finer than any video
_GOES_ON = 0.15  # [s] beyond the last frame a joint is expected to keep its velocity for about so long
_TRUSTED = 0.08  # [s] and that is trusted for about so long
_LEAST_TRUST = 0.02
_INSTANT = 1e-6  # [s] nearer times are the same
_HISTORY = 4  # frames that the path is drawn through
_REMEMBERED = 2.0  # [s] of commands that measured positions may be compared with


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

    Raises:
        InputError: the robot is unknown and no limits are given, or a rate is not positive.
    """

    def __init__(
        self, idm: JacobianIDM, *, video_rate: float = 12.5, control_rate: float = 50.0, chunk: int = 1,
        action_space: str = "joint_velocity", limits: MotionLimits | None = None, bandwidth: float = 4.0,
        ahead: float = 0.8, most_behind: float | None = None,
    ) -> None:  # fmt: skip
        if not all(math.isfinite(rate) and rate > 0 for rate in (video_rate, control_rate)):
            raise InputError(f"video_rate and control_rate must be positive, got {video_rate} and {control_rate}")
        if chunk < 1:
            raise InputError(f"a chunk has at least one frame, got {chunk}")
        robot = idm.embodiment
        if limits is None:
            if robot is None:
                raise InputError("this checkpoint names no robot whose limits are known: pass limits=MotionLimits(...)")
            limits = MotionLimits.of(robot)
        if limits.n != len(idm.joint_names):
            raise InputError(f"limits are of {limits.n} joints, the field moves {len(idm.joint_names)}")
        self.idm, self.limits = idm, limits
        self.video_rate, self.control_rate, self.chunk = video_rate, control_rate, chunk
        self.action_space: ActionSpace = as_action_space(action_space)
        self.bandwidth, self.ahead, self.most_behind = bandwidth, ahead, most_behind
        self._grippers = () if robot is None else tuple(int(k) for k in np.flatnonzero(robot.gripper_mask))
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
        self._spline: LimitedSpline | None = None if start is None else self._new_spline(start)
        self._count = 0  # commands given
        self._shown = 0.0  # [s of the motion] up to here frames have told what to do
        self._path: list[tuple[float, NDArray[np.float64]]] = []  # times and positions that the motion is drawn through
        self._speed = np.zeros(self.limits.n)
        self._sent: deque[NDArray[np.float64]] = deque(maxlen=max(1, round(_REMEMBERED * self.control_rate)))
        self._stopped = ""
        if start is not None:
            self._path.append((0.0, start))
        self.begin(q)

    def begin(self, q: ArrayLike | None = None) -> None:
        """The next frame begins a new video, a planner's next dream for instance; the robot's motion goes on as it was.

        Args:
            q: (n,) what the joints are in that frame [rad or m]; read off the picture if not given.

        Raises:
            InputError: q is not n finite numbers.
        """
        self._start = None if q is None else self._checked(q)
        self._stream: MotionStream | None = None
        self._frame = 0
        self._waiting: list[Tensor] = []

    @property
    def time(self) -> float:
        """Up to here commands were given [s of the motion]."""
        return self._count / self.control_rate

    @property
    def position(self) -> NDArray[np.float64] | None:
        """(n,) where the last command leads [rad or m]; None where nothing is known of the robot yet."""
        return None if self._spline is None else self._spline.at(self.time).position[0]

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
        if self.action_space == "joint_position" and self._spline is None:
            raise InputError("positions are commanded from where the robot is: tell it by reset(q=...)")
        reasons: list[str] = []
        try:
            self._waiting += list(_frames(frames, layout))
        except VideoError as error:
            self._shown = self._next_time()
            reasons.append(str(error))
        if len(self._waiting) >= self.chunk + (self._stream is None and self.chunk > 1):
            reasons += filter(None, map(self._seen, self._waiting))
            self._waiting = []
        if measured is not None and self._stream is not None and not reasons:
            self._stream.told(measured)
            self._path[-1] = (self._path[-1][0], measured)
        return self._commands(self._shown, "; ".join(dict.fromkeys(reasons)))

    def coast(self, count: int, reason: str = "no frame came") -> Commands:
        """So many commands without a frame: the motion is braked and the robot kept where it comes to rest.

        Raises:
            InputError: nothing is known of the robot yet.
        """
        if self._spline is None:
            raise InputError("nothing is known of the robot yet: reset(q=...) or push a frame first")
        return self._commands(self.time + count / self.control_rate, reason)

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
        measured = self._checked(q)
        back = self._count - round((self.time if time is None else time) * self.control_rate)
        if self._spline is None or not 0 <= back < len(self._sent):
            raise InputError(f"no command of the last {_REMEMBERED} s ends at {time} s")
        off = measured - self._sent[-1 - back]
        if self.action_space != "joint_position":
            self._spline.move_by(off)
            self._sent = deque((sent + off for sent in self._sent), maxlen=self._sent.maxlen)
        furthest = int(np.abs(off).argmax())
        if self.most_behind is not None and abs(off[furthest]) > self.most_behind:
            here = self._spline.at(self.time)
            self._path.clear()
            self._path.append((self.time, here.position[0]))
            self._speed = here.velocity[0]
            self._stopped = f"{self.idm.joint_names[furthest]} is {abs(off[furthest]):.3g} from where it was sent; reset(q) to go on"
        return float(abs(off[furthest]))

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _checked(self, q: ArrayLike) -> NDArray[np.float64]:
        values = np.array(q, dtype=np.float64)
        if values.shape != (self.limits.n,) or not np.isfinite(values).all():
            raise InputError(f"q must be {self.limits.n} finite joint positions, got {values}")
        return values

    def _new_spline(self, q: NDArray[np.float64]) -> LimitedSpline:
        period = 1 / self.control_rate
        knot = period * round(_KNOT / period) if period < _KNOT else period / math.ceil(period / _KNOT - 1e-9)
        return LimitedSpline(self.limits, q, knot=knot, ahead=self.ahead, bandwidth=self.bandwidth)

    def _next_time(self) -> float:
        """When the next frame is reached: a period after the last one, or after what was held since."""
        return max(self._shown, self.time) + 1 / self.video_rate

    def _seen(self, frame: Tensor) -> str:
        """Take the pose of a frame into the path; why not, if it cannot be."""
        number, self._frame = self._frame, self._frame + 1
        began = self._stream is not None
        self._shown = self._next_time() if began or self._stopped else max(self._shown, self.time)
        if self._stopped:
            return self._stopped
        try:
            if self._stream is None:
                self._stream = self.idm.stream(frame, time=number / self.video_rate, q0=self._start)
                q, speed = self._stream.q, None
            else:
                step = self._stream.push(frame, number / self.video_rate)
                if not step.used:
                    return f"frame {number} shows nothing that can be followed"
                q, speed = step.position, step.delta_q
        except Exception as error:  # whatever goes wrong with a picture, the robot is braked
            return f"frame {number}: {str(error) or type(error).__name__}"
        position = q.double().cpu().numpy()
        if not np.isfinite(position).all():
            return f"frame {number} tells positions that are not finite"
        if self._spline is None:
            self._spline = self._new_spline(position)
        if self._path and self.time > self._path[-1][0] + _INSTANT:  # it was held since
            self._path.append((self.time, self._spline.at(self.time).position[0]))
        if self._path and self._shown < self._path[-1][0] + _INSTANT:
            self._path.pop()
        self._path.append((self._shown, position))
        self._speed = np.zeros(self.limits.n) if speed is None else speed.double().cpu().numpy() * self.video_rate
        return ""

    def _commands(self, until: float, reason: str) -> Commands:
        """The commands up to a time, a frame's period at once: what is further off is planned when it is nearer."""
        last = math.floor(until * self.control_rate + 1e-6)
        if self._spline is None or last <= self._count:
            none = np.zeros((0, self.limits.n))
            return self._told(np.zeros(0), none, none, none, np.zeros(0, dtype=bool), reason)
        before = self._spline.at(self.time).position
        times = np.arange(self._count + 1, last + 1) / self.control_rate
        held = times > (-math.inf if self._stopped else self._path[-1][0]) + _INSTANT
        behind, position = np.where(held[:, None], 0.0, self._wanted(times)), np.zeros((len(times), self.limits.n))
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
        self._spline.steer(self._wanted(planned), trusted)
        position = self._spline.at(times).position
        self._spline.advance(max(0, math.ceil((times[-1] - self._spline.time) / self._spline.knot - 1e-6)))
        return position

    def _wanted(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M, n) where the frames want the joints; beyond the last one they come to rest as they were going."""
        known, q = zip(*self._path, strict=True)
        beyond = np.maximum(0.0, times - known[-1])[:, None]
        inside = np.clip(times, known[0], known[-1])
        path = PchipInterpolator(known, np.stack(q))(inside) if len(known) > 1 else np.repeat(q, len(times), axis=0)
        return np.asarray(path + self._speed * _GOES_ON * (1 - np.exp(-beyond / _GOES_ON)))

    def _told(
        self, times: NDArray[np.float64], position: NDArray[np.float64], delta: NDArray[np.float64],
        behind: NDArray[np.float64], held: NDArray[np.bool_], reason: str,
    ) -> Commands:  # fmt: skip
        grippers = list(self._grippers)
        ends = np.stack([self.limits.lower[grippers], self.limits.upper[grippers]], axis=1)
        return Commands(
            joint_names=self.idm.joint_names, action_space=self.action_space, time=times, position=position, delta=delta,
            velocity=delta * self.control_rate, behind=behind, held=held, reason=reason, gripper_joints=self._grippers,
            gripper_range=ends,
        )  # fmt: skip


def _frames(frames: Any, layout: str | None) -> Float[Tensor, "T 3 H W"]:
    """One frame or several.

    Raises:
        VideoError: they are none.
    """
    single = len(getattr(frames, "shape", ())) == 3 and not {"T", "F"} & set(layout or "")
    named = f"T{layout}" if single and layout is not None else layout
    video = as_video(frames[None] if single else frames, layout=named)
    if video.dim() != 4:
        raise VideoError(f"one video at a time: got frames of shape {tuple(video.shape)}")
    return video
