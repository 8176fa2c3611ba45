"""Direct alignment of surface points: brightness constancy as a measurement of the joint positions.

Flow has two unknowns per pixel, which textureless robots do not determine; the Jacobian field reduces them to n. A point keeps
the brightness that it had in a reference frame, up to shading: for a Lambertian surface under distant light, brightness is
linear in the normal, so its change is `light . (normal - reference_normal)`. The light has three unknowns per reference; it is
a variable of its own, which is eliminated from the normal equations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jidm.estimation.problem import POSITION, NormalEquations, State
from jidm.estimation.robust import tukey_weight
from jidm.fields.base import FieldAtPose
from jidm.video.pyramid import BrightnessPyramid

_NOISE = 0.002  # smallest residual scale: half a gray level of 8 bits
_MAX_EXPOSURE_CHANGE = 0.1  # largest change of brightness by exposure between frames
_LIGHT_PRIOR = 1e-3  # weight of the light's prior (zero) relative to that of all points
_COST_SCALE = 0.03  # brightness error with cost 1, see `PhotometricFactor.error`
_MAX_COST = 9.0


@dataclass(frozen=True, eq=False)
class SurfaceAppearance:
    """Brightness of the visible points of a pose, as a reference for later frames.

    Attributes:
        pose: the field at the pose, restricted to its visible points (N of them).
        index: (N,) their indices among the field's points.
        brightness: per pyramid level (N,).
        gradient: per level (N, 2) [1/px], or None if the points are from several frames.
        normals: (N, 3) in the base frame, or None.
    """

    pose: FieldAtPose
    index: Int[Tensor, " N"]
    brightness: tuple[Float[Tensor, " N"], ...]
    gradient: tuple[Float[Tensor, "N 2"], ...] | None
    normals: Float[Tensor, "N 3"] | None

    @classmethod
    def of(cls, pose: FieldAtPose, pyramid: BrightnessPyramid) -> SurfaceAppearance:
        """Sample a frame at the visible points of a pose."""
        surface = pose.surface()
        visible = (surface.visible & pyramid.inside(surface.points)).nonzero()[:, 0]
        samples = [pyramid.sample(k, surface.points[visible]) for k in range(len(pyramid))]
        normals = None if surface.normals is None else surface.normals[visible]
        return cls(pose.keep(visible), visible, tuple(b for b, _ in samples), tuple(g for _, g in samples), normals)

    def __len__(self) -> int:
        return self.index.shape[0]

    def subsample(self, max_points: int) -> SurfaceAppearance:
        """At most `max_points` of the points, evenly distributed, since a field's points are in random order."""
        if len(self) <= max_points:
            return self
        kept = torch.arange(max_points, device=self.index.device)
        return SurfaceAppearance(
            self.pose.keep(kept),
            self.index[kept],
            tuple(b[kept] for b in self.brightness),
            None if self.gradient is None else tuple(g[kept] for g in self.gradient),
            None if self.normals is None else self.normals[kept],
        )


@dataclass(frozen=True, eq=False)
class PhotometricFactor:
    """Brightness constancy between one reference and one frame, on one level of the pyramid.

    Attributes:
        reference: the points with their brightness.
        pyramid: the frame.
        level: of the pyramid; 0 is the finest.
        part_scale: see `tukey_weight`.
        light: name of the light's variable, one for each reference.
    """

    reference: SurfaceAppearance
    pyramid: BrightnessPyramid
    level: int = 0
    part_scale: float = 1.0
    light: str = "light"

    def linearize(self, state: State) -> NormalEquations:
        """Gauss-Newton equations around `state["position"]` [rad or m] and the light, with Tukey's biweight.

        The light is zero if the state has none, and no variable if the field has no normals. The change of shading by the
        step itself is neglected in the Jacobian.
        """
        reference, q = self.reference, state[POSITION]
        surface = reference.pose.surface(q - reference.pose.q)
        brightness, gradient = self.pyramid.sample(self.level, surface.points)
        residual = brightness - reference.brightness[self.level]
        if reference.gradient is not None:
            # The mean of both images' gradients makes a step second-order exact (ESM; Benhimane and Malis 2004).
            gradient = (gradient + reference.gradient[self.level]) / 2
        A = torch.einsum("pa,pan->pn", gradient, surface.jacobian)
        inside = self.pyramid.inside(surface.points)
        variables, light = [(POSITION, A.shape[-1])], None
        if reference.normals is not None and surface.normals is not None:
            normal_change = surface.normals - reference.normals
            light = state.get(self.light, torch.zeros_like(normal_change[0] if len(normal_change) else A.new_zeros(3)))
            residual = residual - normal_change @ light
            A = torch.cat([A, -normal_change], dim=-1)
            variables.append((self.light, 3))
        weight = inside * tukey_weight(residual, inside, _NOISE, surface.part, self.part_scale)
        weighted = A * weight[:, None]
        H, g, total = weighted.mT @ A, -(weighted.mT @ residual), weight.sum()
        cost = (weight * residual.square()).sum()
        if light is not None:
            stiffness = _LIGHT_PRIOR * total.clamp(min=1e-6)
            n = H.shape[-1] - 3
            H = H + torch.nn.functional.pad(stiffness * torch.eye(3).to(H), (n, 0, n, 0))
            g = g - torch.nn.functional.pad(stiffness * light, (n, 0))
            cost = cost + stiffness * light.square().sum()
        return NormalEquations(H, g, cost, total, inside.sum().to(total), tuple(variables))

    def error(self, q: Float[Tensor, " n"]) -> float:
        """Truncated mean square brightness error at joint positions q in units of .03, at most 9; to compare poses.

        A uniform change of brightness (exposure, flicker) has no cost.
        """
        surface = self.reference.pose.surface(q - self.reference.pose.q)
        brightness, _ = self.pyramid.sample(self.level, surface.points)
        difference = brightness - self.reference.brightness[self.level]
        if not len(difference):
            return _MAX_COST
        exposure_change = difference.median().clamp(-_MAX_EXPOSURE_CHANGE, _MAX_EXPOSURE_CHANGE)
        error = ((difference - exposure_change) / _COST_SCALE) ** 2
        error = torch.where(self.pyramid.inside(surface.points), error, torch.full_like(error, _MAX_COST))
        return float(error.clamp(max=_MAX_COST).mean())
