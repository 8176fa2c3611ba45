"""Motions for self-play, for a simulated robot or a real one: nothing here knows of a simulator.

A motion is a sum of sine waves per joint, drawn so that all motions together cover the whole usable range at many
speeds and amplitudes, and kept inside the descriptor's limits on position, velocity, acceleration and jerk by the
bounds of its waves, not by clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

IsFree = Callable[[NDArray[np.float64]], bool]

_NUM_WAVES = 4
_LIMIT_FRACTION = 0.9  # share of velocity, acceleration and jerk limits that is used
_FREQUENCY_BAND = (0.1, 0.7)  # lowest and highest frequency [Hz] at medium tempo
_AMPLITUDE_RANGE = (
    0.4,
    1.6,
)  # amplitude as a share of half the usable range; waves that fill more than all of it are cut down
_SINGLE_JOINT_FRACTION, _SUBSET_FRACTION = 1 / 8, 1 / 8  # shares of motions in which one joint, or some of them, move
_MAX_ATTEMPTS = 300
_NUM_PLACEMENTS = 8  # at which a motion is tried before it is shrunk
_SHRINK_FACTORS = (0.6, 0.3)  # about one of its free poses


def usable_range(embodiment: Embodiment, fraction: float = 1.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) lowest and highest position that self-play goes to [rad or m].

    The middle nineteen twentieths of a joint's limits, half a turn to either side of home where there is none, widened
    to hold home; `fraction` of that about home.
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
    at_rest: bool = False,
) -> NDArray[np.float64]:
    """A random motion for self-play: anywhere in the usable range, large or small, fast or slow, all joints or one.

    In three quarters of the motions all joints move, in an eighth some of them, in an eighth a single one; the others
    rest somewhere in their range. Positions, velocities, accelerations and jerks keep the descriptor's limits.

    Args:
        frames: rows T.
        dt: time between rows [s].
        seed: same arguments, same motion.
        range_fraction: share of the usable range (see `usable_range`) that is covered, in (0, 1].
        speed: factor on the frequencies; limits hold at any.
        is_free: says whether the robot may be at joint positions (n,). A motion of which any row is not free is tried
            elsewhere, then shrunk about a free row, then drawn anew.
        at_rest: begin and end without velocity and acceleration, as a real robot must. It gets there by `travel`.

    Returns:
        q (T, n), order of `embodiment.joint_names` [rad or m].

    Raises:
        InputError: an argument has no meaning, or no free motion was found.
    """
    if frames < 1 or not dt > 0 or not speed > 0 or not 0 < range_fraction <= 1:
        raise InputError("self-play motion needs frames >= 1, dt > 0, speed > 0 and an amplitude in (0, 1]")
    lower, upper = usable_range(embodiment, range_fraction)
    for attempt in range(_MAX_ATTEMPTS):
        rng = np.random.default_rng([abs(seed), attempt, 0xBAB])
        waves = _draw_waves(embodiment, (upper - lower) / 2, speed, at_rest, rng)
        time = np.arange(frames, dtype=np.float64) * dt
        q = _time_scaled(embodiment, waves, time) if at_rest else waves.evaluate(time)
        q = q * np.minimum(1.0, (upper - lower) / np.maximum(np.ptp(q, axis=0), 1e-300))
        for place in range(_NUM_PLACEMENTS):
            placed = _shifted_into_range(q, lower, upper, rng)
            if is_free is None:
                return placed
            found = _made_collision_free(placed, is_free, shrink=place == _NUM_PLACEMENTS - 1)
            if found is not None:
                return found
    raise InputError(
        f"no free motion of '{embodiment.name}' in {_MAX_ATTEMPTS} attempts; is_free refuses too much, or the amplitude "
        f"{range_fraction:g} is too large"
    )


def minimum_jerk_motion(
    embodiment: Embodiment, start: ArrayLike, goal: ArrayLike, dt: float, *, is_free: IsFree | None = None
) -> NDArray[np.float64]:
    """From rest to rest in a straight line of joint space, as fast as limits allow: the way to a motion's first row.

    The profile is the fifth-order one of least jerk (Flash and Hogan 1985), whose peaks are 1.875 d / T in velocity,
    5.774 d / T^2 in acceleration and 60 d / T^3 in jerk for a distance d in time T.

    Args:
        start, goal: (n,) joint positions inside the limits [rad or m].
        dt: time between rows [s].
        is_free: as for `babble_motion`.

    Returns:
        q (T, n) [rad or m], first row `start`, last row `goal`.

    Raises:
        InputError: a pose is outside the limits, or the way is not free.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (start, goal))
    for name, x in (("start", a), ("goal", b)):
        if x.shape != (embodiment.n,) or not embodiment.within_limits(x).all():
            raise InputError(f"{name} must be {embodiment.n} joint positions inside the limits of '{embodiment.name}'")
    distance, time = np.abs(b - a), dt
    for order, (peak, limit) in enumerate(zip((1.875, 5.7736, 60.0), _limits(embodiment), strict=True), start=1):
        time = max(time, float(((peak * distance / limit) ** (1 / order)).max()))
    steps = int(np.ceil(time / dt))
    s = (np.arange(steps + 1) / steps)[:, None]
    q = a + (b - a) * s**3 * (10 - 15 * s + 6 * s**2)
    if is_free is not None and not all(is_free(row) for row in q):
        raise InputError(f"the straight way from start to goal is not free for '{embodiment.name}'; go by way of home")
    return q


