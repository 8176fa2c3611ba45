"""Gaussian pyramid of a frame's brightness and gradient, sampled at sub-pixel positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_BASE_SIGMA = 0.8  # [px]; below it, interpolation between pixels is noise
_OCTAVE_SIGMA = 1.3  # [px of the finer level]; with the 2x2 mean, the blur of every level is about 0.8 of its pixels
_MIN_SIDE = 24  # [px]; a coarser level would be smaller than a link
_MAX_LEVELS = 5


@dataclass(frozen=True, eq=False)
class BrightnessPyramid:
    """The pyramid of one frame.

    Attributes:
        levels: per level (3, h, w): brightness in [0, 1] and its derivatives by u and v per pixel of the full image.
            Level k has 2^-k of the resolution and a blur of about 0.8 * 2^k px.
        color: (3, H, W) the frame itself, RGB in [0, 1].
    """

    levels: tuple[Float[Tensor, "3 _h _w"], ...]
    color: Float[Tensor, "3 H W"]

    @classmethod
    def from_frame(cls, frame: Float[Tensor, "3 H W"]) -> BrightnessPyramid:
        """Pyramid of an RGB frame in [0, 1], with fewer levels for a small image."""
        luma = torch.tensor(_LUMA, dtype=frame.dtype, device=frame.device)
        image = _blur(torch.einsum("c,chw->hw", luma, frame), _BASE_SIGMA)
        result = []
        for k in range(_MAX_LEVELS):
            result.append(_with_gradient(image, 2.0**-k))
            if min(image.shape) < 2 * _MIN_SIDE:
                break
            image = F.avg_pool2d(_blur(image, _OCTAVE_SIGMA)[None, None], 2, ceil_mode=False)[0, 0]
        return cls(tuple(result), frame)

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the full image."""
        return self.levels[0].shape[-2], self.levels[0].shape[-1]

    def sample(self, level: int, uv: Float[Tensor, "*N 2"]) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N 2"]]:
        """Brightness and its gradient [1/px] at pixel positions of the full image, bilinear, clamped at the border."""
        values = bilinear_sample(self.levels[level], uv, 2.0**level)
        return values[0], values[1:].movedim(0, -1)

    def inside(self, uv: Float[Tensor, "*N 2"], margin: float = 2.0) -> Bool[Tensor, "*N"]:
        """Whether positions lie inside the image, at least `margin` px from its border."""
        h, w = self.size
        u, v = uv.unbind(-1)
        return (u > margin) & (v > margin) & (u < w - 1 - margin) & (v < h - 1 - margin)


def bilinear_sample(
    image: Float[Tensor, "c h w"], uv: Float[Tensor, "*N 2"], scale: float = 1.0
) -> Float[Tensor, "c *N"]:
    """Channels at pixel positions of an image `scale` times as large, bilinear, clamped at the border."""
    h, w = image.shape[-2:]
    # Pixel edges are aligned between levels: u_k + 0.5 = (u + 0.5) / 2^k; odd sizes lose the last column.
    extent = torch.tensor([w, h], dtype=uv.dtype, device=uv.device) * scale
    grid = ((uv + 0.5) * 2 / extent - 1).reshape(1, 1, -1, 2)
    values = F.grid_sample(image[None].to(uv), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return values.reshape(len(image), *uv.shape[:-1])


def _blur(image: Float[Tensor, "H W"], sigma: float) -> Float[Tensor, "H W"]:
    radius = int(3 * sigma + 0.5)
    x = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, 1, -1)
    padded = F.pad(image[None, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.transpose(-1, -2))[0, 0]


def _with_gradient(image: Float[Tensor, "H W"], scale: float) -> Float[Tensor, "3 H W"]:
    # Scharr's derivative, the 3x3 filter with the best rotational symmetry (Jaehne, Scharr, Koerkel 1999).
    smooth = torch.tensor([3.0, 10.0, 3.0], dtype=image.dtype, device=image.device) / 16
    slope = torch.tensor([-0.5, 0.0, 0.5], dtype=image.dtype, device=image.device) * scale
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None]
    gradient = F.conv2d(F.pad(image[None, None], (1, 1, 1, 1), mode="replicate"), kernels)[0]
    return torch.cat([image[None], gradient])
