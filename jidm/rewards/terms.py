"""The reward's terms: kinds of failure in a robot video, per step and per joint.

The values of a term have its own unit. A `TermScale`, fitted to good videos, maps them to a penalty in [0, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError
from jidm.rewards.analysis import BACKWARD_STRIDE, VideoAnalysis

_TAIL_FRACTION = 0.1
"""Fraction of the steps, the worst ones, that a video is scored by: some failures last only a frame, others persist."""
_MIN_MOTION = 0.3  # [cells rms] added to the robot's motion before the residual is divided by it
_STILL_THRESHOLD = 0.1  # [cells rms] a step with less motion counts as still
_UNMEASURED_RESIDUAL = 1.0  # relative residual of a step that could not be measured
_SPREAD_FACTOR = 3.0  # the penalty is .63 at this multiple of the spread
MIN_VIDEOS = 5
"""Smallest number of videos that a scale is fitted to."""


@dataclass(frozen=True, eq=False)
class TermValues:
    """Values of one term for one video.

    Attributes:
        per_step: (S,) finite; larger is worse.
        by_joint: (S, n) their attribution to the joints, not negative, in any unit; None if no joint is responsible.
    """

    per_step: Float[Tensor, " S"]
    by_joint: Float[Tensor, "S n"] | None = None

    @property
    def tail_mean(self) -> Float[Tensor, ""]:
        """Mean over the worst tenth of the steps."""
        return self.per_step.topk(max(1, round(_TAIL_FRACTION * len(self.per_step)))).values.mean()


@dataclass(frozen=True)
class Term:
    """A kind of failure.

    Attributes:
        compute: its values in an analyzed video.
        weight: largest penalty in the reward, in units of EVA's P0.
        min_spread: smallest spread of its scale, in the term's unit.
        template: text of a reason, with fields `{joint}` and `{value}`.
    """

    compute: Callable[[VideoAnalysis], TermValues]
    weight: float
    min_spread: float
    template: str

    def reason(self, values: TermValues, step: int, joint_names: Sequence[str]) -> str:
        """Description of the failure in a step."""
        fields: dict[str, Any] = {"value": float(values.per_step[step].detach()), "joint": "the robot"}
        if values.by_joint is not None:
            fields["joint"] = joint_names[int(values.by_joint[step].argmax())]
        return f"frame {step + 1}: {self.template.format(**fields)}"


@dataclass(frozen=True)
class TermScale:
    """Distribution of a term's `tail_mean` over good videos.

    Attributes:
        median: the median.
        spread: distance from the median to the 90th percentile.
    """

    median: float
    spread: float

    @classmethod
    def from_tail_means(cls, tail_means: Sequence[float], min_spread: float) -> TermScale:
        """Fit to good videos.

        Args:
            tail_means: one per video.
            min_spread: lower bound of the spread.

        Raises:
            InputError: there are fewer than 5.
        """
        if len(tail_means) < MIN_VIDEOS:
            raise InputError(f"a scale needs at least {MIN_VIDEOS} good videos, got {len(tail_means)}")
        values = torch.tensor(tail_means, dtype=torch.float64)
        median = float(values.median())
        return cls(median, max(float(values.quantile(0.9)) - median, min_spread))

    def penalty(self, value: Float[Tensor, "*any"], sharpness: int = 2) -> Float[Tensor, "*any"]:
        """In [0, 1): 0 up to the median of good videos, .1 at their 90th percentile, .63 three times as far from the median.

        Args:
            value: in the term's unit.
            sharpness: even exponent; a higher one forgives more below three times that distance, and less above it.
        """
        return 1 - torch.exp(-(((value - self.median).clamp(min=0) / (_SPREAD_FACTOR * self.spread)) ** sharpness))


def residual(analysis: VideoAnalysis) -> TermValues:
    """Image motion of the robot beyond the decoded step, relative to its motion."""
    residuals = analysis.residuals
    base = residuals.motion + _MIN_MOTION
    relative = residuals.unexplained / base
    relative = torch.where(analysis.valid, relative, relative.clamp(min=_UNMEASURED_RESIDUAL))
    return TermValues(relative, residuals.unexplained_by_joint)


def appearance(analysis: VideoAnalysis) -> TermValues:
    """Brightness change of the robot that no motion explains, as an equivalent motion, relative to its motion."""
    residuals = analysis.residuals
    return TermValues(
        residuals.appearance_change / (residuals.motion + _MIN_MOTION), residuals.appearance_change_by_joint
    )


def shape(analysis: VideoAnalysis) -> TermValues:
    """Area of foreground beside the robot and of background on the robot, relative to the robot's size."""
    residuals = analysis.residuals
    return TermValues(
        (residuals.spurious + residuals.missing)[1:], (residuals.spurious_by_joint + residuals.missing_by_joint)[1:]
    )


