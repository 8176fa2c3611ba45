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
    """Memory of brightness, its slope and colour around the robot, pixel by pixel."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None  # (4, H, W) brightness, its derivatives, and 1 where ever uncovered
        self._colour: Tensor | None = None  # (3, H, W) mean of what was seen
        self._restless: Tensor | None = None  # (H, W) its variance: something else moves there, or light changes

    def remember(self, points: Float[Tensor, "N 2"], pyramid: BrightnessPyramid) -> None:
        """Count in a frame in which the robot's points lie at those pixels (u, v), hidden ones as well."""
        now = pyramid.levels[0]
        height, width = now.shape[-2:]
        free = 1 - covered(points, height, width).to(now)
        colour = pyramid.colour.to(now)
        if self._seen is None or self._colour is None or self._restless is None:
            self._seen = torch.cat([now * free, free[None]])
            self._colour, self._restless = colour * free, torch.zeros_like(free)
            return
        known = self._seen[3]
        rate = free * torch.where(known > 0, _RATE, 1.0)
        change = colour - self._colour
        self._restless = self._restless + _RATE * known * free * (change.square().mean(0) - self._restless)
        self._colour = self._colour + rate * change
        self._seen = torch.cat([self._seen[:3] + rate * (now - self._seen[:3]), torch.maximum(known, free)[None]])

    def slope(self, uv: Float[Tensor, "*N 2"]) -> tuple[Float[Tensor, "*N 2"], Float[Tensor, "*N"]] | None:
        """Derivatives of the background's brightness [1/px] at pixel positions, and 1 where it is known there; None
        before a frame was counted in."""
        if self._seen is None:
            return None
        values = sampled(self._seen, uv)
        return values[1:3].movedim(0, -1), (values[3] > 1 - 1e-6).to(uv)

    def evidence(self, pyramid: BrightnessPyramid) -> Float[Tensor, "H W"] | None:
        """Whether pixels show something in front of the background: 1 surely, -1 surely not, 0 where it is not known;
        None before a frame was counted in."""
        if self._seen is None or self._colour is None or self._restless is None:
            return None
        difference = (pyramid.colour.to(self._colour) - self._colour).square().mean(0)
        # Another thing's colour may be any; the background's is normally distributed around what was seen.
        odds = difference / (2 * (_NOISE**2 + self._restless)) - _DOUBT
        return self._seen[3] * torch.tanh(odds / _DOUBT)


def covered(points: Float[Tensor, "N 2"], height: int, width: int) -> Tensor:
    """(height, width) True where the robot may be, given pixels (u, v) of points all over it."""
    margin = max(2, round(_MARGIN * min(height, width)))
    u, v = points.round().long().unbind(-1)
    inside = (u >= 0) & (v >= 0) & (u < width) & (v < height)
    hit = points.new_zeros(height, width)
    hit[v[inside], u[inside]] = 1
    wide = F.max_pool2d(hit[None, None], (1, 2 * margin + 1), 1, (0, margin))
    return F.max_pool2d(wide, (2 * margin + 1, 1), 1, (margin, 0))[0, 0] > 0
