"""Held-out video made worse in known ways: what a model has not seen in training but will meet.

Each condition changes the pictures of a clip and nothing else, and depends on the clip's episode number alone, so every
model is shown the same. How much the error rises, and whether the model says so itself, is computed from two evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import InputError
from jidm.evaluation import metrics
from jidm.evaluation.evaluate import Corruption, EvalClip, Evaluation
from jidm.evaluation.summary import step_errors, step_flags

OCCLUDED_FRACTION = 0.2
"""Share of the picture that patches hide."""
JPEG_QUALITY = 30
BLUR_SIGMA = 0.01
"""Standard deviation of the Gaussian blur, as a share of the picture's longer side (1.3 px at 128)."""

_LEAF_COUNT = 160
_WIDENED_QUANTILE = 0.95

Video = Float[Tensor, "T 3 H W"]


def replace_background(video: Video, clip: EvalClip) -> Video:
    """Everything but the robot becomes a still picture of overlapping coloured discs and boxes.

    Such "dead leaves" share the edges and the scales of photographs (Lee, Mumford and Huang 2001), and no background of
    our self-play is made like that.

    Raises:
        InputError: where the robot is in the pictures is not known.
    """
    if clip.ground_truth is None:
        raise InputError("backgrounds can only be replaced where robot and camera are known; record with self-play")
    height, width = video.shape[-2:]
    picture = torch.from_numpy(dead_leaves(height, width, _generator(clip, 1))).movedim(-1, 0)
    masks = torch.stack(
        [clip.ground_truth.robot_mask(f, q) for f, q in zip(clip.frame, clip.q_robot, strict=True)]
    ).float()
    # A pixel of the old background is left around the robot: cutting into it would change its shape.
    masks = torch.nn.functional.max_pool2d(masks[:, None], 3, stride=1, padding=1)
    return torch.where(masks > 0.5, video, picture.to(video))


def occlude(video: Video, clip: EvalClip) -> Video:
    """Still boxes of coloured noise hide a fifth of the picture, at the same places in all frames."""
    height, width = video.shape[-2:]
    rng = _generator(clip, 2)
    hidden = np.zeros((height, width), bool)
    picture = np.zeros((height, width, 3), np.float32)
    while hidden.mean() < OCCLUDED_FRACTION:
        h, w = (max(2, round(side * rng.uniform(0.06, 0.2))) for side in (height, width))
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        box = np.s_[top : top + h, left : left + w]
        hidden[box] = True
        picture[box] = np.clip(rng.uniform(0, 1, 3) + 0.1 * rng.standard_normal((h, w, 3)), 0, 1)
    patches = torch.from_numpy(picture).movedim(-1, 0).to(video)
    return torch.where(torch.from_numpy(hidden), patches, video)


def compress_jpeg(video: Video, clip: EvalClip) -> Video:
    """Every frame through JPEG at quality 30."""
    import cv2

    frames = (video.clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()
    out = np.empty_like(frames)
    for t, frame in enumerate(frames):
        _, packed = cv2.imencode(
            ".jpg", np.ascontiguousarray(frame[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        )
        out[t] = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR))[..., ::-1]
    return torch.from_numpy(out).movedim(-1, 1).to(video) / 255


def blur(video: Video, clip: EvalClip) -> Video:
    """Gaussian blur of one per cent of the picture's side."""
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
"""Name -> what it does to a clip. Wider poses need another recording, not another picture."""


def dead_leaves(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(height, width, 3) picture in [0, 1]: discs and boxes of random colours, sizes falling off as 1 / r^3."""
    import cv2

    picture = np.full((height, width, 3), rng.uniform(0, 1, 3), np.float32)
    side = max(height, width)
    low, high = 0.02 * side, 0.35 * side
    # Inverse of the cumulative distribution of r^-3 between low and high.
    radius = (low**-2 - rng.uniform(0, 1, _LEAF_COUNT) * (low**-2 - high**-2)) ** -0.5
    for r in np.sort(radius)[::-1]:  # large ones first, or they would hide the small
        x, y = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        color = tuple(float(c) for c in np.clip(rng.uniform(0.05, 0.95) + 0.15 * rng.standard_normal(3), 0, 1))
        if rng.random() < 0.5:
            cv2.circle(picture, (x, y), max(1, round(r)), color, -1, cv2.LINE_AA)
        else:
            box = cv2.boxPoints(((x, y), (2 * r, 2 * r * rng.uniform(0.4, 1)), rng.uniform(0, 180)))
            cv2.fillPoly(picture, [np.rint(box).astype(np.int32)], color, cv2.LINE_AA)
    return np.clip(picture, 0, 1)


def compare_corrupted(clean: Evaluation, corrupted: Evaluation) -> dict[str, Any]:
    """How much worse a model got, and whether it says so.

    Args:
        clean: on the pictures as they are; corrupted: under the condition, of the same or of other episodes.

    Returns:
        JSON values. `nve`, `nve_rise` (over the clean one); `invalid_share`; `unobservable_share` of judged joints;
        `widened_share`: steps whose claimed standard deviation, rms over the judged joints, is above the 95th
        percentile of the clean steps'; `nve_trusted` and its rise over the same of the clean steps: of steps that are
        valid and not widened; `coverage_95`: share of errors inside the claimed 95 % intervals.
    """
    out: dict[str, Any] = {"episodes": len(corrupted.episodes), "failed": dict(corrupted.failed)}
    if not clean.episodes or not corrupted.episodes:
        return out
    limit = _rms_std(clean).quantile(_WIDENED_QUANTILE)
    before, after = (_corruption_metrics(x, limit) for x in (clean, corrupted))
    return out | {
        **after,
        "nve_clean": before["nve"],
        "nve_rise": _ratio(after["nve"], before["nve"]),
        "nve_trusted_rise": _ratio(after["nve_trusted"], before["nve_trusted"]),
    }


def _corruption_metrics(evaluation: Evaluation, limit: Tensor) -> dict[str, float | None]:
    truth, error = step_errors(evaluation)
    flags, judged = step_flags(evaluation), evaluation.joint_mask
    widened = _rms_std(evaluation) > limit
    trusted = flags["valid"] & ~widened
    counts = (flags["valid"][:, None] & judged).expand_as(error) & flags["claimed"]
    figures = {
        "nve": metrics.nve(error[:, judged], truth[:, judged]),
        "nve_trusted": metrics.nve(error[trusted][:, judged], truth[trusted][:, judged]),
        "invalid_share": 1 - flags["valid"].double().mean(),
        "unobservable_share": 1 - flags["observable"][:, judged].double().mean(),
        "widened_share": widened.double().mean() if bool(flags["claimed"].any()) else torch.tensor(torch.nan),
        "coverage_95": metrics.coverage(error, flags["std"], 0.95, counts),
    }
    return {key: float(x) if bool(x.isfinite()) else None for key, x in figures.items()}


def _rms_std(evaluation: Evaluation) -> Tensor:
    return step_flags(evaluation)["std"][:, evaluation.joint_mask].square().mean(-1).sqrt()


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _generator(clip: EvalClip, salt: int) -> np.random.Generator:
    return np.random.default_rng([clip.index, salt, 0xBAD])
