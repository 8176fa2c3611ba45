"""Laws of the action decoder, on frames that encode their joint positions in pixels."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_control_spline import limit_usage

from jidm import JacobianIDM
from jidm.control import ActionDecoder, Commands, ControlConfig, MotionLimits
from jidm.errors import Cancelled, InputError, VideoError
from jidm.estimation.agreement import NOT_MEASURED
from jidm.robot.registry import load_embodiment

RATE = 12.5
ROBOT = load_embodiment("panda")
POSE_RANGE = 4.0  # [rad] pixel values from 0 to 1 encode -POSE_RANGE to POSE_RANGE


class PixelPoseStream:
    """A stream that decodes the poses that `picture` encodes."""

    def __init__(self, frame: torch.Tensor, q0: object) -> None:
        self.agreement = NOT_MEASURED
        self.q, self._shape = self._decode(frame) if q0 is None else torch.as_tensor(q0), frame.shape

    @staticmethod
    def _decode(frame: torch.Tensor) -> torch.Tensor:
        return (frame[0, 0, : ROBOT.n].double() * 2 - 1) * POSE_RANGE

    def push(self, frame: torch.Tensor, time: float) -> SimpleNamespace:
        if frame.shape != self._shape:
            raise VideoError("another size")
        if float(frame[2, 0, 0]) == 1:
            raise RuntimeError("out of memory")
        accepted = bool(frame.isfinite().all())
        before, self.q = self.q, self._decode(frame) if accepted else self.q
        return SimpleNamespace(
            accepted=accepted, valid=accepted, position=self.q, delta_q=self.q - before, agreement=self.agreement
        )

    def correct(self, q: np.ndarray) -> None:
        self.q = torch.as_tensor(q)


def picture(q: np.ndarray) -> np.ndarray:
    """(8, 12, 3) in [0, 1]."""
    frame = np.zeros((8, 12, 3))
    frame[0, : ROBOT.n, 0] = (q / POSE_RANGE + 1) / 2
    return frame


@cache
def idm() -> JacobianIDM:
    idm = JacobianIDM.from_embodiment("panda", points=10)
    idm.stream = lambda frame, *, time, q0=None: PixelPoseStream(frame, q0)  # type: ignore[method-assign, assignment]
    return idm


def make_decoder(**given: object) -> ActionDecoder:
    return ActionDecoder(idm(), ControlConfig(**{"video_rate": RATE, **given}))  # type: ignore[arg-type]


def motion(seconds: float = 4.0, seed: int = 0, speed: float = 1.0) -> np.ndarray:
    """(T, n) smooth positions around home at the video's rate."""
    rng = np.random.default_rng(seed)
    t = np.arange(0, seconds, 1 / RATE)[:, None]
    waves = rng.uniform(0.2, 1.0, (2, ROBOT.n)), rng.uniform(0, 6.3, (2, ROBOT.n))
    turned = [np.sin(2 * np.pi * f * speed * t * 0.5 + p) - np.sin(p) for f, p in zip(*waves)]
    q = ROBOT.home + ROBOT.exploration_range * 0.4 * sum(turned)
    return np.clip(q, ROBOT.lower + 0.001, ROBOT.upper - 0.001)


def run(decoder: ActionDecoder, q: np.ndarray, *, chunk: int = 1) -> Commands:
    """All commands for a video of these poses."""
    frames = np.stack([picture(x) for x in q])
    return concatenate([decoder.push(frames[k : k + chunk]) for k in range(0, len(frames), chunk)])


def concatenate(parts: list[Commands]) -> Commands:
    rows = ("time", "position", "delta", "velocity", "tracking_error", "holding")
    return replace(parts[0], **{name: np.concatenate([getattr(x, name) for x in parts]) for name in rows})


