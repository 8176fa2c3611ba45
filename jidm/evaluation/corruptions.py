"""Image corruptions of held-out video: other backgrounds, occlusion, JPEG and blur.

Each changes the frames of a clip and nothing else, and depends on the clip's episode index alone, so every model gets
the same. `jidm.evaluation.summary.compare_corrupted` compares an evaluation under a corruption with a clean one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import InputError
from jidm.evaluation.evaluate import Corruption
from jidm.evaluation.held_out import EvalClip
from jidm.training.data.augment import through_jpeg

OCCLUDED_FRACTION = 0.2
"""Fraction of the image that patches hide."""
JPEG_QUALITY = 30
BLUR_SIGMA = 0.01
"""Standard deviation of the Gaussian blur, as a fraction of the image's longer side (1.3 px at 128)."""

_LEAF_COUNT = 160

Video = Float[Tensor, "T 3 H W"]


def replace_background(video: Video, clip: EvalClip) -> Video:
    """Replace everything but the robot by a static "dead leaves" image of overlapping colored discs and boxes.

    Dead leaves have edge and scale statistics of photographs (Lee, Mumford and Huang 2001); no background in the
    simulated training data is made like that.

    Raises:
        InputError: the robot's mask is not known.
    """
    if clip.ground_truth is None:
        raise InputError("backgrounds can only be replaced where robot and camera are known, as in motor babbling data")
    height, width = video.shape[-2:]
    background = torch.from_numpy(dead_leaves(height, width, _generator(clip, 1))).movedim(-1, 0)
    masks = torch.stack(
        [clip.ground_truth.robot_mask(f, q) for f, q in zip(clip.frame, clip.q_robot, strict=True)]
    ).float()
    # One pixel of the old background is kept around the robot, so that its shape is not changed.
    masks = torch.nn.functional.max_pool2d(masks[:, None], 3, stride=1, padding=1)
    return torch.where(masks > 0.5, video, background.to(video))


def occlude(video: Video, clip: EvalClip) -> Video:
    """Hide a fifth of the image behind static boxes of colored noise, at the same places in all frames."""
    height, width = video.shape[-2:]
    rng = _generator(clip, 2)
    hidden = np.zeros((height, width), bool)
    patches = np.zeros((height, width, 3), np.float32)
    while hidden.mean() < OCCLUDED_FRACTION:
        h, w = (max(2, round(side * rng.uniform(0.06, 0.2))) for side in (height, width))
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        box = np.s_[top : top + h, left : left + w]
        hidden[box] = True
        patches[box] = np.clip(rng.uniform(0, 1, 3) + 0.1 * rng.standard_normal((h, w, 3)), 0, 1)
    return torch.where(torch.from_numpy(hidden), torch.from_numpy(patches).movedim(-1, 0).to(video), video)


def compress_jpeg(video: Video, clip: EvalClip) -> Video:
    """Compress every frame as JPEG of quality 30."""
    frames = (video.clamp(0, 1) * 255).round().byte()
    return torch.stack([through_jpeg(frame, JPEG_QUALITY) for frame in frames]).to(video) / 255


def blur(video: Video, clip: EvalClip) -> Video:
    """Gaussian blur, with a standard deviation of one percent of the image's longer side."""
    import cv2

    sigma = BLUR_SIGMA * max(video.shape[-2:])
    frames = [cv2.GaussianBlur(f, (0, 0), sigma) for f in video.movedim(1, -1).contiguous().numpy()]
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1).contiguous()


CORRUPTIONS: Mapping[str, Corruption] = {
    "background": replace_background,
    "occlusion": occlude,
    "jpeg": compress_jpeg,
    "blur": blur,
}
"""Corruptions by name. Poses beyond the training range are none of them: they need another recording."""


def dead_leaves(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(height, width, 3) image in [0, 1]: discs and boxes of random colors, sizes r with density 1 / r^3."""
    import cv2

    image = np.full((height, width, 3), rng.uniform(0, 1, 3), np.float32)
    side = max(height, width)
    low, high = 0.02 * side, 0.35 * side
    # By inverting the cumulative distribution of r^-3 between low and high.
    radius = (low**-2 - rng.uniform(0, 1, _LEAF_COUNT) * (low**-2 - high**-2)) ** -0.5
    for r in np.sort(radius)[::-1]:  # large ones first, so that they do not hide the small ones
        x, y = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        color = tuple(float(c) for c in np.clip(rng.uniform(0.05, 0.95) + 0.15 * rng.standard_normal(3), 0, 1))
        if rng.random() < 0.5:
            cv2.circle(image, (x, y), max(1, round(r)), color, -1, cv2.LINE_AA)
        else:
            box = cv2.boxPoints(((x, y), (2 * r, 2 * r * rng.uniform(0.4, 1)), rng.uniform(0, 180)))
            cv2.fillPoly(image, [np.rint(box).astype(np.int32)], color, cv2.LINE_AA)
    return np.clip(image, 0, 1)


def _generator(clip: EvalClip, salt: int) -> np.random.Generator:
    return np.random.default_rng([clip.index, salt, 0xBAD])
