"""Kinematic replay of joint position commands: joints track them within their limits, and the robot stops at a collision.

Motors are ideal and there are no dynamics: no gravity and no compliance. The result therefore depends on the commands
alone (jumps, jitter, paths through the robot itself) and not on the gains of a simulated controller.
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
    from jidm.sim.babble_motion import IsFree

_CONTROL_RATE = 240.0  # rate of the joints' controllers [1/s], PyBullet's default


@dataclass(frozen=True, eq=False)
class Replay:
    """The executed motion.

    Attributes:
        q: (T, n) joint positions reached at the time of each command [rad or m].
        stop_frame: frame of the first collision, at which the robot stops; None if there is none.
    """

    q: NDArray[np.float64]
    stop_frame: int | None


def replay(embodiment: Embodiment, commands: ArrayLike, dt: float, *, is_free: IsFree | None = None) -> Replay:
    """Send joint positions to a robot that is at the first of them and moves toward the second.

    The target is interpolated linearly between commands. Every joint tracks it as fast as its velocity and acceleration
    limits allow, inside its position limits.

    Args:
        commands: (T, n) joint positions [rad or m].
        dt: time between commands [s].
        is_free: whether the robot is free of collisions at joint positions (n,), e.g. a `FreeSpace`; not checked if
            not given.

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
            position_error = previous_target + target_velocity * (k * substep_dt) - q
            velocity = _tracking_velocity(position_error, target_velocity, velocity, embodiment, substep_dt)
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
    """Velocity (n,) for the next substep: time-optimal tracking.

    A joint reaches its target within the substep, or moves as fast as it can while it is still able to brake to the
    target's velocity when it gets there.
    """
    tracking_error = position_error - target_velocity * substep_dt
    distance = np.abs(tracking_error)
    speed = np.minimum(
        distance / substep_dt, np.sqrt(2 * robot.acceleration * distance)
    )  # arrive, or still able to brake
    desired = np.clip(target_velocity + np.sign(tracking_error) * speed, -robot.velocity, robot.velocity)
    max_change = robot.acceleration * substep_dt
    return np.clip(desired, velocity - max_change, velocity + max_change)
