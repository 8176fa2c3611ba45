"""What the picture shows where the robot is not: a camera that stands still sees it uncovered again and again."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.video.pyramid import BrightnessPyramid, bilinear_sample

_MARGIN = 0.025  # share of the picture's shorter side by which the robot may be off where it is thought to be
_COLOR_NOISE = 0.02  # by which the color of a pixel that shows the same differs from frame to frame
_PRIOR_LOG_ODDS = 4.0  # log odds of showing something else, for a pixel whose color is the background's
_LEARNING_RATE = 0.3  # share of a new frame in the memory: light may change, and a camera that moved is soon seen anew


class BackgroundModel:
    """Memory of brightness's slope and of color around the robot, pixel by pixel."""

    def __init__(self) -> None:
        # (7, H, W) 1 where ever uncovered; means of brightness's two derivatives and of the color; the color's variance:
        # something else moves there, or light changes.
        self._statistics: Tensor | None = None

    def update(self, points: Float[Tensor, "N 2"], pyramid: BrightnessPyramid) -> None:
        """Count in a frame in which the robot's points lie at those pixels (u, v), hidden ones as well."""
        gradient = pyramid.levels[0][1:]
        now = torch.cat([gradient, pyramid.color.to(gradient)])
        uncovered = 1 - dilated_robot_mask(points, *now.shape[-2:]).to(now)
        if self._statistics is None:
            self._statistics = torch.cat([uncovered[None], now * uncovered, torch.zeros_like(uncovered)[None]])
            return
        known, mean, variance = self._statistics[0], self._statistics[1:6], self._statistics[6]
        change = now - mean
        rate = uncovered * torch.where(known > 0, _LEARNING_RATE, 1.0)
        variance = variance + _LEARNING_RATE * known * uncovered * (change[2:].square().mean(0) - variance)
        self._statistics = torch.cat([torch.maximum(known, uncovered)[None], mean + rate * change, variance[None]])

    def gradient(self, uv: Float[Tensor, "*N 2"]) -> tuple[Float[Tensor, "*N 2"], Float[Tensor, "*N"]] | None:
        """Derivatives of the background's brightness [1/px] at pixel positions, and 1 where it is known there; None
        before a frame was counted in."""
        if self._statistics is None:
            return None
        values = bilinear_sample(self._statistics[:3], uv)
        return values[1:].movedim(0, -1), (values[0] > 1 - 1e-6).to(uv)

    def foreground_score(self, pyramid: BrightnessPyramid) -> Float[Tensor, "H W"] | None:
        """Whether pixels show something in front of the background: 1 surely, -1 surely not, 0 where it is not known;
        None before a frame was counted in."""
        if self._statistics is None:
            return None
        known, color, variance = self._statistics[0], self._statistics[3:6], self._statistics[6]
        difference = (pyramid.color.to(color) - color).square().mean(0)
        # Another thing's color may be any; the background's is normally distributed around what was seen.
        log_odds = difference / (2 * (_COLOR_NOISE**2 + variance)) - _PRIOR_LOG_ODDS
        return known * torch.tanh(log_odds / _PRIOR_LOG_ODDS)


def dilated_robot_mask(points: Float[Tensor, "N 2"], height: int, width: int) -> Tensor:
    """(height, width) True where the robot may be, given pixels (u, v) of points all over it."""
    margin = max(2, round(_MARGIN * min(height, width)))
    u, v = points.round().long().unbind(-1)
    inside = (u >= 0) & (v >= 0) & (u < width) & (v < height)
    mask = points.new_zeros(height, width)
    mask[v[inside], u[inside]] = 1
    dilated = F.max_pool2d(mask[None, None], (1, 2 * margin + 1), 1, (0, margin))
    return F.max_pool2d(dilated, (2 * margin + 1, 1), 1, (margin, 0))[0, 0] > 0
