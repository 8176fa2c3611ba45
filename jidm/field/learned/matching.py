"""What moved between two pictures: correlation first, on a coarse grid, then a close look around a guess."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jidm.field.learned.blocks import ConvBlock, doubled
from jidm.field.learned.config import COARSE, STRIDE

_LARGEST_LOG_WEIGHT = 4.0
"""Confidences span e^-4 to e^4 around 1: unclamped ones run away (a published training died of it after 4400 steps)."""

_BRIGHTNESS_NOISE = 0.03
"""How much brightness differs where nothing is wrong, before training."""


@dataclass(frozen=True, eq=False)
class Brightness:
    """What a cell's pixels say of its motion: `exp(log_weight) |g . d + error|^2` summed over them, in noise variances.

    Attributes:
        curvature: (B, 2, 2, h, w) sum of g g' [1/px^2]; slope: (B, 2, h, w) sum of g error [1/px].
        energy: (B, h, w) sum of error^2; log_weight: (B, h, w) confidence.
    """

    curvature: Float[Tensor, "b 2 2 h w"]
    slope: Float[Tensor, "b 2 h w"]
    energy: Float[Tensor, "b h w"]
    log_weight: Float[Tensor, "b h w"]


class PairHead(nn.Module):
    """Flow and confidence between two encoded pictures.

    Args:
        features: channels of the matching features.
        reach: radius of the correlation window [cells of the coarse grid].
        grid: (h/2, w/2), the coarse grid: the field's at half its resolution, a sixteenth of the pairs to compare.
    """

    index: Tensor
    inside: Tensor
    offsets: Tensor

    def __init__(self, features: int, reach: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.reach = reach
        side = 2 * reach + 1
        index, inside = _windows(*grid, reach)
        offsets = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")[::-1]) - reach
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("inside", inside, persistent=False)
        self.register_buffer("offsets", offsets.flatten(1).float(), persistent=False)
        self.sharpness = nn.Parameter(torch.tensor(2.0))
        # How much less likely a larger motion is than a smaller one, before anything is seen.
        self.stillness = nn.Parameter(torch.tensor(0.0))
        self.coarse = nn.Sequential(
            nn.Conv2d(side**2 + features, features, 1), nn.GELU(), ConvBlock(features, features)
        )
        self.coarse_out = nn.Conv2d(features, 3, 1)
        pixels = 3 * STRIDE**2
        self.fine_in = nn.Sequential(nn.Conv2d(2 * pixels + 2 * features, features, 1), nn.GELU())
        self.fine = ConvBlock(features, features)
        self.fine_out = nn.Conv2d(features, 4, 1)
        self.log_noise = nn.Parameter(torch.tensor(_BRIGHTNESS_NOISE).log())
        for layer in (self.coarse_out, self.fine_out):
            nn.init.normal_(layer.weight, std=1e-3)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def correlate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Both directions' windows of one correlation volume of coarse features: two (B, side^2, h/2, w/2)."""
        b, c, h, w = first.shape
        volume = (first * (4 / c**0.5)).flatten(2).mT @ second.flatten(2)
        windows = []
        for one in (volume, volume.mT):
            window = one.gather(2, self.index.expand(b, -1, -1)).masked_fill(~self.inside, -20.0)
            windows.append(window.mT.unflatten(2, (h, w)))
        return windows[0], windows[1]

    def start(self, window: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """First flow [px of the picture] and log-confidence on the field's grid, from a correlation window."""
        unlikely = F.softplus(self.stillness) * self.offsets.square().sum(0)[:, None, None]
        likely = (window * self.sharpness.exp() / 4 - unlikely).softmax(1)
        peak = torch.einsum("bkhw,ck->bchw", likely, self.offsets)
        out = self.coarse_out(self.coarse(torch.cat([window / 4, features], 1)))
        return doubled((peak + out[:, :2]) * COARSE), _bounded(doubled(out[:, 2:]))[:, 0]

    def refine(
        self, pixels: Tensor, features: Tensor, other: Tensor, other_features: Tensor, guess: Tensor
    ) -> tuple[Tensor, Tensor, Brightness]:
        """Flow and log-confidence near a guess: the second picture is carried back by it and compared closely.

        Args:
            pixels: (B, 3, H, W) first picture; features: its matching features (B, C, h, w).
            other, other_features: of the second.
            guess: (B, 2, h, w) flow [px].
        """
        height, width = pixels.shape[-2:]
        carried = carry_back(other, F.interpolate(guess, size=(height, width), mode="bilinear", align_corners=False))
        both = torch.cat([F.pixel_unshuffle(pixels, STRIDE), F.pixel_unshuffle(carried - pixels, STRIDE) * 4], 1)
        near = carry_back(other_features, guess / STRIDE)
        x = self.fine_in(torch.cat([both, features, near - features], 1))
        out = self.fine_out(self.fine(x))
        brightness = self._brightness(pixels, carried, _bounded(out[:, 3]))
        return guess + out[:, :2] * STRIDE, _bounded(out[:, 2]), brightness

    def _brightness(self, pixels: Tensor, carried: Tensor, log_weight: Tensor) -> Brightness:
        error = carried - pixels
        # The mean of both pictures' gradients makes a step second-order exact (ESM; Benhimane and Malis 2004).
        along_u, along_v = gradients((pixels + carried) / 2)
        noise = self.log_noise.exp()
        # Cauchy's weight: what is hidden or lit otherwise counts little.
        weight = 1 / (noise**2 + error.square().mean(1, keepdim=True))

        def summed(x: Tensor) -> Tensor:
            return F.avg_pool2d((x * weight).sum(1, keepdim=True), STRIDE)[:, 0] * STRIDE**2

        uu, uv, vv = summed(along_u * along_u), summed(along_u * along_v), summed(along_v * along_v)
        slope = torch.stack([summed(along_u * error), summed(along_v * error)], 1)
        curvature = torch.stack([uu, uv, uv, vv], 1).unflatten(1, (2, 2))
        return Brightness(curvature, slope, summed(error * error), log_weight)


def gradients(image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Central differences along u and v [1/px]."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    return (
        (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2,
        (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2,
    )


def path(ahead: Float[Tensor, "b 2 h w"], back: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 2 h w"]:
    """Where the first picture's cells go when both pictures' fields tell their motion to first order.

    Args:
        ahead: the first field times the step, on the first grid [px of the picture].
        back: the second field times the step, on the second grid [px of the picture].

    Returns:
        Flow [px] whose error is of third order in the step: the mean of the motion where a point leaves and where it
        arrives (trapezoidal rule).
    """
    return (ahead + carry_back(back, ahead / STRIDE)) / 2


def carry_back(image: Float[Tensor, "b c h w"], flow: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b c h w"]:
    """The second picture seen from the first's grid: `image` at `x + flow(x)` [px of the same grid]."""
    h, w = image.shape[-2:]
    v = torch.arange(h, dtype=flow.dtype, device=flow.device)[:, None]
    u = torch.arange(w, dtype=flow.dtype, device=flow.device)
    grid = torch.stack([(2 * (u + flow[:, 0]) + 1) / w - 1, (2 * (v + flow[:, 1]) + 1) / h - 1], -1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _bounded(log_weight: Tensor) -> Tensor:
    return _LARGEST_LOG_WEIGHT * torch.tanh(log_weight / _LARGEST_LOG_WEIGHT)


def _windows(h: int, w: int, reach: int) -> tuple[Int[Tensor, "hw k"], Tensor]:
    """For every cell, the cells of its window (clamped into the grid), and which of them are really there."""
    v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    d = torch.arange(-reach, reach + 1)
    dv, du = torch.meshgrid(d, d, indexing="ij")
    vv, uu = v.reshape(-1, 1) + dv.reshape(1, -1), u.reshape(-1, 1) + du.reshape(1, -1)
    inside = (vv >= 0) & (vv < h) & (uu >= 0) & (uu < w)
    return vv.clamp(0, h - 1) * w + uu.clamp(0, w - 1), inside
