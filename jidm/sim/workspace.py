"""The space that a robot's surface reaches, sampled by forward kinematics."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from jidm.robot.kinematics import Kinematics
from jidm.robot.surface import Surface, sample_surface
from jidm.sim.babble_motion import usable_range

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment
    from jidm.robot.model import RobotModel

_NUM_POINTS = 4000
_BASE_TOLERANCE = 0.02  # a standing robot's lowest point is this close to z = 0 [fraction of its size]


def surface_points(embodiment: Embodiment, q: ArrayLike, count: int) -> tuple[Float[Tensor, "T N 3"], NDArray[np.intp]]:
    """`count` points of the surface at joint positions q (T, n) [rad or m]: (T, N, 3) in the base frame [m], and the link
    (N,) of each."""
    sample = _shuffled_surface(embodiment.model)[:count]
    kinematics = Kinematics.from_embodiment(embodiment)
    poses = kinematics.link_poses(torch.tensor(np.asarray(q), dtype=torch.float64))
    return kinematics.transform_points(poses, sample.link, sample.p_link), sample.link.numpy().astype(np.intp)


@lru_cache(maxsize=4)
def _shuffled_surface(model: RobotModel) -> Surface:
    """Points in random order, so that the first ones are a uniform sample too."""
    surface = sample_surface(model, _NUM_POINTS, seed=0)
    return surface[torch.from_numpy(np.random.default_rng(0).permutation(len(surface)))]


def random_configurations(embodiment: Embodiment, count: int) -> NDArray[np.float64]:
    """(count, n) joint positions [rad or m], uniform in `usable_range`; the same ones every time."""
    rng = np.random.default_rng([0, 0xF7A])
    return rng.uniform(*usable_range(embodiment), (count, embodiment.n))


def size_at_home(embodiment: Embodiment) -> float:
    """Diagonal of the robot's bounding box at home [m]."""
    points, _ = surface_points(embodiment, np.asarray(embodiment.home)[None], 1000)
    return float((points.amax(dim=1) - points.amin(dim=1)).norm())


def workspace_sphere(embodiment: Embodiment) -> tuple[NDArray[np.float64], float]:
    """Center (3,) and radius [m] of a sphere that holds 95 % of the surface points above the floor, base frame."""
    points, _ = surface_points(embodiment, random_configurations(embodiment, 100), 200)
    p_base = points.reshape(-1, 3).numpy()
    p_base = p_base[p_base[:, 2] >= floor_height(embodiment) - 0.02]
    center: NDArray[np.float64] = p_base.mean(axis=0).round(4)
    return center, round(float(np.quantile(np.linalg.norm(p_base - center, axis=-1), 0.95)), 4)


def floor_height(embodiment: Embodiment) -> float:
    """Height of the floor that the robot stands on [m]: 0 or, without a floor, -inf.

    There is a floor if at home the base's lowest point is at z = 0, no other link is below, and the robot is higher
    than a quarter of its horizontal extent. A hand has no floor, and neither has a planar finger, which lies on a
    table.
    """
    points, link_ids = surface_points(embodiment, np.asarray(embodiment.home)[None], _NUM_POINTS)
    p_base, model = points[0].numpy(), embodiment.model
    body = rigid_bodies(model)
    on_base = np.isin(link_ids, [k for k, link in enumerate(model.links) if body[link.name] == body[model.root]])
    low, high = p_base.min(0), p_base.max(0)
    slack = _BASE_TOLERANCE * float(np.linalg.norm(high - low))
    if not on_base.any() or abs(p_base[on_base, 2].min()) > slack or low[2] < -slack:
        return -np.inf
    return 0.0 if high[2] - low[2] > 0.25 * float(np.linalg.norm((high - low)[:2])) else -np.inf


def rigid_bodies(model: RobotModel) -> dict[str, int]:
    """Link name -> number of its rigid body. Links joined by fixed joints are one body."""
    parent = {joint.child: joint for joint in model.joints if joint.type == "fixed"}
    names = [link.name for link in model.links]

    def root(name: str) -> str:
        return root(parent[name].parent) if name in parent else name

    return {name: names.index(root(name)) for name in names}
