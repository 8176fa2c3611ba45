"""Dense direct alignment of two images: Gauss-Newton equations of the remaining motion, summed over cells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.estimation.robust import cauchy
from jidm.video.warping import gradients

_PIXEL_NOISE = 0.03  # standard deviation of brightness between frames
_MIN_PROBABILITY = 1e-3  # the prior is clamped to it and 1 minus it


@dataclass(frozen=True, eq=False)
class CellEquations:
    """Quadratic cost of each cell's motion d [px of the image]: `weight |g . d + error|^2`, summed over its pixels.

    Every pixel has its own weight, since links are a few pixels wide and their edges carry most of the information.

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
    """Linearize the difference of two images in the remaining motion, with Cauchy's robust weights.

    Args:
        first: an image.
        warped: the other one, warped to the grid of the first by the motion estimated so far.
        weight: of each pixel.
        noise: scale of Cauchy's weight [brightness]; larger for larger motion errors, whose brightness differences would
            otherwise be treated as occlusions.
        cell_size: pixels per side of a cell.
        scale: size of these images relative to the image in whose pixels motion is given.
    """
    error = warped - first
    # The mean of both images' gradients makes a step second-order exact (ESM; Benhimane and Malis 2004).
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
    # Occlusions and changes of light are outliers.
    weighted = products * (weight * cauchy(products[:, 5:] / noise**2) / noise**2)
    summed = F.avg_pool2d(weighted, cell_size, divisor_override=1) if cell_size > 1 else weighted
    uu, uv, vv, gradient, cost = summed[:, 0], summed[:, 1], summed[:, 2], summed[:, 3:5], summed[:, 5]
    hessian = torch.stack([uu, uv, uv, vv], 1).unflatten(1, (2, 2))
    return CellEquations(hessian * scale**2, gradient * scale, cost)


def reweight_by_motion(
    robot: Float[Tensor, "b 1 H W"], first: Float[Tensor, "b c H W"], second: Float[Tensor, "b c H W"],
    warped: Float[Tensor, "b c H W"],
) -> Float[Tensor, "b 1 H W"]:  # fmt: skip
    """Posterior probability that a pixel shows the robot, given whether it moved with the robot or stayed in place.

    The mask is coarser than links, so it includes static pixels beside and in front of them, which bias every step towards
    zero. The likelihoods of both hypotheses follow from the brightness errors with and without the motion. The probability
    is never increased, since pixels that happen to fit a wrong motion would dominate.

    Args:
        robot: prior probability of each pixel, from the mask; 0 stays 0.
        first, second: the images.
        warped: the second one on the grid of the first, by a motion that is nearly right.
    """
    warped_error, static_error = (_local_mean((x - first).square().mean(1, keepdim=True)) for x in (warped, second))
    odds = torch.logit(robot, eps=_MIN_PROBABILITY) + (static_error - warped_error).clamp(max=0) / (2 * _PIXEL_NOISE**2)
    return torch.where(robot > 0, odds.sigmoid(), robot)


def _local_mean(x: Float[Tensor, "b 1 H W"]) -> Float[Tensor, "b 1 H W"]:
    """Mean over 3 x 3 pixels, since single ones are ambiguous."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
