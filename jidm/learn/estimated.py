"""Flow measured in the pictures themselves, for recordings that know nothing else: computed once, kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from jidm.errors import InputError
from jidm.learn.batch import GRID_STRIDE
from jidm.learn.recording import Recording, default_cache, whole_folder
from jidm.motion.fit import Fit
from jidm.motion.flow.base import Flow, FlowEstimator

_CHUNK = 8  # pairs an estimator is given at once


@dataclass(frozen=True, eq=False)
class EstimatedFlow:
    """Flow of all pairs (t, t + k) within the episodes of a recording, for K strides, both ways.

    Attributes:
        strides: the K strides k [frames].
        flow: (N, K, 2, 2, h, w) float16, px of the training picture; axis 2: from t to t + k on t's grid, and back on
            the grid of t + k.
        weight: (N, K, 2, h, w) uint8, confidence times 255; 0 where t + k is beyond the episode.
    """

    strides: tuple[int, ...]
    flow: Float[Tensor, "N K 2 2 h w"]
    weight: UInt8[Tensor, "N K 2 h w"]

    def between(self, rows: Int[Tensor, " B"], stride: Int[Tensor, " B"]) -> dict[str, Float[Tensor, "B ..."]]:
        """`flow`, `weight`, `flow_back`, `weight_back` of a `PairBatch` for the pairs (row, row + stride)."""
        column = torch.tensor([self.strides.index(k) for k in stride.tolist()])
        flow, weight = self.flow[rows, column].float(), self.weight[rows, column].float() / 255
        return {"flow": flow[:, 0], "weight": weight[:, 0], "flow_back": flow[:, 1], "weight_back": weight[:, 1]}


def estimate_flow(
    dataset: Any, recording: Recording, camera: str, strides: Sequence[int], estimator: FlowEstimator, *,
    cache: str | Path | None = None, progress: Callable[[str], None] = lambda line: None,
) -> EstimatedFlow:  # fmt: skip
    """Measure every pair's flow in the recorded pictures, at their own resolution, or take it from the cache.

    Args:
        dataset: the data set the recording was read from.
        estimator: its printed form names it in the cache, so it must tell all its settings, as dataclasses do.
    """
    name = f"{recording.key}-{sorted(set(strides))}-{estimator!r}"
    if " at 0x" in name:
        raise InputError(f"flow estimator {estimator!r} does not tell its settings; give it a __repr__ that does")
    folder = Path(cache or default_cache()) / f"{recording.key}-flow-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    chosen = tuple(sorted(set(strides)))
    if not folder.is_dir():
        with whole_folder(folder) as temporary:
            _measure_all(dataset, recording, camera, chosen, estimator, temporary, progress)
    tables = (torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in ("flow", "weight"))
    return EstimatedFlow(chosen, *tables)


def _measure_all(
    dataset: Any,
    recording: Recording,
    camera: str,
    strides: Sequence[int],
    estimator: FlowEstimator,
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    h, w = (side // GRID_STRIDE for side in recording.size)
    count, K = len(recording), len(strides)
    create = np.lib.format.open_memmap
    flow = create(folder / "flow.npy", mode="w+", dtype=np.float16, shape=(count, K, 2, 2, h, w))
    weight = create(folder / "weight.npy", mode="w+", dtype=np.uint8, shape=(count, K, 2, h, w))
    episodes = recording.episode.tolist()
    # OpenCV computes outside Python's lock, so threads are enough to use what cores torch may use.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done, (index, row) in enumerate(zip(episodes, recording.first.tolist())):
            video = torch.from_numpy(dataset.episode(index).video(camera)).permute(0, 3, 1, 2)
            parts = [
                (column, k, t, min(t + _CHUNK, len(video) - k))
                for column, k in enumerate(strides)
                for t in range(0, len(video) - k, _CHUNK)
            ]

            def measure(part: tuple[int, int, int, int], video: Tensor = video, row: int = row) -> None:
                column, k, t, stop = part
                one, two = video[t:stop].float() / 255, video[t + k : stop + k].float() / 255
                for way, found in enumerate(_both_ways(estimator, one, two)):
                    small = fitted_flow(found, recording.fit)
                    flow[row + t : row + stop, column, way] = small.flow.half().numpy()
                    weight[row + t : row + stop, column, way] = (small.weight * 255).round().to(torch.uint8).numpy()

            list(pool.map(measure, parts))
            if (done + 1) % max(1, len(episodes) // 10) == 0:
                progress(f"measured the flow of {done + 1} of {len(episodes)} episodes")
    flow.flush()
    weight.flush()


def _both_ways(estimator: FlowEstimator, first: Tensor, second: Tensor) -> tuple[Flow, Flow]:
    together = getattr(estimator, "both_ways", None)
    if together is not None:
        found: tuple[Flow, Flow] = together(first, second)
        return found
    return estimator(first, second), estimator(second, first)


def fitted_flow(flow: Flow, fit: Fit) -> Flow:
    """Flow of the recorded picture as that of the training picture [px], on its grid; weight 0 in the black bands."""
    padded = fit.flow(flow)
    bands = (fit.left, fit.width - fit.left - fit.inner_width, fit.top, fit.height - fit.top - fit.inner_height)
    small = padded.resized(fit.height // GRID_STRIDE, fit.width // GRID_STRIDE)
    # Cells that are not wholly inside know less than they say: averaging reaches into them from their neighbours.
    inside = torch.nn.functional.pad(torch.ones(1, fit.inner_height, fit.inner_width), bands)
    whole = torch.nn.functional.avg_pool2d(inside, GRID_STRIDE)[0] == 1
    return Flow(small.flow * GRID_STRIDE * whole, small.weight * whole)
