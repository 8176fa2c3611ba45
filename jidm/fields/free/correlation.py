"""What moved between two pictures, by correlation on a coarse grid: a first look, from which closer ones begin."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from jidm.fields.free.blocks import ConvBlock, upsample2x
from jidm.fields.free.config import COARSE_STRIDE

_MAX_LOG_WEIGHT = 4.0
"""Confidences span e^-4 to e^4 around 1: unclamped ones run away (a published training died of it after 4400 steps)."""


class CorrelationHead(nn.Module):
    """Flow and confidence between two encoded pictures.

    Args:
        features: channels of the matching features.
        reach: radius of the correlation window [cells of the coarse grid].
        grid: (H/8, W/8), the coarse grid: at half the resolution of flow there are a sixteenth of the pairs to compare.
    """

    index: Tensor
    inside: Tensor
    offsets: Tensor

    def __init__(self, features: int, search_radius: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.search_radius = search_radius
        side = 2 * search_radius + 1
        index, inside = _window_indices(*grid, search_radius)
        offsets = (
            torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")[::-1]) - search_radius
        )
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("inside", inside, persistent=False)
        self.register_buffer("offsets", offsets.flatten(1).float(), persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        # How much less likely a larger motion is than a smaller one, before anything is seen.
        self.motion_penalty = nn.Parameter(torch.tensor(0.0))
        self.coarse = nn.Sequential(
            nn.Conv2d(side**2 + features, features, 1), nn.GELU(), ConvBlock(features, features)
        )
        self.coarse_out = nn.Conv2d(features, 3, 1)
        nn.init.normal_(self.coarse_out.weight, std=1e-3)
        assert self.coarse_out.bias is not None
        nn.init.zeros_(self.coarse_out.bias)

    def correlate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Both directions' windows of one correlation volume of coarse features: two (B, side^2, H/8, W/8)."""
        b, c, h, w = first.shape
        volume = (first * (4 / c**0.5)).flatten(2).mT @ second.flatten(2)
        windows = []
        for one in (volume, volume.mT):
            window = one.gather(2, self.index.expand(b, -1, -1)).masked_fill(~self.inside, -20.0)
            windows.append(window.mT.unflatten(2, (h, w)))
        return windows[0], windows[1]

    def initial_flow(self, window: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """First flow [px of the picture] and log-confidence on the grid of flow, from a correlation window."""
        penalty = F.softplus(self.motion_penalty) * self.offsets.square().sum(0)[:, None, None]
        probability = (window * self.logit_scale.exp() / 4 - penalty).softmax(1)
        peak = torch.einsum("bkhw,ck->bchw", probability, self.offsets)
        out = self.coarse_out(self.coarse(torch.cat([window / 4, features], 1)))
        return upsample2x((peak + out[:, :2]) * COARSE_STRIDE), _clamp_log_weight(upsample2x(out[:, 2:]))[:, 0]


def _clamp_log_weight(log_weight: Tensor) -> Tensor:
    return _MAX_LOG_WEIGHT * torch.tanh(log_weight / _MAX_LOG_WEIGHT)


def _window_indices(h: int, w: int, search_radius: int) -> tuple[Int[Tensor, "hw k"], Tensor]:
    """For every cell, the cells of its window (clamped into the grid), and which of them are really there."""
    v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    d = torch.arange(-search_radius, search_radius + 1)
    dv, du = torch.meshgrid(d, d, indexing="ij")
    vv, uu = v.reshape(-1, 1) + dv.reshape(1, -1), u.reshape(-1, 1) + du.reshape(1, -1)
    inside = (vv >= 0) & (vv < h) & (uu >= 0) & (uu < w)
    return vv.clamp(0, h - 1) * w + uu.clamp(0, w - 1), inside
