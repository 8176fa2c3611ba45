"""Things that are not the robot: boxes, balls and cylinders in its surroundings, at rest or drifting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.camera.model import Camera

SHAPES = ("box", "sphere", "cylinder")
Vector3 = tuple[float, float, float]

_REGIONS = ("behind", "beside", "front")
_REGION_PROBABILITIES = (0.5, 0.3, 0.2)


@dataclass(frozen=True)
class SceneObject:
    """A solid of one colour.

    Attributes:
        shape: "box", "sphere" or "cylinder".
        size: of a box its three sides; of a sphere its diameter, first; of a cylinder diameter, first, and height,
            last [m].
        color: RGB in [0, 1].
        position: of its middle, in the base frame [m].
        rotation_vector: its orientation in the base frame, a rotation vector [rad].
        velocity: in the base frame [m per frame].
    """

    shape: str
    size: Vector3
    color: Vector3
    position: Vector3
    rotation_vector: Vector3 = (0.0, 0.0, 0.0)
    velocity: Vector3 = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise InputError(f"unknown thing '{self.shape}'; known: {', '.join(SHAPES)}")
        if not min(self.size) > 0:
            raise InputError(f"the sides of a {self.shape} must be positive lengths in m, got {self.size}")

    def position_at(self, frame: float) -> NDArray[np.float64]:
        """Position (3,) of its middle at a frame number [m]."""
        return np.add(self.position, np.multiply(frame, self.velocity))


def random_objects(
    camera: Camera, center: NDArray[np.float64], radius: float, seed: int, max_objects: int
) -> tuple[SceneObject, ...]:
    """Up to `max_objects` things around a robot, seen by a camera: behind it, beside it, and sometimes in front of it.

    Args:
        camera: sees them all, at least in part.
        center: (3,) of the space that the robot moves in, base frame [m].
        radius: of that space [m].
        seed: same seed, same things.
        max_objects: largest number; none is possible.
    """
    rng = np.random.default_rng([abs(seed), 0x0B1])
    T, K = camera.T_camera_base.double().cpu().numpy(), camera.K.double().cpu().numpy()
    distance = float(T[2, :3] @ center + T[2, 3])
    nearest = max(distance - radius, 0.35 * distance)
    objects = []
    for _ in range(int(rng.integers(0, max_objects + 1))):
        region = str(rng.choice(_REGIONS, p=_REGION_PROBABILITIES))
        u, v = rng.uniform(0, 1, 2)
        if region == "behind":
            z, relative_size = (distance + radius) * rng.uniform(1.05, 1.8), rng.uniform(0.1, 0.5)
        elif region == "beside":
            z, relative_size = distance * rng.uniform(0.8, 1.2), rng.uniform(0.06, 0.22)
            # Along one of the borders, where the robot seldom is.
            if rng.random() < 0.5:
                u = rng.choice([rng.uniform(0, 0.12), rng.uniform(0.88, 1)])
            else:
                v = rng.choice([rng.uniform(0, 0.12), rng.uniform(0.88, 1)])
        else:
            z, relative_size = nearest * rng.uniform(0.6, 0.95), rng.uniform(0.04, 0.14)
        pixel = np.array([u * camera.width, v * camera.height])
        p_camera = z * np.append((pixel - K[:2, 2]) / K[[0, 1], [0, 1]], 1.0)
        extent = relative_size * camera.width * z / K[0, 0]
        size = extent * rng.uniform(0.5, 1.0, 3)
        axis = rng.normal(size=3)
        speed = extent * 0.02 * rng.normal(size=3) if rng.random() < 0.4 else np.zeros(3)
        objects.append(
            SceneObject(
                SHAPES[int(rng.integers(3))],
                _to_vector(size),
                _to_vector(_random_color(rng)),
                _to_vector(T[:3, :3].T @ (p_camera - T[:3, 3])),
                _to_vector(axis / np.linalg.norm(axis) * rng.uniform(0, np.pi)),
                _to_vector(speed),
            )
        )
    return tuple(objects)


def _random_color(rng: np.random.Generator) -> NDArray[np.float64]:
    """Any brightness, any hue; half of them greyish, as most things are."""
    gray, tint = rng.uniform(0.05, 0.95), rng.uniform(0, 1, 3)
    saturation = rng.uniform(0, 0.25) if rng.random() < 0.5 else rng.uniform(0.25, 1.0)
    color: NDArray[np.float64] = (1 - saturation) * gray + saturation * tint
    return color


def _to_vector(values: NDArray[np.float64]) -> Vector3:
    return float(values[0]), float(values[1]), float(values[2])
