"""Laws of the action decoder, with pictures that write their joint positions into their pixels."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_decoder_spline import _exceeded

from jidm import JacobianIDM, load_embodiment
from jidm.control import ActionDecoder, Commands, MotionLimits
from jidm.errors import InputError, VideoError

RATE = 12.5
ROBOT = load_embodiment("panda")
REACH = 4.0  # [rad] that a pixel's range stands for, to either side


class _Written:
    """A stream that reads what `picture` wrote."""

    def __init__(self, frame: torch.Tensor, q0: object) -> None:
        self.q, self._shape = self._read(frame) if q0 is None else torch.as_tensor(q0), frame.shape

    @staticmethod
    def _read(frame: torch.Tensor) -> torch.Tensor:
        return (frame[0, 0, : ROBOT.n].double() * 2 - 1) * REACH

    def push(self, frame: torch.Tensor, time: float) -> SimpleNamespace:
        if frame.shape != self._shape:
            raise VideoError("another size")
        if float(frame[2, 0, 0]) == 1:
            raise RuntimeError("out of memory")
        used = bool(frame.isfinite().all())
        before, self.q = self.q, self._read(frame) if used else self.q
        return SimpleNamespace(used=used, position=self.q, delta_q=self.q - before)

    def correct(self, q: np.ndarray) -> None:
        self.q = torch.as_tensor(q)


def picture(q: np.ndarray) -> np.ndarray:
    """(8, 12, 3) in [0, 1]."""
    frame = np.zeros((8, 12, 3))
    frame[0, : ROBOT.n, 0] = (q / REACH + 1) / 2
    return frame


@cache
def idm() -> JacobianIDM:
    reads = JacobianIDM.from_embodiment("panda", points=10)
    reads.stream = lambda frame, *, time, q0=None: _Written(frame, q0)  # type: ignore[method-assign, assignment]
    return reads


def decoder(**given: object) -> ActionDecoder:
    return ActionDecoder(idm(), **{"video_rate": RATE, **given})  # type: ignore[arg-type]


def motion(seconds: float = 4.0, seed: int = 0, speed: float = 1.0) -> np.ndarray:
    """(T, n) smooth positions around home at the video's rate."""
    rng = np.random.default_rng(seed)
    t = np.arange(0, seconds, 1 / RATE)[:, None]
    waves = rng.uniform(0.2, 1.0, (2, ROBOT.n)), rng.uniform(0, 6.3, (2, ROBOT.n))
    turned = [np.sin(2 * np.pi * f * speed * t * 0.5 + p) - np.sin(p) for f, p in zip(*waves)]
    q = ROBOT.home + ROBOT.exploration_range * 0.4 * sum(turned)
    return np.clip(q, ROBOT.lower + 0.001, ROBOT.upper - 0.001)


def run(decoding: ActionDecoder, q: np.ndarray, *, chunk: int = 1) -> Commands:
    """Everything commanded for a video of these poses."""
    frames = np.stack([picture(x) for x in q])
    return _joined([decoding.push(frames[k : k + chunk]) for k in range(0, len(frames), chunk)])


def _joined(parts: list[Commands]) -> Commands:
    from dataclasses import replace

    rows = ("time", "position", "delta", "velocity", "behind", "held")
    return replace(parts[0], **{name: np.concatenate([getattr(x, name) for x in parts]) for name in rows})


@pytest.mark.parametrize("control", [50.0, 30.0, 12.5, 10.0, 1000.0])
@pytest.mark.parametrize("chunk", [1, 4])
def test_commands_follow_the_video_at_any_rate(control: float, chunk: int) -> None:
    q = motion()
    decoding = decoder(control_rate=control)
    decoding.reset(q[0])
    told = run(decoding, q, chunk=chunk)
    end = (len(q) - 1) / RATE
    np.testing.assert_allclose(told.time, np.arange(1, int(end * control + 1e-6) + 1) / control)
    true = np.stack([np.interp(told.time, np.arange(len(q)) / RATE, x) for x in q.T], 1)
    assert np.abs(told.position - true).max() < 0.05 and not told.holding.any() and told.reason == ""
    assert np.sqrt(np.mean((told.position - true) ** 2)) < 0.015 < np.std(true)


