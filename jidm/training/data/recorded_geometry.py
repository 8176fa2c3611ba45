"""Depth, links and cameras of a simulated recording, resampled to the size of the training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from jidm.fields.free.config import FIELD_STRIDE
from jidm.video.letterbox import Letterbox


@dataclass(frozen=True, eq=False)
class RecordedGeometry:
    """What a simulated recording knows of its N frames beyond the images, on the grid of the field.

    Attributes:
        depth: (N, y, x) float32 distance along the optical axis [m]; 0 off the robot.
        link: (N, y, x) int16 link index, -1 = not the robot.
        intrinsics: (N, 4) float64 fx, fy, cx, cy of the training image [px].
        T_camera_base: (N, 4, 4) float64.
    """

    depth: Float[Tensor, "N y x"]
    link: Int[Tensor, "N y x"]
    intrinsics: Float[Tensor, "N 4"]
    T_camera_base: Float[Tensor, "N 4 4"]


def unpack_cameras(rows: NDArray[Any]) -> tuple[Float[np.ndarray, "T 4"], Float[np.ndarray, "T 4 4"]]:
    """Intrinsics (fx, fy, cx, cy) [px] and `T_camera_base` from recorded rows (T, 16): the intrinsics, then the pose's
    upper three rows."""
    T = np.tile(np.eye(4), (len(rows), 1, 1))
    T[:, :3] = np.asarray(rows[:, 4:], dtype=np.float64).reshape(-1, 3, 4)
    return np.asarray(rows[:, :4], dtype=np.float64), T


def letterbox_geometry(
    depth: NDArray[Any], link: NDArray[Any], cameras: NDArray[Any], letterbox: Letterbox
) -> dict[str, NDArray[Any]]:
    """Recorded depth, links and cameras of T frames for the training image and the grid of its field.

    Args:
        depth, link: (T, h_in, w_in) on a coarse grid over the recorded image.
        cameras: (T, 16) rows as for `unpack_cameras`, of the recorded image.
        letterbox: from the recorded to the training image.

    Returns:
        depth float32 and link int16 (T, H/2, W/2), intrinsics (T, 4) and T_camera_base (T, 4, 4), as in `RecordedGeometry`.
    """
    h, w = letterbox.height // FIELD_STRIDE, letterbox.width // FIELD_STRIDE
    if not (letterbox.is_identity and depth.shape[1:] == (h, w)):
        depth, link = _resample(depth, link, letterbox, h, w)
    scale, offset = np.array([letterbox.scale_u, letterbox.scale_v]), np.array([letterbox.left, letterbox.top])
    K, T = unpack_cameras(cameras)
    return {
        "depth": np.ascontiguousarray(depth, dtype=np.float32),
        "link": np.ascontiguousarray(link, dtype=np.int16),
        "intrinsics": np.concatenate([K[:, :2] * scale, (K[:, 2:] + 0.5) * scale - 0.5 + offset], axis=1),
        "T_camera_base": T,
    }


def _resample(
    depth: NDArray[Any], link: NDArray[Any], letterbox: Letterbox, h: int, w: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Links by the nearest cell; 1/depth bilinearly between four cells of one link, which is exact on planes."""

    def axis(cells: int, offset: int, inner: int, cells_in: int) -> tuple[NDArray[Any], NDArray[Any]]:
        position = (np.arange(cells) + 0.5) * FIELD_STRIDE - offset  # from the image's edge, in training pixels
        x = position * (cells_in / inner) - 0.5
        return x, (position > 0) & (position < inner)

    v, row_inside = axis(h, letterbox.top, letterbox.inner_height, depth.shape[1])
    u, column_inside = axis(w, letterbox.left, letterbox.inner_width, depth.shape[2])

    def lookup(table: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[Any]:
        rows = np.clip(rows, 0, table.shape[1] - 1).astype(int)
        columns = np.clip(columns, 0, table.shape[2] - 1).astype(int)
        return np.asarray(table[:, rows[:, None], columns[None]])

    nearest = lookup(link, np.round(v), np.round(u))
    inverse = 1 / np.where(link >= 0, np.maximum(depth, 1e-6), 1.0)
    fv, fu = (v - np.floor(v))[:, None], (u - np.floor(u))[None]
    mean_inverse, same_link = np.zeros(nearest.shape), np.ones(nearest.shape, dtype=bool)
    for rows, weight_v in ((np.floor(v), 1 - fv), (np.floor(v) + 1, fv)):
        for columns, weight_u in ((np.floor(u), 1 - fu), (np.floor(u) + 1, fu)):
            mean_inverse += lookup(inverse, rows, columns) * weight_v * weight_u
            same_link &= lookup(link, rows, columns) == nearest
    z = np.where(same_link, 1 / mean_inverse, lookup(depth, np.round(v), np.round(u)))
    on_robot = (nearest >= 0) & row_inside[:, None] & column_inside[None]
    return np.where(on_robot, z, 0.0), np.where(on_robot, nearest, -1)
