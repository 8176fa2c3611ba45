"""The robot as a tree of links and joints: plain data, without parsing and kinematics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jidm.errors import EmbodimentError, UrdfError, did_you_mean

JointType = Literal["revolute", "continuous", "prismatic", "fixed", "floating", "planar"]
MOVABLE: tuple[JointType, ...] = ("revolute", "continuous", "prismatic")
"""Joint types with one coordinate. Floating and planar joints are read but held at their zero pose."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """One shape in its own frame [m].

    kind and size: box (x, y, z edge lengths); cylinder and capsule (radius, length along z);
    sphere (radius,); mesh (scale x, y, z).
    """

    kind: Literal["box", "cylinder", "sphere", "capsule", "mesh"]
    size: tuple[float, ...]
    filename: str | None = None
    """Mesh reference as written in the file."""
    path: Path | None = None
    """Mesh file on disk, inside the allowed roots; None if the reference was not found."""
    searched: tuple[Path, ...] = ()
    """Where a mesh that was not found was looked for."""


@dataclass(frozen=True, eq=False)
class Shape:
    """A visual or collision element of a link."""

    geometry: Geometry
    T_link_shape: NDArray[np.float64]
    """(4, 4) pose of the shape in its link's frame [m]."""
    rgba: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, eq=False)
class Link:
    """A rigid body with the shapes that are drawn and those that collide."""

    name: str
    visuals: tuple[Shape, ...] = ()
    collisions: tuple[Shape, ...] = ()


@dataclass(frozen=True)
class Limit:
    """Joint limits in rad or m (and per second); None where the file states none."""

    lower: float | None = None
    upper: float | None = None
    velocity: float | None = None
    effort: float | None = None


@dataclass(frozen=True)
class Mimic:
    """This joint = multiplier * other joint + offset, as written; `RobotModel.coupling` resolves chains of mimics."""

    joint: str
    multiplier: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Joint:
    """A joint from a parent link to a child link, whose frame is the joint frame after its motion."""

    name: str
    type: JointType
    parent: str
    child: str
    T_parent_joint: NDArray[np.float64]
    """(4, 4) pose of the joint frame in the parent link's frame at q = 0 [m]."""
    axis: NDArray[np.float64]
    """(3,) unit axis in the joint frame; rotation is right-handed about it, translation along it."""
    limit: Limit = Limit()
    mimic: Mimic | None = None

    @property
    def movable(self) -> bool:
        return self.type in MOVABLE


