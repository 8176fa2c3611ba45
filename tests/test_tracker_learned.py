"""Tracking with a learned field: steps add up, predicted poses bound the drift, limits hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from step_fields import SIDE, ExactStepField, LinearMotion, TwoPivots, numbered_frames, random_images, untrained
from torch import Tensor

from jidm.estimation.kalman import FilterOptions
from jidm.estimation.learned_measurement import LearnedMeasurement, LearnedOptions
from jidm.estimation.refinement import JacobianPredictor
from jidm.estimation.tracker import JointLimits, TrackedStep, Tracker
from jidm.flow import Flow

DT = 1 / 16
MATCHING = LearnedOptions(refinement_stages=(), min_agreement=None)
"""Images of an `ExactStepField` have no texture to align."""
STEPS_ONLY = replace(MATCHING, use_pose_readings=False)


@pytest.fixture(autouse=True)
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ridge shortens every step a little; see test_step_estimation."""
    monkeypatch.setattr("jidm.estimation.step_estimation.RIDGE", 1e-12)


def limits(upper: float = 1.2, velocity: float = 100.0, dtype: torch.dtype = torch.float64) -> JointLimits:
    one = torch.ones(2, dtype=dtype)
    return JointLimits(-upper * one, upper * one, velocity * one, one)


def trajectory(frames: int = 12) -> Tensor:
    """(T, 2) smooth joint positions [rad]."""
    t = torch.arange(frames).double()[:, None] * torch.tensor([0.31, 0.23]).double()
    return 0.5 * torch.sin(t + torch.tensor([0.0, 1.0]).double())


def make_tracker(
    field: JacobianPredictor,
    options: LearnedOptions = STEPS_ONLY,
    joint_limits: JointLimits | None = None,
    keep_history: bool = False,
) -> Tracker:
    return Tracker(LearnedMeasurement(field, options), joint_limits or limits(), keep_history=keep_history)


def track(
    field: JacobianPredictor,
    q: Tensor,
    options: LearnedOptions = STEPS_ONLY,
    joint_limits: JointLimits | None = None,
    dt: float = DT,
    skipped: tuple[int, ...] = (),
    given: bool = True,
) -> list[TrackedStep]:
    tracker = make_tracker(field, options, joint_limits)
    frames = numbered_frames(q)
    tracker.start(frames[0], q[0] if given else None)
    return [tracker.skip(dt) if k in skipped else tracker.step(frames[k], dt) for k in range(1, len(q))]


def positions(steps: list[TrackedStep]) -> Tensor:
    return torch.stack([s.position for s in steps])


def deltas(steps: list[TrackedStep]) -> Tensor:
    return torch.stack([s.delta_q for s in steps])


# ---- steps and predicted poses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_pose_readings", [True, False])
def test_exact_steps_add_up_exactly(use_pose_readings: bool) -> None:
    q = trajectory()
    steps = track(ExactStepField(LinearMotion()), q, replace(MATCHING, use_pose_readings=use_pose_readings))
    torch.testing.assert_close(positions(steps), q[1:], rtol=0, atol=1e-8)
    torch.testing.assert_close(deltas(steps), q.diff(dim=0), rtol=0, atol=1e-8)
    assert all(s.valid and s.accepted and s.observable.all() for s in steps)


def test_curved_paths_are_tracked() -> None:
    """The field is evaluated at tracked and at predicted poses, not at true ones."""
    q = trajectory(12)
    steps = track(ExactStepField(TwoPivots()), q)
    error = (positions(steps) - q[1:]).abs()
    assert error.max() < 0.02 * q.diff(dim=0).abs().sum(0).max()


def test_predicted_poses_bound_the_drift_of_steps() -> None:
    q, field = trajectory(30), ExactStepField(LinearMotion())
    field.correlation.drift, field.correlation.noise = 0.01, 1.0
    field.step_std_scale *= 10
    free = positions(track(field, q)) - q[1:]
    torch.testing.assert_close(free[-1], torch.full((2,), 0.29).double(), rtol=0.05, atol=0)
    held = positions(track(field, q, replace(MATCHING, correlation_length=1.0))) - q[1:]
    assert held[-1].abs().max() < 0.1
    assert held[-1].abs().max() < 1.2 * held[20].abs().max()  # it has converged
    # Predicted poses whose errors are correlated over many frames have less weight.
    loose = positions(track(field, q, replace(MATCHING, correlation_length=16.0))) - q[1:]
    assert held[-1].abs().max() < loose[-1].abs().max() < free[-1].abs().max()


