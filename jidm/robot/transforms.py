"""Rigid transforms and rotations of the URDF conventions, in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def rigid_transform(
    xyz: Sequence[float] = (0.0, 0.0, 0.0), rpy: Sequence[float] = (0.0, 0.0, 0.0)
) -> NDArray[np.float64]:
    """(4, 4) transform from a position [m] and URDF roll, pitch, yaw [rad]: R = Rz(yaw) Ry(pitch) Rx(roll)."""
    cr, sr, cp, sp, cy, sy = (f(x) for x in rpy for f in (math.cos, math.sin))
    T = np.eye(4)
    T[:3, :3] = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    T[:3, 3] = xyz
    return T


def roll_pitch_yaw(R: NDArray[np.float64]) -> tuple[float, float, float]:
    """URDF roll, pitch, yaw [rad] of a rotation (3, 3); inverse of `rigid_transform`.

    Roll is computed after yaw has been removed, which is exact at pitch = 90 deg too.
    """
    yaw = math.atan2(R[1, 0], R[0, 0])
    pitch = math.atan2(-R[2, 0], math.hypot(R[0, 0], R[1, 0]))
    c, s = math.cos(yaw), math.sin(yaw)
    roll = math.atan2(s * R[0, 2] - c * R[1, 2], c * R[1, 1] - s * R[0, 1])
    return roll, pitch, yaw


def skew(axis: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3) cross-product matrix: `skew(a) @ b = a x b`."""
    x, y, z = axis
    return np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
