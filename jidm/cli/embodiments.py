"""`jidm embodiments`: list the registered robots, or show the descriptor of one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from jidm.cli.text import columns
from jidm.errors import JidmError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jidm.robot.embodiment import Embodiment


@dataclass(frozen=True)
class ListRobots:
    """One line per robot (the default action)."""

    def run(self) -> int:
        print(columns([("NAME", "JOINTS", "ROBOT", "LICENSE"), *table()]))
        return 0


@dataclass(frozen=True)
class ShowRobot:
    """The full descriptor of one robot."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROBOT")]
    """Robot: a name as listed, a URDF file, or a folder with an embodiment.toml."""

    mesh_roots: tuple[Path, ...] = ()
    """Folders of the meshes of a URDF file, besides its own: a package, the folder above, or where a mesh's path continues."""

    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> int:
        from jidm.robot.registry import load_embodiment

        robot = load_embodiment(self.name, mesh_roots=self.mesh_roots)
        print(json.dumps(as_dict(robot), indent=2) if self.json else describe(robot))
        return 0


@dataclass(frozen=True)
class Embodiments:
    """The registered robots."""

    action: Annotated[ListRobots, tyro.conf.subcommand("list")] | Annotated[ShowRobot, tyro.conf.subcommand("show")] = (
        field(default_factory=ListRobots)
    )

    def run(self) -> int:
        return self.action.run()


class RobotRow(NamedTuple):
    """One line of the table of robots, as text."""

    name: str
    joints: str
    title: str
    license: str


def table() -> list[RobotRow]:
    """All registered robots, sorted by name; the title of one that cannot be loaded is its error."""
    from tqdm import tqdm

    from jidm.robot.registry import embodiment_names, load_embodiment

    rows = []
    for name in tqdm(embodiment_names(), desc="reading robots", unit="robot", delay=2, leave=False):
        try:
            robot = load_embodiment(name)
        except JidmError as error:
            rows.append(RobotRow(name, "?", str(error), ""))
            continue
        num_grippers = len(robot.gripper_joints)
        joints = f"{robot.n - num_grippers} + {num_grippers}" if num_grippers else f"{robot.n}"
        rows.append(RobotRow(name, joints, robot.title or robot.model.name, robot.license))
    return rows


def as_dict(robot: Embodiment) -> dict[str, object]:
    """The descriptor as JSON values; infinite limits are null."""

    def numbers(x: NDArray[np.float64]) -> list[float | None]:
        return [v if math.isfinite(v) else None for v in x.tolist()]

    vectors = ("lower", "upper", "velocity", "acceleration", "jerk", "effort", "home", "exploration_range")
    return {
        "name": robot.name,
        "title": robot.title,
        "joint_names": list(robot.joint_names),
        "joint_types": list(robot.joint_types),
        **{name: numbers(getattr(robot, name)) for name in vectors},
        "control_dt": robot.control_dt,
        "base_link": robot.base_link,
        "tip_links": list(robot.tip_links),
        "gripper_joints": list(robot.gripper_joints),
        "mimic": mimic_lines(robot),
        "links": len(robot.model.links),
        "link_names": [link.name for link in robot.model.links],
        "missing_meshes": missing_meshes(robot),
        "cameras": {name: dict(camera) for name, camera in robot.cameras.items()},
        "conventions": sorted(robot.conventions),
        "license": robot.license,
        "source": robot.source,
        "notes": dict(robot.notes),
        "content_hash": robot.content_hash,
    }


def describe(robot: Embodiment) -> str:
    """The descriptor as text, one joint per line; every number has its unit."""
    vectors = (robot.lower, robot.upper, robot.velocity, robot.acceleration, robot.jerk, robot.effort, robot.home)
    head = ("JOINT", "TYPE", "LOWER", "UPPER", "VELOCITY", "ACCEL", "JERK", "EFFORT", "HOME")
    rows = [
        (name, kind, *(f"{v[k]:.4g}" for v in vectors))
        for k, (name, kind) in enumerate(zip(robot.joint_names, robot.joint_types, strict=True))
    ]
    lines = [
        f"{robot.name}: {robot.title}",
        f"  joints        {robot.n} ({len(robot.gripper_joints)} gripper), {len(robot.model.links)} links",
        f"  links         {', '.join(link.name for link in robot.model.links)}",
        *(f"  MISSING MESH  {text}" for text in missing_meshes(robot)),
        f"  base, tips    {robot.base_link}; {', '.join(robot.tip_links) or 'none'}",
        f"  gripper       {', '.join(robot.gripper_joints) or 'none'}",
        f"  mimic         {'; '.join(mimic_lines(robot)) or 'none'}",
        f"  control       every {robot.control_dt * 1000:g} ms",
        f"  cameras       {', '.join(robot.cameras) or 'none'}",
        f"  conventions   {', '.join(robot.conventions) or 'none'}",
        f"  license       {robot.license}",
        f"  source        {robot.source}",
        f"  content hash  {robot.content_hash}",
        "",
        columns([head, *rows]),
        "revolute: rad, rad/s, rad/s^2, rad/s^3, N m; prismatic: m, m/s, m/s^2, m/s^3, N; inf: no limit known",
    ]
    if robot.notes:
        lines += ["", "sources of the numbers", *(f"  {key}: {note}" for key, note in robot.notes.items())]
    return "\n".join(lines)


def missing_meshes(robot: Embodiment) -> list[str]:
    """What was not found, and where it was looked for, once per mesh."""
    from jidm.robot.shape_mesh import not_found

    shapes = (shape.geometry for link in robot.model.links for shape in (*link.visuals, *link.collisions))
    missing = (x for x in shapes if x.kind == "mesh" and x.path is None)
    return list(dict.fromkeys(map(not_found, missing)))


def mimic_lines(robot: Embodiment) -> list[str]:
    """`joint = factor * actuated + offset` for every movable joint that is not actuated itself."""
    lines = []
    for m, joint in enumerate(robot.model.movable_joints):
        if joint.name in robot.joint_names:
            continue
        row, offset = robot.coupling_matrix[m], robot.coupling_offset[m]
        terms = [f"{row[k]:g} * {name}" for k, name in enumerate(robot.joint_names) if row[k]]
        if offset or not terms:
            terms.append(f"{offset:g}")
        lines.append(f"{joint.name} = {' + '.join(terms)}")
    return lines
