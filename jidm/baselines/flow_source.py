"""Flow for the baselines that need it: from the batch, an estimator, or a small matching network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.baselines.base import Baseline, BidirectionalFlow
from jidm.baselines.matching import Matches, MatchingNetwork
from jidm.errors import InputError
from jidm.fields.free.config import ModelConfig
from jidm.flow import Flow, FlowEstimator, as_flow_estimator, bidirectional_flow
from jidm.training.data.batch import PairBatch
from jidm.training.data.flow_cache import letterbox_flow
from jidm.video.letterbox import Letterbox

LEARNED = "learned"
"""The value of `FlowConfig.flow` for a matching network."""


@dataclass(frozen=True)
class FlowConfig(ModelConfig):
    """As `ModelConfig`, and

    Attributes:
        flow: "learned": a matching network of the model's own, trained on the batch's flow; or the name of an
            estimator ("dis", "raft"), used when decoding, and in training where the batch has no flow.
        search_radius: of the matching network [cells of the grid].
    """

    flow: str = LEARNED
    search_radius: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search_radius < 1:
            raise InputError(f"search_radius must be at least 1 cell, got {self.search_radius}")
        if self.flow != LEARNED:
            as_flow_estimator(self.flow)  # raises for unknown names


class FlowBaseline(Baseline):
    """A baseline whose input is flow."""

    config: FlowConfig

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        self.head = MatchingNetwork(config.size, config.search_radius) if config.flow == LEARNED else None

    @property
    def flow_estimator(self) -> str | None:
        """Name of the flow estimator that decoding uses; None where the model has a matching network."""
        return None if self.config.flow == LEARNED else self.config.flow

    def estimate_flow(self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"]) -> BidirectionalFlow:
        """Flow between frames of the config's size, by the model's matching network or its estimator."""
        if self.head is not None:
            return flow_of_matches(self.head(first, second)[1])
        return estimate_bidirectional_flow(as_flow_estimator(self.config.flow), first, second)

    def batch_flow(self, batch: PairBatch) -> BidirectionalFlow:
        """The batch's flow, or the estimator's if it has none.

        Raises:
            InputError: there is neither.
        """
        if batch.flows is not None:
            return batch.flows
        if self.flow_estimator is None:
            raise InputError(
                f"{self.kind} learns from flow and the recording has none; train with estimated flow, e.g. flow 'dis'"
            )
        return self.estimate_flow(batch.first, batch.second)


def flow_of_matches(matches: Matches) -> BidirectionalFlow:
    """Matched flow, weighted by its confidence [1/px^2]."""
    forward, backward = (Flow(x.flow, x.log_weight.exp()) for x in matches)
    return forward, backward


def estimate_bidirectional_flow(
    estimator: FlowEstimator,
    first: Float[Tensor, "B 3 H W"],
    second: Float[Tensor, "B 3 H W"],
    letterbox: Letterbox | None = None,
) -> BidirectionalFlow:
    """An estimator's flow between recorded images in both directions, on the grid of the model's image.

    Args:
        letterbox: from the recorded to the model's image; identity if not given.
    """
    height, width = first.shape[-2:]
    letterbox = letterbox or Letterbox(height, width, height, width)
    with torch.no_grad():
        forward, backward = (
            letterbox_flow(flow, letterbox).to(first) for flow in bidirectional_flow(estimator, first, second)
        )
    return forward, backward
