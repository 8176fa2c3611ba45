"""The motion of a batch of pairs in both directions, as losses and calibration ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from jidm.errors import InputError
from jidm.estimation.factors.learned import StepEstimate
from jidm.fields.free.config import FLOW_STRIDE
from jidm.flow.base import Flow
from jidm.training.data.batch import PairBatch
from jidm.training.distributed import weighted_mean

_ROBOT_WEIGHT = 4.0
"""What a cell that shows the robot counts in the loss of the mask; few do, and to miss one costs measurements of it."""
_MOTION_THRESHOLD = 0.5  # [px] what moved by more is the robot, where nobody knows where it is
_STATIC_WEIGHT = 0.1
"""What a cell that did not move counts there: it may show the robot at rest. What moves in a tenth of all pairs is told
to be the robot as likely as not."""

Flows = Sequence[tuple[Tensor, Tensor]]
"""(B, 2, h, w) flow [px] with (B, h, w) log-confidence: from the first to the second pictures, and back."""


@dataclass(frozen=True, eq=False)
class BidirectionalMotion:
    """The motion of a batch in both directions, one after the other: 2 B of everything.

    Attributes:
        flow: whole motion (2 B, 2, h, w) [px]; weight: (2 B, h, w).
        tangent: motion to first order (2 B, 2, h, w), tangent_weight: (2 B, h, w), tangent_step: (2 B, n) that made it.
        mask: (2 B, y, x) the robot, or None.
    """

    flow: Tensor
    weight: Tensor
    tangent: Tensor
    tangent_weight: Tensor
    tangent_step: Tensor
    mask: Tensor | None

    @classmethod
    def from_batch(cls, batch: PairBatch) -> BidirectionalMotion | None:
        """A batch's motion; None where nothing measured it.

        Raises:
            InputError: flow is known one way only.
        """
        if batch.flow is None or batch.weight is None:
            return None
        if batch.flow_back is None or batch.weight_back is None:
            raise InputError("a field is trained on flow in both directions; give flow_back and weight_back")
        flow = torch.cat([batch.flow, batch.flow_back])
        weight = torch.cat([batch.weight, batch.weight_back])
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
        """Flow as an estimator gives it, in cells of its grid: there and back."""
        both, count = Flow(self.flow / FLOW_STRIDE, self.weight), len(self.flow) // 2
        return both[:count], both[count:]

    def regression_inputs(self) -> Flows:
        """Flow with its log-confidence, there and back."""
        return list(zip(self.flow.chunk(2), self.weight.log().chunk(2), strict=True))

    def mask_loss(self, logit: Tensor) -> Tensor:
        """Cross entropy against the robot's mask; without one, what moved is the robot and what did not may be."""
        if self.mask is not None:
            return F.binary_cross_entropy_with_logits(logit, self.mask, pos_weight=logit.new_tensor(_ROBOT_WEIGHT))
        moved = (self.flow.square().sum(1).sqrt() > _MOTION_THRESHOLD).to(logit)
        weight = self.weight * (moved + _STATIC_WEIGHT * (1 - moved))
        target, weight = (F.interpolate(x[:, None], size=logit.shape[-2:])[:, 0] for x in (moved, weight))
        return weighted_mean(F.binary_cross_entropy_with_logits(logit, target, reduction="none"), weight)


def matched_flows(step: StepEstimate) -> Flows:
    """What the network's first look saw, to be learned from but not to be taught."""
    return [(x.flow.detach(), x.log_weight.detach()) for x in step.flow_measurements]
