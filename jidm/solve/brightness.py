"""What the brightness of two pictures says of the motion left between them, and how one is seen from the other's grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_GRAIN = 0.03  # brightness by which a pixel differs from itself a frame later
_SURE = 1e-3  # no mask is surer than this of a pixel


@dataclass(frozen=True, eq=False)
class Brightness:
    """What cells' pixels say of their motion d [px of the picture]: `weight |g . d + error|^2` summed over each cell.

    Links are a few pixels wide, and their outlines tell most; so pixels are weighed one by one before they are summed.

    Attributes:
        curvature: (B, 2, 2, h, w) sum of weight g g' [1/px^2]; slope: (B, 2, h, w) sum of weight g error [1/px].
        energy: (B, h, w) sum of weight error^2.
    """

    curvature: Float[Tensor, "b 2 2 h w"]
    slope: Float[Tensor, "b 2 h w"]
    energy: Float[Tensor, "b h w"]


def aligned(
    first: Float[Tensor, "b c H W"], carried: Float[Tensor, "b c H W"], weight: Float[Tensor, "b 1 H W"],
    *, noise: float, cell: int, larger: float = 1.0,
) -> Brightness:  # fmt: skip
    """What the difference of two pictures says of the motion left between them.

    Args:
        first: a picture.
        carried: the second one, seen from the first one's grid where the motion so far is thought to lead.
        weight: how much each pixel counts.
        noise: brightness that differs where nothing is wrong. Pixels that differ by more count less; so the further off
            the motion may be, the larger: what differs because of that must not be taken for something hidden.
        cell: pixels per side over which is summed up.
        larger: how many times larger these pictures are than the one in whose pixels motion is told.
    """
    error = carried - first
    # The mean of both pictures' gradients makes a step second-order exact (ESM; Benhimane and Malis 2004).
    along_u, along_v = gradients((first + carried) / 2)
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
    counts = products * (weight / (noise**2 + products[:, 5:]))
    summed = F.avg_pool2d(counts, cell, divisor_override=1) if cell > 1 else counts
    uu, uv, vv, slope, energy = summed[:, 0], summed[:, 1], summed[:, 2], summed[:, 3:5], summed[:, 5]
    curvature = torch.stack([uu, uv, uv, vv], 1).unflatten(1, (2, 2))
    return Brightness(curvature * larger**2, slope * larger, energy)


def moved_along(
    robot: Float[Tensor, "b 1 H W"], first: Float[Tensor, "b c H W"], second: Float[Tensor, "b c H W"],
    carried: Float[Tensor, "b c H W"],
) -> Float[Tensor, "b 1 H W"]:  # fmt: skip
    """How likely pixels show the robot once it is asked whether they moved along with it or stayed where they were.

    A mask is coarser than links are: beside them, and where something stands in front, it takes in what does not move,
    and that holds every step back. Two explanations of the second picture, the first carried along and the first left in
    place, are weighed by what brightness they leave. Where both explain it equally, nothing changes; and no pixel counts
    more than the mask says, or those that fit a wrong guess would outvote the others.

    Args:
        robot: how likely each pixel shows the robot, as far as the mask knows; 0 stays 0.
        first, second: the pictures. carried: the second seen from the first's grid, by a motion that is nearly right.
    """
    along, still = (_nearby((x - first).square().mean(1, keepdim=True)) for x in (carried, second))
    odds = torch.logit(robot, eps=_SURE) + (still - along).clamp(max=0) / (2 * _GRAIN**2)
    return torch.where(robot > 0, odds.sigmoid(), robot)


def _nearby(x: Float[Tensor, "b 1 H W"]) -> Float[Tensor, "b 1 H W"]:
    """Mean over 3 x 3 pixels: one alone is too easily like another."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def gradients(image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Central differences along u and v [1/px]."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    return (
        (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2,
        (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2,
    )


def path(
    ahead: Float[Tensor, "b 2 h w"], back: Float[Tensor, "b 2 H W"], stride: int, corner: tuple[int, int] = (0, 0)
) -> Float[Tensor, "b 2 h w"]:
    """Where the first picture's cells go when both pictures' fields tell their motion to first order.

    Args:
        ahead: the first field times the step, on the first grid or a part of it [px of the picture].
        back: the second field times the step, on the second grid [px of the picture].
        stride: pixels of the picture per cell.
        corner: first row and column of the part.

    Returns:
        Flow [px] whose error is of third order in the step: the mean of the motion where a point leaves and where it
        arrives (trapezoidal rule).
    """
    return (ahead + carry_back(back, ahead / stride, corner)) / 2


def carry_back(
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
