"""A model too small to be of use, with everything training asks of one; and pictures it can learn from in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from recorded import FakeDataset, FakeEpisode
from torch import Tensor, nn

from jidm.training.data.batch import JointStats, PairBatch

KIND = {"stand_in": ("standin", "StandIn")}


@dataclass(frozen=True)
class StandInConfig:
    joint_names: tuple[str, ...]
    joint_types: tuple[str, ...]
    height: int
    width: int
    delta_std: tuple[float, ...]
    size: str = "tiny"
    nan_from: int = -1
    nan_until: int = -1
    dropout: float = 0.0


class StandIn(nn.Module):
    """Steps from the difference of the means of position-weighted brightness: linear in what `blob_dataset` shows."""

    kind: ClassVar[str] = "stand_in"
    extra_frames: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: StandInConfig) -> None:
        super().__init__()
        self.config = config
        n = len(config.joint_names)
        self.first = nn.Linear(3 * config.height * config.width, 8)
        self.last = nn.Linear(8, n)
        self.register_buffer("delta_std", torch.tensor(config.delta_std))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    @classmethod
    def from_data(cls, names: Any, types: Any, height: int, width: int, stats: JointStats, **options: Any) -> StandIn:
        return cls(StandInConfig(tuple(names), tuple(types), height, width, stats.delta_std, **options))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StandIn:
        return cls(StandInConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}))

    def predict_steps(self, first: Tensor, second: Tensor, before: Tensor | None = None) -> Tensor:
        difference = self.first((second - first).flatten(1))
        difference = nn.functional.dropout(difference, self.config.dropout, self.training)
        return self.last(torch.tanh(difference)) * self.delta_std

    def losses(self, batch: PairBatch) -> dict[str, Tensor]:
        error = (self.predict_steps(batch.first, batch.second) - batch.delta_q) / self.delta_std
        loss = error.square().mean()
        if self.training:
            if self.config.nan_from <= int(self.calls) < self.config.nan_until:
                loss = loss * float("nan")
            self.calls += 1
        return {"loss": loss, "error": error.abs().mean()}


def blob_dataset(root: Path, episodes: int = 6, length: int = 12, size: int = 16) -> FakeDataset:
    """A bright spot whose place is the two joints' positions."""
    v, u = np.mgrid[:size, :size] / (size - 1) * 2 - 1
    found = []
    for index in range(episodes):
        random = np.random.default_rng(index)
        t = np.linspace(0, 1, length)[:, None]
        q = 0.6 * np.sin(2 * np.pi * (t * random.uniform(0.5, 1.5, 2) + random.uniform(0, 1, 2)))
        spot = np.exp(-((u - q[:, 0, None, None]) ** 2 + (v - q[:, 1, None, None]) ** 2) / 0.1)
        pictures = np.repeat((spot * 255).astype(np.uint8)[..., None], 3, axis=-1)
        found.append(FakeEpisode(index, pictures, q))
    return FakeDataset(root, found, ("across", "down"))
