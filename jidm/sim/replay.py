"""What a robot does when it is sent joint positions: follow them as far as its limits let it, and stop where it collides.

The joints' own controllers are taken as good: they weigh nothing out and nothing gives. So what is left of commands that
jump, tremble or lead through the robot itself is told apart from how well some simulated motor is tuned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment
    from jidm.sim.freespace import FreeSpace

_RATE = 240.0  # [1/s] at which the joints are controlled, PyBullet's usual one


@dataclass(frozen=True, eq=False)
class Replay:
    """What was executed.

    Attributes:
        q: (T, n) joint positions reached at the time of each command [rad or m].
        stopped: the frame at which the robot met itself or the floor and stayed; None if it did not.
    """

    q: NDArray[np.float64]
    stopped: int | None


def replay(embodiment: Embodiment, commands: ArrayLike, dt: float, *, free: FreeSpace | None = None) -> Replay:
    """Send joint positions to a robot that is at the first of them and on its way to the second.

    Between commands the target moves evenly; every joint keeps up with it as far as its speed and acceleration let it,
    within its range.

    Args:
        commands: (T, n) [rad or m].
        dt: time between them [s].
        free: says where the robot may be; everywhere if not given.

    Raises:
        InputError: fewer than two commands, of another shape, not finite, or dt not positive.
    """
    wanted = np.asarray(commands, dtype=np.float64)
    if wanted.ndim != 2 or wanted.shape[1] != embodiment.n or len(wanted) < 2:
        raise InputError(f"commands for '{embodiment.name}' have shape (T, {embodiment.n}), got {wanted.shape}")
    if not np.isfinite(wanted).all() or not 0 < dt < math.inf:
        raise InputError("commands must be finite and the time between them positive")
    wanted = np.clip(wanted, embodiment.lower, embodiment.upper)
    substeps = max(1, round(dt * _RATE))
    tick = dt / substeps
    steady = np.diff(wanted, axis=0) / dt
    q, speed = wanted[0].copy(), np.clip(steady[0], -embodiment.velocity, embodiment.velocity)
    reached, stopped = [q.copy()], None
    for t, (last, pace) in enumerate(zip(wanted[:-1], steady, strict=True), start=1):
        before = q.copy()
        for k in range(1, substeps + 1):
            speed = _keeping_up(last + pace * (k * tick) - q, pace, speed, embodiment, tick)
            q = np.clip(q + speed * tick, embodiment.lower, embodiment.upper)
        if free is not None and not free(q):
            stopped = t
            reached += [before] * (len(wanted) - t)
            break
        reached.append(q.copy())
    return Replay(np.stack(reached), stopped)


def _keeping_up(
    ahead: NDArray[np.float64], pace: NDArray[np.float64], speed: NDArray[np.float64], robot: Embodiment, tick: float
) -> NDArray[np.float64]:
    """Speed (n,) for the next tick, by which a joint is with its target, or can still brake to the target's pace there."""
    behind = ahead - pace * tick
    brakes = np.sqrt(2 * robot.acceleration * np.abs(behind))
    there = pace + np.sign(behind) * np.minimum(np.abs(behind) / tick, brakes)
    change = robot.acceleration * tick
    return np.clip(np.clip(there, -robot.velocity, robot.velocity), speed - change, speed + change)
