"""A robot in a viser scene: its visual shapes on frames that follow forward kinematics."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from jidm.robot.kinematics import Kinematics
from jidm.sim.meshes import parts_by_color

if TYPE_CHECKING:
    import viser

    from jidm.robot.embodiment import Embodiment

_FEATURES_PER_ROBOT = 250  # features smaller than this part of the robot's size need not be drawn


class RobotScene:
    """One robot in the scene.

    Args:
        scene: of a viser server.
        robot: what is drawn.
        name: of the scene node, such as "/robot".
        tint: color that replaces the robot's own.
        opacity: 1 is solid.
    """

    def __init__(
        self, scene: viser.SceneApi, robot: Embodiment, name: str, *,
        tint: tuple[int, int, int] | None = None, opacity: float | None = None,
    ) -> None:  # fmt: skip
        self._kinematics = Kinematics.from_embodiment(robot)
        self.root = scene.add_frame(name, show_axes=False)
        self._frames: list[tuple[int, Any]] = []
        for link, parts in _meshes(robot).items():
            frame = scene.add_frame(f"{name}/{link}", show_axes=False)
            self._frames.append((link, frame))
            for k, (color, vertices, faces) in enumerate(parts):
                scene.add_mesh_simple(
                    f"{name}/{link}/{k}", vertices, faces, color=tint or color, opacity=opacity, cast_shadow=opacity is None
                )

    def set_joints(self, q: Float[Tensor, " n"]) -> None:
        """Move the links to joint positions q [rad or m]; positions that are not finite are ignored."""
        import roma

        if not bool(q.isfinite().all()):
            return
        poses = self._kinematics.link_poses(q.double())
        quaternions = roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(poses[:, :3, :3])).numpy()
        positions = poses[:, :3, 3].numpy()
        for link, frame in self._frames:
            frame.wxyz, frame.position = quaternions[link], positions[link]


def bounding_sphere(robot: Embodiment, q: Float[Tensor, " n"]) -> tuple[NDArray[np.float64], float]:
    """Center and radius of a sphere around the robot at q, in the base frame [m]."""
    poses = Kinematics.from_embodiment(robot).link_poses(q.double()).numpy()
    corners = []
    for link, parts in _meshes(robot).items():
        for _, vertices, _ in parts:
            low, high = vertices.min(0), vertices.max(0)
            box = np.stack(np.meshgrid(*np.stack([low, high], 1), indexing="ij"), -1).reshape(-1, 3)
            corners.append(box @ poses[link, :3, :3].T + poses[link, :3, 3])
    points = np.concatenate(corners) if corners else poses[:, :3, 3]
    center = (points.min(0) + points.max(0)) / 2
    return center, max(float(np.linalg.norm(points - center, axis=1).max()), 0.05)


@lru_cache(maxsize=4)
def _meshes(robot: Embodiment) -> dict[int, list[tuple[tuple[int, int, int], NDArray[np.float32], NDArray[np.uint32]]]]:
    """Link index -> color, vertices (V, 3) in the link frame [m] and triangles (F, 3) of each of its parts."""
    origins = Kinematics.from_embodiment(robot).link_poses(torch.from_numpy(np.array(robot.home)))[:, :3, 3]
    size = max(float((origins.amax(0) - origins.amin(0)).norm()), 0.05)
    meshes = {}
    for index, link in enumerate(robot.model.links):
        if link.visuals:
            meshes[index] = [
                (tuple(round(255 * x) for x in rgba[:3]), mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32))
                for rgba, mesh in parts_by_color(link, robot.model.name, size / _FEATURES_PER_ROBOT).items()
                if len(mesh.faces)
            ]
    return meshes
