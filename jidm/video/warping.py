"""Image gradients, dilation, and flow from the first-order motion of two images; `warp` comes from `flow`."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from jidm.flow.base import warp


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
    """Flow from the first-order motion of both images, by the trapezoidal rule.

    Args:
        forward: the first image's motion to first order, on the first grid or a crop of it [px of the image].
        backward: the second image's, in the same direction of time, on the second grid [px of the image].
        stride: pixels of the image per cell.
        corner: first row and column of the crop.

    Returns:
        Flow [px], with an error of third order in the motion: the mean of the motion at the start and at the end of a path.
    """
    return (forward + warp(backward, forward / stride, corner)) / 2


def dilate(mask: Bool[Tensor, "*batch h w"], radius: int) -> Bool[Tensor, "*batch h w"]:
    """Dilation by a square with sides of 2 radius + 1 pixels."""
    images = mask.reshape(-1, *mask.shape[-2:]).float()
    return F.max_pool2d(images, 2 * radius + 1, stride=1, padding=radius).reshape(mask.shape) > 0
