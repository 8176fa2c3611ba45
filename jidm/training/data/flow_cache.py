"""Optical flow estimated from recorded images, for recordings without geometry; computed once and cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from jidm.atomic_io import atomic_write
from jidm.errors import InputError
from jidm.fields.free.config import FLOW_STRIDE
from jidm.flow.base import Flow, FlowEstimator, bidirectional_flow
from jidm.training.data.cache import cached_folder, default_cache
from jidm.training.data.frame_store import FrameStore, digest
from jidm.video.letterbox import Letterbox

_CHUNK_SIZE = 8  # pairs that the estimator gets at once


@dataclass(frozen=True, eq=False)
class EstimatedFlow:
    """Flow of all pairs (t, t + k) within the episodes of a recording, for K strides, in both directions.

    Attributes:
        strides: the K strides k [frames].
        flow: (N, K, 2, 2, h, w) float16, px of the training image; axis 2: from t to t + k on t's grid, and back on
            the grid of t + k.
        weight: (N, K, 2, h, w) uint8, confidence times 255; 0 where t + k lies beyond the episode.
    """

    strides: tuple[int, ...]
    flow: Float[Tensor, "N K 2 2 h w"]
    weight: UInt8[Tensor, "N K 2 h w"]

    def for_pairs(self, rows: Int[Tensor, " B"], stride: Int[Tensor, " B"]) -> tuple[Flow, Flow]:
        """Forward and backward flow of the pairs (row, row + stride)."""
        column = torch.tensor([self.strides.index(k) for k in stride.tolist()])
        flow, weight = self.flow[rows, column].float(), self.weight[rows, column].float() / 255
        return Flow(flow[:, 0], weight[:, 0]), Flow(flow[:, 1], weight[:, 1])


def estimate_flow(
    dataset: Any, store: FrameStore, image_key: str, strides: Sequence[int], estimator: FlowEstimator, *,
    cache: str | Path | None = None, progress: Callable[[str], None] = lambda line: None,
) -> EstimatedFlow:  # fmt: skip
    """Estimate the flow of every pair from the recorded images, at their own resolution, or take it from the cache.

    Each episode is cached when it is finished: an interrupted estimation continues from there, and other selections of
    episodes or strides of the same data set reuse what they share.

    Args:
        dataset: the data set that the store was read from.
        store: the frames.
        image_key: which of the data set's videos.
        strides: the k of the pairs [frames].
        estimator: its `repr` names it in the cache, so it must state all settings, as that of a dataclass does.
        cache: folder; `default_cache()` if not given.
        progress: called with lines that report how far it is.

    Raises:
        InputError: the estimator's `repr` does not state its settings.
    """
    name = repr(estimator)
    if " at 0x" in name:
        raise InputError(f"flow estimator {name} does not state its settings; give it a __repr__ that does")
    root, chosen = Path(cache or default_cache()), tuple(sorted(set(strides)))
    folder = root / f"{store.cache_key}-flow-{digest([chosen, name])}"
    episode_cache = root / f"{Path(dataset.root).name}-flow-{digest([store.source_hash, name])}"

    def gather(new: Path) -> None:
        episode_cache.mkdir(exist_ok=True)
        _gather_episodes(_EpisodeFlow(dataset, store, image_key, estimator, episode_cache), chosen, new, progress)

    cached_folder(folder, gather)
    tables = (torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in ("flow", "weight"))
    return EstimatedFlow(chosen, *tables)


def _gather_episodes(
    episode_flow: _EpisodeFlow, strides: Sequence[int], folder: Path, progress: Callable[[str], None]
) -> None:
    """Write one table of all episodes, one after the other."""
    store = episode_flow.store
    h, w = episode_flow.grid
    create, shape = np.lib.format.open_memmap, (len(store), len(strides), 2)
    flow = create(folder / "flow.npy", mode="w+", dtype=np.float16, shape=(*shape, 2, h, w))
    weight = create(folder / "weight.npy", mode="w+", dtype=np.uint8, shape=(*shape, h, w))
    episodes = store.episode.tolist()
    for done, (index, row) in enumerate(zip(episodes, store.first.tolist())):
        for column, pairs in enumerate(episode_flow.episode(index, strides)):
            stop = row + len(pairs["flow"])
            flow[row:stop, column], weight[row:stop, column] = pairs["flow"], pairs["weight"]
        if (done + 1) % max(1, len(episodes) // 10) == 0:
            progress(f"estimated the flow of {done + 1} of {len(episodes)} episodes")
    flow.flush()
    weight.flush()


@dataclass(frozen=True, eq=False)
class _EpisodeFlow:
    """The flow of single episodes, each kept in a folder once it is computed."""

    dataset: Any
    store: FrameStore
    image_key: str
    estimator: FlowEstimator
    folder: Path

    @property
    def grid(self) -> tuple[int, int]:
        h, w = (side // FLOW_STRIDE for side in self.store.size)
        return h, w

    def episode(self, index: int, strides: Sequence[int]) -> list[dict[str, NDArray[Any]]]:
        """For every stride the `flow` and `weight` of the episode's pairs, as in `EstimatedFlow`."""
        files = [self.folder / f"{index}-{k}.npz" for k in strides]
        if missing := [k for k, file in zip(strides, files, strict=True) if not file.exists()]:
            video = torch.from_numpy(self.dataset.episode(index).video(self.image_key)).permute(0, 3, 1, 2)
            for k in missing:
                flow, weight = self._compute(video, k)
                with atomic_write(self.folder / f"{index}-{k}.npz") as temporary:
                    np.savez(temporary, flow=flow, weight=weight)
        pairs = []
        for file in files:
            with np.load(file) as tables:
                pairs.append({name: tables[name] for name in ("flow", "weight")})
        return pairs

    def _compute(self, video: Tensor, k: int) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        count = max(0, len(video) - k)
        flow = np.zeros((count, 2, 2, *self.grid), dtype=np.float16)
        weight = np.zeros((count, 2, *self.grid), dtype=np.uint8)

        def compute(t: int) -> None:
            stop = min(t + _CHUNK_SIZE, count)
            first, second = video[t:stop].float() / 255, video[t + k : stop + k].float() / 255
            for direction, estimated in enumerate(bidirectional_flow(self.estimator, first, second)):
                on_grid = letterbox_flow(estimated, self.store.letterbox)
                flow[t:stop, direction] = on_grid.flow.half().numpy()
                weight[t:stop, direction] = (on_grid.weight * 255).round().to(torch.uint8).numpy()

        # OpenCV releases Python's lock, so threads suffice to use as many cores as torch may use.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(compute, range(0, count, _CHUNK_SIZE)))
        return flow, weight


def letterbox_flow(flow: Flow, letterbox: Letterbox) -> Flow:
    """Flow of the recorded image as that of the training image [px], on its grid; weight 0 in the black bands."""
    bands = (
        letterbox.left,
        letterbox.width - letterbox.left - letterbox.inner_width,
        letterbox.top,
        letterbox.height - letterbox.top - letterbox.inner_height,
    )
    padded = letterbox.apply_to_flow(flow)
    on_grid = padded.resized(letterbox.height // FLOW_STRIDE, letterbox.width // FLOW_STRIDE)
    # Cells that are not wholly inside get weight 0: resampling mixes the black bands into them.
    inside = torch.nn.functional.pad(torch.ones(1, letterbox.inner_height, letterbox.inner_width), bands)
    whole = torch.nn.functional.avg_pool2d(inside, FLOW_STRIDE)[0] == 1
    return Flow(on_grid.flow * FLOW_STRIDE * whole, on_grid.weight * whole)
