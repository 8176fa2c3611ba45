"""What a video shows beside what its decoded motion predicts, frame by frame: the ground every term stands on.

The field at the decoded pose says where the robot is and where each step carries it. What the pictures show besides is
read off against that: robot where there should be none, background where the robot should be, brightness that did not go
where the step leads, a background that changes. The camera is taken to stand still.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from jidm.field.base import JacobianField
from jidm.field.learned import LearnedField
from jidm.solve.brightness import carry_back, gradients, path

_GRID = 96
"""Cells along the picture's longer side on which all is compared: fine enough for a gripper, and quick."""

_MARGIN = 1  # [cells] by which the robot may be off
_WINDOW = 5  # [cells] within which unexplained motion is the same: single cells at edges are noise
_ROBOT = 0.5
_FREE_FRAMES = 3  # a cell's background is known once it was free so often
_CHANGED = 0.08  # colour difference from the background, beyond its own noise, that is something else
_SAME = 0.04  # difference that is the background
_GRAIN = 0.02  # brightness by which a cell differs from itself a frame later
_FASTEST = 4.0  # [cells] a difference in brightness is never taken for more motion than this
_LEAST_SIZE = 10.0  # [cells] a robot that is seen less of counts as so large
_WITHIN_A_FRAME = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
_MOVES = 0.02  # of what moves a cell most: less does not count as moving it


@dataclass(frozen=True, eq=False)
class Evidence:
    """Of one video: T frames, T - 1 steps, n joints. Shares are of the robot's usual size in the picture.

    Attributes:
        motion: (T-1,) how far the step moves the robot [cells rms].
        unexplained: (T-1,) motion that brightness asks for beyond the step [cells rms].
        changed: (T-1,) change of brightness that no motion brings about, as motion along its slope [cells rms].
        outside: (T,) share of something that is not background, beside the robot and hanging together with it.
        gone: (T,) share of background where the robot is.
        behind: (T-1,) mean change of colour where the robot is not.
        unexplained_at: (T-1, h, w) unexplained motion of each cell [cells].
        misplaced_at: (T, h, w) 1 where something is outside or the robot is gone.
        unexplained_by, changed_by, outside_by, gone_by: the same shared out among the joints (T-1 or T, n): to the last joint of the
            chain that moves the place, or of the nearest place of the robot.
    """

    motion: Float[Tensor, " S"]
    unexplained: Float[Tensor, " S"]
    changed: Float[Tensor, " S"]
    outside: Float[Tensor, " T"]
    gone: Float[Tensor, " T"]
    behind: Float[Tensor, " S"]
    unexplained_at: Float[Tensor, "S h w"]
    misplaced_at: Float[Tensor, "T h w"]
    unexplained_by: Float[Tensor, "S n"]
    changed_by: Float[Tensor, "S n"]
    outside_by: Float[Tensor, "T n"]
    gone_by: Float[Tensor, "T n"]


def evidence(field: JacobianField | LearnedField, video: Float[Tensor, "T 3 H W"], q: Float[Tensor, "T n"]) -> Evidence:
    """Compare a video with the motion decoded from it.

    Args:
        field: that the motion was decoded with.
        video: RGB in [0, 1].
        q: decoded positions [rad or m].
    """
    height, width = grid_of(*video.shape[-2:])
    jacobian, mask = field.dense(q, height, width, video)
    jacobian, mask = jacobian.to(video), mask.to(video)
    small = F.interpolate(video, (height, width), mode="area")
    robot = mask > _ROBOT
    owner = _owner(jacobian, robot)
    near = _grown(robot, _MARGIN)
    cells = robot.flatten(1).sum(1).to(video)
    size = cells.median().clamp(min=_LEAST_SIZE)
    n = q.shape[-1]

    # Where brightness goes beyond the step.
    step = q.diff(dim=0).to(video)
    ahead = torch.einsum("tcnhw,tn->tchw", jacobian[:-1], step)
    back = torch.einsum("tcnhw,tn->tchw", jacobian[1:], step)
    flow = path(ahead, back, 1)
    carried = carry_back(small[1:], flow)
    error, slope = carried - small[:-1], gradients((small[:-1] + carried) / 2)
    beyond, _ = _beyond(error, slope, robot[:-1], _WINDOW)
    _, unlike = _beyond(error, slope, robot[:-1], 1)
    moved = ahead.square().sum(1) * robot[:-1]

    # What is where, against the background.
    plate, noise, known = _background(small, ~near)
    off = (small - plate).abs().amax(1)
    other = _attached((off > _CHANGED + 3 * noise) & known & ~near, near).to(video)
    same = ((off < _SAME) & known & _shrunk(robot)).to(video)
    change = (small[1:] - small[:-1]).abs().mean(1)
    free = ~(near[1:] | near[:-1])

    def rms(square: Tensor) -> Tensor:
        return (square.flatten(1).sum(1) / cells[:-1].clamp(min=_LEAST_SIZE)).sqrt()

    return Evidence(
        motion=rms(moved), unexplained=rms(beyond), changed=rms(unlike), outside=other.flatten(1).sum(1) / size,
        gone=same.flatten(1).sum(1) / size,
        behind=(change * free).flatten(1).sum(1) / free.flatten(1).sum(1).clamp(min=1),
        unexplained_at=beyond.sqrt(), misplaced_at=other + same,
        unexplained_by=_shared(beyond, owner[:-1], n) / size, changed_by=_shared(unlike, owner[:-1], n) / size,
        outside_by=_shared(other, _spread(owner), n) / size,
        gone_by=_shared(same, owner, n) / size,
    )  # fmt: skip


