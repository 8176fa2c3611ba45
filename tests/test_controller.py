"""The control loop, in a world where pictures are poses: who tracks how well, and what happens when a planner does not."""

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
from test_decoder import RATE, REACH, ROBOT, _joined, _Written, decoder, idm, picture
from test_decoder_spline import _exceeded

from jidm.control import MODES, ActionDecoder, AsyncController, Commands, MotionLimits
from jidm.errors import InputError

K, EACH = 4, 4  # frames of a dream, commands of a frame


def pose(frame: torch.Tensor) -> np.ndarray:
    return (frame[0, 0, : ROBOT.n].double().numpy() * 2 - 1) * REACH


def reference(frames: float | np.ndarray) -> np.ndarray:
    """Where the robot should be after so many frames."""
    t = np.asarray(frames)[..., None] / RATE
    waves = 0.5 * ROBOT.exploration_range * np.sin(
        2 * np.pi * 0.15 * t + np.arange(ROBOT.n)
    ) - 0.5 * ROBOT.exploration_range * np.sin(np.arange(ROBOT.n))
    return ROBOT.home + np.where(ROBOT.gripper_mask, 0.0, waves)


class Dreamer:
    """Dreams K frames along the reference; what is off in the frame it begins with is made good on the way."""

    def __init__(self) -> None:
        self.chunk = 0

    def __call__(self, frame: torch.Tensor) -> np.ndarray:
        done, self.chunk = self.chunk * K, self.chunk + 1
        off = pose(frame) - reference(done)
        return np.stack([picture(reference(done + k) + off * (1 - k / K)) for k in range(1, K + 1)])


class Later(Executor):
    """Runs what it is given at once and hands it over after so many control periods."""

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
    """Does nearly what it is told."""

    def __init__(self) -> None:
        self.q = np.array(ROBOT.home)

    def send(self, command: Commands) -> None:
        self.q = self.q + 0.95 * command.delta[0]


class Drifting(_Written):
    """Follows what moves from where it is told to begin, and reads every step too short, as any following of steps drifts."""

    def __init__(self, frame: torch.Tensor, q0: object) -> None:
        super().__init__(frame, None)
        self.off = torch.as_tensor(q0) - self.q

    def push(self, frame: torch.Tensor, time: float) -> SimpleNamespace:
        step = super().push(frame, time)
        self.off = self.off - 0.05 * step.delta_q
        step.position = step.position + self.off
        return step


def drifting() -> ActionDecoder:
    reads = copy(idm())
    reads.stream = lambda frame, *, time, q0=None: Drifting(frame, q0)  # type: ignore[method-assign, assignment]
    return ActionDecoder(reads, video_rate=RATE)


def forward(frame: torch.Tensor, q: np.ndarray, steps: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture(pose(frame) + steps.sum(0))).permute(2, 0, 1).float()


def short(frame: torch.Tensor, q: np.ndarray, steps: np.ndarray) -> torch.Tensor:
    """As a field errs: by a share of the motion."""
    return forward(frame, q, 0.7 * steps)


NEVER = 10**9  # periods until a comparison is there


def run(mode: str, chunks: int = 40, *, carry: Any = forward, compare: int = 3) -> tuple[float, int, np.ndarray]:
    """Mean distance from the reference at the end of each chunk [rad], control periods needed, everything commanded."""
    late, soon, dreamer, robot = Later(K * EACH), Later(compare), Dreamer(), Robot()
    controller = AsyncController(
        dreamer, drifting(), mode=mode, forward_model=carry, planning_executor=late, comparison_executor=soon
    )
    controller.reset(picture(robot.q), robot.q)
    errors, sent, moving, periods = [], [], 0, 0
    while len(errors) < chunks:
        command = controller.step(picture(robot.q), robot.q)
        robot.send(command)
        late.tick()
        soon.tick()
        sent.append(command.delta[0])
        periods += 1
        moving += not command.holding[0]
        if not command.holding[0] and moving % (K * EACH) == 0:
            errors.append(np.abs(robot.q - reference(len(errors) * K + K)).max())
    return float(np.mean(errors[3:])), periods, np.stack(sent)


def test_grounded_tracks_as_sync_does_at_twice_its_pace() -> None:
    found = {mode: run(mode) for mode in MODES}
    error = {mode: value[0] for mode, value in found.items()}
    pace = {mode: 1 / value[1] for mode, value in found.items()}
    assert error["async_naive"] > 2 * error["sync"]
    blind = run("sync", compare=NEVER)[0]
    assert error["async_grounded"] < 1.3 * blind
    # Comparing gains sync more, whose dreams begin where the robot is.
    assert error["async_grounded"] < 1.4 * error["sync"]
    assert pace["async_grounded"] > 1.8 * pace["sync"]


