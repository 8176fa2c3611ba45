"""Direct regression of the joint step from two frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jidm.baselines.base import Baseline, BidirectionalFlow, Prediction
from jidm.baselines.trunk import (
    LEVELS,
    LOSSES,
    POOLS,
    PooledRegressor,
    append_coordinates,
    normalize_image,
    regression_loss,
)
from jidm.fields.free.blocks import ConvBlock
from jidm.fields.free.config import ModelConfig, check_choice
from jidm.training.data.batch import PairBatch


@dataclass(frozen=True)
class DirectConfig(ModelConfig):
    """As `ModelConfig`, and

    Attributes:
        pool: "grid" (4 x 4 cells) or "average" (over the whole image, as UniPi does).
        loss: "mse" or "smooth_l1", see `regression_loss`.
    """

    pool: str = "average"
    loss: str = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pool", self.pool, POOLS)
        check_choice("loss", self.loss, LOSSES)


class DirectIDM(Baseline):
    """UniPi's inverse dynamics model (Du et al. 2023): convolutions over both frames, pooling, a small MLP, MSE loss.

    Differences from the original, each in its favor: strided convolutions with group normalization; the difference of
    the frames and the pixel coordinates are input channels; optional pooling to 4 x 4 cells (`pool="average"` is
    UniPi's); and the prediction is half the difference of both orders of the frames, so that swapping them flips its
    sign exactly.
    """

    kind: ClassVar[str] = "direct"
    Config = DirectConfig
    config: DirectConfig

    def __init__(self, config: DirectConfig) -> None:
        super().__init__(config)
        levels = LEVELS[config.size]
        self.stem = nn.Sequential(ConvBlock(8, levels[0], 2), ConvBlock(levels[0], levels[1], 2))
        self.regressor = PooledRegressor(levels, config.n, config.pool)

    def losses(self, batch: PairBatch) -> dict[str, Float[Tensor, ""]]:
        """Loss of the step in standard deviations of the training steps; needs no flow."""
        prediction, target = self._scaled_step(batch.first, batch.second), batch.delta_q / self.delta_std
        step = regression_loss(self.config.loss, prediction, target)
        return {"step": step, "loss": step}

    def predict(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None, motion: BidirectionalFlow | None = None,
    ) -> Prediction:  # fmt: skip
        """See `Baseline.predict`; `before` and `motion` are not used."""
        return Prediction(self._scaled_step(first, second) * self.delta_std)

    def _scaled_step(self, first: Tensor, second: Tensor) -> Float[Tensor, "B n"]:
        a, b = normalize_image(first), normalize_image(second)
        ordered = torch.cat([torch.cat([a, b - a], 1), torch.cat([b, a - b], 1)])
        forward, backward = self.regressor(self.stem(append_coordinates(ordered))).chunk(2)
        return (forward - backward) / 2
