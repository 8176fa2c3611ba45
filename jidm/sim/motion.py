"""Smooth random joint trajectories: sums of sine waves that keep position, velocity, acceleration and jerk limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

NUM_WAVES = 4
"""Sine waves per joint."""
_LIMIT_FRACTION = 0.9  # fraction of velocity, acceleration and jerk limits that is used
_POSITION_FRACTION = 0.9  # fraction of the position range, about its middle, that is used
_FREQUENCY_BAND = (0.08, 0.5)  # lowest and highest frequency [Hz]


@dataclass(frozen=True)
class SineWaves:
    """`sum_k amplitude[:, k] sin(omega[:, k] t + phase[:, k])` for n joints. Arrays (n, K), amplitude in rad or m."""

    amplitude: NDArray[np.float64]
    omega: NDArray[np.float64]
    phase: NDArray[np.float64]

    def evaluate(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """(T, n) values at times (T,) [s]."""
        waves = np.sin(self.omega * time[:, None, None] + self.phase)
        values: NDArray[np.float64] = (self.amplitude * waves).sum(axis=-1)
        return values

    def derivative_bound(self, order: int) -> NDArray[np.float64]:
        """(n,) upper bound of the size of the order-th derivative at any time."""
        bound: NDArray[np.float64] = (self.amplitude * self.omega**order).sum(axis=-1)
        return bound

    def slowed(self, limits: Sequence[NDArray[np.float64]]) -> SineWaves:
        """The waves with frequencies lowered per joint until `derivative_bound` of order 1, 2, ... keeps limits (n,)."""
        waves = self
        for order, limit in enumerate(limits, start=1):
            slowdown = np.minimum(1.0, (limit / np.maximum(waves.derivative_bound(order), 1e-300)) ** (1 / order))
            waves = replace(waves, omega=waves.omega * slowdown[:, None])
        return waves


def log_uniform(rng: np.random.Generator, low: float, high: float, size: int | tuple[int, ...] | None = None) -> Any:
    """A log-uniformly distributed number between `low` and `high`, or an array of them."""
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def derivative_limits(embodiment: Embodiment) -> list[NDArray[np.float64]]:
    """Nine tenths of the limits (n,) on velocity, acceleration and jerk [rad or m per s, s^2 and s^3]."""
    return [_LIMIT_FRACTION * np.asarray(x) for x in (embodiment.velocity, embodiment.acceleration, embodiment.jerk)]


def random_motion(
    embodiment: Embodiment, frames: int, dt: float, seed: int, *, start: ArrayLike | None = None
) -> NDArray[np.float64]:
    """A random trajectory of joint positions about home, a sum of four sine waves per joint.

    Each joint is `center + amplitude * sum_k w_k sin(2 pi f_k t + phase_k)` with `w_k > 0` adding up to 1, so it never
    leaves `center +- amplitude`, and its velocity never exceeds `amplitude * sum_k w_k 2 pi f_k`. Where that, or the same
    bound of acceleration or jerk, is above nine tenths of the joint's limit, the joint's frequencies are lowered. The
    amplitudes are the embodiment's `exploration_range`, less where nine tenths of the position range is smaller.

    Args:
        frames: number of rows T.
        dt: time between rows [s].
        seed: same seed, same motion, whatever T is.
        start: (n,) joint positions of the first row [rad or m]; if not given, the motion starts anywhere on its path.

    Returns:
        q (T, n), order of `embodiment.joint_names` [rad or m].

    Raises:
        InputError: frames or dt is not positive, or `start` is outside the limits.
    """
    n = embodiment.n
    if frames < 1 or not dt > 0:
        raise InputError("random_motion needs frames >= 1 and dt > 0")
    rng = np.random.default_rng([abs(seed), 0x5A])
    weight = rng.uniform(0.4, 1.0, (n, NUM_WAVES))
    weight /= weight.sum(axis=1, keepdims=True)
    frequency = log_uniform(rng, *_FREQUENCY_BAND, (n, NUM_WAVES))
    phase = rng.uniform(-np.pi, np.pi, (n, NUM_WAVES))
    center, half_range = _center_and_half_range(embodiment, start)
    if start is not None:
        # All waves start at the same fraction of their amplitude; whether they rise or fall there is random.
        q0 = np.asarray(start, dtype=np.float64)
        sine = np.divide(q0 - center, half_range, out=np.zeros(n), where=half_range > 0).clip(-1, 1)
        rising = np.arcsin(sine)[:, None]
        phase = np.where(phase > 0, rising, np.pi - rising)
        center = np.where(half_range > 0, center, q0)
    waves = SineWaves(half_range[:, None] * weight, 2 * np.pi * frequency, phase).slowed(derivative_limits(embodiment))
    q: NDArray[np.float64] = center + waves.evaluate(np.arange(frames, dtype=np.float64) * dt)
    return q


def _center_and_half_range(
    embodiment: Embodiment, start: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Center and amplitude (n,) of the motion, inside the usable part of the position range."""
    n, lower, upper = embodiment.n, embodiment.lower, embodiment.upper
    middle = np.asarray(embodiment.home if start is None else start, dtype=np.float64)
    if middle.shape != (n,) or not embodiment.within_limits(middle).all():
        raise InputError(f"start must be {n} joint positions inside the limits of '{embodiment.name}'")
    bounded = np.isfinite(lower) & np.isfinite(upper)
    slack = (1 - _POSITION_FRACTION) / 2 * np.where(bounded, upper - lower, 0.0)
    # A start close to a limit is allowed: the range is widened just enough to hold it.
    low, high = np.minimum(lower + slack, middle), np.maximum(upper - slack, middle)
    half_range = np.minimum(embodiment.exploration_range, (high - low) / 2)
    return np.clip(middle, low + half_range, high - half_range), half_range
