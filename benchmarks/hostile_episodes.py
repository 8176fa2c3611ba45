"""Random episodes of a decoder, a control loop and a server session in which everything goes wrong; each a function of its seed.

Most episodes have a stand-in for the IDM. Its frames encode joint positions and a fault in pixels, and it measures what
they encode: jumps, poses far outside, NaN, wrong shapes, or nothing, because it raises. Black frames and noise thus encode
hostile measurements. In a share of the episodes a real field measures rendered frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from motion_check import CommandRecord
from numpy.typing import NDArray

from jidm import Embodiment, load_embodiment
from jidm.control import MODES, ActionDecoder, AsyncController, Commands, ControlConfig, MotionLimits
from jidm.errors import InputError, JidmError
from jidm.estimation.agreement import NOT_MEASURED
from jidm.serving import Handshake, Session, pack, unpack

Array = NDArray[Any]
Rng = np.random.Generator
HEIGHT, WIDTH = 8, 16
KINDS = ("decoder", "controller", "session")
ROBOTS = {
    "planar_finger_1": 0.34, "planar_finger_2": 0.28, "piper": 0.1, "panda": 0.12, "mobile_gripper": 0.12, "allegro_right": 0.04,
}  # fmt: skip
FIELDS = ("finger-5", "analytic")
ACTION_SPACES = ("joint_velocity", "joint_position", "joint_delta")
LIMITS = ("lower", "upper", "velocity", "acceleration", "jerk")
_PLAN_COST = 0.6  # planned control points times joints that one episode may cost, in thousands


# ---- robots ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Robot:
    """A robot: an embodiment, or names and limits alone."""

    name: str
    embodiment: Embodiment | None
    joint_names: tuple[str, ...]
    limits: MotionLimits
    home: Array

    @property
    def n(self) -> int:
        """Number of joints."""
        return len(self.joint_names)

    @property
    def plain_limits(self) -> dict[str, Array]:
        """The limits as the check takes them."""
        return {name: getattr(self.limits, name) for name in LIMITS}

    @property
    def pose_range(self) -> tuple[Array, Array]:
        """(n,), (n,) finite ends of each joint's range."""
        return np.maximum(self.limits.lower, -4.0), np.minimum(self.limits.upper, 4.0)

    @property
    def encoded_range(self) -> tuple[Array, Array]:
        """(n,), (n,) what black and white pixels encode: poses outside of the range, too."""
        low, high = self.pose_range
        return low - 0.5 * (high - low), high + 0.5 * (high - low)


@cache
def robot(name: str) -> Robot:
    """A registered robot, or a mobile base with a lift and a gripper, given by limits alone."""
    if name == "mobile_gripper":
        inf = np.inf
        limits = MotionLimits(
            np.array([-inf, -inf, -inf, 0.0, 0.0]), np.array([inf, inf, inf, 0.6, 0.04]), np.array([0.5, 0.5, 1.5, 0.2, 0.1]),
            np.array([1.0, 1.0, 4.0, 1.0, 2.0]), np.array([20.0, 20.0, 80.0, 30.0, 100.0]),
        )  # fmt: skip
        return Robot(name, None, ("x", "y", "yaw", "lift", "gripper"), limits, np.array([0.0, 0.0, 0.0, 0.3, 0.02]))
    body = load_embodiment(name)
    return Robot(name, body, body.joint_names, MotionLimits.from_embodiment(body), np.array(body.home))


# ---- the stand-in for the IDM ---------------------------------------------------------------------------------------

_MEASUREMENTS: tuple[Callable[[Array, Array], tuple[Any, Any]], ...] = (
    lambda q, step: (q, step),
    lambda q, step: (_ for _ in ()).throw(RuntimeError("out of memory")),
    lambda q, step: (None, None),  # not accepted
    lambda q, step: (q * np.nan, step),
    lambda q, step: (q, step * np.nan),
    lambda q, step: (q, step + np.inf),
    lambda q, step: (q + 10.0, step),
    lambda q, step: (q - 1e6, step),
    lambda q, step: (q + 1e300, step + 1e300),
    lambda q, step: (q * 0 + 1e308, -step - 1e308),
    lambda q, step: (q, step + 1e8),
    lambda q, step: (q, -10 * step),
    lambda q, step: (np.append(q, 0.0), np.append(step, 0.0)),
    lambda q, step: (q[:0], step[:0]),
    lambda q, step: (q[None], step[None]),
    lambda q, step: (_ for _ in ()).throw(RuntimeError()),
)
NUM_MEASUREMENTS = len(_MEASUREMENTS)


