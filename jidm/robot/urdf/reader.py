"""A strict, safe URDF reader.

Strict: what other readers repair silently (truncated files, cycles, zero axes, lower > upper, NaN) is refused, and the
message names file, element and remedy. Safe: no entities, no files outside the robot's folders, no network, a size
limit, no recursion. Only direct children of <robot> are links and joints; elements of the same names inside
<transmission> and <gazebo> are not.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from jidm.errors import UrdfError, did_you_mean
from jidm.robot.mesh_resolver import MeshResolver
from jidm.robot.model import Geometry, Joint, JointType, Limit, Link, Mimic, RobotModel, Shape
from jidm.robot.transforms import rigid_transform
from jidm.robot.urdf.xml import MAX_BYTES, check_size, one_line, parse_xml

_JOINT_TYPES: tuple[str, ...] = get_args(JointType)
_LIMITED_TYPES = ("revolute", "prismatic")
# Attributes of links and joints that hold names, not numbers: a link may be called "nan".
_NAME_ATTRIBUTES = frozenset({"name", "filename", "link", "joint", "type", "group"})
Color = tuple[float, float, float, float]


def read_urdf(path: str | Path, *, mesh_roots: Sequence[str | Path] = ()) -> RobotModel:
    """Robot model from a URDF file.

    Values: lengths in meters, angles in radians. Axes are normalized. One bound of a revolute or prismatic joint may be
    left out and is then 0, as the format defines; a joint without both is refused. Bounds of other joint types have no
    meaning and are dropped. A velocity or effort limit of 0 or -1 counts as not stated: exporters write 0 for an empty
    field, simulators -1 for no limit. Inertias, transmissions, sensors and other elements without a place in the model are not read, but a
    NaN or infinity anywhere in a link or joint is refused.

    Args:
        path: the file.
        mesh_roots: folders that meshes may lie in, besides the file's own package (see `MeshResolver`). A mesh that is
            not on disk leaves `Geometry.path` None; one that leads outside these folders is refused.

    Raises:
        UrdfError: the file is unreadable, malformed, unsafe or ambiguous; the message names file, element, remedy.
    """
    path = Path(path)
    where = one_line(str(path))
    try:
        regular = stat.S_ISREG(path.stat().st_mode)  # opening a pipe or a device could wait forever
        data = b""
        if regular:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UrdfError(f"{where}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:  # a zero byte in the path
        raise UrdfError(f"{where}: is no file name; check the path") from None
    if not regular:
        raise UrdfError(f"{where}: is not a file; name the URDF file itself")
    check_size(len(data), where)
    return parse_urdf(data, where=where, directory=path.parent, mesh_roots=mesh_roots)


def parse_urdf(
    text: str | bytes,
    *,
    where: str = "<string>",
    directory: Path | None = None,
    mesh_roots: Sequence[str | Path] = (),
) -> RobotModel:
    """Robot model from URDF text, as `read_urdf`.

    Args:
        text: the URDF.
        where: name of the text in messages.
        directory: folder of relative mesh references; without one only `mesh_roots` are searched.
        mesh_roots: as for `read_urdf`.
    """
    return _Reader(where, directory, MeshResolver(mesh_roots)).model(parse_xml(text, where))


@dataclass(frozen=True)
class _Reader:
    where: str
    directory: Path | None
    mesh_resolver: MeshResolver

    def model(self, root: Element) -> RobotModel:
        self._refuse_xacro(root)
        colors = self._colors(root)
        links = self._unique("link", (self._link(e, k, colors) for k, e in enumerate(root.findall("link"))))
        joints = self._unique("joint", (self._joint(e, k) for k, e in enumerate(root.findall("joint"))))
        if not links:
            raise self._error("<robot>", "has no links; add at least one <link>")
        self._check_mimics(joints)
        children = self._children(links, joints)
        link_order, joint_order = self._depth_first(root, links, children)
        return RobotModel(root.get("name") or "robot", tuple(links[n] for n in link_order), tuple(joint_order))

    # ---- elements ----------------------------------------------------------------------------------------------------

    def _link(self, e: Element, index: int, colors: dict[str, Color]) -> Link:
        name = self._name(e, index)
        place = f"link '{name}'"
        self._refuse_non_finite(e, place)
        self._refuse_misplaced_origin(e, place, "the <visual>, <collision> or <inertial> that it belongs to")
        visuals = (self._shape(x, f"{place} <visual>", colors) for x in e.findall("visual"))
        collisions = (self._shape(x, f"{place} <collision>", None) for x in e.findall("collision"))
        return Link(name, tuple(s for s in visuals if s), tuple(s for s in collisions if s))

    def _shape(self, e: Element, place: str, colors: dict[str, Color] | None) -> Shape | None:
        geometry_element = self._optional_child(e, "geometry", place)
        if geometry_element is None:
            raise self._error(place, "has no <geometry>; add one or remove the element")
        self._refuse_misplaced_origin(geometry_element, f"{place} <geometry>", f"<{e.tag}>, beside <geometry>")
        shapes = [x for x in geometry_element if x.tag not in ("origin", "material")]
        if (count := len(shapes)) != 1:
            raise self._error(place, f"<geometry> must hold one shape, it holds {count}; use one element for each")
        self._refuse_misplaced_origin(shapes[0], f"{place} <{shapes[0].tag}>", f"<{e.tag}>, beside <geometry>")
        geometry = self._geometry(shapes[0], place)
        if geometry is None:
            return None
        rgba = None
        if colors is not None:
            materials = e.findall("material")
            stated = (_color(m) or colors.get(m.get("name") or "") for m in materials)
            rgba = next((color for color in stated if color), None)
        return Shape(geometry, self._origin(e, place), rgba)

    def _geometry(self, e: Element, place: str) -> Geometry | None:
        place = f"{place} <{e.tag}>"
        if e.tag == "box":
            return Geometry("box", self._sizes(e, ("size",), place, count=3))
        if e.tag == "sphere":
            return Geometry("sphere", self._sizes(e, ("radius",), place))
        if e.tag in ("cylinder", "capsule"):
            return Geometry(e.tag, self._sizes(e, ("radius", "length"), place))  # type: ignore[arg-type]
        if e.tag == "mesh":
            return self._mesh(e, place)
        if ":" in e.tag or e.tag in ("plane", "ellipsoid", "convex"):
            return None  # an extension of another tool, which draws nothing here
        raise self._error(place, "is no shape of the URDF format; use box, sphere, cylinder, capsule or mesh")

    def _mesh(self, e: Element, place: str) -> Geometry:
        filename = e.get("filename")
        if not filename:
            raise self._error(place, "has no filename; name the mesh file")
        scale = tuple(self._numbers(e, "scale", 3, place, default="1 1 1"))
        if 0.0 in scale:
            raise self._error(place, "has a scale of zero; a mesh needs three non-zero factors")
        try:
            path, searched = self.mesh_resolver.search(filename, self.directory)
        except UrdfError as error:
            raise self._error(place, str(error)) from None
        return Geometry("mesh", scale, filename, path, searched)

    def _joint(self, e: Element, index: int) -> Joint:
        name = self._name(e, index)
        place = f"joint '{name}'"
        self._refuse_non_finite(e, place)
        kind = e.get("type") or ""
        if kind not in _JOINT_TYPES:
            raise self._error(place, f"has unknown type '{kind}'; {did_you_mean(kind[:80], _JOINT_TYPES)}")
        ends = {}
        for tag in ("parent", "child"):
            elements = e.findall(tag)
            if len(elements) != 1 or not elements[0].get("link"):
                raise self._error(place, f"must name one {tag} link, as <{tag} link=.../>")
            ends[tag] = str(elements[0].get("link"))
        axis = self._axis(self._optional_child(e, "axis", place), place, moves=kind not in ("fixed", "floating"))
        limit = self._limit(self._optional_child(e, "limit", place), place, kind)
        mimic = self._mimic(self._optional_child(e, "mimic", place), place)
        return Joint(name, kind, ends["parent"], ends["child"], self._origin(e, place), axis, limit, mimic)  # type: ignore[arg-type]

    def _axis(self, e: Element | None, place: str, *, moves: bool) -> NDArray[np.float64]:
        if e is None or not moves:
            return np.array([1.0, 0.0, 0.0])  # the format's default; a fixed joint's axis has no meaning
        v = np.array(self._numbers(e, "xyz", 3, f"{place} <axis>"))
        largest = float(np.abs(v).max())
        if largest < 1e-9:
            raise self._error(place, "has a zero axis; give its direction, for instance xyz='0 0 1'")
        v = v / largest  # first, so that no square overflows
        return v / np.linalg.norm(v)

    def _limit(self, e: Element | None, place: str, kind: str) -> Limit:
        remedy = (
            "give it lower and upper [rad], or make it continuous"
            if kind == "revolute"
            else "give it lower and upper [m]"
        )
        if e is None:
            if kind in _LIMITED_TYPES:
                raise self._error(place, f"is {kind} and has no <limit>; {remedy}")
            return Limit()
        values = {k: self._number(e, k, f"{place} <limit>") for k in ("lower", "upper", "velocity", "effort")}
        lower, upper = values["lower"], values["upper"]
        if kind not in _LIMITED_TYPES:
            lower = upper = None
        elif lower is None and upper is None:
            # The format's default is 0 for each; both omitted would lock the joint silently.
            raise self._error(place, f"has a <limit> without lower and upper; {remedy}")
        else:
            lower, upper = lower or 0.0, upper or 0.0
            if lower > upper:
                raise self._error(place, f"has lower {lower:g} > upper {upper:g}; swap them")
        return Limit(lower, upper, *(self._rate_limit(values[k], k, place, kind) for k in ("velocity", "effort")))

    def _rate_limit(self, value: float | None, key: str, place: str, kind: str) -> float | None:
        # Exporters write 0 for an empty field; a joint that may not move would be a fixed one. Simulators write -1 for
        # "no limit". Both leave it open how fast or strong the joint is.
        if value in (None, 0.0, -1.0):
            return None
        assert value is not None
        if value < 0:
            unit = {"velocity": "m/s", "effort": "N"} if kind == "prismatic" else {"velocity": "rad/s", "effort": "N m"}
            what = f"has a limit of {value:g} for its {key}, which no joint can keep; write the joint's own limit [{unit[key]}]"
            raise self._error(place, f"{what}, or leave {key} out where it is unknown")
        return value

    def _mimic(self, e: Element | None, place: str) -> Mimic | None:
        if e is None:
            return None
        joint, place = e.get("joint"), f"{place} <mimic>"
        if not joint:
            raise self._error(place, "names no joint; add joint=...")
        multiplier, offset = (self._number(e, key, place) for key in ("multiplier", "offset"))
        return Mimic(joint, 1.0 if multiplier is None else multiplier, offset or 0.0)

    def _origin(self, e: Element, place: str) -> NDArray[np.float64]:
        origin = self._optional_child(e, "origin", place)
        if origin is None:
            return np.eye(4)
        xyz, rpy = (self._numbers(origin, k, 3, f"{place} <origin>", default="0 0 0") for k in ("xyz", "rpy"))
        return rigid_transform(xyz, rpy)

    def _refuse_misplaced_origin(self, e: Element, place: str, right_place: str) -> None:
        """An <origin> where the format has none would be ignored, and the shape drawn in another pose."""
        for origin in e.findall("origin"):
            xyz, rpy = (self._numbers(origin, k, 3, f"{place} <origin>", default="0 0 0") for k in ("xyz", "rpy"))
            if any(xyz) or any(rpy):
                raise self._error(place, f"holds an <origin>, which has no effect there; move it into {right_place}")

    # ---- the tree ----------------------------------------------------------------------------------------------------

    def _refuse_xacro(self, root: Element) -> None:
        # A macro call that a generator left behind is ignored like the element of any other tool. Definitions show that
        # the file is the source of a URDF, of which only a part would be read.
        for e in root:
            if e.tag in ("xacro:include", "xacro:macro", "xacro:property", "xacro:arg", "xacro:if", "xacro:unless"):
                raise self._error(
                    "<robot>", f"holds <{e.tag}>; this is a xacro file: run xacro on it and read the result"
                )

    def _colors(self, root: Element) -> dict[str, Color]:
        """Colors by material name, the first that is stated: those below <robot>, then those inside visuals."""
        colors: dict[str, Color] = {}
        for material in (*root.iterfind("material"), *root.iterfind("link/visual/material")):
            if rgba := _color(material):
                colors.setdefault(material.get("name") or "", rgba)
        return colors

    def _check_mimics(self, joints: dict[str, Joint]) -> None:
        resolved: set[str] = set()
        for name in joints:
            chain: dict[str, None] = {}
            while name not in resolved and (mimic := joints[name].mimic) is not None:
                chain[name] = None
                if mimic.joint not in joints:
                    what = f"mimics '{mimic.joint}', which does not exist; {_suggest(mimic.joint, joints)}"
                    raise self._error(f"joint '{name}'", what)
                if mimic.joint in chain:
                    cycle = [*list(chain)[list(chain).index(mimic.joint) :], mimic.joint]
                    what = "itself" if len(cycle) == 2 else "in a cycle: " + " -> ".join(cycle)
                    raise self._error(f"joint '{name}'", f"mimics {what}; one joint must be free")
                name = mimic.joint
            resolved.update(chain)

    def _children(self, links: dict[str, Link], joints: dict[str, Joint]) -> dict[str, list[Joint]]:
        """The joints whose parent is each link, in file order; every link but the roots is the child of one joint."""
        children: dict[str, list[Joint]] = {name: [] for name in links}
        parent_joint: dict[str, str] = {}
        for joint in joints.values():
            place = f"joint '{joint.name}'"
            for role, link in (("parent", joint.parent), ("child", joint.child)):
                if link not in links:
                    what = f"has {role} '{link}', which is no link; add <link name='{link}'/> or correct the name"
                    raise self._error(place, f"{what}: {_suggest(link, links)}")
            if joint.parent == joint.child:
                raise self._error(place, f"joins link '{joint.child}' to itself: a cycle; remove it")
            if joint.child in parent_joint:
                what = f"hangs on two joints, '{parent_joint[joint.child]}' and '{joint.name}'; a URDF is a tree, remove one"
                raise self._error(f"link '{joint.child}'", what)
            parent_joint[joint.child] = joint.name
            children[joint.parent].append(joint)
        return children

    def _depth_first(
        self, root: Element, links: dict[str, Link], children: dict[str, list[Joint]]
    ) -> tuple[list[str], list[Joint]]:
        child_links = {joint.child for joints in children.values() for joint in joints}
        roots = [name for name in links if name not in child_links]
        if not roots:
            raise self._error("<robot>", "has no root link, its joints form a cycle; remove one joint")
        if len(roots) > 1:
            foreign = next((e.tag for e in root if e.tag.endswith(":joint")), None)
            note = f" (<{foreign}> is another tool's element and not read)" if foreign else ""
            names = ", ".join(roots[:5]) + (", ..." if len(roots) > 5 else "")
            raise self._error("<robot>", f"has {len(roots)} root links ({names}){note}; join them by fixed joints")
        link_order, joint_order, stack = [roots[0]], [], children[roots[0]][::-1]
        while stack:
            joint = stack.pop()
            joint_order.append(joint)
            link_order.append(joint.child)
            stack.extend(reversed(children[joint.child]))
        if len(link_order) < len(links):
            reached = set(link_order)
            unreachable = next(name for name in links if name not in reached)
            raise self._error(
                f"link '{unreachable}'", "is part of a cycle that the root does not reach; remove one joint"
            )
        return link_order, joint_order

    # ---- values ------------------------------------------------------------------------------------------------------

    def _name(self, e: Element, index: int) -> str:
        name = e.get("name")
        if not name:
            raise self._error(f"<{e.tag}> number {index + 1}", "has no name; every link and joint needs one")
        return name

    def _unique(self, kind: str, items: Iterator[Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for item in items:
            if item.name in result:
                raise self._error(f"{kind} '{item.name}'", "occurs twice; give each its own name")
            result[item.name] = item
        return result

    def _optional_child(self, e: Element, tag: str, place: str) -> Element | None:
        elements = e.findall(tag)
        if len(elements) > 1:
            raise self._error(place, f"holds {len(elements)} <{tag}> elements where one is meant; keep one")
        return elements[0] if elements else None

    def _numbers(self, e: Element, key: str, count: int, place: str, *, default: str | None = None) -> list[float]:
        text = e.get(key, default)
        if text is None:
            raise self._error(place, f"has no {key}; add {key}= with {count} number{'s' * (count > 1)}")
        if "$" in text:
            raise self._error(place, f"{key}='{text}' is an unexpanded xacro expression; run xacro on the file first")
        parts = text.split()
        if len(parts) != count:
            raise self._error(place, f"{key}='{text}' must hold {count} number{'s' * (count > 1)}; correct it")
        return [self._finite_float(part, key, place) for part in parts]

    def _number(self, e: Element, key: str, place: str) -> float | None:
        return None if e.get(key) is None else self._numbers(e, key, 1, place)[0]

    def _sizes(self, e: Element, keys: Sequence[str], place: str, count: int = 1) -> tuple[float, ...]:
        values = [x for key in keys for x in self._numbers(e, key, count, place)]
        if min(values) < 0:
            raise self._error(place, f"has a negative size {values}; sizes are lengths [m]")
        return tuple(values)

    def _finite_float(self, text: str, key: str, place: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or "_" in text or not text.isascii():  # Python alone accepts 1_000 and ١
            raise self._error(place, f"{key}='{text}' is not a finite number; write one, as 0.5 or 1e-3")
        return value

    def _refuse_non_finite(self, e: Element, place: str) -> None:
        for x in e.iter():
            for key, text in x.attrib.items():
                if key in _NAME_ATTRIBUTES or x.tag == "color":
                    continue
                for token in text.split():
                    if not _is_finite_or_text(token):
                        what = f"{key}='{text}' is not a finite number; write one, as 0.5 or 1e-3"
                        raise self._error(place if x is e else f"{place} <{x.tag}>", what)

    def _error(self, place: str, what: str) -> UrdfError:
        return UrdfError(f"{self.where}: {one_line(f'{place} {what}')}")


def _color(material: Element) -> Color | None:
    """The first color that can be read, in [0, 1]; opaque if only red, green and blue are given. None if there is none.

    A robot is never refused for its colors: only pictures of it depend on them.
    """
    for color in material.findall("color"):
        try:
            values = [float(text) for text in (color.get("rgba") or "").split()]
        except ValueError:
            continue
        if len(values) in (3, 4) and all(math.isfinite(value) for value in values):
            r, g, b, a = (min(max(value, 0.0), 1.0) for value in [*values, 1.0][:4])
            return r, g, b, a
    return None


def _is_finite_or_text(token: str) -> bool:
    try:
        return math.isfinite(float(token))
    except ValueError:
        return "#" not in token  # 1.#QNAN, -1.#IND and 1.#INF are one compiler's spellings


def _suggest(name: str, known: Collection[str]) -> str:
    # The search for the nearest of many long names takes time that a hostile file could exploit.
    short = [x for x in known if len(x) <= 200]
    return did_you_mean(name[:200], short) if len(short) <= 300 else f"there are {len(known)}"
