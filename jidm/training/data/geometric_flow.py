"""Exact optical flow of many pairs at once, by moving the surface point under every cell with its link.

Simulated recordings hold, on a coarse grid, depth and link of every cell; with the camera and forward kinematics these
give the flow to any other frame, so it need not be stored for each pair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from jidm.robot.kinematics import Kinematics

_EPS = 1e-6  # fraction of a cell

# A moved point counts as visible when one of the four cells around it shows the same link at about its depth: within
# this fraction of the depth ...
_DEPTH_RTOL = 0.005
# ... plus this many widths of a cell at that depth, by about which a tilted surface changes depth between two cells.
_DEPTH_CELL_TOL = 2.0


@dataclass(frozen=True, eq=False)
class DepthView:
    """Depth, links, cameras and link poses of B frames on a coarse grid.

    Attributes:
        depth: (B, h, w) distance along the optical axis at the cells' centers [m]; undefined off the robot.
        link: (B, h, w) index of the link each cell shows, -1 = not the robot.
        intrinsics: (B, 4) fx, fy, cx, cy of the grid itself [cells].
        T_camera_base: (B, 4, 4).
        poses: (B, links, 4, 4) `T_base_link` at the frame's joint positions [m].
    """

    depth: Float[Tensor, "B h w"]
    link: Int[Tensor, "B h w"]
    intrinsics: Float[Tensor, "B 4"]
    T_camera_base: Float[Tensor, "B 4 4"]
    poses: Float[Tensor, "B links 4 4"]

    def dilated(self) -> DepthView:
        """The same view with every link dilated by one cell over the background, at the depth of its border.

        Where several links meet, the nearest is taken. A cell shows what is at its center, but some of the pixels
        around a center beside the robot still show the robot.
        """
        robot = self.link >= 0
        far = torch.full_like(self.depth, torch.inf)
        neighbors = F.unfold(torch.where(robot, self.depth, far).nan_to_num(posinf=1e9)[:, None], 3, padding=1)
        inside = F.unfold(torch.ones_like(self.depth[:1, None]), 3, padding=1) > 0
        links = F.unfold(self.link[:, None].to(self.depth.dtype), 3, padding=1)
        nearest, which = torch.where(inside, neighbors, neighbors.new_tensor(1e9)).min(1)
        link = links.gather(1, which[:, None])[:, 0].to(self.link.dtype)
        has_neighbor = (nearest < 1e8).reshape(self.link.shape)
        shape = self.depth.shape
        return replace(
            self,
            depth=torch.where(robot | ~has_neighbor, self.depth, nearest.reshape(shape)),
            link=torch.where(robot | ~has_neighbor, self.link, link.reshape(shape)),
        )

    @cached_property
    def points(self) -> _SurfacePoints:
        """The surface points at the centers of the cells on the robot."""
        w = self.depth.shape[2]
        frame, cell = (self.link.flatten(1) >= 0).nonzero().unbind(-1)
        z = self.depth.flatten(1)[frame, cell]
        uv = torch.stack([cell % w, cell // w], dim=-1).to(z.dtype)
        K = self.intrinsics[frame].to(z.dtype)
        p_camera = torch.cat([(uv - K[:, 2:]) / K[:, :2] * z[:, None], z[:, None]], dim=-1)
        return _SurfacePoints(frame, cell, self.link.flatten(1)[frame, cell].long(), p_camera, uv)


def grid_intrinsics(full: Float[Tensor, "B 4"], height: int, width: int, h: int, w: int) -> Float[Tensor, "B 4"]:
    """(fx, fy, cx, cy) of a (height, width) image converted to its (h, w) grid; pixel edges stay in place."""
    s = full.new_tensor([w / width, h / height])
    return torch.cat([full[:, :2] * s, (full[:, 2:] + 0.5) * s - 0.5], dim=-1)


def link_poses(kinematics: Kinematics, q: Float[Tensor, "B n"]) -> Float[Tensor, "B links 4 4"]:
    """`T_base_link` in float64: float32 rounding would be too large in differences of poses."""
    return kinematics.link_poses(q.double())


@dataclass(frozen=True, eq=False)
class _SurfacePoints:
    """The P cells of B grids that show the robot.

    Attributes:
        frame, cell: (P,) which grid, and which of its h w cells.
        link: (P,) the link it shows.
        p_camera: (P, 3) the surface point at its center, in the camera's frame [m].
        uv: (P, 2) the center [cells].
    """

    frame: Int[Tensor, " P"]
    cell: Int[Tensor, " P"]
    link: Int[Tensor, " P"]
    p_camera: Float[Tensor, "P 3"]
    uv: Float[Tensor, "P 2"]

    def transformed(self, T: Float[Tensor, "B links 4 4"]) -> Float[Tensor, "P 3"]:
        """Each point moved by the transform of its link, which stays in float64 until here."""
        T = T[..., :3, :].to(self.p_camera.dtype)[self.frame, self.link]
        return (T[..., :3] * self.p_camera[:, None, :]).sum(-1) + T[..., 3]

    def to_grid(self, values: Float[Tensor, "P *c"], view: DepthView) -> Float[Tensor, "B ..."]:
        """Values of the points on their grids, (B, *c, h, w), 0 off the robot."""
        count, h, w = view.depth.shape
        out = values.new_zeros(count, h * w, *values.shape[1:])
        out[self.frame, self.cell] = values
        return out.movedim(1, -1).unflatten(-1, (h, w))


def geometric_flow(first: DepthView, second: DepthView) -> tuple[Float[Tensor, "B 2 h w"], Float[Tensor, "B h w"]]:
    """Flow from the first to the second frames [cells of the grid], and 1 where the point is visible in both, else 0.

    Off the robot both are 0. A point is not visible where it leaves the image or something else is in front of it.
    """
    points = first.points
    before = torch.linalg.inv(first.T_camera_base.double()[:, None] @ first.poses)
    # T_second_first of every link: from camera coordinates in the first frame to those in the second.
    p_second = points.transformed(second.T_camera_base.double()[:, None] @ second.poses @ before)
    uv = _project(p_second, second.intrinsics[points.frame])
    visible = _is_visible(second, points, uv, p_second[:, 2])
    return points.to_grid(uv - points.uv, first), points.to_grid(visible.to(uv.dtype), first)


def downsample_flow(
    flow: Float[Tensor, "B 2 y x"], weight: Float[Tensor, "B y x"], factor: int
) -> tuple[Float[Tensor, "B 2 h w"], Float[Tensor, "B h w"]]:
    """Flow on a grid coarser by `factor`, in the same pixels: weighted mean and mean weight of every cell."""
    mean_weight = F.avg_pool2d(weight[:, None], factor)
    return F.avg_pool2d(flow * weight[:, None], factor) / mean_weight.clamp(min=_EPS), mean_weight[:, 0]


def exact_field(
    view: DepthView, kinematics: Kinematics
) -> tuple[Float[Tensor, "B 2 n h w"], Float[Tensor, "B h w"]]:  # fmt: skip
    """The exact Jacobian field at every cell [cells of the grid per rad or m], 0 off the robot, and 1 on the robot."""
    points, poses = view.points, view.poses.double()
    T = view.T_camera_base.double()[points.frame]
    p = points.p_camera.double()
    # Twists are in the base frame, so the point and the rows of the projection's Jacobian are brought there.
    p_base = ((p - T[:, :3, 3])[:, None, :] @ T[:, :3, :3])[:, 0]
    focal, z = view.intrinsics[points.frame, :2].double(), p[:, 2:]
    rows = torch.diag_embed(focal / z)
    rows = torch.cat([rows, (-focal * p[:, :2] / z.square())[:, :, None]], -1) @ T[:, :3, :3]
    moment = torch.linalg.cross(p_base[:, None].expand_as(rows), rows, dim=-1)
    twists = kinematics.link_twists(poses)[points.frame, points.link]
    columns = (torch.cat([rows, moment], -1) @ twists).to(view.depth.dtype)
    return points.to_grid(columns, view), (view.link >= 0).to(view.depth.dtype)


def _project(p_camera: Float[Tensor, "P 3"], intrinsics: Float[Tensor, "P 4"]) -> Float[Tensor, "P 2"]:
    K = intrinsics.to(p_camera.dtype)
    return p_camera[:, :2] / p_camera[:, 2:].clamp(min=1e-6) * K[:, :2] + K[:, 2:]


def _is_visible(
    view: DepthView, points: _SurfacePoints, uv: Float[Tensor, "P 2"], z: Float[Tensor, " P"]
) -> Bool[Tensor, " P"]:
    """Whether one of the four cells around uv shows the point's link at about depth z."""
    _, h, w = view.depth.shape
    u, v = uv.unbind(-1)
    inside = (u > -0.5) & (v > -0.5) & (u < w - 0.5) & (v < h - 0.5) & (z > 0)
    tolerance = _DEPTH_RTOL * z + _DEPTH_CELL_TOL * z / view.intrinsics[points.frame, 0].to(z.dtype)
    column, row = u.clamp(0, w - 1), v.clamp(0, h - 1)
    visible = torch.zeros_like(inside)
    for i in (row.floor().long(), row.ceil().long()):
        for j in (column.floor().long(), column.ceil().long()):
            same = view.link[points.frame, i, j] == points.link
            visible |= same & ((view.depth[points.frame, i, j] - z).abs() <= tolerance)
    return inside & visible
