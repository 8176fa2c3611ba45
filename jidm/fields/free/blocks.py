"""Building blocks of the networks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBlock(nn.Module):
    """3x3 convolution, group normalization, GELU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.convolution(x)))


class ResidualBlock(nn.Module):
    """Residual block (He et al. 2016) of two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.norm(self.second(self.first(x))))


class Modulation(nn.Module):
    """Feature-wise linear modulation (FiLM; Perez et al. 2018) by a vector, with a shift that varies over the image.

    The shift is an affine function of the pixel position, so that joint positions can place half-planes, of which the
    next layers build links.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 4 * channels)
        nn.init.normal_(self.linear.weight, std=0.1)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, vector: Tensor, grid: Float[Tensor, "2 h w"]) -> Tensor:
        scale, shift, along_u, along_v = self.linear(vector)[..., None, None].chunk(4, dim=-3)
        return x * (1 + 0.1 * scale) + shift + 2 * (along_u * grid[0] + along_v * grid[1])


class Encoder(nn.Module):
    """Convolutional encoder: an image to features at 1/2, 1/4, 1/8 and 1/16 of its size."""

    def __init__(self, levels: tuple[int, int, int, int]) -> None:
        super().__init__()
        a, b, c, d = levels
        self.to_half = ConvBlock(3, a, 2)
        self.to_quarter = nn.Sequential(ConvBlock(a, b, 2), ResidualBlock(b))
        self.to_eighth = nn.Sequential(ConvBlock(b, c, 2), ResidualBlock(c), ResidualBlock(c))
        self.to_sixteenth = nn.Sequential(ConvBlock(c, d, 2), ResidualBlock(d), ResidualBlock(d))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = self.to_half((image - 0.5) * 4)
        quarter = self.to_quarter(half)
        eighth = self.to_eighth(quarter)
        return half, quarter, eighth, self.to_sixteenth(eighth)


def pixel_grid(height: int, width: int, stride: int) -> Float[Tensor, "2 h w"]:
    """Centers (u, v) of the cells of a grid over a `height x width` image, 0 = middle, unit = half the longer side."""
    half = max(height, width) / 2
    v = (torch.arange(height // stride) * stride + (stride - 1) / 2 - (height - 1) / 2) / half
    u = (torch.arange(width // stride) * stride + (stride - 1) / 2 - (width - 1) / 2) / half
    return torch.stack(torch.meshgrid(v, u, indexing="ij")[::-1])


def spatial_softmax(maps: Float[Tensor, "b c h w"], grid: Float[Tensor, "2 h w"]) -> Float[Tensor, "b c 2"]:
    """Spatial softmax (Levine et al. 2016): expected grid position under the softmax of every map."""
    return maps.flatten(2).softmax(-1) @ grid.flatten(1).T


def luma(image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Luma of RGB images (ITU-R BT.601)."""
    red, green, blue = image.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def upsample2x(x: Tensor) -> Tensor:
    """Bilinear upsampling to twice the height and width."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def downsample(x: Tensor, factor: int) -> Tensor:
    """Average pooling by a factor in both directions."""
    return F.avg_pool2d(x, factor) if factor > 1 else x
