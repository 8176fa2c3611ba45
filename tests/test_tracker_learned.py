"""A pose followed through a film: steps add up, readings hold them, nothing leaves what the joints can do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from step_fields import SIDE, ExactStepField, LinearMotion, TwoPivots, numbered_frames, random_images, untrained
from torch import Tensor

from jidm.estimation.analytic_tracker import JointLimits, TrackedStep
from jidm.estimation.learned_tracker import LearnedTracker, LearnedTrackerOptions
from jidm.estimation.refinement import JacobianPredictor
from jidm.flow import Flow

DT = 1 / 16
MATCHING = LearnedTrackerOptions(refinement_stages=())
"""Known fields tell motion by matching; their pictures have nothing to compare."""
ALONE = replace(MATCHING, use_pose_readings=False)


@pytest.fixture(autouse=True)
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold every step back a little; how much, the tests of the step say."""
    monkeypatch.setattr("jidm.estimation.step_estimation.RIDGE", 1e-12)


def limits(upper: float = 1.2, velocity: float = 100.0, dtype: torch.dtype = torch.float64) -> JointLimits:
    one = torch.ones(2, dtype=dtype)
    return JointLimits(-upper * one, upper * one, velocity * one, one)


def film(frames: int = 12) -> Tensor:
    """(T, 2) a smooth motion [rad]."""
    t = torch.arange(frames).double()[:, None] * torch.tensor([0.31, 0.23]).double()
    return 0.5 * torch.sin(t + torch.tensor([0.0, 1.0]).double())


def followed(
    field: JacobianPredictor,
    q: Tensor,
    options: LearnedTrackerOptions = ALONE,
    bounds: JointLimits | None = None,
    dt: float = DT,
    lost: tuple[int, ...] = (),
    given: bool = True,
) -> tuple[LearnedTracker, list[TrackedStep]]:
    follower = LearnedTracker(field, bounds or limits(), options)
    frames = numbered_frames(q)
    follower.start(frames[0], q[0] if given else None)
    steps = [follower.skip(dt) if k in lost else follower.step(frames[k], dt) for k in range(1, len(q))]
    return follower, steps


def positions(steps: list[TrackedStep]) -> Tensor:
    return torch.stack([s.position for s in steps])


def moves(steps: list[TrackedStep]) -> Tensor:
    return torch.stack([s.delta_q for s in steps])


# ---- steps and readings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", [True, False])
def test_exact_steps_add_up_exactly(anchor: bool) -> None:
    q = film()
    _, steps = followed(ExactStepField(LinearMotion()), q, replace(MATCHING, use_pose_readings=anchor))
    torch.testing.assert_close(positions(steps), q[1:], rtol=0, atol=1e-8)
    torch.testing.assert_close(moves(steps), q.diff(dim=0), rtol=0, atol=1e-8)
    assert all(s.valid and s.accepted and s.observable.all() for s in steps)


def test_curved_paths_are_followed() -> None:
    """The field is bent by the pose that was tracked and by the one that is expected, not by one that is known."""
    q = film(12)
    _, steps = followed(ExactStepField(TwoPivots()), q)
    error = (positions(steps) - q[1:]).abs()
    assert error.max() < 0.02 * q.diff(dim=0).abs().sum(0).max()


def test_expected_pose_bends_the_second_picture() -> None:
    q, field = film(4), ExactStepField(LinearMotion())
    lasting = replace(ALONE, velocity_time_constant=DT / math.log(2))
    followed(field, q, lasting)
    # Asked at the start, then for each frame at the expected pose, then where it was found.
    torch.testing.assert_close(field.queried[0][0], q[0])
    torch.testing.assert_close(field.queried[1][0], q[0])
    torch.testing.assert_close(field.queried[2][0], q[1], rtol=0, atol=1e-8)
    torch.testing.assert_close(field.queried[3][0], q[1] + 0.5 * (q[1] - q[0]), rtol=0, atol=1e-8)
    gap = ExactStepField(LinearMotion())
    followed(gap, q, lasting, lost=(2,))
    torch.testing.assert_close(gap.queried[3][0], q[1] + 0.25 * 2 * (q[1] - q[0]), rtol=0, atol=1e-8)  # twice the time


def test_readings_hold_what_steps_let_drift() -> None:
    q, field = film(30), ExactStepField(LinearMotion())
    field.correlation.drift, field.correlation.noise = 0.01, 1.0
    field.step_std_scale *= 10
    free = positions(followed(field, q)[1]) - q[1:]
    torch.testing.assert_close(free[-1], torch.full((2,), 0.29).double(), rtol=0.05, atol=0)
    held = positions(followed(field, q, replace(MATCHING, correlation_length=1.0))[1]) - q[1:]
    assert held[-1].abs().max() < 0.1
    assert held[-1].abs().max() < 1.2 * held[20].abs().max()  # it has settled
    # Readings that are said to be alike over many frames count less.
    loose = positions(followed(field, q, replace(MATCHING, correlation_length=16.0))[1]) - q[1:]
    assert held[-1].abs().max() < loose[-1].abs().max() < free[-1].abs().max()


