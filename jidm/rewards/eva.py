"""EVA's reward: how smooth decoded actions are, and how well they keep to a robot's limits.

Formula and constants: EVA, equations 5 to 9, and its authors' code, where the two differ as said in `eva_reward`. Here it
is differentiable, takes any batch, and says which actions it could not judge.
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
"""Share of a joint's velocity limit that is allowed."""
ACCELERATION = 5.0  # [rad/s^2]
GRIPPER_VELOCITY, GRIPPER_ACCELERATION = 2.0, 10.0  # [opening/s], [opening/s^2]
GRIPPER_WEIGHT = 0.2

P0 = 2000.0
"""Penalty at which the reward has fallen to 1 / sqrt(2): the code's; see `EvaReward.usual_penalty` for one's own videos."""
DECAY = 0.5

_HUBER_FRACTION = 0.5  # of the acceleration limit, where the penalty of an acceleration turns from square to linear
_WEIGHTS = {"jerk": 0.5, "acceleration": 0.25, "velocity": 2.0, "limits": 1.0}
MIN_FRAMES = 4
"""A jerk needs so many positions in a row."""


@dataclass(frozen=True, eq=False)
class EvaLimits:
    """What a robot's joints may do, as EVA counts it.

    Attributes:
        velocity, acceleration: (n,) largest allowed, of actions divided by `joint_scale` [1/s, 1/s^2].
        weight: (n,) how much each joint counts; only ratios matter.
        joint_scale: (n,) what actions are divided by first: 1 rad or m, and a gripper's opening, which EVA tells from 0 to 1.
    """

    velocity: Float[Tensor, " n"]
    acceleration: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    joint_scale: Float[Tensor, " n"]

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value.shape != self.velocity.shape or not bool((value > 0).all()) or bool(value.isnan().any()):
                raise InputError(f"EVA's limits must be positive and one per joint, got {f.name} {value.tolist()}")

    @classmethod
    def from_embodiment(
        cls, robot: Embodiment | str, *, velocity_fraction: float = VELOCITY_FRACTION, acceleration: float = ACCELERATION,
        gripper_velocity: float = GRIPPER_VELOCITY, gripper_acceleration: float = GRIPPER_ACCELERATION,
        gripper_weight: float = GRIPPER_WEIGHT,
    ) -> EvaLimits:  # fmt: skip
        """Those of a robot: EVA's constants, with velocities from the robot's descriptor.

        Args:
            velocity_fraction: share of the descriptor's velocity limits that is allowed.
            acceleration: of every joint but grippers [rad/s^2 or m/s^2].
            gripper_velocity, gripper_acceleration: of an opening that goes from 0 to 1 [1/s, 1/s^2].
            gripper_weight: what a gripper counts beside a joint's 1.
        """
        robot = load_embodiment(robot)
        gripper, opening = robot.gripper_mask, robot.upper - robot.lower
        opens = gripper & np.isfinite(opening) & (opening > 0)

        def per_joint(for_grippers: float, for_joints: float | NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(np.where(gripper, for_grippers, for_joints))

        return cls(
            velocity=per_joint(gripper_velocity, velocity_fraction * robot.velocity),
            acceleration=per_joint(gripper_acceleration, acceleration),
            weight=per_joint(gripper_weight, 1.0),
            joint_scale=torch.from_numpy(np.where(opens, opening, 1.0)),
        )


@dataclass(frozen=True, eq=False)
class EvaReward:
    """What EVA's reward says of a batch of actions, and of what it is made.

    Attributes:
        reward: (*batch,) higher is better. penalty: (*batch,) what it falls by.
        jerk, acceleration, velocity, limits: (*batch,) the penalty's four parts before they are weighed.
        scored: (*batch,) whether there were 4 valid positions in a row; else the reward is what the caller said.
    """

    reward: Float[Tensor, "*batch"]
    penalty: Float[Tensor, "*batch"]
    jerk: Float[Tensor, "*batch"]
    acceleration: Float[Tensor, "*batch"]
    velocity: Float[Tensor, "*batch"]
    limits: Float[Tensor, "*batch"]
    scored: Bool[Tensor, "*batch"]

    def median_penalty(self) -> float:
        """The median penalty of what was judged: as `p0` it gives the middling video of a model .71 of the highest reward.

        EVA's P0 is "estimated from roll-outs of the pretrained video model"; the paper does not say how.

        Raises:
            InputError: nothing was judged, or most of it does not move.
        """
        known = self.penalty[self.scored]
        middle = float(known.median()) if known.numel() else 0.0
        if not (math.isfinite(middle) and middle > 0):
            raise InputError("no usual penalty: give actions that move, each with 4 valid positions in a row")
        return middle


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
    """EVA's reward of joint positions over time, differentiable.

    With velocities v, accelerations a and jerks j by finite differences and h a Huber penalty, over time and joints

        P = 0.5 mean h(j; 0.5 a_max / dt) + 0.25 mean h(a; 0.5 a_max) + 2 mean (|v| - v_max)_+^2 + mean (|a| - a_max)_+^2
        reward = 10 (1 + P / p0)^(-1/2)

    Args:
        actions: joint positions, one per frame [rad or m].
        limits: of the robot, or the robot.
        dt: time between frames [s].
        valid: which positions are known; those that are not finite are not. Differences that would need another are
            left out of the means.
        p0: scale of penalties; 2000 in the code.
        bounded: without the factor 10, as the paper writes it, in (0, 1].
        fallback_reward: reward of an item without 4 valid positions in a row.

    Raises:
        InputError: shapes do not fit, or an item cannot be judged and `fallback_reward` was not given.
    """
    limits = limits if isinstance(limits, EvaLimits) else EvaLimits.from_embodiment(limits)
    _check(actions, limits, dt, p0)
    v_max, a_max, weight, joint_scale = (getattr(limits, f.name).to(actions) for f in fields(limits))
    known = actions.detach().isfinite().all(-1)
    known = known if valid is None else known & valid
    at = torch.where(known[..., None], actions, torch.zeros_like(actions)) / joint_scale
    weight = weight / weight.mean()

    def mean(penalty: Float[Tensor, "*batch S n"]) -> Float[Tensor, "*batch"]:
        counts = known.unfold(-1, actions.shape[-2] - penalty.shape[-2] + 1, 1).all(-1)
        total = torch.where(counts, (penalty * weight).mean(-1), 0.0).sum(-1)
        return total / counts.sum(-1).clamp(min=1)

    v = at.diff(dim=-2) / dt
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
                f"{which} have no {MIN_FRAMES} valid positions in a row to judge; leave out such videos, or say what "
                "they are worth: unjudged=0.0"
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
