"""Joint limits that every command obeys, and the check that every reported pose passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

_RANGE_TOLERANCE = 0.05  # fraction of its range by which a joint may be reported outside: encoder zeros, soft stops ...
_LARGEST_TOLERANCE = 0.1  # ... but not more than this [rad or m]
LARGEST_POSITION = 1000.0  # of a joint without limits: over 150 turns [rad or m]
"""Positions beyond it are taken for errors, whoever states them."""


@dataclass(frozen=True, eq=False)
class MotionLimits:
    """Limits of n joints, each (n,); infinite where there is none.

    Attributes:
        lower, upper: position range [rad or m].
        velocity, acceleration, jerk: largest magnitudes [rad or m per s, s^2, s^3].
    """

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    velocity: NDArray[np.float64]
    acceleration: NDArray[np.float64]
    jerk: NDArray[np.float64]

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, np.array(getattr(self, field.name), dtype=np.float64))
        shapes = {getattr(self, field.name).shape for field in fields(self)}
        if len(shapes) != 1 or self.lower.ndim != 1:
            raise InputError(f"limits must all be (n,) with the same n joints, got {sorted(shapes)}")
        if not (self.lower <= self.upper).all():
            raise InputError("a joint's lower limit is above its upper limit")
        if not all((getattr(self, name) > 0).all() for name in ("velocity", "acceleration", "jerk")):
            raise InputError("limits of velocity, acceleration and jerk must be positive")

    @classmethod
    def from_embodiment(cls, embodiment: Embodiment, *, scale: float = 1.0) -> MotionLimits:
        """The limits of a robot's descriptor.

        Args:
            embodiment: the robot.
            scale: factor in (0, 1] on its velocity, acceleration and jerk.

        Raises:
            InputError: scale is not in (0, 1].
        """
        if not 0 < scale <= 1:
            raise InputError(f"scale of the limits must be in (0, 1], got {scale}")
        scaled = (scale * x for x in (embodiment.velocity, embodiment.acceleration, embodiment.jerk))
        return cls(embodiment.lower, embodiment.upper, *scaled)

    @property
    def n(self) -> int:
        """Number of joints."""
        return len(self.lower)

    def as_positions(self, q: ArrayLike) -> NDArray[np.float64]:
        """A copy of joint positions q (n,) [rad or m] as float64.

        Raises:
            InputError: q is not n finite numbers.
        """
        values = np.array(q, dtype=np.float64)
        if values.shape != (self.n,) or not np.isfinite(values).all():
            raise InputError(f"q must be {self.n} finite joint positions, got {values}")
        return values

    def as_pose(self, q: ArrayLike, joint_names: Sequence[str]) -> NDArray[np.float64]:
        """A copy of joint positions q (n,) [rad or m] that this robot can have, as float64.

        Args:
            q: n numbers, each at most slightly outside the limits of its joint: 5 % of the range, 0.1 at most.
            joint_names: n names, for the message.

        Raises:
            InputError: q is not n finite numbers, or is no pose of this robot.
        """
        try:
            values = np.array(q, dtype=np.float64)
        except Exception:  # a robot may report any object, such as a tensor that needs a gradient
            raise InputError(f"q must be {self.n} joint positions, got {_short(q)}") from None
        if values.shape != (self.n,):
            shape = f"shape {values.shape}"
            raise InputError(f"q must be {self.n} joint positions ({_listed(joint_names)}), got {shape}")
        if len(bad := np.flatnonzero(~np.isfinite(values))):
            raise InputError(f"q is not finite: {joint_names[bad[0]]} is {values[bad[0]]}")
        tolerance = np.minimum(_RANGE_TOLERANCE * (self.upper - self.lower), _LARGEST_TOLERANCE)
        low, high = (
            np.where(np.isfinite(x), x, sign * LARGEST_POSITION) for x, sign in ((self.lower, -1), (self.upper, 1))
        )
        outside = (values < low - tolerance) | (values > high + tolerance)
        if not outside.any():
            return values
        k = int(outside.argmax())
        in_radians = np.deg2rad(values)
        is_degrees = np.abs(values).max() > 2 * np.pi and (
            ((in_radians >= low - tolerance) & (in_radians <= high + tolerance))[outside].all()
        )
        hint = (
            "these look like degrees: give rad and m"
            if is_degrees
            else f"give joint positions [rad or m] in the order {_listed(joint_names)}; a tool pose is none"
        )
        raise InputError(
            f"q is no pose of this robot: {joint_names[k]} is {values[k]:.4g}, its limits are {low[k]:.4g} to "
            f"{high[k]:.4g}; {hint}"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:4])}, ... {names[-1]}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