def test_readings_that_cannot_be_are_not_believed() -> None:
    q, field = film(10), ExactStepField(LinearMotion())
    field.correlation.noise = 1.0
    field.step_std_scale *= 10
    expected = positions(followed(field, q)[1])
    field.pose_bias += torch.tensor([0.9, 0.0]).double()
    steps = followed(field, q, replace(MATCHING, correlation_length=1.0))[1]
    torch.testing.assert_close(
        positions(steps)[:, 0], expected[:, 0], rtol=0, atol=1e-3
    )  # the other joint's tell a little
    std = [s.position_covariance.diagonal().sqrt() for s in steps]
    assert std[-1][0] > 1.2 * std[-1][1]  # only the other joint is held
    open_gate = followed(field, q, replace(MATCHING, correlation_length=1.0, gate=1e6))[1]
    assert positions(open_gate)[-1, 0] - q[-1, 0] > 0.1


def test_without_a_first_pose_it_is_read() -> None:
    q, field = film(6), ExactStepField(LinearMotion())
    field.pose_bias += 0.03
    _, steps = followed(field, q, given=False)
    torch.testing.assert_close(positions(steps), q[1:] + 0.03, rtol=0, atol=1e-8)
    std = torch.stack([s.position_covariance.diagonal().sqrt() for s in steps])
    torch.testing.assert_close(std, torch.full_like(std, 0.05), rtol=1e-3, atol=0)
    field.pose_bias += 5.0
    far = LearnedTracker(field, limits(), ALONE)
    far.start(numbered_frames(q)[0], None)
    torch.testing.assert_close(far.q, torch.full((2,), 1.2).double())


def test_positions_do_not_depend_on_the_clock() -> None:
    q, field = film(), ExactStepField(LinearMotion())
    slow, fast = (positions(followed(field, q, MATCHING, dt=dt)[1]) for dt in (1.0, 1 / 64))
    torch.testing.assert_close(slow, fast, rtol=0, atol=1e-8)


# ---- frames that show nothing ----------------------------------------------------------------------------------------


def test_a_lost_frame_is_bridged() -> None:
    q, field = film(), ExactStepField(LinearMotion())
    _, steps = followed(field, q, lost=(4, 5))
    assert [s.valid for s in steps] == [True] * 3 + [False] * 3 + [True] * 5
    assert [s.accepted for s in steps] == [True] * 3 + [False] * 2 + [True] * 6
    held = steps[2].position
    for s in steps[3:5]:
        assert torch.equal(s.position, held) and not s.delta_q.any() and not s.observable.any()
    assert not steps[5].delta_q.any()  # motion over three frames is no step
    torch.testing.assert_close(positions(steps)[5:], q[6:], rtol=0, atol=1e-8)


