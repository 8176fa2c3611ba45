"""The batches of a training run: sampled, assembled and augmented, for any step and any process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from jidm.training.data.augment import Augment
from jidm.training.data.batch import PairBatch
from jidm.training.data.clips import Clip, iter_clips
from jidm.training.data.pairs import PairSampler, PairSource

_CLIP_FRAMES = 600  # of all clips together


class Batches:
    """The batches of every training step, and fixed ones for validation.

    Args:
        source: assembles the tensors of the pairs.
        strides, seed: of the pairs, see `PairSampler`.
        augment: changes their images; None = not.
        batch_size: pairs per step, over all processes together.
    """

    def __init__(
        self, source: PairSource, strides: Sequence[int], seed: int, augment: Augment | None, batch_size: int
    ) -> None:
        self.source, self.augment, self.batch_size = source, augment, batch_size
        self.sampler = PairSampler(source.store, strides, seed=seed)
        self.min_stride_sampler = PairSampler(source.store, (min(strides),), seed=seed)

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """The pairs of training step `step` that process `rank` of `world` learns from."""
        pairs = self.sampler.sample(step, self.batch_size)
        if self.augment is not None and (fraction := self.augment.options.background):
            pairs = replace(pairs, background=self.sampler.sample_backgrounds(step, self.batch_size, fraction))
        batch = self.source.batch(pairs.shard(rank, world))
        random = np.random.default_rng((self.sampler.seed, step, 3)).random((self.batch_size, 2, batch.q.shape[1] + 2))
        batch = replace(batch, random=torch.from_numpy(random[rank::world]).to(batch.q))
        if self.augment is not None:
            batch = self.augment.apply(batch, self.augment.sample(step, self.batch_size).shard(rank, world))
        return batch

    def validation_batches(self, count: int) -> list[PairBatch]:
        """`count` pairs, the same every time and not augmented, in batches of at most `batch_size`."""
        return self._fixed_batches(self.sampler, count)

    def calibration_batches(self, count: int) -> list[PairBatch]:
        """The same with the smallest stride: errors grow with the step, and uncertainties are for steps of videos."""
        return self._fixed_batches(self.min_stride_sampler, count)

    def clips(self) -> Iterator[Clip]:
        """The beginnings of all episodes, as they are decoded."""
        return iter_clips(self.source, self.min_stride_sampler.min_stride, _CLIP_FRAMES)

    def _fixed_batches(self, sampler: PairSampler, count: int) -> list[PairBatch]:
        pairs = sampler.fixed_sample(count)
        world = -(-count // self.batch_size)
        return [self.source.batch(pairs.shard(rank, world)) for rank in range(world)]
