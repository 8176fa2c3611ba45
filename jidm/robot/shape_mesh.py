"""The shapes of links as triangle meshes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jidm.errors import EmbodimentError, JidmWarning
from jidm.robot.mesh_file import read_mesh_file
from jidm.robot.model import Geometry, RobotModel, Shape

if TYPE_CHECKING:
    import trimesh

_MAX_SEARCHED = 6
"""Paths that a message about a missing mesh names."""


def shape_mesh(shape: Shape, robot: str) -> trimesh.Trimesh:
    """The shape as a triangle mesh in its link's frame [m].

    Args:
        shape: visual or collision shape.
        robot: name of the robot, for messages.

    Raises:
        EmbodimentError: the mesh file is missing or cannot be read whole.
        MissingExtraError: its format needs a package that is not installed.
    """
    if shape.geometry.kind == "mesh":
        path = mesh_path(shape.geometry, robot)
        mesh = _merged_mesh(path, path.stat().st_mtime).copy()
        mesh.apply_scale(shape.geometry.size)
    else:
        mesh = primitive_mesh(shape.geometry)
    mesh.apply_transform(shape.T_link_shape)
    return mesh


def visual_meshes(model: RobotModel, links: Sequence[str] | None = None) -> list[tuple[int, trimesh.Trimesh]]:
    """Link index and triangle mesh, in the frame of its link [m], of every visual shape; empty if there is none.

    A shape whose mesh file is missing, or that has no area, is left out with a `JidmWarning` that names link and file, as
    long as another one remains. A damaged file is an error, because its robot is probably not the one in the video.

    Args:
        model: links and joints.
        links: names of links or patterns with `*`, `?`, `[...]`; only their shapes are read. All if None.

    Raises:
        EmbodimentError: no link matches, a mesh file is damaged, or none of the shapes can be used.
        MissingExtraError: a format needs a package that is not installed.
    """
    chosen = range(len(model.links)) if links is None else model.match_links(links)
    meshes, unusable = [], []
    for index in chosen:
        link = model.links[index]
        for shape in link.visuals:
            file = f" ({shape.geometry.filename})" if shape.geometry.filename else ""
            if shape.geometry.kind == "mesh" and shape.geometry.path is None:
                unusable.append(f"{not_found(shape.geometry)}; it is a shape of link '{link.name}'")
                continue
            if shape.geometry.kind not in ("box", "mesh") and shape.geometry.size[0] == 0:
                unusable.append(f"a {shape.geometry.kind} of radius 0 of link '{link.name}' has no area")
                continue
            try:
                mesh = shape_mesh(shape, model.name)
            except EmbodimentError as error:
                raise EmbodimentError(f"robot '{model.name}', link '{link.name}': {error}") from None
            if np.isfinite(mesh.area) and mesh.area > 0:
                meshes.append((index, mesh))
            else:
                unusable.append(f"a shape of link '{link.name}'{file} has no area")
    if not meshes and unusable:
        raise EmbodimentError(f"robot '{model.name}': no shape can be used: {unusable[0]}")
    for problem in unusable:
        warnings.warn(f"robot '{model.name}': left out: {problem}", JidmWarning, stacklevel=2)
    return meshes


def primitive_mesh(geometry: Geometry) -> trimesh.Trimesh:
    """A box, cylinder, capsule or sphere as a triangle mesh in its own frame [m]."""
    import trimesh

    size = geometry.size
    if geometry.kind == "box":
        return trimesh.creation.box(extents=size)
    if geometry.kind == "cylinder":
        return trimesh.creation.cylinder(radius=size[0], height=size[1], sections=64)
    if geometry.kind == "capsule":
        return trimesh.creation.capsule(radius=size[0], height=size[1], count=(32, 64))
    return trimesh.creation.icosphere(subdivisions=4, radius=size[0])


def mesh_path(geometry: Geometry, robot: str) -> Path:
    """The file of a mesh.

    Raises:
        EmbodimentError: it was not found.
    """
    if geometry.path is None:
        raise EmbodimentError(f"robot '{robot}': {not_found(geometry)}")
    return geometry.path


def not_found(geometry: Geometry) -> str:
    """Where a mesh that was not found was searched, and the remedy."""
    shown = [str(path) for path in geometry.searched[:_MAX_SEARCHED]]
    more = len(geometry.searched) - len(shown)
    looked = f" (looked for {', '.join(shown)}{f' and {more} more' if more else ''})" if shown else ""
    return (
        f"mesh '{geometry.filename}' was not found{looked}; put it there, or pass mesh_roots= (--mesh-roots) with the "
        "folder of its package, the folder above, or the folder below which its path continues"
    )


@lru_cache(maxsize=512)
def _merged_mesh(path: Path, mtime: float) -> Any:
    scene, unit = read_mesh_file(path)
    mesh = scene.to_mesh()
    mesh.apply_scale(unit)
    return mesh
