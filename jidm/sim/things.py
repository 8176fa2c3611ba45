"""Things that are not the robot: boxes, balls and cylinders in its surroundings, at rest or drifting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.robot.camera import Camera

KINDS = ("box", "sphere", "cylinder")
RGB = tuple[float, float, float]

_SPACES = ("behind", "beside", "front")
_SHARES = (0.5, 0.3, 0.2)


@dataclass(frozen=True)
class Thing:
    """A solid of one colour.

    Attributes:
        kind: "box", "sphere" or "cylinder".
        size: of a box its three sides; of a sphere its diameter, first; of a cylinder diameter, first, and height,
            last [m].
        colour: RGB in [0, 1].
        position: of its middle, in the base frame [m].
        turn: its orientation in the base frame, a rotation vector [rad].
        velocity: in the base frame [m per frame].
    """

    kind: str
    size: RGB
    colour: RGB
    position: RGB
    turn: RGB = (0.0, 0.0, 0.0)
    velocity: RGB = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown thing '{self.kind}'; known: {', '.join(KINDS)}")
        if not min(self.size) > 0:
            raise InputError(f"the sides of a {self.kind} must be positive lengths in m, got {self.size}")

    def place(self, frame: float) -> NDArray[np.float64]:
        """Position (3,) of its middle at a frame number [m]."""
        return np.add(self.position, np.multiply(frame, self.velocity))


def random_things(
    camera: Camera, middle: NDArray[np.float64], radius: float, seed: int, most: int
) -> tuple[Thing, ...]:
    """Up to `most` things around a robot, seen by a camera: behind it, beside it, and sometimes in front of it.

    Args:
        camera: sees them all, at least in part.
        middle: (3,) of the space that the robot moves in, base frame [m].
        radius: of that space [m].
        seed: same seed, same things.
        most: largest number; none is possible.
    """
    rng = np.random.default_rng([abs(seed), 0x0B1])
    T, K = camera.T_camera_base.double().cpu().numpy(), camera.K.double().cpu().numpy()
    distance = float(T[2, :3] @ middle + T[2, 3])
    nearest = max(distance - radius, 0.35 * distance)
    things = []
    for _ in range(int(rng.integers(0, most + 1))):
        space = str(rng.choice(_SPACES, p=_SHARES))
        u, v = rng.uniform(0, 1, 2)
        if space == "behind":
            z, across = (distance + radius) * rng.uniform(1.05, 1.8), rng.uniform(0.1, 0.5)
        elif space == "beside":
            z, across = distance * rng.uniform(0.8, 1.2), rng.uniform(0.06, 0.22)
            # Along one of the borders, where the robot seldom is.
            if rng.random() < 0.5:
                u = rng.choice([rng.uniform(0, 0.12), rng.uniform(0.88, 1)])
            else:
                v = rng.choice([rng.uniform(0, 0.12), rng.uniform(0.88, 1)])
        else:
            z, across = nearest * rng.uniform(0.6, 0.95), rng.uniform(0.04, 0.14)
        pixel = np.array([u * camera.width, v * camera.height])
        p_camera = z * np.append((pixel - K[:2, 2]) / K[[0, 1], [0, 1]], 1.0)
        extent = across * camera.width * z / K[0, 0]
        size = extent * rng.uniform(0.5, 1.0, 3)
        axis = rng.normal(size=3)
        speed = extent * 0.02 * rng.normal(size=3) if rng.random() < 0.4 else np.zeros(3)
        things.append(
            Thing(
                KINDS[int(rng.integers(3))],
                _three(size),
                _three(_colour(rng)),
                _three(T[:3, :3].T @ (p_camera - T[:3, 3])),
                _three(axis / np.linalg.norm(axis) * rng.uniform(0, np.pi)),
                _three(speed),
            )
        )
    return tuple(things)


def _colour(rng: np.random.Generator) -> NDArray[np.float64]:
    """Any brightness, any hue; half of them greyish, as most things are."""
    grey, tint = rng.uniform(0.05, 0.95), rng.uniform(0, 1, 3)
    share = rng.uniform(0, 0.25) if rng.random() < 0.5 else rng.uniform(0.25, 1.0)
    colour: NDArray[np.float64] = (1 - share) * grey + share * tint
    return colour


def _three(values: NDArray[np.float64]) -> RGB:
    return float(values[0]), float(values[1]), float(values[2])
