"""Random joint motions for motor babbling, for a simulated robot or a real one: no simulator is needed here.

A motion is a sum of sine waves per joint. Over many seeds the motions cover the whole usable range at many speeds and
amplitudes. Limits on velocity, acceleration and jerk are kept by bounds of the waves, not by clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError
from jidm.sim.motion import NUM_WAVES, SineWaves, derivative_limits, log_uniform

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

IsFree = Callable[[NDArray[np.float64]], bool]
"""Whether a robot is free of collisions at joint positions (n,) [rad or m]."""

_FREQUENCY_BAND = (0.1, 0.7)  # lowest and highest frequency [Hz] at medium tempo
_AMPLITUDE_RANGE = (0.4, 1.6)  # fractions of half the usable range; waves that exceed the range are scaled down to it
_SINGLE_JOINT_FRACTION = 1 / 8  # of motions, in which one joint moves
_SUBSET_FRACTION = 1 / 8  # of motions, in which some joints move
_MAX_ATTEMPTS = 300
_NUM_PLACEMENTS = 8  # random offsets at which a motion is tried; at the last one it may be scaled down
_SHRINK_FACTORS = (0.6, 0.3)  # by which it is scaled about one of its collision-free rows


def usable_range(embodiment: Embodiment, fraction: float = 1.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest position (n,) that babbling goes to [rad or m].

    The middle 95 % of a joint's limits, or of half a turn to either side of home where there are none, widened to hold
    home. Of that, `fraction` about home.
    """
    home = np.array(embodiment.home, dtype=np.float64)
    bounded = np.isfinite(embodiment.lower) & np.isfinite(embodiment.upper)
    low = np.where(bounded, embodiment.lower, home - np.pi)
    high = np.where(bounded, embodiment.upper, home + np.pi)
    slack = 0.025 * (high - low)
    low, high = np.minimum(low + slack, home), np.maximum(high - slack, home)
    return home - fraction * (home - low), home + fraction * (high - home)


def babble_motion(
    embodiment: Embodiment,
    frames: int,
    dt: float,
    seed: int,
    *,
    range_fraction: float = 1.0,
    speed: float = 1.0,
    is_free: IsFree | None = None,
) -> NDArray[np.float64]:
    """A random motion for motor babbling: anywhere in the usable range, large or small, fast or slow.

    All joints move in three quarters of the motions, some in an eighth, and a single one in an eighth. The others rest
    at a random position. Positions, velocities, accelerations and jerks keep the embodiment's limits.

    Args:
        frames: number of rows T.
        dt: time between rows [s].
        seed: same arguments, same motion.
        range_fraction: fraction of the usable range (see `usable_range`) that is covered, in (0, 1].
        speed: factor on the frequencies; limits hold at any.
        is_free: collision check. A motion with a colliding row is tried at other offsets, then scaled down about a
            collision-free row, then drawn anew.

    Returns:
        q (T, n), order of `embodiment.joint_names` [rad or m].

    Raises:
        InputError: an argument is out of range, or no collision-free motion was found.
    """
    if frames < 1 or not dt > 0 or not speed > 0 or not 0 < range_fraction <= 1:
        raise InputError("babble_motion needs frames >= 1, dt > 0, speed > 0 and a range_fraction in (0, 1]")
    lower, upper = usable_range(embodiment, range_fraction)
    time = np.arange(frames, dtype=np.float64) * dt
    for attempt in range(_MAX_ATTEMPTS):
        rng = np.random.default_rng([abs(seed), attempt, 0xBAB])
        q = _random_waves(embodiment, (upper - lower) / 2, speed, rng).evaluate(time)
        q = q * np.minimum(1.0, (upper - lower) / np.maximum(np.ptp(q, axis=0), 1e-300))
        for placement in range(_NUM_PLACEMENTS):
            shifted = _shifted_into_range(q, lower, upper, rng)
            if is_free is None:
                return shifted
            free = _made_collision_free(shifted, is_free, shrink=placement == _NUM_PLACEMENTS - 1)
            if free is not None:
                return free
    raise InputError(
        f"no free motion of '{embodiment.name}' in {_MAX_ATTEMPTS} attempts; is_free refuses too much, or the "
        f"range_fraction {range_fraction:g} is too large"
    )


def _random_waves(
    embodiment: Embodiment, half_range: NDArray[np.float64], speed: float, rng: np.random.Generator
) -> SineWaves:
    """Waves of about `half_range` (n,) in size, slow enough for the limits."""
    n = embodiment.n
    kind = rng.random()
    moves = np.ones(n, dtype=bool)
    if kind < _SINGLE_JOINT_FRACTION:
        moves = np.arange(n) == rng.integers(n)
    elif kind < _SINGLE_JOINT_FRACTION + _SUBSET_FRACTION:
        moves = rng.random(n) < 0.5
    # Log-normal weights: often one wave dominates and reaches its whole amplitude, which a mixture seldom does.
    weight = np.exp(rng.normal(0, 1.5, (n, NUM_WAVES)))
    weight /= weight.sum(axis=1, keepdims=True)
    amplitude = log_uniform(rng, *_AMPLITUDE_RANGE) * rng.uniform(0.4, 1.0, n) * half_range * moves
    tempo = speed * log_uniform(rng, 0.5, 1.5)
    frequency = tempo * log_uniform(rng, *_FREQUENCY_BAND, (n, NUM_WAVES))
    phase = rng.uniform(-np.pi, np.pi, (n, NUM_WAVES))
    waves = SineWaves(amplitude[:, None] * weight, 2 * np.pi * frequency, phase)
    return waves.slowed(derivative_limits(embodiment))


def _shifted_into_range(
    q: NDArray[np.float64], lower: NDArray[np.float64], upper: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """The motion shifted by random offsets that keep it between the bounds (n,)."""
    n = q.shape[-1]
    # Half of the offsets favor the ends of the range, where waves spend little time.
    offset = np.where(rng.random(n) < 0.5, rng.random(n), rng.beta(0.4, 0.4, n))
    low, high = lower - q.min(axis=0), upper - q.max(axis=0)
    shifted: NDArray[np.float64] = (q + low + offset * (high - low)).clip(lower, upper)  # clips rounding errors alone
    return shifted


def _made_collision_free(q: NDArray[np.float64], is_free: IsFree, *, shrink: bool) -> NDArray[np.float64] | None:
    """The motion if it is collision-free; else, if asked to shrink, the motion scaled down about a collision-free row; else
    None."""
    order = _coarse_first(len(q))
    if all(is_free(q[k]) for k in order):
        return q
    free_row = next((q[k] for k in order[:8] if is_free(q[k])), None) if shrink else None
    if free_row is None:
        return None
    for factor in _SHRINK_FACTORS:
        shrunk: NDArray[np.float64] = free_row + factor * (q - free_row)
        if all(is_free(shrunk[k]) for k in order):
            return shrunk
    return None


def _coarse_first(count: int) -> list[int]:
    """0 to count - 1 from coarse to fine steps, so that a collision is found early."""
    order: dict[int, None] = {}
    stride = 1 << max(count - 1, 0).bit_length()
    while stride:
        order.update(dict.fromkeys(range(0, count, stride)))
        stride //= 2
    return list(order)
