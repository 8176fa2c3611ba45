"""A camera that shows a robot's working range, and the robot as large as that allows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from jidm.sim.workspace import floor_height, random_configurations, surface_points

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.robot.embodiment import Embodiment

_NUM_CONFIGURATIONS = 600
_NUM_POINTS = 600
_FLOOR_TOLERANCE = 0.02  # of a standing base may lie below the floor [m]
_MARGIN = 0.03  # of the frame, on each side


def fit_camera_to_robot(
    embodiment: Embodiment, camera: Camera, width: int, height: int, *, crop_fraction: float = 0.02, seed: int = 0
) -> Camera:
    """A (width, height) camera at the same place and with the same direction, zoomed and shifted onto the robot.

    Args:
        crop_fraction: share of all poses in which the robot may reach beyond each border of the frame, before a small margin;
            poses are drawn evenly from the usable range, see `usable_range`.
        seed: of the poses.
    """
    p_base, _ = surface_points(embodiment, random_configurations(embodiment, _NUM_CONFIGURATIONS, seed), _NUM_POINTS)
    camera = camera.to("cpu", torch.float64)
    uv, depth = camera.project(p_base)
    # A robot that stands on the floor does not reach through it.
    above = (p_base[..., 2].amin(dim=-1) >= floor_height(embodiment) - _FLOOR_TOLERANCE) & (depth > 0).all(-1)
    low = np.quantile(uv[above].amin(1).numpy(), crop_fraction, axis=0)
    high = np.quantile(uv[above].amax(1).numpy(), 1 - crop_fraction, axis=0)
    center, size = (low + high) / 2, np.maximum(high - low, 1e-6)
    scale = (1 - 2 * _MARGIN) * float(np.min(np.array([width, height]) / size))
    # Rounded, so that sums in another order, on another number of cores, frame the same.
    scale, shift = float(f"{scale:.5g}"), np.round((np.array([width, height]) - 1) / 2 - scale * center, 2)
    K = camera.K.clone()
    K[:2] *= scale
    K[:2, 2] += torch.from_numpy(shift)
    return replace(camera, width=width, height=height, K=K)
