"""Procedural textures: solid noise, and background images of overlapping shapes with sharp edges."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from jidm.sim.motion import log_uniform

_NOISE_CELLS = 64  # per side of the periodic noise block
_PATCH_COUNT = (6, 24)
_STRIPED_FRACTION = 0.25  # fraction of patches with stripes or checks
_EXTENT = 1.6  # patches lie in a square of this many image heights about the middle, as the image may translate


def solid_noise(p: NDArray[np.float64], seed: int) -> NDArray[np.float32]:
    """Solid noise: a smooth random function of space with features about one unit of `p` in size.

    Args:
        p: (*batch, 3) points, or (*batch, 2) for a plane through the noise, which repeats every 64 / 3 units.
        seed: same seed, same noise.

    Returns:
        (*batch, 3), independent channels of mean 0 and standard deviation 1.
    """
    from scipy.ndimage import map_coordinates

    coordinates = np.moveaxis(np.asarray(p, np.float64), -1, 0) * 3.0  # a feature is about three cells wide
    planes = []
    for channel in range(3):
        block = _noise_block(seed, channel) if len(coordinates) == 3 else _noise_block(seed, channel)[0]
        planes.append(map_coordinates(block, coordinates, order=1, mode="grid-wrap", prefilter=False))
    return np.stack(planes, axis=-1).astype(np.float32)


@lru_cache(maxsize=64)
def _noise_block(seed: int, channel: int) -> NDArray[np.float32]:
    """One periodic block of low-pass noise, (64, 64, 64), mean 0 and standard deviation 1."""
    rng = np.random.default_rng([abs(seed), channel, 0x7E8])
    spectrum = np.fft.rfftn(rng.standard_normal((_NOISE_CELLS,) * 3))
    f = np.fft.fftfreq(_NOISE_CELLS)
    radius = np.sqrt(f[:, None, None] ** 2 + f[None, :, None] ** 2 + np.fft.rfftfreq(_NOISE_CELLS)[None, None, :] ** 2)
    block = np.fft.irfftn(spectrum * np.exp(-((radius / 0.14) ** 4)), s=(_NOISE_CELLS,) * 3, axes=(0, 1, 2))
    block -= block.mean()
    return (block / block.std()).astype(np.float32)


def patches(u: NDArray[np.float64], v: NDArray[np.float64], seed: int, edge_width: float) -> NDArray[np.float32]:
    """An image of overlapping rectangles and ellipses, plain, shaded or striped: rooms have edges and even areas, which
    smooth noise lacks.

    Args:
        u, v: (*batch) image coordinates, in image heights from the center, right and down.
        seed: same seed, same image.
        edge_width: width of the edges, in image heights; a pixel's size is enough for anti-aliasing.

    Returns:
        (*batch, 3) float32 of mean about 0 and a standard deviation about 1.
    """
    rng = np.random.default_rng([abs(seed), 0xBAC])
    slope, base = rng.normal(0, 0.6, 2), rng.normal(0, 0.3, 3)
    image: NDArray[np.float64] = base + (slope[0] * u + slope[1] * v)[..., None]
    for _ in range(int(rng.integers(*_PATCH_COUNT))):
        center = rng.uniform(-_EXTENT / 2, _EXTENT / 2, 2)
        # Sizes are drawn log-uniformly: many small shapes, or the last ones would hide the rest.
        half = log_uniform(rng, 0.03, 0.45, 2)
        angle = rng.choice([0.0, rng.uniform(0, np.pi)])
        c, s = np.cos(angle), np.sin(angle)
        x, y = c * (u - center[0]) + s * (v - center[1]), c * (v - center[1]) - s * (u - center[0])
        if rng.random() < 0.7:
            outside = np.maximum(np.abs(x) - half[0], np.abs(y) - half[1])
        else:
            outside = (np.hypot(x / half[0], y / half[1]) - 1) * half.min()
        cover = np.clip(0.5 - outside / edge_width, 0, 1)[..., None]
        gray, tint, gradient = rng.normal(), rng.normal(0, 0.5, 3), rng.normal(0, 0.8, 2)
        color = gray + tint + (gradient[0] * x + gradient[1] * y)[..., None]
        if rng.random() < _STRIPED_FRACTION:
            pitch = rng.uniform(0.03, 0.12)
            wave = np.sin(2 * np.pi * x / pitch) * (np.sin(2 * np.pi * y / pitch) if rng.random() < 0.4 else 1.0)
            color = color + rng.uniform(0.3, 1.0) * np.clip(wave * pitch / (2 * np.pi * edge_width), -1, 1)[..., None]
        image = cover * color + (1 - cover) * image
    return image.astype(np.float32)
