"""Direct regression of the joint step from flow and the first frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jidm.baselines.base import BidirectionalFlow, Prediction
from jidm.baselines.direct import DirectConfig
from jidm.baselines.flow_source import FlowBaseline, FlowConfig, flow_of_matches
from jidm.baselines.matching import flow_loss
from jidm.baselines.trunk import LEVELS, PooledRegressor, append_coordinates, normalize_image, regression_loss
from jidm.fields.free.blocks import ConvBlock
from jidm.fields.free.config import FLOW_SCALE
from jidm.training.data.batch import PairBatch

_FLOW_WEIGHT = 0.15  # of the matching network's loss beside the step's, as in `LossWeights`


@dataclass(frozen=True)
class DirectOnFlowConfig(FlowConfig, DirectConfig):
    """As `FlowConfig` and `DirectConfig`, with pooling to a grid by default."""

    pool: str = "grid"


class DirectOnFlowIDM(FlowBaseline):
    """The "direct IDM on flow" to which Li et al. (2026, VERA) compare theirs: flow and first frame to joint step, MSE
    loss.

    The trunk is that of `DirectIDM`. The prediction is half the difference of those of the two directions, so that
    swapping the frames flips its sign exactly. With `flow="learned"` the loss of the step also trains the matching
    network.
    """

    kind: ClassVar[str] = "direct_on_flow"
    Config = DirectOnFlowConfig
    config: DirectOnFlowConfig

    def __init__(self, config: DirectOnFlowConfig) -> None:
        super().__init__(config)
        half, quarter, *_ = levels = LEVELS[config.size]
        self.from_image = nn.Sequential(ConvBlock(3, half, 2), nn.Conv2d(half, quarter, 3, 2, 1))
        # Flow is not normalized before it is added to the features: its magnitude is what the step depends on.
        self.from_flow = nn.Sequential(nn.Conv2d(5, quarter, 3, 1, 1), nn.GELU(), nn.Conv2d(quarter, quarter, 3, 1, 1))
        self.regressor = PooledRegressor(levels, config.n, config.pool)

    def losses(self, batch: PairBatch) -> dict[str, Float[Tensor, ""]]:
        """Loss of the step in standard deviations of the training steps, plus that of the flow where it is learned.

        Raises:
            InputError: the batch has no flow, and the model no matching network or estimator.
        """
        if self.head is None:
            motion, flow = self.batch_flow(batch), None
        else:
            matches = self.head(batch.first, batch.second)
            motion, flow = flow_of_matches(matches[1]), flow_loss(matches, batch)
        prediction, target = self._scaled_step(batch.first, batch.second, motion), batch.delta_q / self.delta_std
        step = regression_loss(self.config.loss, prediction, target)
        if flow is None:
            return {"step": step, "loss": step}
        return {"step": step, "flow": flow, "loss": step + _FLOW_WEIGHT * flow}

    def predict(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None, motion: BidirectionalFlow | None = None,
    ) -> Prediction:  # fmt: skip
        """See `Baseline.predict`; `before` is not used."""
        motion = motion or self.estimate_flow(first, second)
        return Prediction(self._scaled_step(first, second, motion) * self.delta_std)

    def _scaled_step(self, first: Tensor, second: Tensor, motion: BidirectionalFlow) -> Float[Tensor, "B n"]:
        image = normalize_image(torch.cat([first, second]))
        flow, weight = torch.cat([x.flow for x in motion]), torch.cat([x.weight for x in motion])
        # An estimator's weights have another scale than those of exact flow, so only whether a weight is positive is
        # used.
        known = (weight > 0).to(flow) if self.head is None else weight.clamp(min=1e-6).log() / 4
        inputs = append_coordinates(torch.cat([flow / FLOW_SCALE, known[:, None]], 1))
        forward, backward = self.regressor(self.from_image(image) + self.from_flow(inputs)).chunk(2)
        return (forward - backward) / 2
