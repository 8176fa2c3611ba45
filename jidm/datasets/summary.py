"""Summary statistics of a data set: size, coverage of joint space, steps, actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jidm.datasets.feature import ACTION, flat_names
from jidm.datasets.reader import RecordedDataset
from jidm.errors import DatasetError

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

NUM_BINS = 20
"""Bins of a joint's range; the fraction of visited bins is its coverage."""

_PAIR_BINS = 10
_MIN_STEP = 1e-4
"""Steps below this [rad or m] do not count as motion."""


@dataclass(frozen=True, eq=False)
class JointStatistics:
    """Statistics of one joint over all frames; positions in rad or m, as recorded.

    Attributes:
        name: of the joint.
        lower, upper: the range of coverage: the robot's limits, else the recorded range.
        low, high: minimum and maximum position.
        mean, std: of the position.
        coverage: fraction of the bins of the range that were visited, 0..1.
        histogram: (NUM_BINS,) frames in each bin.
        step_rms, step_max: of the step between two frames.
        moving_fraction: fraction of the steps larger than 1e-4.
    """

    name: str
    lower: float
    upper: float
    low: float
    high: float
    mean: float
    std: float
    coverage: float
    histogram: NDArray[np.int64]
    step_rms: float
    step_max: float
    moving_fraction: float


@dataclass(frozen=True, eq=False)
class DatasetSummary:
    """Statistics of a data set.

    Attributes:
        episodes: number of episodes.
        frames: number of frames of all episodes.
        lengths: frames of the shortest, median and longest episode.
        tasks: task -> number of episodes.
        joints: one entry per joint.
        pair_coverage: mean fraction of the 10 x 10 bins visited in the plane of two joints; 1 joint: its coverage.
        actions: name -> (minimum, maximum) of every action column.
        uses_limits: whether coverage refers to the robot's limits.
    """

    episodes: int
    frames: int
    lengths: tuple[int, int, int]
    tasks: Mapping[str, int]
    joints: tuple[JointStatistics, ...]
    pair_coverage: float
    actions: Mapping[str, tuple[float, float]]
    uses_limits: bool


def summarize_dataset(dataset: RecordedDataset, robot: Embodiment | None = None) -> DatasetSummary:
    """Statistics of all positions and actions (images are not read).

    Args:
        dataset: the data set.
        robot: coverage refers to its limits, if it has these joints.

    Raises:
        DatasetError: there are no episodes, no positions, or positions that are not finite.
    """
    if not len(dataset):
        raise DatasetError(f"{dataset.root}: has no episode; record some")
    episodes = list(dataset)
    states = [episode.state for episode in episodes]
    actions = [episode.action for episode in episodes if episode.action is not None]
    q = np.concatenate(states)
    if not np.isfinite(q).all():
        raise DatasetError(f"{dataset.root}: joint positions are not finite everywhere; run jidm dataset validate")
    steps = np.concatenate([np.diff(state, axis=0) for state in states])
    uses_limits = robot is not None and robot.joint_names == dataset.joint_names
    lower, upper = q.min(0), q.max(0)
    if uses_limits and robot is not None:
        lower = np.where(np.isfinite(robot.lower), robot.lower, lower)
        upper = np.where(np.isfinite(robot.upper), robot.upper, upper)
    joints = tuple(
        _joint_statistics(name, q[:, k], steps[:, k], lower[k], upper[k]) for k, name in enumerate(dataset.joint_names)
    )
    lengths = sorted(len(state) for state in states)
    return DatasetSummary(
        episodes=len(episodes),
        frames=len(q),
        lengths=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        tasks=dict(Counter(episode.task for episode in episodes)),
        joints=joints,
        pair_coverage=_pair_coverage(q, lower, upper),
        actions=_action_ranges(dataset, np.concatenate(actions)) if actions else {},
        uses_limits=uses_limits,
    )


def _joint_statistics(
    name: str, q: NDArray[np.float64], steps: NDArray[np.float64], lower: float, upper: float
) -> JointStatistics:
    histogram = np.bincount(_bin_index(q, lower, upper, NUM_BINS), minlength=NUM_BINS)
    size = np.abs(steps)
    return JointStatistics(
        name, float(lower), float(upper), float(q.min()), float(q.max()), float(q.mean()), float(q.std()),
        coverage=float((histogram > 0).mean()), histogram=histogram,
        step_rms=float(np.sqrt((steps**2).mean())) if len(steps) else 0.0,
        step_max=float(size.max(initial=0.0)), moving_fraction=float((size > _MIN_STEP).mean()) if len(steps) else 0.0,
    )  # fmt: skip


def _bin_index(q: NDArray[np.float64], lower: float, upper: float, bins: int) -> NDArray[np.int64]:
    """Bin of each position; positions outside the range belong to the outermost bins."""
    width = max(float(upper - lower), 1e-12)
    return np.clip(((q - lower) / width * bins).astype(np.int64), 0, bins - 1)


def _pair_coverage(q: NDArray[np.float64], lower: NDArray[np.float64], upper: NDArray[np.float64]) -> float:
    bins = [_bin_index(q[:, k], lower[k], upper[k], _PAIR_BINS) for k in range(q.shape[1])]
    if len(bins) == 1:
        return len(np.unique(bins[0])) / _PAIR_BINS
    fractions = [
        np.count_nonzero(np.bincount(bins[i] * _PAIR_BINS + bins[j])) / _PAIR_BINS**2
        for i in range(len(bins))
        for j in range(i)
    ]
    return float(np.mean(fractions))


def _action_ranges(dataset: RecordedDataset, actions: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
    names = flat_names(dataset.features[ACTION]) or tuple(f"action_{k}" for k in range(actions.shape[1]))
    return {name: (float(actions[:, k].min()), float(actions[:, k].max())) for k, name in enumerate(names)}
