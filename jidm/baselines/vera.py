"""VERA: a small UNet predicts the Jacobian field, ridge regression inverts it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from jidm.baselines.base import BidirectionalFlow, Prediction
from jidm.baselines.flow_source import FlowBaseline, FlowConfig
from jidm.baselines.matching import flow_loss
from jidm.baselines.trunk import normalize_image
from jidm.errors import InputError
from jidm.estimation.factors.flow import normal_equations
from jidm.fields.free.blocks import ConvBlock, upsample2x
from jidm.fields.free.config import FLOW_SCALE, FLOW_STRIDE
from jidm.flow import Flow
from jidm.training.data.batch import PairBatch
from jidm.training.distributed import weighted_mean

WORKING_STRIDE = {"tiny": 4, "small": 2, "base": 1}
"""Pixels of the image per cell of the UNet's finest level, per size; "base" is the published one."""

FILTERS = (32, 64, 128)


@dataclass(frozen=True)
class VeraConfig(FlowConfig):
    """As `FlowConfig`, with an estimator by default, and

    Attributes:
        ridge: added to the diagonal of J'WJ in absolute terms [px^2 per squared standard step].
    """

    flow: str = "dis"
    ridge: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise InputError(f"ridge must be positive and finite, got {self.ridge}")


class VeraField(FlowBaseline):
    """VERA's Jacobian IDM (Li et al. 2026) in its small configuration: a UNet of 3 levels and 32 filters from one
    image to the field (2 n channels), MSE loss of the predicted flow, ridge regression with an absolute ridge when
    decoding.

    Differences from the original: group normalization; both directions of each pair; outputs are scaled by each joint's
    typical step, and the ridge acts on steps in that unit, so that rad and m are comparable; the UNet works at 1/4
    ("tiny"), 1/2 ("small") or all ("base", the published one) of the image's resolution, so that its cost can match the
    other models'. The field is averaged to the grid of flow.
    """

    kind: ClassVar[str] = "vera"
    measured: ClassVar[tuple[str, ...]] = ("residual", "explained_fraction")
    Config = VeraConfig
    config: VeraConfig

    def __init__(self, config: VeraConfig) -> None:
        super().__init__(config)
        self.stride = WORKING_STRIDE[config.size]
        a, b, c = FILTERS
        self.down = nn.ModuleList([_double_conv(3 * self.stride**2, a), _double_conv(a, b), _double_conv(b, c)])
        self.narrow = nn.ModuleList([nn.Conv2d(c, b, 1), nn.Conv2d(b, a, 1)])
        self.up = nn.ModuleList([_double_conv(2 * b, b), _double_conv(2 * a, a)])
        self.out = nn.Conv2d(a, 2 * config.n, 1)

    def jacobian(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2 n h w"]:
        """The field at images, on the grid of flow [px of the image per rad or m]."""
        return self._scaled_jacobian(image) / self.delta_std[:, None, None]

    def losses(self, batch: PairBatch) -> dict[str, Float[Tensor, ""]]:
        """Mean squared error of `jacobian @ delta_q` against the flow [px^2], in both directions.

        Raises:
            InputError: the batch has no flow and the model no estimator.
        """
        flows = self.batch_flow(batch)
        jacobian = self._scaled_jacobian(torch.cat([batch.first, batch.second]))
        step = batch.delta_q / self.delta_std
        predicted = torch.einsum("bcnhw,bn->bchw", jacobian, torch.cat([step, -step]))
        error = predicted - torch.cat([x.flow for x in flows])
        field = weighted_mean(error.square().sum(1), torch.cat([x.weight for x in flows]))
        if self.head is None:
            return {"field": field, "loss": field}
        flow = flow_loss(self.head(batch.first, batch.second), batch)
        return {"field": field, "flow": flow, "loss": field + flow}

    def predict(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None, motion: BidirectionalFlow | None = None,
    ) -> Prediction:  # fmt: skip
        """See `Baseline.predict`; `before` and the backward flow are not used."""
        forward, _ = motion or self.estimate_flow(first, second)
        return self.invert(self._scaled_jacobian(first), forward)

    def invert(self, scaled: Float[Tensor, "B 2 n h w"], flow: Flow) -> Prediction:
        """Ridge regression `argmin sum w |J d - flow|^2 + ridge |d|^2` for a field in px per standard step."""
        sums = normal_equations(scaled, flow.flow, flow.weight, layout="dense")
        matrix, vector, energy = sums.H.double(), sums.g.double(), sums.cost.double()
        damped = matrix + self.config.ridge * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        step = torch.linalg.solve(damped, vector)
        unexplained = (energy - 2 * (step * vector).sum(-1) + torch.einsum("bi,bij,bj->b", step, matrix, step)).clamp(
            min=0
        )
        explained_fraction = (1 - unexplained / energy.clamp(min=1e-12)).clamp(0, 1) * (energy > 0)
        residual = (unexplained / sums.total_weight.double().clamp(min=1e-12)).sqrt()
        return Prediction(step.to(scaled) * self.delta_std, residual.to(scaled), explained_fraction.to(scaled))

    def _scaled_jacobian(self, image: Tensor) -> Float[Tensor, "B 2 n h w"]:
        fine = self.down[0](F.pixel_unshuffle(normalize_image(image), self.stride))
        middle = self.down[1](F.max_pool2d(fine, 2))
        x = self.down[2](F.max_pool2d(middle, 2))
        x = self.up[0](torch.cat([upsample2x(self.narrow[0](x)), middle], 1))
        x = self.up[1](torch.cat([upsample2x(self.narrow[1](x)), fine], 1))
        field = F.avg_pool2d(self.out(x), FLOW_STRIDE // self.stride)
        return field.unflatten(1, (2, self.config.n)) * FLOW_SCALE


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvBlock(inputs, outputs), ConvBlock(outputs, outputs))
