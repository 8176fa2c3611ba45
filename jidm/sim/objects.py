"""Objects around the robot: boxes, spheres and cylinders, at rest or moving at constant velocity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError
from jidm.sim.appearance import Vector3, to_vector3

if TYPE_CHECKING:
    from jidm.camera.model import Camera

SHAPES = ("box", "sphere", "cylinder")

_REGIONS = ("behind", "beside", "front")
_REGION_PROBABILITIES = (0.5, 0.3, 0.2)


@dataclass(frozen=True)
class SceneObject:
    """A solid of one color.

    Attributes:
        shape: "box", "sphere" or "cylinder".
        size: the three sides of a box; the diameter of a sphere as the first number; the diameter of a cylinder as the
            first number and its height as the last [m].
        color: RGB in [0, 1].
        position: of the center, in the base frame [m].
        rotation_vector: orientation in the base frame, axis times angle [rad].
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
            raise InputError(f"unknown shape '{self.shape}'; known: {', '.join(SHAPES)}")
        if not min(self.size) > 0:
            raise InputError(f"the sides of a {self.shape} must be positive lengths in m, got {self.size}")

    def position_at(self, frame: float) -> NDArray[np.float64]:
        """Position (3,) of the center at a frame number, in the base frame [m]."""
        return np.add(self.position, np.multiply(frame, self.velocity))


def random_objects(
    camera: Camera, center: NDArray[np.float64], radius: float, seed: int, max_objects: int
) -> tuple[SceneObject, ...]:
    """Zero to `max_objects` random objects around a robot: behind it, beside it, and sometimes in front of it.

    Args:
        camera: all objects are in its view, at least in part.
        center: (3,) of the robot's workspace, base frame [m].
        radius: of the robot's workspace [m].
        seed: same seed, same objects.
        max_objects: largest number.
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
            # Along one of the image borders, where the robot seldom is.
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
                to_vector3(size),
                to_vector3(_random_color(rng)),
                to_vector3(T[:3, :3].T @ (p_camera - T[:3, 3])),
                to_vector3(axis / np.linalg.norm(axis) * rng.uniform(0, np.pi)),
                to_vector3(speed),
            )
        )
    return tuple(objects)


def _random_color(rng: np.random.Generator) -> NDArray[np.float64]:
    """RGB of any brightness and hue; half of the colors have low saturation, as most objects do."""
    gray, tint = rng.uniform(0.05, 0.95), rng.uniform(0, 1, 3)
    saturation = rng.uniform(0, 0.25) if rng.random() < 0.5 else rng.uniform(0.25, 1.0)
    color: NDArray[np.float64] = (1 - saturation) * gray + saturation * tint
    return color
