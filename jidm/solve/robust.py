"""How far a residual is believed: the weight of points that may show something else than the robot."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAD = 1.4826  # times the median absolute deviation: the standard deviation of a normal distribution
TUKEY = 4.685  # 95 % efficiency at the normal distribution (Huber 1981)
_FEWEST = 8  # points of a part; fewer tell no scale of their own


def tukey_weight(
    residual: Float[Tensor, " N"],
    used: Bool[Tensor, " N"],
    floor: float,
    part: Int[Tensor, " N"] | None = None,
    excused: float = 1.0,
) -> Float[Tensor, " N"]:
    """Tukey's biweight on the median absolute deviation, over the residual's variance.

    A robot that holds still but for its hand has residuals of next to nothing nearly everywhere; on that scale the hand's
    are outliers all of them, and it would be left behind. So a rigid part whose points are off as a whole is measured on
    a scale of its own: it counts little beside the others, but it moves.

    Args:
        residual: any unit.
        used: which of them tell the scale; the others' weight means nothing.
        floor: finest scale there is.
        part: rigid part of the robot that each point rides on; one scale for all if not given.
        excused: share of its own scale by which a part may exceed that of the whole; 0 = not at all.
    """
    if not len(residual):
        return residual
    scale = _scales(residual.abs(), used, floor, part, excused)
    return (1 - (residual / (TUKEY * scale)) ** 2).clamp(min=0) ** 2 / scale**2


def _scales(
    size: Float[Tensor, " N"], used: Bool[Tensor, " N"], floor: float, part: Int[Tensor, " N"] | None, excused: float
) -> Tensor:
    known = size[used]
    overall = floor + MAD * (known.median() if len(known) else size.new_zeros(()))
    if part is None:
        return overall
    # Each part's median at once: sorted by size, then by part, its middle one is known by counting.
    order = torch.where(used, size, torch.inf).argsort()
    order = order[part[order].argsort(stable=True)]
    total = torch.bincount(part)
    count = torch.bincount(part, weights=used.to(size)).long()
    middle = (total.cumsum(0) - total + (count - 1).clamp(min=0) // 2).clamp(max=len(size) - 1)
    own = floor + MAD * size[order[middle]]
    return torch.where(count >= _FEWEST, torch.maximum(overall, excused * own), overall)[part]