@pytest.mark.parametrize("control", [50.0, 30.0, 12.5, 10.0, 1000.0])
@pytest.mark.parametrize("chunk", [1, 4])
def test_commands_follow_the_video_at_any_rate(control: float, chunk: int) -> None:
    q = motion()
    decoder = make_decoder(control_rate=control)
    decoder.reset(q[0])
    commands = run(decoder, q, chunk=chunk)
    end = (len(q) - 1) / RATE
    np.testing.assert_allclose(commands.time, np.arange(1, int(end * control + 1e-6) + 1) / control)
    true = np.stack([np.interp(commands.time, np.arange(len(q)) / RATE, x) for x in q.T], 1)
    assert np.abs(commands.position - true).max() < 0.05 and not commands.holding.any() and commands.reason == ""
    assert np.sqrt(np.mean((commands.position - true) ** 2)) < 0.015 < np.std(true)


def test_the_three_action_spaces_describe_one_motion() -> None:
    q = motion()
    commands = {}
    for space in ("joint_velocity", "joint_position", "joint_delta"):
        decoder = make_decoder(action_space=space)
        decoder.reset(q[0])
        commands[space] = run(decoder, q)
    position = commands["joint_position"].action
    np.testing.assert_allclose(q[0] + np.cumsum(commands["joint_delta"].action, 0), position, atol=1e-9)
    np.testing.assert_allclose(q[0] + np.cumsum(commands["joint_velocity"].action, 0) / 50, position, atol=1e-9)
    assert commands["joint_delta"].action is commands["joint_delta"].delta


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [1, 4])
def test_no_video_makes_it_exceed_a_limit(seed: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    q = np.repeat(rng.uniform(-3, 3, (20, ROBOT.n)), 3, axis=0)
    decoder = make_decoder(control_rate=200.0)
    decoder.reset(ROBOT.home)
    commands = run(decoder, q, chunk=chunk)
    sent = np.concatenate([ROBOT.home[None], commands.position])
    assert np.abs(np.diff(sent, axis=0)).max() > 1e-3
    assert limit_usage(sent, MotionLimits.from_embodiment(ROBOT), 1 / 200) <= 1


def test_chunk_borders_are_no_rougher_than_chunks() -> None:
    q = motion(8.0)
    decoder = make_decoder(chunk=4)
    decoder.reset(q[0])
    commands = run(decoder, q)
    jump = np.abs(np.diff(commands.velocity, axis=0)).max(1)
    border = np.arange(15, len(jump), 16)
    assert jump[border].max() <= np.delete(jump, border).max()


def test_a_chunk_is_waited_for() -> None:
    q = motion()
    decoder = make_decoder(chunk=4)
    decoder.reset(q[0])
    given = [len(decoder.push(picture(x))) for x in q[:13]]
    assert given == [0, 0, 0, 0, 16, 0, 0, 0, 16, 0, 0, 0, 16]


def test_the_same_frames_give_the_same_commands_and_reset_forgets() -> None:
    q = motion()
    decoder = make_decoder()
    commands = []
    for _ in range(2):
        decoder.reset(q[0])
        commands.append(run(decoder, q))
    assert np.array_equal(commands[0].position, commands[1].position)


BAD = {
    "NaN": lambda x: x * np.nan,
    "another size": lambda x: np.zeros((4, 4, 3)),
    "no picture": lambda x: np.zeros((8, 12, 7)),
    "a crash": lambda x: np.concatenate([x[..., :2], np.ones_like(x[..., :1])], -1),
}


@pytest.mark.parametrize("wrong", BAD)
def test_frames_without_a_pose_brake_the_robot_and_state_a_reason(wrong: str) -> None:
    q = motion(6.0)
    decoder = make_decoder(control_rate=100.0)
    decoder.reset(q[0])
    parts, reasons = [], []
    for k, x in enumerate(q):
        parts.append(decoder.push(BAD[wrong](picture(x)) if 30 <= k < 45 else picture(x)))
        reasons.append(parts[-1].reason)
    assert all(reasons[30:45]) and not any(reasons[:30]) and not any(reasons[45:])
    assert [bool(x.holding.any()) for x in parts] == [bool(reason) for reason in reasons]
    commands = concatenate(parts)
    assert limit_usage(commands.position, MotionLimits.from_embodiment(ROBOT), 1 / 100) <= 1
    assert np.abs(parts[29].velocity).max() > 0.1 > 5e-3 > np.abs(parts[44].velocity).max()
    np.testing.assert_allclose(commands.position[-1], q[-1], atol=0.05)
    assert len(commands) == (len(q) - 1) * 8


MEASUREMENTS = {
    "of another robot": (lambda q: np.append(q, 0.0), "not of 8 joints"),
    "of nothing": (lambda q: q[:0], "not of 8 joints"),
    "in two rows": (lambda q: np.stack([q, q]), "not of 8 joints"),
    "of 1e300": (lambda q: q + 1e300, "a position of 1e[+]300"),
    "of 10,000 turns": (lambda q: q - 1e5, "a position of 1e[+]05"),
    "of NaN": (lambda q: q * np.nan, "not finite"),
}


@pytest.mark.parametrize("wrong", MEASUREMENTS)
def test_measurements_that_are_no_positions_brake_the_robot(wrong: str) -> None:
    change, words = MEASUREMENTS[wrong]
    q, decoder = motion(2.0), make_decoder()
    decoder.reset(q[0])
    parts = [decoder.push(picture(x)) for x in q[:15]]
    stream = decoder.pose_tracker._stream
    assert stream is not None
    good = stream.push
    stream.push = lambda frame, time: vary(good(frame, time), change)  # type: ignore[method-assign]
    parts += [decoder.push(picture(x)) for x in q[15:25]]
    assert all(re.search(words, x.reason) and x.holding.all() for x in parts[15:])
    assert limit_usage(concatenate(parts).position, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1


def vary(step: SimpleNamespace, change: object) -> SimpleNamespace:
    step.position = torch.as_tensor(change(step.position.numpy()))  # type: ignore[operator]
    step.delta_q = 0 * step.position
    return step


def test_a_start_that_was_measured_outside_its_range_is_taken_for_one_at_its_end() -> None:
    """The robot is not there, so that a way back into the range would lead it away from where it is."""
    decoder = make_decoder()
    outside = np.where(ROBOT.gripper_mask, 0.02, np.minimum(ROBOT.upper + 0.9, 3.9))
    commands = run(decoder, np.repeat(outside[None], 8, 0))
    assert len(commands) == 28 and np.abs(commands.velocity).max() < 1e-3
    assert (commands.position <= ROBOT.upper + 1e-6).all()


def test_a_measured_velocity_leads_no_further_than_the_robot_moves() -> None:
    inf = np.full(ROBOT.n, np.inf)
    decoder = ActionDecoder(
        idm(), ControlConfig(video_rate=RATE), limits=MotionLimits(-inf, inf, np.ones(ROBOT.n), inf, inf)
    )
    decoder.reset(ROBOT.home)
    decoder.push(picture(ROBOT.home))
    stream = decoder.pose_tracker._stream
    assert stream is not None
    stream.push = lambda frame, time: SimpleNamespace(  # type: ignore[method-assign, assignment, return-value]
        accepted=True,
        valid=True,
        position=torch.tensor(ROBOT.home),
        delta_q=torch.full((ROBOT.n,), 1e8),
        agreement=NOT_MEASURED,
    )
    decoder.push(picture(ROBOT.home))
    ahead = decoder.trajectory.reference([decoder.trajectory.horizon_end + 10.0])[0]
    np.testing.assert_allclose(ahead - ROBOT.home, 0.15, atol=1e-6)  # 1 rad/s that decays within .15 s


@pytest.mark.parametrize("wrong", BAD)
def test_a_new_video_that_begins_with_bad_frames_brakes_a_moving_robot(wrong: str) -> None:
    """Only the first frame takes no time, whether it was measured or not."""
    q, decoder = motion(3.0), make_decoder()
    decoder.reset(q[0])
    parts = [decoder.push(picture(x)) for x in q[:15]]
    decoder.start_video(q[14])
    video = [BAD[wrong](picture(q[14])) if k < 9 or wrong == "another size" else picture(q[14]) for k in range(12)]
    if wrong == "another size":
        video = [picture(q[14]) * np.nan] * 9 + video[9:]
    parts += [decoder.push(frame) for frame in video]
    assert [len(x) for x in parts[15:]] == [0] + 11 * [4]
    assert all(x.holding.all() and x.reason for x in parts[16:24])
    assert np.abs(parts[14].velocity).max() > 0.1 > 0.03 > np.abs(parts[23].velocity[-1]).max()
    assert limit_usage(concatenate(parts).position, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1


def test_bad_frames_before_the_robot_is_known_take_no_time() -> None:
    decoder = make_decoder()
    given = [len(decoder.push(picture(ROBOT.home) if k >= 50 else np.zeros((8, 12, 7)))) for k in range(53)]
    assert given == 51 * [0] + [4, 4]


def test_a_reason_stays_until_its_commands_are_given() -> None:
    decoder = make_decoder(chunk=4)
    decoder.reset(ROBOT.home)
    frames = [picture(ROBOT.home)] * 3 + [np.full((8, 12, 3), np.nan)] * 2
    decoder.trajectory.append([m for x in frames for m in decoder.pose_tracker.measure(x)])
    held = decoder.push(picture(ROBOT.home))  # an incomplete chunk adds nothing to the reference
    assert held.holding.tolist() == 8 * [False] + 8 * [True] and "nothing that can be tracked" in held.reason


def test_a_gripper_without_a_range_has_no_opening() -> None:
    given = MotionLimits.from_embodiment(ROBOT)
    unlimited = replace(given, upper=np.where(ROBOT.gripper_mask, np.inf, given.upper))
    decoder = ActionDecoder(idm(), ControlConfig(video_rate=RATE), limits=unlimited)
    decoder.reset(ROBOT.home)
    assert run(decoder, np.repeat(ROBOT.home[None], 3, 0)).gripper.shape == (8, 0)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_an_observer_that_fails_does_not_brake_the_robot(error: type[BaseException]) -> None:
    def observer(*_: object) -> None:
        raise error("no page")

    q = motion(1.0)
    commands = []
    for watched in (None, observer):
        decoder = make_decoder()
        decoder.pose_tracker.observer = watched
        decoder.reset(q[0])
        commands.append(run(decoder, q))
    np.testing.assert_array_equal(commands[0].action, commands[1].action)
    assert not commands[1].holding.any() and decoder.pose_tracker.observer is None


def test_cancelled_work_stops_before_its_next_frame() -> None:
    q, decoder, seen = motion(1.0), make_decoder(), []

    def observer(*given: object) -> None:
        seen.append(given)
        if len(seen) == 4:
            decoder.cancel()

    decoder.reset(q[0])
    decoder.pose_tracker.observer = observer
    with pytest.raises(Cancelled, match="before frame 4"):
        decoder.push(np.stack([picture(x) for x in q[:12]]), layout="THWC")
    assert len(seen) == 4
    with pytest.raises(Cancelled):
        decoder.push(picture(q[0]), layout="HWC")


def test_cancelled_planning_stops_before_its_next_frame_period(monkeypatch: pytest.MonkeyPatch) -> None:
    q, decoder, planned = motion(1.0), make_decoder(), []
    decoder.reset(q[0])
    plan = decoder.trajectory._plan

    def plan_and_cancel(*given: Any, **options: Any) -> Any:
        planned.append(given)
        decoder.cancel()
        return plan(*given, **options)

    monkeypatch.setattr(decoder.trajectory, "_plan", plan_and_cancel)
    with pytest.raises(Cancelled, match="before command 4"):
        decoder.push(np.stack([picture(x) for x in q[:12]]), layout="THWC")
    assert len(planned) == 1


def test_a_model_that_exits_brakes_the_robot(monkeypatch: pytest.MonkeyPatch) -> None:
    q, decoder = motion(1.0), make_decoder()
    decoder.reset(q[0])
    run(decoder, q[:4])

    def exits(*_: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(PixelPoseStream, "push", exits)
    commands = decoder.push(picture(q[4]), layout="HWC")
    assert commands.holding.all() and "frame 4: SystemExit: 3" in commands.reason


def test_frames_come_in_any_layout() -> None:
    q = motion(1.0)
    frames = np.stack([picture(x) for x in q])
    commands = []
    for layout, axes in ((None, (0, 1, 2)), ("HWC", (0, 1, 2)), ("CHW", (2, 0, 1)), ("WCH", (1, 2, 0))):
        decoder = make_decoder()
        decoder.reset(q[0])
        commands.append(concatenate([decoder.push(frame.transpose(axes), layout=layout) for frame in frames]).position)
    decoder = make_decoder()
    decoder.reset(q[0])
    commands.append(concatenate([decoder.push(frame[None], layout="THWC") for frame in frames]).position)
    assert all(np.array_equal(x, commands[0]) for x in commands) and len(commands[0]) == 4 * (len(q) - 1)


def test_bad_frames_inside_a_chunk_are_bridged() -> None:
    q = motion()
    frames = np.stack([picture(x) for x in q])
    frames[10] = np.nan
    decoder = make_decoder()
    decoder.reset(q[0])
    commands = decoder.push(frames)
    assert not commands.holding.any() and np.abs(commands.tracking_error).max() < 0.05


def test_without_frames_it_comes_to_rest() -> None:
    q = motion(2.0, speed=2.0)
    decoder = make_decoder()
    decoder.reset(q[0])
    before = run(decoder, q)
    assert np.abs(before.velocity[-1]).max() > 0.1
    rest = concatenate([decoder.trajectory.hold(1, "no frame for 0.1 s") for _ in range(100)])
    assert rest.holding.all() and np.abs(rest.velocity[-20:]).max() < 1e-3
    whole = np.concatenate([before.position, rest.position])
    assert limit_usage(whole, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1
    after = decoder.push(picture(q[-1]))
    assert not after.holding.any() and after.time[0] == pytest.approx(rest.time[-1] + 0.02)


def test_nothing_moves_before_the_robot_is_known() -> None:
    decoder = make_decoder()
    with pytest.raises(InputError, match="reset"):
        decoder.trajectory.hold(1)
    assert decoder.trajectory.position is None
    broken = decoder.push(np.full((8, 12, 3), np.nan))
    assert len(broken) == 0 and "not finite" in broken.reason
    positions = make_decoder(action_space="joint_position")
    with pytest.raises(InputError, match="reset"):
        positions.push(picture(ROBOT.home))


def test_a_new_video_continues_the_current_motion() -> None:
    q = motion(2.0)
    decoder = make_decoder()
    decoder.reset(q[0])
    first = run(decoder, q)
    moved = (q[-1] + 0.1).clip(ROBOT.lower, ROBOT.upper)
    decoder.start_video(moved)
    second = run(decoder, np.repeat(moved[None], 20, 0))
    whole = np.concatenate([first.position, second.position])
    assert limit_usage(whole, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1
    np.testing.assert_allclose(second.position[-1][:7], q[-1][:7] + 0.1, atol=5e-3)


def test_measured_positions_anchor_the_estimate() -> None:
    q = motion()
    decoder = make_decoder()
    decoder.reset(q[0])
    run(decoder, q[:20])
    measured = q[20] + np.where(ROBOT.gripper_mask, 0, 0.05)
    decoder.push(picture(q[20]), q=measured)
    assert decoder.pose_tracker._stream is not None
    np.testing.assert_allclose(decoder.pose_tracker._stream.q, measured)


@pytest.mark.parametrize("space", ["joint_velocity", "joint_position"])
def test_a_robot_that_lags_is_led_back(space: str) -> None:
    q = motion()
    off = np.where(np.arange(ROBOT.n) == 1, -0.1, 0.0)
    decoder = make_decoder(action_space=space)
    decoder.reset(q[0])
    before = run(decoder, q[:20])
    assert decoder.trajectory.observe(before.position[-1] + off) == pytest.approx(0.1)
    after = run(decoder, q[20:])
    step = after.velocity[0] - before.velocity[-1]
    assert np.abs(step).max() < 0.4  # not 0.1 rad within one period, which would be 5 rad/s
    if space == "joint_position":
        assert np.abs(after.position[0] - before.position[-1]).max() < 0.03
    else:  # the remaining steps, from the measured positions, end where the video ends
        reached = before.position[-1] + off + after.delta.sum(0)
        np.testing.assert_allclose(reached, q[-1], atol=0.02)


def test_a_robot_far_from_its_command_is_held() -> None:
    q = motion()
    decoder = make_decoder(max_tracking_error=0.3)
    decoder.reset(q[0])
    before = run(decoder, q[:20])
    decoder.trajectory.observe(before.position[-1] + np.where(np.arange(ROBOT.n) == 3, 0.5, 0.0))
    held = run(decoder, q[20:])
    assert held.holding.all() and "panda_joint4" in decoder.push(picture(q[0])).reason
    assert np.abs(held.velocity[-5:]).max() < 1e-3
    decoder.reset(q[0])
    assert not run(decoder, q).holding.any()


def test_a_delayed_measurement_is_compared_with_the_command_of_its_time() -> None:
    q = motion(speed=2.0)
    decoder = make_decoder(action_space="joint_position")
    decoder.reset(q[0])
    commands = run(decoder, q)
    assert decoder.trajectory.observe(commands.position[-30], time=commands.time[-30]) == pytest.approx(0, abs=1e-9)
    assert decoder.trajectory.observe(commands.position[-30]) > 0.05
    for time in (0.0, np.nan, np.inf):
        with pytest.raises(InputError, match="no command"):
            decoder.trajectory.observe(commands.position[0], time=time)


def test_grippers_have_an_opening() -> None:
    decoder = make_decoder()
    decoder.reset(ROBOT.home)
    commands = run(decoder, np.repeat(ROBOT.home[None], 3, 0))
    assert commands.gripper_joints == (7,)
    np.testing.assert_allclose(commands.gripper, 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"video_rate": 0.0}, "video_rate"),
        ({"control_rate": float("nan")}, "control_rate"),
        ({"action_space": "torque"}, "known: joint_delta"),
        ({"chunk": 0}, "chunk"),
        ({"max_tracking_error": float("nan")}, "max_tracking_error"),
        ({"max_tracking_error": -0.1}, "max_tracking_error"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_decoder(**wrong)


TOOL_POSE = np.array([-0.05, 0.03, 0.95, 3.13, -0.02, -0.08, 0.03, -0.03])  # x y z, rotation vector, two fingers
NO_POSES = {
    "too few": ([0.0], "8 joint positions"),
    "text": (["a"] * 8, "8 joint positions"),
    "NaN": (ROBOT.home * np.nan, "not finite"),
    "infinite": (ROBOT.home + np.inf, "not finite"),
    "a tool pose": (TOOL_POSE, "panda_joint4 is 3.13, its limits are -3.072 to -0.0698.*a tool pose is none"),
    "degrees": (np.rad2deg(ROBOT.home), "degrees"),
    "absurd": (np.full(8, 1e308), "panda_joint1 is 1e[+]308"),
    "a tensor that needs a gradient": (torch.tensor(ROBOT.home, requires_grad=True), "8 joint positions"),
}


@pytest.mark.parametrize("wrong", NO_POSES)
def test_what_is_no_pose_of_the_robot_is_refused_and_nothing_changes(wrong: str) -> None:
    q, words = NO_POSES[wrong]
    decoder = make_decoder()
    decoder.reset(ROBOT.home)
    for call in (decoder.reset, decoder.start_video, decoder.trajectory.observe):
        with pytest.raises(InputError, match=words):
            call(q)
    np.testing.assert_allclose(decoder.trajectory.position, ROBOT.home, atol=1e-9)


@pytest.mark.parametrize("wrong", NO_POSES)
def test_a_robot_that_reports_no_pose_is_braked(wrong: str) -> None:
    q = motion(3.0)
    decoder = make_decoder(control_rate=100.0)
    decoder.reset(q[0])
    parts = [decoder.push(picture(x), q=NO_POSES[wrong][0] if k >= 15 else None) for k, x in enumerate(q)]
    assert all(x.holding.all() and x.reason.startswith("the robot reports") for x in parts[15:])
    commands = concatenate(parts)
    assert limit_usage(commands.position, MotionLimits.from_embodiment(ROBOT), 1 / 100) <= 1
    assert np.abs(parts[14].velocity).max() > 0.1 > 1e-3 > np.abs(parts[-1].velocity).max()


def test_a_start_slightly_outside_the_limits_is_led_back_into_them() -> None:
    start = ROBOT.home.copy()
    start[3] = ROBOT.upper[3] + 0.05
    decoder = make_decoder()
    decoder.reset(start)
    commands = run(decoder, np.repeat(start[None], 30, 0))
    outside = commands.position[:, 3] - ROBOT.upper[3]
    steps = np.diff(outside)
    assert outside[0] > 0.04 and (steps[outside[1:] > 1e-6] < 0).all() and (outside[10:] < 1e-6).all()


@given(q=st.lists(st.floats(-4, 4), min_size=8, max_size=8), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_no_reported_pose_shifts_the_motion_out_of_its_limits(q: list[float], seed: int) -> None:
    true = motion(1.5, seed=seed, speed=2.0)
    decoder = make_decoder()
    decoder.reset(true[0])
    for k, x in enumerate(true):
        commands = decoder.push(picture(x))
        if k == 9:
            with contextlib.suppress(InputError):
                decoder.trajectory.observe(np.clip(q, ROBOT.lower, ROBOT.upper))
        limits = decoder.limits
        assert (commands.position >= limits.lower - 1e-6).all() and (commands.position <= limits.upper + 1e-6).all()
        assert (np.abs(commands.velocity) <= limits.velocity + 1e-6).all()


def test_commands_taken_frame_by_frame_are_those_taken_at_once() -> None:
    q = motion(0.72)
    video = np.stack([picture(x) for x in q])
    at_once, frame_by_frame = make_decoder(), make_decoder()
    for one in (at_once, frame_by_frame):
        one.reset(q[0])
    at_once.trajectory.append(at_once.pose_tracker.measure(video))
    expected = at_once.trajectory.next()
    frame_by_frame.trajectory.append(frame_by_frame.pose_tracker.measure(video))
    parts = [frame_by_frame.trajectory.next(k / RATE) for k in range(1, len(video))]
    assert all(len(part) == 4 for part in parts) and len(frame_by_frame.trajectory.next()) == 0
    np.testing.assert_allclose(concatenate(parts).position, expected.position, atol=1e-9)
    np.testing.assert_allclose(
        frame_by_frame.trajectory.reference([frame_by_frame.trajectory.horizon_end]), q[-1:], atol=1e-6
    )


def test_the_reference_ahead_can_be_shifted() -> None:
    q, off = motion(0.72), np.where(ROBOT.gripper_mask, 0.0, 0.03)
    video, moved = np.stack([picture(x) for x in q]), make_decoder()
    moved.reset(q[0])
    moved.trajectory.append(moved.pose_tracker.measure(video))
    first = moved.trajectory.next(4 / RATE)
    here = moved.trajectory.reference(first.time)
    moved.trajectory.shift_reference(off)
    np.testing.assert_allclose(moved.trajectory.reference(first.time), here, atol=0.01)
    np.testing.assert_allclose(moved.trajectory.reference([moved.trajectory.horizon_end]), q[-1:] + off, atol=1e-6)
    commands = concatenate([first, moved.trajectory.next(), moved.trajectory.hold(50)])
    assert limit_usage(commands.position, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1
    with pytest.raises(InputError, match="finite"):
        moved.trajectory.shift_reference(np.nan * off)
