"""EVA's reward: smoothness of decoded actions and compliance with the robot's limits.

Formula and constants follow EVA, equations 5 to 9, and its authors' code; `eva_reward` says where the two differ. This
implementation is differentiable, takes any batch, and reports which actions could not be scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import InputError
from jidm.robot.embodiment import Embodiment
from jidm.robot.registry import load_embodiment

VELOCITY_FRACTION = 0.85
"""Allowed fraction of a joint's velocity limit."""
ACCELERATION = 5.0  # [rad/s^2]
GRIPPER_VELOCITY, GRIPPER_ACCELERATION = 2.0, 10.0  # [opening/s], [opening/s^2]
GRIPPER_WEIGHT = 0.2

P0 = 2000.0
"""Penalty at which the reward is 1 / sqrt(2) of its maximum, from EVA's code; see `EvaReward.median_penalty` for other videos."""
DECAY = 0.5

_HUBER_FRACTION = 0.5  # of the acceleration limit: where the Huber penalty turns from quadratic to linear
_WEIGHTS = {"jerk": 0.5, "acceleration": 0.25, "velocity": 2.0, "limits": 1.0}
MIN_FRAMES = 4
"""A jerk needs this many consecutive positions."""


@dataclass(frozen=True, eq=False)
class EvaLimits:
    """Joint limits in EVA's units.

    Attributes:
        velocity, acceleration: (n,) limits of the actions after division by `joint_scale` [1/s, 1/s^2].
        weight: (n,) relative weight of each joint.
        joint_scale: (n,) divisor of the actions: 1 rad or m, or the range of a gripper, whose opening is 0 to 1 in EVA.
    """

    velocity: Float[Tensor, " n"]
    acceleration: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    joint_scale: Float[Tensor, " n"]

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value.shape != self.velocity.shape or not bool((value > 0).all()) or bool(value.isnan().any()):
                raise InputError(f"EVA's limits must be positive, one per joint, got {f.name} {value.tolist()}")

    @classmethod
    def from_embodiment(cls, robot: Embodiment | str) -> EvaLimits:
        """EVA's constants, with velocity limits from the robot's descriptor.

        Args:
            robot: descriptor or registered name.
        """
        robot = load_embodiment(robot)
        gripper, span = robot.gripper_mask, robot.upper - robot.lower
        has_range = gripper & np.isfinite(span) & (span > 0)

        def per_joint(for_grippers: float, for_joints: float | NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(np.where(gripper, for_grippers, for_joints))

        return cls(
            velocity=per_joint(GRIPPER_VELOCITY, VELOCITY_FRACTION * robot.velocity),
            acceleration=per_joint(GRIPPER_ACCELERATION, ACCELERATION),
            weight=per_joint(GRIPPER_WEIGHT, 1.0),
            joint_scale=torch.from_numpy(np.where(has_range, span, 1.0)),
        )


@dataclass(frozen=True, eq=False)
class EvaReward:
    """EVA's reward of a batch of actions, and its parts.

    Attributes:
        reward: (*batch,) higher is better.
        penalty: (*batch,) P in `eva_reward`.
        jerk, acceleration, velocity, limits: (*batch,) the four parts of the penalty, unweighted.
        scored: (*batch,) whether there were 4 consecutive valid positions; if not, the reward is `fallback_reward`.
    """

    reward: Float[Tensor, "*batch"]
    penalty: Float[Tensor, "*batch"]
    jerk: Float[Tensor, "*batch"]
    acceleration: Float[Tensor, "*batch"]
    velocity: Float[Tensor, "*batch"]
    limits: Float[Tensor, "*batch"]
    scored: Bool[Tensor, "*batch"]

    def median_penalty(self) -> float:
        """Median penalty of the scored items. Used as `p0`, it gives the median video .71 of the highest reward.

        EVA's P0 is "estimated from roll-outs of the pretrained video model"; the paper does not say how.

        Raises:
            InputError: no item was scored, or most do not move.
        """
        penalties = self.penalty[self.scored]
        median = float(penalties.median()) if penalties.numel() else 0.0
        if not (math.isfinite(median) and median > 0):
            raise InputError("no median penalty: give actions that move, each with 4 consecutive valid positions")
        return median


def eva_reward(
    actions: Float[Tensor, "*batch T n"],
    limits: EvaLimits | Embodiment | str,
    dt: float,
    *,
    valid: Bool[Tensor, "*batch T"] | None = None,
    p0: float = P0,
    bounded: bool = False,
    fallback_reward: float | None = None,
) -> EvaReward:
    """EVA's reward of joint positions over time; differentiable.

    With velocities v, accelerations a and jerks j from finite differences, a Huber penalty h, and means over time and joints

        P = 0.5 mean h(j; 0.5 a_max / dt) + 0.25 mean h(a; 0.5 a_max) + 2 mean (|v| - v_max)_+^2 + mean (|a| - a_max)_+^2
        reward = 10 (1 + P / p0)^(-1/2)

    Args:
        actions: joint positions, one per frame [rad or m].
        limits: of the robot, or the robot itself.
        dt: time between frames [s].
        valid: which positions are known; non-finite ones never are. Differences that need an unknown position are left out
            of the means.
        p0: scale of the penalty; 2000 in EVA's code.
        bounded: omit the factor 10, as in the paper; the reward is then in (0, 1].
        fallback_reward: reward of an item without 4 consecutive valid positions.

    Raises:
        InputError: shapes do not fit, or an item cannot be scored and `fallback_reward` was not given.
    """
    limits = limits if isinstance(limits, EvaLimits) else EvaLimits.from_embodiment(limits)
    _check(actions, limits, dt, p0)
    v_max, a_max, weight, joint_scale = (getattr(limits, f.name).to(actions) for f in fields(limits))
    finite = actions.detach().isfinite().all(-1)
    known = finite if valid is None else finite & valid
    q = torch.where(known[..., None], actions, torch.zeros_like(actions)) / joint_scale
    weight = weight / weight.mean()

    def mean(penalty: Float[Tensor, "*batch S n"]) -> Float[Tensor, "*batch"]:
        complete = known.unfold(-1, actions.shape[-2] - penalty.shape[-2] + 1, 1).all(-1)
        total = torch.where(complete, (penalty * weight).mean(-1), 0.0).sum(-1)
        return total / complete.sum(-1).clamp(min=1)

    v = q.diff(dim=-2) / dt
    a = v.diff(dim=-2) / dt
    j = a.diff(dim=-2) / dt
    parts = {
        "jerk": mean(_huber(j, _HUBER_FRACTION * a_max / dt)),
        "acceleration": mean(_huber(a, _HUBER_FRACTION * a_max)),
        "velocity": mean((v.abs() - v_max).clamp(min=0).square()),
        "limits": mean((a.abs() - a_max).clamp(min=0).square()),
    }
    penalty = torch.stack([_WEIGHTS[name] * part for name, part in parts.items()]).sum(0)
    scored = known.unfold(-1, MIN_FRAMES, 1).all(-1).any(-1)
    reward = (1.0 if bounded else 10.0) * (1 + penalty / p0) ** -DECAY
    if not bool(scored.all()):
        if fallback_reward is None:
            which = "it" if scored.dim() == 0 else f"items {(~scored).nonzero()[:, 0].unique().tolist()}"
            raise InputError(
                f"{which} have no {MIN_FRAMES} consecutive valid positions; leave out such videos, or give their reward: "
                "fallback_reward=0.0"
            )
        reward = torch.where(scored, reward, torch.full_like(reward, fallback_reward))
    return EvaReward(reward, penalty, **parts, scored=scored)


def _huber(x: Tensor, delta: Float[Tensor, " n"]) -> Tensor:
    size = x.abs()
    return torch.where(size <= delta, x.square() / 2, delta * (size - delta / 2))


def _check(actions: Tensor, limits: EvaLimits, dt: float, p0: float) -> None:
    if actions.dim() < 2 or actions.shape[-1] != len(limits.velocity):
        raise InputError(
            f"actions must be (*batch, T, n) with n = {len(limits.velocity)} joints, got {tuple(actions.shape)}"
        )
    if actions.shape[-2] < MIN_FRAMES:
        raise InputError(
            f"EVA's reward needs at least {MIN_FRAMES} frames, got {actions.shape[-2]}; score longer videos"
        )
    if not (math.isfinite(dt) and dt > 0 and p0 > 0):
        raise InputError(f"dt and p0 must be positive, got {dt} and {p0}")
