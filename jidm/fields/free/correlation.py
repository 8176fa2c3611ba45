"""Optical flow by a correlation volume on a coarse grid, from which photometric refinement starts."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jidm.fields.free.blocks import ConvBlock, upsample2x
from jidm.fields.free.config import COARSE_STRIDE

MAX_LOG_WEIGHT = 4.0
"""Confidences lie between e^-4 and e^4: unclamped ones diverge (one training failed that way after 4400 steps)."""


OUTSIDE_LOGIT = -20.0
"""Correlation of a place outside the image."""


class CorrelationHead(nn.Module):
    """Flow and confidence between two encoded images, from a local window of their correlation volume.

    Args:
        features: channels of the matching features.
        search_radius: of the correlation window [cells of the coarse grid].
        grid: (H/8, W/8), the coarse grid. At half the resolution of flow the volume has a sixteenth of the entries.
    """

    index: Tensor
    inside: Tensor
    offsets: Tensor

    def __init__(self, features: int, search_radius: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.search_radius = search_radius
        side = 2 * search_radius + 1
        index, inside = window_indices(*grid, search_radius)
        offsets = (
            torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")[::-1]) - search_radius
        )
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("inside", inside, persistent=False)
        self.register_buffer("offsets", offsets.flatten(1).float(), persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        # Prior on the motion: cost of its squared length.
        self.motion_penalty = nn.Parameter(torch.tensor(0.0))
        self.coarse = nn.Sequential(
            nn.Conv2d(side**2 + features, features, 1), nn.GELU(), ConvBlock(features, features)
        )
        self.coarse_out = nn.Conv2d(features, 3, 1)
        nn.init.normal_(self.coarse_out.weight, std=1e-3)
        assert self.coarse_out.bias is not None
        nn.init.zeros_(self.coarse_out.bias)

    def correlate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Windows of the correlation volume of coarse features, first to second and back: two (B, side^2, H/8, W/8)."""
        b, c, h, w = first.shape
        volume = (first * (4 / c**0.5)).flatten(2).mT @ second.flatten(2)
        windows = []
        for one in (volume, volume.mT):
            window = one.gather(2, self.index.expand(b, -1, -1)).masked_fill(~self.inside, OUTSIDE_LOGIT)
            windows.append(window.mT.unflatten(2, (h, w)))
        return windows[0], windows[1]

    def initial_flow(self, window: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Flow [px of the image] and log-confidence on the grid of flow, by soft-argmax and a learned correction."""
        penalty = F.softplus(self.motion_penalty) * self.offsets.square().sum(0)[:, None, None]
        probability = (window * self.logit_scale.exp() / 4 - penalty).softmax(1)
        peak = torch.einsum("bkhw,ck->bchw", probability, self.offsets)
        out = self.coarse_out(self.coarse(torch.cat([window / 4, features], 1)))
        return upsample2x((peak + out[:, :2]) * COARSE_STRIDE), clamp_log_weight(upsample2x(out[:, 2:]))[:, 0]


def clamp_log_weight(log_weight: Tensor) -> Tensor:
    """Smoothly bounded to +-`MAX_LOG_WEIGHT`."""
    return MAX_LOG_WEIGHT * torch.tanh(log_weight / MAX_LOG_WEIGHT)


def window_indices(
    h: int, w: int, search_radius: int, device: torch.device | None = None
) -> tuple[Int[Tensor, "hw k"], Bool[Tensor, "hw k"]]:
    """Flat indices of the window around every cell, clamped into the grid, and which of them are inside it."""
    v, u = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    d = torch.arange(-search_radius, search_radius + 1, device=device)
    dv, du = torch.meshgrid(d, d, indexing="ij")
    vv, uu = v.reshape(-1, 1) + dv.reshape(1, -1), u.reshape(-1, 1) + du.reshape(1, -1)
    inside = (vv >= 0) & (vv < h) & (uu >= 0) & (uu < w)
    return vv.clamp(0, h - 1) * w + uu.clamp(0, w - 1), inside
