"""The convolutional trunk of the regression baselines: features on a coarse grid, pooled, then an MLP."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from jidm.fields.free.blocks import ConvBlock, ResidualBlock
from jidm.fields.free.config import SIZES

LEVELS = {name: size.levels for name, size in SIZES.items()}
"""Channels at 1/2, 1/4, 1/8 and 1/16 of the image, per size: those of the learned field's encoder."""

_POOL_SIZE = 4  # cells per side after pooling
_BOTTLENECK = 32
_HIDDEN = 256
_BETA = 0.05  # of the smooth L1 loss

POOLS = ("grid", "average")
LOSSES = ("mse", "smooth_l1")


class PooledRegressor(nn.Module):
    """From features at 1/4 of the image to n numbers.

    Args:
        levels: see `LEVELS`; the input has `levels[1]` channels.
        outputs: n.
        pool: "grid" pools to 4 x 4 cells, which keeps positions; "average" over the whole image, as UniPi does.
    """

    def __init__(self, levels: tuple[int, int, int, int], outputs: int, pool: str) -> None:
        super().__init__()
        _, b, c, d = levels
        self.pool_size = _POOL_SIZE if pool == "grid" else 1
        self.trunk = nn.Sequential(ConvBlock(b, c, 2), ResidualBlock(c), ConvBlock(c, d, 2), ResidualBlock(d))
        bottleneck = _BOTTLENECK if pool == "grid" else d
        self.bottleneck = nn.Conv2d(d, bottleneck, 1)
        self.mlp = make_mlp(bottleneck * self.pool_size**2, (_HIDDEN,), outputs)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        x = self.bottleneck(self.trunk(features))
        out: Tensor = self.mlp(F.adaptive_avg_pool2d(x, self.pool_size).flatten(1))
        return out


def make_mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear layers with GELU between them; the last has small initial weights, so that outputs start near the mean."""
    widths = (inputs, *hidden)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
    last = nn.Linear(widths[-1], outputs)
    nn.init.normal_(last.weight, std=0.1 / widths[-1] ** 0.5)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def regression_loss(name: str, prediction: Float[Tensor, "b n"], target: Float[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Mean squared error for "mse", smooth L1 loss for "smooth_l1" (beta of a twentieth, as the learned field's)."""
    return F.mse_loss(prediction, target) if name == "mse" else F.smooth_l1_loss(prediction, target, beta=_BETA)


def normalize_image(image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """RGB in [0, 1] to about zero mean and unit standard deviation."""
    return (image - 0.5) * 4


def cell_centers(like: Float[Tensor, "b c h w"]) -> Float[Tensor, "2 h w"]:
    """(u, v) of the cells of these maps in [-1, 1], edges of the image at -1 and 1."""
    height, width = like.shape[-2:]
    v = (2 * torch.arange(height, dtype=like.dtype, device=like.device) + 1) / height - 1
    u = (2 * torch.arange(width, dtype=like.dtype, device=like.device) + 1) / width - 1
    return torch.stack(torch.meshgrid(v, u, indexing="ij")[::-1])


def append_coordinates(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
    """The maps with two more channels, the coordinates of each cell (CoordConv; Liu et al. 2018)."""
    return torch.cat([x, cell_centers(x).expand(len(x), -1, -1, -1)], 1)
