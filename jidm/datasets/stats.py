"""LeRobot's statistics per feature: minimum, maximum, mean, standard deviation and count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FeatureStats = dict[str, Any]
"""min, max, mean, std (lists shaped like one value; images as (3, 1, 1) in [0, 1]) and count ([frames])."""

_MAX_IMAGES = 100  # per episode, as in LeRobot


def value_stats(values: NDArray[Any]) -> FeatureStats:
    """Statistics of a column (T,) or (T, k) over the frames whose values are all finite; empty if there are none."""
    x = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    x = x[np.isfinite(x).all(1)]
    if not len(x):
        return {}
    stats = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    return {key: value.tolist() for key, value in stats.items()} | {"count": [len(x)]}


def image_stats(frames: NDArray[np.uint8]) -> FeatureStats:
    """Statistics of images (T, H, W, 3), from at most a hundred evenly spaced frames."""
    chosen = sampled_frames(len(frames))
    # From histograms: the result is the same, without a float64 copy of the pixels, eight times their size.
    counts = np.zeros((3, 256), dtype=np.int64)
    for frame in frames[chosen]:
        for channel in range(3):
            counts[channel] += np.bincount(frame[..., channel].reshape(-1), minlength=256)
    levels, probability = np.arange(256) / 255.0, counts / counts.sum(1, keepdims=True)
    mean = probability @ levels
    stats = {
        "min": levels[(counts > 0).argmax(1)],
        "max": levels[255 - (counts > 0)[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt((probability * (levels - mean[:, None]) ** 2).sum(1)),
    }
    return {key: value.reshape(3, 1, 1).tolist() for key, value in stats.items()} | {"count": [len(chosen)]}


def sampled_frames(count: int) -> list[int]:
    """Numbers of the frames of an episode whose images count."""
    return evenly_spaced(count, _MAX_IMAGES)


def evenly_spaced(count: int, max_count: int) -> list[int]:
    """Up to `max_count` different indices below `count`, evenly spaced, ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, max_count)).round().astype(int)).tolist()


def aggregate_stats(parts: Sequence[Mapping[str, FeatureStats]]) -> dict[str, FeatureStats]:
    """Statistics of all frames from those of the episodes; an episode may lack some."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: _aggregate_feature([part[key] for part in parts if key in part]) for key in keys}


def _aggregate_feature(parts: Sequence[FeatureStats]) -> FeatureStats:
    count = np.array([part["count"][0] for part in parts], dtype=np.float64)
    means, deviations = (np.array([part[name] for part in parts]) for name in ("mean", "std"))
    weight = (count / count.sum()).reshape(-1, *[1] * (means.ndim - 1))
    mean = (weight * means).sum(0)
    variance = (weight * (deviations**2 + (means - mean) ** 2)).sum(0)
    return {
        "min": np.min([part["min"] for part in parts], axis=0).tolist(),
        "max": np.max([part["max"] for part in parts], axis=0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(count.sum())],
    }
