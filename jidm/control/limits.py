"""Joint limits that every command obeys."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment


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
