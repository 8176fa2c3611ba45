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

from jidm.adapters.reward.reading import EVERY, Reading
from jidm.errors import InputError

_WORST = 0.1  # share of the steps by which a video is judged: a jump is over in one frame, a robot that melts melts on
_LEAST_MOTION = 0.3  # [cells rms] added to the robot's motion before what is unexplained is divided by it
_STILL = 0.1  # [cells rms] steps that move the robot less are none
_LOST = 1.0  # what is unexplained, relative to the motion, of a step that could not be measured
_FAR = 3.0  # distances from the usual to the 90th percentile at which .63 is taken off
LEAST_VIDEOS = 5
"""A scale needs so many."""


@dataclass(frozen=True, eq=False)
class Raw:
    """One term of one video.

    Attributes:
        value: (S,) per step, larger is worse; finite.
        by_joint: (S, n) not negative, the same shared out among the joints in some unit; None where no joint is to blame.
    """

    value: Float[Tensor, " S"]
    by_joint: Float[Tensor, "S n"] | None = None

    @property
    def worst(self) -> Float[Tensor, ""]:
        """Mean over the worst tenth of the steps."""
        return self.value.topk(max(1, round(_WORST * len(self.value)))).values.mean()


@dataclass(frozen=True)
class Term:
    """A kind of failure.

    Attributes:
        raw: reads it off a video.
        weight: what it takes off the reward, in units of EVA's P0, when it is as bad as can be.
        least: difference that is worth nothing, even where good videos differ by less; in the term's unit.
        says: in words; `{joint}` and `{value}` are filled in.
    """

    raw: Callable[[Reading], Raw]
    weight: float
    least: float
    says: str

    def reason(self, raw: Raw, step: int, joint_names: Sequence[str]) -> str:
        """What is wrong with a step."""
        values: dict[str, Any] = {"value": float(raw.value[step].detach()), "joint": "the robot"}
        if raw.by_joint is not None:
            values["joint"] = joint_names[int(raw.by_joint[step].argmax())]
        return f"frame {step + 1}: {self.says.format(**values)}"


@dataclass(frozen=True)
class Scale:
    """How large a term's `worst` is in good videos.

    Attributes:
        usual: the median. far: distance from there to the 90th percentile.
    """

    usual: float
    far: float

    @classmethod
    def of(cls, worst: Sequence[float], least: float) -> Scale:
        """From good videos, never finer than `least`.

        Raises:
            InputError: there are fewer than 5.
        """
        if len(worst) < LEAST_VIDEOS:
            raise InputError(f"a scale needs at least {LEAST_VIDEOS} good videos, got {len(worst)}")
        values = torch.tensor(worst, dtype=torch.float64)
        usual = float(values.median())
        return cls(usual, max(float(values.quantile(0.9)) - usual, least))

    def penalty(self, value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """In [0, 1): 0 for what the better half of good videos has, .1 for one in ten of them, .63 three times as far off."""
        return 1 - torch.exp(-((value - self.usual).clamp(min=0) / (_FAR * self.far)).square())


def residual(video: Reading) -> Raw:
    """Motion of the robot that brightness asks for beyond the step, relative to its motion."""
    seen = video.seen
    base = seen.motion + _LEAST_MOTION
    share = seen.unexplained / base
    return Raw(torch.where(video.valid, share, share.clamp(min=_LOST)), seen.unexplained_by)


def appearance(video: Reading) -> Raw:
    """Change of the robot's brightness that no motion brings about, as motion, relative to its motion."""
    seen = video.seen
    return Raw(seen.changed / (seen.motion + _LEAST_MOTION), seen.changed_by)


def shape(video: Reading) -> Raw:
    """Robot where the field says there is none, and background where it says there is robot; of its size."""
    seen = video.seen
    return Raw((seen.outside + seen.gone)[1:], (seen.outside_by + seen.gone_by)[1:])


def background(video: Reading) -> Raw:
    """Change of colour where no robot is."""
    return Raw(video.seen.behind)


def jump(video: Reading) -> Raw:
    """Change of velocity from step to step, of the joints' speed limits; of the worst joint."""
    velocity = video.q.diff(dim=0) / video.dt / video.velocity
    change = velocity.diff(dim=0).abs()
    change = torch.cat([torch.zeros_like(velocity[:1]), change])
    return Raw(change.amax(-1), change)


def limits(video: Reading) -> Raw:
    """How far the worst joint is beyond its range [rad or m]."""
    beyond = torch.maximum(video.q - video.upper, video.lower - video.q).clamp(min=0)[1:]
    return Raw(beyond.amax(-1), beyond)


def still(video: Reading) -> Raw:
    """Share of the steps that move next to nothing; the same for every step."""
    rests = (video.seen.motion < _STILL).to(video.seen.motion)
    return Raw(rests.mean().expand_as(rests).clone())


def consistency(video: Reading) -> Raw:
    """How much another motion is read off every other frame running backwards; in a frame, of the joints' speed limits."""
    if video.back is None:
        raise InputError("consistency needs the video decoded backwards")
    apart = (video.q[::EVERY].diff(dim=0) - video.back.diff(dim=0)).abs() / (EVERY * video.dt) / video.velocity
    by_joint = torch.zeros_like(video.q[1:])
    by_joint[: EVERY * len(apart)] = apart.repeat_interleave(EVERY, 0)
    return Raw(by_joint.amax(-1), by_joint)


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
