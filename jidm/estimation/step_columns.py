"""Tracked steps as one tensor per quantity."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from jidm.estimation.tracker import TrackedStep

_CHUNK = 256  # steps
_COLUMNS: dict[str, Callable[[TrackedStep], Tensor]] = {
    "delta_q": lambda step: step.delta_q,
    "position": lambda step: step.position,
    "position_variance": lambda step: step.position_covariance.diagonal(),
    "covariance": lambda step: step.covariance,
    "residual": lambda step: step.residual,
    "explained_fraction": lambda step: step.explained_fraction,
    "agreement": lambda step: step.residual.new_tensor(step.agreement.score),
    "observable": lambda step: step.observable,
    "valid": lambda step: torch.tensor(step.valid),
}


class StepColumns:
    """The steps of a video, stacked in chunks.

    A small tensor that is kept between the large, short-lived ones of a frame keeps a page of memory from being used again:
    40 KB per step of three joints. Stacked, a step takes what its numbers take.

    Attributes:
        last: the last step; None before the first.
    """

    def __init__(self, steps: Iterable[TrackedStep] = ()) -> None:
        self.last: TrackedStep | None = None
        self._pending: list[TrackedStep] = []
        self._chunks: dict[str, list[Tensor]] = {name: [] for name in _COLUMNS}
        for step in steps:
            self.append(step)

    def append(self, step: TrackedStep) -> None:
        """Add a step."""
        self.last = step
        self._pending.append(step)
        if len(self._pending) == _CHUNK:
            self._stack()

    def columns(self) -> dict[str, Tensor]:
        """Fields of `TrackedStep` over all steps, (S, ...) each: the variance of the position in place of its covariance, the
        score in place of the agreement."""
        if self._pending:
            self._stack()
        return {name: torch.cat(chunks) for name, chunks in self._chunks.items()}

    def _stack(self) -> None:
        for name, value in _COLUMNS.items():
            self._chunks[name].append(torch.stack([value(step) for step in self._pending]))
        self._pending = []
