"""Brightness Gauss-Newton: its model against its own cost, light, hidden points."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from rendered import clip
from torch import Tensor

from jidm import AnalyticField
from jidm.estimation.factors import photometric
from jidm.estimation.factors.photometric import Appearance, PhotometricFactor
from jidm.fields.base import SurfaceJacobian
from jidm.video.pyramid import BrightnessPyramid

HEIGHT, WIDTH = 96, 128


@dataclass(frozen=True)
class Sheet:
    """A field without a robot: points that shift linearly with two joints, so its Jacobian is exact."""

    q: Tensor
    points: Tensor
    visible: Tensor
    normals: Tensor | None
    turning: float = 0.0  # how fast the normals turn about y with the first joint

    JACOBIAN = torch.tensor([[3.0, 1.0], [-0.5, 2.0]]).double()

    def surface(self, delta_q: Tensor | None = None) -> SurfaceJacobian:
        delta_q = torch.zeros_like(self.q) if delta_q is None else delta_q
        jacobian = self.JACOBIAN.expand(len(self.points), 2, 2)
        normals = self.normals
        if normals is not None:
            angle = self.turning * (self.q + delta_q)[0]
            c, s = angle.cos(), angle.sin()
            x, y, z = normals.unbind(-1)
            normals = torch.stack([c * x + s * z, y, c * z - s * x], dim=-1)
        return SurfaceJacobian(self.points + self.JACOBIAN @ delta_q, jacobian, self.visible, normals)

    def keep(self, index: Tensor) -> Sheet:
        normals = None if self.normals is None else self.normals[index]
        return replace(self, points=self.points[index], visible=self.visible[index], normals=normals)


def sheet(count: int = 400, normals: bool = False, turning: float = 0.0) -> Sheet:
    random = torch.Generator().manual_seed(0)
    points = 12 + torch.rand(count, 2, generator=random).double() * (torch.tensor([WIDTH, HEIGHT]) - 24)
    n = torch.nn.functional.normalize(torch.randn(count, 3, generator=random).double(), dim=-1)
    visible = torch.ones(count, dtype=torch.bool)
    return Sheet(torch.zeros(2).double(), points, visible, n if normals else None, turning)


def picture(shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """A smooth picture, moved by `shift` px."""
    v, u = torch.meshgrid(torch.arange(HEIGHT).double(), torch.arange(WIDTH).double(), indexing="ij")
    u, v = u - shift[0], v - shift[1]
    grey = 0.5 + 0.15 * (0.11 * u + 0.04 * v).sin() + 0.15 * (0.13 * v - 0.05 * u + 1).sin()
    return grey.expand(3, HEIGHT, WIDTH)


def test_gradient_and_curvature_are_those_of_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights held, the quadratic's vector is minus the gradient of half the weighted squared error."""
    weight = torch.rand(400, generator=torch.Generator().manual_seed(1)).double()
    monkeypatch.setattr(photometric, "tukey_weight", lambda *_: weight)
    pose = sheet()
    reference = Appearance.of(pose, BrightnessPyramid.from_frame(picture()))
    pyramid = BrightnessPyramid.from_frame(picture((1.2, -0.7)))
    q = torch.tensor([0.05, -0.1]).double()
    for level in (0, 1):

        def cost(x: Tensor, level: int = level) -> float:
            surface = pose.surface(x)
            error = pyramid.sample(level, surface.points)[0] - reference.brightness[level]
            return float((weight * pyramid.inside(surface.points) * error.square()).sum() / 2)

        # The reference's gradient only speeds convergence up; with the picture's own in its place the model is exact.
        own = pyramid.sample(level, pose.surface(q).points)[1]
        gradients = tuple(own if k == level else g for k, g in enumerate(reference.gradient))
        model = PhotometricFactor(replace(reference, gradient=gradients), pyramid).linearize(q, level)
        h = 1e-3
        numeric = torch.tensor([(cost(q + h * e) - cost(q - h * e)) / (2 * h) for e in torch.eye(2).double()]).double()
        torch.testing.assert_close(-model.g, numeric, rtol=0.03, atol=0.01 * float(numeric.abs().max()))
        assert model.num_observations == 400
        assert torch.allclose(model.H, model.H.T)
        assert float(torch.linalg.eigvalsh(model.H).min()) > 0


@pytest.mark.parametrize("level", [0, 1])
def test_gauss_newton_finds_the_shift(level: int) -> None:
    truth = torch.tensor([0.35, -0.22]).double()
    shift = Sheet.JACOBIAN @ truth
    reference = Appearance.of(sheet(), BrightnessPyramid.from_frame(picture()))
    term = PhotometricFactor(reference, BrightnessPyramid.from_frame(picture((float(shift[0]), float(shift[1])))))
    q = torch.zeros(2).double()
    errors = [float((q - truth).abs().max())]
    for _ in range(6):
        model = term.linearize(q, level)
        q = q + torch.linalg.solve(model.H, model.g)
        errors.append(float((q - truth).abs().max()))
    assert errors[-1] < 2e-3
    assert errors[1] < 0.2 * errors[0]  # the mean of both gradients makes already the first step a good one
    assert term.cost(truth, level) < 1e-3 < term.cost(torch.zeros(2).double(), level)


