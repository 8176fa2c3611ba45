"""What the brightness of two pictures says of the motion left between them, and how one is seen from the other's grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_PIXEL_NOISE = 0.03  # brightness by which a pixel differs from itself a frame later
_MIN_PROBABILITY = 1e-3  # no mask is surer than this of a pixel


@dataclass(frozen=True, eq=False)
class CellEquations:
    """What cells' pixels say of their motion d [px of the picture]: `weight |g . d + error|^2` summed over each cell.

    Links are a few pixels wide, and their outlines tell most; so pixels are weighed one by one before they are summed.

    Attributes:
        hessian: (B, 2, 2, h, w) sum of weight g g' [1/px^2]; gradient: (B, 2, h, w) sum of weight g error [1/px].
        cost: (B, h, w) sum of weight error^2.
    """

    hessian: Float[Tensor, "b 2 2 h w"]
    gradient: Float[Tensor, "b 2 h w"]
    cost: Float[Tensor, "b h w"]


def cell_equations(
    first: Float[Tensor, "b c H W"], warped: Float[Tensor, "b c H W"], weight: Float[Tensor, "b 1 H W"],
    *, noise: float, cell_size: int, scale: float = 1.0,
) -> CellEquations:  # fmt: skip
    """What the difference of two pictures says of the motion left between them.

    Args:
        first: a picture.
        warped: the second one, seen from the first one's grid where the motion so far is thought to lead.
        weight: how much each pixel counts.
        noise: brightness that differs where nothing is wrong. Pixels that differ by more count less; so the further off
            the motion may be, the larger: what differs because of that must not be taken for something hidden.
        cell_size: pixels per side over which is summed up.
        scale: how many times larger these pictures are than the one in whose pixels motion is told.
    """
    error = warped - first
    # The mean of both pictures' gradients makes a step second-order exact (ESM; Benhimane and Malis 2004).
    along_u, along_v = gradients((first + warped) / 2)
    pairs = (
        (along_u, along_u),
        (along_u, along_v),
        (along_v, along_v),
        (along_u, error),
        (along_v, error),
        (error, error),
    )
    products = torch.stack([(a * b).mean(1) for a, b in pairs], 1)
    # Cauchy's weight: what is hidden or lit otherwise counts little.
    weighted = products * (weight / (noise**2 + products[:, 5:]))
    summed = F.avg_pool2d(weighted, cell_size, divisor_override=1) if cell_size > 1 else weighted
    uu, uv, vv, gradient, cost = summed[:, 0], summed[:, 1], summed[:, 2], summed[:, 3:5], summed[:, 5]
    hessian = torch.stack([uu, uv, uv, vv], 1).unflatten(1, (2, 2))
    return CellEquations(hessian * scale**2, gradient * scale, cost)


def reweight_by_motion(
    robot: Float[Tensor, "b 1 H W"], first: Float[Tensor, "b c H W"], second: Float[Tensor, "b c H W"],
    warped: Float[Tensor, "b c H W"],
) -> Float[Tensor, "b 1 H W"]:  # fmt: skip
    """How likely pixels show the robot once it is asked whether they moved along with it or stayed where they were.

    A mask is coarser than links are: beside them, and where something stands in front, it takes in what does not move,
    and that holds every step back. Two explanations of the second picture, the first carried along and the first left in
    place, are weighed by what brightness they leave. Where both explain it equally, nothing changes; and no pixel counts
    more than the mask says, or those that fit a wrong guess would outvote the others.

    Args:
        robot: how likely each pixel shows the robot, as far as the mask knows; 0 stays 0.
        first, second: the pictures. warped: the second seen from the first's grid, by a motion that is nearly right.
    """
    warped_error, static_error = (_local_mean((x - first).square().mean(1, keepdim=True)) for x in (warped, second))
    odds = torch.logit(robot, eps=_MIN_PROBABILITY) + (static_error - warped_error).clamp(max=0) / (2 * _PIXEL_NOISE**2)
    return torch.where(robot > 0, odds.sigmoid(), robot)


def _local_mean(x: Float[Tensor, "b 1 H W"]) -> Float[Tensor, "b 1 H W"]:
    """Mean over 3 x 3 pixels: one alone is too easily like another."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def gradients(image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Central differences along u and v [1/px]."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    return (
        (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2,
        (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2,
    )


def symmetric_flow(
    forward: Float[Tensor, "b 2 h w"], backward: Float[Tensor, "b 2 H W"], stride: int, corner: tuple[int, int] = (0, 0)
) -> Float[Tensor, "b 2 h w"]:
    """Where the first picture's cells go when both pictures' fields tell their motion to first order.

    Args:
        forward: the first field times the step, on the first grid or a part of it [px of the picture].
        backward: the second field times the step, on the second grid [px of the picture].
        stride: pixels of the picture per cell.
        corner: first row and column of the part.

    Returns:
        Flow [px] whose error is of third order in the step: the mean of the motion where a point leaves and where it
        arrives (trapezoidal rule).
    """
    return (forward + warp(backward, forward / stride, corner)) / 2


def warp(
    image: Float[Tensor, "b c H W"], flow: Float[Tensor, "b 2 h w"], corner: tuple[int, int] = (0, 0)
) -> Float[Tensor, "b c h w"]:
    """The second picture seen from the first's grid: `image` at `x + flow(x)` [px of the same grid].

    The flow may be that of a part of the grid, whose first row and column are the `corner`.
    """
    h, w = image.shape[-2:]
    v = torch.arange(flow.shape[-2], dtype=flow.dtype, device=flow.device)[:, None] + corner[0]
    u = torch.arange(flow.shape[-1], dtype=flow.dtype, device=flow.device) + corner[1]
    grid = torch.stack([(2 * (u + flow[:, 0]) + 1) / w - 1, (2 * (v + flow[:, 1]) + 1) / h - 1], -1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
