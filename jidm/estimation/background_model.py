"""A per-pixel background model for a static camera, learned wherever the robot is absent."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.video.pyramid import BrightnessPyramid, bilinear_sample

_MARGIN = 0.025  # dilation of the robot mask for pose errors, as a fraction of the image's shorter side
_COLOR_NOISE = 0.02  # standard deviation of the color of an unchanged pixel from frame to frame
_PRIOR_LOG_ODDS = 4.0  # prior log odds of the background against anything else
_LEARNING_RATE = 0.3  # weight of a new frame in the running means; large, since light changes and a camera may move


class BackgroundModel:
    """Running means of brightness gradient and color of the background, and the variance of its color, per pixel."""

    def __init__(self) -> None:
        # (7, H, W): 1 where the background was ever visible; mean brightness derivatives by u and v; mean color;
        # variance of the color, which is large where other things move or light changes.
        self._statistics: Tensor | None = None

    def update(self, points: Float[Tensor, "N 2"], pyramid: BrightnessPyramid) -> None:
        """Update with a frame.

        Args:
            points: pixels (u, v) of points all over the robot, hidden ones included.
            pyramid: the frame.
        """
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
        """Derivatives of the background's brightness [1/px] at pixel positions, and 1 where it is known, else 0; None
        before the first update."""
        if self._statistics is None:
            return None
        values = bilinear_sample(self._statistics[:3], uv)
        return values[1:].movedim(0, -1), (values[0] > 1 - 1e-6).to(uv)

    def foreground_score(self, pyramid: BrightnessPyramid) -> Float[Tensor, "H W"] | None:
        """Whether each pixel shows something in front of the background: 1 certainly, -1 certainly not, 0 unknown; None
        before the first update."""
        if self._statistics is None:
            return None
        known, color, variance = self._statistics[0], self._statistics[3:6], self._statistics[6]
        difference = (pyramid.color.to(color) - color).square().mean(0)
        # Foreground colors are uniform; background colors are normally distributed around their mean.
        log_odds = difference / (2 * (_COLOR_NOISE**2 + variance)) - _PRIOR_LOG_ODDS
        return known * torch.tanh(log_odds / _PRIOR_LOG_ODDS)


def dilated_robot_mask(points: Float[Tensor, "N 2"], height: int, width: int) -> Tensor:
    """(height, width) mask that is True where the robot may be.

    Args:
        points: pixels (u, v) of points all over the robot; the mask is dilated for errors of the pose.
        height, width: of the image.
    """
    margin = max(2, round(_MARGIN * min(height, width)))
    u, v = points.round().long().unbind(-1)
    inside = (u >= 0) & (v >= 0) & (u < width) & (v < height)
    mask = points.new_zeros(height, width)
    mask[v[inside], u[inside]] = 1
    dilated = F.max_pool2d(mask[None, None], (1, 2 * margin + 1), 1, (0, margin))
    return F.max_pool2d(dilated, (2 * margin + 1, 1), 1, (margin, 0))[0, 0] > 0