def test_outliers_are_left_out() -> None:
    truth = torch.tensor([0.2, 0.1]).double()
    shift = Sheet.JACOBIAN @ truth
    frame = picture((float(shift[0]), float(shift[1]))).clone()
    frame[:, :30] = torch.rand(30, WIDTH, generator=torch.Generator().manual_seed(2)).double()  # something in front
    reference = Appearance.of(sheet(800), BrightnessPyramid.from_frame(picture()))
    term = PhotometricFactor(reference, BrightnessPyramid.from_frame(frame))
    q = torch.zeros(2).double()
    for _ in range(8):
        model = term.linearize(q, 0)
        q = q + torch.linalg.solve(model.H, model.g)
    assert float((q - truth).abs().max()) < 0.01


@pytest.mark.parametrize("lit", [True, False])
def test_light_takes_a_change_of_shading(lit: bool) -> None:
    """Turning normals under a light change brightness by `light . (now - then)`; that is no motion."""
    light = torch.tensor([0.3, -0.1, 0.2]).double()
    pose = sheet(1500, normals=True, turning=0.8)
    truth = torch.tensor([0.25, -0.15]).double()
    shift = Sheet.JACOBIAN @ truth
    pyramid = BrightnessPyramid.from_frame(picture((float(shift[0]), float(shift[1]))))
    reference = Appearance.of(pose, BrightnessPyramid.from_frame(picture()))
    # As if the points had looked brighter or darker when remembered, by what the light makes of their turning.
    change = (pose.surface(truth).normals - pose.normals) @ light
    dimmed = tuple(b - change for b in reference.brightness)
    reference = replace(reference, brightness=dimmed, normals=reference.normals if lit else None)
    term = PhotometricFactor(reference, pyramid)
    q = torch.zeros(2).double()
    for _ in range(10):
        model = term.linearize(q, 0)
        step = torch.linalg.solve(model.H, model.g)
        term.update_light(step)
        q = q + step
    error = float((q - truth).abs().max())
    if lit:
        assert error < 5e-3
        # Normals that turn about y never change along y: of the light, only x and z can be told.
        assert float((term._light - light)[[0, 2]].norm()) < 0.1 * float(light.norm())
    else:
        assert error > 2e-2  # without the light the shading is taken for motion: the oracle can fail


def test_too_few_points_and_flat_pictures_stay_finite() -> None:
    flat = BrightnessPyramid.from_frame(torch.full((3, HEIGHT, WIDTH), 0.3).double())
    for pose in (sheet(5, normals=True), sheet(5), sheet(5).keep(torch.zeros(0, dtype=torch.long))):
        term = PhotometricFactor(Appearance.of(pose, flat), flat)
        model = term.linearize(torch.zeros(2).double(), 0)
        assert model.H.isfinite().all()
        assert float(model.g.abs().sum()) == 0.0
        assert np.isfinite(term.cost(torch.zeros(2).double(), 0))


# ---- on a robot ------------------------------------------------------------------------------------------------------


def test_appearance_holds_visible_points_only_and_keeps_their_identity() -> None:
    c = clip("planar_finger_3", frames=8, seed=1)
    field = AnalyticField(c.robot, c.camera, points=2000, occluders=8000)
    pose = field.at(torch.from_numpy(c.q[0]))
    seen = Appearance.of(pose, BrightnessPyramid.from_frame(c.frames[0]))
    assert 100 < len(seen) < 2000
    assert pose.visible[seen.index].all()
    torch.testing.assert_close(seen.pose.surface().points, pose.surface().points[seen.index])
    few = seen.subsample(50)
    assert len(few) == 50
    assert torch.equal(few.index, seen.index[:50])
    for level in range(len(seen.brightness)):
        assert torch.equal(few.brightness[level], seen.brightness[level][:50])
        assert torch.equal(few.gradient[level], seen.gradient[level][:50])
    torch.testing.assert_close(few.pose.surface().points, pose.surface().points[few.index])
    assert seen.subsample(10**6) is seen


def test_cost_is_least_near_the_true_pose() -> None:
    c = clip("planar_finger_3", frames=8, seed=1)
    field = AnalyticField(c.robot, c.camera, points=2000, occluders=8000)
    q0, q1 = torch.from_numpy(c.q[0]), torch.from_numpy(c.q[3])
    term = PhotometricFactor(
        Appearance.of(field.at(q0), BrightnessPyramid.from_frame(c.frames[0])),
        BrightnessPyramid.from_frame(c.frames[3]),
    )
    at_truth = term.cost(q1, 1)
    for joint in range(3):
        for offset in (-0.05, 0.05):
            assert term.cost(q1 + offset * torch.eye(3).double()[joint], 1) > at_truth
