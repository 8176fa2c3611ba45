"""A strict, safe URDF reader, and a writer for simulators.

Strict: what other readers repair in silence (truncated files, cycles, zero axes, lower > upper, NaN) is refused with
file, element and remedy. Safe: no entities, no files outside the robot's folders, no network, a size cap, no recursion.
Only direct children of <robot> are links and joints; <transmission> and <gazebo> hold namesakes that are not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np
from numpy.typing import NDArray

from jidm.errors import UrdfError, did_you_mean
from jidm.robot.model import Geometry, Joint, JointType, Limit, Link, Mimic, RobotModel, Shape
from jidm.robot.resources import MeshLocator

MAX_BYTES = 16 * 2**20
"""Larger files are refused; the largest real robots stay under one MiB."""

_TYPES: tuple[str, ...] = get_args(JointType)


def read_urdf(path: str | Path, *, mesh_roots: Sequence[str | Path] = ()) -> RobotModel:
    """Robot model from a URDF file.

    Args:
        mesh_roots: folders in which `package://` and other mesh references may be looked up, besides the file's own
            folder and its parent. Meshes that are not on disk leave `Geometry.path` empty.

    Raises:
        UrdfError: the file is unreadable, malformed, unsafe or ambiguous; the message names file, element, remedy.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UrdfError(f"{path}: larger than {MAX_BYTES // 2**20} MiB; a URDF holds no mesh data, check the file")
        data = path.read_bytes()
    except OSError as error:
        raise UrdfError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return parse_urdf(data, where=str(path), directory=path.parent, mesh_roots=mesh_roots)


def parse_urdf(
    text: str | bytes,
    *,
    where: str = "<string>",
    directory: Path | None = None,
    mesh_roots: Sequence[str | Path] = (),
) -> RobotModel:
    """Robot model from URDF text; `where` names it in messages, `directory` is where relative meshes start."""
    root = _parse_xml(text, where)
    return _Reader(where, directory, MeshLocator(mesh_roots), _named_colours(root)).model(root)


def write_urdf(model: RobotModel, path: str | Path | None = None) -> str:
    """URDF text of a model, with absolute mesh paths, enough for a simulator to draw and move it.

    Inertias are placeholders (1 kg, 0.01 kg m^2): the model holds none. Meshes that were not found are left out.
    """
    root = Element("robot", name=model.name)
    for link in model.links:
        element = SubElement(root, "link", name=link.name)
        inertial = SubElement(element, "inertial")
        SubElement(inertial, "mass", value="1")
        SubElement(inertial, "inertia", ixx="0.01", iyy="0.01", izz="0.01", ixy="0", ixz="0", iyz="0")
        for tag, shapes in (("visual", link.visuals), ("collision", link.collisions)):
            for shape in shapes:
                _write_shape(element, tag, shape, model.name)
    for joint in model.joints:
        _write_joint(root, joint)
    indent(root)
    text = '<?xml version="1.0"?>\n' + tostring(root, encoding="unicode") + "\n"
    if path is not None:
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return text


# ---- reading --------------------------------------------------------------------------------------------------------


def _parse_xml(text: str | bytes, where: str) -> Element:
    from defusedxml import DefusedXmlException, ElementTree

    data = text.encode("utf-8") if isinstance(text, str) else text
    if len(data) > MAX_BYTES:
        raise UrdfError(f"{where}: larger than {MAX_BYTES // 2**20} MiB; a URDF holds no mesh data, check the file")
    if not data.strip():
        raise UrdfError(f"{where}: the file is empty; was it written completely?")
    try:
        root: Element = ElementTree.fromstring(data, forbid_dtd=True)
    except DefusedXmlException:
        raise UrdfError(f"{where}: holds a DTD or entities, which a URDF never needs; remove the DOCTYPE") from None
    except (ElementTree.ParseError, ValueError, LookupError, UnicodeError) as error:
        raise UrdfError(f"{where}: not well-formed XML ({error}); is the file cut off, or a xacro file?") from None
    if root.tag != "robot":
        raise UrdfError(f"{where}: the outermost element is <{root.tag}>, a URDF's is <robot>")
    return root


def _named_colours(root: Element) -> dict[str | None, Element]:
    """Colours by material name: shapes may name a material that is defined elsewhere, first of all below <robot>."""
    colours: dict[str | None, Element] = {}
    for material in (*root.findall("material"), *root.iter("material")):
        if (colour := material.find("color")) is not None:
            colours.setdefault(material.get("name"), colour)
    return colours


