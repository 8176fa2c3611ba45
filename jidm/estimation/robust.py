"""How far a residual is believed: the weight of points that may show something else than the robot."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAD = 1.4826  # times the median absolute deviation: the standard deviation of a normal distribution
TUKEY = 4.685  # 95 % efficiency at the normal distribution (Huber 1981)
_MIN_POINTS = 8  # points of a part; fewer tell no scale of their own


def tukey_weight(
    residual: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    floor: float,
    part: Int[Tensor, " N"] | None = None,
    part_scale: float = 1.0,
) -> Float[Tensor, " N"]:
    """Tukey's biweight on the median absolute deviation, over the residual's variance.

    A robot that holds still but for its hand has residuals of next to nothing nearly everywhere; on that scale the hand's
    are outliers all of them, and it would be left behind. So a rigid part whose points are off as a whole is measured on
    a scale of its own: it counts little beside the others, but it moves.

    Args:
        residual: any unit.
        mask: which of them tell the scale; the others' weight means nothing.
        floor: finest scale there is.
        part: rigid part of the robot that each point rides on; one scale for all if not given.
        part_scale: share of its own scale by which a part may exceed that of the whole; 0 = not at all.
    """
    if not len(residual):
        return residual
    scale = _residual_scales(residual.abs(), mask, floor, part, part_scale)
    return (1 - (residual / (TUKEY * scale)) ** 2).clamp(min=0) ** 2 / scale**2


def _residual_scales(
    magnitude: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    floor: float,
    part: Int[Tensor, " N"] | None,
    part_scale: float,
) -> Tensor:
    masked = magnitude[mask]
    overall = floor + MAD * (masked.median() if len(masked) else magnitude.new_zeros(()))
    if part is None:
        return overall
    # Each part's median at once: sorted by size, then by part, its middle one is known by counting.
    order = torch.where(mask, magnitude, torch.inf).argsort()
    order = order[part[order].argsort(stable=True)]
    total = torch.bincount(part)
    count = torch.bincount(part, weights=mask.to(magnitude)).long()
    middle = (total.cumsum(0) - total + (count - 1).clamp(min=0) // 2).clamp(max=len(magnitude) - 1)
    part_mad = floor + MAD * magnitude[order[middle]]
    return torch.where(count >= _MIN_POINTS, torch.maximum(overall, part_scale * part_mad), overall)[part]
