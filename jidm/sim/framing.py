"""A camera that shows a robot's whole working range, and the robot as large as that allows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from jidm.robot.kinematics import Kinematics
from jidm.robot.surface import sample_surface

if TYPE_CHECKING:
    from jidm.robot.camera import Camera
    from jidm.robot.embodiment import Embodiment

_POSES = 300
_POINTS = 600
_SHARE = 0.02  # of all places the robot takes that may lie beyond each border of the frame, before the margin
_MARGIN = 0.03  # of the frame, on each side


def framed_camera(embodiment: Embodiment, camera: Camera, width: int, height: int, *, seed: int = 0) -> Camera:
    """A (width, height) camera at the same place and with the same direction, zoomed and shifted onto the robot.

    Poses are drawn evenly from the usable range, see `usable_range`.
    """
    lower, upper = usable_range(embodiment)
    rng = np.random.default_rng([seed, 0xF7A])
    q = torch.from_numpy(rng.uniform(lower, upper, (_POSES, embodiment.n)))
    surface = sample_surface(embodiment.model, _POINTS, seed=seed).to(q)
    kinematics = Kinematics.from_embodiment(embodiment)
    p_base = kinematics.move_points(kinematics.link_poses(q), surface.link, surface.p_link)
    camera = camera.to("cpu", torch.float64)
    uv, depth = camera.project(p_base)
    seen = uv[depth > 0].numpy()
    low, high = np.quantile(seen, [_SHARE, 1 - _SHARE], axis=0)
    middle, size = (low + high) / 2, np.maximum(high - low, 1e-6)
    scale = (1 - 2 * _MARGIN) * float(np.min(np.array([width, height]) / size))
    K = camera.K.clone()
    K[:2] *= scale
    K[:2, 2] += torch.from_numpy((np.array([width, height]) - 1) / 2 - scale * middle)
    return replace(camera, width=width, height=height, K=K)


def usable_range(embodiment: Embodiment, share: float = 1.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) lowest and highest position that self-play goes to [rad or m].

    The middle nine tenths of a joint's limits, half a turn to either side of home where there is none; `share` of that
    about home.
    """
    home = np.array(embodiment.home, dtype=np.float64)
    bounded = np.isfinite(embodiment.lower) & np.isfinite(embodiment.upper)
    low = np.where(bounded, embodiment.lower, home - np.pi)
    high = np.where(bounded, embodiment.upper, home + np.pi)
    slack = 0.05 * (high - low)
    low, high = np.minimum(low + slack, home), np.maximum(high - slack, home)
    return home - share * (home - low), home + share * (high - home)
