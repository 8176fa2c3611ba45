"""Joint step by direct regression from flow and image features: a learned prior on what the robot usually does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from jidm.fields.free.blocks import ConvBlock, ResidualBlock
from jidm.fields.free.config import FLOW_SCALE

_POOL_SIZE = 4  # cells per side after pooling, which keeps positions
_BOTTLENECK = 32
_HIDDEN = 256
_MIN_LOG_WEIGHT = -8.0  # of unknown flow, whose weight is 0
_LOG_STD_RANGE = 3.0  # standard deviations lie between e^-4 and e^2 typical steps


class StepRegressionHead(nn.Module):
    """Joint step by regression from flow and the features of the image it starts from, in both directions.

    The "direct IDM on flow" to which Li et al. (2026) compare theirs, used here as a second measurement. The field
    measures the motion of the joints; this head is a prior of their usual motion, which helps where the field is inaccurate or a
    joint is hardly visible.

    Args:
        features: channels of the image's features at 1/4.
        levels: channels of the head at 1/4, 1/8 and 1/16.
        n: number of joints.
    """

    def __init__(self, features: int, levels: tuple[int, int, int], n: int) -> None:
        super().__init__()
        quarter, eighth, sixteenth = levels
        self.from_image = nn.Conv2d(features, quarter, 1)
        # Flow is not normalized before it is added to the features: its magnitude is what the step depends on.
        self.from_flow = nn.Sequential(nn.Conv2d(5, quarter, 3, 1, 1), nn.GELU(), nn.Conv2d(quarter, quarter, 3, 1, 1))
        self.trunk = nn.Sequential(
            ConvBlock(quarter, eighth, 2), ResidualBlock(eighth), ConvBlock(eighth, sixteenth, 2), ResidualBlock(sixteenth),
            nn.Conv2d(sixteenth, _BOTTLENECK, 1), nn.GELU(), nn.AdaptiveAvgPool2d(_POOL_SIZE), nn.Flatten(),
        )  # fmt: skip
        self.out = nn.Sequential(nn.Linear(_BOTTLENECK * _POOL_SIZE**2, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, 2 * n))

    def forward(
        self, features: Sequence[Float[Tensor, "b c h w"]], flows: Sequence[tuple[Tensor, Tensor]], grid: Tensor
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """Step and its log standard deviation, both in units of the training steps' standard deviation.

        Args:
            features: of the first and of the second image.
            flows: (b, 2, h, w) [px] with (b, h, w) log-confidence, from first to second and, if known, back. With both,
                the result is half the difference of the two directions, so that swapping the images flips its sign
                exactly.
            grid: (2, h, w) coordinates of the cells.
        """
        count = len(flows)
        flow_channels = torch.cat(
            [
                torch.cat([flow / FLOW_SCALE, _normalize_log_weight(log_weight)[:, None]], 1)
                for flow, log_weight in flows
            ]
        )
        flow_channels = torch.cat([flow_channels, grid.expand(len(flow_channels), -1, -1, -1)], 1)
        out = self.out(self.trunk(self.from_image(torch.cat(tuple(features[:count]))) + self.from_flow(flow_channels)))
        step, log_std = out.unflatten(0, (count, -1)).chunk(2, -1)
        sign = step.new_tensor([1.0, -1.0])[:count, None, None]
        return (sign * step).mean(0), _LOG_STD_RANGE * torch.tanh(log_std.mean(0) / _LOG_STD_RANGE) - 1


def _normalize_log_weight(log_weight: Tensor) -> Tensor:
    return F.relu(log_weight - _MIN_LOG_WEIGHT) / -_MIN_LOG_WEIGHT
