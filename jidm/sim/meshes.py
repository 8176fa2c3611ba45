"""The robot's visual shapes as OBJ files for PyBullet: one per link and color, geometry in the link frame.

PyBullet reads COLLADA files in one color, shades STL files flat and leaves out formats that it does not know. Here every
shape is read by trimesh instead, so that images show the triangles that the analytic field samples, in the colors that
the file states.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jidm.errors import EmbodimentError
from jidm.robot.mesh_file import read_mesh_file
from jidm.robot.model import Geometry, Link, RobotModel, Shape
from jidm.robot.shape_mesh import mesh_path, primitive_mesh

if TYPE_CHECKING:
    import trimesh

RGBA = tuple[float, float, float, float]

DEFAULT_COLOR: RGBA = (0.82, 0.82, 0.82, 1.0)
"""Color of a shape when neither its file nor the URDF names one."""

# Names that exporters give to the absence of a material.
_PLACEHOLDER_MATERIALS = {"none", "", "default", "defaultmaterial"}

_CREASE_ANGLE = 0.5
"""Neighboring triangles that meet at a sharper angle than this [rad] keep a visible edge; others are shaded smooth."""


def export_visuals(model: RobotModel, folder: Path, *, mesh_tolerance: float = 0.0) -> RobotModel:
    """A copy of the model without collisions, its visuals written as OBJ files into `folder`.

    A color inside a mesh file takes precedence over the URDF's (as in RViz), and the URDF's over `DEFAULT_COLOR`.

    Args:
        model: links and joints.
        folder: an existing folder.
        mesh_tolerance: size of features that need not be drawn [m], see `cluster_vertices`.

    Raises:
        EmbodimentError: a mesh is missing or unreadable, or the robot has no visual shapes.
    """
    if not any(link.visuals for link in model.links):
        raise EmbodimentError(f"robot '{model.name}' has no visual shapes to draw; add <visual> elements to its URDF")
    links = []
    for index, link in enumerate(model.links):
        visuals = []
        for k, (rgba, mesh) in enumerate(parts_by_color(link, model.name, mesh_tolerance).items()):
            path = folder / f"link{index}_{k}.obj"
            path.write_text(_obj(mesh), encoding="ascii")
            visuals.append(Shape(Geometry("mesh", (1.0, 1.0, 1.0), str(path), path), np.eye(4), rgba))
        links.append(replace(link, visuals=tuple(visuals), collisions=()))
    return replace(model, links=tuple(links))


def parts_by_color(link: Link, robot: str, mesh_tolerance: float) -> dict[RGBA, Any]:
    """The visuals of a link in its frame [m], one `trimesh.Trimesh` per color with smooth normals.

    Args:
        link: of the model.
        robot: name of the robot, for messages.
        mesh_tolerance: size of features that need not be drawn [m], see `cluster_vertices`.

    Raises:
        EmbodimentError: a mesh is missing or unreadable.
    """
    import trimesh

    parts: dict[RGBA, list[trimesh.Trimesh]] = {}
    for shape in link.visuals:
        for mesh, file_color in shape_meshes(shape.geometry, robot):
            mesh.apply_transform(shape.T_link_shape)
            parts.setdefault(file_color or shape.rgba or DEFAULT_COLOR, []).extend(_smooth_shaded(mesh, mesh_tolerance))
    return {rgba: trimesh.util.concatenate(meshes) for rgba, meshes in parts.items()}


def shape_meshes(geometry: Geometry, robot: str) -> list[tuple[trimesh.Trimesh, RGBA | None]]:
    """The shape's parts in its own frame [m], each with the color its file states."""
    import trimesh

    if geometry.kind != "mesh":
        return [(primitive_mesh(geometry), None)]
    scene, unit = read_mesh_file(mesh_path(geometry, robot))
    parts = []
    for part in scene.dump():
        if isinstance(part, trimesh.Trimesh) and len(part.faces):
            file_color = _file_color(part)
            part.apply_scale(unit * np.array(geometry.size))
            parts.append((part, file_color))
    return parts