@dataclass(frozen=True, eq=False)
class RobotModel:
    """Links and joints in depth-first order from the root: `joints[k].child == links[k + 1].name`."""

    name: str
    links: tuple[Link, ...]
    joints: tuple[Joint, ...]

    def __post_init__(self) -> None:
        if len(self.links) != len(self.joints) + 1:
            raise UrdfError(f"robot '{self.name}': {len(self.links)} links need {len(self.links) - 1} joints")
        seen = {self.links[0].name}
        for joint, link in zip(self.joints, self.links[1:], strict=True):
            if joint.child != link.name or joint.parent not in seen:
                raise UrdfError(f"robot '{self.name}': joint '{joint.name}' breaks the depth-first order of links")
            seen.add(link.name)

    @property
    def root(self) -> str:
        """Name of the root link, whose frame is the base frame."""
        return self.links[0].name

    @property
    def movable_joints(self) -> tuple[Joint, ...]:
        """All joints with one coordinate, mimics included; the order of `q_full`."""
        return tuple(j for j in self.joints if j.movable)

    def link_index(self, name: str) -> int:
        """Index of a link in `links`.

        Raises:
            UrdfError: the robot has no such link; the message suggests the nearest name.
        """
        for k, link in enumerate(self.links):
            if link.name == name:
                return k
        raise UrdfError(f"robot '{self.name}' has no link '{name}': {did_you_mean(name, (x.name for x in self.links))}")

    def match_links(self, patterns: Sequence[str]) -> tuple[int, ...]:
        """Indices of the links whose names match, in ascending order.

        Args:
            patterns: names, or patterns with `*`, `?` and `[...]`.

        Raises:
            EmbodimentError: a pattern matches no link (the message suggests the nearest name), or there is no pattern.
        """
        names = [link.name for link in self.links]
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        if not patterns:
            raise EmbodimentError(f"robot '{self.name}': links= names no link; leave it out to take all of them")
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise EmbodimentError(f"robot '{self.name}' has no link '{pattern}': {did_you_mean(pattern, names)}")
        return tuple(k for k, name in enumerate(names) if any(fnmatchcase(name, x) for x in patterns))

    def coupling(
        self, actuated: tuple[str, ...], locked: Mapping[str, float] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The linear map `q_full = A @ q + b` from actuated joints to all movable joints.

        Args:
            actuated: names of the actuated joints, the order of `q` (n of them).
            locked: joints held at a fixed value [rad or m].

        Returns:
            A (m, n) and b (m,), m = number of movable joints; mimic chains are composed.

        Raises:
            UrdfError: a movable joint is neither actuated, locked nor a mimic of one that is.
        """
        locked = dict(locked or {})
        by_name = {j.name: j for j in self.movable_joints}
        for name in (*actuated, *locked):
            if name not in by_name:
                raise UrdfError(f"robot '{self.name}' has no movable joint '{name}': it has {', '.join(by_name)}")
        column = {name: k for k, name in enumerate(actuated)}
        rows: dict[str, tuple[NDArray[np.float64], float]] = {}

        for name in by_name:
            # The mimics on the way to a joint that is known. A loop, not a recursion: chains may be long.
            chain: dict[str, Mimic] = {}
            while name not in rows:
                unit, mimic = np.zeros(len(actuated)), by_name[name].mimic
                if name in chain:
                    cycle = " -> ".join((*chain, name))
                    raise UrdfError(f"robot '{self.name}': joints mimic each other in a cycle: {cycle}")
                if name in column:
                    unit[column[name]] = 1.0
                    rows[name] = (unit, 0.0)
                elif name in locked:
                    rows[name] = (unit, float(locked[name]))
                elif mimic is None:
                    what = f"joint '{name}' is neither actuated, locked nor a mimic; name it"
                    raise UrdfError(f"robot '{self.name}': {what}")
                elif mimic.joint not in by_name:  # a fixed joint, which stays at zero
                    rows[name] = (unit, mimic.offset)
                else:
                    chain[name] = mimic
                    name = mimic.joint
            for name, mimic in reversed(chain.items()):
                a, b = rows[mimic.joint]
                rows[name] = (mimic.multiplier * a, mimic.multiplier * b + mimic.offset)

        pairs = [rows[name] for name in by_name]
        A = np.stack([a for a, _ in pairs]) if pairs else np.zeros((0, len(actuated)))
        return A, np.array([b for _, b in pairs])


def join_models(name: str, parts: Mapping[str, tuple[RobotModel, NDArray[np.float64]]]) -> RobotModel:
    """Several robots as one tree: each is mounted on one new root link, `base`, by a fixed joint.

    Args:
        name: name of the new robot.
        parts: prefix -> (model, T_base_part (4, 4)); links and joints are renamed `<prefix>_<name>`.
    """
    root = "base"
    links, joints = [Link(root)], []
    for prefix, (model, T_base_part) in parts.items():

        def renamed(x: str, prefix: str = prefix) -> str:
            return f"{prefix}_{x}"

        mount = Joint(
            renamed("mount"), "fixed", root, renamed(model.root), np.asarray(T_base_part, float), np.array([1.0, 0, 0])
        )
        joints.append(mount)
        links.extend(replace(link, name=renamed(link.name)) for link in model.links)
        for j in model.joints:
            mimic = replace(j.mimic, joint=renamed(j.mimic.joint)) if j.mimic else None
            joints.append(
                replace(j, name=renamed(j.name), parent=renamed(j.parent), child=renamed(j.child), mimic=mimic)
            )
    return RobotModel(name, tuple(links), tuple(joints))
