"""The image motion of a batch of pairs in both directions, as losses and calibration use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jidm.estimation.step_estimation import StepEstimate
from jidm.fields.free.config import FLOW_STRIDE
from jidm.flow.base import Flow
from jidm.training.data.batch import PairBatch

Flows = Sequence[tuple[Tensor, Tensor]]
"""(B, 2, h, w) flow [px] with (B, h, w) log-confidence: from the first to the second images, and back."""


@dataclass(frozen=True, eq=False)
class BidirectionalMotion:
    """The motion of a batch forward, then backward: 2 B of everything.

    Attributes:
        flow, weight: (2 B, 2, h, w) [px] and its confidence (2 B, h, w).
        tangent, tangent_weight: motion to first order (2 B, 2, h, w) [px] and its confidence (2 B, h, w).
        tangent_step: (2 B, n) the joint step that belongs to it [rad or m].
        mask: (2 B, y, x) of the robot, or None.
    """

    flow: Tensor
    weight: Tensor
    tangent: Tensor
    tangent_weight: Tensor
    tangent_step: Tensor
    mask: Tensor | None

    @classmethod
    def from_batch(cls, batch: PairBatch) -> BidirectionalMotion | None:
        """A batch's motion; None if the batch has no flow.

        Without first-order motion the flow itself is used, with the whole joint step.
        """
        if batch.flows is None:
            return None
        flow = torch.cat([x.flow for x in batch.flows])
        weight = torch.cat([x.weight for x in batch.flows])
        tangent, tangent_weight, step = flow, weight, torch.cat([batch.delta_q, -batch.delta_q])
        if batch.tangent is not None:
            tangent, tangent_weight, step = (
                torch.cat([getattr(batch, name), getattr(batch, name + "_back")])
                for name in ("tangent", "tangent_weight", "tangent_step")
            )
        mask = None
        if batch.mask is not None and batch.mask_back is not None:
            mask = torch.cat([batch.mask, batch.mask_back])
        return cls(flow, weight, tangent, tangent_weight, step, mask)

    def to_flow(self) -> tuple[Flow, Flow]:
        """Forward and backward flow as an estimator gives it, in cells of its grid."""
        both, count = Flow(self.flow / FLOW_STRIDE, self.weight), len(self.flow) // 2
        return both[:count], both[count:]

    def regression_inputs(self) -> Flows:
        """Forward and backward flow [px] with log-confidence."""
        return list(zip(self.flow.chunk(2), self.weight.log().chunk(2), strict=True))


def matched_flows(step: StepEstimate) -> Flows:
    """The flow that the network's correlation head measured, without gradient."""
    return [(x.flow.detach(), x.log_weight.detach()) for x in step.flow_measurements]
