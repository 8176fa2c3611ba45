"""Point tracks as sparse flow: known at the points, weight 0 elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError
from jidm.flow.base import Flow, check_pair, finite_items, mask_invalid

PointTracker = Callable[[Tensor], tuple[Any, Any]]
"""`video (*batch, T, 3, H, W) in [0, 1] -> tracks (*batch, T, N, 2) [px], visibility (*batch, T, N)`."""


@dataclass(frozen=True, eq=False)
class SparseFlow:
    """Flow at points.

    Attributes:
        points: (*batch, N, 2) position (u, v) in the first frame [px].
        displacement: (*batch, N, 2) motion to the second frame [px], finite everywhere.
        weight: (*batch, N) confidence in [0, 1].
    """

    points: Float[Tensor, "*batch N 2"]
    displacement: Float[Tensor, "*batch N 2"]
    weight: Float[Tensor, "*batch N"]

    def rasterize(self, height: int, width: int) -> Flow:
        """Dense flow: each point at its nearest pixel, weight 0 elsewhere; points in one pixel are averaged by weight.

        The weight of a pixel is the largest of its points. Points outside the frame are dropped.
        """
        batch, n = self.weight.shape[:-1], self.weight.shape[-1]
        uv = self.points.reshape(-1, n, 2).round()
        inside = (uv >= 0).all(-1) & (uv[..., 0] <= width - 1) & (uv[..., 1] <= height - 1)
        w = self.weight.reshape(-1, n) * inside
        pixel = torch.where(inside, uv[..., 1] * width + uv[..., 0], torch.zeros_like(w)).long()
        mass = w.new_zeros(len(w), height * width).scatter_add_(1, pixel, w)
        moved = w[..., None] * self.displacement.reshape(-1, n, 2)
        total = w.new_zeros(len(w), height * width, 2).scatter_add_(1, pixel[..., None].expand(-1, -1, 2), moved)
        # Empty pixels are divided by one: zero over zero would make gradients NaN.
        mean = total / torch.where(mass > 0, mass, torch.ones_like(mass))[..., None]
        weight = w.new_zeros(len(w), height * width).scatter_reduce_(1, pixel, w, reduce="amax")
        flow = mean.transpose(1, 2).reshape(*batch, 2, height, width)
        return Flow(flow, weight.reshape(*batch, height, width))


class PointTrackFlow:
    """Flow from point tracks, in the shapes of CoTracker.

    Args:
        tracks: (*batch, T, N, 2) positions (u, v) of N points in each frame [px], or a `PointTracker`, which is then
            run on every pair of frames.
        visibility: (*batch, T, N) bool or [0, 1], a trailing axis of 1 allowed; 1 everywhere if not given.

    Raises:
        InputError: shapes disagree.
    """

    def __init__(
        self, tracks: Tensor | np.ndarray | PointTracker, visibility: Tensor | np.ndarray | None = None
    ) -> None:
        self.tracker: PointTracker | None = None
        if isinstance(tracks, (Tensor, np.ndarray)):
            self.tracks, self.visibility = _validated(tracks, visibility)
        elif callable(tracks):
            self.tracker = tracks
        else:
            raise InputError(f"tracks must be an array (*batch, T, N, 2) or a function, got {type(tracks).__name__}")

    @classmethod
    def from_video(cls, tracker: PointTracker, video: Float[Tensor, "*batch T 3 H W"]) -> PointTrackFlow:
        """Flow of a tracker that is run once over a whole video, so that any two frames can be compared."""
        return cls(*tracker(video))

    def sparse(self, start: int, stop: int) -> SparseFlow:
        """Motion of all points from frame `start` to frame `stop`; a point hidden in either has weight 0."""
        if self.tracker is not None:
            raise InputError(
                "a tracker that runs on pairs has no frame numbers: use PointTrackFlow.from_video(tracker, video)"
            )
        length = self.tracks.shape[-3]
        if not (0 <= start < length and 0 <= stop < length):
            raise InputError(f"frames {start} and {stop} are not among the {length} tracked frames")
        return _sparse(self.tracks, self.visibility, start, stop)

    def between(
        self,
        first: Float[Tensor, "*batch 3 H W"],
        second: Float[Tensor, "*batch 3 H W"],
        start: int,
        stop: int,
    ) -> Flow:
        """Rasterized flow from frame number `start` to `stop`; see `FrameIndexedFlow`."""
        if self.tracker is not None:
            return self(first, second)
        return _rasterize_like(self.sparse(start, stop), first, second)

    def __call__(self, first: Float[Tensor, "*batch 3 H W"], second: Float[Tensor, "*batch 3 H W"]) -> Flow:
        """Rasterized flow. With tracks, `first` and `second` are all T - 1 consecutive pairs (*batch, T-1, 3, H, W)."""
        check_pair(first, second)
        if self.tracker is not None:
            finite = finite_items(first, second)[..., None, None, None]
            pair = torch.stack([first, second], dim=-4)
            tracks, visibility = _validated(*self.tracker(torch.where(finite[..., None], pair, torch.zeros_like(pair))))
            return _rasterize_like(_sparse(tracks, visibility, 0, 1), first, second)
        length = self.tracks.shape[-3]
        if tuple(first.shape[:-3]) != (*self.tracks.shape[:-3], length - 1):
            if length == 2 and first.shape[:-3] == self.tracks.shape[:-3]:
                return self.between(first, second, 0, 1)
            raise InputError(
                f"tracks of {length} frames need all {length - 1} pairs at once, got batch {tuple(first.shape[:-3])}; "
                "use .between(first, second, start, stop) or .sparse(start, stop) for one pair"
            )
        steps = _sparse(self.tracks, self.visibility, slice(0, -1), slice(1, None))
        return _rasterize_like(steps, first, second)


def _sparse(tracks: Tensor, visibility: Tensor, start: int | slice, stop: int | slice) -> SparseFlow:
    """Motion from frame(s) `start` to frame(s) `stop`; slices keep their axis as a batch axis."""
    here, there = tracks[..., start, :, :], tracks[..., stop, :, :]
    good = (here.isfinite() & there.isfinite()).all(-1)
    weight = visibility[..., start, :] * visibility[..., stop, :]
    zero = torch.zeros_like(here)
    return SparseFlow(
        torch.where(good[..., None], here, zero),
        torch.where(good[..., None], there - here, zero),
        torch.where(good, weight, torch.zeros_like(weight)),
    )


def _rasterize_like(sparse: SparseFlow, first: Tensor, second: Tensor) -> Flow:
    """Flow on the frames' grid, device and dtype; frames with a non-finite pixel get weight 0."""
    if sparse.weight.shape[:-1] != first.shape[:-3]:
        raise InputError(
            f"tracks of batch {tuple(sparse.weight.shape[:-1])} for frames of batch {tuple(first.shape[:-3])}"
        )
    flow = sparse.rasterize(*first.shape[-2:]).to(first)
    return mask_invalid(flow.flow, flow.weight, finite_items(first, second))


def _validated(tracks: Any, visibility: Any) -> tuple[Tensor, Tensor]:
    """Floating-point tracks (*batch, T, N, 2) and visibility (*batch, T, N) in [0, 1]."""
    xy = torch.as_tensor(tracks)
    if xy.ndim < 3 or xy.shape[-1] != 2:
        raise InputError(f"tracks must be (*batch, T, N, 2), got {tuple(xy.shape)}")
    if not xy.is_floating_point():
        xy = xy.to(torch.float32)
    visible = torch.ones_like(xy[..., 0]) if visibility is None else torch.as_tensor(visibility)
    if visible.shape == (*xy.shape[:-1], 1):
        visible = visible[..., 0]
    if visible.shape != xy.shape[:-1]:
        raise InputError(f"visibility must be {tuple(xy.shape[:-1])} to match the tracks, got {tuple(visible.shape)}")
    return xy, visible.to(xy).nan_to_num(0.0).clamp(0.0, 1.0)
