"""Points on the robot's skin, sampled once per robot, and which of them a camera sees.

Sampling is area-weighted within each link. Points inside a closed housing are dropped at sampling time: no camera
ever sees them, and CAD files are full of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import EmbodimentError, InputError, MissingExtraError
from jidm.robot.model import Geometry, Link, RobotModel, Shape

if TYPE_CHECKING:
    import trimesh

# A point of a housing's skin must be the first hit from at least one of this many directions.
_NUM_DIRECTIONS = 64
_ORTHOGRAPHIC_CELLS = 48
# Depth slack of the z-buffer, as a share of the distance: thin plates (3 mm at 1 m) still hide what is behind them.
_DEPTH_SLACK = 0.006
# Beyond this slant (75 degrees) a point slides along the silhouette and says little.
_MIN_COSINE = 0.05


@dataclass(frozen=True, eq=False)
class Surface:
    """Points fixed to links.

    Attributes:
        link: (N,) index into `model.links`.
        p_link: (N, 3) position in the link frame [m].
        normal_link: (N, 3) outward unit normal in the link frame.
    """

    link: Int[Tensor, " N"]
    p_link: Float[Tensor, "N 3"]
    normal_link: Float[Tensor, "N 3"]

    def __len__(self) -> int:
        return self.link.shape[0]

    def to(self, like: Tensor) -> Surface:
        """Same points in the dtype and on the device of `like`."""
        return Surface(self.link.to(like.device), self.p_link.to(like), self.normal_link.to(like))


def sample_surface(
    model: RobotModel,
    count: int,
    *,
    seed: int = 0,
    links: Sequence[str] | None = None,
    shapes: Literal["visual", "collision"] = "visual",
) -> Surface:
    """Points on the links' shapes.

    Every link gets points by the square root of its area, so that a small wrist is not drowned by a large base.

    Args:
        count: number of points in all (kept exactly).
        links: names of the links to sample; all with shapes if not given.
        shapes: which elements of the URDF to sample.

    Raises:
        EmbodimentError: a mesh is missing on disk, or no link has a shape.
        InputError: `links` holds a name that is no link's, or count is not positive.
    """
    if count < 1:
        raise InputError(f"count must be at least 1 point, got {count}")
    check_links(model, links)
    skins: list[tuple[int, NDArray[np.float64], NDArray[np.float64], float]] = []
    for index, link in enumerate(model.links):
        if links is not None and link.name not in links:
            continue
        elements = link.visuals if shapes == "visual" else link.collisions
        if elements:
            p, normal, area = _outer_surface(link, elements, model.name, seed + index)
            skins.append((index, p, normal, area))
    if not skins:
        raise EmbodimentError(f"robot '{model.name}' has no {shapes} shapes to sample; add them to its URDF")
    share = np.sqrt([area for *_, area in skins])
    quota = np.floor(count * share / share.sum()).astype(int)
    quota[np.argsort(-share)[: count - quota.sum()]] += 1
    rng = np.random.default_rng(seed)
    link_ids, points, normals = [], [], []
    for (index, p, normal, _), k in zip(skins, quota, strict=True):
        chosen = rng.choice(len(p), size=k, replace=k > len(p))
        link_ids.append(np.full(k, index))
        points.append(p[chosen])
        normals.append(normal[chosen])
    return Surface(
        torch.from_numpy(np.concatenate(link_ids)),
        torch.from_numpy(np.concatenate(points)),
        torch.from_numpy(np.concatenate(normals)),
    )


def check_links(model: RobotModel, links: Sequence[str] | None) -> None:
    """Raise UrdfError with the nearest name if one of `links` is no link of the model."""
    for name in links or ():
        model.link_index(name)


def visible_points(
    uv: Float[Tensor, "*batch N 2"],
    depth: Float[Tensor, "*batch N"],
    cosine: Float[Tensor, "*batch N"],
    *,
    width: int,
    height: int,
    focal: float,
    cell: float,
) -> Bool[Tensor, "*batch N"]:
    """Which points a camera sees: in the picture, facing it, and first in their cell of a coarse z-buffer.

    The points hide each other, so they must be dense enough to cover every cell (about 8 a cell).

    Args:
        uv, depth: pixel position and camera z [m] of every point.
        cosine: cosine between outward normal and the direction to the camera.
        focal: focal length [px], to turn the slant of a surface into slack within a cell.
        cell: edge of a z-buffer cell [px].
    """
    inside = (depth > 1e-3) & (uv > -0.5).all(-1) & (uv[..., 0] < width - 0.5) & (uv[..., 1] < height - 0.5)
    columns, rows = int(np.ceil(width / cell)), int(np.ceil(height / cell))
    column = ((uv[..., 0] + 0.5) / cell).clamp(0, columns - 1).long()
    row = ((uv[..., 1] + 0.5) / cell).clamp(0, rows - 1).long()
    index = torch.where(inside, row * columns + column, torch.full_like(row, rows * columns))
    z = torch.where(inside, depth, torch.full_like(depth, torch.inf))
    buffer = z.new_full((*z.shape[:-1], rows * columns + 1), torch.inf)
    nearest = buffer.scatter_reduce(-1, index, z, reduce="amin").gather(-1, index)
    slant = (1 / cosine.clamp(min=0.5) ** 2 - 1).sqrt()
    slack = depth * (_DEPTH_SLACK + slant * cell / focal)
    return inside & (cosine > _MIN_COSINE) & (depth <= nearest + slack)


_SILHOUETTE_SLACK = 2.5
"""Cells by which the surface may recede within one at the outline of a link that is some cells thick."""


def unoccluded_points(
    uv: Float[Tensor, "K 2"],
    depth: Float[Tensor, " K"],
    link: Int[Tensor, " K"],
    occluder_uv: Float[Tensor, "N 2"],
    occluder_depth: Float[Tensor, " N"],
    occluder_link: Int[Tensor, " N"],
    *,
    width: int,
    height: int,
    focal: float,
    cell: float,
    slack: float = 0.012,
) -> Bool[Tensor, " K"]:
    """Which points lie in the picture with no other point clearly (by `slack` [m]) before them in their cell.

    Looser than `visible_points` because edges have no one normal; same z-buffer. A point's own link must be before it by
    more, for on the outline of a round link the surface recedes by more than a cell is wide.
    """
    columns, rows = int(np.ceil(width / cell)), int(np.ceil(height / cell))

    def buffer_index(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        inside = (z > 1e-3) & (x > -0.5).all(-1) & (x[..., 0] < width - 0.5) & (x[..., 1] < height - 0.5)
        column, row = ((x + 0.5) / cell).long().unbind(-1)
        return inside, torch.where(inside, row * columns + column, rows * columns)

    occludes, occluder_index = buffer_index(occluder_uv, occluder_depth)
    z = torch.where(occludes, occluder_depth, torch.inf)
    cells, links = rows * columns + 1, int(torch.cat([link, occluder_link]).max()) + 1
    nearest = z.new_full((links * cells,), torch.inf)
    nearest = nearest.scatter_reduce(0, occluder_link * cells + occluder_index, z, reduce="amin").view(links, cells)
    inside, index = buffer_index(uv, depth)
    depth_gap = depth - nearest[:, index]  # (links, K) by how much each link is before each point
    same_link = torch.arange(links, device=link.device)[:, None] == link
    tolerance = torch.where(same_link, slack + _SILHOUETTE_SLACK * cell * depth / focal, slack)
    return inside & (depth_gap <= tolerance).all(0)


@lru_cache(maxsize=512)
def _load_mesh(path: Path, mtime: float) -> trimesh.Trimesh:
    import trimesh

    try:
        mesh: Any = trimesh.load(path, force="mesh")
    except ImportError as missing:
        raise MissingExtraError(f"reading the mesh {path.name}", str(missing.name or "pycollada"), "sim") from None
    except Exception as error:  # trimesh has no common error class
        raise EmbodimentError(f"cannot read mesh {path}: {error}") from None
    return cast("trimesh.Trimesh", mesh)


def shape_mesh(shape: Shape, robot: str) -> trimesh.Trimesh:
    """The shape as a triangle mesh in its link's frame [m]."""
    import trimesh

    geometry: Geometry = shape.geometry
    if geometry.kind == "mesh":
        if geometry.path is None:
            raise EmbodimentError(
                f"robot '{robot}': mesh '{geometry.filename}' was not found; pass mesh_roots= where its package lies"
            )
        mesh = _load_mesh(geometry.path, geometry.path.stat().st_mtime).copy()
        mesh.apply_scale(geometry.size)
    # Primitives as fine as the simulator draws them.
    elif geometry.kind == "box":
        mesh = trimesh.creation.box(extents=geometry.size)
    elif geometry.kind == "cylinder":
        mesh = trimesh.creation.cylinder(radius=geometry.size[0], height=geometry.size[1], sections=64)
    elif geometry.kind == "capsule":
        mesh = trimesh.creation.capsule(radius=geometry.size[0], height=geometry.size[1], count=(32, 64))
    else:
        mesh = trimesh.creation.icosphere(subdivisions=4, radius=geometry.size[0])
    mesh.apply_transform(shape.T_link_shape)
    return mesh


