"""May the robot be there? Collisions of its own links and of links with the floor, asked of PyBullet."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.robot.model import Geometry, RobotModel, Shape
from jidm.robot.urdf.reader import write_urdf
from jidm.sim.meshes import shape_meshes
from jidm.sim.scene import load_pybullet, suppressed_output
from jidm.sim.workspace import floor_height, rigid_bodies, size_at_home

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

_RELATIVE_CLEARANCE = 0.005  # of the robot's size at home


class FreeSpace:
    """A predicate on joint positions, `free(q) -> bool`, for one robot.

    Every collision shape (visual shape of a link that has none) counts as its convex hull. Links joined by one
    joint are let touch, and so are links that touch at home and the fingers of one gripper. A robot whose base stands
    on z = 0 keeps above that.
    Use as a context manager or call `close`.

    Args:
        embodiment: the robot.
        clearance: least distance that counts as free [m]; half a per cent of the robot's size at home if not given.
        floor: height of the floor [m]; `floor_of(embodiment)` if not given, none if -inf.
    """

    def __init__(self, embodiment: Embodiment, *, clearance: float | None = None, floor: float | None = None) -> None:
        self.embodiment = embodiment
        self.clearance = _RELATIVE_CLEARANCE * size_at_home(embodiment) if clearance is None else clearance
        self.floor = floor_height(embodiment) if floor is None else floor
        self._bullet = load_pybullet()
        self._client: int | None = self._bullet.connect(self._bullet.DIRECT)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FreeSpace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the physics client back; a second call does nothing."""
        client, self._client = self._client, None
        if client is not None:
            self._bullet.disconnect(client)

    def __call__(self, q: ArrayLike) -> bool:
        """Whether no two links, and no link and the floor, are nearer than the clearance at q (n,) [rad or m]."""
        self._set_configuration(np.asarray(q, dtype=np.float64))
        return not any(self._too_close(pair) for pair in self._pairs)

    def colliding_pairs(self, q: ArrayLike) -> list[tuple[str, str]]:
        """Names of all pairs of links that are too near at q (n,), "floor" among them."""
        self._set_configuration(np.asarray(q, dtype=np.float64))
        return [self._pair_names(pair) for k, pair in enumerate(self._pairs) if self._too_close(pair)]

    # ---- inside -------------------------------------------------------------------------------------------------

    def _call(self, function: str, *args: Any, **options: Any) -> Any:
        return getattr(self._bullet, function)(*args, physicsClientId=self._client, **options)

    def _load(self) -> None:
        model = self.embodiment.model
        self._call("setPhysicsEngineParameter", enableFileCaching=0)
        with tempfile.TemporaryDirectory(prefix="jidm-sim-") as folder:
            path = Path(folder) / "robot.urdf"
            hulls = _convex_hulls(model, Path(folder))
            write_urdf(hulls, path)
            with suppressed_output():
                self._body = self._call("loadURDF", str(path), useFixedBase=True)
        self._floor = None
        if np.isfinite(self.floor):
            plane = self._call("createCollisionShape", self._bullet.GEOM_PLANE, planeNormal=[0, 0, 1])
            self._floor = self._call("createMultiBody", 0, plane, -1, [0, 0, self.floor])
        joints, links = {}, {model.root: -1}
        for k in range(self._call("getNumJoints", self._body)):
            info = self._call("getJointInfo", self._body, k)
            joints[info[1].decode()], links[info[12].decode()] = k, k
        self._joints = [joints[joint.name] for joint in model.movable_joints]
        self._link_names = {index: name for name, index in links.items()} | {None: "floor"}
        solid = [link.name for link in hulls.links if link.collisions]
        ignored_pairs = _adjacent_links(model) | _finger_pairs(self.embodiment)
        pairs: list[tuple[int, int | None]] = [
            (links[a], links[b]) for a, b in combinations(solid, 2) if frozenset((a, b)) not in ignored_pairs
        ]
        if self._floor is not None:
            body = rigid_bodies(model)
            pairs += [(links[name], None) for name in solid if body[name] != body[model.root]]
        self._pairs = pairs
        self._set_configuration(np.asarray(self.embodiment.home, dtype=np.float64))
        self._pairs = [pair for pair in pairs if not self._too_close(pair)]

    def _set_configuration(self, q: NDArray[np.float64]) -> None:
        q_full = self.embodiment.coupling_matrix @ q + self.embodiment.coupling_offset
        for joint, value in zip(self._joints, q_full.tolist(), strict=True):
            self._call("resetJointState", self._body, joint, value)

    def _too_close(self, pair: tuple[int, int | None]) -> bool:
        a, b = pair
        if b is None:
            found = self._call("getClosestPoints", self._body, self._floor, self.clearance, a, -1)
        else:
            found = self._call("getClosestPoints", self._body, self._body, self.clearance, a, b)
        return bool(found)

    def _pair_names(self, pair: tuple[int, int | None]) -> tuple[str, str]:
        return self._link_names[pair[0]], self._link_names[pair[1]]


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
            joint.child for joint, share in zip(embodiment.model.movable_joints, column, strict=True) if share
        ]
        pairs |= {frozenset(pair) for pair in combinations(moving_links, 2)}
    return pairs
