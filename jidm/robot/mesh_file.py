"""Mesh files: read whole and in meters, or refused by a message that names the file and what is wrong with it.

trimesh reads what it can: of a file that was cut off, a part or nothing, without a word; of a COLLADA file, the numbers
without their unit. A robot without one of its meshes decodes wrongly, so every file is checked for its end first.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote
from xml.etree import ElementTree as ET

from jidm.errors import EmbodimentError, JidmWarning, MissingExtraError, first_line
from jidm.git_lfs import is_lfs_pointer

if TYPE_CHECKING:
    import trimesh

READABLE_FORMATS = ("dae", "glb", "gltf", "obj", "off", "ply", "stl")
"""File name endings of the formats that are read."""

_STL_HEADER = 84  # [bytes] 80 of text and the number of triangles
_STL_TRIANGLE = 50  # [bytes]
_COLORS = ("library_materials", "library_effects", "library_images", "bind_material")
"""COLLADA elements that only color the geometry."""


class _Damaged(Exception):
    """What is wrong with the content of a mesh file."""


def read_mesh_file(path: Path) -> tuple[trimesh.Scene, float]:
    """The content of a mesh file, and the length of its unit [m].

    The unit is what a COLLADA file states in `<unit meter=...>`; files of all other formats are taken to be in meters, as
    a URDF defines. `up_axis` of COLLADA is not applied, as in ROS. Colors never refuse a file: where a material or a texture
    is missing, the geometry is read without it.

    Raises:
        EmbodimentError: the format is not read, or the file is empty, cut off, a git-LFS pointer or damaged otherwise.
        MissingExtraError: its format needs a package that is not installed.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in READABLE_FORMATS:
        readable = ", ".join(x.upper() for x in READABLE_FORMATS)
        raise EmbodimentError(
            f"mesh {path}: the format {kind.upper() or 'of a file without an ending'} is not read; read are {readable}. "
            "Convert it, for instance to STL by FreeCAD (CAD formats) or Blender, and name the new file in the URDF"
        )
    try:
        data = path.read_bytes()
        _refuse_other_content(data)
        return _READERS.get(kind, _read_plain)(data, path, kind)
    except _Damaged as damage:
        raise EmbodimentError(f"mesh {path} {damage}") from None
    except ImportError as missing:
        package = "pycollada" if missing.name == "collada" else missing.name
        if package == "pycollada":
            raise MissingExtraError(f"reading the mesh {path.name}", package, "robots") from None
        raise EmbodimentError(f"mesh {path} needs the package '{package}', which is not installed") from None
    except OSError as error:
        raise EmbodimentError(f"mesh {path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # trimesh has no common base class of errors
        raise EmbodimentError(
            f"mesh {path} is damaged or no {kind.upper()} file ({first_line(error)}); get the file again"
        ) from None


def _refuse_other_content(data: bytes) -> None:
    start = data[:200].lstrip().lower()
    if not start:
        raise _Damaged("is empty; get the file again")
    if is_lfs_pointer(data):
        raise _Damaged("is a git-LFS pointer, not the mesh; run git lfs pull in its repository")
    if start.startswith((b"<!doctype html", b"<html")):
        raise _Damaged("is a web page, not a mesh; download the file itself")


def _load(data: bytes, path: Path, kind: str, **options: Any) -> trimesh.Scene:
    import trimesh

    # Materials, textures and buffers lie beside the file.
    resolver = trimesh.resolvers.FilePathResolver(str(path))
    return trimesh.load_scene(BytesIO(data), file_type=kind, resolver=resolver, **options)


def _read_plain(data: bytes, path: Path, kind: str) -> tuple[trimesh.Scene, float]:
    return _load(data, path, kind), 1.0


def _num_triangles(scene: trimesh.Scene) -> int:
    return sum(len(getattr(geometry, "faces", ())) for geometry in scene.geometry.values())


def _expect_triangles(scene: trimesh.Scene, count: int) -> None:
    if _num_triangles(scene) != count:
        raise _Damaged(f"holds {count} triangles, of which {_num_triangles(scene)} can be read; get the file again")


# ---- STL -------------------------------------------------------------------------------------------------------------


def _read_stl(data: bytes, path: Path, kind: str) -> tuple[trimesh.Scene, float]:
    count = int.from_bytes(data[80:_STL_HEADER], "little")
    end = _STL_HEADER + _STL_TRIANGLE * count
    if len(data) >= max(end, _STL_HEADER) and (count or len(data) < _STL_HEADER + _STL_TRIANGLE):
        # Text never comes here: its bytes 80 to 83, read as a number, would mean gigabytes. Some exporters append a few
        # bytes, which trimesh takes for a damaged file.
        content = data[:end]
    elif data.lstrip()[:5].lower() == b"solid" and b"\0" not in data[:1000].rstrip(b"\0"):
        count, content = _ascii_stl_facets(data), data
    elif len(data) < _STL_HEADER:
        raise _Damaged(
            f"is cut off or no STL file: it has {len(data)} bytes, fewer than its header; get the file again"
        )
    else:
        raise _Damaged(
            f"is cut off or damaged: its header names {count} triangles, which take {end} bytes, it has {len(data)}; "
            "get the file again"
        )
    scene = _load(content, path, kind)
    _expect_triangles(scene, count)
    return scene, 1.0


def _ascii_stl_facets(data: bytes) -> int:
    opened, closed, solids, ends = (
        len(re.findall(rb"(?mi)^[ \t]*" + word + rb"\b", data))
        for word in (b"facet", b"endfacet", b"solid", b"endsolid")
    )
    if solids != ends or opened != closed:
        raise _Damaged("is cut off: its last facet or solid has no end; get the file again")
    return opened


# ---- text formats ----------------------------------------------------------------------------------------------------


def _read_obj(data: bytes, path: Path, kind: str) -> tuple[trimesh.Scene, float]:
    if b"\0" in data.rstrip(b"\0"):
        raise _Damaged("is damaged: a text file without zero bytes is expected; get the file again")
    lines = data.rstrip(b"\0").rstrip().splitlines()
    tag, *values = lines[-1].split() or [b""]
    is_short = tag in (b"v", b"f") and (len(values) < 3 or values[-1].endswith((b"/", b"-", b".", b"e", b"E")))
    is_short |= tag == b"f" and len({corner.count(b"/") for corner in values}) > 1
    vertices = len(re.findall(rb"(?m)^[ \t]*v[ \t]", data))
    corners = re.findall(rb"(?m)^[ \t]*f[ \t]+(.*)$", data)
    if not vertices or not corners:
        raise _Damaged(
            f"is cut off or no mesh: it has {vertices} vertices and {len(corners)} faces; get the file again"
        )
    if not is_short and not data.endswith((b"\n", b"\r", b"\0")):
        # The format has no mark of its end. Vertices without a face and a last line without a line break: the faces
        # that use them are lost.
        used = {int(corner.split(b"/")[0]) for face in corners for corner in face.split()}
        is_short = min(used) > 0 and len(used) < vertices
        if not is_short:
            text = "ends without a line break; if a part of it is missing, it was cut off: get the file again"
            warnings.warn(f"mesh {path} {text}", JidmWarning, stacklevel=2)
    if is_short:
        raise _Damaged(f"is cut off in its last line '{lines[-1][:40].decode(errors='replace')}'; get the file again")
    return _load(data, path, kind), 1.0


def _read_ply(data: bytes, path: Path, kind: str) -> tuple[trimesh.Scene, float]:
    header, mark, body = data.partition(b"end_header")
    if not header.startswith(b"ply") or not mark:
        raise _Damaged("is cut off or no PLY file: its header has no end; get the file again")
    elements = [(name, int(count)) for name, count in re.findall(rb"(?m)^element[ \t]+(\w+)[ \t]+(\d+)", header)]
    is_text = re.search(rb"(?m)^format[ \t]+ascii\b", header) is not None
    if is_text:  # trimesh itself compares the length of binary files
        rows = [line for line in body.splitlines() if line.strip()]
        _expect_rows(
            rows, sum(count for _, count in elements), polygons_last=elements[-1:] and elements[-1][0] == b"face"
        )
    try:
        scene = _load(data, path, kind)
    except ValueError as error:
        raise _Damaged(
            f"has not the length that its header states; it is cut off or damaged ({first_line(error)})"
        ) from None
    if faces := dict(elements).get(b"face"):
        _expect_polygons(scene, faces)
    return scene, 1.0


def _read_off(data: bytes, path: Path, kind: str) -> tuple[trimesh.Scene, float]:
    rows = [line for line in (x.split(b"#")[0].strip() for x in data.splitlines()) if line]
    counts = rows[0].removeprefix(b"OFF").split() or (rows[1].split() if len(rows) > 1 else [])
    start = 1 if rows[0].removeprefix(b"OFF").split() else 2
    if not rows[0].startswith(b"OFF") or len(counts) < 2:
        raise _Damaged("is cut off or no OFF file: it does not begin with OFF and its counts; get the file again")
    vertices, faces = int(counts[0]), int(counts[1])
    _expect_rows(rows[start:], vertices + faces, polygons_last=faces > 0)
    scene = _load(data, path, kind)
    _expect_polygons(scene, faces)
    return scene, 1.0


def _expect_rows(rows: list[bytes], count: int, *, polygons_last: Any) -> None:
    """As many rows as the header names, the last of them complete: a polygon begins with the number of its corners."""
    values = rows[count - 1].split() if 0 < count <= len(rows) else []
    if len(rows) < count or (polygons_last and len(values) < 1 + int(values[0])):
        raise _Damaged(f"is cut off: its header names {count} rows of data, it has {len(rows)}; get the file again")


def _expect_polygons(scene: trimesh.Scene, count: int) -> None:
    if _num_triangles(scene) < count:  # more where polygons were divided into triangles
        raise _Damaged(f"holds {count} faces, of which {_num_triangles(scene)} can be read; get the file again")


# ---- other formats ---------------------------------------------------------------------------------------------------


def _read_glb(data: bytes, path: Path, kind: str) -> tuple[trimesh.Scene, float]:
    length = int.from_bytes(data[8:12], "little")
    if data[:4] != b"glTF":
        raise _Damaged("is no GLB file; get the file again")
    if len(data) < max(length, 20):
        raise _Damaged(f"is cut off: its header names {length} bytes, it has {len(data)}; get the file again")
    return _load(data, path, kind), 1.0


def _read_gltf(data: bytes, path: Path, kind: str) -> tuple[trimesh.Scene, float]:
    # trimesh would read a neighbor called model.gltf where this file is no JSON.
    try:
        buffers = [(str(x["uri"]), int(x["byteLength"])) for x in json.loads(data).get("buffers", []) if "uri" in x]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Damaged(f"is cut off or no glTF document ({first_line(error)}); get the file again") from None
    for name, length in buffers:
        if name.startswith("data:"):
            continue
        file = (path.parent / unquote(name)).resolve()
        if not file.is_relative_to(path.parent.resolve()) or not file.is_file():
            raise _Damaged(f"needs the file '{name}' in its folder, which is missing; get that file too")
        content = file.read_bytes()
        try:
            _refuse_other_content(content)
        except _Damaged as damage:
            raise _Damaged(f"needs the file '{name}', which {damage}") from None
        if len(content) < length:
            raise _Damaged(f"needs the file '{name}', which is cut off: it has {len(content)} of {length} bytes")
    return _load(data, path, kind), 1.0


def _read_dae(data: bytes, path: Path, kind: str) -> tuple[trimesh.Scene, float]:
    import collada  # noqa: F401  (else trimesh reports an unknown format)

    root = _parse_collada(data)
    unit = _collada_unit(root)
    if not any(_local_name(e) == "scene" for e in root):
        raise _Damaged("has no <scene>, which says what of it is shown; export it again")
    try:
        # By default trimesh leaves out what it does not understand, geometry as well.
        return _load(data, path, kind, ignore_broken=False), unit
    except Exception:
        return _load(_without_colors(root), path, kind, ignore_broken=False), unit


def _parse_collada(data: bytes) -> ET.Element:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        root: ET.Element = fromstring(data)
    except ET.ParseError as error:
        raise _Damaged(f"is cut off or damaged: not well-formed XML ({error}); get the file again") from None
    except DefusedXmlException:
        raise _Damaged("holds XML entities, which a mesh never needs; export it again") from None
    if _local_name(root) != "COLLADA":
        raise _Damaged(f"is no COLLADA file: its outermost element is <{_local_name(root)}>; get the file again")
    return root


def _local_name(e: ET.Element) -> str:
    return str(e.tag).rpartition("}")[2]


def _collada_unit(root: ET.Element) -> float:
    """Meters per unit of the file; 1 where it states none, the format's default."""
    asset = next((e for e in root if _local_name(e) == "asset"), None)
    unit = None if asset is None else next((e for e in asset if _local_name(e) == "unit"), None)
    text = "1" if unit is None else unit.get("meter", "1")
    try:
        meters = float(text)
    except ValueError:
        meters = math.nan
    if not (math.isfinite(meters) and meters > 0):
        raise _Damaged(f"states <unit meter='{text[:40]}'>, which is no length; write the length of its unit in meters")
    return meters


def _without_colors(root: ET.Element) -> bytes:
    for parent in list(root.iter()):
        for child in [x for x in parent if _local_name(x) in _COLORS]:
            parent.remove(child)
    content: bytes = ET.tostring(root)
    return content


_READERS: dict[str, Callable[[bytes, Path, str], tuple[trimesh.Scene, float]]] = {
    "stl": _read_stl, "obj": _read_obj, "ply": _read_ply, "off": _read_off, "glb": _read_glb, "gltf": _read_gltf, "dae": _read_dae,
}  # fmt: skip
