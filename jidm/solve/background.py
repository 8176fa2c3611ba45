"""What the picture shows where the robot is not: a camera that stands still sees it uncovered again and again."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.motion.pyramid import BrightnessPyramid, sampled

_MARGIN = 0.025  # share of the picture's shorter side by which the robot may be off where it is thought to be
_NOISE = 0.02  # by which the colour of a pixel that shows the same differs from frame to frame
_DOUBT = 4.0  # log odds of showing something else, for a pixel whose colour is the background's
_RATE = 0.3  # share of a new frame in the memory: light may change, and a camera that moved is soon seen anew


class Background:
    """Memory of brightness's slope and of colour around the robot, pixel by pixel."""

    def __init__(self) -> None:
        # (7, H, W) 1 where ever uncovered; means of brightness's two derivatives and of the colour; the colour's variance:
        # something else moves there, or light changes.
        self._seen: Tensor | None = None

    def remember(self, points: Float[Tensor, "N 2"], pyramid: BrightnessPyramid) -> None:
        """Count in a frame in which the robot's points lie at those pixels (u, v), hidden ones as well."""
        slope = pyramid.levels[0][1:]
        now = torch.cat([slope, pyramid.colour.to(slope)])
        free = 1 - covered(points, *now.shape[-2:]).to(now)
        if self._seen is None:
            self._seen = torch.cat([free[None], now * free, torch.zeros_like(free)[None]])
            return
        known, mean, restless = self._seen[0], self._seen[1:6], self._seen[6]
        change = now - mean
        rate = free * torch.where(known > 0, _RATE, 1.0)
        restless = restless + _RATE * known * free * (change[2:].square().mean(0) - restless)
        self._seen = torch.cat([torch.maximum(known, free)[None], mean + rate * change, restless[None]])

    def slope(self, uv: Float[Tensor, "*N 2"]) -> tuple[Float[Tensor, "*N 2"], Float[Tensor, "*N"]] | None:
        """Derivatives of the background's brightness [1/px] at pixel positions, and 1 where it is known there; None
        before a frame was counted in."""
        if self._seen is None:
            return None
        values = sampled(self._seen[:3], uv)
        return values[1:].movedim(0, -1), (values[0] > 1 - 1e-6).to(uv)

    def evidence(self, pyramid: BrightnessPyramid) -> Float[Tensor, "H W"] | None:
        """Whether pixels show something in front of the background: 1 surely, -1 surely not, 0 where it is not known;
        None before a frame was counted in."""
        if self._seen is None:
            return None
        known, colour, restless = self._seen[0], self._seen[3:6], self._seen[6]
        difference = (pyramid.colour.to(colour) - colour).square().mean(0)
        # Another thing's colour may be any; the background's is normally distributed around what was seen.
        odds = difference / (2 * (_NOISE**2 + restless)) - _DOUBT
        return known * torch.tanh(odds / _DOUBT)


def covered(points: Float[Tensor, "N 2"], height: int, width: int) -> Tensor:
    """(height, width) True where the robot may be, given pixels (u, v) of points all over it."""
    margin = max(2, round(_MARGIN * min(height, width)))
    u, v = points.round().long().unbind(-1)
    inside = (u >= 0) & (v >= 0) & (u < width) & (v < height)
    hit = points.new_zeros(height, width)
    hit[v[inside], u[inside]] = 1
    wide = F.max_pool2d(hit[None, None], (1, 2 * margin + 1), 1, (0, margin))
    return F.max_pool2d(wide, (2 * margin + 1, 1), 1, (margin, 0))[0, 0] > 0
