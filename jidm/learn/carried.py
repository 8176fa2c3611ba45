"""Exact flow of many pairs at once: every robot pixel's surface point carried by its link from one pose to another.

The recordings of self-play hold, on a coarse grid, the distance and the link every cell shows; with the camera and
forward kinematics that gives the flow to any other frame, so it need not be stored for each pair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jidm.robot.kinematics import Kinematics

# A carried point counts as seen when one of the four cells around it shows the same link at about its distance:
# within this share of the distance ...
_DEPTH_SHARE = 0.005
# ... plus this many times the width of a cell there: between two cells a tilted surface changes depth by about as much.
_DEPTH_CELLS = 2.0

_TANGENT_SHARE = 0.01  # of the step over which its first-order motion is differenced


@dataclass(frozen=True, eq=False)
class View:
    """What a coarse grid knows of B frames.

    Attributes:
        depth: (B, h, w) distance along the optical axis at the cells' centres [m]; means nothing off the robot.
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


def grid_intrinsics(full: Float[Tensor, "B 4"], height: int, width: int, h: int, w: int) -> Float[Tensor, "B 4"]:
    """(fx, fy, cx, cy) of a (height, width) picture as those of its (h, w) grid; pixel edges stay in place."""
    s = full.new_tensor([w / width, h / height])
    return torch.cat([full[:, :2] * s, (full[:, 2:] + 0.5) * s - 0.5], dim=-1)


def link_poses(kinematics: Kinematics, q: Float[Tensor, "B n"]) -> Float[Tensor, "B links 4 4"]:
    """Poses in float64: differences of poses lose what float32 would round."""
    return kinematics.link_poses(q.double())


def carried_flow(first: View, second: View) -> tuple[Float[Tensor, "B 2 h w"], Float[Tensor, "B h w"]]:
    """Flow from the first to the second frames [cells of the grid], and 1 where the point is seen in both, else 0.

    Off the robot both are 0. A point is lost where it leaves the picture or something else is in front of it.
    """
    _, h, w = first.depth.shape
    on_robot = first.link >= 0
    before = torch.linalg.inv(first.T_camera_base.double()[:, None] @ first.poses)
    # T_second_first of every link: camera coordinates before -> camera coordinates after.
    carry = (second.T_camera_base.double()[:, None] @ second.poses @ before)[..., :3, :].to(first.depth.dtype)
    p_first, centre = _points(first)
    index = first.link.clamp(min=0).flatten(1).long()[..., None].expand(-1, -1, 12)
    T = carry.flatten(2).gather(1, index).unflatten(-1, (3, 4))
    p_second = (T[..., :3] * p_first[..., None, :]).sum(-1) + T[..., 3]
    z = p_second[..., 2]
    uv = _project(p_second, second.intrinsics)
    seen = on_robot.flatten(1) & (z > 0) & _shown(second, uv, z, first.link.flatten(1), h, w)
    flow = torch.where(on_robot.flatten(1)[..., None], uv - centre, torch.zeros_like(uv))
    return flow.mT.reshape(-1, 2, h, w), seen.reshape(-1, h, w).to(flow.dtype)


def tangent_flow(
    view: View, kinematics: Kinematics, q: Float[Tensor, "B n"], step: Float[Tensor, "B n"]
) -> tuple[Float[Tensor, "B 2 h w"], Float[Tensor, "B h w"]]:
    """Motion to first order of a step from q [cells of the grid]: the exact field times the step, and 1 on the robot.

    By central difference in float64 along the step; its error is of third order in a hundredth of the step.
    """
    small = _TANGENT_SHARE * step.double()
    ends = link_poses(kinematics, torch.cat([q.double() + small, q.double() - small]))
    on_robot = (view.link >= 0).to(view.depth.dtype)
    wide = replace(view, depth=view.depth.double())
    ahead, back = (carried_flow(wide, replace(wide, poses=poses))[0] for poses in ends.chunk(2))
    return ((ahead - back) / (2 * _TANGENT_SHARE)).to(view.depth.dtype), on_robot


def _points(view: View) -> tuple[Float[Tensor, "B hw 3"], Float[Tensor, "hw 2"]]:
    """Camera coordinates [m] of what each cell shows, and the cells' centres (u, v)."""
    _, h, w = view.depth.shape
    like = view.depth
    v, u = torch.meshgrid(
        torch.arange(h, dtype=like.dtype, device=like.device),
        torch.arange(w, dtype=like.dtype, device=like.device),
        indexing="ij",
    )
    centre = torch.stack([u.flatten(), v.flatten()], dim=-1)
    K = view.intrinsics.to(like.dtype)[:, None]
    xy = (centre - K[..., 2:]) / K[..., :2]
    # One metre off the robot keeps every number finite; nobody reads it.
    z = torch.where(view.link >= 0, view.depth, torch.ones_like(view.depth)).flatten(1)[..., None]
    return torch.cat([xy * z, z], dim=-1), centre


def _project(p_camera: Float[Tensor, "B hw 3"], intrinsics: Float[Tensor, "B 4"]) -> Float[Tensor, "B hw 2"]:
    K = intrinsics.to(p_camera.dtype)[:, None]
    return p_camera[..., :2] / p_camera[..., 2:].clamp(min=1e-6) * K[..., :2] + K[..., 2:]


def _shown(view: View, uv: Tensor, z: Tensor, link: Tensor, h: int, w: int) -> Tensor:
    """(B, hw) whether a cell around uv shows that link at about distance z."""
    u, v = uv.unbind(-1)
    inside = (u > -0.5) & (v > -0.5) & (u < w - 0.5) & (v < h - 0.5)
    focal = view.intrinsics[:, :1].to(z.dtype)
    slack = _DEPTH_SHARE * z + _DEPTH_CELLS * z / focal
    column, row = u.clamp(0, w - 1), v.clamp(0, h - 1)
    depth, links = view.depth.flatten(1), view.link.flatten(1)
    shown = torch.zeros_like(inside)
    for i in (row.floor(), row.ceil()):
        for j in (column.floor(), column.ceil()):
            cell = (i * w + j).long()
            shown |= (links.gather(1, cell) == link) & ((depth.gather(1, cell) - z).abs() <= slack)
    return inside & shown
