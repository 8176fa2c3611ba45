"""Whether a video agrees with the robot, camera and pose that it is decoded with.

At the right setting the image is steeper along the robot's projected outline than beside it. Displaced copies of the outline are
the comparison. The agreement is a standard score: mean gradient across the outline, less the mean over the copies, in standard
deviations of these. A wrong setting scores about 0, since it is no better than its neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

MIN_SCORE = 3.0
"""Scores below it contradict the setting. On simulated videos of seven robots right settings reach 3.6 and more after 9 frames,
wrong ones at most 2.4."""

_MIN_FRAMES = 8  # before the pose is judged; a right one may score 2.2 in a single frame
_WINDOW = 16  # frames of the running mean
_MIN_EDGE = 1e-3  # [1/px] mean gradient below which a frame shows no edges at all


@dataclass(frozen=True)
class Agreement:
    """Agreement of the last frames with the setting.

    Attributes:
        view: standard score against outlines displaced as a whole.
        pose: standard score against outlines displaced by joint steps; None for learned fields, which have no kinematics.
        frames: number of frames that were measured, at most the length of the running mean; 0 for models that know no outline.
        min_score: scores below it contradict the setting.
    """

    view: float = 0.0
    pose: float | None = None
    frames: int = 0
    min_score: float = MIN_SCORE

    @property
    def score(self) -> float:
        """The lower of the two; 0 if nothing was measured."""
        return self.view if self.pose is None else min(self.view, self.pose)

    @property
    def unrelated(self) -> bool:
        """Whether the video shows nothing that looks like the robot in its place, so that no joint step is valid."""
        return self.frames > 0 and self.view < self.min_score

    @property
    def verdict(self) -> str:
        """What contradicts the setting, in words; empty if nothing does."""
        if self.unrelated:
            return (
                f"this does not look like this robot from this camera at this pose (agreement {self.view:.1f}, right settings "
                f"reach {self.min_score:.2g}): check the robot, the camera, q0, and that the video is upright and not mirrored"
            )
        if self.frames >= _MIN_FRAMES and self.pose is not None and self.pose < self.min_score:
            return (
                f"the robot is not quite where it was said to be (agreement {self.pose:.1f}, right settings reach "
                f"{self.min_score:.2g}): check q0, the joint positions in the first frame, and the camera's pose"
            )
        return ""


NOT_MEASURED = Agreement()
"""Of models that know no outline."""


class RunningComparison:
    """Running mean of the gradient across an outline and across its displaced copies.

    Attributes:
        frames: number of frames in the mean.
    """

    def __init__(self) -> None:
        self.frames = 0
        self._mean: Tensor | None = None

    def update(self, slopes: Float[Tensor, " c"]) -> float:
        """Add a frame; its own score.

        Args:
            slopes: mean gradient across the outline [1/px], then across each copy.
        """
        relative = slopes / slopes[1:].mean().clamp(min=_MIN_EDGE)
        self.frames = min(self.frames + 1, _WINDOW)
        mean = relative if self._mean is None else self._mean
        self._mean = mean + (relative - mean) / self.frames
        return standard_score(relative)

    @property
    def score(self) -> float:
        """Standard score over the last frames; 0 before the first."""
        return 0.0 if self._mean is None else standard_score(self._mean)


def standard_score(values: Float[Tensor, " c"]) -> float:
    """The first value, less the mean of the others, in standard deviations of these."""
    others = values[1:]
    return float((values[0] - others.mean()) / others.std().clamp(min=1e-6))
