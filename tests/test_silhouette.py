"""The robot's silhouette against a background that was seen before, and the atlas of its surface."""

from __future__ import annotations

import pytest
import torch
from rendered import Clip, clip
from torch import Tensor

from jidm import AnalyticField
from jidm.estimation.alignment import AlignOptions, align
from jidm.estimation.background_model import BackgroundModel
from jidm.estimation.factors.photometric import Appearance
from jidm.estimation.factors.silhouette import SilhouetteBoundary, SilhouetteFactor, robot_mask
from jidm.estimation.reference_appearance import ReferenceAppearance
from jidm.video.pyramid import BrightnessPyramid

FINGER = "planar_finger_3"


@pytest.fixture(scope="module")
def finger() -> Clip:
    return clip(FINGER, frames=8, seed=1)


@pytest.fixture(scope="module")
def field(finger: Clip) -> AnalyticField:
    return AnalyticField(finger.robot, finger.camera, points=4000, occluders=20000, contour_points=8000)


def evidence_of(field: AnalyticField, q: Tensor, height: int, width: int) -> Tensor:
    """1 on the robot, -1 off it, in full resolution, from the geometry alone."""
    _, mask = field.dense(q, height, width)
    return 2 * mask.double() - 1


def truth(c: Clip, t: int) -> Tensor:
    return torch.from_numpy(c.q[t])


# ---- mask and rim ----------------------------------------------------------------------------------------------------


def test_a_mask_covers_the_robots_points_and_closes_gaps_but_not_what_lies_around() -> None:
    square = torch.cartesian_prod(torch.arange(30.0, 60.0, 2.0), torch.arange(20.0, 50.0, 2.0))
    square = square[(square - torch.tensor([44.0, 34.0])).norm(dim=-1) > 1]  # one point is missing
    mask = robot_mask(square, 80, 100, cell=2.0)
    assert mask.shape == (40, 50)
    assert mask[10:25, 15:30].min() == 1
    outside = mask.clone()
    outside[10:25, 15:30] = 0
    assert outside.sum() == 0
    beyond = robot_mask(torch.tensor([[-5.0, 10.0], [10.0, 500.0]]), 80, 100, cell=2.0)
    assert beyond.sum() == 0


def test_the_rim_lies_on_the_silhouette_and_its_normals_lead_off_it(finger: Clip, field: AnalyticField) -> None:
    height, width = finger.frames.shape[-2:]
    pose = field.at(truth(finger, 2))
    rim = SilhouetteBoundary.of(pose, height, width)
    assert len(rim.points) > 100
    torch.testing.assert_close(rim.normals.norm(dim=-1), torch.ones(len(rim.points)).double())
    out, far_in = (
        evidence_of(field, pose.q, height, width)[v.clamp(0, height - 1), u.clamp(0, width - 1)]
        for u, v in ((rim.points + s * rim.normals).round().long().unbind(-1) for s in (5.0, -2.5))
    )
    assert float((out < 0).double().mean()) > 0.9
    assert float((far_in > 0).double().mean()) > 0.9


def test_the_rims_jacobian_is_the_fields_across_it(finger: Clip, field: AnalyticField) -> None:
    q, h = truth(finger, 2), 1e-6
    height, width = finger.frames.shape[-2:]
    rim = SilhouetteBoundary.of(field.at(q), height, width)
    pose = field.at(q)
    start = pose.surface().points
    index = torch.cdist(rim.points, start).argmin(-1)
    for k in range(3):
        step = torch.zeros(3).double()
        step[k] = h
        moved = (pose.surface(step).points - pose.surface(-step).points)[index] / (2 * h)
        torch.testing.assert_close((moved * rim.normals).sum(-1), rim.jacobian[:, k], rtol=1e-5, atol=1e-4)


# ---- the term --------------------------------------------------------------------------------------------------------


def followed(term: SilhouetteFactor, q: Tensor) -> Tensor:
    for reach in (12.0, 12.0, 6.0, 6.0, 3.0, 3.0):
        model = term.linearize(q, reach)
        assert model is not None
        damped = model.H + 1e-3 * model.H.diagonal().mean() * torch.eye(len(q)).double()
        q = q + torch.linalg.solve(damped, model.g)
    return q


def test_a_silhouette_that_fits_pulls_nowhere_and_has_no_mismatch(finger: Clip, field: AnalyticField) -> None:
    q = truth(finger, 2)
    term = SilhouetteFactor(field, evidence_of(field, q, *finger.frames.shape[-2:]))
    assert float((followed(term, q) - q).abs().max()) < 0.01
    assert term.mismatch(q) < 0.1  # cells on the border
    assert term.mismatch(q + torch.tensor([0.0, 0.3, 0.0])) > term.mismatch(q) + 0.1


@pytest.mark.parametrize("off", [(0.15, 0.0, 0.0), (0.0, -0.2, 0.0), (-0.1, 0.15, 0.1)])
def test_a_pose_far_off_is_led_back(off: tuple[float, float, float], finger: Clip, field: AnalyticField) -> None:
    """By much more than any outline search would reach."""
    q = truth(finger, 2)
    term = SilhouetteFactor(field, evidence_of(field, q, *finger.frames.shape[-2:]))
    start = q + torch.tensor(off).double()
    assert float((followed(term, start) - q).abs().max()) < 0.1 * float((start - q).abs().max()) + 0.005