def test_not_knowing_grows_with_time_and_ends_when_something_is_seen() -> None:
    q, field = film(), ExactStepField(LinearMotion())
    _, steps = followed(field, q, lost=(4, 5), bounds=limits(velocity=2.0))
    std = [s.position_covariance.diagonal().sqrt().max() for s in steps]
    assert std[2] < 1e-3
    torch.testing.assert_close(std[3], torch.tensor(2.0 * DT).double(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(std[4], torch.tensor(4.0 * DT).double(), rtol=1e-3, atol=1e-6)
    assert std[5] < 1e-3
    _, never = followed(field, q, lost=tuple(range(1, 12)), bounds=limits(velocity=torch.inf))
    assert positions(never).isfinite().all()
    assert all(s.position_covariance.isfinite().all() and s.covariance.isfinite().all() for s in never)


def test_motion_that_is_not_the_robots_is_called_so() -> None:
    field, still = ExactStepField(LinearMotion()), torch.zeros(5, 2).double()
    assert all(s.valid for s in followed(field, still)[1])
    field.correlation.noise = 20.0
    _, steps = followed(field, still)
    assert not any(s.valid for s in steps) and all(s.accepted for s in steps)
    assert not moves(steps).any()
    believing = followed(field, still, replace(ALONE, min_image_motion=50.0))[1]
    assert all(s.valid for s in believing)


def test_given_flow_moves_the_pose() -> None:
    field = ExactStepField(LinearMotion())
    field.correlation.drift = 9.0
    follower = LearnedTracker(field, limits(), ALONE)
    follower.start(numbered_frames(film())[0], torch.zeros(2).double())
    wanted = torch.tensor([0.03, -0.02]).double()
    flow = torch.einsum("cn,n->c", field.motion_model.constant_jacobian[..., 0, 0], wanted)[:, None, None].expand(
        2, SIDE, SIDE
    )
    step = follower.step(numbered_frames(film())[1], DT, Flow(flow, torch.ones(SIDE, SIDE).double()))
    torch.testing.assert_close(step.delta_q, wanted, rtol=1e-3, atol=1e-6)
    nothing = follower.step(numbered_frames(film())[2], DT, Flow(0 * flow, torch.zeros(SIDE, SIDE).double()))
    assert not nothing.valid and not nothing.accepted and torch.equal(nothing.position, step.position)


# ---- the whole video -------------------------------------------------------------------------------------------------


def test_later_frames_correct_earlier_steps() -> None:
    q = film(14)
    errors = []
    for remembers in (False, True):
        field = ExactStepField(LinearMotion())
        field.correlation.noise = 0.5
        field.pose_std = 0.003  # poses read off the pictures are right
        follower = LearnedTracker(field, limits(), replace(MATCHING, correlation_length=1.0), keep_history=remembers)
        follower.start(numbered_frames(q)[0], q[0] + 0.05)
        steps = [follower.step(frame, DT) for frame in numbered_frames(q)[1:]]
        later = follower.smooth(steps)
        errors.append((moves(later) - q.diff(dim=0)).abs().mean())
        if remembers:
            torch.testing.assert_close(later[-1].delta_q, steps[-1].delta_q, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(positions(later).diff(dim=0), moves(later)[1:], rtol=1e-4, atol=1e-6)
            assert all((a.covariance.diagonal() <= b.covariance.diagonal() * 1.001).all() for a, b in zip(later, steps))
        else:
            assert later == steps  # nothing was remembered
    assert errors[1] < 0.8 * errors[0]


def test_looking_back_holds_what_was_not_seen() -> None:
    q = film(8)
    field = ExactStepField(LinearMotion())
    follower = LearnedTracker(field, limits(), ALONE, keep_history=True)
    follower.start(numbered_frames(q)[0], q[0])
    steps = [follower.skip(DT) if k in (1, 4) else follower.step(numbered_frames(q)[k], DT) for k in range(1, 8)]
    later = follower.smooth(steps)
    assert [s.valid for s in later] == [s.valid for s in steps] and [s.accepted for s in later] == [
        s.accepted for s in steps
    ]
    assert torch.equal(later[0].position, q[0]) and torch.equal(later[3].position, later[2].position)
    assert not later[0].delta_q.any() and not later[3].delta_q.any() and not later[4].delta_q.any()
    torch.testing.assert_close(positions(later)[-1], q[-1], rtol=0, atol=0.02)


# ---- what joints can do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("drift", [0.3, -0.3, 40.0])
def test_limits_are_never_left(drift: float, anchor: bool) -> None:
    field, bounds = ExactStepField(LinearMotion()), limits(0.8, velocity=2.0)
    field.correlation.drift, field.correlation.noise = drift, 1.0
    field.step_std_scale *= 1e3
    field.pose_bias += drift / 3
    _, steps = followed(field, film(8), replace(MATCHING, use_pose_readings=anchor, gate=1e9), bounds)
    assert positions(steps).abs().max() <= 0.8 + 1e-12
    assert moves(steps).abs().max() <= 2.0 * DT + 1e-12
    assert moves(steps).isfinite().all()


def test_the_speed_limit_counts_the_time_since_the_last_good_frame() -> None:
    q = torch.tensor([[0.0, 0.0], [0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]).double()
    field, bounds = ExactStepField(LinearMotion()), limits(velocity=0.101 / DT)
    _, steps = followed(field, q, bounds=bounds, lost=(1, 2))
    torch.testing.assert_close(steps[-1].position, q[-1], rtol=0, atol=1e-8)
    slow = followed(field, q, bounds=limits(velocity=0.05 / DT))[1]
    torch.testing.assert_close(positions(slow), q[1:] / 2)


@pytest.mark.parametrize("velocity", [2.0, 0.4])
def test_a_joint_that_cannot_be_seen_is_as_uncertain_as_its_usual_steps_and_its_speed(velocity: float) -> None:
    field, bounds = ExactStepField(LinearMotion()), limits(velocity=velocity)
    std = min(float(field.delta_std[1]), velocity * DT)
    field.motion_model.constant_jacobian[:, 1] = 0
    _, steps = followed(field, film(4), bounds=bounds)
    for step in steps:
        assert step.observable.tolist() == [True, False]
        assert float(step.covariance[1, 1]) == pytest.approx(std**2, rel=1e-3)
        assert step.covariance[0, 0] < 1e-6


@pytest.mark.parametrize("what", ["noise", "black", "white", "stripes"])
def test_an_untrained_network_on_nonsense_stays_finite(what: str) -> None:
    field, bounds = untrained(), limits(dtype=torch.float32, velocity=2.0)
    frames = {
        "noise": torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),
        "black": torch.zeros(6, 3, SIDE, SIDE),
        "white": torch.ones(6, 3, SIDE, SIDE),
        "stripes": random_images(6).round(),
    }[what]
    follower = LearnedTracker(field, bounds, LearnedTrackerOptions())
    with torch.no_grad():
        follower.start(frames[0], None)
        steps = [follower.step(frame, DT) for frame in frames[1:]]
    for step in steps:
        for value in (step.delta_q, step.position, step.position_covariance, step.covariance, step.residual):
            assert value.isfinite().all()
        for covariance in (step.position_covariance, step.covariance):
            torch.testing.assert_close(covariance, covariance.T, rtol=1e-3, atol=1e-9)
            assert torch.linalg.eigvalsh(covariance.double()).min() > -1e-9
        assert (step.position.abs() <= 1.2).all() and (step.delta_q.abs() <= 2.0 * DT * 1.001).all()