def grid_of(height: int, width: int) -> tuple[int, int]:
    """Rows and columns on which pictures of that size are compared."""
    scale = min(1.0, _GRID / max(height, width))
    return max(2, round(height * scale)), max(2, round(width * scale))


def _beyond(
    error: Float[Tensor, "S 3 h w"], slope: tuple[Tensor, Tensor], robot: Tensor, window: int
) -> tuple[Float[Tensor, "S h w"], Float[Tensor, "S h w"]]:
    """What the difference of two pictures asks for beyond the step, of each of the robot's cells [cells^2].

    Returns:
        The squared motion that explains it best within a window about the cell (Lucas and Kanade, 1981), and what no
        motion of it explains, as motion along the brightness' slope.
    """
    along_u, along_v = slope

    def about(product: Float[Tensor, "S 3 h w"]) -> Float[Tensor, "S h w"]:
        return F.avg_pool2d((product.mean(1) * robot)[:, None], window, 1, window // 2)[:, 0]

    share = F.avg_pool2d(robot[:, None].to(error), window, 1, window // 2)[:, 0].clamp(min=1 / window**2)
    uu, uv, vv = about(along_u.square()), about(along_u * along_v), about(along_v.square())
    pull_u, pull_v = about(along_u * error), about(along_v * error)
    held_u, held_v = (x + _GRAIN**2 * share for x in (uu, vv))
    determinant = held_u * held_v - uv.square()
    u, v = (held_v * pull_u - uv * pull_v) / determinant, (held_u * pull_v - uv * pull_u) / determinant
    left = about(error.square()) - u * pull_u - v * pull_v - _GRAIN**2 * share
    steep = uu + vv + _GRAIN**2 * share
    most = _FASTEST**2
    return (u.square() + v.square()).clamp(max=most) * robot, (left.clamp(min=0) / steep).clamp(max=most) * robot


def _background(
    small: Float[Tensor, "T 3 h w"], free: Tensor
) -> tuple[Float[Tensor, "3 h w"], Float[Tensor, "h w"], Tensor]:
    """Median colour of each cell while it is free, its usual distance from that, and whether it was free often enough."""
    nothing = torch.full_like(small, torch.nan)
    seen = torch.where(free[:, None], small, nothing)
    plate = seen.nanmedian(0).values
    noise = (seen - plate).abs().nanmedian(0).values.mean(0)
    return plate.nan_to_num(0), noise.nan_to_num(0), free.sum(0) >= _FREE_FRAMES


def _owner(jacobian: Float[Tensor, "T 2 n h w"], robot: Tensor) -> Int[Tensor, "T h w"]:
    """The last joint that moves each cell of the robot; -1 elsewhere and where none does."""
    size = jacobian.square().sum(1)
    moves = (size > (_MOVES**2) * size.amax((1, 2, 3), keepdim=True)) & robot[:, None]
    index = torch.arange(1, size.shape[1] + 1, device=size.device)[:, None, None]
    return (moves * index).amax(1) - 1


def _attached(cells: Tensor, robot: Tensor) -> Tensor:
    """Those cells that hang together with the robot: things may move elsewhere."""
    label, count = ndimage.label(cells.cpu().numpy(), _WITHIN_A_FRAME)
    touched = torch.zeros(count + 1, dtype=torch.bool)
    labels = torch.from_numpy(label).long()
    touched[labels[_grown(robot, 1).cpu()]] = True
    touched[0] = False
    return touched[labels].to(cells.device)


def _spread(owner: Int[Tensor, "T h w"]) -> Int[Tensor, "T h w"]:
    """Every cell's nearest owner of its frame; -1 in frames without a robot."""
    none = (owner < 0).cpu().numpy()
    # Frames are further apart than any two cells of one; where one has no robot, another's would be found.
    nearest = ndimage.distance_transform_edt(none, (4 * _GRID, 1, 1), return_distances=False, return_indices=True)
    found = owner[tuple(torch.from_numpy(i).long().to(owner.device) for i in nearest)]
    return torch.where((owner >= 0).flatten(1).any(1)[:, None, None], found, owner)


def _shared(amount: Float[Tensor, "T h w"], owner: Int[Tensor, "T h w"], n: int) -> Float[Tensor, "T n"]:
    flat = amount.new_zeros(len(amount), n + 1)
    return flat.scatter_add_(1, (owner + 1).flatten(1).long(), amount.flatten(1))[:, 1:]


def _grown(mask: Tensor, cells: int) -> Tensor:
    return F.max_pool2d(mask[:, None].float(), 2 * cells + 1, 1, cells)[:, 0] > 0


def _shrunk(mask: Tensor) -> Tensor:
    return ~_grown(~mask, 1)
