"""The first pose of a video: a predicted one is aligned to contours, by the tracker too."""

from __future__ import annotations

import pytest
import torch
from rendered import Clip, clip
from torch import Tensor

from jidm import AnalyticField
from jidm.estimation.alignment import AlignOptions
from jidm.estimation.analytic_measurement import AnalyticMeasurement, AnalyticOptions
from jidm.estimation.factors.contour import ContourMemory
from jidm.estimation.initialization import initialize_pose
from jidm.estimation.kalman import Gaussian
from jidm.estimation.tracker import JointLimits, Tracker


@pytest.fixture(scope="module")
def finger() -> Clip:
    return clip("planar_finger_3", frames=4, seed=1)


@pytest.fixture(scope="module")
def field(finger: Clip) -> AnalyticField:
    return AnalyticField(finger.robot, finger.camera, points=4000, occluders=20000)


def predicted(q: Tensor, std: float) -> Gaussian:
    return Gaussian(q, torch.eye(len(q)).double() * std**2)


def wide(n: int) -> tuple[Tensor, Tensor]:
    return torch.full((n,), -3.0).double(), torch.full((n,), 3.0).double()


@pytest.mark.parametrize("off", [(0.04, 0.0, 0.0), (0.0, -0.05, 0.05), (-0.03, 0.04, -0.05)])
def test_a_predicted_pose_is_aligned_to_contours(
    off: tuple[float, float, float], finger: Clip, field: AnalyticField
) -> None:
    truth = torch.from_numpy(finger.q[0])
    prior = predicted(truth + torch.tensor(off).double(), 0.05)
    found = initialize_pose(prior, finger.frames[0], ContourMemory(field), wide(3), AlignOptions())
    assert float((found.mean - truth).abs().max()) < 0.015
    assert (found.covariance.diagonal() < prior.covariance.diagonal()).all()


def test_without_edges_the_prediction_stays(finger: Clip, field: AnalyticField) -> None:
    prior = predicted(torch.from_numpy(finger.q[0]) + 0.04, 0.05)
    gray = torch.full_like(finger.frames[0], 0.5)
    found = initialize_pose(prior, gray, ContourMemory(field), wide(3), AlignOptions())
    torch.testing.assert_close(found.mean, prior.mean)
    torch.testing.assert_close(found.covariance, prior.covariance)


def test_the_first_pose_stays_inside_the_limits(finger: Clip, field: AnalyticField) -> None:
    truth = torch.from_numpy(finger.q[0])
    lower, upper = truth - 1, truth + 1
    upper[1] = truth[1] - 0.04
    prior = predicted(torch.minimum(truth + 0.03, upper), 0.05)
    found = initialize_pose(prior, finger.frames[0], ContourMemory(field), (lower, upper), AlignOptions())
    assert (found.mean <= upper + 1e-9).all()


class PredictingField(AnalyticField):
    """An exact field that predicts one pose from every frame."""

    predicted_q: Tensor

    def predict_pose_from_frame(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        return self.predicted_q, torch.full_like(self.predicted_q, 0.05)


@pytest.mark.parametrize("use_contours", [True, False])
def test_without_q0_a_tracker_starts_at_the_predicted_pose(use_contours: bool, finger: Clip) -> None:
    field = PredictingField(finger.robot, finger.camera, points=2000, occluders=20000)
    truth = torch.from_numpy(finger.q[0])
    field.predicted_q = truth + torch.tensor([0.04, -0.04, 0.03]).double()
    lower, upper, velocity = (
        torch.from_numpy(x.copy()) for x in (finger.robot.lower, finger.robot.upper, finger.robot.velocity)
    )
    model = AnalyticMeasurement(field, AnalyticOptions(use_contours=use_contours))
    tracker = Tracker(model, JointLimits(lower, upper, velocity, torch.ones(3).double()))
    tracker.start(finger.frames[0], None)
    std = tracker.position_covariance.diagonal().sqrt()
    if use_contours:
        assert float((tracker.q - truth).abs().max()) < 0.015
        assert (std > 0).all() and (std < 0.05).all()
    else:
        torch.testing.assert_close(tracker.q, field.predicted_q.to(tracker.q))
        torch.testing.assert_close(std, torch.full_like(std, 0.05))


def test_a_field_that_cannot_predict_poses_needs_q0(finger: Clip, field: AnalyticField) -> None:
    model = AnalyticMeasurement(field, AnalyticOptions())
    assert not model.predicts_pose
    with pytest.raises(AssertionError, match="must predict the pose"):
        Tracker(model, JointLimits(*(torch.ones(3).double(),) * 4)).start(finger.frames[0], None)
