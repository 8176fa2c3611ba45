"""Points on the outer surface of a robot, sampled once per robot.

Sampling is area-weighted within each link. Points inside a closed housing, which are frequent in CAD files, are dropped
because no camera can see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import EmbodimentError, InputError
from jidm.robot.model import RobotModel
from jidm.robot.shape_mesh import visual_meshes

if TYPE_CHECKING:
    import trimesh

_CANDIDATES = 12_000
"""Points per link, of which those on the outer surface are kept."""
_NUM_DIRECTIONS = 64
"""A point of the outer surface must be the first hit from at least one of this many directions."""
_ORTHOGRAPHIC_CELLS = 48
"""Cells along the link's extent in the orthographic z-buffer of each direction."""


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

    def __getitem__(self, index: slice | Int[Tensor, " K"]) -> Surface:
        return Surface(self.link[index], self.p_link[index], self.normal_link[index])

    def to(self, like: Tensor) -> Surface:
        """Same points in the dtype and on the device of `like`."""
        return Surface(self.link.to(like.device), self.p_link.to(like), self.normal_link.to(like))


def sample_surface(model: RobotModel, count: int, *, seed: int = 0, links: Sequence[str] | None = None) -> Surface:
    """Points on the outer surface of the links' visual shapes.

    Points are distributed over links by the square root of their area, so that a small wrist gets enough of them.

    Args:
        count: number of points in all (kept exactly).
        seed: of the sampling.
        links: names of the links to sample, or patterns, as for `visual_meshes`; all if None.

    Raises:
        EmbodimentError: a mesh is damaged, a name of `links` is unknown, or no link has a shape that can be used.
        InputError: count is not positive.
    """
    if count < 1:
        raise InputError(f"count must be at least 1 point, got {count}")
    meshes: dict[int, list[trimesh.Trimesh]] = {}
    for index, mesh in visual_meshes(model, links):
        meshes.setdefault(index, []).append(mesh)
    if not meshes:
        where = "" if links is None else f" in the links chosen ({', '.join(links)})"
        raise EmbodimentError(f"robot '{model.name}' has no visual shapes to sample{where}; add them to its URDF")
    surfaces = [(index, *_outer_surface(parts, seed + index)) for index, parts in meshes.items()]
    weight = np.sqrt([area for *_, area in surfaces])
    counts = np.floor(count * weight / weight.sum()).astype(int)
    counts[np.argsort(-weight)[: count - counts.sum()]] += 1
    rng = np.random.default_rng(seed)
    link_ids, points, normals = [], [], []
    for (index, p, normal, _), k in zip(surfaces, counts, strict=True):
        chosen = rng.choice(len(p), size=k, replace=k > len(p))
        link_ids.append(np.full(k, index))
        points.append(p[chosen])
        normals.append(normal[chosen])
    return Surface(
        torch.from_numpy(np.concatenate(link_ids)),
        torch.from_numpy(np.concatenate(points)),
        torch.from_numpy(np.concatenate(normals)),
    )


def _outer_surface(
    meshes: Sequence[trimesh.Trimesh], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Points, outward normals and area of the part of a link that is visible from outside."""
    areas = np.array([mesh.area for mesh in meshes])
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(_CANDIDATES, areas / areas.sum())
    points, normals = [], []
    for mesh, k in zip(meshes, counts, strict=True):
        if k:
            triangle = rng.choice(len(mesh.faces), size=k, p=mesh.area_faces / mesh.area_faces.sum())
            r = np.sqrt(rng.random((k, 1))), rng.random((k, 1))
            a, b, c = np.swapaxes(mesh.triangles[triangle], 0, 1)
            points.append((1 - r[0]) * a + r[0] * (1 - r[1]) * b + r[0] * r[1] * c)
            normals.append(mesh.face_normals[triangle])
    p, normal = np.concatenate(points), np.concatenate(normals)
    visible, outward = _visible_from_outside(p, normal)
    flip = np.einsum("pi,pi->p", outward, normal) < 0  # triangles of reversed winding
    normal[flip] *= -1
    return p[visible], normal[visible], float(areas.sum() * visible.mean())


def _visible_from_outside(
    p: NDArray[np.float64], normal: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which points are first hits from some direction, and the sum of the directions from which each is visible.

    Every direction has an orthographic z-buffer of the points.
    """
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
        z_buffer = np.full(grid.max(axis=1) + 3, -np.inf)
        np.maximum.at(z_buffer, tuple(grid), height)
        # The points are few, so some cells of a wall are empty. Morphological closing fills holes of one or two cells,
        # through which the inside of a housing would be visible.
        top = np.maximum(z_buffer, grey_closing(z_buffer, size=3))[tuple(grid)]
        cosine = np.abs(normal @ d)
        slack = cell * np.sqrt(1 / np.clip(cosine, 0.4, 1) ** 2 - 1) + 0.15 * cell
        first = (height >= top - slack) & (cosine > 0.2)
        outward += first[:, None] * d
    return np.linalg.norm(outward, axis=-1) > 0, outward
