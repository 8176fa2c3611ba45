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
    from jidm.sim.collision import FreeSpace

_CONTROL_RATE = 240.0  # [1/s] at which the joints are controlled, PyBullet's usual one


@dataclass(frozen=True, eq=False)
class Replay:
    """What was executed.

    Attributes:
        q: (T, n) joint positions reached at the time of each command [rad or m].
        stop_frame: the frame at which the robot met itself or the floor and stayed; None if it did not.
    """

    q: NDArray[np.float64]
    stop_frame: int | None


def replay(embodiment: Embodiment, commands: ArrayLike, dt: float, *, is_free: FreeSpace | None = None) -> Replay:
    """Send joint positions to a robot that is at the first of them and on its way to the second.

    Between commands the target moves evenly; every joint keeps up with it as far as its speed and acceleration let it,
    within its range.

    Args:
        commands: (T, n) [rad or m].
        dt: time between them [s].
        is_free: says where the robot may be; everywhere if not given.

    Raises:
        InputError: fewer than two commands, of another shape, not finite, or dt not positive.
    """
    targets = np.asarray(commands, dtype=np.float64)
    if targets.ndim != 2 or targets.shape[1] != embodiment.n or len(targets) < 2:
        raise InputError(f"commands for '{embodiment.name}' have shape (T, {embodiment.n}), got {targets.shape}")
    if not np.isfinite(targets).all() or not 0 < dt < math.inf:
        raise InputError("commands must be finite and the time between them positive")
    targets = np.clip(targets, embodiment.lower, embodiment.upper)
    substeps = max(1, round(dt * _CONTROL_RATE))
    substep_dt = dt / substeps
    target_velocities = np.diff(targets, axis=0) / dt
    q, velocity = targets[0].copy(), np.clip(target_velocities[0], -embodiment.velocity, embodiment.velocity)
    positions, stop_frame = [q.copy()], None
    for t, (previous_target, target_velocity) in enumerate(zip(targets[:-1], target_velocities, strict=True), start=1):
        before = q.copy()
        for k in range(1, substeps + 1):
            velocity = _tracking_velocity(
                previous_target + target_velocity * (k * substep_dt) - q,
                target_velocity,
                velocity,
                embodiment,
                substep_dt,
            )
            q = np.clip(q + velocity * substep_dt, embodiment.lower, embodiment.upper)
        if is_free is not None and not is_free(q):
            stop_frame = t
            positions += [before] * (len(targets) - t)
            break
        positions.append(q.copy())
    return Replay(np.stack(positions), stop_frame)


def _tracking_velocity(
    position_error: NDArray[np.float64],
    target_velocity: NDArray[np.float64],
    velocity: NDArray[np.float64],
    robot: Embodiment,
    substep_dt: float,
) -> NDArray[np.float64]:
    """Speed (n,) for the next tick, by which a joint is with its target, or can still brake to the target's pace there."""
    tracking_error = position_error - target_velocity * substep_dt
    braking_velocity = np.sqrt(2 * robot.acceleration * np.abs(tracking_error))
    desired_velocity = target_velocity + np.sign(tracking_error) * np.minimum(
        np.abs(tracking_error) / substep_dt, braking_velocity
    )
    max_change = robot.acceleration * substep_dt
    return np.clip(
        np.clip(desired_velocity, -robot.velocity, robot.velocity), velocity - max_change, velocity + max_change
    )
