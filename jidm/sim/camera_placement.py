"""Cameras for recording: zoomed so that the robot's workspace fills the image, and jittered between episodes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from jidm.camera.model import Camera
from jidm.sim.workspace import floor_height, random_configurations, surface_points

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

_NUM_CONFIGURATIONS = 600
_NUM_POINTS = 600
_FLOOR_TOLERANCE = 0.02  # depth to which a standing robot may reach below the floor [m]
_MARGIN = 0.03  # fraction of the image, on each side


def fit_camera_to_robot(
    embodiment: Embodiment, camera: Camera, width: int, height: int, *, crop_fraction: float = 0.02
) -> Camera:
    """A (width, height) camera with the same pose, zoomed and shifted so that the robot's workspace fills the image.

    Args:
        width, height: of the image [px].
        crop_fraction: fraction of all poses in which the robot may reach beyond each border of the image, before a small
            margin is added. Poses are drawn uniformly from `usable_range`.
    """
    p_base, _ = surface_points(embodiment, random_configurations(embodiment, _NUM_CONFIGURATIONS), _NUM_POINTS)
    camera = camera.to("cpu", torch.float64)
    uv, depth = camera.project(p_base)
    # Poses that reach through the floor are left out.
    possible = (p_base[..., 2].amin(dim=-1) >= floor_height(embodiment) - _FLOOR_TOLERANCE) & (depth > 0).all(-1)
    low = np.quantile(uv[possible].amin(1).numpy(), crop_fraction, axis=0)
    high = np.quantile(uv[possible].amax(1).numpy(), 1 - crop_fraction, axis=0)
    center, size = (low + high) / 2, np.maximum(high - low, 1e-6)
    scale = (1 - 2 * _MARGIN) * float(np.min(np.array([width, height]) / size))
    # Rounded, so that sums in another order, on another number of cores, give the same camera.
    scale, shift = float(f"{scale:.5g}"), np.round((np.array([width, height]) - 1) / 2 - scale * center, 2)
    K = camera.K.clone()
    K[:2] *= scale
    K[:2, 2] += torch.from_numpy(shift)
    return replace(camera, width=width, height=height, K=K)


def jitter_camera(camera: Camera, jitter: tuple[float, float, float], rng: np.random.Generator) -> Camera:
    """The camera with Gaussian noise on its pose and its focal length.

    Args:
        jitter: standard deviation of the position [fraction of the distance from the robot's base to the camera], of the
            rotation about each axis [degrees] and of the logarithm of the focal length.
    """
    from scipy.spatial.transform import Rotation

    position, angle, focal = jitter
    T, K = camera.T_camera_base.double().numpy().copy(), camera.K.double().numpy().copy()
    distance = float(np.linalg.norm(T[:3, 3]))
    rotation = np.eye(4)
    rotation[:3, :3] = Rotation.from_rotvec(np.deg2rad(angle) * rng.normal(size=3)).as_matrix()
    rotation[:3, 3] = position * distance * rng.normal(size=3)
    K[[0, 1], [0, 1]] *= np.exp(focal * rng.normal())
    return replace(camera, K=torch.from_numpy(K), T_camera_base=torch.from_numpy(rotation @ T))
