"""What can be wrong with a video of a robot, each on its own scale: frame by frame and joint by joint.

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

from jidm.adapters.reward.evidence import Evidence
from jidm.errors import InputError
from jidm.joint_motion import JointMotion

_WORST = 0.1  # share of the frames by which a video is judged: a jump is over in one frame, a robot that melts melts on
_LEAST_MOTION = 0.3  # [cells rms] added to the robot's motion before what is unexplained is divided by it
_STILL = 0.1  # of the robot's usual motion: steps that are smaller are none


@dataclass(frozen=True, eq=False)
class Raw:
    """One term of one video.

    Attributes:
        value: (T-1,) per step, larger is worse; finite.
        by_joint: (T-1, n) the same shared out among the joints; None where no joint is to blame.
    """

    value: Float[Tensor, " S"]
    by_joint: Float[Tensor, "S n"] | None = None

    @property
    def worst(self) -> Float[Tensor, ""]:
        """Mean over the worst tenth of the steps."""
        count = max(1, round(_WORST * len(self.value)))
        return self.value.topk(count).values.mean()


@dataclass(frozen=True)
class Term:
    """A kind of failure.

    Attributes:
        raw: reads it off a motion and the evidence around it; of the latter None where the decoder has no field.
        weight: what it takes off the reward, in units of EVA's P0, when it is as bad as can be.
        says: of a joint, a value and whatever it goes wrong by, in words; `{joint}` and `{value}` are filled in.
    """

    raw: Callable[[JointMotion, Evidence], Raw]
    weight: float
    says: str


@dataclass(frozen=True)
class Scale:
    """How large a term's `worst` is in good videos.

    Attributes:
        usual: the median. far: distance from there to the 90th percentile.
    """

    usual: float
    far: float

    @classmethod
    def of(cls, worst: Sequence[float]) -> Scale:
        """From good videos.

        Raises:
            InputError: there are fewer than 5.
        """
        if len(worst) < 5:
            raise InputError(f"a scale needs at least 5 good videos, got {len(worst)}")
        values = torch.tensor(worst, dtype=torch.float64)
        usual = float(values.median())
        return cls(usual, max(float(values.quantile(0.9)) - usual, 0.05 * abs(usual), 1e-6))

    def penalty(self, value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """In [0, 1): 0 for what the better half of good videos has, .63 four times as far off as one in ten of them."""
        return 1 - torch.exp(-((value - self.usual).clamp(min=0) / (4 * self.far)))


def residual(motion: JointMotion, seen: Evidence) -> Raw:
    """Motion of the robot that brightness asks for beyond the step, relative to its motion."""
    base = seen.motion + _LEAST_MOTION
    return Raw(seen.unexplained / base, seen.unexplained_by / base[:, None].square())


def shape(motion: JointMotion, seen: Evidence) -> Raw:
    """Robot where the field says there is none, and background where it says there is robot."""
    return Raw((seen.outside + seen.gone)[1:], (seen.outside_by + seen.gone_by)[1:])


def background(motion: JointMotion, seen: Evidence) -> Raw:
    """Change of colour where no robot is."""
    return Raw(seen.behind)


def jump(motion: JointMotion, seen: Evidence) -> Raw:
    """Change of velocity from step to step, in what the joints' velocity limits allow in a second; of the worst joint."""
    change = motion.velocity.diff(dim=-2).abs()
    change = torch.cat([torch.zeros_like(change[:1]), change])
    usual = motion.velocity.abs().mean(-2).clamp(min=1e-3) + motion.velocity.abs().mean()
    relative = change / usual
    return Raw(relative.amax(-1), relative)


def still(motion: JointMotion, seen: Evidence) -> Raw:
    """1 for a step that moves next to nothing, 0 for one that moves; of the whole video the share, for every step."""
    size = seen.motion
    rests = (size < _STILL).to(size)
    return Raw(rests.mean().expand_as(size).clone())


TERMS: Mapping[str, Term] = {
    "residual": Term(residual, 4.0, "{joint} moved by {value:.2f} of the robot's motion more than any joint explains"),
    "shape": Term(shape, 4.0, "{joint} grew or vanished: {value:.0%} of the robot is not where its joints put it"),
    "background": Term(background, 1.0, "the background changed by {value:.3f} of full brightness"),
    "jump": Term(jump, 2.0, "{joint} changed its speed by {value:.1f} times its usual speed"),
    "still": Term(still, 1.0, "the robot stands still in {value:.0%} of the steps"),
}
"""Name -> kind of failure."""


def said(term: Term, raw: Raw, step: int, joint_names: Sequence[str]) -> str:
    """A step's failure in words."""
    values: dict[str, Any] = {"value": float(raw.value[step])}
    values["joint"] = "the robot" if raw.by_joint is None else joint_names[int(raw.by_joint[step].argmax())]
    return f"frame {step + 1}: {term.says.format(**values)}"