def test_what_reading_and_the_forward_model_err_is_made_good_by_comparing() -> None:
    for mode, carry in (("sync", forward), ("async_grounded", short)):
        compared, blind = (run(mode, carry=carry, compare=periods)[0] for periods in (3, NEVER))
        assert compared < 0.75 * blind, (mode, compared, blind)
    sync = run("sync", compare=NEVER)[0]
    assert compared < 1.6 * sync and blind > 2 * sync


@pytest.mark.parametrize("mode", MODES)
def test_no_limit_is_exceeded(mode: str) -> None:
    deltas = run(mode, chunks=10)[2]
    assert _exceeded(deltas.cumsum(0) + ROBOT.home, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1


class Broken(Dreamer):
    """Dreams well, except in the chunks named."""

    def __init__(self, how: Callable[[np.ndarray], Any], when: range) -> None:
        super().__init__()
        self.how, self.when = how, when

    def __call__(self, frame: torch.Tensor) -> Any:
        dream = super().__call__(frame)
        return self.how(dream) if self.chunk in self.when else dream


def fails(dream: np.ndarray) -> Any:
    raise RuntimeError("CUDA out of memory")


WRONG = {
    "raises": (fails, "RuntimeError: CUDA out of memory"),
    "of another size": (lambda x: x[:, :5], "the planner's frames"),
    "no video": (lambda x: "frames", "the planner failed"),
    "nothing": (lambda x: x[:0], "the planner failed"),
    "not finite": (lambda x: x * np.nan, "frame"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", WRONG)
def test_a_planner_that_fails_leads_to_hold_and_is_asked_again(mode: str, how: str) -> None:
    breaks, words = WRONG[how]
    late, robot = Later(3), Robot()
    controller = AsyncController(
        Broken(breaks, range(4, 7)), decoder(), mode=mode, forward_model=forward, planning_executor=late
    )
    controller.reset(picture(robot.q), robot.q)
    commands = []
    for _ in range(250):
        commands.append(controller.step(picture(robot.q), robot.q))
        robot.send(commands[-1])
        late.tick()
    told = _joined(commands)
    assert any(words in command.reason for command in commands)
    moves = [bool(np.abs(command.velocity).max() > 0.02) for command in commands]
    assert not all(command.held[0] for command in commands[-60:]) and any(moves[-60:])
    assert _exceeded(told.delta.cumsum(0) + ROBOT.home, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1


def test_a_dead_planner_leads_to_rest_and_says_how_long() -> None:
    late, robot = Later(10**9), Robot()
    controller = AsyncController(Dreamer(), decoder(), forward_model=forward, planning_executor=late)
    controller.reset(picture(robot.q), robot.q)
    commands = [controller.step(picture(robot.q), robot.q) for _ in range(60)]
    assert all(command.holding[0] and "waiting for the planner since" in command.reason for command in commands)
    assert np.abs(_joined(commands).velocity).max() < 1e-6


def test_it_plans_in_a_thread_of_its_own_and_reports_where_time_goes() -> None:
    threads: set[str] = set()
    done = threading.Event()

    class Watched(Dreamer):
        def __call__(self, frame: torch.Tensor) -> np.ndarray:
            threads.add(threading.current_thread().name)
            done.set()
            return super().__call__(frame)

    robot = Robot()
    controller = AsyncController(Watched(), decoder(), forward_model=forward)
    controller.reset(picture(robot.q), robot.q)
    controller.step()
    assert done.wait(10)
    for _ in range(2000):
        if not controller.step().holding[0]:
            break
    assert threads == {"planner_0"}
    report = controller.report()
    assert all(part in report for part in ("plan", "read", "follow", "step")) and "p99" in report


def test_without_measurements_commands_are_believed() -> None:
    late = Later(1)
    controller = AsyncController(
        Dreamer(), decoder(action_space="joint_position"), forward_model=forward, planning_executor=late
    )
    controller.reset(picture(ROBOT.home), ROBOT.home)
    commands = []
    for _ in range(100):
        commands.append(controller.step())
        late.tick()
    assert not commands[-1].held[0]
    assert _exceeded(_joined(commands).position, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="async_grounded"):
        AsyncController(Dreamer(), decoder(), mode="async")
