"""Episodes as they are decoded: frame after frame, with what was measured between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.flow.base import Flow
from jidm.training.data.batch import GRID_STRIDE
from jidm.training.data.pairs import PairSource

_MIN_FRAMES = 8  # frames of a film: fewer say little of how errors last


@dataclass(frozen=True, eq=False)
class Clip:
    """T successive frames of one episode.

    Attributes:
        frames: (T, 3, detail H, detail W) RGB in [0, 1].
        q: (T, n) joint positions [rad or m].
        dt: time between two frames [s].
        flows: measured between them, there and back, T - 1 each on the grid of flow [cells]; empty where nobody measured.
    """

    frames: Float[Tensor, "T 3 H W"]
    q: Float[Tensor, "T n"]
    dt: float
    flows: tuple[Flow, ...] = ()

    def to(self, device: str | torch.device) -> Clip:
        """The same film on another device."""
        return Clip(self.frames.to(device), self.q.to(device), self.dt, tuple(x.to(device) for x in self.flows))


def iter_clips(source: PairSource, stride: int, total: int) -> Iterator[Clip]:
    """The beginnings of all episodes, every `stride`-th frame, together about `total` frames."""
    store = source.store
    longest = max(_MIN_FRAMES, total // len(store.length))
    for start, length in zip(store.first.tolist(), store.length.tolist()):
        rows = start + stride * torch.arange(min(longest, -(-length // stride)))
        if len(rows) > 1:
            yield _make_clip(source, rows, stride)


def _make_clip(source: PairSource, rows: Tensor, stride: int) -> Clip:
    flows: tuple[Flow, ...] = ()
    if source.estimated_flow is not None:
        found = source.estimated_flow.for_pairs(rows[:-1], torch.full((len(rows) - 1,), stride))
        flows = tuple(
            Flow(found["flow" + tail] / GRID_STRIDE, found["weight" + tail]).to(source.device) for tail in ("", "_back")
        )
    frames, q = source.frames_at(rows)
    return Clip(frames, q, stride / source.store.fps, flows)