def _file_color(mesh: trimesh.Trimesh) -> RGBA | None:
    """The color that a mesh file states for this part, if any; for a texture image its mean color."""
    visual: Any = mesh.visual
    material = getattr(visual, "material", None)
    if material is not None:
        name = getattr(material, "name", None)
        if isinstance(name, str) and name.lower() in _PLACEHOLDER_MATERIALS:
            return None
        texture = getattr(material, "image", None) or getattr(material, "baseColorTexture", None)
        color = material.main_color if texture is None else np.asarray(texture.convert("RGB")).mean(axis=(0, 1))
    elif visual is not None and visual.defined:
        color = visual.main_color
    else:
        return None
    red, green, blue = (float(x) / 255 for x in color[:3])
    return (red, green, blue, 1.0)


def _smooth_shaded(mesh: trimesh.Trimesh, mesh_tolerance: float) -> list[trimesh.Trimesh]:
    """The same triangles with smooth normals, and a second time inside out where both sides can be seen.

    TinyRenderer culls back faces, so open or inverted parts would have holes.
    """
    import trimesh

    merged = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    merged.merge_vertices()
    is_closed = _faces_of_closed_bodies(merged)
    parts = []
    for faces, two_sided in ((merged.faces[is_closed], False), (merged.faces[~is_closed], True)):
        # Clustered after the split, as clustering breaks the watertightness that defines inside and outside.
        vertices, faces = cluster_vertices(merged.vertices, faces, mesh_tolerance)
        if len(faces):
            part = trimesh.graph.smooth_shade(
                trimesh.Trimesh(vertices, faces, process=False), angle=_CREASE_ANGLE, facet_minarea=None
            )
            parts.append(part)
            if two_sided:
                back = part.copy()
                back.invert()
                parts.append(back)
    return parts


def cluster_vertices(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], cell_size: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mesh simplification by vertex clustering: all vertices inside a cube of side `cell_size` become their mean.

    Takes and returns vertices (V, 3) [m] and faces (F, 3). No vertex moves farther than the cube's diagonal. Faces that
    shrink to a line or a point, or that repeat another with the same orientation, are left out.
    """
    if not cell_size > 0 or not len(faces):
        return vertices, faces
    cell = np.floor(vertices / cell_size).astype(np.int64)
    _, group = np.unique(cell, axis=0, return_inverse=True)
    group = group.reshape(-1)
    count = np.bincount(group)
    merged = np.stack([np.bincount(group, vertices[:, k]) for k in range(3)], axis=-1) / count[:, None]
    faces = group[faces]
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    first = faces.argmin(axis=1)
    rotated = np.stack([faces[np.arange(len(faces)), (first + k) % 3] for k in range(3)], axis=-1)
    return merged, np.unique(rotated, axis=0)


def _faces_of_closed_bodies(mesh: trimesh.Trimesh) -> NDArray[np.bool_]:
    """Which faces (F,) belong to a closed body whose triangles all face outward."""
    import trimesh

    body = trimesh.graph.connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
    face_of_edge = mesh.edges_face
    ends, edge = np.unique(mesh.edges_sorted, axis=0, return_inverse=True)
    edge = edge.reshape(-1)
    # On a closed surface of one winding every edge belongs to two faces, which run along it in opposite directions.
    direction = np.where(mesh.edges[:, 0] < mesh.edges[:, 1], 1, -1)
    count, balance = np.bincount(edge, minlength=len(ends)), np.bincount(edge, direction, minlength=len(ends))
    open_edge = (count[edge] != 2) | (balance[edge] != 0)
    a, b, c = np.swapaxes(mesh.triangles, 0, 1)
    # Six times the signed volume: positive if the faces are turned outward.
    volume = np.bincount(body, np.einsum("fi,fi->f", a, np.cross(b, c)))
    has_open_edge = np.bincount(body[face_of_edge], open_edge, minlength=len(volume)) > 0
    return ((volume > 0) & ~has_open_edge)[body]


def _obj(mesh: trimesh.Trimesh) -> str:
    def rows(prefix: str, values: NDArray[np.float64]) -> str:
        return (f"{prefix} %.7g %.7g %.7g\n" * len(values)) % tuple(values.ravel().tolist())

    corners = np.repeat(np.asarray(mesh.faces) + 1, 2, axis=1)
    faces = ("f %d//%d %d//%d %d//%d\n" * len(corners)) % tuple(corners.ravel().tolist())
    normals = np.nan_to_num(np.asarray(mesh.vertex_normals))
    return rows("v", np.asarray(mesh.vertices)) + rows("vn", normals) + faces
