"""The hybrid field: the analytic Jacobian, and a network that predicts the first pose."""

from __future__ import annotations

import pytest
import torch
from step_fields import config, random_images, untrained

from jidm import AnalyticField, Embodiment, load_embodiment
from jidm.errors import CheckpointError
from jidm.fields.base import ContourField, JacobianField, PosePredictor
from jidm.fields.free import LearnedField
from jidm.fields.hybrid import HybridField
from jidm.video.letterbox import Letterbox

ROBOT = "planar_finger_2"


@pytest.fixture(scope="module")
def robot() -> Embodiment:
    return load_embodiment(ROBOT)


def test_jacobians_are_analytic_and_poses_are_the_networks(robot: Embodiment) -> None:
    learned, camera = untrained(), robot.camera()
    field, exact = HybridField(learned, robot, camera), AnalyticField(robot, camera)
    assert isinstance(field, (PosePredictor, JacobianField, ContourField)) and not isinstance(exact, PosePredictor)
    q = torch.tensor([0.3, -0.5]).double()
    torch.testing.assert_close(field.at(q).surface().jacobian, exact.at(q).surface().jacobian)
    frame = random_images(1, 0, camera.height, camera.width)[0]
    q_predicted, std = field.predict_pose_from_frame(frame)
    letterbox = Letterbox(camera.height, camera.width, *learned.config.input_size)
    with torch.no_grad():
        expected, expected_std = learned.predict_pose(learned.encode(letterbox.apply(frame)[None]))
    torch.testing.assert_close(q_predicted, expected[0].double())
    torch.testing.assert_close(std, expected_std[0].double())


def test_a_network_of_other_joints_raises(robot: Embodiment) -> None:
    other = LearnedField(config(("hinge2", "hinge1")))
    with pytest.raises(CheckpointError, match=r"has the joints hinge2, hinge1, 'planar_finger_2' has hinge1, hinge2"):
        HybridField(other, robot, robot.camera())
    with pytest.raises(CheckpointError, match="use the robot it was trained for"):
        HybridField(untrained(), load_embodiment("planar_finger_3"), robot.camera())
