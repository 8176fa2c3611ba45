"""Flow by a small matching network: a local correlation volume on the grid, then one refinement by warping."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from jidm.baselines.trunk import normalize_image
from jidm.estimation.refinement import FlowMeasurement
from jidm.fields.free.blocks import ConvBlock, ResidualBlock
from jidm.fields.free.config import FLOW_STRIDE
from jidm.fields.free.correlation import OUTSIDE_LOGIT, clamp_log_weight, window_indices
from jidm.training.data.batch import PairBatch
from jidm.training.distributed import weighted_mean
from jidm.training.losses import laplace_nll
from jidm.video.warping import warp

_CHANNELS = {"tiny": (16, 32), "small": (24, 32), "base": (32, 48)}  # at 1/2 and 1/4 of the image
_INITIAL_MATCH_WEIGHT = 0.3  # of the loss of the initial match beside the refined one
_MOTION_THRESHOLD = 0.25  # [px]
_MOTION_WEIGHT = 5.0  # of cells that moved farther than the threshold, because most of an image is static


Matches = tuple[FlowMeasurement, FlowMeasurement]
"""Matched flow of B pairs from first to second and back."""


class MatchingNetwork(nn.Module):
    """Flow and confidence between images, in both directions.

    Args:
        size: a key of `_CHANNELS`.
        search_radius: of the correlation window [cells of the grid].
    """

    offsets: Tensor

    def __init__(self, size: str, search_radius: int) -> None:
        super().__init__()
        half, c = _CHANNELS[size]
        self.search_radius, side = search_radius, 2 * search_radius + 1
        d = torch.arange(side) - search_radius
        self.register_buffer("offsets", torch.stack(torch.meshgrid(d, d, indexing="ij")[::-1]), persistent=False)
        self.encoder = nn.Sequential(ConvBlock(3, half, 2), ConvBlock(half, c, 2), ResidualBlock(c), nn.Conv2d(c, c, 1))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        # Before the features are trained, no motion is the most likely.
        self.motion_prior = nn.Parameter(-self.offsets.square().sum(0).flatten().float())
        self.coarse = nn.Sequential(nn.Conv2d(side**2 + c, c, 1), nn.GELU(), ConvBlock(c, c), nn.Conv2d(c, 3, 1))
        fine_inputs = 2 * 3 * FLOW_STRIDE**2 + 2 * c
        self.fine = nn.Sequential(
            nn.Conv2d(fine_inputs, c, 1), nn.GELU(), ConvBlock(c, c), ConvBlock(c, c), nn.Conv2d(c, 3, 1)
        )
        for last in (self.coarse[-1], self.fine[-1]):  # the initial output is the soft-argmax of the correlation
            nn.init.normal_(last.weight, std=1e-3)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"]) -> tuple[Matches, Matches]:
        """Initial and refined matches."""
        # Both directions as one batch.
        image, other_image = torch.cat([first, second]), torch.cat([second, first])
        features = self.encoder(normalize_image(image))
        features = features / features.square().mean(1, keepdim=True).add(1e-4).sqrt()
        other_features = features.roll(len(first), 0)
        initial = self._initial_match(features, other_features[: len(first)])
        refined = self._refine(image, features, other_image, other_features, initial.flow.detach())
        return _split_directions(initial), _split_directions(refined)

    def _initial_match(self, features: Tensor, second: Tensor) -> FlowMeasurement:
        h, w = features.shape[-2:]
        first = features[: len(second)]
        volume = first.flatten(2).mT @ second.flatten(2) * (4 / features.shape[1] ** 0.5)
        index, inside = window_indices(h, w, self.search_radius, features.device)
        windows = torch.cat([v.gather(2, index.expand(len(v), -1, -1)) for v in (volume, volume.mT)])
        windows = windows.masked_fill(~inside, OUTSIDE_LOGIT).mT.unflatten(2, (h, w))
        probability = (windows * self.logit_scale.exp() + self.motion_prior[:, None, None]).softmax(1)
        peak = torch.einsum("bkhw,ck->bchw", probability, self.offsets.flatten(1).to(features))
        return _make_match(peak * FLOW_STRIDE, self.coarse(torch.cat([windows / 4, features], 1)))

    def _refine(
        self, image: Tensor, features: Tensor, other_image: Tensor, other_features: Tensor, flow: Tensor
    ) -> FlowMeasurement:
        wide = F.interpolate(flow, size=image.shape[-2:], mode="bilinear", align_corners=False)
        image_error = warp(other_image, wide) - image
        feature_error = warp(other_features, flow / FLOW_STRIDE) - features
        # The images on the grid of flow, the pixels of each cell as its channels.
        image, image_error = (F.pixel_unshuffle(x, FLOW_STRIDE) for x in (normalize_image(image), image_error))
        return _make_match(flow, self.fine(torch.cat([image, image_error * 4, features, feature_error], 1)))


def flow_loss(matches: tuple[Matches, Matches], batch: PairBatch) -> Float[Tensor, ""]:
    """Laplace negative log-likelihood of both matches under their confidence; 0 if the batch has no flow."""
    total = batch.first.new_zeros(())
    for share, directions in zip((_INITIAL_MATCH_WEIGHT, 1.0), matches):
        for match, exact in zip(directions, batch.flows or ()):
            moves = exact.flow.square().sum(1) > _MOTION_THRESHOLD**2
            weight = exact.weight * (1 + (_MOTION_WEIGHT - 1) * moves)
            total = total + share * weighted_mean(laplace_nll(match.flow - exact.flow, match.log_weight), weight)
    return total


def _make_match(start: Tensor, out: Tensor) -> FlowMeasurement:
    return FlowMeasurement(start + out[:, :2] * FLOW_STRIDE, clamp_log_weight(out[:, 2]))


def _split_directions(match: FlowMeasurement) -> Matches:
    forward, backward = map(FlowMeasurement, match.flow.chunk(2), match.log_weight.chunk(2))
    return forward, backward
