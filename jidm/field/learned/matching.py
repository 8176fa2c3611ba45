"""What moved between two pictures: correlation first, on a coarse grid, then rough and close looks around a guess."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jidm.field.learned.blocks import ConvBlock, doubled, reduced
from jidm.field.learned.config import COARSE, STRIDE

if TYPE_CHECKING:
    from jidm.field.learned.network import Encoded

_LARGEST_LOG_WEIGHT = 4.0
"""Confidences span e^-4 to e^4 around 1: unclamped ones run away (a published training died of it after 4400 steps)."""

_SMALL = STRIDE // 2  # pixels per cell in which brightness is summed up
_WEIGHING = 16

TEXTURES = 6
"""Channels of the picture of textures."""

_TEXTURE_NOISE, _BRIGHTNESS_NOISE = 0.3, 0.03
"""How much texture features and brightness differ where nothing is wrong, before training."""


@dataclass(frozen=True, eq=False)
class Brightness:
    """What small cells' pixels say of their motion: `weight |g . d + error|^2` summed over them, in noise variances.

    Links are a few pixels wide, and their outlines tell most; so pixels are weighed one by one, and the cells are half
    as wide as the field's: (h2, w2) = (2 h, 2 w).

    Attributes:
        curvature: (B, 2, 2, h2, w2) sum of weight g g' [1/px^2]; slope: (B, 2, h2, w2) sum of weight g error [1/px].
        energy: (B, h2, w2) sum of weight error^2.
    """

    curvature: Float[Tensor, "b 2 2 h2 w2"]
    slope: Float[Tensor, "b 2 h2 w2"]
    energy: Float[Tensor, "b h2 w2"]

    def __add__(self, other: Brightness) -> Brightness:
        return Brightness(self.curvature + other.curvature, self.slope + other.slope, self.energy + other.energy)

    def at_stride(self, stride: float) -> Brightness:
        """The same, its picture's motion told in px of one that is `stride` times larger."""
        return Brightness(self.curvature / stride**2, self.slope / stride, self.energy)


class PairHead(nn.Module):
    """Flow and confidence between two encoded pictures.

    Args:
        features: channels of the matching features.
        reach: radius of the correlation window [cells of the coarse grid].
        grid: (h/2, w/2), the coarse grid: the field's at half its resolution, a sixteenth of the pairs to compare.
        detail: how much larger the pictures are than the one in which flow is told.
    """

    index: Tensor
    inside: Tensor
    offsets: Tensor

    def __init__(self, features: int, reach: int, grid: tuple[int, int], detail: int = 1) -> None:
        super().__init__()
        self.reach, self.detail = reach, detail
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
        self.fine_out = nn.Conv2d(features, 3, 1)
        self.rough_in = nn.Conv2d(2 * features, _WEIGHING, 1)
        self.to_small = nn.Conv2d(features, _WEIGHING, 1)
        # A rough look weighs textures, a close one every pixel.
        self.weigh = nn.ModuleList(ConvBlock(_WEIGHING + 2 * TEXTURES, _WEIGHING) for _ in range(2))
        self.weigh_out = nn.ModuleList(nn.Conv2d(_WEIGHING, n, 1) for n in (1, (_SMALL * detail) ** 2))
        self.log_noise = nn.Parameter(torch.tensor([_TEXTURE_NOISE, _BRIGHTNESS_NOISE]).log())
        for layer in (self.coarse_out, self.fine_out, *self.weigh_out):
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

    def rough(self, here: Encoded, there: Encoded, guess: Float[Tensor, "b 2 h w"]) -> Brightness:
        """What textures, half as large as the picture, say of the motion around a guess; it may be pixels away.

        Args:
            here, there: the first and the second picture.
            guess: flow on the first one's grid [px].
        """
        near = carry_back(there.match, guess / STRIDE)
        x = F.gelu(self.rough_in(torch.cat([here.match, near - here.match], 1)))
        texture = carry_back(there.texture, _enlarged(guess, STRIDE // _SMALL) / _SMALL)
        weights = self._weights(0, x, here.texture, texture)
        return aligned(here.texture, texture, weights, self.log_noise[0].exp(), 1).at_stride(_SMALL)

    def close(
        self, here: Encoded, there: Encoded, guess: Float[Tensor, "b 2 h w"]
    ) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b h w"], Brightness]:
        """Flow and log-confidence near a guess, and what every pixel says of the motion around it; precise, but the guess
        must be good to a pixel or so. Arguments as for `rough`."""
        near = carry_back(there.match, guess / STRIDE)
        wide = STRIDE * self.detail
        error = carry_back(there.image, _enlarged(guess, wide) * self.detail) - here.image
        both = [F.pixel_unshuffle(x, STRIDE) for x in (here.small, 4 * reduced(error, self.detail))]
        x = self.fine(self.fine_in(torch.cat([*both, here.match, near - here.match], 1)))
        out = self.fine_out(x)
        # What to believe is decided close to the pixels: links are a few of them wide.
        texture = carry_back(there.texture, _enlarged(guess, STRIDE // _SMALL) / _SMALL)
        cell = _SMALL * self.detail
        weights = F.pixel_shuffle(self._weights(1, self.to_small(x), here.texture, texture), cell)
        rows = aligned(here.image, here.image + error, weights, self.log_noise[1].exp(), cell)
        return guess + out[:, :2] * STRIDE, _bounded(out[:, 2]), rows.at_stride(1 / self.detail)

    def _weights(self, kind: int, features: Tensor, texture: Tensor, carried: Tensor) -> Tensor:
        """Log-weights on the grid of textures."""
        seen = torch.cat([doubled(features), texture, carried - texture], 1)
        return _bounded(self.weigh_out[kind](self.weigh[kind](seen)))


def aligned(
    first: Float[Tensor, "b c H W"], carried: Float[Tensor, "b c H W"], log_weight: Float[Tensor, "b 1 H W"],
    noise: Tensor, cell: int,
) -> Brightness:  # fmt: skip
    """What the difference of two pictures says of the motion left between them, in cells of `cell` pixels of theirs."""
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
    weight = log_weight.exp() / (noise**2 + products[:, 5:])
    small = F.avg_pool2d(products * weight, cell, divisor_override=1) if cell > 1 else products * weight
    uu, uv, vv, slope, energy = small[:, 0], small[:, 1], small[:, 2], small[:, 3:5], small[:, 5]
    return Brightness(torch.stack([uu, uv, uv, vv], 1).unflatten(1, (2, 2)), slope, energy)


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


def _enlarged(flow: Float[Tensor, "b 2 h w"], times: int) -> Tensor:
    return F.interpolate(flow, scale_factor=float(times), mode="bilinear", align_corners=False)


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
