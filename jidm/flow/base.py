"""Optical flow, the protocol of its estimators, and their shared arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.errors import InputError


@dataclass(frozen=True, eq=False)
class Flow:
    """Optical flow from a first to a second frame, on the first frame's pixel grid.

    Attributes:
        flow: (*batch, 2, H, W) displacement (u right, v down) [px], finite everywhere.
        weight: (*batch, H, W) confidence in [0, 1]; 0 = ignore this pixel.
    """

    flow: Float[Tensor, "*batch 2 H W"]
    weight: Float[Tensor, "*batch H W"]

    def __post_init__(self) -> None:
        expected = (*self.flow.shape[:-3], *self.flow.shape[-2:])
        if self.flow.ndim < 3 or self.flow.shape[-3] != 2 or tuple(self.weight.shape) != expected:
            raise InputError(
                f"flow must be (*batch, 2, H, W) and weight (*batch, H, W), "
                f"got {tuple(self.flow.shape)} and {tuple(self.weight.shape)}"
            )

    def __getitem__(self, index: Any) -> Flow:
        """Index the batch axes."""
        return Flow(self.flow[index], self.weight[index])

    def to(self, *args: Any, **kwargs: Any) -> Flow:
        """Same flow on another device or dtype, arguments as for `Tensor.to`."""
        return Flow(self.flow.to(*args, **kwargs), self.weight.to(*args, **kwargs))

    def resized(self, height: int, width: int) -> Flow:
        """The same motion on another grid, averaged by weight: pixels of weight 0 do not affect their neighbors."""
        mass = resize_images(self.weight[..., None, :, :], height, width)
        mean = resize_flow(self.flow * self.weight[..., None, :, :], height, width) / mass.clamp(min=1e-6)
        return Flow(torch.where(mass > 1e-6, mean, torch.zeros_like(mean)), mass[..., 0, :, :].clamp(0.0, 1.0))


@runtime_checkable
class FlowEstimator(Protocol):
    """Measures optical flow between frames."""

    def __call__(self, first: Float[Tensor, "*batch 3 H W"], second: Float[Tensor, "*batch 3 H W"]) -> Flow:
        """Flow from `first` to `second`, both RGB in [0, 1].

        An item with a non-finite pixel gets zero flow and zero weight; other items of the batch are not affected.
        """
        ...


def resize_flow(flow: Float[Tensor, "*batch 2 h w"], height: int, width: int) -> Float[Tensor, "*batch 2 H W"]:
    """Flow of the same motion on a `height` x `width` grid: resampled, and each channel scaled with its axis [px].

    Args:
        flow: (*batch, 2, h, w) [px of its grid].
        height, width: the new grid.
    """
    scale = flow.new_tensor([width / flow.shape[-1], height / flow.shape[-2]])
    return resize_images(flow, height, width) * scale[:, None, None]


def resize_images(images: Float[Tensor, "*batch c h w"], height: int, width: int) -> Float[Tensor, "*batch c H W"]:
    """Images resampled bilinearly (pixel edges aligned), with antialiasing where an axis shrinks."""
    flat = images.reshape(-1, *images.shape[-3:])
    smaller = height < images.shape[-2] or width < images.shape[-1]
    out = torch.nn.functional.interpolate(
        flat, size=(height, width), mode="bilinear", align_corners=False, antialias=smaller
    )
    return out.reshape(*images.shape[:-2], height, width)


def warp(
    image: Float[Tensor, "b c H W"], flow: Float[Tensor, "b 2 h w"], corner: tuple[int, int] = (0, 0)
) -> Float[Tensor, "b c h w"]:
    """Backward warping: `image` at `x + flow(x)`, bilinear, clamped at the border.

    Args:
        image: the second of two images, for instance.
        flow: on the grid of the first one or a crop of it [px of that grid].
        corner: first row and column of the crop.
    """
    h, w = image.shape[-2:]
    v = torch.arange(flow.shape[-2], dtype=flow.dtype, device=flow.device)[:, None] + corner[0]
    u = torch.arange(flow.shape[-1], dtype=flow.dtype, device=flow.device) + corner[1]
    grid = torch.stack([(2 * (u + flow[:, 0]) + 1) / w - 1, (2 * (v + flow[:, 1]) + 1) / h - 1], -1)
    return torch.nn.functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


# The floor of the standard deviation of the flow: constant [px] and share of the length of the flow.
_SIGMA, _SIGMA_SHARE = 0.1, 0.05


def forward_backward_weight(
    forward: Float[Tensor, "*batch 2 H W"], backward: Float[Tensor, "*batch 2 H W"]
) -> Float[Tensor, "*batch H W"]:
    """Confidence from forward-backward consistency: `1 / (1 + |f(x) + b(x + f(x))|^2 / s^2)`, `s = 0.1 px + 0.05 |f|`.

    It is 0 where x + f(x) leaves the frame. The forward-backward error estimates the error of the flow, so this is an
    inverse-variance weight with a floor s. It is relative: on noisy video the weights of all pixels are small, and only
    their ratios matter.

    Args:
        forward, backward: flow first -> second and second -> first [px].
    """
    height, width = forward.shape[-2:]
    f, b = forward.reshape(-1, 2, height, width), backward.reshape(-1, 2, height, width)
    error = (f + warp(b, f)).square().sum(1)
    floor = _SIGMA + _SIGMA_SHARE * f.square().sum(1).clamp(min=1e-12).sqrt()
    u = torch.arange(width, dtype=f.dtype, device=f.device) + f[:, 0]
    v = torch.arange(height, dtype=f.dtype, device=f.device)[:, None] + f[:, 1]
    inside = (u >= 0) & (u <= width - 1) & (v >= 0) & (v <= height - 1)
    weight = inside / (1 + error / floor.square())
    return weight.reshape(*forward.shape[:-3], height, width)


def finite_items(*frames: Float[Tensor, "*batch 3 H W"]) -> Tensor:
    """(*batch) bool: items whose frames are all finite."""
    checks = [frame.isfinite().flatten(-3).all(-1) for frame in frames]
    return torch.stack(checks).all(0)


def check_pair(first: Tensor, second: Tensor) -> None:
    """Raise InputError unless these are two frames of one size."""
    if first.shape != second.shape or first.ndim < 3 or first.shape[-3] != 3:
        raise InputError(
            f"two frames of one shape (*batch, 3, H, W) are needed, got {tuple(first.shape)} and {tuple(second.shape)}"
        )


def bidirectional_flow(
    estimator: FlowEstimator, first: Float[Tensor, "*batch 3 H W"], second: Float[Tensor, "*batch 3 H W"]
) -> tuple[Flow, Flow]:
    """Flow from `first` to `second` and back, by the estimator's own `bidirectional` method if it has one."""
    method = getattr(estimator, "bidirectional", None)
    if method is not None:
        flows: tuple[Flow, Flow] = method(first, second)
        return flows
    return estimator(first, second), estimator(second, first)


@runtime_checkable
class FrameIndexedFlow(Protocol):
    """A source that holds the flow of a whole video and is queried by frame numbers."""

    def between(
        self,
        first: Float[Tensor, "*batch 3 H W"],
        second: Float[Tensor, "*batch 3 H W"],
        start: int,
        stop: int,
    ) -> Flow:
        """Flow from frame number `start` to frame number `stop`; the frames define size, dtype and device."""
        ...


def mask_invalid(
    flow: Float[Tensor, "*batch 2 H W"],
    weight: Float[Tensor, "*batch H W"],
    valid: Bool[Tensor, "*batch"] | None = None,
) -> Flow:
    """Flow with weights in [0, 1]; both are 0 where either is not finite and in the items that are not `valid`."""
    good = flow.isfinite().all(-3) & weight.isfinite()
    if valid is not None:
        good = good & valid[..., None, None].to(good.device)
    weight = torch.where(good, weight, torch.zeros_like(weight)).clamp(0.0, 1.0)
    return Flow(torch.where(good[..., None, :, :], flow, torch.zeros_like(flow)), weight)