def test_actions_are_three_tellings_of_one_motion() -> None:
    q = motion()
    told = {}
    for space in ("joint_velocity", "joint_position", "joint_delta"):
        decoding = decoder(action_space=space)
        decoding.reset(q[0])
        told[space] = run(decoding, q)
    position = told["joint_position"].action
    np.testing.assert_allclose(q[0] + np.cumsum(told["joint_delta"].action, 0), position, atol=1e-9)
    np.testing.assert_allclose(q[0] + np.cumsum(told["joint_velocity"].action, 0) / 50, position, atol=1e-9)
    assert told["joint_delta"].action is told["joint_delta"].delta


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [1, 4])
def test_no_limit_is_exceeded_whatever_is_shown(seed: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    q = np.repeat(rng.uniform(-3, 3, (20, ROBOT.n)), 3, axis=0)
    decoding = decoder(control_rate=200.0)
    decoding.reset(ROBOT.home)
    told = run(decoding, q, chunk=chunk)
    sent = np.concatenate([ROBOT.home[None], told.position])
    assert np.abs(np.diff(sent, axis=0)).max() > 1e-3
    assert _exceeded(sent, MotionLimits.from_embodiment(ROBOT), 1 / 200) <= 1


def test_chunk_borders_are_no_rougher_than_chunks() -> None:
    q = motion(8.0)
    decoding = decoder(chunk=4)
    decoding.reset(q[0])
    told = run(decoding, q)
    jump = np.abs(np.diff(told.velocity, axis=0)).max(1)
    border = np.arange(15, len(jump), 16)
    assert jump[border].max() <= np.delete(jump, border).max()


def test_a_chunk_is_waited_for() -> None:
    q = motion()
    decoding = decoder(chunk=4)
    decoding.reset(q[0])
    given = [len(decoding.push(picture(x))) for x in q[:13]]
    assert given == [0, 0, 0, 0, 16, 0, 0, 0, 16, 0, 0, 0, 16]


def test_the_same_frames_give_the_same_commands_and_reset_forgets() -> None:
    q = motion()
    decoding = decoder()
    told = []
    for _ in range(2):
        decoding.reset(q[0])
        told.append(run(decoding, q))
    assert np.array_equal(told[0].position, told[1].position)


BAD = {
    "NaN": lambda x: x * np.nan,
    "another size": lambda x: np.zeros((4, 4, 3)),
    "no picture": lambda x: np.zeros((8, 12, 7)),
    "a crash": lambda x: np.concatenate([x[..., :2], np.ones_like(x[..., :1])], -1),
}


@pytest.mark.parametrize("wrong", BAD)
def test_what_cannot_be_followed_brakes_says_why_and_goes_on(wrong: str) -> None:
    q = motion(6.0)
    decoding = decoder(control_rate=100.0)
    decoding.reset(q[0])
    parts, reasons = [], []
    for k, x in enumerate(q):
        parts.append(decoding.push(BAD[wrong](picture(x)) if 30 <= k < 45 else picture(x)))
        reasons.append(parts[-1].reason)
    assert all(reasons[30:45]) and not any(reasons[:30]) and not any(reasons[45:])
    assert [bool(x.held.any()) for x in parts] == [bool(reason) for reason in reasons]
    told = _joined(parts)
    assert _exceeded(told.position, MotionLimits.from_embodiment(ROBOT), 1 / 100) <= 1
    assert np.abs(parts[29].velocity).max() > 0.1 > 5e-3 > np.abs(parts[44].velocity).max()
    np.testing.assert_allclose(told.position[-1], q[-1], atol=0.05)
    assert len(told) == (len(q) - 1) * 8


def test_frames_come_in_any_layout() -> None:
    q = motion(1.0)
    frames = np.stack([picture(x) for x in q])
    told = []
    for layout, axes in ((None, (0, 1, 2)), ("HWC", (0, 1, 2)), ("CHW", (2, 0, 1)), ("WCH", (1, 2, 0))):
        decoding = decoder()
        decoding.reset(q[0])
        told.append(_joined([decoding.push(frame.transpose(axes), layout=layout) for frame in frames]).position)
    decoding = decoder()
    decoding.reset(q[0])
    told.append(_joined([decoding.push(frame[None], layout="THWC") for frame in frames]).position)
    assert all(np.array_equal(x, told[0]) for x in told) and len(told[0]) == 4 * (len(q) - 1)


def test_bad_frames_inside_a_chunk_are_bridged() -> None:
    q = motion()
    frames = np.stack([picture(x) for x in q])
    frames[10] = np.nan
    decoding = decoder()
    decoding.reset(q[0])
    told = decoding.push(frames)
    assert not told.holding.any() and np.abs(told.tracking_error).max() < 0.05


def test_without_frames_it_comes_to_rest() -> None:
    q = motion(2.0, speed=2.0)
    decoding = decoder()
    decoding.reset(q[0])
    before = run(decoding, q)
    assert np.abs(before.velocity[-1]).max() > 0.1
    rest = _joined([decoding.hold(1, "no frame for 0.1 s") for _ in range(100)])
    assert rest.holding.all() and np.abs(rest.velocity[-20:]).max() < 1e-3
    whole = np.concatenate([before.position, rest.position])
    assert _exceeded(whole, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1
    after = decoding.push(picture(q[-1]))
    assert not after.holding.any() and after.time[0] == pytest.approx(rest.time[-1] + 0.02)


def test_nothing_moves_before_the_robot_is_known() -> None:
    decoding = decoder()
    with pytest.raises(InputError, match="reset"):
        decoding.hold(1)
    assert decoding.position is None
    broken = decoding.push(np.full((8, 12, 3), np.nan))
    assert len(broken) == 0 and "not finite" in broken.reason
    positions = decoder(action_space="joint_position")
    with pytest.raises(InputError, match="reset"):
        positions.push(picture(ROBOT.home))


def test_a_new_dream_goes_on_from_the_motion_at_hand() -> None:
    q = motion(2.0)
    decoding = decoder()
    decoding.reset(q[0])
    first = run(decoding, q)
    decoding.start_video(q[-1] + 0.1)
    second = run(decoding, np.repeat(q[-1:] + 0.1, 20, 0).clip(ROBOT.lower, ROBOT.upper))
    whole = np.concatenate([first.position, second.position])
    assert _exceeded(whole, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1
    np.testing.assert_allclose(second.position[-1][:7], q[-1][:7] + 0.1, atol=5e-3)


def test_measured_positions_anchor_the_estimate() -> None:
    q = motion()
    decoding = decoder()
    decoding.reset(q[0])
    run(decoding, q[:20])
    decoding.push(picture(q[20]), q=q[20] + 0.05)
    assert decoding.pose_tracker._stream is not None
    np.testing.assert_allclose(decoding.pose_tracker._stream.q, q[20] + 0.05)


@pytest.mark.parametrize("space", ["joint_velocity", "joint_position"])
def test_a_robot_that_fell_behind(space: str) -> None:
    q = motion()
    off = np.where(np.arange(ROBOT.n) == 1, -0.1, 0.0)
    decoding = decoder(action_space=space)
    decoding.reset(q[0])
    before = run(decoding, q[:20])
    assert decoding.observe(before.position[-1] + off) == pytest.approx(0.1)
    after = run(decoding, q[20:])
    step = after.velocity[0] - before.velocity[-1]
    assert np.abs(step).max() < 0.4  # not 0.1 rad within one period, which would be 5 rad/s
    if space == "joint_position":
        assert np.abs(after.position[0] - before.position[-1]).max() < 0.03
    else:  # it is led back: what is commanded from here on, from where the robot really is, ends where the video does
        reached = before.position[-1] + off + after.delta.sum(0)
        np.testing.assert_allclose(reached, q[-1], atol=0.02)


def test_a_robot_that_is_somewhere_else_is_held() -> None:
    q = motion()
    decoding = decoder(most_behind=0.3)
    decoding.reset(q[0])
    before = run(decoding, q[:20])
    decoding.observe(before.position[-1] + np.where(np.arange(ROBOT.n) == 3, 0.5, 0.0))
    held = run(decoding, q[20:])
    assert held.holding.all() and "panda_joint4" in decoding.push(picture(q[0])).reason
    assert np.abs(held.velocity[-5:]).max() < 1e-3
    decoding.reset(q[0])
    assert not run(decoding, q).holding.any()


def test_a_measurement_of_the_past_is_compared_with_the_past() -> None:
    q = motion(speed=2.0)
    decoding = decoder(action_space="joint_position")
    decoding.reset(q[0])
    told = run(decoding, q)
    assert decoding.observe(told.position[-30], time=told.time[-30]) == pytest.approx(0, abs=1e-9)
    assert decoding.observe(told.position[-30]) > 0.05
    with pytest.raises(InputError, match="no command"):
        decoding.observe(told.position[0], time=0.0)


def test_grippers_are_told_apart() -> None:
    decoding = decoder()
    decoding.reset(ROBOT.home)
    told = run(decoding, np.repeat(ROBOT.home[None], 3, 0))
    assert told.gripper_joints == (7,)
    np.testing.assert_allclose(told.gripper, 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"video_rate": 0.0}, "video_rate"),
        ({"control_rate": float("nan")}, "control_rate"),
        ({"action_space": "torque"}, "known: joint_delta"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        decoder(**wrong)


def test_wrong_positions_are_refused_and_nothing_changes() -> None:
    decoding = decoder()
    decoding.reset(ROBOT.home)
    for q in ([0.0], ROBOT.home * np.nan):
        for call in (decoding.reset, decoding.start_video, decoding.observe):
            with pytest.raises(InputError, match="finite joint positions"):
                call(q)
        with pytest.raises(InputError, match="finite joint positions"):
            decoding.push(picture(ROBOT.home), q=q)
    np.testing.assert_allclose(decoding.position, ROBOT.home)


def test_commands_taken_frame_by_frame_are_those_taken_at_once() -> None:
    q = motion(0.72)
    video = np.stack([picture(x) for x in q])
    at_once, bit_by_bit = decoder(), decoder()
    for one in (at_once, bit_by_bit):
        one.reset(q[0])
    expected = at_once.follow(at_once.pose_tracker.measure(video))
    bit_by_bit.append(bit_by_bit.pose_tracker.measure(video))
    parts = [bit_by_bit.next(k / RATE) for k in range(1, len(video))]
    assert all(len(part) == 4 for part in parts) and len(bit_by_bit.next()) == 0
    np.testing.assert_allclose(_joined(parts).position, expected.position, atol=1e-9)
    np.testing.assert_allclose(bit_by_bit.reference([bit_by_bit.horizon_end]), q[-1:], atol=1e-6)


def test_what_lies_ahead_can_be_moved_and_what_was_commanded_stays() -> None:
    q, off = motion(0.72), np.where(ROBOT.gripper_mask, 0.0, 0.03)
    video, moved = np.stack([picture(x) for x in q]), decoder()
    moved.reset(q[0])
    moved.append(moved.pose_tracker.measure(video))
    first = moved.next(4 / RATE)
    here = moved.reference(first.time)
    moved.shift_reference(off)
    np.testing.assert_allclose(moved.reference(first.time), here, atol=0.01)
    np.testing.assert_allclose(moved.reference([moved.horizon_end]), q[-1:] + off, atol=1e-6)
    told = _joined([first, moved.next(), moved.hold(50)])
    assert _exceeded(told.position, MotionLimits.from_embodiment(ROBOT), 1 / 50) <= 1
    with pytest.raises(InputError, match="finite"):
        moved.shift_reference(np.nan * off)
