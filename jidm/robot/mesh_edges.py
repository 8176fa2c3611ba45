"""Points on the edges of the robot's meshes, and which of them are image edges: silhouettes and creases.

A mesh edge is a silhouette where one of its faces is turned to the camera and the other away, and a crease where its
faces differ visibly in shading. Both follow from geometry alone, so they exist on arms without texture too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jidm.robot.shape_mesh import visual_meshes

if TYPE_CHECKING:
    import trimesh

    from jidm.robot.model import RobotModel

_COPLANAR_ANGLE = np.deg2rad(0.5)  # below it, faces count as one plane
_CREASE_ANGLE = np.deg2rad(25.0)  # below it, shading changes too little for an image edge
_MIN_FACING_COSINE = 0.05  # cosine below which a face counts as edge-on


@dataclass(frozen=True, eq=False)
class MeshEdges:
    """Points on mesh edges, fixed to links.

    Attributes:
        link: (N,) index into `model.links`.
        p_link: (N, 3) position [m].
        tangent_link: (N, 3) unit direction of the edge.
        normal_a, normal_b: (N, 3) outward unit normals of the two adjacent faces.
        crease: (N,) whether the angle between the faces is visible in the shading.
        convex: (N,) whether the edge is convex (only convex edges can be silhouettes).
    """

    link: Int[Tensor, " N"]
    p_link: Float[Tensor, "N 3"]
    tangent_link: Float[Tensor, "N 3"]
    normal_a: Float[Tensor, "N 3"]
    normal_b: Float[Tensor, "N 3"]
    crease: Bool[Tensor, " N"]
    convex: Bool[Tensor, " N"]

    def __len__(self) -> int:
        return self.link.shape[0]

    def __getitem__(self, index: Int[Tensor, " K"]) -> MeshEdges:
        return MeshEdges(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, like: Tensor) -> MeshEdges:
        """Same points in the dtype and on the device of `like`."""
        values = (getattr(self, f.name) for f in fields(self))
        return MeshEdges(*(v.to(like) if v.is_floating_point() else v.to(like.device) for v in values))


def sample_mesh_edges(model: RobotModel, count: int, *, seed: int = 0, links: Sequence[str] | None = None) -> MeshEdges:
    """Points on the edges of the links' visual shapes, distributed by the square root of each link's edge length.

    Args:
        count: number of points; none are returned if no shape has an edge.
        seed: of the sampling.
        links: names of the links to sample, or patterns, as for `visual_meshes`; all if None.

    Raises:
        EmbodimentError: as for `visual_meshes`.
    """
    rng = np.random.default_rng(seed)
    parts: list[tuple[np.ndarray, ...]] = []
    for index, mesh in visual_meshes(model, links):
        mesh.merge_vertices(merge_tex=True, merge_norm=True)  # else no face has neighbors
        if len(mesh.face_adjacency):
            parts.append(_mesh_edges(mesh, index))
    if not parts:
        empty = torch.zeros(0, 3, dtype=torch.float64)
        flag = torch.zeros(0, dtype=torch.bool)
        return MeshEdges(torch.zeros(0, dtype=torch.long), empty, empty, empty, empty, flag, flag)
    link_id, start, end, angle, normal_a, normal_b, convex = (np.concatenate(x) for x in zip(*parts, strict=True))
    length = np.linalg.norm(end - start, axis=-1)
    weight = length.copy()
    for k in np.unique(link_id):
        weight[link_id == k] /= np.sqrt(length[link_id == k].sum())
    pick = rng.choice(len(length), size=count, p=weight / weight.sum())
    along = rng.random((count, 1))
    arrays = (
        link_id[pick],
        start[pick] * (1 - along) + end[pick] * along,
        (end - start)[pick] / length[pick, None],
        normal_a[pick],
        normal_b[pick],
        angle[pick] > _CREASE_ANGLE,
        convex[pick],
    )
    return MeshEdges(*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays))


def feature_edges(
    edges: MeshEdges, rotation: Float[Tensor, "*batch N 3 3"], to_camera: Float[Tensor, "*batch N 3"]
) -> Bool[Tensor, "*batch N"]:
    """Which edge points are image edges, occlusion aside: silhouettes, and creases with a face turned to the camera.

    Args:
        rotation: (*batch, N, 3, 3) rotation of each point's link in the base frame.
        to_camera: (*batch, N, 3) vector from each point to the camera in the base frame [m].
    """
    view = to_camera / to_camera.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    facing = torch.einsum("...ij,...i->...j", rotation, view)  # the direction to the camera in the link's frame
    a, b = (facing * edges.normal_a).sum(-1), (facing * edges.normal_b).sum(-1)
    silhouette = (a * b < 0) & edges.convex
    return silhouette | (edges.crease & (torch.maximum(a, b) > _MIN_FACING_COSINE))


def _mesh_edges(mesh: trimesh.Trimesh, index: int) -> tuple[np.ndarray, ...]:
    """Link, both ends, angle, both faces' normals and convexity of the edges where two faces meet."""
    ends = mesh.vertices[mesh.face_adjacency_edges]
    angle = mesh.face_adjacency_angles
    keep = (angle > _COPLANAR_ANGLE) & (np.linalg.norm(ends[:, 1] - ends[:, 0], axis=-1) > 1e-6)
    normals = mesh.face_normals[mesh.face_adjacency[keep]]
    return (
        np.full(keep.sum(), index),
        ends[keep, 0],
        ends[keep, 1],
        angle[keep],
        normals[:, 0],
        normals[:, 1],
        mesh.face_adjacency_convex[keep],
    )
