"""Tracking with an exact field: flow alone, gaps, contours and reference appearance against drift, recovery when lost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from rendered import FPS, Clip, clip

from jidm import AnalyticField
from jidm.estimation.analytic_measurement import AnalyticMeasurement, AnalyticOptions
from jidm.estimation.tracker import JointLimits, Tracker
from jidm.flow import DisFlow, Flow


@pytest.fixture(scope="module")
def finger() -> Clip:
    return clip("planar_finger_3", frames=8, seed=1)


@pytest.fixture(scope="module")
def field(finger: Clip) -> AnalyticField:
    return AnalyticField(finger.robot, finger.camera, points=1500, occluders=10000, contour_points=5000)


def limits(c: Clip) -> JointLimits:
    lower, upper, velocity = (torch.from_numpy(x.copy()) for x in (c.robot.lower, c.robot.upper, c.robot.velocity))
    return JointLimits(lower, upper, velocity, torch.ones(c.robot.n).double())


def tracker(c: Clip, field: AnalyticField, **options: object) -> Tracker:
    made = Tracker(AnalyticMeasurement(field, AnalyticOptions(**options)), limits(c))  # type: ignore[arg-type]
    made.start(c.frames[0], torch.from_numpy(c.q[0]))
    return made


def test_exact_flow_is_tracked_exactly(finger: Clip, field: AnalyticField) -> None:
    made = tracker(finger, field, refine="none")
    for t in range(7):
        step = made.step(finger.frames[t + 1], 1 / FPS, finger.flow[t])
        assert step.valid
        np.testing.assert_allclose(step.delta_q.numpy(), finger.steps[t], atol=2e-4)
        assert float(step.residual) < 0.15  # flow sampled across the robot's boundary
        assert float(step.explained_fraction) > 0.95
    np.testing.assert_allclose(made.q.numpy(), finger.q[-1], atol=5e-4)


def test_a_gap_widens_the_bounds_and_is_not_a_step(finger: Clip, field: AnalyticField) -> None:
    made, dt = tracker(finger, field, refine="none"), 1 / FPS
    held = [made.skip(dt), made.skip(dt)]
    for k, step in enumerate(held, 1):
        assert not step.valid and not step.accepted
        assert torch.equal(step.position, torch.from_numpy(finger.q[0]))
        torch.testing.assert_close(step.position_covariance.diagonal().sqrt(), limits(finger).velocity * k * dt)
    flow = Flow(finger.flow.flow[:3].sum(0), finger.flow.weight[0])  # about the flow from frame 0 to frame 3
    after = made.step(finger.frames[3], dt, flow)
    assert not after.valid  # it spans three intervals
    assert float(after.delta_q.abs().max()) == 0.0
    np.testing.assert_allclose(after.position.numpy(), finger.q[3], atol=2e-2)
    assert made.step(finger.frames[4], dt, finger.flow[3]).valid


def test_without_any_visible_flow_a_step_is_not_valid_and_as_uncertain_as_the_largest(
    finger: Clip, field: AnalyticField
) -> None:
    made = tracker(finger, field, refine="none")
    blind = Flow(finger.flow.flow[0], torch.zeros_like(finger.flow.weight[0]))
    step = made.step(finger.frames[1], 1 / FPS, blind)
    assert not step.valid
    assert not step.observable.any()
    std = step.position_covariance.diagonal().sqrt()
    expected = limits(finger).velocity / FPS
    torch.testing.assert_close(std, expected, rtol=1e-3, atol=0)
    assert all(x.isfinite().all() for x in (step.delta_q, step.covariance, step.residual, step.explained_fraction))


def test_uncertainty_grows_without_contours_and_is_bounded_by_them(finger: Clip, field: AnalyticField) -> None:
    options = {"flow": {"refine": "none"}, "relative": {"use_contours": False}, "absolute": {"use_contours": True}}
    last = {}
    for name, chosen in options.items():
        made = tracker(finger, field, **chosen)
        variance = [
            float(made.step(finger.frames[t + 1], 1 / FPS, finger.flow[t]).position_covariance.trace())
            for t in range(4)
        ]
        last[name] = variance[-1]
        if name != "absolute":
            assert all(b > a for a, b in pairwise(variance))
    assert last["absolute"] < last["relative"]


def test_the_reference_appearance_reduces_drift(finger: Clip, field: AnalyticField) -> None:
    """There and back again: aligned to the surface as it was first seen, the last pose is the first."""
    order = [0, 3, 6, 3, 0]
    flow = DisFlow()

    def last_error(use_reference_appearance: bool) -> float:
        made = tracker(finger, field, use_contours=False, use_reference_appearance=use_reference_appearance)
        for a, b in pairwise(order):
            made.step(finger.frames[b], 3 / FPS, flow(finger.frames[a], finger.frames[b]))
        return float((made.q - torch.from_numpy(finger.q[0])).abs().mean())

    with_reference = last_error(True)
    assert with_reference < last_error(False)
    assert with_reference < 2e-3


def test_a_wrong_pose_is_corrected_by_the_silhouette(finger: Clip, field: AnalyticField) -> None:
    """Brightness cannot correct it: what it compares with was sampled at the wrong places."""

    def error(use_contours: bool) -> float:
        made = tracker(finger, field, use_contours=use_contours)
        for t in range(3):  # some of the background becomes known
            made.step(finger.frames[t + 1], 1 / FPS, finger.flow[t])
        made.correct(made.q + torch.tensor([0.16, -0.2, 0.0]).double(), 1e-6)
        made.step(finger.frames[4], 1 / FPS, finger.flow[3])
        return float((made.q - torch.from_numpy(finger.q[4])).abs().max())

    assert error(True) < 0.05
    assert error(False) > 0.08
