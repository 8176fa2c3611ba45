"""Metrics of decoded joint motion, as plain functions of tensors.

Steps and positions are `(*batch, n)` with any leading axes (videos, frames), over which a metric pools. Nothing is
masked silently: what a metric leaves out is given by its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.robot.kinematics import Kinematics


def nve(error: Float[Tensor, "*batch n"], delta_q: Float[Tensor, "*batch n"]) -> Float[Tensor, ""]:
    """Normalized velocity error: mean |error| / mean |true step|. 0 is perfect; predicting no motion scores 1.

    NaN where the truth never moves.
    """
    return error.abs().mean() / _nan_unless_positive(delta_q.abs().mean())


def nve_per_joint(error: Float[Tensor, "*batch n"], delta_q: Float[Tensor, "*batch n"]) -> Float[Tensor, " n"]:
    """`nve` of every joint by itself; NaN for a joint that never moves."""
    return _flatten(error).abs().mean(0) / _nan_unless_positive(_flatten(delta_q).abs().mean(0))


def action_mse(error: Float[Tensor, "*batch n"]) -> Float[Tensor, ""]:
    """Mean squared error of the step [rad^2, or m^2 for slides]."""
    return error.square().mean()


def mse_ratio(error: Float[Tensor, "*batch n"], baseline: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Action MSE divided by a baseline's on the same steps; below 1 is better than the baseline.

    Raises:
        InputError: the two were not measured on the same steps.
    """
    if error.shape != baseline.shape:
        raise InputError(f"errors on {tuple(error.shape)} and {tuple(baseline.shape)} steps are not of the same videos")
    return action_mse(error) / _nan_unless_positive(action_mse(baseline))


def fraction_within(
    position: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"], tolerance: float = 0.05
) -> Float[Tensor, ""]:
    """Fraction of joint positions within `tolerance` [rad or m] of the truth, the bound included."""
    return ((position - q).abs() <= tolerance).to(q.dtype).mean()


def integrate_steps(q0: Float[Tensor, "*batch n"], delta_q: Float[Tensor, "*batch S n"]) -> Float[Tensor, "*batch T n"]:
    """Positions by cumulative summation of steps from a known start: T = S + 1 rows, the first is q0."""
    start = q0[..., None, :]
    return torch.cat([start, start + delta_q.cumsum(-2)], dim=-2)


def tip_error(
    kinematics: Kinematics,
    tips: Sequence[int],
    position: Float[Tensor, "*batch n"],
    q: Float[Tensor, "*batch n"],
) -> Float[Tensor, "*batch tips"]:
    """Distance between the tips at decoded and at true joint positions [m].

    Args:
        kinematics: of the robot whose joints these are.
        tips: link indices (`model.link_index`), one per tip.
    """
    poses = kinematics.link_poses(torch.stack([position, q]))[..., list(tips), :3, 3]
    return (poses[0] - poses[1]).norm(dim=-1)


def moving_joints(velocity: Float[Tensor, "*batch n"], speed: float) -> Bool[Tensor, " n"]:
    """Joints whose mean true speed is above `speed` [rad/s or m/s]."""
    return _flatten(velocity).abs().mean(0) > speed


def correlation(decoded: Float[Tensor, "*batch n"], truth: Float[Tensor, "*batch n"]) -> Float[Tensor, " n"]:
    """Pearson correlation of decoded and true steps, per joint over all leading axes; NaN where one is constant."""
    a, b = _centered(decoded), _centered(truth)
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()


def endpoint_error(
    flow: Float[Tensor, "*batch 2 h w"], truth: Float[Tensor, "*batch 2 h w"], on_robot: Float[Tensor, "*batch h w"]
) -> Float[Tensor, ""]:
    """Endpoint error of flow: mean length of its error over the robot's pixels [px]; NaN without any.

    Args:
        on_robot: weight of each pixel, 1 on the robot and 0 off it.
    """
    length = (flow - truth).norm(dim=-3)
    return (length * on_robot).sum() / _nan_unless_positive(on_robot.sum())


def field_error(
    jacobian: Float[Tensor, "*batch 2 n h w"],
    exact: Float[Tensor, "*batch 2 n h w"],
    on_robot: Float[Tensor, "*batch h w"],
) -> Float[Tensor, " n"]:
    """Relative error of every joint's field over the robot's pixels: sum w |J - J*| / sum w |J*|.

    |.| is the length of a pixel's motion per unit of the joint; a field of zeros scores 1. NaN for a joint that moves
    no pixel.
    """
    weight = on_robot.unsqueeze(-3)
    distance = ((jacobian - exact).norm(dim=-4) * weight).flatten(-2).sum(-1)
    size = (exact.norm(dim=-4) * weight).flatten(-2).sum(-1)
    return _flatten(distance).sum(0) / _nan_unless_positive(_flatten(size).sum(0))


def coverage(
    error: Float[Tensor, "*batch n"],
    std: Float[Tensor, "*batch n"],
    level: float,
    where: Bool[Tensor, "*batch n"] | None = None,
) -> Float[Tensor, ""]:
    """Fraction of errors inside the two-sided Gaussian interval of that level (0.68, 0.95); calibrated if it equals
    `level`.

    Args:
        std: the claimed standard deviation of each error [rad or m].
        where: which entries count; all if not given. NaN if none do.

    Raises:
        InputError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise InputError(f"the level of an interval lies between 0 and 1, got {level}")
    width = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
    inside = (error.abs() <= width * std).to(error.dtype)
    counts = torch.ones_like(error) if where is None else where.to(error.dtype)
    return (inside * counts).sum() / _nan_unless_positive(counts.sum())


def ratio_interval(
    numerator: Float[Tensor, " episodes"],
    denominator: Float[Tensor, " episodes"],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % bootstrap percentile interval (Efron) of `sum numerator / sum denominator` over whole episodes.

    Steps of one video are correlated by its light and poses, so episodes are resampled, not steps. (NaN, NaN) without
    episodes.
    """
    count = len(numerator)
    if count == 0:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    drawn: Int[Tensor, "draws episodes"] = torch.randint(count, (draws, count), generator=generator)
    ratios = numerator.cpu()[drawn].sum(1) / _nan_unless_positive(denominator.cpu()[drawn].sum(1))
    tails = torch.tensor([(1 - 0.95) / 2, (1 + 0.95) / 2], dtype=ratios.dtype)
    low, high = ratios.nanquantile(tails).tolist()
    return low, high


def _flatten(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _centered(x: Tensor) -> Tensor:
    """(S, n) about the mean of every column; NaN in a column that is constant up to rounding."""
    x = _flatten(x)
    centered = x - x.mean(0)
    rounding = 8 * torch.finfo(x.dtype).eps * x.abs().amax(0)
    return torch.where(centered.abs().amax(0) > rounding, centered, torch.nan)


def _nan_unless_positive(x: Tensor) -> Tensor:
    """NaN in place of zeros, so that nothing divides by them."""
    return torch.where(x > 0, x, torch.nan)
