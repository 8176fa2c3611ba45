"""Metrics against numbers by hand, invariances, and independent oracles (NumPy, PyBullet-checked kinematics)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from jidm.errors import InputError
from jidm.evaluation import metrics
from jidm.fields.analytic import AnalyticField
from jidm.robot.embodiment import Embodiment
from jidm.robot.kinematics import Kinematics
from jidm.robot.registry import load_embodiment


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_nve_by_hand():
    truth = torch.tensor([[1.0, -2.0], [3.0, 2.0]])
    error = torch.tensor([[0.5, 0.0], [-0.5, 1.0]])
    assert float(metrics.nve(error, truth)) == pytest.approx(2.0 / 8.0)
    assert metrics.nve_per_joint(error, truth).tolist() == pytest.approx([1.0 / 4.0, 1.0 / 4.0])


def test_nve_of_no_motion_is_one_and_of_the_truth_zero():
    truth = draw(5, 7, 3)
    assert float(metrics.nve(-truth, truth)) == pytest.approx(1.0)
    assert float(metrics.nve(torch.zeros_like(truth), truth)) == 0.0
    assert metrics.nve_per_joint(-truth, truth).tolist() == pytest.approx([1.0] * 3)


def test_nve_does_not_depend_on_the_unit_or_on_how_steps_are_batched():
    truth, error = draw(6, 4, 2), draw(6, 4, 2, seed=1)
    one = metrics.nve(error, truth)
    assert torch.allclose(metrics.nve(error * 1000, truth * 1000), one)
    assert torch.allclose(metrics.nve(error.reshape(24, 2), truth.reshape(24, 2)), one)


def test_nve_of_a_joint_that_never_moves_is_nan():
    truth = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    per_joint = metrics.nve_per_joint(torch.full_like(truth, 0.1), truth)
    assert float(per_joint[0]) == pytest.approx(0.1) and math.isnan(per_joint[1])
    assert math.isnan(metrics.nve(truth, torch.zeros_like(truth)))


def test_action_mse_and_its_ratio_by_hand():
    error = torch.tensor([[1.0, -3.0]])
    assert float(metrics.action_mse(error)) == 5.0
    assert float(metrics.mse_ratio(error, 2 * error)) == pytest.approx(0.25)
    with pytest.raises(InputError, match="not of the same videos"):
        metrics.mse_ratio(error, torch.zeros(3, 2))


def test_correlation_is_numpys():
    decoded, truth = draw(40, 3), draw(40, 3, seed=1)
    decoded = decoded + torch.tensor([2.0, -1.0, 0.0]) * truth
    expected = [np.corrcoef(decoded[:, k].numpy(), truth[:, k].numpy())[0, 1] for k in range(3)]
    assert metrics.correlation(decoded, truth).tolist() == pytest.approx(expected, abs=1e-12)


def test_correlation_ignores_scale_and_offset_but_not_sign():
    truth = draw(30, 2)
    decoded = truth * torch.tensor([3.0, -0.1]) + torch.tensor([100.0, 5.0])
    assert metrics.correlation(decoded, truth).tolist() == pytest.approx([1.0, -1.0])


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_correlation_with_a_constant_joint_is_nan(constant: float):
    still = torch.full((31, 1), constant)
    assert metrics.correlation(still, torch.rand(31, 1)).isnan().all()
    assert metrics.correlation(torch.rand(31, 1), still).isnan().all()


def test_moving_joints_by_mean_speed():
    velocity = torch.tensor([[0.1, -0.4, 0.0], [-0.1, 0.0, 0.0]])
    assert metrics.moving_joints(velocity, 0.15).tolist() == [False, True, False]


# ---- positions ------------------------------------------------------------------------------------------------------


def test_share_within_counts_the_bound():
    q = torch.zeros(4, 1, dtype=torch.float64)
    position = torch.tensor([[0.05], [-0.05], [0.0500001], [0.0]], dtype=torch.float64)
    assert float(metrics.fraction_within(position, q, 0.05)) == 0.75


def test_integrating_true_steps_returns_the_trajectory():
    q = draw(2, 9, 3)
    assert torch.allclose(metrics.integrate_steps(q[:, 0], q.diff(dim=1)), q)


def test_tip_error_of_one_joint_is_the_chord():
    robot = load_embodiment("planar_finger_1")
    kinematics = Kinematics.from_embodiment(robot)
    tip = robot.model.link_index(robot.tip_links[0])
    q = torch.zeros(1, dtype=torch.float64)
    turn = torch.tensor([0.3], dtype=torch.float64)
    pose = kinematics.link_poses(q)[tip]
    # The whole finger rotates about the first joint, whose axis passes through the joint's origin.
    axis_link = robot.model.link_index(_first_moving_link(robot))
    radius = (pose[:3, 3] - kinematics.link_poses(q)[axis_link, :3, 3]).norm()
    assert float(metrics.tip_error(kinematics, [tip], q + turn, q)) == pytest.approx(
        2 * float(radius) * math.sin(0.15), rel=1e-9
    )
    assert float(metrics.tip_error(kinematics, [tip], q, q)) == 0.0


def _first_moving_link(robot: Embodiment) -> str:
    kinematics = Kinematics.from_embodiment(robot)
    a, b = kinematics.link_poses(torch.tensor([[0.0], [0.5]], dtype=torch.float64))
    turned = (a - b).abs().amax((-1, -2)) > 1e-9
    return robot.model.links[int(turned.nonzero()[0])].name


# ---- flow and field -------------------------------------------------------------------------------------------------


def test_endpoint_error_by_hand():
    flow, truth = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    flow[:, 0, 0] = torch.tensor([3.0, 4.0])
    flow[:, 1, 1] = 100.0  # off the robot
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert float(metrics.endpoint_error(flow, truth, mask)) == pytest.approx(2.5)
    assert math.isnan(metrics.endpoint_error(flow, truth, torch.zeros(2, 2)))


def test_field_error_laws():
    robot = load_embodiment("planar_finger_2")
    field = AnalyticField(robot, robot.camera(), points=500, occluders=3000)
    exact, mask = field.dense(torch.zeros(1, 2, dtype=torch.float64), 30, 40)
    assert mask.sum() > 10
    off_robot = torch.where(mask.bool()[:, None, None], exact, torch.full_like(exact, 99.0))
    for made, expected in ((exact, 0.0), (0 * exact, 1.0), (1.2 * exact, 0.2), (-exact, 2.0), (off_robot, 0.0)):
        assert metrics.field_error(made, exact, mask).tolist() == pytest.approx([expected] * 2, abs=1e-12)


def test_field_error_is_per_joint():
    exact = draw(2, 3, 4, 5)
    made = exact.clone()
    made[:, 1] *= 0.5
    assert metrics.field_error(made, exact, torch.ones(4, 5).double()).tolist() == pytest.approx([0.0, 0.5, 0.0])


# ---- uncertainty ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.68, 0.95])
def test_true_gaussian_intervals_cover_their_level(level: float):
    std = draw(20000, 2, seed=3).exp()
    error = draw(20000, 2, seed=4) * std
    assert float(metrics.coverage(error, std, level)) == pytest.approx(level, abs=0.01)
    assert float(metrics.coverage(error, std / 2, level)) < level - 0.1
    assert float(metrics.coverage(error, std * 2, level)) > level + 0.03


def test_coverage_counts_the_chosen_entries():
    error = torch.tensor([[0.1, 10.0], [0.1, 10.0]])
    std = torch.ones(2, 2)
    first = torch.tensor([[True, False], [True, False]])
    assert float(metrics.coverage(error, std, 0.95)) == 0.5
    assert float(metrics.coverage(error, std, 0.95, first)) == 1.0
    assert math.isnan(metrics.coverage(error, std, 0.95, ~first & first))
    with pytest.raises(InputError, match="between 0 and 1"):
        metrics.coverage(error, std, 68.0)


def test_bootstrap_interval_matches_the_standard_error_of_the_mean():
    values = draw(400, seed=5) + 10
    low, high = metrics.ratio_interval(values, torch.ones_like(values), draws=2000)
    standard_error = float(values.std() / 20)
    assert low < float(values.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_bootstrap_resamples_whole_episodes_and_is_determined_by_the_seed():
    numerator, denominator = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0])
    assert metrics.ratio_interval(numerator, denominator) == pytest.approx((1.0, 2.0))
    assert metrics.ratio_interval(numerator, denominator, seed=3) == metrics.ratio_interval(
        numerator, denominator, seed=3
    )
    assert all(map(math.isnan, metrics.ratio_interval(torch.zeros(0), torch.zeros(0))))
