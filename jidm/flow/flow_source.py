"""Flow between the frames of one video: given by the user, measured by an estimator, or neither."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError
from jidm.flow.base import Flow, FlowEstimator, FrameIndexedFlow, bidirectional_flow, mask_invalid
from jidm.flow.precomputed import PrecomputedFlow


@dataclass(frozen=True, eq=False)
class FlowSource:
    """Where the motion between two frames of a video comes from.

    Attributes:
        estimator: asked where no flow is given, and across frames that were left out.
        precomputed: (T-1, 2, H, W) [px] of neighbouring frames.
        bidirectional: whether whoever asks has use for the flow back as well, where it can be measured.
        resolution: measured on pictures reduced to this longer side [px]; as they are if None.
    """

    estimator: FlowEstimator | None
    precomputed: Flow | Float[Tensor, "S 2 H W"] | None
    bidirectional: bool = False
    resolution: int | None = None

    def between(
        self, first: Float[Tensor, "3 H W"], second: Float[Tensor, "3 H W"], start: int, stop: int
    ) -> tuple[Flow, ...]:
        """Flow from frame number `start` to number `stop`, perhaps also back; empty where there is none.

        Raises:
            InputError: the flow given is not this video's.
        """
        if self.precomputed is not None and stop == start + 1:
            return (self._precomputed_step(start, first),)
        if self.estimator is None:
            return ()
        if isinstance(self.estimator, PrecomputedFlow) and stop > start + 1:
            return (Flow(torch.zeros_like(first[:2]), torch.zeros_like(first[0])),)  # it says nothing across a gap
        if isinstance(self.estimator, FrameIndexedFlow):
            return (self.estimator.between(first, second, start, stop),)
        if self.bidirectional:
            return bidirectional_flow(self.estimator, first, second)
        height, width = first.shape[-2:]
        scale = 1.0 if self.resolution is None else self.resolution / max(height, width)
        if scale >= 1:
            return (self.estimator(first, second),)
        small = [_downsampled(frame, round(height * scale), round(width * scale)) for frame in (first, second)]
        return (self.estimator(small[0], small[1]).resized(height, width),)

    def _precomputed_step(self, start: int, frame: Tensor) -> Flow:
        assert self.precomputed is not None
        vectors = self.precomputed.flow if isinstance(self.precomputed, Flow) else self.precomputed
        height, width = frame.shape[-2:]
        if vectors.dim() != 4 or start >= len(vectors) or vectors.shape[1:] != (2, height, width):
            raise InputError(
                f"flow must be (T-1, 2, {height}, {width}) for this video, got {tuple(vectors.shape)} at step {start}"
            )
        if isinstance(self.precomputed, Flow):
            return self.precomputed[start]
        return mask_invalid(self.precomputed[start], torch.ones_like(self.precomputed[start, 0]))


def split_flow(
    flow: Flow | Float[Tensor, "*batch S 2 H W"] | None, shape: torch.Size
) -> Iterable[Flow | Float[Tensor, "S 2 H W"] | None]:
    """Flow of a batch of videos of that shape (*batch, T, 3, H, W), video by video.

    Raises:
        InputError: it does not fit the videos.
    """
    batch = shape[:-4]
    count = math.prod(batch)
    if flow is None:
        return [None] * count
    vectors = flow.flow if isinstance(flow, Flow) else flow
    expected = (*batch, shape[-4] - 1, 2, *shape[-2:])
    if tuple(vectors.shape) != tuple(expected):
        raise InputError(f"flow must be {tuple(expected)} for this video, got {tuple(vectors.shape)}")
    if isinstance(flow, Flow):
        weight = flow.weight.reshape(count, *flow.weight.shape[len(batch) :])
        return [Flow(f, w) for f, w in zip(vectors.reshape(count, *expected[len(batch) :]), weight, strict=True)]
    return list(vectors.reshape(count, *expected[len(batch) :]))


def _downsampled(frame: Float[Tensor, "3 H W"], height: int, width: int) -> Float[Tensor, "3 h w"]:
    return torch.nn.functional.interpolate(
        frame[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]
