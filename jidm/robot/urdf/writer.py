"""A robot model as URDF text, for simulators and other URDF readers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np
from numpy.typing import NDArray

from jidm.atomic_io import atomic_write
from jidm.robot.model import Joint, RobotModel, Shape
from jidm.robot.transforms import roll_pitch_yaw


def write_urdf(model: RobotModel, path: str | Path | None = None) -> str:
    """URDF text of a model; reading it again gives the model back (poses to about 1e-15).

    Meshes that were found are named by their absolute path, so read it with their folders as `mesh_roots`; references
    to other meshes are kept. Inertias are placeholders (1 kg, 0.01 kg m^2): the model has none.

    Args:
        path: file to which the text is written as well, atomically.

    Raises:
        InputError: the folder of `path` does not exist.
    """
    root = Element("robot", name=model.name)
    for link in model.links:
        element = SubElement(root, "link", name=link.name)
        inertial = SubElement(element, "inertial")
        SubElement(inertial, "mass", value="1")
        SubElement(inertial, "inertia", ixx="0.01", iyy="0.01", izz="0.01", ixy="0", ixz="0", iyz="0")
        for tag, shapes in (("visual", link.visuals), ("collision", link.collisions)):
            for k, shape in enumerate(shapes):
                # Simulators look materials up by name in the whole file, so each needs its own.
                _write_shape(element, tag, shape, material=f"{link.name}_{k}")
    for joint in model.joints:
        _write_joint(root, joint)
    indent(root)
    text = '<?xml version="1.0"?>\n' + tostring(root, encoding="unicode") + "\n"
    if path is not None:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return text


def _write_joint(root: Element, joint: Joint) -> None:
    element = SubElement(root, "joint", name=joint.name, type=joint.type)
    _write_origin(element, joint.T_parent_joint)
    SubElement(element, "parent", link=joint.parent)
    SubElement(element, "child", link=joint.child)
    if joint.type not in ("fixed", "floating"):
        SubElement(element, "axis", xyz=_format_floats(joint.axis))
    stated = {k: _format_floats([v]) for k, v in vars(joint.limit).items() if v is not None}
    if stated:
        SubElement(element, "limit", stated)
    if (m := joint.mimic) is not None:
        multiplier, offset = _format_floats([m.multiplier]), _format_floats([m.offset])
        SubElement(element, "mimic", joint=m.joint, multiplier=multiplier, offset=offset)


def _write_shape(link: Element, tag: str, shape: Shape, material: str) -> None:
    g = shape.geometry
    element = SubElement(link, tag)
    _write_origin(element, shape.T_link_shape)
    geometry = SubElement(element, "geometry")
    if g.kind == "mesh":
        SubElement(geometry, "mesh", filename=str(g.path or g.filename), scale=_format_floats(g.size))
    elif g.kind == "box":
        SubElement(geometry, "box", size=_format_floats(g.size))
    elif g.kind == "sphere":
        SubElement(geometry, "sphere", radius=_format_floats(g.size))
    else:
        SubElement(geometry, g.kind, radius=_format_floats(g.size[:1]), length=_format_floats(g.size[1:]))
    if tag == "visual" and shape.rgba is not None:
        SubElement(SubElement(element, "material", name=material), "color", rgba=_format_floats(shape.rgba))


def _write_origin(element: Element, T: NDArray[np.float64]) -> None:
    SubElement(element, "origin", xyz=_format_floats(T[:3, 3]), rpy=_format_floats(roll_pitch_yaw(T[:3, :3])))


def _format_floats(values: Iterable[float]) -> str:
    return " ".join(repr(float(v)) for v in values)
