"""The asynchronous control loop on frames that encode poses: tracking error of each mode, and failures of the planner."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from copy import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_control_decoder import POSE_RANGE, RATE, ROBOT, PixelPoseStream, concatenate, idm, make_decoder, picture
from test_control_spline import limit_usage

from jidm.control import MODES, ActionDecoder, AsyncController, Commands, ControlConfig, MotionLimits
from jidm.errors import InputError

CHUNK, COMMANDS_PER_FRAME = 4, 4


def pose(frame: torch.Tensor) -> np.ndarray:
    return (frame[0, 0, : ROBOT.n].double().numpy() * 2 - 1) * POSE_RANGE


def reference(frames: float | np.ndarray) -> np.ndarray:
    """Desired joint positions after this many frames."""
    t = np.asarray(frames)[..., None] / RATE
    waves = 0.5 * ROBOT.exploration_range * np.sin(
        2 * np.pi * 0.15 * t + np.arange(ROBOT.n)
    ) - 0.5 * ROBOT.exploration_range * np.sin(np.arange(ROBOT.n))
    return ROBOT.home + np.where(ROBOT.gripper_mask, 0.0, waves)


class ReferencePlanner:
    """Generates CHUNK frames along the reference; an offset of the given frame is removed linearly on the way."""

    def __init__(self) -> None:
        self.chunk = 0

    def __call__(self, frame: torch.Tensor) -> np.ndarray:
        done, self.chunk = self.chunk * CHUNK, self.chunk + 1
        offset = pose(frame) - reference(done)
        return np.stack([picture(reference(done + k) + offset * (1 - k / CHUNK)) for k in range(1, CHUNK + 1)])


class DelayedExecutor(Executor):
    """Runs calls at once and delivers their results after this many control periods."""

    def __init__(self, periods: int) -> None:
        self.periods, self.waiting = periods, []

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append([self.periods, future, call(*args, **kwargs)])
        return future

    def tick(self) -> None:
        for item in self.waiting:
            item[0] -= 1
        for item in [x for x in self.waiting if x[0] <= 0]:
            item[1].set_result(item[2])
            self.waiting.remove(item)


class Robot:
    """Executes 95 % of every step."""

    def __init__(self) -> None:
        self.q = np.array(ROBOT.home)

    def send(self, command: Commands) -> None:
        self.q = self.q + 0.95 * command.delta[0]


class DriftingStream(PixelPoseStream):
    """Integrates steps from the given initial pose and underestimates each by 5 %, so that it drifts."""

    def __init__(self, frame: torch.Tensor, q0: object) -> None:
        super().__init__(frame, None)
        self.offset = torch.as_tensor(q0) - self.q

    def push(self, frame: torch.Tensor, time: float) -> SimpleNamespace:
        step = super().push(frame, time)
        self.offset = self.offset - 0.05 * step.delta_q
        step.position = step.position + self.offset
        return step


def drifting_decoder() -> ActionDecoder:
    drifting = copy(idm())
    drifting.stream = lambda frame, *, time, q0=None: DriftingStream(frame, q0)  # type: ignore[method-assign, assignment]
    return ActionDecoder(drifting, ControlConfig(video_rate=RATE))


def exact_model(frame: torch.Tensor, q: np.ndarray, steps: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture(pose(frame) + steps.sum(0))).permute(2, 0, 1).float()


def short_model(frame: torch.Tensor, q: np.ndarray, steps: np.ndarray) -> torch.Tensor:
    """Errs by a fraction of the motion, as a warp by a field does."""
    return exact_model(frame, q, 0.7 * steps)


NEVER = 10**9  # control periods until a comparison is available


def run(
    mode: str, chunks: int = 24, *, forward_model: Any = exact_model, compare: int = 3
) -> tuple[float, int, np.ndarray]:
    """Mean error at the end of each chunk [rad], control periods needed, and all commanded steps."""
    planning, comparison, robot = DelayedExecutor(CHUNK * COMMANDS_PER_FRAME), DelayedExecutor(compare), Robot()
    controller = AsyncController(
        ReferencePlanner(),
        drifting_decoder(),
        mode=mode,
        forward_model=forward_model,
        planning_executor=planning,
        comparison_executor=comparison,
    )
    controller.reset(picture(robot.q), robot.q)
    errors, sent, moving, periods = [], [], 0, 0
    while len(errors) < chunks:
        command = controller.step(picture(robot.q), robot.q)
        robot.send(command)
        planning.tick()
        comparison.tick()
        sent.append(command.delta[0])
        periods += 1
        moving += not command.holding[0]
        if not command.holding[0] and moving % (CHUNK * COMMANDS_PER_FRAME) == 0:
            errors.append(np.abs(robot.q - reference(len(errors) * CHUNK + CHUNK)).max())
    return float(np.mean(errors[3:])), periods, np.stack(sent)


def test_grounded_tracks_as_sync_does_at_twice_its_pace() -> None:
    found = {mode: run(mode) for mode in MODES}
    error = {mode: value[0] for mode, value in found.items()}
    pace = {mode: 1 / value[1] for mode, value in found.items()}
    assert error["async_naive"] > 2 * error["sync"]
    blind = run("sync", compare=NEVER)[0]
    assert error["async_grounded"] < 1.3 * blind
    # Comparison helps sync more, because its chunks start at the robot's pose.
    assert error["async_grounded"] < 1.4 * error["sync"]
    assert pace["async_grounded"] > 1.8 * pace["sync"]


def test_comparison_corrects_tracking_drift_and_forward_model_error() -> None:
    for mode, model in (("sync", exact_model), ("async_grounded", short_model)):
        compared, blind = (run(mode, forward_model=model, compare=periods)[0] for periods in (3, NEVER))
        assert compared < 0.75 * blind, (mode, compared, blind)
    sync = run("sync", compare=NEVER)[0]
    assert compared < 1.6 * sync and blind > 2 * sync


@pytest.mark.parametrize("mode", MODES)
def test_no_limit_is_exceeded(mode: str) -> None:
    deltas = run(mode, chunks=10)[2]
    assert limit_usage(deltas.cumsum(0) + ROBOT.home, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1


class FailingPlanner(ReferencePlanner):
    """Works, except in the given chunks."""

    def __init__(self, how: Callable[[np.ndarray], Any], when: range) -> None:
        super().__init__()
        self.how, self.when = how, when

    def __call__(self, frame: torch.Tensor) -> Any:
        frames = super().__call__(frame)
        return self.how(frames) if self.chunk in self.when else frames


def fails(frames: np.ndarray) -> Any:
    raise RuntimeError("CUDA out of memory")


def exits(frames: np.ndarray) -> Any:
    raise SystemExit(3)


WRONG = {
    "raises": (fails, "RuntimeError: CUDA out of memory"),
    "exits": (exits, "SystemExit"),
    "of another size": (lambda x: x[:, :5], "the planner's frames"),
    "no video": (lambda x: "frames", "the planner failed"),
    "nothing": (lambda x: x[:0], "the planner failed"),
    "not finite": (lambda x: x * np.nan, "frame"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", WRONG)
def test_a_failing_planner_leads_to_hold_and_is_called_again(mode: str, how: str) -> None:
    breaks, words = WRONG[how]
    planning, robot = DelayedExecutor(3), Robot()
    controller = AsyncController(
        FailingPlanner(breaks, range(4, 7)),
        make_decoder(),
        mode=mode,
        forward_model=exact_model,
        planning_executor=planning,
    )
    controller.reset(picture(robot.q), robot.q)
    commands = []
    for _ in range(250):
        commands.append(controller.step(picture(robot.q), robot.q))
        robot.send(commands[-1])
        planning.tick()
    commanded = concatenate(commands)
    assert any(words in command.reason for command in commands)
    moves = [bool(np.abs(command.velocity).max() > 0.02) for command in commands]
    assert not all(command.holding[0] for command in commands[-60:]) and any(moves[-60:])
    assert limit_usage(commanded.delta.cumsum(0) + ROBOT.home, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1


class BrokenExecutor(DelayedExecutor):
    """Refuses, cancels or loses some of the calls."""

    def __init__(self, how: str, when: range) -> None:
        super().__init__(3)
        self.how, self.when, self.calls = how, when, 0

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls += 1
        if self.calls not in self.when:
            return super().submit(call, *args, **kwargs)
        if self.how == "shut down":
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        if self.how == "canceled":
            future.cancel()
        else:
            future.set_exception(RuntimeError("a process died"))
        return future


@pytest.mark.parametrize("which", ["planning", "comparison"])
@pytest.mark.parametrize(
    ("how", "words"), [("shut down", "after shutdown"), ("canceled", "CancelledError"), ("lost", "a process died")]
)
def test_an_executor_that_fails_leads_to_hold_or_to_no_comparison(how: str, words: str, which: str) -> None:
    broken, works, robot = BrokenExecutor(how, range(2, 9)), DelayedExecutor(3), Robot()
    planning, comparison = (broken, works) if which == "planning" else (works, broken)
    controller = AsyncController(
        ReferencePlanner(),
        make_decoder(),
        forward_model=exact_model,
        planning_executor=planning,
        comparison_executor=comparison,
    )
    controller.reset(picture(robot.q), robot.q)
    commands = []
    for _ in range(150):
        commands.append(controller.step(picture(robot.q), robot.q))
        robot.send(commands[-1])
        planning.tick()
        comparison.tick()
    assert broken.calls > 8 and not commands[-1].holding[0]
    assert any(x.holding[0] and words in x.reason for x in commands) == (which == "planning")
    deltas = concatenate(commands).delta
    assert limit_usage(deltas.cumsum(0) + ROBOT.home, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1


def test_a_forward_model_that_gives_nothing_is_a_planner_that_fails() -> None:
    planning, robot = DelayedExecutor(3), Robot()
    controller = AsyncController(
        ReferencePlanner(), make_decoder(), forward_model=lambda *_: None, planning_executor=planning  # type: ignore[arg-type, return-value]
    )  # fmt: skip
    controller.reset(picture(robot.q), robot.q)
    commands = []
    for _ in range(60):
        commands.append(controller.step(picture(robot.q), robot.q))
        planning.tick()
    assert any("the planner failed" in x.reason for x in commands)


def test_a_planner_may_write_into_its_frame() -> None:
    class Scribbler(ReferencePlanner):
        def __call__(self, frame: torch.Tensor) -> np.ndarray:
            frames = super().__call__(frame)
            frame.fill_(float("nan"))
            return frames

    planning = DelayedExecutor(1)
    controller = AsyncController(Scribbler(), make_decoder(), mode="sync", planning_executor=planning)
    controller.reset(picture(ROBOT.home), ROBOT.home)
    controller.step()
    assert bool(controller._frame.isfinite().all())


BAD_INPUTS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], tuple[Any, Any]], str]] = {
    "robot reports NaN": (lambda frame, q: (frame, q * np.nan), "not finite"),
    "robot reports too few": (lambda frame, q: (frame, q[:3]), "8 joint positions"),
    "robot reports degrees": (lambda frame, q: (frame, np.rad2deg(q)), "degrees"),
    "robot reports nothing usable": (lambda frame, q: (None, "moving"), "8 joint positions"),
    "frame of another size": (lambda frame, q: (frame[:5], q), "first one was"),
    "frame of another type": (lambda frame, q: ("frame", q), "camera's frame"),
    "frame without pixels": (lambda frame, q: (frame[:0], q), "camera's frame"),
    "frame of NaN": (lambda frame, q: (frame * np.nan, q), "not finite"),
}


@pytest.mark.parametrize(
    ("what", "mode"),
    [("robot reports NaN", mode) for mode in MODES] + [(x, "async_grounded") for x in list(BAD_INPUTS)[1:]],
)
def test_bad_frames_and_states_brake_the_robot_in_mid_motion(what: str, mode: str) -> None:
    spoil, words = BAD_INPUTS[what]
    planning, robot = DelayedExecutor(3), Robot()
    controller = AsyncController(
        ReferencePlanner(), make_decoder(), mode=mode, forward_model=exact_model, planning_executor=planning
    )
    controller.reset(picture(robot.q), robot.q)
    commands, bad = [], range(42, 90)  # begins within a frame period
    for k in range(200):
        given = picture(robot.q), robot.q
        commands.append(controller.step(*(spoil(*given) if k in bad else given)))
        robot.send(commands[-1])
        planning.tick()
    braking = commands[42 + COMMANDS_PER_FRAME : 90]
    assert all(x.holding[0] and words in x.reason for x in braking)
    assert np.abs(commands[41].velocity).max() > 0.05 > 1e-3 > np.abs(commands[89].velocity).max()
    assert any(not x.holding[0] and np.abs(x.velocity).max() > 0.05 for x in commands[90:])
    deltas = concatenate(commands).delta
    assert limit_usage(deltas.cumsum(0) + ROBOT.home, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1


def test_a_dead_planner_leads_to_rest_and_states_the_waiting_time() -> None:
    planning, robot = DelayedExecutor(10**9), Robot()
    controller = AsyncController(
        ReferencePlanner(), make_decoder(), forward_model=exact_model, planning_executor=planning
    )
    controller.reset(picture(robot.q), robot.q)
    commands = [controller.step(picture(robot.q), robot.q) for _ in range(60)]
    assert all(command.holding[0] and "waiting for the planner since" in command.reason for command in commands)
    assert np.abs(concatenate(commands).velocity).max() < 1e-6


def test_it_plans_in_its_own_thread_and_reports_timings() -> None:
    threads: set[str] = set()
    done = threading.Event()

    class WatchedPlanner(ReferencePlanner):
        def __call__(self, frame: torch.Tensor) -> np.ndarray:
            threads.add(threading.current_thread().name)
            done.set()
            return super().__call__(frame)

    robot = Robot()
    controller = AsyncController(WatchedPlanner(), make_decoder(), forward_model=exact_model)
    controller.reset(picture(robot.q), robot.q)
    controller.step()
    assert done.wait(10)
    for _ in range(2000):
        if not controller.step().holding[0]:
            break
    assert threads == {"planner_0"}
    report = controller.report()
    assert all(part in report for part in ("plan", "measure", "track", "step")) and "p99" in report


def test_without_measurements_the_commanded_positions_are_used() -> None:
    planning = DelayedExecutor(1)
    controller = AsyncController(
        ReferencePlanner(),
        make_decoder(action_space="joint_position"),
        forward_model=exact_model,
        planning_executor=planning,
    )
    controller.reset(picture(ROBOT.home), ROBOT.home)
    commands = []
    for _ in range(100):
        commands.append(controller.step())
        planning.tick()
    assert not commands[-1].holding[0]
    assert limit_usage(concatenate(commands).position, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="async_grounded"):
        AsyncController(ReferencePlanner(), make_decoder(), mode="async")
