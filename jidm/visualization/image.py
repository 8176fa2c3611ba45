"""Images: conversion, resizing, color maps and writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from jidm.atomic_io import atomic_write
from jidm.errors import InputError

RgbImage = NDArray[np.uint8]
"""(H, W, 3) uint8 RGB."""


def to_uint8(x: NDArray[Any]) -> RgbImage:
    """Values from 0 to 255, rounded and clipped."""
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def to_image(frame: Float[Tensor, "3 H W"]) -> RgbImage:
    """A frame, RGB in [0, 1], as an image; NaN is black."""
    return to_uint8(frame.detach().cpu().double().nan_to_num(0.0).permute(1, 2, 0).numpy() * 255.0)


def resize(image: NDArray[Any], width: int, height: int, *, nearest: bool = False) -> NDArray[Any]:
    """The image at another size; reduced by area averaging, enlarged bilinearly or, if asked, by nearest neighbor."""
    import cv2

    shrinks = width < image.shape[1] or height < image.shape[0]
    method = cv2.INTER_NEAREST if nearest else cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (max(1, width), max(1, height)), interpolation=method), image.dtype)


def write_image(image: RgbImage, path: str | Path) -> None:
    """Write a PNG or JPEG file; it appears whole or not at all.

    Raises:
        InputError: the suffix is not that of an image format.
    """
    import cv2

    with atomic_write(path) as temporary:
        try:
            written = cv2.imwrite(str(temporary), np.ascontiguousarray(image[..., ::-1]))
        except cv2.error:  # no encoder for this suffix
            written = False
        if not written:
            raise InputError(f"{path}: cannot be written as an image; use .png or .jpg")


def flow_to_color(flow: Float[Tensor, "2 H W"], max_speed: float) -> RgbImage:
    """Flow as colors on white: hue is direction (red = right, then yellow-green down, cyan left, violet up).

    Args:
        flow: displacement (u right, v down) [px].
        max_speed: speed in full color [px]; faster flow is darker.
    """
    import cv2

    u, v = flow.detach().cpu().double().nan_to_num(0.0).numpy()
    speed = np.hypot(u, v) / max(max_speed, 1e-9)
    hue = np.degrees(np.arctan2(v, u)) % 360.0
    value = np.where(speed > 1.0, np.clip(1.35 - 0.35 * speed, 0.55, 1.0), 1.0)
    hsv = np.stack([hue, np.clip(speed, 0.0, 1.0), value], axis=-1).astype(np.float32)
    return to_uint8(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255.0)


def heatmap(x: Float[Tensor, "H W"], max_value: float) -> RgbImage:
    """Values from 0 (black) to `max_value` (bright yellow); values that are not finite are drawn as 0."""
    import cv2

    level = (x.detach().cpu().double().nan_to_num(0.0) / max(max_value, 1e-9)).clamp(0.0, 1.0).numpy()
    colors = cv2.applyColorMap((level * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.ascontiguousarray(colors[..., ::-1])
