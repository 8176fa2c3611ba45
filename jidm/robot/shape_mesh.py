"""The shapes of links as triangle meshes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jidm.errors import EmbodimentError, MissingExtraError
from jidm.robot.model import Geometry, Shape

if TYPE_CHECKING:
    import trimesh

Loaded = TypeVar("Loaded")


def shape_mesh(shape: Shape, robot: str) -> trimesh.Trimesh:
    """The shape as a triangle mesh in its link's frame [m].

    Args:
        shape: visual or collision shape.
        robot: name of the robot, for messages.

    Raises:
        EmbodimentError: the mesh file is missing or cannot be read.
        MissingExtraError: its format needs a package that is not installed.
    """
    if shape.geometry.kind == "mesh":
        path = mesh_path(shape.geometry, robot)
        mesh = _load_mesh(path, path.stat().st_mtime).copy()
        mesh.apply_scale(shape.geometry.size)
    else:
        mesh = primitive_mesh(shape.geometry)
    mesh.apply_transform(shape.T_link_shape)
    return mesh


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
        raise EmbodimentError(
            f"robot '{robot}': mesh '{geometry.filename}' was not found; pass mesh_roots= where its package lies"
        )
    return geometry.path


def read_mesh_file(path: Path, load: Callable[[Path], Loaded]) -> Loaded:
    """What a function of trimesh loads from a mesh file.

    Raises:
        EmbodimentError: the file cannot be read.
        MissingExtraError: its format needs a package that is not installed.
    """
    try:
        return load(path)
    except ImportError as missing:
        raise MissingExtraError(f"reading the mesh {path.name}", str(missing.name or "pycollada"), "robots") from None
    except Exception as error:  # trimesh has no common base class of errors
        raise EmbodimentError(f"cannot read mesh {path}: {error}") from None


@lru_cache(maxsize=512)
def _load_mesh(path: Path, mtime: float) -> Any:
    import trimesh

    return read_mesh_file(path, partial(trimesh.load, force="mesh"))
