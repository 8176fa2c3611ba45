"""Collision checks by PyBullet: of a robot's links with each other and with the floor."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jidm.robot.model import Geometry, RobotModel, Shape
from jidm.sim.meshes import shape_meshes
from jidm.sim.physics import PhysicsClient
from jidm.sim.workspace import floor_height, rigid_bodies, size_at_home

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

_RELATIVE_CLEARANCE = 0.005  # of the robot's size at home


class FreeSpace(PhysicsClient):
    """The free space of one robot as a predicate on joint positions: `free(q) -> bool`.

    Every collision shape (visual shape of a link that has none) counts as its convex hull. Not checked are links joined
    by one joint, links that touch at home, and the fingers of one gripper. A robot whose base stands on z = 0 must keep
    above that.
    Use as a context manager or call `close`.

    Args:
        embodiment: the robot.
        clearance: least distance that counts as free [m]; half a percent of the robot's size at home if not given.

    Raises:
        MissingExtraError: PyBullet is not installed.
        EmbodimentError: a mesh is missing or unreadable.
    """

    def __init__(self, embodiment: Embodiment, *, clearance: float | None = None) -> None:
        self.clearance = _RELATIVE_CLEARANCE * size_at_home(embodiment) if clearance is None else clearance
        super().__init__(embodiment, _convex_hulls)
        model = embodiment.model
        index = {model.links[k].name: child for child, k in enumerate(self.link_table, start=-1)}
        solid = [link.name for link in model.links if self.call("getCollisionShapeData", self.body, index[link.name])]
        ignored_pairs = _adjacent_links(model) | _finger_pairs(embodiment)
        pairs: list[tuple[int, int | None]] = [
            (index[a], index[b]) for a, b in combinations(solid, 2) if frozenset((a, b)) not in ignored_pairs
        ]
        height = floor_height(embodiment)
        self._floor = None
        if np.isfinite(height):
            plane = self.call("createCollisionShape", self.bullet.GEOM_PLANE, planeNormal=[0, 0, 1])
            self._floor = self.call("createMultiBody", 0, plane, -1, [0, 0, height])
            body = rigid_bodies(model)
            pairs += [(index[name], None) for name in solid if body[name] != body[model.root]]
        self.set_configuration(embodiment.home)
        self._pairs = [pair for pair in pairs if not self._too_close(pair)]

    def __call__(self, q: ArrayLike) -> bool:
        """Whether no two links, and no link and the floor, are nearer than the clearance at q (n,) [rad or m].

        Raises:
            InputError: q has another shape or is not finite.
        """
        self.set_configuration(q)
        return not any(self._too_close(pair) for pair in self._pairs)

    def _too_close(self, pair: tuple[int, int | None]) -> bool:
        a, b = pair
        other, link = (self._floor, -1) if b is None else (self.body, b)
        return bool(self.call("getClosestPoints", self.body, other, self.clearance, a, link))


def _convex_hulls(model: RobotModel, folder: Path) -> RobotModel:
    """The model with the convex hulls of its collision shapes and nothing else, meshes written into `folder`."""
    import trimesh

    links = []
    for index, link in enumerate(model.links):
        shapes = []
        for k, shape in enumerate(link.collisions or link.visuals):
            parts = [mesh for mesh, _ in shape_meshes(shape.geometry, model.name)]
            if not parts:
                continue
            hull = trimesh.convex.convex_hull(np.concatenate([part.vertices for part in parts]))
            path = folder / f"hull{index}_{k}.obj"
            path.write_text(trimesh.exchange.obj.export_obj(hull, include_normals=False), encoding="ascii")
            shapes.append(Shape(Geometry("mesh", (1.0, 1.0, 1.0), str(path), path), shape.T_link_shape))
        links.append(replace(link, visuals=(), collisions=tuple(shapes)))
    return replace(model, links=tuple(links))


def _adjacent_links(model: RobotModel) -> set[frozenset[str]]:
    """Pairs of links of one rigid body, or of two bodies with one joint between them."""
    body = rigid_bodies(model)
    joined = {frozenset((body[joint.parent], body[joint.child])) for joint in model.joints}
    return {
        frozenset((a, b))
        for a, b in combinations(body, 2)
        if body[a] == body[b] or frozenset((body[a], body[b])) in joined
    }


def _finger_pairs(embodiment: Embodiment) -> set[frozenset[str]]:
    """Pairs of links that the same gripper joint moves."""
    pairs: set[frozenset[str]] = set()
    for name in embodiment.gripper_joints:
        column = embodiment.coupling_matrix[:, embodiment.joint_index(name)]
        moving_links = [
            joint.child for joint, entry in zip(embodiment.model.movable_joints, column, strict=True) if entry
        ]
        pairs |= {frozenset(pair) for pair in combinations(moving_links, 2)}
    return pairs
