"""Procedural background images of sharp edges and even areas, which rooms have and smooth noise lacks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PATCH_COUNT = (6, 24)
_STRIPED_FRACTION = 0.25  # fraction of patches with stripes or checks
_EXTENT = 1.6  # patches lie in a square of this many image heights about the middle, as the image may translate


def patches(u: NDArray[np.float64], v: NDArray[np.float64], seed: int, edge_width: float) -> NDArray[np.float32]:
    """An image of overlapping rectangles and ellipses: plain, shaded or striped.

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
        half = np.exp(rng.uniform(np.log(0.03), np.log(0.45), 2))
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