def test_implausible_predicted_poses_are_rejected() -> None:
    q, field = trajectory(10), ExactStepField(LinearMotion())
    field.correlation.noise = 1.0
    field.step_std_scale *= 10
    expected = positions(track(field, q))
    field.pose_bias += torch.tensor([0.9, 0.0]).double()
    options = replace(MATCHING, correlation_length=1.0)
    steps = track(field, q, options)
    # The other joint's position has a little influence by its correlation.
    torch.testing.assert_close(positions(steps)[:, 0], expected[:, 0], rtol=0, atol=1e-3)
    std = [s.position_covariance.diagonal().sqrt() for s in steps]
    assert std[-1][0] > 1.2 * std[-1][1]  # only the other joint is measured
    ungated = track(field, q, replace(options, filter=FilterOptions(gate=None)))
    assert positions(ungated)[-1, 0] - q[-1, 0] > 0.1


def test_without_q0_the_first_pose_is_predicted() -> None:
    q, field = trajectory(6), ExactStepField(LinearMotion())
    field.pose_bias += 0.03
    steps = track(field, q, given=False)
    torch.testing.assert_close(positions(steps), q[1:] + 0.03, rtol=0, atol=1e-8)
    std = torch.stack([s.position_covariance.diagonal().sqrt() for s in steps])
    torch.testing.assert_close(std, torch.full_like(std, 0.05), rtol=1e-3, atol=0)
    field.pose_bias += 5.0
    outside = make_tracker(field)
    outside.start(numbered_frames(q)[0], None)
    torch.testing.assert_close(outside.q, torch.full((2,), 1.2).double())


def test_positions_do_not_depend_on_the_frame_rate() -> None:
    q, field = trajectory(), ExactStepField(LinearMotion())
    slow, fast = (positions(track(field, q, MATCHING, dt=dt)) for dt in (1.0, 1 / 64))
    torch.testing.assert_close(slow, fast, rtol=0, atol=1e-8)


# ---- frames without a measurement ------------------------------------------------------------------------------------


def test_skipped_frames_are_bridged() -> None:
    q, field = trajectory(), ExactStepField(LinearMotion())
    steps = track(field, q, skipped=(4, 5))
    assert [s.valid for s in steps] == [True] * 3 + [False] * 3 + [True] * 5
    assert [s.accepted for s in steps] == [True] * 3 + [False] * 2 + [True] * 6
    held = steps[2].position
    for s in steps[3:5]:
        assert torch.equal(s.position, held) and not s.delta_q.any() and not s.observable.any()
    assert not steps[5].delta_q.any()  # the motion over three intervals is not the step of one
    torch.testing.assert_close(positions(steps)[5:], q[6:], rtol=0, atol=1e-8)