def test_where_nothing_is_known_of_the_background_the_silhouette_says_nothing(
    finger: Clip, field: AnalyticField
) -> None:
    q = truth(finger, 2)
    evidence = evidence_of(field, q, *finger.frames.shape[-2:])
    assert SilhouetteFactor(field, 0 * evidence).linearize(q, 6.0) is None
    assert SilhouetteFactor(field, 0 * evidence).mismatch(q) == 0.0
    # Neither does a camera that moves: everything looks like something in front.
    assert SilhouetteFactor(field, torch.ones_like(evidence)).linearize(q, 6.0) is None


@pytest.mark.parametrize(("off", "led"), [(0.03, False), (0.15, True)])
def test_a_pose_is_led_only_where_much_is_won_by_it(
    off: float, led: bool, finger: Clip, field: AnalyticField, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the robot holds is seen before the background as well."""
    monkeypatch.setattr("jidm.estimation.factors.photometric.BrightnessTerm.cost", lambda self, q, level: 0.0)
    q = truth(finger, 2)
    seen = q + torch.tensor([off, 0.0, 0.0]).double()
    pyramid = BrightnessPyramid.from_frame(torch.full_like(finger.frames[2], 0.5))  # brightness says nothing

    def found(gain: float) -> Tensor:
        return align(
            pyramid, [Appearance.of(field.at(q), pyramid)], [q],
            silhouette=SilhouetteFactor(field, evidence_of(field, seen, *finger.frames.shape[-2:])),
            bounds=(q - 1, q + 1), prior=(q, torch.full_like(q, 10.0)),
            options=AlignOptions(fine_levels=(), search_radii=(), silhouette_min_improvement=gain),
        ).q  # fmt: skip

    near_seen = float((found(0.0) - seen).abs().max()) < 0.6 * off
    assert near_seen
    assert (float((found(0.5) - seen).abs().max()) < 0.6 * off) == led
    assert led or torch.equal(found(0.5), q)


# ---- the background's evidence ---------------------------------------------------------------------------------------


def picture(level: float, height: int = 80, width: int = 100) -> Tensor:
    return torch.full((3, height, width), level).double()


def remembered(frames: list[Tensor]) -> BackgroundModel:
    robot = torch.cartesian_prod(torch.arange(45.0, 55.0), torch.arange(80.0)).double()
    background = BackgroundModel()
    for frame in frames:
        background.update(robot, BrightnessPyramid.from_frame(frame))
    return background


def evidence(background: BackgroundModel, frame: Tensor) -> Tensor:
    found = background.foreground_score(BrightnessPyramid.from_frame(frame))
    assert found is not None
    return found


def test_what_stands_before_a_known_background_is_told_from_it() -> None:
    assert BackgroundModel().foreground_score(BrightnessPyramid.from_frame(picture(0.4))) is None
    background = remembered([picture(0.4)])
    now = picture(0.4)
    now[:, :, 10:20] = torch.tensor([0.4, 0.6, 0.3]).double()[:, None, None]
    got = evidence(background, now)
    assert float(got[:, 11:19].min()) > 0.95
    assert float(got[:, 25:40].max()) < -0.7
    assert float(got[:, 46:54].abs().max()) == 0.0  # covered by the robot from the first frame on


def test_colour_tells_where_brightness_does_not() -> None:
    green, red = torch.tensor([0.2, 0.5, 0.2]).double(), torch.tensor([0.2, 0.5, 0.2]).double()
    red[0] += 0.114 / 0.299 * 0.4
    red[2] -= 0.4 * 0.5
    red[1] += (0.114 * 0.2 - 0.299 * (red[0] - 0.2)) / 0.587  # the luma of both is the same
    luma = torch.tensor([0.299, 0.587, 0.114]).double()
    assert float((luma * (red - green)).sum()) == pytest.approx(0.0, abs=1e-6)
    background = remembered([green[:, None, None].expand(3, 80, 100)])
    got = evidence(background, red[:, None, None].expand(3, 80, 100))
    assert float(got[:, :30].min()) > 0.8


def test_a_place_that_is_never_the_same_is_no_evidence() -> None:
    flickering = [picture(0.4 + 0.15 * (-1) ** k) for k in range(12)]
    assert float(evidence(remembered(flickering), picture(0.55))[:, :30].max()) < 0
    assert float(evidence(remembered([picture(0.4)] * 12), picture(0.55))[:, :30].min()) > 0.95


# ---- the atlas -------------------------------------------------------------------------------------------------------


def test_an_atlas_keeps_what_was_seen_first_and_adds_what_comes_into_view(finger: Clip, field: AnalyticField) -> None:
    poses = [field.at(truth(finger, t)) for t in (0, 7)]
    bright, dark = (BrightnessPyramid.from_frame(torch.full_like(finger.frames[0], level)) for level in (0.8, 0.2))
    first, later = Appearance.of(poses[0], bright), Appearance.of(poses[1], dark)
    atlas = ReferenceAppearance(first, field.points)
    before = atlas.appearance_at(poses[1])
    assert set(before.index.tolist()) <= set(first.index.tolist())
    atlas.add(later)
    after = atlas.appearance_at(poses[1])
    assert len(after) > len(before)
    old = torch.isin(after.index, first.index)
    torch.testing.assert_close(after.brightness[0][old], torch.full_like(after.brightness[0][old], 0.8))
    torch.testing.assert_close(after.brightness[0][~old], torch.full_like(after.brightness[0][~old], 0.2))
    assert after.gradient is None
    assert after.normals is not None
    torch.testing.assert_close(after.normals[~old], later.normals[torch.isin(later.index, after.index[~old])])
