"""Domain randomization of a scene: textures, light and background. Everything follows from seeds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError
from jidm.sim.textures import patches, solid_noise

Vector3 = tuple[float, float, float]
"""A direction, a position [m], or a color RGB in [0, 1]."""


@dataclass(frozen=True)
class Light:
    """One directional light plus ambient light.

    Attributes:
        direction: from the robot to the light, in the base frame (any length).
        color: RGB in [0, 1].
        ambient, diffuse, specular: weights of the three terms of the reflected light.
    """

    direction: Vector3 = (1.0, 0.6, 2.0)
    color: Vector3 = (1.0, 1.0, 1.0)
    ambient: float = 0.45
    diffuse: float = 0.45
    specular: float = 0.05

    def __post_init__(self) -> None:
        if not np.isfinite(self.direction).all() or np.linalg.norm(self.direction) < 1e-9:
            raise InputError(f"the light needs a direction of non-zero length, got {self.direction}")


@dataclass(frozen=True)
class Texture:
    """Texture of the robot's surface.

    Attributes:
        kind: 'plain' keeps the colors of URDF and meshes; 'noise' covers every link with solid noise fixed to the link.
        contrast: standard deviation of the noise as a fraction of the brightness.
        grain: size of the noise's smallest features [m].
        saturation: 0 for gray noise, 1 for three independent channels.
    """

    kind: str = "plain"
    contrast: float = 0.3
    grain: float = 0.012
    saturation: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("plain", "noise"):
            raise InputError(f"unknown texture '{self.kind}'; known: plain, noise")
        if not self.grain > 0:
            raise InputError(f"the grain of a texture must be a positive length in m, got {self.grain}")


@dataclass(frozen=True)
class Background:
    """The image behind the robot.

    Attributes:
        kind: 'plain' one color; 'picture' a still image of smooth noise; 'moving' the same, translating; 'patches'
            overlapping shapes with sharp edges, translating unless `velocity` is zero.
        color: RGB in [0, 1] of a plain background, mean of the others.
        contrast: standard deviation of the image in [0, 1] units.
        grain: size of the image's smallest features, as a fraction of the image height.
        velocity: (u, v) of a translating background, in image heights per frame.
    """

    kind: str = "plain"
    color: Vector3 = (0.36, 0.40, 0.44)
    contrast: float = 0.1
    grain: float = 0.025
    velocity: tuple[float, float] = (0.008, 0.003)

    def __post_init__(self) -> None:
        if self.kind not in ("plain", "picture", "moving", "patches"):
            raise InputError(f"unknown background '{self.kind}'; known: plain, picture, moving, patches")
        if not self.grain > 0:
            raise InputError(f"the grain of a background must be a positive fraction of the height, got {self.grain}")

    @property
    def is_moving(self) -> bool:
        """Whether frames of a video differ."""
        return self.kind in ("moving", "patches") and any(self.velocity)

    def image(self, width: int, height: int, *, seed: int = 0, frame: float = 0.0) -> NDArray[np.float32]:
        """The background in [0, 1], (height, width, 3), at a frame number, which matters only if it moves."""
        base = np.broadcast_to(np.asarray(self.color, np.float32), (height, width, 3))
        if self.kind == "plain":
            return base.copy()
        shift = np.multiply(self.velocity, frame * height) if self.is_moving else (0.0, 0.0)
        v, u = np.meshgrid(np.arange(height) - shift[1], np.arange(width) - shift[0], indexing="ij")
        if self.kind == "patches":
            shapes = patches((u - width / 2) / height, (v - height / 2) / height, seed, 1 / height)
            return np.clip(base + 2 * self.contrast * shapes, 0.0, 1.0).astype(np.float32)
        cell = self.grain * height
        image = np.zeros((height, width, 3), np.float32)
        # Three scales: small features that optical flow can track, large ones so that it resembles a room.
        for octave, (size, weight) in enumerate(((1.0, 0.5), (4.0, 0.6), (12.0, 0.6))):
            p = np.stack([u, v], axis=-1) / (cell * size)
            # Mostly gray, as rooms are: the first channel is shared.
            noise = solid_noise(p, seed + 31 * octave)
            image += weight * (0.75 * noise[..., :1] + 0.25 * noise)
        return np.clip(base + self.contrast * image, 0.0, 1.0).astype(np.float32)


@dataclass(frozen=True)
class Appearance:
    """Textures, light and background of a scene."""

    texture: Texture = field(default_factory=Texture)
    light: Light = field(default_factory=Light)
    background: Background = field(default_factory=Background)

    @classmethod
    def plain(cls) -> Appearance:
        """The robot in its own colors, like most real robots white and textureless, on a plain background. The default."""
        return cls()

    @classmethod
    def textured(cls, background: str = "plain") -> Appearance:
        """Every link covered with noise that optical flow can track."""
        return cls(texture=Texture("noise"), background=Background(background))

    @classmethod
    def random(cls, seed: int) -> Appearance:
        """A random appearance: textured in half of all cases, light from anywhere above, any background."""
        rng = np.random.default_rng([seed, 0x100C])
        direction = rng.normal(size=3)
        direction[2] = abs(direction[2]) + 0.3
        light = Light(
            direction=to_vector3(direction),
            color=to_vector3(rng.uniform(0.85, 1.0, 3)),
            ambient=float(rng.uniform(0.35, 0.6)),
            diffuse=float(rng.uniform(0.35, 0.6)),
            specular=float(rng.uniform(0.0, 0.15)),
        )
        texture = Texture(
            "noise" if rng.random() < 0.5 else "plain",
            contrast=float(rng.uniform(0.1, 0.4)),
            grain=float(rng.uniform(0.008, 0.03)),
            saturation=float(rng.uniform(0, 1)),
        )
        background = Background(
            str(rng.choice(["plain", "picture", "moving", "patches", "patches"])),
            color=to_vector3(rng.uniform(0.15, 0.85, 3)),
            contrast=float(rng.uniform(0.05, 0.2)),
            grain=float(rng.uniform(0.015, 0.06)),
            velocity=(float(rng.normal(0, 0.006)), float(rng.normal(0, 0.006))),
        )
        if background.kind == "patches" and rng.random() < 0.5:
            background = replace(background, velocity=(0.0, 0.0))
        return cls(texture, light, background)


def to_vector3(values: NDArray[np.float64]) -> Vector3:
    """Three numbers of an array as a tuple."""
    return float(values[0]), float(values[1]), float(values[2])
