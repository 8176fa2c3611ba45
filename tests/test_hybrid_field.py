"""Learned eyes with the exact geometry: the field is the analytic one, the network reads the first pose."""

from __future__ import annotations

import pytest
import torch
from rendered import Clip, clip
from step_fields import config, random_images, untrained
from torch import Tensor

from jidm import AnalyticField, Embodiment, load_embodiment
from jidm.errors import CheckpointError
from jidm.estimation.alignment import AlignOptions
from jidm.estimation.analytic_tracker import AnalyticTracker, AnalyticTrackerOptions, JointLimits
from jidm.estimation.factors.contour import ContourFactor
from jidm.estimation.initialization import initialize_pose
from jidm.estimation.kalman import Gaussian
from jidm.fields.base import ContourField, JacobianField, PosePredictor
from jidm.fields.free import LearnedField
from jidm.fields.hybrid import HybridField
from jidm.video.letterbox import Letterbox

ROBOT = "planar_finger_2"


@pytest.fixture(scope="module")
def robot() -> Embodiment:
    return load_embodiment(ROBOT)


def test_it_is_the_exact_field_and_reads_what_the_network_reads(robot: Embodiment) -> None:
    learned, camera = untrained(), robot.camera()
    field, exact = HybridField(learned, robot, camera), AnalyticField(robot, camera)
    assert isinstance(field, (PosePredictor, JacobianField, ContourField)) and not isinstance(exact, PosePredictor)
    q = torch.tensor([0.3, -0.5]).double()
    torch.testing.assert_close(field.at(q).surface().jacobian, exact.at(q).surface().jacobian)
    frame = random_images(1, 0, camera.height, camera.width)[0]
    read, std = field.predict_pose(frame)
    fit = Letterbox(camera.height, camera.width, *learned.config.input_size)
    with torch.no_grad():
        expected, spread = learned.predict_pose(learned.encode(fit.apply(frame)[None]))
    torch.testing.assert_close(read, expected[0].double())
    torch.testing.assert_close(std, spread[0].double())


def test_other_joints_are_refused(robot: Embodiment) -> None:
    other = LearnedField(config(("hinge2", "hinge1")))
    with pytest.raises(CheckpointError, match=r"knows the joints hinge2, hinge1, 'planar_finger_2' has hinge1, hinge2"):
        HybridField(other, robot, robot.camera())
    with pytest.raises(CheckpointError, match="use the robot it was trained for"):
        HybridField(untrained(), load_embodiment("planar_finger_3"), robot.camera())


# ---- the first pose --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen() -> Clip:
    return clip("planar_finger_3", frames=4, seed=1)


@pytest.fixture(scope="module")
def field(seen: Clip) -> AnalyticField:
    return AnalyticField(seen.robot, seen.camera, points=4000, occluders=20000)


def reading(q: Tensor, std: float) -> Gaussian:
    return Gaussian(q, torch.eye(len(q)).double() * std**2)


def wide(n: int) -> tuple[Tensor, Tensor]:
    return torch.full((n,), -3.0).double(), torch.full((n,), 3.0).double()


@pytest.mark.parametrize("off", [(0.04, 0.0, 0.0), (0.0, -0.05, 0.05), (-0.03, 0.04, -0.05)])
def test_a_reading_is_drawn_to_the_outlines(off: tuple[float, float, float], seen: Clip, field: AnalyticField) -> None:
    truth = torch.from_numpy(seen.q[0])
    start = reading(truth + torch.tensor(off).double(), 0.05)
    found = initialize_pose(start, seen.frames[0], ContourFactor(field), wide(3), AlignOptions())
    assert float((found.mean - truth).abs().max()) < 0.015
    assert (found.covariance.diagonal() < start.covariance.diagonal()).all()


def test_a_picture_without_lines_leaves_the_reading_as_it_is(seen: Clip, field: AnalyticField) -> None:
    start = reading(torch.from_numpy(seen.q[0]) + 0.04, 0.05)
    gray = torch.full_like(seen.frames[0], 0.5)
    found = initialize_pose(start, gray, ContourFactor(field), wide(3), AlignOptions())
    torch.testing.assert_close(found.mean, start.mean)
    torch.testing.assert_close(found.covariance, start.covariance)


def test_the_first_pose_stays_inside_the_limits(seen: Clip, field: AnalyticField) -> None:
    truth = torch.from_numpy(seen.q[0])
    low, high = truth - 1, truth + 1
    high[1] = truth[1] - 0.04
    start = reading(torch.minimum(truth + 0.03, high), 0.05)
    found = initialize_pose(start, seen.frames[0], ContourFactor(field), (low, high), AlignOptions())
    assert (found.mean <= high + 1e-9).all()


class Reader(AnalyticField):
    """Reads one pose off every picture."""

    told: Tensor

    def predict_pose(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        return self.told, torch.full_like(self.told, 0.05)


@pytest.mark.parametrize("anchor", [True, False])
def test_a_tracker_begins_where_its_field_reads_the_pose(anchor: bool, seen: Clip) -> None:
    reader = Reader(seen.robot, seen.camera, points=2000, occluders=20000)
    truth = torch.from_numpy(seen.q[0])
    reader.told = truth + torch.tensor([0.04, -0.04, 0.03]).double()
    lower, upper, speed = (
        torch.from_numpy(x.copy()) for x in (seen.robot.lower, seen.robot.upper, seen.robot.velocity)
    )
    tracker = AnalyticTracker(
        reader, JointLimits(lower, upper, speed, torch.ones(3).double()), AnalyticTrackerOptions(use_contours=anchor)
    )  # fmt: skip
    tracker.start(seen.frames[0], None)
    std = tracker.position_covariance.diagonal().sqrt()
    if anchor:
        assert float((tracker.q - truth).abs().max()) < 0.015
        assert (std > 0).all() and (std < 0.05).all()
    else:  # outlines are not to be used
        torch.testing.assert_close(tracker.q, reader.told.to(tracker.q))
        torch.testing.assert_close(std, torch.full_like(std, 0.05))


def test_without_a_pose_a_field_that_cannot_read_one_is_of_no_use(seen: Clip, field: AnalyticField) -> None:
    tracker = AnalyticTracker(field, JointLimits(*(torch.ones(3).double(),) * 4), AnalyticTrackerOptions())
    with pytest.raises(AssertionError, match="must read the pose"):
        tracker.start(seen.frames[0], None)