def encode(one: Robot, q: Array, fault: int = 0) -> Array:
    """(HEIGHT, WIDTH, 3) in [0, 1]: joint positions q (n,), and which measurement the stand-in makes of them."""
    low, high = one.encoded_range
    frame = np.zeros((HEIGHT, WIDTH, 3))
    frame[0, : one.n, 0] = ((q - low) / (high - low)).clip(0, 1)
    frame[0, 0, 1] = fault / NUM_MEASUREMENTS
    return frame


class StandInStream:
    """Measures what frames encode."""

    agreement = NOT_MEASURED

    def __init__(self, one: Robot, frame: torch.Tensor, q0: Any) -> None:
        self._robot, self._shape = one, frame.shape
        position, _ = self._measured(frame, np.zeros(one.n))
        if position is None:
            raise RuntimeError("no robot")
        self.q = torch.as_tensor(position if q0 is None else np.array(q0))
        self._last = np.array(self.decode(frame) if q0 is None else q0)

    def decode(self, frame: torch.Tensor) -> Array:
        """(n,) joint positions."""
        low, high = self._robot.encoded_range
        return low + frame[0, 0, : self._robot.n].double().numpy() * (high - low)

    def _measured(self, frame: torch.Tensor, step: Array) -> tuple[Any, Any]:
        code = float(frame[1, 0, 0])
        fault = round(code * NUM_MEASUREMENTS) % NUM_MEASUREMENTS if np.isfinite(code) else 2
        return _MEASUREMENTS[fault](self.decode(frame), step)

    def push(self, frame: torch.Tensor, time: float) -> SimpleNamespace:
        """As `MotionStream.push`, but whatever was measured is returned."""
        if frame.shape != self._shape:
            raise ValueError("another size")
        q = self.decode(frame)
        position, step = self._measured(frame, q - self._last)
        if position is None:
            return SimpleNamespace(
                accepted=False, valid=False, position=self.q, delta_q=0 * self.q, agreement=NOT_MEASURED
            )
        self._last = q if np.isfinite(q).all() else self._last
        position, step = torch.tensor(position), torch.tensor(step)
        return SimpleNamespace(accepted=True, valid=True, position=position, delta_q=step, agreement=NOT_MEASURED)

    def correct(self, q: Any) -> None:
        """As `MotionStream.correct`."""
        self._last = np.array(q)


class StandInIDM:
    """What `ActionDecoder` and `Session` need of an IDM."""

    def __init__(self, one: Robot) -> None:
        self._robot, self.embodiment, self.joint_names = one, one.embodiment, one.joint_names
        self.field: Any = None
        self.checkpoint: dict[str, Any] = {}

    def stream(self, frame: torch.Tensor, *, time: float = 0.0, q0: Any = None) -> StandInStream:
        """As `JacobianIDM.stream`."""
        return StandInStream(self._robot, frame, q0)


# ---- hostile values -------------------------------------------------------------------------------------------------


class Scene:
    """Source of frames, and of the IDM that measures them; the stand-in's frames encode poses."""

    def __init__(self, one: Robot, idm: Any = None) -> None:
        self.robot = one
        self.idm: Any = idm or StandInIDM(one)
        self.max_frames = 1000  # at once

    def frame(self, rng: Rng, q: Array) -> Array:
        """(H, W, 3) in [0, 1]: the robot at q, or, now and then, a frame that gives a hostile measurement."""
        return encode(self.robot, q, int(rng.integers(NUM_MEASUREMENTS)) if rng.random() < 0.15 else 0)


def pick(rng: Rng, some: Any) -> Any:
    """One of them."""
    return some[int(rng.integers(len(some)))]


def pose(rng: Rng, one: Robot) -> Array:
    """(n,) a pose of the robot."""
    low, high = one.pose_range
    return rng.uniform(low, high)


def next_pose(rng: Rng, one: Robot, q: Array) -> Array:
    """(n,) the pose after q: near, far, at a limit, or outside."""
    low, high = one.pose_range
    kind = rng.integers(8)
    if kind == 0:
        return pose(rng, one)
    if kind == 1:
        return np.where(rng.random(one.n) < 0.5, low, high)
    if kind == 2:
        return rng.uniform(*one.encoded_range)
    return q + rng.normal(0, 0.02, one.n) * (high - low)


