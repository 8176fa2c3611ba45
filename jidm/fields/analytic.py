"""The exact Jacobian field of a robot with known URDF and camera, without training and without a renderer.

A point p of link l in the base frame moves by `v_k + w_k x p` per unit of joint k (`Kinematics.link_twists`), and its pixel by
the derivative of the projection times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jidm.errors import InputError
from jidm.fields.base import ContourJacobian, SurfaceJacobian
from jidm.robot.kinematics import Kinematics
from jidm.robot.mesh_edges import MeshEdges, feature_edges, sample_mesh_edges
from jidm.robot.mesh_rasterizer import MeshRasterizer
from jidm.robot.surface import Surface, sample_surface
from jidm.robot.visibility import unoccluded_points, visible_points

if TYPE_CHECKING:
    from typing_extensions import Self

    from jidm.camera.model import Camera
    from jidm.robot.embodiment import Embodiment

# Cells of the z-buffer along the longer image side, independent of the resolution, so that the density of points per cell
# does not depend on the video.
_BUFFER_CELLS = 120
_CONTOUR_SPACING = 1.5  # [px]


class AnalyticField:
    """Jacobian field from URDF, camera and joint positions.

    Args:
        embodiment: the robot.
        camera: the camera; Jacobians are in its pixels.
        points: number of surface points of the field.
        occluders: number of surface points in the z-buffer, including these.
        contour_points: number of candidate points on edges, sampled on first use. Only few of them lie on a contour at any
            one pose, above all of round links.
        seed: of the sampling.
        links: names of the links whose surface and edges are sampled, or patterns with `*`, `?`, `[...]`; all if None. The
            others are not read, give no points, and hide nothing: choose also those that pass in front. A joint that moves
            none of these links is not observable, and its position is held.
        rasterizer: what `dense` and `visible_surface` ask which link each pixel shows: "points", a z-buffer of the surface
            points, or "pytorch3d", the meshes themselves (`MeshRasterizer`).
    """

    def __init__(
        self,
        embodiment: Embodiment,
        camera: Camera,
        *,
        points: int = 4000,
        occluders: int = 20000,
        contour_points: int = 80000,
        seed: int = 0,
        links: Sequence[str] | None = None,
        rasterizer: str = "points",
    ) -> None:
        if not 0 < points <= occluders:
            raise InputError(f"points must lie in 1..occluders, got {points} of {occluders}")
        if rasterizer not in ("points", "pytorch3d"):
            raise InputError(f"rasterizer must be 'points' or 'pytorch3d', got {rasterizer!r}")
        self.embodiment = embodiment
        self.camera = camera
        self.joint_names = embodiment.joint_names
        self.kinematics = Kinematics.from_embodiment(embodiment)
        self.points = points
        self.contour_points = contour_points
        self.seed = seed
        self.links = links
        self._meshes = MeshRasterizer(embodiment.model, links) if rasterizer == "pytorch3d" else None
        self.surface = _shuffled(sample_surface(embodiment.model, occluders, seed=seed, links=links), seed)

    def with_camera(self, camera: Camera) -> Self:
        """The field of the same surface points in another camera."""
        field = copy(self)
        field.camera = camera
        return field

    def at(self, q: Float[Tensor, "*batch n"], image: Tensor | None = None) -> AnalyticPose:
        """The field at joint positions q [rad or m]; the image is not used."""
        surface = self.surface.to(q)
        poses = self.kinematics.link_poses(q)
        p_base = self.kinematics.transform_points(poses, surface.link, surface.p_link)
        visible = self._visible(poses, surface, p_base)
        reported = Surface(
            surface.link[: self.points], surface.p_link[: self.points], surface.normal_link[: self.points]
        )
        return AnalyticPose(self, q, reported, visible[..., : self.points])

    def dense(
        self, q: Float[Tensor, "*batch n"], height: int, width: int, image: Tensor | None = None
    ) -> tuple[Float[Tensor, "*batch 2 n {height} {width}"], Float[Tensor, "*batch {height} {width}"]]:
        """The field on a `height x width` grid over the whole image.

        Each cell is the nearest visible surface point in it (in gaps of the sampling, the nearest one of its neighbors),
        moved to the center of the cell at the depth of that point, with its exact Jacobian.

        Returns:
            jacobian (*batch, 2, n, height, width) [grid px per rad or m], 0 off the robot, and the mask, 1 on it.
        """
        camera = self.camera.resized(width, height)
        poses = self.kinematics.link_poses(q)
        p, link_grid = self._rasterize(camera, poses)
        mask = link_grid >= 0
        jacobian = self._image_jacobian(camera, poses, p, link_grid.clamp(min=0))
        jacobian = jacobian * mask[..., None, None]
        jacobian = jacobian.movedim(-3, -1).unflatten(-1, (height, width))
        return jacobian, mask.to(q.dtype).unflatten(-1, (height, width))

    def visible_surface(
        self, q: Float[Tensor, " n"], height: int, width: int
    ) -> tuple[Int[Tensor, "{height} {width}"], Surface]:
        """The surface point that is visible in each pixel at q.

        Returns:
            The index of each pixel's point, -1 off the robot; and the points, in the frames of their links.
        """
        poses = self.kinematics.link_poses(q)
        p, link = self._rasterize(self.camera.resized(width, height), poses)
        on = link >= 0
        T = poses[link[on]]
        p_link = torch.einsum("pji,pj->pi", T[:, :3, :3], p[on] - T[:, :3, 3])
        number = torch.where(on, on.cumsum(0) - 1, -1).unflatten(0, (height, width))
        return number, Surface(link[on], p_link, torch.zeros_like(p_link))

    def project_surface(
        self, q: Float[Tensor, " n"], surface_points: Surface, height: int, width: int
    ) -> tuple[Float[Tensor, "N 2"], Float[Tensor, " N"]]:
        """Exact positions of surface points in an image of that size at q [px], and their depths [m]."""
        p_base = self.kinematics.transform_points(
            self.kinematics.link_poses(q), surface_points.link, surface_points.p_link
        )
        uv, depth = self.camera.resized(width, height).project(p_base)
        return uv, depth

    def _rasterize(
        self, camera: Camera, poses: Float[Tensor, "*batch links 4 4"]
    ) -> tuple[Float[Tensor, "*batch cells 3"], Int[Tensor, "*batch cells"]]:
        """The point [m, base frame] and the link that are visible in each pixel; link -1 off the robot."""
        if self._meshes is not None:
            depth_grid, link_grid = self._meshes(camera, poses)
        else:
            surface = self.surface.to(poses)
            p_base = self.kinematics.transform_points(poses, surface.link, surface.p_link)
            uv, depth = camera.project(p_base)
            visible = self._visible(poses, surface, p_base)
            depth_grid, link_grid = _splat(uv, depth, visible, surface.link, camera.height, camera.width)
        mask = link_grid >= 0
        v, u = torch.meshgrid(
            torch.arange(camera.height, dtype=poses.dtype, device=poses.device),
            torch.arange(camera.width, dtype=poses.dtype, device=poses.device),
            indexing="ij",
        )
        centers = torch.stack([u, v], dim=-1).reshape(-1, 2).expand(*mask.shape, 2)
        return camera.unproject(centers, torch.where(mask, depth_grid, torch.ones_like(depth_grid))), link_grid

    @cached_property
    def edges(self) -> MeshEdges:
        """Candidate points of silhouette and creases, sampled on first use."""
        return sample_mesh_edges(self.embodiment.model, self.contour_points, seed=self.seed, links=self.links)

    def visible_contour(self, q: Float[Tensor, " n"]) -> Int[Tensor, " K"]:
        """Identities of the edge points that are visible as a line in the image at q, subsampled to a uniform density in the
        image, so that the many small edges of a gripper do not dominate."""
        edges, surface, camera = self.edges.to(q), self.surface.to(q), self.camera
        with torch.no_grad():
            poses = self.kinematics.link_poses(q)
            p_base = self.kinematics.transform_points(poses, edges.link, edges.p_link)
            drawn = feature_edges(edges, poses[edges.link, :3, :3], camera.position.to(p_base) - p_base)
            candidates = drawn.nonzero()[:, 0]
            uv, depth = camera.project(p_base[candidates])
            occluder_uv, occluder_depth = camera.project(
                self.kinematics.transform_points(poses, surface.link, surface.p_link)
            )
            unoccluded = unoccluded_points(
                uv, depth, edges.link[candidates], occluder_uv, occluder_depth, surface.link,
                width=camera.width, height=camera.height, focal=float(camera.K[0, 0]), cell=self._cell,
            )  # fmt: skip
            return candidates[unoccluded][_grid_subsample(uv[unoccluded], _CONTOUR_SPACING)]

    def contour(self, q: Float[Tensor, " n"], index: Int[Tensor, " K"]) -> ContourJacobian:
        """The edge points `index` at q: positions, normals and Jacobians in the image."""
        edges, camera = self.edges.to(q)[index], self.camera
        poses = self.kinematics.link_poses(q)
        p_base = self.kinematics.transform_points(poses, edges.link, edges.p_link)
        p_camera = camera.transform(p_base)
        tangent = torch.einsum("kij,kj->ki", poses[edges.link, :3, :3], edges.tangent_link)
        along = torch.einsum("kai,ki->ka", camera.projection_jacobian(p_camera), tangent)
        along = along / along.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        across = torch.stack([-along[:, 1], along[:, 0]], dim=-1)
        jacobian = self._image_jacobian(camera, poses, p_base, edges.link)
        return ContourJacobian(
            index, camera.project_camera(p_camera), across, torch.einsum("ka,kan->kn", across, jacobian), edges.link
        )

    @property
    def _cell(self) -> float:
        """Side of a z-buffer cell [px]."""
        return max(self.camera.width, self.camera.height) / _BUFFER_CELLS

    def _visible(self, poses: Tensor, surface: Surface, p_base: Tensor) -> Bool[Tensor, "*batch N"]:
        camera = self.camera
        with torch.no_grad():
            normal = torch.einsum("...pij,pj->...pi", poses[..., surface.link, :3, :3], surface.normal_link)
            to_camera = camera.position.to(p_base) - p_base
            cosine = (normal * to_camera).sum(-1) / to_camera.norm(dim=-1).clamp(min=1e-9)
            uv, depth = camera.project(p_base)
            return visible_points(
                uv,
                depth,
                cosine,
                width=camera.width,
                height=camera.height,
                focal=float(camera.K[0, 0]),
                cell=self._cell,
            )

    def _image_jacobian(
        self, camera: Camera, poses: Tensor, p_base: Tensor, link: Int[Tensor, "*one_or_each N"]
    ) -> Float[Tensor, "*batch N 2 n"]:
        """Exact d(u, v)/dq of points p_base of the links `link` [px/rad or px/m]."""
        twists = self.kinematics.link_twists(poses)
        P = camera.projection_jacobian(camera.transform(p_base))  # (*batch, N, 2, 3)
        # P (v + w x p) = P v + (p x P^T)^T w, so each point is one 2x6 block times the 6xn twist of its link.
        moment = torch.linalg.cross(p_base.unsqueeze(-2).expand_as(P), P, dim=-1)
        rows = torch.cat([P, moment], dim=-1)
        if link.dim() == 1:
            return torch.einsum("...pai,...pin->...pan", rows, twists[..., link, :, :])
        index = link[..., None, None].expand(*link.shape, *twists.shape[-2:])
        return torch.einsum("...pai,...pin->...pan", rows, twists.gather(-3, index))


@dataclass(frozen=True, eq=False)
class AnalyticPose:
    """An `AnalyticField` at given joint positions.

    Attributes:
        field: the field.
        q: (*batch, n) the joint positions [rad or m].
        surface_points: the N points, in the frames of their links.
        visible: (*batch, N) which of them are visible at q.
    """

    field: AnalyticField
    q: Float[Tensor, "*batch n"]
    surface_points: Surface
    visible: Bool[Tensor, "*batch N"]

    def surface(self, delta_q: Float[Tensor, "*batch n"] | None = None) -> SurfaceJacobian:
        """The points moved to `q + delta_q` by forward kinematics; their visibility is that at q."""
        field, surface_points = self.field, self.surface_points
        poses = field.kinematics.link_poses(self.q if delta_q is None else self.q + delta_q)
        p_base = field.kinematics.transform_points(poses, surface_points.link, surface_points.p_link)
        uv, _ = field.camera.project(p_base)
        jacobian = field._image_jacobian(field.camera, poses, p_base, surface_points.link)
        normals = torch.einsum("...pij,pj->...pi", poses[..., surface_points.link, :3, :3], surface_points.normal_link)
        return SurfaceJacobian(uv, jacobian, self.visible, normals, surface_points.link)

    def keep(self, index: Int[Tensor, " K"]) -> AnalyticPose:
        """The same field with only the points `index`."""
        surface_points = Surface(
            self.surface_points.link[index], self.surface_points.p_link[index], self.surface_points.normal_link[index]
        )
        return replace(self, surface_points=surface_points, visible=self.visible[..., index])


def _grid_subsample(uv: Float[Tensor, "N 2"], spacing: float) -> Int[Tensor, " K"]:
    """Indices of the first point in each square cell of side `spacing`, in ascending order."""
    cell = (uv / spacing).floor().long()
    _, group = cell.unique(dim=0, return_inverse=True)
    order = torch.arange(len(uv), device=uv.device)
    first = order.new_full((int(group.max()) + 1 if len(uv) else 0,), len(uv))
    return first.scatter_reduce(0, group, order, reduce="amin").sort().values


def _shuffled(surface: Surface, seed: int) -> Surface:
    """The points in random order, so that any leading part of them is a uniform sample of the robot."""
    order = torch.randperm(len(surface), generator=torch.Generator().manual_seed(seed))
    return Surface(surface.link[order], surface.p_link[order], surface.normal_link[order])


def _splat(
    uv: Tensor, depth: Tensor, visible: Tensor, link: Tensor, height: int, width: int
) -> tuple[Float[Tensor, "*batch HW"], Int[Tensor, "*batch HW"]]:
    """Depth [m] and link of the nearest visible point of each cell, link -1 if there is none; small gaps are filled."""
    with torch.no_grad():
        column, row = uv.round().long().unbind(-1)
        visible = visible & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        index = torch.where(visible, row * width + column, height * width)
        z = torch.where(visible, depth, torch.inf)
        buffer = z.new_full((*z.shape[:-1], height * width + 1), torch.inf)
        depth_grid = buffer.scatter_reduce(-1, index, z, reduce="amin")
        winner = visible & (z <= depth_grid.gather(-1, index))
        # Points that are not the nearest write into the spare last cell.
        link_grid = torch.full_like(depth_grid, -1, dtype=torch.long)
        link_grid.scatter_(-1, torch.where(winner, index, height * width), link.expand_as(index))
        return _fill_gaps(depth_grid[..., :-1], link_grid[..., :-1], height, width)


def _fill_gaps(depth: Tensor, link: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Empty cells with at least three occupied neighbors take the nearest of those."""
    batch, count = depth.shape[:-1], depth.shape[:-1].numel()
    z = torch.nn.functional.pad(depth.reshape(count, 1, height, width), (1, 1, 1, 1), value=torch.inf)
    k = torch.nn.functional.pad(link.reshape(count, 1, height, width), (1, 1, 1, 1), value=-1)
    shifts = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    zs = torch.stack([z[..., i : i + height, j : j + width] for i, j in shifts])
    ks = torch.stack([k[..., i : i + height, j : j + width] for i, j in shifts])
    best = zs.argmin(dim=0, keepdim=True)
    empty = (link.reshape(count, 1, height, width) < 0) & ((ks >= 0).sum(0) >= 3)
    depth = torch.where(empty, zs.gather(0, best)[0], depth.reshape(count, 1, height, width))
    link = torch.where(empty, ks.gather(0, best)[0], link.reshape(count, 1, height, width))
    return depth.reshape(*batch, height * width), link.reshape(*batch, height * width)
