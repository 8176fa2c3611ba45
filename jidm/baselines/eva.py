"""EVA's inverse dynamics model: absolute joint positions in the middle of three frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from jidm.baselines.base import Baseline, BidirectionalFlow, Prediction
from jidm.baselines.resnet import OWN, RESNETS, load_pretrained, make_trunk
from jidm.baselines.trunk import cell_centers, make_mlp, normalize_image
from jidm.fields.free.blocks import spatial_softmax
from jidm.fields.free.config import ModelConfig, check_choice
from jidm.training.data.batch import PairBatch

_FRAMES = 3
_HIDDEN = (1024, 512)
_BORDER_FRACTION = 0.2
"""Fraction of training windows without one neighbor, as at a video's ends and beside a frame that is not finite."""


@dataclass(frozen=True)
class EvaConfig(ModelConfig):
    """As `ModelConfig`; sizes are those of the own trunk or torchvision's "resnet18", "resnet34", "resnet50"; and

    Attributes:
        norm: of a torchvision trunk: "group", or "batch" as pretrained weights need.
    """

    norm: str = "group"

    size_names: ClassVar[tuple[str, ...]] = (*OWN, *RESNETS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("norm", self.norm, ("group", "batch"))


class EvaIDM(Baseline):
    """EVA's IDM (2026; after Levine et al. 2016): frames t-1, t, t+1 as 9 channels, a residual trunk, spatial softmax,
    an MLP 1024-512-n, MSE loss of the normalized joint positions at t. Steps are differences of positions.

    Differences from the original, each in its favor: the trunk has smaller strides for small images, so that the
    softmax keeps 8 or more cells a side (512 px images keep the original's 16); the softmax has a learned temperature
    per channel; in a fifth of the training windows the middle frame replaces a neighbor, as at the ends of a decoded
    video; group normalization unless weights are pretrained.
    """

    kind: ClassVar[str] = "eva"
    extra_frames: ClassVar[tuple[str, ...]] = ("before",)
    predicts_positions: ClassVar[bool] = True
    Config = EvaConfig
    config: EvaConfig

    def __init__(self, config: EvaConfig) -> None:
        super().__init__(config)
        self.trunk, channels = make_trunk(config.size, 3 * _FRAMES, min(config.height, config.width), config.norm)
        self.pool, numbers = self._make_pool(channels)
        self.mlp = make_mlp(numbers, _HIDDEN, config.n)

    @classmethod
    def from_data(cls, *args: Any, pretrained: bool = False, **options: Any) -> EvaIDM:
        """As `TrainableModel.from_data`.

        Args:
            pretrained: start a torchvision trunk from its ImageNet weights, downloaded on first use; implies batch
                norm.
        """
        if not pretrained:
            return super().from_data(*args, **options)
        model = super().from_data(*args, **{**options, "norm": "batch"})
        load_pretrained(model.trunk, model.config.size)
        return model

    def losses(self, batch: PairBatch) -> dict[str, Float[Tensor, ""]]:
        """Mean squared error of the positions in both frames, in standard deviations of the training poses.

        The second frame's window, and without `before` the first's, has the frame itself in place of the missing
        neighbor.
        """
        before = batch.first if batch.before is None else batch.before
        middle = torch.cat([batch.first, batch.second])
        neighbors = torch.cat([before, batch.first]), torch.cat([batch.second, batch.second])
        if self.training:
            dropped = (batch.random_numbers()[:, :2].T < _BORDER_FRACTION)[..., None, None, None]
            neighbors = tuple(torch.where(out, middle, x) for out, x in zip(dropped, neighbors))  # type: ignore[assignment]
        target = (torch.cat([batch.q, batch.q_next]) - self.q_mean) / self.q_std
        pose = F.mse_loss(self._scaled_position(neighbors[0], middle, neighbors[1]), target)
        return {"pose": pose, "loss": pose}

    def positions(
        self, before: Float[Tensor, "B 3 H W"], current: Float[Tensor, "B 3 H W"], after: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B n"]:
        """Joint positions in the middle frames [rad or m]; `current` is to replace a neighbor that is missing."""
        return self.q_mean + self.q_std * self._scaled_position(before, current, after)

    def predict(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None, motion: BidirectionalFlow | None = None,
    ) -> Prediction:  # fmt: skip
        """See `Baseline.predict`; `motion` is not used. The frame after `second` is not known here."""
        windows = (
            torch.cat([first if before is None else before, first]),
            torch.cat([first, second]),
            torch.cat([second, second]),
        )
        q, q_next = self.positions(*windows).chunk(2)
        return Prediction(q_next - q)

    def _make_pool(self, channels: int) -> tuple[nn.Module, int]:
        return SpatialSoftmax(channels), 2 * channels

    def _scaled_position(self, before: Tensor, current: Tensor, after: Tensor) -> Float[Tensor, "B n"]:
        window = torch.cat([normalize_image(before), normalize_image(current), normalize_image(after)], 1)
        out: Tensor = self.mlp(self.pool(self.trunk(window)))
        return out


class EvaAveragePoolIDM(EvaIDM):
    """The paper's ablation of `EvaIDM`: global average pooling in place of the spatial softmax."""

    kind: ClassVar[str] = "eva_average_pool"

    def _make_pool(self, channels: int) -> tuple[nn.Module, int]:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


class SpatialSoftmax(nn.Module):
    """Expected (u, v) of every channel under its softmax, in [-1, 1], edges of the image at -1 and 1.

    `p = exp(F / T) / sum exp(F / T)`, `(u, v) = sum p (u, v)`: equation 4 of the paper with a learned temperature T per
    channel.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2"]:
        sharp = maps * self.logit_scale.exp()[:, None, None]
        return spatial_softmax(sharp, cell_centers(maps)).flatten(1)