def background(analysis: VideoAnalysis) -> TermValues:
    """Color change away from the robot."""
    return TermValues(analysis.residuals.background_change)


def jump(analysis: VideoAnalysis) -> TermValues:
    """Velocity change between consecutive steps, as a fraction of the velocity limit; of the worst joint."""
    velocity = analysis.q.diff(dim=0) / analysis.dt / analysis.velocity
    change = velocity.diff(dim=0).abs()
    change = torch.cat([torch.zeros_like(velocity[:1]), change])
    return TermValues(change.amax(-1), change)


def limits(analysis: VideoAnalysis) -> TermValues:
    """Distance of the worst joint beyond its position limits [rad or m]."""
    excess = torch.maximum(analysis.q - analysis.upper, analysis.lower - analysis.q).clamp(min=0)[1:]
    return TermValues(excess.amax(-1), excess)


def still(analysis: VideoAnalysis) -> TermValues:
    """Fraction of the steps with almost no motion; the same value for every step."""
    still_steps = (analysis.residuals.motion < _STILL_THRESHOLD).to(analysis.residuals.motion)
    return TermValues(still_steps.mean().expand_as(still_steps).clone())


def consistency(analysis: VideoAnalysis) -> TermValues:
    """Difference between forward and backward decoded steps, as a fraction of the velocity limit; of the worst joint."""
    if analysis.q_backward is None:
        raise InputError("consistency needs the video decoded backwards")
    difference = (
        (analysis.q[::BACKWARD_STRIDE].diff(dim=0) - analysis.q_backward.diff(dim=0)).abs()
        / (BACKWARD_STRIDE * analysis.dt)
        / analysis.velocity
    )
    by_joint = torch.zeros_like(analysis.q[1:])
    by_joint[: BACKWARD_STRIDE * len(difference)] = difference.repeat_interleave(BACKWARD_STRIDE, 0)
    return TermValues(by_joint.amax(-1), by_joint)


TERMS: Mapping[str, Term] = {
    "residual": Term(residual, 4.0, 0.02, "{joint} shows {value:.2f} times the robot's motion that no joint explains"),
    "appearance": Term(
        appearance, 4.0, 0.02, "{joint} changes its appearance as much as {value:.2f} times the robot's motion would"
    ),
    "shape": Term(
        shape, 4.0, 0.005, "{joint} grew or vanished: {value:.1%} of the robot is not where its joints place it"
    ),
    "background": Term(background, 2.0, 0.001, "the background changed by {value:.3f} of full brightness"),
    "still": Term(still, 8.0, 0.1, "the robot stands still in {value:.0%} of the steps"),
    "jump": Term(jump, 4.0, 0.02, "{joint} changed its velocity by {value:.2f} of its limit between frames"),
    "limits": Term(limits, 4.0, 0.02, "{joint} is {value:.2f} rad or m beyond its range"),
    "consistency": Term(
        consistency,
        1.0,
        0.02,
        "{joint} moves differently when the video runs backwards, by {value:.2f} of its velocity limit",
    ),
}
"""Name -> term. Each term has its own scale, so a weight states how much a failure hinders execution: most for a robot that
stands still, least for a changing background. Chosen by hand on development videos."""
