"""Where the baselines that read flow get it from: the batch, an estimator, or a small matching network of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jidm.errors import InputError
from jidm.field.learned.blocks import ConvBlock, ResidualBlock
from jidm.field.learned.matching import PairHead
from jidm.learn.baselines.base import Baseline, BaselineConfig, Motion
from jidm.learn.baselines.trunk import centred
from jidm.learn.batch import GRID_STRIDE, PairBatch
from jidm.learn.estimated import fitted_flow
from jidm.motion.fit import Fit
from jidm.motion.flow import FlowEstimator, as_flow_estimator

LEARNED = "learned"

_MATCH = {"tiny": 32, "small": 32, "base": 48}
_HALF = {"tiny": 16, "small": 24, "base": 32}
_EARLY = 0.3  # what the first look counts beside the second
_EPS = 1e-2  # [px] below this a flow error counts as its square (Charbonnier)


@dataclass(frozen=True)
class FlowConfig(BaselineConfig):
    """As `BaselineConfig`, and

    Attributes:
        flow: "learned": a matching network of the model's own, trained on the batch's flow; or the name of an
            estimator ("dis", "raft"), asked when decoding, and in training where the batch has no flow.
        reach: of the matching network [cells of the grid].
    """

    flow: str = LEARNED
    reach: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reach < 1:
            raise InputError(f"reach must be at least 1 cell, got {self.reach}")
        if self.flow != LEARNED:
            as_flow_estimator(self.flow)  # refuses unknown names


@dataclass(frozen=True, eq=False)
class Match:
    """Flow of one direction of B pairs [px] and the log of its confidence [log 1/px^2], on the grid."""

    flow: Float[Tensor, "B 2 h w"]
    log_weight: Float[Tensor, "B h w"]


class FlowHead(nn.Module):
    """The learned field's pair head on a small encoder of its own: all-pairs correlation, then one closer look."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        half, match = _HALF[config.size], _MATCH[config.size]
        self.encoder = nn.Sequential(
            ConvBlock(3, half, 2), ConvBlock(half, match, 2), ResidualBlock(match), nn.Conv2d(match, match, 1)
        )
        grid = (config.height // GRID_STRIDE, config.width // GRID_STRIDE)
        self.pair = PairHead(match, config.reach, grid)

    def forward(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"]
    ) -> tuple[tuple[Match, Match], tuple[Match, Match]]:
        """First and second look, each in both directions."""
        x = self.encoder(centred(torch.cat([first, second])))
        a, b = (x / x.square().mean(1, keepdim=True).add(1e-4).sqrt()).chunk(2)
        there, back = self.pair.correlate(a, b)
        early = Match(*self.pair.start(there, a)), Match(*self.pair.start(back, b))
        guesses = early[0].flow.detach(), early[1].flow.detach()
        late = (
            Match(*self.pair.refine(first, a, second, b, guesses[0])),
            Match(*self.pair.refine(second, b, first, a, guesses[1])),
        )
        return early, late


def flow_loss(looks: tuple[tuple[Match, Match], tuple[Match, Match]], batch: PairBatch) -> Float[Tensor, ""]:
    """Error of both looks under a Laplace distribution as wide as the confidence says; 0 where the batch has no flow."""
    total = batch.first.new_zeros(())
    for share, look in zip((_EARLY, 1.0), looks):
        for match, flow, weight in zip(look, (batch.flow, batch.flow_back), (batch.weight, batch.weight_back)):
            if flow is None or weight is None:
                continue
            error = ((match.flow - flow).square().sum(1) + _EPS**2).sqrt()
            half = match.log_weight / 2
            total = total + share * ((error * half.exp() - half) * weight).sum() / weight.sum().clamp(min=1e-6)
    return total


class FlowBaseline(Baseline):
    """A baseline that reads flow."""

    config: FlowConfig

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        self.head = FlowHead(config) if config.flow == LEARNED else None

    @property
    def estimator(self) -> str | None:
        """Name of the flow estimator that decoding asks; None where the model measures flow itself."""
        return None if self.config.flow == LEARNED else self.config.flow

    def motion(self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"]) -> Motion:
        """What moved between frames at the config's size, by the model's own head or its estimator."""
        if self.head is not None:
            return _as_motion(self.head(first, second)[1])
        return estimated_motion(as_flow_estimator(self.config.flow), first, second)

    def training_motion(self, batch: PairBatch) -> tuple[Motion, Float[Tensor, ""] | None]:
        """The flow that the inverse is trained on, and the loss of the head that measured it (None without a head)."""
        if self.head is not None:
            looks = self.head(batch.first, batch.second)
            return _as_motion(looks[1]), flow_loss(looks, batch)
        return self.given_motion(batch), None

    def given_motion(self, batch: PairBatch) -> Motion:
        """The batch's own flow, or the estimator's.

        Raises:
            InputError: there is neither.
        """
        if batch.flow is not None and batch.weight is not None:
            return Motion(batch.flow, batch.weight, batch.flow_back, batch.weight_back)
        if self.estimator is None:
            raise InputError(
                f"{self.kind} learns from flow and the recording has none; train with estimated flow, e.g. flow 'dis'"
            )
        return self.motion(batch.first, batch.second)


def _as_motion(look: tuple[Match, Match]) -> Motion:
    there, back = look
    return Motion(there.flow, there.log_weight.exp(), back.flow, back.log_weight.exp())


def estimated_motion(
    estimator: FlowEstimator, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"], fit: Fit | None = None
) -> Motion:
    """An estimator's flow of recorded pictures, both ways, on the grid of the model's picture.

    Args:
        fit: how the recorded picture lies in the model's; the same size if not given.
    """
    height, width = first.shape[-2:]
    fit = fit or Fit(height, width, height, width)
    parts: list[Any] = []
    with torch.no_grad():
        for one, two in ((first, second), (second, first)):
            found = fitted_flow(estimator(one, two), fit).to(first)
            parts += [found.flow, found.weight]
    return Motion(*parts)
