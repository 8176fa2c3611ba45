"""What a recording holds, in figures: how much, where in joint space, how fast, and how the pictures move."""

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
"""Parts a joint's range is cut into; the share of parts that were visited is its coverage."""

_PAIR_BINS = 10
_MIN_STEP = 1e-4
"""Steps below this [rad or m] are not motion."""

_MIN_PIXEL_CHANGE, _MAX_CHANGED_FRACTION = 8, 1e-4
"""A picture repeats the one before if fewer than this share of its pixels change by more than so many grey levels: what a
codec alters in a still picture stays below, a hand that moves does not."""

_MIN_FLOW = 0.5
"""Pixels count as moving from this on [px per frame]."""


@dataclass(frozen=True, eq=False)
class JointStatistics:
    """Where one joint was and how it moved, over all frames; positions in rad or m, as recorded.

    Attributes:
        name: of the joint.
        lower, upper: the range coverage is measured in: the robot's limits, else the recorded range.
        low, high: least and greatest position. mean, std: of the position.
        coverage: share of the parts of the range that were visited, 0..1.
        histogram: (BINS,) frames in each part.
        step_rms, step_max: of the step between two frames.
        moving_fraction: share of the steps larger than 1e-4.
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
    """Figures of a whole recording.

    Attributes:
        episodes: how many. frames: of all episodes. lengths: frames of the shortest, median and longest episode.
        tasks: task -> episodes.
        joints: one entry per joint.
        pair_coverage: mean share of the 10 x 10 parts visited in the plane of two joints; 1 joint: its coverage.
        actions: name -> (least, greatest) of every action column.
        uses_limits: whether coverage is measured in the robot's limits.
    """

    episodes: int
    frames: int
    lengths: tuple[int, int, int]
    tasks: Mapping[str, int]
    joints: tuple[JointStatistics, ...]
    pair_coverage: float
    actions: Mapping[str, tuple[float, float]]
    uses_limits: bool


@dataclass(frozen=True, eq=False)
class FlowSample:
    """Motion of the picture between two frames.

    Attributes:
        episode, frame: the first of the two.
        first: (H, W, 3) uint8 the first picture.
        flow: (2, H, W) float32 [px], u right, v down. weight: (H, W) its confidence, 0..1.
        moving_fraction: share of pixels faster than half a pixel.
        speed, speed_p95: median and 95th percentile of their speed [px per frame]; 0 if nothing moves.
        weight_moving: mean confidence on them.
    """

    episode: int
    frame: int
    first: NDArray[np.uint8]
    flow: NDArray[np.float32]
    weight: NDArray[np.float32]
    moving_fraction: float
    speed: float
    speed_p95: float
    weight_moving: float


@dataclass(frozen=True, eq=False)
class CameraSample:
    """What a camera saw of one episode.

    Attributes:
        episode: its number.
        frame_indices: numbers of the sampled frames. images: these frames, (H, W, 3) uint8.
        repeated_fraction: share of the faster half of the steps over which the picture does not change at all: the camera was
            slower than the stated rate, and such pairs of frames teach that motion looks like standing still.
        flow: over one brisk step; None if not asked for, or if there is no step.
    """

    episode: int
    frame_indices: tuple[int, ...]
    images: tuple[NDArray[np.uint8], ...]
    repeated_fraction: float
    flow: FlowSample | None


def summarize_dataset(dataset: RecordedDataset, robot: Embodiment | None = None) -> DatasetSummary:
    """Read all positions and actions (no pictures).

    Args:
        robot: coverage is measured within its limits, if it has these joints.

    Raises:
        DatasetError: there are no episodes, no positions, or positions that are not finite.
    """
    if not len(dataset):
        raise DatasetError(f"{dataset.root}: holds no episode; record some")
    episodes = list(dataset)
    states = [episode.state for episode in episodes]
    actions = [episode.action for episode in episodes if episode.action is not None]
    q = np.concatenate(states)
    if not np.isfinite(q).all():
        raise DatasetError(f"{dataset.root}: joint positions are not finite everywhere; run jidm dataset check")
    steps = np.concatenate([np.diff(state, axis=0) for state in states])
    fits = robot is not None and robot.joint_names == dataset.joint_names
    lower, upper = q.min(0), q.max(0)
    if fits and robot is not None:
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
        uses_limits=fits,
    )


def sample_camera(
    dataset: RecordedDataset, camera: str, *, episodes: int = 6, frames: int = 6, flow: bool = True
) -> list[CameraSample]:
    """Look at a camera's pictures in up to `episodes` evenly spread episodes.

    Args:
        frames: how many pictures to keep of each, evenly spread.
        flow: measure the motion over one step of each, by the default estimator: the step at the upper quartile of
            joint speed, since most recordings stand still for long.
    """
    samples = []
    for place in _evenly_spaced(len(dataset), episodes):
        episode = dataset.episode(dataset.episode_indices[place])
        wanted = _evenly_spaced(episode.length, frames)
        speed = np.linalg.norm(np.diff(episode.state, axis=0), axis=1)
        fast_step = int(np.argsort(speed, kind="stable")[(3 * (len(speed) - 1)) // 4]) if len(speed) else -1
        changes, kept, before = np.zeros(len(speed)), {}, None
        for t, picture in enumerate(episode.frames(camera)):
            if t in wanted or (fast_step >= 0 and t in (fast_step, fast_step + 1)):
                kept[t] = picture
            if before is not None:
                changes[t - 1] = (np.abs(picture.astype(np.int16) - before).max(-1) > _MIN_PIXEL_CHANGE).mean()
            before = picture
        faster = speed > np.median(speed) if len(speed) else np.zeros(0, dtype=bool)
        repeated = float((changes[faster] < _MAX_CHANGED_FRACTION).mean()) if faster.any() else 0.0
        flow_sample = (
            _measure_flow(episode.index, fast_step, kept[fast_step], kept[fast_step + 1])
            if flow and fast_step >= 0
            else None
        )
        pictures = tuple(kept[t] for t in wanted)
        samples.append(CameraSample(episode.index, tuple(wanted), pictures, repeated, flow_sample))
    return samples


def _measure_flow(episode: int, frame: int, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> FlowSample:
    import torch

    from jidm.flow import DisFlow

    a, b = (torch.from_numpy(x.copy()).permute(2, 0, 1).float() / 255.0 for x in (first, second))
    measured = DisFlow()(a, b)
    flow, weight = measured.flow.numpy(), measured.weight.numpy()
    speed = np.hypot(flow[0], flow[1])
    fast = speed > _MIN_FLOW
    return FlowSample(
        episode, frame, first, flow, weight, moving_fraction=float(fast.mean()),
        speed=float(np.median(speed[fast])) if fast.any() else 0.0,
        speed_p95=float(np.percentile(speed[fast], 95)) if fast.any() else 0.0,
        weight_moving=float(weight[fast].mean()) if fast.any() else 0.0,
    )  # fmt: skip


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
    """Which part of the range each position lies in; positions beyond it count to the outermost."""
    width = max(float(upper - lower), 1e-12)
    return np.clip(((q - lower) / width * bins).astype(np.int64), 0, bins - 1)


def _pair_coverage(q: NDArray[np.float64], lower: NDArray[np.float64], upper: NDArray[np.float64]) -> float:
    parts = [_bin_index(q[:, k], lower[k], upper[k], _PAIR_BINS) for k in range(q.shape[1])]
    if len(parts) == 1:
        return len(np.unique(parts[0])) / _PAIR_BINS
    shares = [
        np.count_nonzero(np.bincount(parts[i] * _PAIR_BINS + parts[j])) / _PAIR_BINS**2
        for i in range(len(parts))
        for j in range(i)
    ]
    return float(np.mean(shares))


def _action_ranges(dataset: RecordedDataset, actions: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
    names = flat_names(dataset.features[ACTION]) or tuple(f"action_{k}" for k in range(actions.shape[1]))
    return {name: (float(actions[:, k].min()), float(actions[:, k].max())) for k, name in enumerate(names)}


def _evenly_spaced(count: int, wanted: int) -> list[int]:
    """Up to `wanted` different places among `count`, evenly spread, ends included."""
    places = np.linspace(0, count - 1, min(count, wanted))
    return sorted(set(places.round().astype(int).tolist()))