@dataclass(frozen=True)
class _Waves:
    """`sum_k height[:, k] sin(omega[:, k] t + phase[:, k])` for n joints; arrays (n, waves)."""

    amplitude: NDArray[np.float64]
    omega: NDArray[np.float64]
    phase: NDArray[np.float64]

    def evaluate(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """(T, n) values at times (T,) [s]."""
        waves = np.sin(self.omega * time[:, None, None] + self.phase)
        values: NDArray[np.float64] = (self.amplitude * waves).sum(axis=-1)
        return values

    def derivative_bound(self, order: int) -> NDArray[np.float64]:
        """(n,) bound on the size of the order-th derivative at any time."""
        bound: NDArray[np.float64] = (self.amplitude * self.omega**order).sum(axis=-1)
        return bound


def _draw_waves(
    embodiment: Embodiment, half_range: NDArray[np.float64], speed: float, at_rest: bool, rng: np.random.Generator
) -> _Waves:
    """Waves of about `half_range` (n,) in size, slow enough for the limits."""
    n = embodiment.n
    kind = rng.random()
    moves = np.ones(n, dtype=bool)
    if kind < _SINGLE_JOINT_FRACTION:
        moves = np.arange(n) == rng.integers(n)
    elif kind < _SINGLE_JOINT_FRACTION + _SUBSET_FRACTION:
        moves = rng.random(n) < 0.5
    # One wave leads as often as several mix: a lone sine reaches its whole amplitude, a mixture seldom.
    weight = np.exp(rng.normal(0, 1.5, (n, _NUM_WAVES)))
    weight /= weight.sum(axis=1, keepdims=True)
    amplitude = np.exp(rng.uniform(*np.log(_AMPLITUDE_RANGE))) * rng.uniform(0.4, 1.0, n) * half_range * moves
    tempo = speed * np.exp(rng.uniform(np.log(0.5), np.log(1.5)))
    frequency = tempo * np.exp(rng.uniform(np.log(_FREQUENCY_BAND[0]), np.log(_FREQUENCY_BAND[1]), (n, _NUM_WAVES)))
    waves = _Waves(amplitude[:, None] * weight, 2 * np.pi * frequency, rng.uniform(-np.pi, np.pi, (n, _NUM_WAVES)))
    limit_fraction = 0.6 if at_rest else 1.0  # starting and stopping need some of what the limits allow
    for order, limit in enumerate(_limits(embodiment), start=1):
        slowdown = np.minimum(
            1.0, (limit_fraction * limit / np.maximum(waves.derivative_bound(order), 1e-300)) ** (1 / order)
        )
        waves = replace(waves, omega=waves.omega * slowdown[:, None])
    return waves


def _limits(embodiment: Embodiment) -> list[NDArray[np.float64]]:
    return [_LIMIT_FRACTION * np.asarray(x) for x in (embodiment.velocity, embodiment.acceleration, embodiment.jerk)]


def _time_scaled(embodiment: Embodiment, waves: _Waves, time: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T, n) the waves read by a clock that starts and stops softly, cut down where the limits ask for it.

    The clock's rate rises from 0 to 1 in a time R as 10 x^3 - 15 x^4 + 6 x^5 and falls likewise; its slope is at most
    1.875 / R and its second derivative 5.774 / R^2, which bounds what the chain rule adds to the waves' derivatives.
    """
    velocity, acceleration, jerk = (waves.derivative_bound(order) for order in (1, 2, 3))
    _, most_acceleration, most_jerk = _limits(embodiment)
    duration = float(time[-1])
    for ramp in np.linspace(0, max(duration, 1e-9) / 2, 33)[1:]:
        rate_slope, rate_curvature = 1.875 / ramp, 5.7736 / ramp**2
        excess = np.maximum(
            (acceleration + velocity * rate_slope) / most_acceleration,
            (jerk + 3 * acceleration * rate_slope + velocity * rate_curvature) / most_jerk,
        )
        if (excess <= 1).all():
            break

    def ramp_integral(t: NDArray[np.float64]) -> NDArray[np.float64]:
        """Integral of the rising rate up to t, with rate 1 after the ramp."""
        x = np.clip(t / ramp, 0, 1)
        total: NDArray[np.float64] = ramp * (2.5 * x**4 - 3 * x**5 + x**6) + np.maximum(t - ramp, 0)
        return total

    half = time[-1:] / 2
    clock = np.where(time <= half, ramp_integral(time), 2 * ramp_integral(half) - ramp_integral(duration - time))
    return waves.evaluate(clock) / np.maximum(excess, 1.0)


def _shifted_into_range(
    q: NDArray[np.float64], lower: NDArray[np.float64], upper: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """The motion moved to anywhere between the bounds (n,) that it fits in."""
    n = q.shape[-1]
    # The ends of the range are sought out half of the time, as waves spend little time there.
    place = np.where(rng.random(n) < 0.5, rng.random(n), rng.beta(0.4, 0.4, n))
    low, high = lower - q.min(axis=0), upper - q.max(axis=0)
    placed: NDArray[np.float64] = (q + low + place * (high - low)).clip(lower, upper)  # clips rounding errors alone
    return placed


def _made_collision_free(q: NDArray[np.float64], is_free: IsFree, *, shrink: bool) -> NDArray[np.float64] | None:
    """The motion if it is free, or it shrunk about one of its free rows if that is; coarse looks first."""
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
    """All of 0..count-1, ever finer: what is blocked is found early."""
    order: dict[int, None] = {}
    stride = 1 << max(count - 1, 0).bit_length()
    while stride:
        order.update(dict.fromkeys(range(0, count, stride)))
        stride //= 2
    return list(order)