@dataclass(frozen=True)
class _Reader:
    where: str
    directory: Path | None
    locator: MeshLocator
    colours: Mapping[str | None, Element]

    def model(self, root: Element) -> RobotModel:
        name = root.get("name") or "robot"
        links = self._unique("link", (self._link(e) for e in root.findall("link")))
        joints = self._unique("joint", (self._joint(e) for e in root.findall("joint")))
        if not links:
            raise self._error("<robot>", "has no links; add at least one <link>")
        self._check_mimics(joints)
        order = self._depth_first(links, joints)
        return RobotModel(name, tuple(links[n] for n in order[0]), tuple(joints[n] for n in order[1]))

    # -- elements

    def _link(self, e: Element) -> Link:
        name = self._name(e)
        shapes = {
            tag: tuple(s for x in e.findall(tag) if (s := self._shape(x, f"link '{name}' <{tag}>")) is not None)
            for tag in ("visual", "collision")
        }
        return Link(name, shapes["visual"], shapes["collision"])

    def _shape(self, e: Element, place: str) -> Shape | None:
        holder = e.find("geometry")
        if holder is None:
            raise self._error(place, "has no <geometry>; add one or remove the element")
        kinds = [x for x in holder if isinstance(x.tag, str)]
        if len(kinds) != 1:
            raise self._error(place, f"<geometry> must hold one shape, it holds {len(kinds)}")
        geometry = self._geometry(kinds[0], place)
        if geometry is None:
            return None
        material, colour = e.find("material"), e.find("material/color")
        if colour is None and material is not None:
            colour = self.colours.get(material.get("name"))
        rgba = None if colour is None else tuple(self._numbers(colour, "rgba", 4, place, default="1 1 1 1"))
        return Shape(geometry, self._origin(e, place), rgba)  # type: ignore[arg-type]

    def _geometry(self, e: Element, place: str) -> Geometry | None:
        place = f"{place} <{e.tag}>"
        if e.tag == "box":
            return Geometry("box", self._sizes(e, ("size",), place, count=3))
        if e.tag == "sphere":
            return Geometry("sphere", self._sizes(e, ("radius",), place))
        if e.tag in ("cylinder", "capsule"):
            return Geometry(e.tag, self._sizes(e, ("radius", "length"), place))  # type: ignore[arg-type]
        if e.tag == "mesh":
            filename = e.get("filename")
            if not filename:
                raise self._error(place, "has no filename")
            scale = tuple(self._numbers(e, "scale", 3, place, default="1 1 1"))
            if 0.0 in scale:
                raise self._error(place, "has a scale of zero; a mesh needs three non-zero factors")
            try:
                path = self.locator.resolve(filename, self.directory)
            except UrdfError as error:
                raise self._error(place, str(error)) from None
            return Geometry("mesh", scale, filename, path)
        if ":" in e.tag or "}" in e.tag or e.tag in ("plane", "ellipsoid", "convex"):
            return None  # another tool's extension: it draws nothing here
        raise self._error(place, "is no shape a URDF knows; use box, sphere, cylinder, capsule or mesh")

    def _joint(self, e: Element) -> Joint:
        name = self._name(e)
        place = f"joint '{name}'"
        kind = e.get("type") or ""
        if kind not in _TYPES:
            raise self._error(place, f"has unknown type '{kind}'; {did_you_mean(kind, _TYPES)}")
        ends = {}
        for tag in ("parent", "child"):
            found = e.findall(tag)
            if len(found) != 1 or not found[0].get("link"):
                raise self._error(place, f"must name one {tag} link, as <{tag} link=.../>")
            ends[tag] = str(found[0].get("link"))
        axis = self._axis(e, place, moves=kind not in ("fixed", "floating"))
        mimic = self._mimic(e.find("mimic"), place)
        limit = self._limit(e.find("limit"), place, kind)
        return Joint(name, kind, ends["parent"], ends["child"], self._origin(e, place), axis, limit, mimic)  # type: ignore[arg-type]

    def _axis(self, e: Element, place: str, *, moves: bool) -> NDArray[np.float64]:
        axis = e.find("axis")
        if axis is None or not moves:
            return np.array([1.0, 0.0, 0.0])  # the URDF default; a fixed joint's axis means nothing
        v = np.array(self._numbers(axis, "xyz", 3, f"{place} <axis>", default="1 0 0"))
        length = float(np.linalg.norm(v))
        if length < 1e-9:
            raise self._error(place, "has a zero axis; give its direction, for instance xyz='0 0 1'")
        return v / length

    def _limit(self, e: Element | None, place: str, kind: str) -> Limit:
        if e is None:
            if kind in ("revolute", "prismatic"):
                raise self._error(place, f"is {kind} and has no <limit>; add lower and upper, or make it continuous")
            return Limit()
        values = {k: self._number(e, k, f"{place} <limit>") for k in ("lower", "upper", "velocity", "effort")}
        if kind in ("revolute", "prismatic"):
            # The standard's default for an omitted bound is 0; both omitted would lock the joint without a word.
            if values["lower"] is None and values["upper"] is None:
                raise self._error(place, "has a <limit> without lower and upper; state both")
            values["lower"], values["upper"] = values["lower"] or 0.0, values["upper"] or 0.0
        else:
            values["lower"] = values["upper"] = None
        lower, upper = values["lower"], values["upper"]
        if lower is not None and upper is not None and lower > upper:
            raise self._error(place, f"has lower {lower:g} > upper {upper:g}; swap them")
        for k in ("velocity", "effort"):
            value = values[k]
            if value is not None and value < 0:
                raise self._error(place, f"has a negative {k} limit {value:g}; limits are magnitudes")
            # Exporters write 0 where nobody filled in the field; a joint that may not move is a fixed one.
            values[k] = value or None
        return Limit(**values)

    def _mimic(self, e: Element | None, place: str) -> Mimic | None:
        if e is None:
            return None
        joint = e.get("joint")
        if not joint:
            raise self._error(place, "<mimic> names no joint")
        multiplier = self._number(e, "multiplier", f"{place} <mimic>")
        return Mimic(joint, 1.0 if multiplier is None else multiplier, self._number(e, "offset", f"{place} <mimic>") or 0.0)

    def _origin(self, e: Element, place: str) -> NDArray[np.float64]:
        T = np.eye(4)
        origin = e.find("origin")
        if origin is not None:
            place = f"{place} <origin>"
            T[:3, 3] = self._numbers(origin, "xyz", 3, place, default="0 0 0")
            T[:3, :3] = _rotation(*self._numbers(origin, "rpy", 3, place, default="0 0 0"))
        return T

    # -- the whole

    def _check_mimics(self, joints: dict[str, Joint]) -> None:
        for joint in joints.values():
            chain = [joint.name]
            while (mimic := joints[chain[-1]].mimic) is not None:
                if mimic.joint not in joints:
                    raise self._error(
                        f"joint '{chain[-1]}'",
                        f"mimics '{mimic.joint}', which does not exist; {did_you_mean(mimic.joint, joints)}",
                    )
                if mimic.joint in chain:
                    what = "itself" if len(chain) == 1 else "in a circle: " + " -> ".join([*chain, mimic.joint])
                    raise self._error(f"joint '{joint.name}'", f"mimics {what}; one joint must be free")
                chain.append(mimic.joint)

    def _depth_first(self, links: dict[str, Link], joints: dict[str, Joint]) -> tuple[list[str], list[str]]:
        children: dict[str, list[Joint]] = {name: [] for name in links}
        parent_of: dict[str, str] = {}
        for joint in joints.values():
            for role, link in (("parent", joint.parent), ("child", joint.child)):
                if link not in links:
                    raise self._error(
                        f"joint '{joint.name}'", f"has {role} '{link}', which is no link; {did_you_mean(link, links)}"
                    )
            if joint.child in parent_of:
                raise self._error(
                    f"link '{joint.child}'",
                    f"hangs on two joints, '{parent_of[joint.child]}' and '{joint.name}'; a URDF is a tree, remove one",
                )
            parent_of[joint.child] = joint.name
            children[joint.parent].append(joint)
        roots = [name for name in links if name not in parent_of]
        if not roots:
            raise self._error("<robot>", "has no root link: its joints form a cycle; remove one joint")
        if len(roots) > 1:
            raise self._error("<robot>", f"has {len(roots)} root links ({', '.join(roots[:5])}); join them by joints")
        link_order, joint_order, waiting = [roots[0]], [], list(reversed(children[roots[0]]))
        while waiting:
            joint = waiting.pop()
            joint_order.append(joint.name)
            link_order.append(joint.child)
            waiting.extend(reversed(children[joint.child]))
        if len(link_order) < len(links):
            lost = [name for name in links if name not in set(link_order)]
            raise self._error(f"link '{lost[0]}'", "is part of a cycle that the root does not reach; remove one joint")
        return link_order, joint_order

    # -- values

    def _name(self, e: Element) -> str:
        name = e.get("name")
        if not name:
            raise self._error(f"<{e.tag}>", "has no name; every link and joint needs one")
        return name

    def _unique(self, kind: str, items: Iterator[Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for item in items:
            if item.name in result:
                raise self._error(f"{kind} '{item.name}'", "occurs twice; names must be unique")
            result[item.name] = item
        return result

    def _numbers(self, e: Element, key: str, count: int, place: str, *, default: str | None = None) -> list[float]:
        text = e.get(key, default)
        if text is None:
            raise self._error(place, f"has no {key}")
        parts = text.split()
        if len(parts) != count:
            raise self._error(place, f"{key}='{text}' must hold {count} numbers")
        return [self._finite(part, key, place) for part in parts]

    def _number(self, e: Element, key: str, place: str) -> float | None:
        text = e.get(key)
        return None if text is None else self._finite(text.strip(), key, place)

    def _sizes(self, e: Element, keys: Sequence[str], place: str, count: int = 1) -> tuple[float, ...]:
        values = [x for key in keys for x in self._numbers(e, key, count, place)]
        if min(values) < 0:
            raise self._error(place, f"has a negative size {values}; sizes are lengths [m]")
        return tuple(values)

    def _finite(self, text: str, key: str, place: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise self._error(place, f"{key}='{text}' is not a number") from None
        if not math.isfinite(value) or "_" in text:
            raise self._error(place, f"{key}='{text}' is not a finite number")
        return value

    def _error(self, place: str, what: str) -> UrdfError:
        return UrdfError(f"{self.where}: {place} {what}")


def _rotation(roll: float, pitch: float, yaw: float) -> NDArray[np.float64]:
    """URDF's fixed-axis convention: Rz(yaw) Ry(pitch) Rx(roll)."""
    cr, sr, cp, sp, cy, sy = (f(x) for x in (roll, pitch, yaw) for f in (math.cos, math.sin))
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


# ---- writing --------------------------------------------------------------------------------------------------------


def _write_joint(root: Element, joint: Joint) -> None:
    element = SubElement(root, "joint", name=joint.name, type=joint.type)
    _write_origin(element, joint.T_parent_joint)
    SubElement(element, "parent", link=joint.parent)
    SubElement(element, "child", link=joint.child)
    if joint.type not in ("fixed", "floating"):
        SubElement(element, "axis", xyz=_text(joint.axis))
    stated = {k: repr(v) for k, v in vars(joint.limit).items() if v is not None}
    if stated:
        SubElement(element, "limit", stated)
    if joint.mimic is not None:
        m = joint.mimic
        SubElement(element, "mimic", joint=m.joint, multiplier=repr(m.multiplier), offset=repr(m.offset))


def _write_shape(link: Element, tag: str, shape: Shape, robot: str) -> None:
    g = shape.geometry
    if g.kind == "mesh" and g.path is None:
        return
    element = SubElement(link, tag)
    _write_origin(element, shape.T_link_shape)
    geometry = SubElement(element, "geometry")
    if g.kind == "mesh":
        SubElement(geometry, "mesh", filename=str(g.path), scale=_text(g.size))
    elif g.kind == "box":
        SubElement(geometry, "box", size=_text(g.size))
    elif g.kind == "sphere":
        SubElement(geometry, "sphere", radius=repr(float(g.size[0])))
    else:
        SubElement(geometry, g.kind, radius=repr(float(g.size[0])), length=repr(float(g.size[1])))
    if tag == "visual" and shape.rgba is not None:
        material = SubElement(element, "material", name=f"{robot}_{id(shape)}")
        SubElement(material, "color", rgba=_text(shape.rgba))


def _write_origin(element: Element, T: NDArray[np.float64]) -> None:
    R = T[:3, :3]
    pitch = math.asin(float(np.clip(-R[2, 0], -1.0, 1.0)))
    if abs(R[2, 0]) < 1 - 1e-12:
        roll, yaw = math.atan2(R[2, 1], R[2, 2]), math.atan2(R[1, 0], R[0, 0])
    else:  # gimbal lock: only the sum of roll and yaw is defined
        roll, yaw = 0.0, math.atan2(-R[0, 1], R[1, 1])
    SubElement(element, "origin", xyz=_text(T[:3, 3]), rpy=_text((roll, pitch, yaw)))


def _text(values: Any) -> str:
    return " ".join(repr(float(v)) for v in values)
