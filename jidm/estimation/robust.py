"""M-estimators: robust weights of residuals, for iteratively reweighted least squares.

Tukey's biweight ignores outliers altogether; Cauchy's weight only reduces them, and tolerates a poor start. Scales are
median absolute deviations (MAD).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Kind = Literal["tukey", "cauchy"]

_TUNING = {"tukey": 4.685, "cauchy": 2.385}
"""Tuning constants: 95 % efficiency at the normal distribution (Huber 1981)."""

_MAD = 1.4826  # times the median absolute deviation: the standard deviation of a normal distribution
_RAYLEIGH_MEDIAN = 1.17741  # median length of a 2-vector with unit normal components
_MIN_POINTS = 8  # a rigid part with fewer points has no scale of its own
_MEDIAN_SAMPLES = 4096  # the median of a flow field is taken over at least this many of its pixels, for speed
_MIN_FLOW_SCALE = 1e-3  # [px]


def tukey(ratio: Tensor) -> Tensor:
    """Tukey's biweight of a residual over its tuned scale: `(1 - ratio^2)^2` inside [-1, 1], 0 outside."""
    return (1 - ratio**2).clamp(min=0) ** 2


def cauchy(ratio_square: Tensor) -> Tensor:
    """Cauchy's weight of a residual over its tuned scale, given that ratio's square: `1 / (1 + ratio^2)`."""
    return 1 / (1 + ratio_square)


def mad(residual: Float[Tensor, "*batch N"], mask: Bool[Tensor, "*batch N"]) -> Float[Tensor, "*batch"]:
    """Standard deviation of residuals with zero mean, from the median absolute value of those in the mask; 0 if none is."""
    return _MAD * _median(residual.abs(), mask)[..., 0].nan_to_num(0.0)


def tukey_weight(
    residual: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    min_scale: float,
    part: Int[Tensor, " N"] | None = None,
    part_scale: float = 1.0,
) -> Float[Tensor, " N"]:
    """Tukey's biweight over the residual's variance, with the MAD as scale.

    Where only the hand of a robot moves, nearly all residuals are close to zero, and the hand's would all be outliers on
    that scale. A rigid part whose residuals are large as a whole therefore gets a scale of its own: its weight is small,
    but not zero.

    Args:
        residual: any unit.
        mask: residuals that define the scale; the weights of the others are meaningless.
        min_scale: added to every scale.
        part: rigid part that each point belongs to; one scale for all if not given.
        part_scale: factor on a part's own scale, which is used where it exceeds the overall one; 0 = never.
    """
    if not len(residual):
        return residual
    scale = _residual_scales(residual.abs(), mask, min_scale, part, part_scale)
    return tukey(residual / (_TUNING["tukey"] * scale)) / scale**2


def flow_weight(length: Float[Tensor, "B P"], weight: Float[Tensor, "B P"], kind: Kind) -> Float[Tensor, "B P"]:
    """Robust weights of residual flow vectors.

    Args:
        length: of each residual vector [px].
        weight: confidence; the scale is the median over all pixels whose confidence is positive.
        kind: M-estimator.

    Returns:
        Factors on the weights, in [0, 1].
    """
    if not weight.numel():
        return weight
    has_weight = weight > 0
    fewest = torch.where(has_weight.any(-1), has_weight.sum(-1), weight.shape[-1]).min().item()
    stride = max(1, int(fewest) // _MEDIAN_SAMPLES) | 1  # odd, so that all columns of an even image are sampled
    median = _median(length[:, ::stride], has_weight[:, ::stride]).nan_to_num(0.0)
    ratio = length / (median / _RAYLEIGH_MEDIAN).clamp(min=_MIN_FLOW_SCALE) / _TUNING[kind]
    return tukey(ratio) if kind == "tukey" else cauchy(ratio**2)


def _median(x: Float[Tensor, "*batch N"], mask: Bool[Tensor, "*batch N"]) -> Float[Tensor, "*batch 1"]:
    """Median of the elements in the mask; NaN if there are none."""
    return torch.where(mask, x, torch.nan).nanmedian(dim=-1, keepdim=True).values


def _residual_scales(
    magnitude: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    min_scale: float,
    part: Int[Tensor, " N"] | None,
    part_scale: float,
) -> Tensor:
    overall = min_scale + mad(magnitude, mask)
    if part is None:
        return overall
    # Medians of all parts at once: sorted by part and then by size, each part's median is found by counting.
    order = torch.where(mask, magnitude, torch.inf).argsort()
    order = order[part[order].argsort(stable=True)]
    total = torch.bincount(part)
    count = total.new_zeros(total.shape).index_add(0, part, mask.long())
    middle = (total.cumsum(0) - total + (count - 1).clamp(min=0) // 2).clamp(max=len(magnitude) - 1)
    own = min_scale + _MAD * magnitude[order[middle]]
    return torch.where(count >= _MIN_POINTS, torch.maximum(overall, part_scale * own), overall)[part]