FRAME_FAULTS: dict[str, Callable[[Rng, Array], Any]] = {
    "black": lambda rng, x: np.zeros_like(x),
    "noise": lambda rng, x: rng.random(x.shape),
    "white": lambda rng, x: np.ones_like(x),
    "gray": lambda rng, x: np.full_like(x, 0.5),
    "NaN": lambda rng, x: np.where(rng.random(x.shape) < pick(rng, (0.01, 1.0)), np.nan, x),
    "infinite": lambda rng, x: x + np.inf,
    "cut off": lambda rng, x: x[: pick(rng, (0, 1, x.shape[0] // 2))],
    "other camera": lambda rng, x: np.zeros((x.shape[0] * 2, x.shape[1] + 3, 3)),
    "channels": lambda rng, x: np.zeros((*x.shape[:2], pick(rng, (0, 1, 2, 4, 7)))),
    "two axes": lambda rng, x: x[..., 0],
    "six axes": lambda rng, x: x[None, None, None],
    "bytes": lambda rng, x: (x * 255).astype(np.uint8),
    "of 1e6": lambda rng, x: x * 1e6,
    "negative": lambda rng, x: x - 2,
    "half": lambda rng, x: x.astype(np.float16),
    "channels first": lambda rng, x: np.moveaxis(x, -1, 0),
    "complex": lambda rng, x: x + 1j,
    "objects": lambda rng, x: x.astype(object),
    "text": lambda rng, x: "frame",
    "none": lambda rng, x: None,
    "ragged": lambda rng, x: [x, x[:3]],
    "map": lambda rng, x: {"image": x},
}
POSE_FAULTS: dict[str, Callable[[Rng, Robot, Array], Any]] = {
    "NaN": lambda rng, one, q: np.where(np.arange(one.n) == rng.integers(one.n), np.nan, q),
    "infinite": lambda rng, one, q: np.where(np.arange(one.n) == rng.integers(one.n), pick(rng, (-np.inf, np.inf)), q),
    "outside": lambda rng, one, q: one.pose_range[1] + rng.uniform(0.11, 3, one.n) + np.where(np.isinf(one.limits.upper), 1000, 0),
    "too many": lambda rng, one, q: np.append(q, 0.0),
    "none at all": lambda rng, one, q: np.zeros(0),
    "two rows": lambda rng, one, q: np.stack([q, q]),
    "1e308": lambda rng, one, q: np.full(one.n, pick(rng, (-1e308, 1e308))),
    "text": lambda rng, one, q: "moving",
    "letters": lambda rng, one, q: ["a"] * one.n,
    "a map": lambda rng, one, q: {"q": q},
    "huge integers": lambda rng, one, q: [10**400] * one.n,
    "with a gradient": lambda rng, one, q: torch.tensor(q, requires_grad=True) * np.nan,
}  # fmt: skip
"""All of them are no pose of the robot."""


def bad_pose(rng: Rng, one: Robot, q: Array) -> Any:
    """What a robot may report in place of its pose."""
    return pick(rng, list(POSE_FAULTS.values()))(rng, one, q)


def spoiled(rng: Rng, frame: Array, counts: Counter[str]) -> Any:
    """What comes in place of a frame."""
    name = pick(rng, list(FRAME_FAULTS))
    counts[f"frame: {name}"] += 1
    return FRAME_FAULTS[name](rng, frame)


# ---- episodes -------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """What all kinds of episodes have.

    Attributes:
        cost: planning still allowed, in plans.
    """

    rng: Rng
    scene: Scene
    config: ControlConfig
    record: CommandRecord
    counts: Counter[str]
    cost: float
    fault_share: float

    @property
    def robot(self) -> Robot:
        """The robot."""
        return self.scene.robot

    @property
    def plan_length(self) -> int:
        """Commands per plan."""
        return max(1, int(np.ceil(self.config.control_rate / self.config.video_rate)))

    def faulty(self) -> bool:
        """Whether the next thing goes wrong."""
        return bool(self.rng.random() < self.fault_share)

    def sent(self, commands: Any, *, promised: int | None = None) -> None:
        """Commands go to the robot."""
        self.record.add(commands, promised=promised)
        self.cost -= 0.2 + len(commands if isinstance(commands, Commands) else commands["action"]) / self.plan_length

    def refusing(self, what: str, call: Callable[[], Any], *, must: bool | None) -> Any:
        """Call it; only an `InputError` may come, and must (True), must not (False) or may come (None)."""
        try:
            answer = call()
        except InputError as error:
            if must is False or not str(error):
                self.record.broken("refused", f"{what}: {error}")
            return None
        except Exception as error:
            self.record.broken("raises", f"{what}: {type(error).__name__}: {error}")
            return None
        if must:
            self.record.broken("accepted", f"{what} was not refused")
        return answer


def make_episode(seed: int, number: int, *, kind: str = "", field: str = "", cost: float = 1.0) -> tuple[str, Episode]:
    """Episode `number` and its kind.

    Args:
        seed: of the run.
        kind: of `KINDS`; random if not given.
        field: a real field of `FIELDS` in place of the stand-in.
        cost: factor on the length of the episode.
    """
    rng = np.random.default_rng([seed, number])
    kind = kind or pick(rng, KINDS)
    if field:
        from hostile_scenes import real_scene

        scene: Scene = real_scene(field)
        scene.restart(number % 3)  # type: ignore[attr-defined]
    else:
        scene = Scene(robot(str(rng.choice(list(ROBOTS), p=list(ROBOTS.values())))))
    one = scene.robot
    control = float(pick(rng, (10, 12.5, 30, 50, 70, 100, 250, 500, 1000, rng.uniform(10, 1000))))
    video = float(pick(rng, (5, 12.5, 12.5, 16, 30, 60, control, rng.uniform(1, 200))))
    horizon = float(pick(rng, (0.12, 0.16, 0.24, 0.4, 0.8) if one.n < 4 else (0.12, 0.16, 0.24)))
    config = ControlConfig(
        video_rate=video, control_rate=control, chunk=int(pick(rng, (1, 1, 1, 2, 7, rng.integers(1, 100), 1000))),
        action_space=pick(rng, ACTION_SPACES), bandwidth=float(pick(rng, (0.5, 4.0, 4.0, 20.0))), horizon=max(horizon, 1.3 / control),
        max_tracking_error=pick(rng, (None, None, 0.02, 0.5)),
    )  # fmt: skip
    record = CommandRecord(one.plain_limits, control, config.action_space)
    plans = _PLAN_COST * 1000 / one.n / max(5.0, 50 * config.horizon)
    share = float(pick(rng, (0.05, 0.2, 0.5)))
    return kind, Episode(rng, scene, config, record, Counter(), cost * min(60.0, max(4.0, plans)), share)


def run_episode(seed: int, number: int, **options: Any) -> tuple[str, Episode]:
    """Run episode `number`; its record holds what was broken."""
    kind, episode = make_episode(seed, number, **options)
    {"decoder": run_decoder, "controller": run_controller, "session": run_session}[kind](episode)
    episode.record.finish()
    return kind, episode


# ---- the decoder ----------------------------------------------------------------------------------------------------


def run_decoder(e: Episode) -> None:
    """Frames, reported poses and everything else a program does with a decoder, in any order."""
    rng = e.rng
    decoder = ActionDecoder(e.scene.idm, e.config, limits=e.robot.limits)
    motion = _DecoderMotion(e, decoder)
    motion.reset()
    actions = (motion.push,) * 8 + (
        motion.hold, motion.observe, motion.observe, motion.start_video, motion.shift, motion.part, motion.drop, motion.reset, motion.stop,
    )  # fmt: skip
    for _ in range(60):
        if e.cost <= 0:
            break
        (motion.push if rng.random() < 0.6 else pick(rng, actions))()
    if motion.known:
        e.sent(decoder.trajectory.hold(3, "the end"), promised=3)


class _DecoderMotion:
    """A decoder under test."""

    def __init__(self, e: Episode, decoder: ActionDecoder) -> None:
        self.e, self.decoder, self.q = e, decoder, pose(e.rng, e.robot)

    @property
    def known(self) -> bool:
        """Whether the decoder knows where the robot is."""
        return self.decoder.trajectory.position is not None

    def reset(self) -> None:
        """At a pose, at a pose slightly outside, at none, or unknown."""
        e, rng, one = self.e, self.e.rng, self.e.robot
        if e.faulty():
            wrong = bad_pose(rng, one, self.q)
            e.refusing("reset", lambda: self.decoder.reset(wrong), must=True)
        start: Array | None = pose(rng, one)
        if rng.random() < 0.2:
            low, high = one.pose_range
            slack = np.minimum(0.05 * (high - low), 0.1) * 0.99
            start = pick(rng, (high, low)) + rng.uniform(-1, 1, one.n) * slack
        if rng.random() < 0.2:
            start = None
        self.decoder.reset(start)
        e.record.restart(start)
        self.q = pose(rng, one) if start is None or rng.random() < 0.2 else start
        e.counts["resets"] += 1

    def frames(self) -> Any:
        """One frame or several, good ones and others."""
        e, rng = self.e, self.e.rng
        count = int(pick(rng, (1, 1, 1, 1, 2, 5, 17)))
        if e.config.chunk == 1000 and not e.counts["pushes of 1,000 frames"] and rng.random() < 0.002:
            count = 1000
            e.counts["pushes of 1,000 frames"] += 1
        count = min(count, e.scene.max_frames)
        frames = []
        for _ in range(count):
            self.q = next_pose(rng, e.robot, self.q)
            frames.append(e.scene.frame(rng, self.q))
        e.counts["frames"] += count
        if count == 1:
            return spoiled(rng, frames[0], e.counts) if e.faulty() else frames[0]
        for k in range(count):
            if e.faulty():
                name = pick(rng, ("black", "noise", "NaN", "white"))
                e.counts[f"frame: {name}"] += 1
                frames[k] = FRAME_FAULTS[name](rng, frames[k])
        video: Any = np.stack(frames)
        if rng.random() < 0.05:
            video = pick(rng, (video[:0], video[..., :2], video[None], list(video), video.astype(np.float32), video[0]))
        return video

    def push(self) -> None:
        """Frames, perhaps with the robot's pose."""
        e, rng = self.e, self.e.rng
        frames, q = self.frames(), None
        if rng.random() < 0.3:
            q = bad_pose(rng, e.robot, self.q) if e.faulty() else pose(rng, e.robot)
        unknown = e.config.action_space == "joint_position" and not self.known
        commands = e.refusing("push", lambda: self.decoder.push(frames, q=q), must=unknown)
        if commands is not None:
            e.sent(commands)

    def part(self) -> None:
        """Measured in one thread, executed piece by piece."""
        e, rng = self.e, self.e.rng
        if not self.known:
            return
        measurements = self.decoder.pose_tracker.measure(self.frames())[:40]
        self.decoder.trajectory.append(measurements, blend=int(rng.integers(4)))
        for _ in range(3):
            until = self.decoder.trajectory.time + rng.uniform(-0.1, 0.3)
            e.sent(self.decoder.trajectory.next(pick(rng, (until, until, None))))

    def hold(self) -> None:
        """No frame came."""
        e, count = self.e, int(self.e.rng.integers(0, 3 * self.e.plan_length))
        commands = e.refusing("hold", lambda: self.decoder.trajectory.hold(count), must=not self.known)
        if commands is not None:
            e.sent(commands, promised=count)

    def observe(self) -> None:
        """The robot reports its pose, of some time."""
        e, rng, trajectory = self.e, self.e.rng, self.decoder.trajectory
        wrong = e.faulty()
        q = bad_pose(rng, e.robot, self.q) if wrong else pose(rng, e.robot)
        if not wrong and self.known and rng.random() < 0.7:
            assert trajectory.position is not None
            q = np.clip(trajectory.position + rng.normal(0, 0.05, e.robot.n), *e.robot.pose_range)
        now = trajectory.time
        time = pick(rng, (None, None, None, now, now - rng.uniform(0, 1), now - 5.0, now + 1.0, np.nan, -np.inf))
        error = e.refusing("observe", lambda: trajectory.observe(q, time=time), must=True if wrong else None)
        if error is not None:
            # An old report tells how far the robot was from its command of that time.
            e.record.reported(q if time is None else trajectory.position + 2 * error + 1.0)

    def start_video(self) -> None:
        """A new video of the planner's; the motion goes on."""
        e, rng = self.e, self.e.rng
        wrong = e.faulty()
        q = bad_pose(rng, e.robot, self.q) if wrong else pick(rng, (None, pose(rng, e.robot)))
        e.refusing("start_video", lambda: self.decoder.start_video(q), must=wrong)

    def shift(self) -> None:
        """The reference is corrected."""
        e, rng = self.e, self.e.rng
        offset = rng.normal(0, pick(rng, (0.01, 1.0, 1e6)), e.robot.n)
        wrong = e.faulty()
        e.refusing(
            "shift", lambda: self.decoder.trajectory.shift_reference(offset * np.nan if wrong else offset), must=wrong
        )

    def drop(self) -> None:
        """The rest of the reference is forgotten."""
        self.decoder.trajectory.drop_reference()

    def stop(self) -> None:
        """The robot is stopped for good, until the next reset."""
        if self.e.rng.random() < 0.2:
            self.decoder.trajectory.stop("a person is in the way")


# ---- the control loop -----------------------------------------------------------------------------------------------


class LateExecutor(Executor):
    """Delivers results after some control periods: late, never, as an exception, or canceled."""

    def __init__(self, rng: Rng, fault_share: float) -> None:
        self._rng, self._fault_share = rng, fault_share
        self._waiting: list[list[Any]] = []

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call it now, deliver later."""
        future: Future[Any] = Future()
        rng = self._rng
        if rng.random() < 0.1 * self._fault_share:
            raise RuntimeError("cannot schedule new futures after shutdown")
        delay = int(pick(rng, (0, 1, 3, 10, 10**9 if rng.random() < 0.3 else 2)))
        outcome = rng.integers(12) if rng.random() < self._fault_share else 5
        if outcome == 0:
            future.cancel()
            future.set_running_or_notify_cancel()
            return future
        if outcome == 1:
            self._waiting.append([delay, future.set_exception, RuntimeError("the worker died")])
        else:
            self._waiting.append([delay, future.set_result, call(*args, **kwargs)])
        if delay == 0:
            self._deliver()
        return future

    def tick(self) -> None:
        """A control period passed."""
        for item in self._waiting:
            item[0] -= 1
        self._deliver()

    def _deliver(self) -> None:
        for item in [x for x in self._waiting if x[0] <= 0]:
            item[1](item[2])
            self._waiting.remove(item)


class HostilePlanner:
    """Generates frames, or something else."""

    def __init__(self, e: Episode) -> None:
        self.e, self.q = e, np.array(e.robot.home)

    def __call__(self, frame: torch.Tensor) -> Any:
        e, rng = self.e, self.e.rng
        count = int(pick(rng, (1, 2, 4, 4, 8, 16, 1000 if rng.random() < 0.1 else 5)))
        count = min(count, e.scene.max_frames)
        e.counts["chunks of 1,000 frames"] += count == 1000
        frames = []
        for _ in range(count):
            self.q = next_pose(rng, e.robot, self.q)
            frames.append(e.scene.frame(rng, self.q))
        if e.faulty():
            for k in range(0, count, 3):
                frames[k] = FRAME_FAULTS[pick(rng, ("black", "noise", "NaN", "white"))](rng, frames[k])
        video: Any = np.stack(frames)
        if not e.faulty():
            return video
        kind = int(rng.integers(13))
        e.counts["planner faults"] += 1
        if kind == 0:
            raise RuntimeError("CUDA out of memory")
        if kind == 1:
            raise SystemExit(3)
        if kind == 2:
            raise RuntimeError
        if kind == 3:
            frame.fill_(float("nan"))  # its input belongs to the controller
            return video
        others = (
            None, "video", video[:0], video[:, :3], video[..., :2], video * np.nan, video[0], list(video), video[None], {"video": video},
        )  # fmt: skip
        return pick(rng, others)


def run_controller(e: Episode) -> None:
    """A control loop with a hostile planner, robot and camera."""
    rng, one = e.rng, e.robot
    decoder = ActionDecoder(e.scene.idm, e.config, limits=one.limits)
    executors = LateExecutor(rng, e.fault_share), LateExecutor(rng, e.fault_share)

    def forward_model(frame: torch.Tensor, q: Array, steps: Array) -> Any:
        if not e.faulty():
            return frame
        kind = rng.integers(4)
        if kind == 0:
            raise RuntimeError("no field")
        return (frame * torch.nan, frame[:, :3], None)[kind - 1]

    controller = AsyncController(
        HostilePlanner(e), decoder, mode=pick(rng, MODES), blend=int(rng.integers(5)), forward_model=forward_model,
        planning_executor=executors[0], comparison_executor=executors[1],
    )  # fmt: skip
    q = pose(rng, one)
    if e.faulty():
        wrong = bad_pose(rng, one, q)
        e.refusing("reset", lambda: controller.reset(e.scene.frame(rng, q), wrong), must=True)
    controller.reset(e.scene.frame(rng, q), q)
    e.record.restart(q)
    frame_period, steps = e.plan_length, 0
    gain = float(pick(rng, (1.0, 0.95, 0.5, 1.2)))
    burst = 0
    while e.cost > 0 and steps < 400:
        steps += 1
        frame: Any = e.scene.frame(rng, q) if rng.random() < (1 / frame_period if rng.random() < 0.8 else 1) else None
        report: Any = q if rng.random() < 0.7 else None
        if burst > 0 or rng.random() < 0.2 * e.fault_share:
            burst = burst - 1 if burst > 0 else int(rng.integers(20))
            what = rng.integers(4)
            if what == 0:
                frame = spoiled(rng, e.scene.frame(rng, q), e.counts)
            elif what == 1:
                report = bad_pose(rng, one, q)
                e.counts["robot faults"] += 1
            elif what == 2:
                report = pose(rng, one)  # plausible and wrong
            else:
                frame, report = spoiled(rng, e.scene.frame(rng, q), e.counts), bad_pose(rng, one, q)
        command = e.refusing("step", partial(controller.step, frame, report), must=False)
        if command is None:
            e.cost -= 0.2
            continue
        with suppress(Exception):
            # Whether the controller compared this report, and with which command, is its own affair.
            e.record.reported(np.asarray(report, dtype=np.float64) if report is not None else q)
            shifts = e.record._shifts
            if e.record._sent and len(e.record._sent) in shifts:
                shifts[len(e.record._sent)] = np.full(one.n, np.inf)
        before = e.record.holding
        e.record.add(command, promised=1)
        first_of_plan = e.record.holding > before or steps % frame_period == 0
        e.cost -= 1.0 if first_of_plan else 0.02
        q = np.clip(q + gain * command.delta[0], *one.pose_range)
        for executor in executors:
            executor.tick()
    e.counts["control periods"] += steps


# ---- the server's session -------------------------------------------------------------------------------------------


class RecordingSession(Session):
    """Keeps the commands of its last answer: LingBot's answers hold poses of the end effector instead."""

    last: Commands | None = None

    def _commands(self, observations: Any, frames: Any) -> tuple[Commands, int]:
        self.last, initial = super()._commands(observations, frames)
        return self.last, initial


def run_session(e: Episode) -> None:
    """Messages of a client, through the codec."""
    rng, one = e.rng, e.robot
    lingbot = one.name in ("panda", "piper") and rng.random() < 0.4
    if lingbot:
        ratio = int(pick(rng, (1, 2, 4)))
        settings = {
            **vars(e.config),
            "chunk": 1,
            "control_rate": e.config.control_rate,
            "video_rate": e.config.control_rate / ratio,
        }
        e.config = ControlConfig(**settings)
    handshake = Handshake(layout="lingbot_va", side="left") if lingbot else Handshake()
    session = RecordingSession(ActionDecoder(e.scene.idm, e.config, limits=one.limits), handshake)
    pack(session.metadata)
    client = _Client(e, session, lingbot=lingbot)
    client.reset()
    for _ in range(60):
        if e.cost <= 0:
            break
        kind = rng.integers(12)
        if kind == 0 and rng.random() < 0.4:
            client.reset()
        elif kind == 1:
            client.observe()
        elif kind == 2:
            client.nonsense()
        elif kind == 3:
            client.real_frames()
        elif lingbot and kind < 9:
            client.lingbot_frames()
        else:
            client.frames()


class _Client:
    """A client of a session."""

    def __init__(self, e: Episode, session: RecordingSession, *, lingbot: bool) -> None:
        self.e, self.session, self.lingbot, self.q, self.fresh = e, session, lingbot, pose(e.rng, e.robot), True
        self.start: Array | None = None

    def send(self, message: dict[str, Any]) -> Any:
        """The answer, or None where the message is refused with one line."""
        try:
            packed = pack(message)
        except InputError:
            return None  # it cannot be sent
        try:
            return unpack(pack(self.session.handle(unpack(packed))))
        except JidmError as error:
            if not str(error) or "\n" in str(error):
                self.e.record.broken("reason", f"refused by {str(error)!r}")
        except Exception as error:
            self.e.record.broken("raises", f"{type(error).__name__}: {error}")
        return None

    def reset(self) -> None:
        """A new episode, with or without a pose."""
        e, rng = self.e, self.e.rng
        self.q = pose(rng, e.robot)
        start = pick(rng, (None, self.q, self.q))
        message: dict[str, Any] = {"reset": True, "prompt": "x"} if self.lingbot else {"endpoint": "reset"}
        if e.faulty():
            answer = self.send({**message, "q": bad_pose(rng, e.robot, self.q)})
            if answer is not None:
                e.record.broken("accepted", "a reset with a bad pose")
        if self.send(message if start is None else {**message, "q": start}) is None:
            e.record.broken("refused", "a reset with a good pose, or none")
        e.record.restart(start)
        self.fresh, self.start = True, start

    def observation(self, *, several: bool = True) -> dict[str, Any]:
        """Images, perhaps with a pose."""
        e, rng = self.e, self.e.rng
        count = min(int(pick(rng, (1, 1, 1, 4, 17, 70) if several else (1,))), e.scene.max_frames)
        frames = []
        for _ in range(count):
            self.q = next_pose(rng, e.robot, self.q)
            frames.append(e.scene.frame(rng, self.q).astype(np.float32))
        e.counts["frames"] += count
        image: Any = frames[0] if count == 1 else np.stack(frames)
        if e.faulty():
            image = spoiled(rng, frames[0], e.counts)
        message: dict[str, Any] = {"image": image}
        if rng.random() < 0.4:
            q = bad_pose(rng, e.robot, self.q) if e.faulty() else pose(rng, e.robot)
            message[pick(rng, ("q", "state", "observation/state", "qpos"))] = q
        return message

    def frames(self) -> None:
        """As openpi's client sends them."""
        answer = self.exchange(self.observation())
        if answer is not None and not len(answer["actions"]):
            self.e.record.broken("count", "an answer without an action")

    def lingbot_frames(self) -> None:
        """As LingBot-VA's client sends them."""
        several = [self.observation(several=False) for _ in range(int(self.e.rng.integers(1, 5)))]
        obs: Any = [{"cam" if k == "image" else k: v for k, v in x.items()} for x in several]
        self.exchange({"obs": pick(self.e.rng, (obs, obs, obs, obs[0], [], [3]))})

    def exchange(self, message: dict[str, Any]) -> Any:
        """Send observations; what is answered goes to the robot."""
        e = self.e
        self.session.last = None
        known_before = self.session.decoder.trajectory.position
        answer = self.send(message)
        obs = message.get("obs", message)
        observations = [x for x in (obs if isinstance(obs, list) else [obs]) if isinstance(x, dict)]
        states = [v for x in observations for k, v in x.items() if k not in ("image", "cam")]
        if known_before is not None:
            for state in states:
                with suppress(Exception):
                    q = np.asarray(state, dtype=np.float64)
                    if q.shape == (e.robot.n,) and np.isfinite(q).all():
                        e.record.reported(q)
        if answer is None:
            return None
        if self.fresh and (stated := [v for k, v in observations[0].items() if k not in ("image", "cam")]):
            # The first answered observation states where the robot is.
            e.record.restart(np.asarray(stated[0], dtype=np.float64).reshape(-1))
        self.fresh = False
        if "actions" in answer:
            self.e.sent({**answer, "action": answer["actions"], "delta": None, "velocity": None})
        elif "action" in answer:
            self._sent_lingbot(answer)
        return answer

    def _sent_lingbot(self, answer: dict[str, Any]) -> None:
        """The answer holds poses of the end effector; joints are checked in what it was made of."""
        e, action, commands = self.e, answer["action"], self.session.last
        assert commands is not None
        if not np.isfinite(action).all():
            e.record.broken("finite", "the end effector's pose is not finite")
        if np.abs(np.linalg.norm(action[3:7], axis=0) - 1).max(initial=0.0) > 1e-6:
            e.record.broken("consistency", "no unit quaternion")
        if action[0].size < len(commands):
            e.record.broken("count", f"{action[0].size} actions for {len(commands)} commands")
        e.sent(commands)

    def real_frames(self) -> None:
        """What the robot's camera saw, as LingBot-VA's client sends it back."""
        obs = [{"cam" if k == "image" else k: v for k, v in self.observation(several=False).items()}]
        self.send({"obs": obs, "compute_kv_cache": True, "state": np.zeros((8, 1, 4))})

    def observe(self) -> None:
        """Reported poses, of times that go backwards."""
        e, rng = self.e, self.e.rng
        wrong = e.faulty()
        q = bad_pose(rng, e.robot, self.q) if wrong else pose(rng, e.robot)
        message: dict[str, Any] = {"endpoint": "observe", "q": q}
        if rng.random() < 0.6:
            now = self.session.decoder.trajectory.time
            message["time"] = pick(
                rng, (now, now - rng.uniform(0, 2), -1.0, 1e300, float("nan"), True, "now", None, [0.0])
            )
        answer = self.send(message)
        if answer is not None:
            if wrong:
                e.record.broken("accepted", "a bad pose was observed")
            e.record.reported(q + 1e3 if "time" in message else q)

    def nonsense(self) -> None:
        """No message of any client."""
        rng = self.e.rng
        frame = self.e.scene.frame(rng, self.q).astype(np.float32)
        answer = self.send(pick(rng, (
            {}, {"endpoint": "go"}, {"endpoint": 3}, {"image": frame, "stat": [0.0]}, {"image": frame, "image2": frame},
            {"obs": 3}, {"obs": {}}, {"obs": [{"cam": frame}], "layout": "x"}, {"image": frame, "state": [[1.0], [2.0]]},
            {"image": {"image": {"image": "x"}}}, {"reset": 1}, {"endpoint": None}, {"image": frame, "gripper_position": [0.5]},
        )))  # fmt: skip
        if answer is not None and answer:
            self.e.record.broken("accepted", "nonsense was answered")