def _outer_surface(
    link: Link, shapes: Sequence[Shape], robot: str, seed: int, candidates: int = 12_000
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Points, outward normals and total area of the part of a link that can be seen from outside."""
    meshes = [shape_mesh(shape, robot) for shape in shapes]
    areas = np.array([mesh.area for mesh in meshes])
    if not np.isfinite(areas).all() or areas.sum() <= 0:
        raise EmbodimentError(f"robot '{robot}': the shapes of link '{link.name}' have no area")
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(candidates, areas / areas.sum())
    points, normals = [], []
    for mesh, k in zip(meshes, counts, strict=True):
        if k:
            triangle = rng.choice(len(mesh.faces), size=k, p=mesh.area_faces / mesh.area_faces.sum())
            r = np.sqrt(rng.random((k, 1))), rng.random((k, 1))
            a, b, c = np.swapaxes(mesh.triangles[triangle], 0, 1)
            points.append((1 - r[0]) * a + r[0] * (1 - r[1]) * b + r[0] * r[1] * c)
            normals.append(mesh.face_normals[triangle])
    p, normal = np.concatenate(points), np.concatenate(normals)
    seen, outward = _seen_from_outside(p, normal)
    flip = np.einsum("pi,pi->p", outward, normal) < 0  # triangles wound the wrong way round
    normal[flip] *= -1
    return p[seen], normal[seen], float(areas.sum() * seen.mean())


def _seen_from_outside(
    p: NDArray[np.float64], normal: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which points are first hits from some direction, and the mean of the directions that see each."""
    from scipy.ndimage import grey_closing

    k = np.arange(_NUM_DIRECTIONS) + 0.5  # Fibonacci sphere
    z, angle = 1 - 2 * k / _NUM_DIRECTIONS, np.pi * (1 + 5**0.5) * k
    directions = np.stack([np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z], axis=-1)
    outward = np.zeros_like(p)
    extent = float(np.ptp(p, axis=0).max()) or 1.0
    cell = 1.5 * extent / _ORTHOGRAPHIC_CELLS
    for d in directions:
        x = np.cross(d, [1.0, 0, 0] if abs(d[0]) < 0.7 else [0, 1.0, 0])
        x /= np.linalg.norm(x)
        grid = np.floor(np.stack([p @ x, p @ np.cross(d, x)]) / cell).astype(int)
        grid -= grid.min(axis=1, keepdims=True) - 2
        height = p @ d
        tops = np.full(grid.max(axis=1) + 3, -np.inf)
        np.maximum.at(tops, tuple(grid), height)
        # The points are few, so some cells of a wall hold none of it. Closing fills holes of one or two cells, else
        # everything inside a housing is seen through them.
        top = np.maximum(tops, grey_closing(tops, size=3))[tuple(grid)]
        cosine = np.abs(normal @ d)
        slack = cell * np.sqrt(1 / np.clip(cosine, 0.4, 1) ** 2 - 1) + 0.15 * cell
        first = (height >= top - slack) & (cosine > 0.2)
        outward += first[:, None] * d
    return np.linalg.norm(outward, axis=-1) > 0, outward
