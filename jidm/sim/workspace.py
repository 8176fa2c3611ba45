"""Where a robot reaches, from points of its surface carried by its kinematics."""

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
_BASE_TOLERANCE = (
    0.02  # of the robot's size: the base's lowest point may be this far from z = 0 on a robot that stands there
)


def surface_points(embodiment: Embodiment, q: ArrayLike, count: int) -> tuple[Float[Tensor, "T N 3"], NDArray[np.intp]]:
    """`count` points of the surface at joint positions q (T, n): in the base frame [m], and the link of each (N,)."""
    surface = _shuffled_surface(embodiment.model)
    sample = Surface(surface.link[:count], surface.p_link[:count].double(), surface.normal_link[:count].double())
    kinematics = Kinematics.from_embodiment(embodiment)
    poses = kinematics.link_poses(torch.tensor(np.asarray(q), dtype=torch.float64))
    return kinematics.transform_points(poses, sample.link, sample.p_link), sample.link.numpy().astype(np.intp)


@lru_cache(maxsize=4)
def _shuffled_surface(model: RobotModel) -> Surface:
    """In random order, so that the first few are a sample too."""
    surface = sample_surface(model, _NUM_POINTS, seed=0)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(surface)))
    return Surface(surface.link[order], surface.p_link[order], surface.normal_link[order])


def random_configurations(embodiment: Embodiment, count: int, seed: int) -> NDArray[np.float64]:
    """(count, n) joint positions drawn evenly from the usable range."""
    rng = np.random.default_rng([seed, 0xF7A])
    return rng.uniform(*usable_range(embodiment), (count, embodiment.n))


def size_at_home(embodiment: Embodiment) -> float:
    """Diagonal of the box that holds the robot at home [m]."""
    points, _ = surface_points(embodiment, np.asarray(embodiment.home)[None], 1000)
    return float((points.amax(dim=1) - points.amin(dim=1)).norm())


def workspace_sphere(embodiment: Embodiment, *, seed: int = 0) -> tuple[NDArray[np.float64], float]:
    """Middle (3,) and radius of the space that the robot's surface moves in [m], base frame, less its fringe."""
    points, _ = surface_points(embodiment, random_configurations(embodiment, 100, seed), 200)
    p_base = points.reshape(-1, 3).numpy()
    p_base = p_base[p_base[:, 2] >= floor_height(embodiment) - 0.02]
    center: NDArray[np.float64] = p_base.mean(axis=0).round(4)
    return center, round(float(np.quantile(np.linalg.norm(p_base - center, axis=-1), 0.95)), 4)


def floor_height(embodiment: Embodiment) -> float:
    """Height of the floor that the robot stands on [m]: 0 if its base's lowest point is there, at home all the rest of
    it is above, and it rises by more than a quarter of what it spreads (else it lies on a table, like a planar finger);
    -inf if it stands nowhere, like a hand."""
    points, link = surface_points(embodiment, np.asarray(embodiment.home)[None], _NUM_POINTS)
    p_base = points[0].numpy()
    body = rigid_bodies(embodiment.model)
    fixed = [k for k, link in enumerate(embodiment.model.links) if body[link.name] == body[embodiment.model.root]]
    on_base = np.isin(link, fixed)
    low, high = p_base.min(0), p_base.max(0)
    slack = _BASE_TOLERANCE * float(np.linalg.norm(high - low))
    if not on_base.any() or abs(p_base[on_base, 2].min()) > slack or low[2] < -slack:
        return -np.inf
    return 0.0 if high[2] - low[2] > 0.25 * float(np.linalg.norm((high - low)[:2])) else -np.inf


def rigid_bodies(model: RobotModel) -> dict[str, int]:
    """Link name -> number of the rigid body it belongs to: links joined by fixed joints are one."""
    parent = {joint.child: joint for joint in model.joints if joint.type == "fixed"}
    names = [link.name for link in model.links]

    def root(name: str) -> str:
        return root(parent[name].parent) if name in parent else name

    return {name: names.index(root(name)) for name in names}
