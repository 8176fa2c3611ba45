"""Samples of a data set's images and of the motion in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jidm.datasets.reader import RecordedDataset
from jidm.datasets.stats import evenly_spaced

# An image repeats its predecessor if less than this fraction of its pixels changes by more than these gray levels: the
# codec noise of a still image stays below, a moving hand does not.
_MIN_PIXEL_CHANGE, _MAX_CHANGED_FRACTION = 8, 1e-4
_MIN_FLOW = 0.5  # speed from which pixels count as moving [px per frame]


@dataclass(frozen=True, eq=False)
class FlowSample:
    """Optical flow between two consecutive frames.

    Attributes:
        episode, frame: episode and number of the first frame.
        first: (H, W, 3) uint8, the first frame.
        flow: (2, H, W) float32 [px], u right, v down.
        weight: (H, W) its confidence, 0..1.
        moving_fraction: fraction of pixels faster than half a pixel.
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
    """Sampled images of one camera in one episode.

    Attributes:
        episode: its number.
        frame_indices: numbers of the sampled frames.
        images: these frames, (H, W, 3) uint8.
        repeated_fraction: fraction of the faster half of the steps over which the image does not change: the camera was
            slower than the declared rate, and such frame pairs are wrong training data (motion without change).
        flow: of one fast step; None if not requested, or if there is no step.
    """

    episode: int
    frame_indices: tuple[int, ...]
    images: tuple[NDArray[np.uint8], ...]
    repeated_fraction: float
    flow: FlowSample | None


def sample_camera(
    dataset: RecordedDataset, camera: str, *, episodes: int = 6, frames: int = 6, flow: bool = True
) -> list[CameraSample]:
    """Sample a camera's images in up to `episodes` evenly spaced episodes.

    Args:
        dataset: the data set.
        camera: name of the camera.
        episodes: number of episodes.
        frames: number of evenly spaced images per episode.
        flow: measure the flow over one step of each, by DIS: the step at the upper quartile of joint speed, because
            most recordings contain long pauses.
    """
    samples = []
    for k in evenly_spaced(len(dataset), episodes):
        episode = dataset.episode(dataset.episode_indices[k])
        sampled = evenly_spaced(episode.length, frames)
        speed = np.linalg.norm(np.diff(episode.state, axis=0), axis=1)
        fast_step = int(np.argsort(speed, kind="stable")[(3 * (len(speed) - 1)) // 4]) if len(speed) else None
        needed = {*sampled} if fast_step is None else {*sampled, fast_step, fast_step + 1}
        changes, kept, previous = np.zeros(len(speed)), {}, None
        for t, image in enumerate(episode.frames(camera)):
            if t in needed:
                kept[t] = image
            if previous is not None:
                changes[t - 1] = (np.abs(image.astype(np.int16) - previous).max(-1) > _MIN_PIXEL_CHANGE).mean()
            previous = image
        faster = speed > np.median(speed) if len(speed) else np.zeros(0, dtype=bool)
        repeated = float((changes[faster] < _MAX_CHANGED_FRACTION).mean()) if faster.any() else 0.0
        flow_sample = None
        if flow and fast_step is not None:
            flow_sample = _measure_flow(episode.index, fast_step, kept[fast_step], kept[fast_step + 1])
        images = tuple(kept[t] for t in sampled)
        samples.append(CameraSample(episode.index, tuple(sampled), images, repeated, flow_sample))
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
