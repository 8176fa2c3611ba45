"""What a command may ask of the joints."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment


@dataclass(frozen=True, eq=False)
class MotionLimits:
    """Limits of n joints, each (n,); infinite where there is none.

    Attributes:
        lower, upper: positions [rad or m].
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
            raise InputError(f"limits must be (n,) each, of the same n joints, got {sorted(shapes)}")
        if not (self.lower <= self.upper).all():
            raise InputError("a joint's lower limit is not below its upper one")
        if not all((getattr(self, name) > 0).all() for name in ("velocity", "acceleration", "jerk")):
            raise InputError("limits of velocity, acceleration and jerk must be positive")

    @classmethod
    def from_embodiment(cls, embodiment: Embodiment, *, scale: float = 1.0) -> MotionLimits:
        """A robot's own.

        Args:
            scale: of its velocity, acceleration and jerk that is used.

        Raises:
            InputError: share is not in (0, 1].
        """
        if not 0 < scale <= 1:
            raise InputError(f"the share of the limits that is used must be in (0, 1], got {scale}")
        scaled = (scale * x for x in (embodiment.velocity, embodiment.acceleration, embodiment.jerk))
        return cls(embodiment.lower, embodiment.upper, *scaled)

    @property
    def n(self) -> int:
        """Number of joints."""
        return len(self.lower)
