"""What can be wrong with a video of a robot, each on its own scale: step by step and joint by joint.

A term's raw values have its own unit; `Scale`, measured on good videos, turns what goes beyond them into a penalty in
[0, 1).
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

_TAIL_FRACTION = (
    0.1  # share of the steps by which a video is judged: a jump is over in one frame, a robot that melts melts on
)
_MIN_MOTION = 0.3  # [cells rms] added to the robot's motion before what is unexplained is divided by it
_STILL_THRESHOLD = 0.1  # [cells rms] steps that move the robot less are none
_UNMEASURED_RESIDUAL = 1.0  # what is unexplained, relative to the motion, of a step that could not be measured
_SPREAD_FACTOR = 3.0  # distances from the usual to the 90th percentile at which .63 is taken off
MIN_VIDEOS = 5
"""A scale needs so many."""


@dataclass(frozen=True, eq=False)
class TermValues:
    """One term of one video.

    Attributes:
        per_step: (S,) per step, larger is worse; finite.
        by_joint: (S, n) not negative, the same shared out among the joints in some unit; None where no joint is to blame.
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
        compute: reads it off a video.
        weight: what it takes off the reward, in units of EVA's P0, when it is as bad as can be.
        min_spread: difference that is worth nothing, even where good videos differ by less; in the term's unit.
        template: in words; `{joint}` and `{value}` are filled in.
    """

    compute: Callable[[VideoAnalysis], TermValues]
    weight: float
    min_spread: float
    template: str

    def reason(self, values: TermValues, step: int, joint_names: Sequence[str]) -> str:
        """What is wrong with a step."""
        fields: dict[str, Any] = {"value": float(values.per_step[step].detach()), "joint": "the robot"}
        if values.by_joint is not None:
            fields["joint"] = joint_names[int(values.by_joint[step].argmax())]
        return f"frame {step + 1}: {self.template.format(**fields)}"


@dataclass(frozen=True)
class TermScale:
    """How large a term's `worst` is in good videos.

    Attributes:
        median: the median. spread: distance from there to the 90th percentile.
    """

    median: float
    spread: float

    @classmethod
    def from_tail_means(cls, tail_means: Sequence[float], min_spread: float) -> TermScale:
        """From good videos, never finer than `min_spread`.

        Raises:
            InputError: there are fewer than 5.
        """
        if len(tail_means) < MIN_VIDEOS:
            raise InputError(f"a scale needs at least {MIN_VIDEOS} good videos, got {len(tail_means)}")
        values = torch.tensor(tail_means, dtype=torch.float64)
        median = float(values.median())
        return cls(median, max(float(values.quantile(0.9)) - median, min_spread))

    def penalty(self, value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """In [0, 1): 0 for what the better half of good videos has, .1 for one in ten of them, .63 three times as far off."""
        return 1 - torch.exp(-((value - self.median).clamp(min=0) / (_SPREAD_FACTOR * self.spread)).square())


def residual(analysis: VideoAnalysis) -> TermValues:
    """Motion of the robot that brightness asks for beyond the step, relative to its motion."""
    residuals = analysis.residuals
    base = residuals.motion + _MIN_MOTION
    share = residuals.unexplained / base
    return TermValues(
        torch.where(analysis.valid, share, share.clamp(min=_UNMEASURED_RESIDUAL)), residuals.unexplained_by_joint
    )


def appearance(analysis: VideoAnalysis) -> TermValues:
    """Change of the robot's brightness that no motion brings about, as motion, relative to its motion."""
    residuals = analysis.residuals
    return TermValues(
        residuals.appearance_change / (residuals.motion + _MIN_MOTION), residuals.appearance_change_by_joint
    )


def shape(analysis: VideoAnalysis) -> TermValues:
    """Robot where the field says there is none, and background where it says there is robot; of its size."""
    residuals = analysis.residuals
    return TermValues(
        (residuals.spurious + residuals.missing)[1:], (residuals.spurious_by_joint + residuals.missing_by_joint)[1:]
    )


def background(analysis: VideoAnalysis) -> TermValues:
    """Change of colour where no robot is."""
    return TermValues(analysis.residuals.background_change)


def jump(analysis: VideoAnalysis) -> TermValues:
    """Change of velocity from step to step, of the joints' speed limits; of the worst joint."""
    velocity = analysis.q.diff(dim=0) / analysis.dt / analysis.velocity
    change = velocity.diff(dim=0).abs()
    change = torch.cat([torch.zeros_like(velocity[:1]), change])
    return TermValues(change.amax(-1), change)


def limits(analysis: VideoAnalysis) -> TermValues:
    """How far the worst joint is beyond its range [rad or m]."""
    excess = torch.maximum(analysis.q - analysis.upper, analysis.lower - analysis.q).clamp(min=0)[1:]
    return TermValues(excess.amax(-1), excess)


def still(analysis: VideoAnalysis) -> TermValues:
    """Share of the steps that move next to nothing; the same for every step."""
    still_steps = (analysis.residuals.motion < _STILL_THRESHOLD).to(analysis.residuals.motion)
    return TermValues(still_steps.mean().expand_as(still_steps).clone())


def consistency(analysis: VideoAnalysis) -> TermValues:
    """How much another motion is read off every other frame running backwards; in a frame, of the joints' speed limits."""
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
        appearance, 4.0, 0.02, "{joint} changes its looks as no motion does, by {value:.2f} of its motion"
    ),
    "shape": Term(
        shape, 4.0, 0.005, "{joint} grew or vanished: {value:.1%} of the robot is not where its joints put it"
    ),
    "background": Term(background, 2.0, 0.001, "the background changed by {value:.3f} of full brightness"),
    "still": Term(still, 8.0, 0.1, "the robot stands still in {value:.0%} of the steps"),
    "jump": Term(jump, 4.0, 0.02, "{joint} changed its speed by {value:.2f} of its limit from frame to frame"),
    "limits": Term(limits, 4.0, 0.02, "{joint} is {value:.2f} beyond its range"),
    "consistency": Term(
        consistency, 1.0, 0.02, "{joint} moves otherwise when the video runs backwards, by {value:.2f} of its limit"
    ),
}
"""Name -> kind of failure. Each term has its own scale, so the weights say what a failure takes away from what a robot
can do: one that stands still does nothing of it, a ground that changes hinders it least. Chosen by hand on development videos."""
