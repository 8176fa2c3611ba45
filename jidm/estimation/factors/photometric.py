"""Brightness Gauss-Newton on the joint step itself, the field as motion model.

Flow has 2HW unknowns and textureless robots cannot pay for them; the field leaves n. A point keeps the brightness it
had when it was last seen, up to shading: for a matt surface under distant light, brightness is linear in the normal,
so its change is `light . (normal_now - normal_then)` with three unknowns per picture, eliminated on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jidm.estimation.robust import tukey_weight
from jidm.fields.base import FieldAtPose
from jidm.video.pyramid import BrightnessPyramid

_NOISE = 0.002  # brightness; half a grey level of 8 bits: no residual scale is finer
_MAX_EXPOSURE_CHANGE = 0.1  # brightness by which exposure may change between frames
_LIGHT_PRIOR = 1e-3  # share of the points' weight that pulls the light towards none


@dataclass(frozen=True, eq=False)
class Quadratic:
    """`x'matrix x / 2 - vector'x` around the current pose, in units of the residuals' variance.

    Attributes:
        H: (n, n); g: (n,).
        num_observations: number of points that took part.
    """

    H: Float[Tensor, "n n"]
    g: Float[Tensor, " n"]
    num_observations: float


@dataclass(frozen=True, eq=False)
class SurfaceAppearance:
    """What the visible points of a pose looked like: a reference to align later frames to.

    Attributes:
        pose: the field at the pose, restricted to its visible points (N of them).
        index: (N,) which of the field's points these are.
        brightness: per level (N,). gradient: per level (N, 2) [1/px], or None where the points were not seen from here.
        normals: (N, 3) in the base frame, or None.
    """

    pose: FieldAtPose
    index: Int[Tensor, " N"]
    brightness: tuple[Float[Tensor, " N"], ...]
    gradient: tuple[Float[Tensor, "N 2"], ...] | None
    normals: Float[Tensor, "N 3"] | None

    @classmethod
    def of(cls, pose: FieldAtPose, pyramid: BrightnessPyramid) -> SurfaceAppearance:
        """Remember the brightness of the points a pose shows in a frame."""
        surface = pose.surface()
        visible = (surface.visible & pyramid.inside(surface.points)).nonzero()[:, 0]
        samples = [pyramid.sample(k, surface.points[visible]) for k in range(len(pyramid))]
        normals = None if surface.normals is None else surface.normals[visible]
        return cls(pose.keep(visible), visible, tuple(b for b, _ in samples), tuple(g for _, g in samples), normals)

    def __len__(self) -> int:
        return self.index.shape[0]

    def subsample(self, max_points: int) -> SurfaceAppearance:
        """At most that many of the points, evenly (a field's points are in random order)."""
        if len(self) <= max_points:
            return self
        indices = torch.arange(max_points, device=self.index.device)
        return SurfaceAppearance(
            self.pose.keep(indices),
            self.index[indices],
            tuple(b[indices] for b in self.brightness),
            None if self.gradient is None else tuple(g[indices] for g in self.gradient),
            None if self.normals is None else self.normals[indices],
        )


class PhotometricFactor:
    """Brightness of one reference in one frame, linearised again and again as the pose moves."""

    def __init__(self, reference: SurfaceAppearance, pyramid: BrightnessPyramid) -> None:
        self.reference = reference
        self.pyramid = pyramid
        self._light: Tensor | None = None
        self._light_solution: tuple[Tensor, Tensor] | None = None

    def linearize(self, q: Float[Tensor, " n"], level: int, part_scale: float = 1.0) -> Quadratic:
        """Gauss-Newton model at pose q on one blur level, light eliminated, robust (`part_scale` as of `tukey_weight`)."""
        reference = self.reference
        surface = reference.pose.surface(q - reference.pose.q)
        brightness, gradient = self.pyramid.sample(level, surface.points)
        residual = brightness - reference.brightness[level]
        if reference.gradient is not None:
            # The mean of both pictures' gradients makes the step second-order exact (ESM; Benhimane and Malis 2004).
            gradient = (gradient + reference.gradient[level]) / 2
        J = torch.einsum("pa,pan->pn", gradient, surface.jacobian)
        inside = self.pyramid.inside(surface.points)
        normal_change = None
        if reference.normals is not None and surface.normals is not None:
            normal_change = surface.normals - reference.normals
        compensated = (
            residual if normal_change is None or self._light is None else residual - normal_change @ self._light
        )
        weight = inside * tukey_weight(compensated, inside, _NOISE, surface.part, part_scale)
        if normal_change is None:
            weighted = J * weight[:, None]
            return Quadratic(weighted.T @ J, -(weighted.T @ residual), float(inside.sum()))
        return self._eliminate_light(J, normal_change, residual, weight, float(inside.sum()))

    def update_light(self, step: Float[Tensor, " n"]) -> None:
        """Tell the term which step was taken, so that its light follows."""
        if self._light_solution is not None:
            slope, offset = self._light_solution
            self._light = offset - slope @ step

    def cost(self, q: Float[Tensor, " n"], level: int, scale: float = 0.03) -> float:
        """Truncated mean squared brightness error in units of `scale`, for comparing poses; 9 = nothing fits.

        A modest brightening of the whole picture (exposure, flicker) costs nothing.
        """
        surface = self.reference.pose.surface(q - self.reference.pose.q)
        brightness, _ = self.pyramid.sample(level, surface.points)
        difference = brightness - self.reference.brightness[level]
        exposure_change = (
            difference.median().clamp(-_MAX_EXPOSURE_CHANGE, _MAX_EXPOSURE_CHANGE) if len(difference) else 0.0
        )
        error = ((difference - exposure_change) / scale) ** 2
        error = torch.where(self.pyramid.inside(surface.points), error, torch.full_like(error, 9.0))
        return float(error.clamp(max=9.0).mean()) if len(error) else 9.0

    def _eliminate_light(
        self, J: Tensor, normal_change: Tensor, residual: Tensor, weight: Tensor, num_observations: float
    ) -> Quadratic:
        """Schur complement: the light takes what it can explain, the joints get the rest."""
        n = J.shape[-1]
        J_augmented = torch.cat([J, -normal_change], dim=-1)
        weighted = J_augmented * weight[:, None]
        A, b = weighted.T @ J_augmented, -(weighted.T @ residual)
        light = A[n:, n:] + _LIGHT_PRIOR * weight.sum().clamp(min=1e-6) * torch.eye(3, dtype=A.dtype, device=A.device)
        solved = torch.linalg.solve(light, torch.cat([A[n:, :n], b[n:, None]], dim=-1))
        slope, offset = solved[:, :n], solved[:, n]
        self._light_solution = slope, offset
        return Quadratic(A[:n, :n] - A[:n, n:] @ slope, b[:n] - A[:n, n:] @ offset, num_observations)
