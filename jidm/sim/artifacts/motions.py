"""What goes wrong in the motion: jumps, jitter, a robot that stands still, is suddenly elsewhere, or goes somewhere else.

Each takes a take, a strength in (0, 1] and a generator, and returns joint positions (T, n) that no real robot was asked
for, with what it did; the robot is then filmed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.sim.artifacts.take import Take

Label = dict[str, Any]
Motion = NDArray[np.float64]

_JUMP = 0.8  # [rad], or the same share of a radian of a prismatic joint's range
_JITTER = 0.1  # [rad] standard deviation
_ELSEWHERE = 1.2  # [rad]
_WRONG = 1.0  # [rad]


def jumping(take: Take, strength: float, rng: np.random.Generator) -> tuple[Motion, Label]:
    """One joint is elsewhere from one frame to the next, and stays there."""
    begins, joint = _begins(take, rng), _joint(take, rng)
    offset = np.zeros(take.q.shape[1])
    offset[joint] = _JUMP * strength * rng.choice([-1, 1]) * _unit(take)[joint]
    return _from(take, begins, offset), {"begins": begins, "joint": take.robot.joint_names[joint]}


def jittering(take: Take, strength: float, rng: np.random.Generator) -> tuple[Motion, Label]:
    """All joints tremble."""
    sigma = _JITTER * strength
    return _within(take, take.q + sigma * _unit(take) * rng.standard_normal(take.q.shape)), {
        "begins": 0,
        "sigma": sigma,
    }


def frozen(take: Take, strength: float, rng: np.random.Generator) -> tuple[Motion, Label]:
    """The robot stands still, at full strength from the first frame on."""
    begins = round((1 - strength) * (len(take) - 1))
    return np.concatenate([take.q[:begins], np.repeat(take.q[begins : begins + 1], len(take) - begins, 0)]), {
        "begins": begins
    }


def teleported(take: Take, strength: float, rng: np.random.Generator) -> tuple[Motion, Label]:
    """The whole robot is in another pose from one frame to the next."""
    begins = _begins(take, rng)
    offset = _ELSEWHERE * strength * rng.uniform(0.5, 1, take.q.shape[1]) * rng.choice([-1, 1], take.q.shape[1])
    return _from(take, begins, offset * _unit(take)), {"begins": begins}


def late(take: Take, strength: float, rng: np.random.Generator) -> tuple[Motion, Label]:
    """The robot sets off late and does not arrive; a robot that moves rightly, as far as pictures tell."""
    waits = round(strength * (len(take) - 1) / 2)
    return take.q[np.maximum(np.arange(len(take)) - waits, 0)], {"begins": 0, "frames": waits}


def wrong_goal(take: Take, strength: float, rng: np.random.Generator) -> tuple[Motion, Label]:
    """The robot goes somewhere else, smoothly; a robot that moves rightly, as far as pictures tell."""
    offset = _WRONG * strength * rng.uniform(0.5, 1, take.q.shape[1]) * rng.choice([-1, 1], take.q.shape[1])
    x = np.linspace(0, 1, len(take))[:, None]
    return _within(take, take.q + x * x * (3 - 2 * x) * offset * _unit(take)), {"begins": 0}


MOTIONS: dict[str, Callable[[Take, float, np.random.Generator], tuple[Motion, Label]]] = {
    "jump": jumping,
    "jitter": jittering,
    "frozen": frozen,
    "teleport": teleported,
    "late": late,
    "wrong_goal": wrong_goal,
}
"""Name -> what does it."""


def _unit(take: Take) -> NDArray[np.float64]:
    """(n,) 1 rad; of prismatic joints half their range [m]."""
    robot = take.robot
    slides = np.array([t == "prismatic" for t in robot.joint_types])
    half = (robot.upper - robot.lower) / 2
    return np.where(slides & np.isfinite(half), half, 1.0)


def _begins(take: Take, rng: np.random.Generator) -> int:
    return int(rng.integers(len(take) // 4, max(len(take) // 4 + 1, 3 * len(take) // 4)))


def _joint(take: Take, rng: np.random.Generator) -> int:
    """One that is no gripper."""
    return int(rng.choice(np.flatnonzero(~take.robot.gripper_mask)))


def _from(take: Take, begins: int, offset: NDArray[np.float64]) -> Motion:
    """Moved by an offset from a frame on, to the other side where the limits do not let it."""
    later = take.q[begins:]
    blocked = ((later + offset < take.robot.lower) | (later + offset > take.robot.upper)).any(0)
    return _within(take, np.concatenate([take.q[:begins], later + np.where(blocked, -offset, offset)]))


def _within(take: Take, q: Motion) -> Motion:
    return np.clip(q, take.robot.lower, take.robot.upper)
