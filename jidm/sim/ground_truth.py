"""Exact optical flow from depth and kinematics: every robot pixel's surface point moves rigidly with its link."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from jidm.errors import InputError
from jidm.robot.kinematics import Kinematics

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.robot.embodiment import Embodiment

# A surface point counts as visible when the next frame's depth around it agrees to this fraction of the distance.
_DEPTH_SLACK = 0.004


class ExactFlow(NamedTuple):
    """flow: (2, H, W) float64 [px], (u right, v down), on the first frame's grid, 0 off the robot;
    on_robot: (H, W) True where the pixel's center shows the robot."""

    flow: Float[Tensor, "2 H W"]
    on_robot: Bool[Tensor, "H W"]


def exact_flow(
    embodiment: Embodiment,
    camera: Camera,
    depth: ArrayLike | Tensor,
    link: ArrayLike | Tensor,
    q: ArrayLike | Tensor,
    q_next: ArrayLike | Tensor,
) -> ExactFlow:
    """The optical flow of every robot pixel when the joints move from q to q_next.

    Args:
        camera: the camera of `depth` and `link`; it does not move.
        depth: (H, W) distance along the optical axis [m], as in `Rendering`.
        link: (H, W) link ids, -1 off the robot.
        q, q_next: (n,) actuated joint positions of the two frames [rad or m].

    Raises:
        InputError: a shape does not fit camera or robot.
    """
    ids, on_robot, uv, uv_next, _ = _transported_pixels(embodiment, camera, depth, link, q, q_next)
    flow = torch.zeros(2, *ids.shape, dtype=torch.float64)
    flow[:, on_robot] = (uv_next - uv).T
    return ExactFlow(flow, on_robot)


def stays_visible(
    embodiment: Embodiment,
    camera: Camera,
    depth: ArrayLike | Tensor,
    link: ArrayLike | Tensor,
    q: ArrayLike | Tensor,
    q_next: ArrayLike | Tensor,
    depth_next: ArrayLike | Tensor,
) -> Bool[Tensor, "H W"]:
    """Visibility mask (H, W) of `exact_flow`: robot pixels whose surface point is inside the next frame and not occluded.

    Args as for `exact_flow`, and `depth_next` (H, W) [m], rendered at q_next. A point is visible if its distance lies
    between the smallest and the largest robot depth of the four pixels around it, with a slack of 0.4 % of the
    distance.

    Raises:
        InputError: a shape does not fit camera or robot.
    """
    ids, on_robot, _, uv_next, z_next = _transported_pixels(embodiment, camera, depth, link, q, q_next)
    height, width = ids.shape
    z_buffer = _to_float64(depth_next)
    if z_buffer.shape != ids.shape:
        raise InputError(f"depth_next has shape {tuple(z_buffer.shape)}, the first frame {tuple(ids.shape)}")
    u, v = uv_next.unbind(-1)
    inside = (z_next > 0) & (u > -0.5) & (v > -0.5) & (u < width - 0.5) & (v < height - 0.5)
    u0, v0 = u.nan_to_num().clamp(0, width - 1), v.nan_to_num().clamp(0, height - 1)
    corners = [(y.long(), x.long()) for y in (v0.floor(), v0.ceil()) for x in (u0.floor(), u0.ceil())]
    neighbors = torch.stack([z_buffer[corner] for corner in corners])
    slack = _DEPTH_SLACK * z_next
    farthest = torch.where(neighbors.isfinite(), neighbors, torch.full_like(neighbors, -torch.inf)).amax(0)
    visible = inside & (z_next <= farthest + slack) & (z_next >= neighbors.amin(0) - slack)
    mask = torch.zeros_like(on_robot)
    mask[on_robot] = visible
    return mask


def _transported_pixels(
    embodiment: Embodiment,
    camera: Camera,
    depth: ArrayLike | Tensor,
    link: ArrayLike | Tensor,
    q: ArrayLike | Tensor,
    q_next: ArrayLike | Tensor,
) -> tuple[Int[Tensor, "H W"], Bool[Tensor, "H W"], Float[Tensor, "N 2"], Float[Tensor, "N 2"], Float[Tensor, " N"]]:
    """Link ids, robot mask, pixels before, pixels after and depth after, for the N robot pixels in row order."""
    z, ids = _to_float64(depth), torch.as_tensor(link).cpu().long()
    if z.shape != (camera.height, camera.width) or ids.shape != z.shape:
        raise InputError(
            f"depth {tuple(z.shape)} and link {tuple(ids.shape)} must both be (H, W) = ({camera.height}, {camera.width})"
        )
    camera = camera.to("cpu", torch.float64)
    kinematics = Kinematics.from_embodiment(embodiment)
    before, after = kinematics.link_poses(torch.stack([_to_float64(q), _to_float64(q_next)]))
    on_robot = ids >= 0
    v, u = on_robot.nonzero().unbind(-1)
    k = ids[on_robot]
    uv = torch.stack([u, v], dim=-1).double()
    p_base = camera.unproject(uv, z[on_robot])
    # T_after T_before^-1 moves a point rigidly with its link.
    motion = after @ torch.linalg.inv(before)
    p_next = torch.einsum("pij,pj->pi", motion[k, :3, :3], p_base) + motion[k, :3, 3]
    uv_next, z_next = camera.project(p_next)
    return ids, on_robot, uv, uv_next, z_next


def _to_float64(x: ArrayLike | Tensor) -> Tensor:
    return torch.as_tensor(x).detach().cpu().double()
