"""Flow between the frames of one video: precomputed, measured by an estimator, or none."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError
from jidm.flow.base import Flow, FlowEstimator, FrameIndexedFlow, bidirectional_flow, mask_invalid, resize_images
from jidm.flow.precomputed import PrecomputedFlow


@dataclass(frozen=True, eq=False)
class FlowSource:
    """Provides the flow between two frames of a video.

    Attributes:
        estimator: used where no flow is precomputed, and across frames that were left out.
        precomputed: (T-1, 2, H, W) [px] between consecutive frames.
        bidirectional: whether the flow back is returned as well, where it can be measured.
        resolution: longer side [px] to which frames are reduced for the estimator; None for the full resolution.
    """

    estimator: FlowEstimator | None
    precomputed: Flow | Float[Tensor, "S 2 H W"] | None
    bidirectional: bool = False
    resolution: int | None = None

    def between(
        self, first: Float[Tensor, "3 H W"], second: Float[Tensor, "3 H W"], start: int, stop: int
    ) -> tuple[Flow, ...]:
        """Flow from frame number `start` to `stop`, and back if `bidirectional`; empty if there is no source for it.

        Raises:
            InputError: the precomputed flow does not fit the video.
        """
        if self.precomputed is not None and stop == start + 1:
            return (_precomputed_step(self.precomputed, start, first),)
        if self.estimator is None:
            return ()
        if isinstance(self.estimator, PrecomputedFlow) and stop > start + 1:
            return (Flow(torch.zeros_like(first[:2]), torch.zeros_like(first[0])),)  # it holds no flow across a gap
        if isinstance(self.estimator, FrameIndexedFlow):
            return (self.estimator.between(first, second, start, stop),)
        if self.bidirectional:
            return bidirectional_flow(self.estimator, first, second)
        height, width = first.shape[-2:]
        scale = 1.0 if self.resolution is None else self.resolution / max(height, width)
        if scale >= 1:
            return (self.estimator(first, second),)
        small = [resize_images(frame, round(height * scale), round(width * scale)) for frame in (first, second)]
        return (self.estimator(small[0], small[1]).resized(height, width),)


def _precomputed_step(flow: Flow | Tensor, start: int, frame: Tensor) -> Flow:
    vectors = flow.flow if isinstance(flow, Flow) else flow
    height, width = frame.shape[-2:]
    if vectors.dim() != 4 or start >= len(vectors) or vectors.shape[1:] != (2, height, width):
        raise InputError(
            f"flow must be (T-1, 2, {height}, {width}) for this video, got {tuple(vectors.shape)} at step {start}"
        )
    return flow[start] if isinstance(flow, Flow) else mask_invalid(flow[start], torch.ones_like(flow[start, 0]))


def split_flow(
    flow: Flow | Float[Tensor, "*batch S 2 H W"] | None, shape: torch.Size
) -> Iterable[Flow | Float[Tensor, "S 2 H W"] | None]:
    """Flow of a batch of videos, split into one per video.

    Args:
        flow: flow of all videos [px]; None for none.
        shape: of the videos, (*batch, T, 3, H, W).

    Raises:
        InputError: the flow does not fit the videos.
    """
    batch = shape[:-4]
    count = math.prod(batch)
    if flow is None:
        return [None] * count
    vectors = flow.flow if isinstance(flow, Flow) else flow
    expected = (*batch, shape[-4] - 1, 2, *shape[-2:])
    if tuple(vectors.shape) != tuple(expected):
        raise InputError(f"flow must be {tuple(expected)} for this video, got {tuple(vectors.shape)}")
    vectors = vectors.reshape(count, *expected[len(batch) :])
    if isinstance(flow, Flow):
        weight = flow.weight.reshape(count, *flow.weight.shape[len(batch) :])
        return [Flow(f, w) for f, w in zip(vectors, weight, strict=True)]
    return list(vectors)
