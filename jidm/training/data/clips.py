"""Clips: successive frames of an episode, as they are decoded, with the flow estimated between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.fields.free.config import FLOW_STRIDE
from jidm.flow.base import Flow
from jidm.training.data.pairs import PairSource

_MIN_FRAMES = 8  # of a clip; fewer say little about how long errors last


@dataclass(frozen=True, eq=False)
class Clip:
    """T successive frames of one episode.

    Attributes:
        frames: (T, 3, H, W) RGB in [0, 1], of the model's `input_size`.
        q: (T, n) joint positions [rad or m].
        dt: time between two frames [s].
        flows: estimated between them, forward and backward, T - 1 each on the grid of flow [cells]; empty where the
            recording has none.
    """

    frames: Float[Tensor, "T 3 H W"]
    q: Float[Tensor, "T n"]
    dt: float
    flows: tuple[Flow, ...] = ()

    def to(self, device: str | torch.device) -> Clip:
        """The same clip on another device."""
        return Clip(self.frames.to(device), self.q.to(device), self.dt, tuple(x.to(device) for x in self.flows))


def iter_clips(source: PairSource, stride: int, total: int) -> Iterator[Clip]:
    """The beginnings of all episodes, every `stride`-th frame, together about `total` frames."""
    store = source.store
    longest = max(_MIN_FRAMES, total // len(store.length))
    for start, length in zip(store.first.tolist(), store.length.tolist()):
        rows = start + stride * torch.arange(min(longest, -(-length // stride)))
        if len(rows) < 2:
            continue
        flows: tuple[Flow, ...] = ()
        if source.estimated_flow is not None:
            estimated = source.estimated_flow.for_pairs(rows[:-1], torch.full((len(rows) - 1,), stride))
            flows = tuple(Flow(x.flow / FLOW_STRIDE, x.weight).to(source.device) for x in estimated)
        frames, q = source.frames_at(rows)
        yield Clip(frames, q, stride / store.fps, flows)
