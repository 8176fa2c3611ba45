"""Contour matching: points on the robot's silhouette and creases are matched to edges of the frame along their normals.

The distance to the edge measures the pose itself and not a step, so that it does not drift. Many points have a systematic
offset to their edge, nearly constant from frame to frame (a highlight beside a crease, a rounded edge); the offsets are
learned and subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jidm.estimation.background_model import BackgroundModel
from jidm.estimation.problem import POSITION, NormalEquations, State
from jidm.estimation.robust import tukey_weight
from jidm.fields.base import ContourField, ContourJacobian, FieldAtPose
from jidm.video.pyramid import BrightnessPyramid

_SAMPLE_SPACING = 0.5  # [px] between samples along the normal
_SAMPLES_PER_PIXEL = 2
_MIN_STRENGTH = 0.012  # [1/px] brightness gradient of the weakest edge
_DISTANCE_SIGMA = 0.6  # [search radii] standard deviation of the Gaussian that prefers near edges
_MIN_SCALE = 0.05  # [px]
_UPDATE_RADIUS = 2.5  # [px] search radius of the update of offsets
_LEARNING_RATE = 0.05  # of offsets and contrasts at tracked poses
_UNKNOWN_WEIGHT = 0.3  # of points that were never matched at a known pose
_MIN_POINTS = 20  # fewer are no measurement


@dataclass(frozen=True, eq=False)
class EdgeMatch:
    """Edges matched to contour points.

    Attributes:
        offset: (K,) signed distance along the normal to the edge [px].
        strength: (K,) brightness gradient across the edge [1/px].
        found: (K,) whether there is an edge within the search radius.
    """

    offset: Float[Tensor, " K"]
    strength: Float[Tensor, " K"]
    found: Bool[Tensor, " K"]


def match_edges(
    contour: ContourJacobian,
    pyramid: BrightnessPyramid,
    search_radius: float,
    background: BackgroundModel | None = None,
) -> EdgeMatch:
    """The strongest edge near each point, along its normal on the finest level, with sub-pixel accuracy.

    Args:
        contour: the points.
        pyramid: the frame.
        search_radius: in both directions [px].
        background: where it is known, edges of the background are not matched: the strength of an edge is at most that of
            the difference to the background.
    """
    half = round(search_radius / _SAMPLE_SPACING) + _SAMPLES_PER_PIXEL
    s = torch.arange(-half, half + 1, dtype=contour.points.dtype, device=contour.points.device) * _SAMPLE_SPACING
    positions = contour.points[:, None] + s[:, None] * contour.normals[:, None]
    _, gradient = pyramid.sample(0, positions)
    slope = torch.einsum("ksa,ka->ks", gradient, contour.normals).abs()
    background_gradient = None if background is None else background.gradient(positions)
    if background_gradient is not None:
        foreground_slope = torch.einsum("ksa,ka->ks", gradient - background_gradient[0], contour.normals).abs()
        slope = torch.where(background_gradient[1] > 0, torch.minimum(slope, foreground_slope), slope)
    score = slope * torch.exp(-0.5 * (s / (_DISTANCE_SIGMA * search_radius)) ** 2)
    interior = slice(_SAMPLES_PER_PIXEL, -_SAMPLES_PER_PIXEL)
    peak = (slope[:, interior] >= slope[:, 1:-3]) & (slope[:, interior] >= slope[:, 3:-1])
    best = (
        torch.where(peak, score[:, interior], torch.zeros_like(score[:, interior])).argmax(dim=1, keepdim=True)
        + _SAMPLES_PER_PIXEL
    )
    # A parabola through the peak and the samples one pixel away. Bilinear interpolation makes nearer samples piecewise
    # linear, which would bias edges towards pixel centers by up to a quarter of a pixel.
    before, top, after = (slope.gather(1, best + k)[:, 0] for k in (-_SAMPLES_PER_PIXEL, 0, _SAMPLES_PER_PIXEL))
    shift = 0.5 * (before - after) / (before - 2 * top + after).clamp(max=-1e-9)
    offset = s[best[:, 0]] + shift.clamp(-0.5, 0.5)
    is_peak = peak.gather(1, best - _SAMPLES_PER_PIXEL)[:, 0]
    found = is_peak & (top > _MIN_STRENGTH) & pyramid.inside(contour.points, margin=3.0)
    return EdgeMatch(offset, top, found)


class ContourMemory:
    """What contour matching learns in a video: offset and contrast of each point, and the background.

    Args:
        field: of the robot in its camera.
    """

    def __init__(self, field: ContourField) -> None:
        self.field = field
        self.background = BackgroundModel()
        self._offset = torch.zeros(field.contour_points, dtype=torch.float64)
        # Contrast of each point's edge; 0 if it was never matched at a known pose.
        self._strength = torch.zeros(field.contour_points, dtype=torch.float64)

    def update(self, pose: FieldAtPose, pyramid: BrightnessPyramid, *, known_pose: bool = False) -> Int[Tensor, " K"]:
        """Update background, offsets and contrasts with a frame; the identities of the contour points that are visible.

        Args:
            pose: of the frame.
            pyramid: the frame.
            known_pose: whether the pose is exact; then offsets and contrasts are replaced, otherwise averaged. Points that
                were never matched at a known pose start with offset 0.
        """
        self.background.update(pose.surface().points, pyramid)
        visible = self.field.visible_contour(pose.q)
        contour = self.field.contour(pose.q, visible)
        match = match_edges(contour, pyramid, _UPDATE_RADIUS, self.background)
        index = contour.index[match.found].cpu()
        offset, strength = (x[match.found].double().cpu() for x in (match.offset, match.strength))
        if known_pose:
            self._offset[index], self._strength[index] = offset, strength
            return visible
        self._offset[index] += _LEARNING_RATE * (offset - self._offset[index])
        rate = torch.where(self._strength[index] > 0, _LEARNING_RATE, 0.0)
        self._strength[index] += rate * (strength - self._strength[index])
        return visible

    def factor(
        self, q: Float[Tensor, " n"], pyramid: BrightnessPyramid, search_radius: float, part_scale: float = 1.0
    ) -> ContourFactor:
        """The factor of a frame with the contour points that are visible at q."""
        index = self.field.visible_contour(q)
        offset, strength = (x[index.cpu()].to(q) for x in (self._offset, self._strength))
        return ContourFactor(self.field, pyramid, self.background, index, offset, strength, search_radius, part_scale)


@dataclass(frozen=True, eq=False)
class ContourFactor:
    """Contour points matched to the edges of one frame.

    Attributes:
        field: of the robot in its camera. pyramid: the frame. background: model of the background.
        index: (K,) identities of the points.
        offset: (K,) distance from each point to its edge at the true pose [px].
        strength: (K,) contrast of its edge [1/px], 0 if unknown.
        search_radius: along the normals [px].
        part_scale: see `tukey_weight`.
    """

    field: ContourField
    pyramid: BrightnessPyramid
    background: BackgroundModel
    index: Int[Tensor, " K"]
    offset: Float[Tensor, " K"]
    strength: Float[Tensor, " K"]
    search_radius: float
    part_scale: float = 1.0

    def linearize(self, state: State) -> NormalEquations | None:
        """Point-to-line equations around `state["position"]` [rad or m] with Tukey's biweight; None if too few points have
        an edge."""
        contour = self.field.contour(state[POSITION], self.index)
        match = match_edges(contour, self.pyramid, self.search_radius, self.background)
        residual = match.offset - self.offset
        known = self.strength > 0
        # An edge with twice or half the contrast is another one.
        similar_contrast = (match.strength < 2 * self.strength) & (2 * match.strength > self.strength)
        inliers = match.found & (similar_contrast | ~known)
        if int(inliers.sum()) < _MIN_POINTS:
            return None
        weight = inliers * tukey_weight(residual, inliers, _MIN_SCALE, contour.part, self.part_scale)
        weight = weight * torch.where(known, 1.0, _UNKNOWN_WEIGHT)
        weighted = contour.jacobian * weight[:, None]
        return NormalEquations(
            weighted.T @ contour.jacobian,
            weighted.T @ residual,
            (weight * residual.square()).sum(),
            weight.sum(),
            inliers.sum().to(weight),
            ((POSITION, contour.jacobian.shape[-1]),),
        )
