"""Where the baselines that read flow get it from: the batch, an estimator, or a small matching network of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError
from jidm.learn.baselines.base import Baseline, BaselineConfig, Motion
from jidm.learn.baselines.matching import Match, MatchingNetwork, flow_loss
from jidm.learn.batch import PairBatch
from jidm.learn.estimated import fitted_flow
from jidm.motion.fit import Fit
from jidm.motion.flow import FlowEstimator, as_flow_estimator, both_ways

LEARNED = "learned"


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


class FlowBaseline(Baseline):
    """A baseline that reads flow."""

    config: FlowConfig

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        self.head = MatchingNetwork(config.size, config.reach) if config.flow == LEARNED else None

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
        for way in both_ways(estimator, first, second):
            found = fitted_flow(way, fit).to(first)
            parts += [found.flow, found.weight]
    return Motion(*parts)