def test_uncertainty_grows_over_skipped_frames_and_shrinks_with_the_next_measurement() -> None:
    q, field = trajectory(), ExactStepField(LinearMotion())
    steps = track(field, q, skipped=(4, 5), joint_limits=limits(velocity=2.0))
    std = [s.position_covariance.diagonal().sqrt().max() for s in steps]
    assert std[2] < 1e-3
    torch.testing.assert_close(std[3], torch.tensor(2.0 * DT).double(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(std[4], torch.tensor(4.0 * DT).double(), rtol=1e-3, atol=1e-6)
    assert std[5] < 1e-3
    never = track(field, q, skipped=tuple(range(1, 12)), joint_limits=limits(velocity=torch.inf))
    assert positions(never).isfinite().all()
    assert all(s.position_covariance.isfinite().all() and s.covariance.isfinite().all() for s in never)


def test_steps_that_leave_most_of_the_image_motion_unexplained_are_not_valid() -> None:
    field, still = ExactStepField(LinearMotion()), torch.zeros(5, 2).double()
    assert all(s.valid for s in track(field, still))
    field.correlation.noise = 20.0
    steps = track(field, still)
    assert not any(s.valid for s in steps) and all(s.accepted for s in steps)
    assert not deltas(steps).any()
    assert all(s.valid for s in track(field, still, replace(STEPS_ONLY, min_image_motion=50.0)))


def test_external_flow_replaces_matching() -> None:
    field, frames = ExactStepField(LinearMotion()), numbered_frames(trajectory())
    field.correlation.drift = 9.0
    tracker = make_tracker(field)
    tracker.start(frames[0], torch.zeros(2).double())
    expected = torch.tensor([0.03, -0.02]).double()
    motion = field.motion_model.constant_jacobian[..., 0, 0] @ expected
    flow = motion[:, None, None].expand(2, SIDE, SIDE)
    step = tracker.step(frames[1], DT, Flow(flow, torch.ones(SIDE, SIDE).double()))
    torch.testing.assert_close(step.delta_q, expected, rtol=1e-3, atol=1e-6)
    without_weight = tracker.step(frames[2], DT, Flow(0 * flow, torch.zeros(SIDE, SIDE).double()))
    assert not without_weight.valid and not without_weight.accepted
    assert torch.equal(without_weight.position, step.position)


# ---- smoothing -------------------------------------------------------------------------------------------------------


def test_later_frames_correct_earlier_steps() -> None:
    q = trajectory(14)
    errors = []
    for keep_history in (False, True):
        field = ExactStepField(LinearMotion())
        field.correlation.noise = 0.5
        field.pose_std = 0.003  # predicted poses are exact
        tracker = make_tracker(field, replace(MATCHING, correlation_length=1.0), keep_history=keep_history)
        tracker.start(numbered_frames(q)[0], q[0] + 0.05)
        steps = [tracker.step(frame, DT) for frame in numbered_frames(q)[1:]]
        later = tracker.smooth(steps)
        errors.append((deltas(later) - q.diff(dim=0)).abs().mean())
        if keep_history:
            torch.testing.assert_close(later[-1].delta_q, steps[-1].delta_q, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(positions(later).diff(dim=0), deltas(later)[1:], rtol=1e-4, atol=1e-6)
            assert all((a.covariance.diagonal() <= b.covariance.diagonal() * 1.001).all() for a, b in zip(later, steps))
        else:
            assert later == steps  # there is no history
    assert errors[1] < 0.8 * errors[0]


def test_smoothing_holds_the_pose_at_skipped_frames() -> None:
    q = trajectory(8)
    tracker = make_tracker(ExactStepField(LinearMotion()), keep_history=True)
    tracker.start(numbered_frames(q)[0], q[0])
    steps = [tracker.skip(DT) if k in (1, 4) else tracker.step(numbered_frames(q)[k], DT) for k in range(1, 8)]
    later = tracker.smooth(steps)
    assert [(s.valid, s.accepted) for s in later] == [(s.valid, s.accepted) for s in steps]
    assert torch.equal(later[0].position, q[0]) and torch.equal(later[3].position, later[2].position)
    assert not later[0].delta_q.any() and not later[3].delta_q.any() and not later[4].delta_q.any()
    torch.testing.assert_close(positions(later)[-1], q[-1], rtol=0, atol=0.02)


# ---- joint limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_pose_readings", [True, False])
@pytest.mark.parametrize("drift", [0.3, -0.3, 40.0])
def test_limits_always_hold(drift: float, use_pose_readings: bool) -> None:
    field, joint_limits = ExactStepField(LinearMotion()), limits(0.8, velocity=2.0)
    field.correlation.drift, field.correlation.noise = drift, 1.0
    field.step_std_scale *= 1e3
    field.pose_bias += drift / 3
    options = replace(MATCHING, use_pose_readings=use_pose_readings, filter=FilterOptions(gate=None))
    steps = track(field, trajectory(8), options, joint_limits)
    assert positions(steps).abs().max() <= 0.8 + 1e-12
    assert deltas(steps).abs().max() <= 2.0 * DT + 1e-12
    assert deltas(steps).isfinite().all()


def test_the_speed_limit_covers_the_time_since_the_last_accepted_frame() -> None:
    q = torch.tensor([[0.0, 0.0], [0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]).double()
    field = ExactStepField(LinearMotion())
    steps = track(field, q, joint_limits=limits(velocity=0.101 / DT), skipped=(1, 2))
    torch.testing.assert_close(steps[-1].position, q[-1], rtol=0, atol=1e-8)
    slow = track(field, q, joint_limits=limits(velocity=0.05 / DT))
    torch.testing.assert_close(positions(slow), q[1:] / 2)


@pytest.mark.parametrize("velocity", [2.0, 0.4])
def test_an_unobservable_joint_is_as_uncertain_as_training_steps_and_its_speed_limit(velocity: float) -> None:
    field = ExactStepField(LinearMotion())
    std = min(float(field.delta_std[1]), velocity * DT)
    field.motion_model.constant_jacobian[:, 1] = 0
    for step in track(field, trajectory(4), joint_limits=limits(velocity=velocity)):
        assert step.observable.tolist() == [True, False]
        assert float(step.covariance[1, 1]) == pytest.approx(std**2, rel=1e-3)
        assert step.covariance[0, 0] < 1e-6


@pytest.mark.parametrize("content", ["noise", "black", "white", "stripes"])
def test_an_untrained_network_on_meaningless_frames_stays_finite(content: str) -> None:
    joint_limits = limits(dtype=torch.float32, velocity=2.0)
    frames = {
        "noise": torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),
        "black": torch.zeros(6, 3, SIDE, SIDE),
        "white": torch.ones(6, 3, SIDE, SIDE),
        "stripes": random_images(6).round(),
    }[content]
    tracker = make_tracker(untrained(), LearnedOptions(), joint_limits)
    with torch.no_grad():
        tracker.start(frames[0], None)
        steps = [tracker.step(frame, DT) for frame in frames[1:]]
    for step in steps:
        for value in (step.delta_q, step.position, step.position_covariance, step.covariance, step.residual):
            assert value.isfinite().all()
        for covariance in (step.position_covariance, step.covariance):
            torch.testing.assert_close(covariance, covariance.T, rtol=1e-3, atol=1e-9)
            assert torch.linalg.eigvalsh(covariance.double()).min() > -1e-9
        assert (step.position.abs() <= 1.2).all() and (step.delta_q.abs() <= 2.0 * DT * 1.001).all()
