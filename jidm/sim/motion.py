"""Smooth random joint trajectories that keep inside position, velocity and acceleration limits by construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

_NUM_WAVES = 4
"""Sine waves per joint."""


def smooth_motion(
    embodiment: Embodiment,
    frames: int,
    dt: float,
    seed: int,
    *,
    amplitude: ArrayLike | None = None,
    scale: float = 1.0,
    joints: Sequence[str] | None = None,
    start: ArrayLike | None = None,
    band: tuple[float, float] = (0.08, 0.5),
    margin: float = 0.9,
) -> NDArray[np.float64]:
    """A random trajectory of joint positions, a sum of four sine waves per joint.

    Each joint is `centre + amplitude * sum_k w_k sin(2 pi f_k t + phase_k)` with `w_k > 0` adding up to 1, so it never
    leaves `centre +- amplitude`, and its speed never exceeds `amplitude * sum_k w_k 2 pi f_k`. Where that (or the same
    bound on acceleration and jerk) is above the joint's limit, the joint's frequencies are lowered.

    Args:
        frames: number of rows T.
        dt: time between rows [s].
        seed: same seed, same motion, whatever T is.
        amplitude: (n,) or one number, largest distance from the centre [rad or m]; the embodiment's self-play
            amplitudes if not given. Cut where the limits leave less room.
        scale: factor on the amplitudes.
        joints: names of the joints that move; all if not given. The others rest at `start` or at home.
        start: (n,) joint positions of the first row; if not given the motion starts anywhere on its path about home.
        band: lowest and highest frequency [Hz].
        margin: share of position range (about its middle), velocity, acceleration and jerk limits that may be used.

    Returns:
        q (T, n), order of `embodiment.joint_names` [rad or m].

    Raises:
        InputError: an argument has no meaning or `start` is outside the limits.
    """
    n = embodiment.n
    if frames < 1 or not dt > 0 or not 0 < band[0] <= band[1] or not 0 < margin <= 1:
        raise InputError("smooth_motion needs frames >= 1, dt > 0, 0 < band[0] <= band[1] and 0 < margin <= 1")
    rng = np.random.default_rng([abs(seed), 0x5A])
    weight = rng.uniform(0.4, 1.0, (n, _NUM_WAVES))
    weight /= weight.sum(axis=1, keepdims=True)
    frequency = np.exp(rng.uniform(np.log(band[0]), np.log(band[1]), (n, _NUM_WAVES)))
    phase = rng.uniform(-np.pi, np.pi, (n, _NUM_WAVES))
    for name in joints or ():
        embodiment.joint_index(name)  # names the alternatives when it is wrong
    moves = np.array([joints is None or name in joints for name in embodiment.joint_names])
    center, half_range = _center_and_half_range(embodiment, amplitude, scale * moves, start, margin)
    omega = 2 * np.pi * frequency
    for order, limit in enumerate((embodiment.velocity, embodiment.acceleration, embodiment.jerk), start=1):
        peak = half_range * (weight * omega**order).sum(axis=1)
        slowdown = np.where(peak > margin * limit, margin * limit / np.maximum(peak, 1e-300), 1.0) ** (1 / order)
        omega = omega * slowdown[:, None]
    if start is not None:
        # Equal height in every wave puts their weighted sum at that height; rising or falling is left to chance.
        q0 = np.asarray(start, dtype=np.float64)
        initial_height = np.divide(q0 - center, half_range, out=np.zeros(n), where=half_range > 0).clip(-1, 1)
        rising = np.arcsin(initial_height)[:, None]
        phase = np.where(phase > 0, rising, np.pi - rising)
        center = np.where(half_range > 0, center, q0)
    time = np.arange(frames) * dt
    waves = np.sin(omega[None] * time[:, None, None] + phase[None])
    return center + half_range * (weight * waves).sum(axis=-1)


def _center_and_half_range(
    embodiment: Embodiment,
    amplitude: ArrayLike | None,
    scale: NDArray[np.float64],
    start: ArrayLike | None,
    margin: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre and amplitude (n,) of the motion, inside `margin` of the position range."""
    n, lower, upper = embodiment.n, embodiment.lower, embodiment.upper
    requested = np.asarray(embodiment.exploration_range if amplitude is None else amplitude, dtype=np.float64)
    if (
        requested.shape not in ((), (n,))
        or not np.isfinite(requested).all()
        or (requested < 0).any()
        or not (scale >= 0).all()
    ):
        raise InputError(f"amplitude must be {n} finite numbers >= 0, or one, and scale >= 0")
    home = np.asarray(embodiment.home if start is None else start, dtype=np.float64)
    if home.shape != (n,) or not embodiment.within_limits(home).all():
        raise InputError(f"start must be {n} joint positions inside the limits of '{embodiment.name}'")
    bounded = np.isfinite(lower) & np.isfinite(upper)
    slack = np.where(bounded, (1 - margin) / 2 * np.where(bounded, upper - lower, 0.0), 0.0)
    # A start close to a limit is allowed: the room is widened just enough to hold it.
    low, high = np.minimum(lower + slack, home), np.maximum(upper - slack, home)
    half_range = np.minimum(np.broadcast_to(requested * scale, (n,)), (high - low) / 2)
    return np.clip(home, low + half_range, high - half_range), half_range
