"""Silhouette alignment: boundary points of the robot are moved to the boundary between foreground and known background.

It does not depend on the texture of the robot or on the last frame, so it recovers poses that direct alignment has lost. The
search radius may be large, since edges of the background and creases of the robot are not boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.estimation.problem import POSITION, NormalEquations, State
from jidm.estimation.robust import cauchy, mad
from jidm.fields.base import FieldAtPose, JacobianField
from jidm.video.pyramid import bilinear_sample

_MASK_CELLS = 150  # of the robot mask, along the longer side of the image
_MAX_POINTS = 600  # of the boundary
_MIN_POINTS = 20  # fewer are no measurement
_MIN_CONTRAST = 0.35  # of a boundary point, at which its weight is 0 (see `_locate_boundary`)
_MIN_SCALE = 1.0  # [px] smallest residual scale
_DISTANCE_PENALTY = 0.01  # contrast that a boundary loses at the full search radius


@dataclass(frozen=True, eq=False)
class SilhouetteBoundary:
    """Points of the robot on the boundary of its silhouette.

    Attributes:
        points: (K, 2) pixels (u, v). normals: (K, 2) outward unit vectors.
        jacobian: (K, n) motion along the normal per unit of each joint [px/rad or px/m].
        mask: (h, w) 1 in cells that show the robot. cell_size: side of a cell [px].
    """

    points: Float[Tensor, "K 2"]
    normals: Float[Tensor, "K 2"]
    jacobian: Float[Tensor, "K n"]
    mask: Float[Tensor, "h w"]
    cell_size: float

    @classmethod
    def of(cls, pose: FieldAtPose, height: int, width: int) -> SilhouetteBoundary:
        """Boundary at a pose in an image of that size, without points at the border of the image."""
        surface, cell = pose.surface(), max(height, width) / _MASK_CELLS
        mask = robot_mask(surface.points, height, width, cell)
        eroded = -F.max_pool2d(-mask[None], 5, 1, 2)[0]
        blurred = F.avg_pool2d(F.pad(mask[None, None], (3,) * 4, mode="replicate"), 5, 1)
        blurred = F.avg_pool2d(blurred, 3, 1)[0, 0]
        along_u = F.pad(blurred[:, 2:] - blurred[:, :-2], (1, 1))
        along_v = F.pad(blurred[2:] - blurred[:-2], (0, 0, 1, 1))
        values = bilinear_sample(torch.stack([eroded, along_u, along_v]), surface.points, cell)
        gradient = values[1:].T
        gradient_norm = gradient.norm(dim=-1)
        u, v = surface.points.unbind(-1)
        margin = 2 * cell
        inside = (u > margin) & (v > margin) & (u < width - margin) & (v < height - margin)
        index = ((values[0] < 0.5) & (gradient_norm > 0.1) & inside).nonzero()[:_MAX_POINTS, 0]
        normals = -gradient[index] / gradient_norm[index, None]
        normal_jacobian = torch.einsum("ka,kan->kn", normals, surface.jacobian[index])
        return cls(surface.points[index], normals, normal_jacobian, mask, cell)


def robot_mask(points: Float[Tensor, "N 2"], height: int, width: int, cell: float) -> Float[Tensor, "h w"]:
    """1 in cells of the image that contain a point of the robot, with small gaps closed.

    Args:
        points: pixels (u, v), hidden ones included. height, width: of the image. cell: side of a cell [px].
    """
    h, w = int(-(-height // cell)), int(-(-width // cell))
    u, v = ((points + 0.5) / cell).floor().long().unbind(-1)
    inside = (u >= 0) & (v >= 0) & (u < w) & (v < h)
    mask = points.new_zeros(h, w)
    mask[v[inside], u[inside]] = 1
    return -F.max_pool2d(-F.max_pool2d(mask[None, None], 3, 1, 1), 3, 1, 1)[0, 0]


@dataclass(frozen=True, eq=False)
class SilhouetteFactor:
    """The robot's silhouette in one frame.

    Attributes:
        field: of the robot in its camera.
        foreground_score: (H, W) 1 for foreground, -1 for background, 0 if unknown (`BackgroundModel.foreground_score`).
        search_radius: along the normals [px].
    """

    field: JacobianField
    foreground_score: Float[Tensor, "H W"]
    search_radius: float = 12.0

    def linearize(self, state: State) -> NormalEquations | None:
        """Point-to-line equations around `state["position"]` [rad or m] with Cauchy's weight; None if too few points of the
        boundary are located."""
        offset, contrast, jacobian = self._boundary_offsets(state[POSITION])
        weight = ((contrast - _MIN_CONTRAST) / (1 - _MIN_CONTRAST)).clamp(min=0)
        used = weight > 0
        if int(used.sum()) < _MIN_POINTS:
            return None
        # Cauchy's weight rather than Tukey's: at a large pose error, far points must not be ignored.
        scale = _MIN_SCALE + mad(offset, used)
        weight = weight * cauchy((offset / (2 * scale)) ** 2) / scale**2
        weighted = jacobian * weight[:, None]
        return NormalEquations(
            weighted.T @ jacobian,
            weighted.T @ offset,
            (weight * offset.square()).sum(),
            weight.sum(),
            used.sum().to(weight),
            ((POSITION, jacobian.shape[-1]),),
        )

    def mismatch(self, q: Float[Tensor, " n"]) -> float:
        """Area in which the foreground differs from the silhouette at joint positions q, relative to the robot's area.

        Other moving objects are included, so only differences between poses are meaningful.
        """
        height, width = self.foreground_score.shape
        points = self.field.at(q).surface().points
        mask = robot_mask(points, height, width, max(height, width) / _MASK_CELLS)
        observed = F.interpolate(self.foreground_score[None, None], size=mask.shape, mode="area")[0, 0].to(mask)
        wrong = mask * (-observed).clamp(min=0) + (1 - mask) * observed.clamp(min=0)
        return float(wrong.sum() / mask.sum().clamp(min=1))

    def _boundary_offsets(
        self, q: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"], Float[Tensor, "K n"]]:
        """Distance from the predicted to the observed boundary along each normal [px], its contrast (0 to 1), Jacobian."""
        boundary = SilhouetteBoundary.of(self.field.at(q), *self.foreground_score.shape)
        spacing = max(0.5, self.search_radius / 12)
        window = round(self.search_radius / spacing)
        s = torch.arange(-2 * window, 2 * window + 1).to(boundary.points) * spacing
        positions = boundary.points[:, None] + s[:, None] * boundary.normals[:, None]
        observed, contrast = _locate_boundary(bilinear_sample(self.foreground_score[None], positions)[0], s, window)
        # The predicted boundary is located in the mask in the same way, so that biases cancel.
        profile = bilinear_sample(2 * boundary.mask[None] - 1, positions, boundary.cell_size)[0]
        expected, _ = _locate_boundary(profile, s, window)
        return observed - expected, contrast, boundary.jacobian


def _locate_boundary(
    profile: Float[Tensor, "K S"], s: Float[Tensor, " S"], window: int
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Position of the step from 1 to -1 in each row, and its contrast: half the difference of the means before and after.

    Args:
        profile: score at positions s along each normal.
        s: positions [px], equally spaced.
        window: samples before and after.
    """
    middle = len(s) // 2
    total = F.pad(profile.cumsum(-1), (1, 0))
    center = torch.arange(middle - window, middle + window + 1, device=profile.device)
    before = total[:, center + 1] - total[:, center - window]
    after = total[:, center + window + 1] - total[:, center]
    contrast = (before - after) / (2 * (window + 1))
    best = (contrast - _DISTANCE_PENALTY * s[center].abs() / s[center[-1]]).argmax(-1, keepdim=True)
    return s[center][best[:, 0]], contrast.gather(1, best)[:, 0]
