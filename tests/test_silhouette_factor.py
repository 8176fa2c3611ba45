"""The silhouette factor: robot masks, boundary points, and poses corrected from far away."""

from __future__ import annotations

import pytest
import torch
from rendered import Clip, clip
from torch import Tensor

from jidm import AnalyticField
from jidm.estimation.alignment import AlignOptions, align
from jidm.estimation.factors.photometric import SurfaceAppearance
from jidm.estimation.factors.silhouette import SilhouetteBoundary, SilhouetteFactor, robot_mask
from jidm.estimation.problem import POSITION
from jidm.video.pyramid import BrightnessPyramid

FINGER = "planar_finger_3"


@pytest.fixture(scope="module")
def finger() -> Clip:
    return clip(FINGER, frames=8, seed=1)


@pytest.fixture(scope="module")
def field(finger: Clip) -> AnalyticField:
    return AnalyticField(finger.robot, finger.camera, points=4000, occluders=20000, contour_points=8000)


def exact_score(field: AnalyticField, q: Tensor, height: int, width: int) -> Tensor:
    """Foreground score from the geometry: 1 on the robot, -1 off it."""
    _, mask = field.dense(q, height, width)
    return 2 * mask.double() - 1


def truth(c: Clip, t: int) -> Tensor:
    return torch.from_numpy(c.q[t])


# ---- mask and boundary -----------------------------------------------------------------------------------------------


def test_a_mask_covers_the_points_and_small_gaps_but_not_the_surroundings() -> None:
    square = torch.cartesian_prod(torch.arange(30.0, 60.0, 2.0), torch.arange(20.0, 50.0, 2.0))
    square = square[(square - torch.tensor([44.0, 34.0])).norm(dim=-1) > 1]  # one point is missing
    mask = robot_mask(square, 80, 100, cell=2.0)
    assert mask.shape == (40, 50)
    assert mask[10:25, 15:30].min() == 1
    outside = mask.clone()
    outside[10:25, 15:30] = 0
    assert outside.sum() == 0
    outside_image = robot_mask(torch.tensor([[-5.0, 10.0], [10.0, 500.0]]), 80, 100, cell=2.0)
    assert outside_image.sum() == 0


def test_boundary_points_lie_on_the_silhouette_with_outward_normals(finger: Clip, field: AnalyticField) -> None:
    height, width = finger.frames.shape[-2:]
    pose = field.at(truth(finger, 2))
    boundary = SilhouetteBoundary.of(pose, height, width)
    assert len(boundary.points) > 100
    torch.testing.assert_close(boundary.normals.norm(dim=-1), torch.ones(len(boundary.points)).double())
    outside, inside = (
        exact_score(field, pose.q, height, width)[v.clamp(0, height - 1), u.clamp(0, width - 1)]
        for u, v in ((boundary.points + s * boundary.normals).round().long().unbind(-1) for s in (5.0, -2.5))
    )
    assert float((outside < 0).double().mean()) > 0.9
    assert float((inside > 0).double().mean()) > 0.9


def test_the_boundary_jacobian_is_that_of_the_points_along_the_normal(finger: Clip, field: AnalyticField) -> None:
    q, h = truth(finger, 2), 1e-6
    height, width = finger.frames.shape[-2:]
    boundary = SilhouetteBoundary.of(field.at(q), height, width)
    pose = field.at(q)
    start = pose.surface().points
    index = torch.cdist(boundary.points, start).argmin(-1)
    for k in range(3):
        step = torch.zeros(3).double()
        step[k] = h
        moved = (pose.surface(step).points - pose.surface(-step).points)[index] / (2 * h)
        torch.testing.assert_close((moved * boundary.normals).sum(-1), boundary.jacobian[:, k], rtol=1e-5, atol=1e-4)


# ---- the factor ------------------------------------------------------------------------------------------------------


def gauss_newton(score: Tensor, field: AnalyticField, q: Tensor) -> Tensor:
    for search_radius in (12.0, 12.0, 6.0, 6.0, 3.0, 3.0):
        equations = SilhouetteFactor(field, score, search_radius).linearize({POSITION: q})
        assert equations is not None
        damped = equations.H + 1e-3 * equations.H.diagonal().mean() * torch.eye(len(q)).double()
        q = q + torch.linalg.solve(damped, equations.g)
    return q


def test_the_true_pose_is_a_fixed_point_with_the_least_mismatch(finger: Clip, field: AnalyticField) -> None:
    q = truth(finger, 2)
    score = exact_score(field, q, *finger.frames.shape[-2:])
    assert float((gauss_newton(score, field, q) - q).abs().max()) < 0.01
    factor = SilhouetteFactor(field, score)
    assert factor.mismatch(q) < 0.1  # cells on the boundary
    assert factor.mismatch(q + torch.tensor([0.0, 0.3, 0.0])) > factor.mismatch(q) + 0.1


@pytest.mark.parametrize("off", [(0.15, 0.0, 0.0), (0.0, -0.2, 0.0), (-0.1, 0.15, 0.1)])
def test_a_large_pose_error_is_corrected(off: tuple[float, float, float], finger: Clip, field: AnalyticField) -> None:
    """From much further away than contours could be matched."""
    q = truth(finger, 2)
    score = exact_score(field, q, *finger.frames.shape[-2:])
    start = q + torch.tensor(off).double()
    assert float((gauss_newton(score, field, start) - q).abs().max()) < 0.1 * float((start - q).abs().max()) + 0.005


def test_without_a_known_background_there_is_no_measurement(finger: Clip, field: AnalyticField) -> None:
    q = truth(finger, 2)
    score = exact_score(field, q, *finger.frames.shape[-2:])
    unknown = SilhouetteFactor(field, 0 * score, 6.0)
    assert unknown.linearize({POSITION: q}) is None and unknown.mismatch(q) == 0.0
    # Nor with a camera that moved, when everything differs from the background.
    assert SilhouetteFactor(field, torch.ones_like(score), 6.0).linearize({POSITION: q}) is None


@pytest.mark.parametrize(("off", "large"), [(0.03, False), (0.15, True)])
def test_alignment_follows_the_silhouette_only_for_a_large_improvement(
    off: float, large: bool, finger: Clip, field: AnalyticField
) -> None:
    """An object in the robot's hand is foreground as well, and must not change a pose that is right."""
    q = truth(finger, 2)
    shown = q + torch.tensor([off, 0.0, 0.0]).double()
    pyramid = BrightnessPyramid.from_frame(torch.full_like(finger.frames[2], 0.5))  # no brightness gradient

    def aligned(min_improvement: float) -> Tensor:
        return align(
            pyramid, [SurfaceAppearance.of(field.at(q), pyramid)], [q],
            silhouette=SilhouetteFactor(field, exact_score(field, shown, *finger.frames.shape[-2:])),
            bounds=(q - 1, q + 1), prior=(q, torch.full_like(q, 10.0)),
            options=AlignOptions(fine_levels=(), search_radii=(), silhouette_min_improvement=min_improvement),
        ).q  # fmt: skip

    assert float((aligned(0.0) - shown).abs().max()) < 0.6 * off
    assert (float((aligned(0.5) - shown).abs().max()) < 0.6 * off) == large
    assert large or torch.equal(aligned(0.5), q)
