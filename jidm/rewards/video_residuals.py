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

from jidm.estimation.dense_photometric import gradients, symmetric_flow, warp
from jidm.fields.base import JacobianField
from jidm.fields.free import LearnedField

_GRID_SIZE = 96
"""Cells along the picture's longer side on which all is compared: fine enough for a gripper, and quick."""

_MARGIN = 1  # [cells] by which the robot may be off
_WINDOW = 5  # [cells] within which unexplained motion is the same: single cells at edges are noise
_MASK_THRESHOLD = 0.5
_MIN_FREE_FRAMES = 3  # a cell's background is known once it was free so often
_FOREGROUND_THRESHOLD = 0.08  # colour difference from the background, beyond its own noise, that is something else
_BACKGROUND_THRESHOLD = 0.04  # difference that is the background
_NOISE_STD = 0.02  # brightness by which a cell differs from itself a frame later
_MAX_MOTION = 4.0  # [cells] a difference in brightness is never taken for more motion than this
_MIN_ROBOT_SIZE = 10.0  # [cells] a robot that is seen less of counts as so large
_IN_FRAME_CONNECTIVITY = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
_MIN_RELATIVE_MOTION = 0.02  # of what moves a cell most: less does not count as moving it


@dataclass(frozen=True, eq=False)
class VideoResiduals:
    """Of one video: T frames, T - 1 steps, n joints. Shares are of the robot's usual size in the picture.

    Attributes:
        motion: (T-1,) how far the step moves the robot [cells rms].
        unexplained: (T-1,) motion that brightness asks for beyond the step [cells rms].
        appearance_change: (T-1,) change of brightness that no motion brings about, as motion along its slope [cells rms].
        spurious: (T,) share of something that is not background, beside the robot and hanging together with it.
        missing: (T,) share of background where the robot is.
        background_change: (T-1,) mean change of colour where the robot is not.
        unexplained_map: (T-1, h, w) unexplained motion of each cell [cells].
        misplaced_map: (T, h, w) 1 where something is outside or the robot is gone.
        unexplained_by_joint, appearance_change_by_joint, spurious_by_joint, missing_by_joint: the same shared out among the joints (T-1 or T, n): to the last joint of the
            chain that moves the place, or of the nearest place of the robot.
    """

    motion: Float[Tensor, " S"]
    unexplained: Float[Tensor, " S"]
    appearance_change: Float[Tensor, " S"]
    spurious: Float[Tensor, " T"]
    missing: Float[Tensor, " T"]
    background_change: Float[Tensor, " S"]
    unexplained_map: Float[Tensor, "S h w"]
    misplaced_map: Float[Tensor, "T h w"]
    unexplained_by_joint: Float[Tensor, "S n"]
    appearance_change_by_joint: Float[Tensor, "S n"]
    spurious_by_joint: Float[Tensor, "T n"]
    missing_by_joint: Float[Tensor, "T n"]


def video_residuals(
    field: JacobianField | LearnedField, video: Float[Tensor, "T 3 H W"], q: Float[Tensor, "T n"]
) -> VideoResiduals:
    """Compare a video with the motion decoded from it.

    Args:
        field: that the motion was decoded with.
        video: RGB in [0, 1].
        q: decoded positions [rad or m].
    """
    height, width = comparison_grid(*video.shape[-2:])
    jacobian, mask = field.dense(q, height, width, video)
    jacobian, mask = jacobian.to(video), mask.to(video)
    frames = F.interpolate(video, (height, width), mode="area")
    robot = mask > _MASK_THRESHOLD
    last_joint = _last_moving_joint(jacobian, robot)
    near_robot = _dilate(robot, _MARGIN)
    cells = robot.flatten(1).sum(1).to(video)
    size = cells.median().clamp(min=_MIN_ROBOT_SIZE)
    n = q.shape[-1]

    # Where brightness goes beyond the step.
    step = q.diff(dim=0).to(video)
    forward_flow = torch.einsum("tcnhw,tn->tchw", jacobian[:-1], step)
    backward_flow = torch.einsum("tcnhw,tn->tchw", jacobian[1:], step)
    flow = symmetric_flow(forward_flow, backward_flow, 1)
    warped = warp(frames[1:], flow)
    error, slope = warped - frames[:-1], gradients((frames[:-1] + warped) / 2)
    unexplained, _ = _lucas_kanade(error, slope, robot[:-1], _WINDOW)
    _, appearance_change = _lucas_kanade(error, slope, robot[:-1], 1)
    motion = forward_flow.square().sum(1) * robot[:-1]

    # What is where, against the background.
    background, noise, known = _background(frames, ~near_robot)
    difference = (frames - background).abs().amax(1)
    spurious = _connected_to_robot(
        (difference > _FOREGROUND_THRESHOLD + 3 * noise) & known & ~near_robot, near_robot
    ).to(video)
    missing = ((difference < _BACKGROUND_THRESHOLD) & known & _erode(robot)).to(video)
    change = (frames[1:] - frames[:-1]).abs().mean(1)
    free = ~(near_robot[1:] | near_robot[:-1])

    def rms(square: Tensor) -> Tensor:
        return (square.flatten(1).sum(1) / cells[:-1].clamp(min=_MIN_ROBOT_SIZE)).sqrt()

    return VideoResiduals(
        motion=rms(motion), unexplained=rms(unexplained), appearance_change=rms(appearance_change), spurious=spurious.flatten(1).sum(1) / size,
        missing=missing.flatten(1).sum(1) / size,
        background_change=(change * free).flatten(1).sum(1) / free.flatten(1).sum(1).clamp(min=1),
        unexplained_map=unexplained.sqrt(), misplaced_map=spurious + missing,
        unexplained_by_joint=_sum_by_joint(unexplained, last_joint[:-1], n) / size, appearance_change_by_joint=_sum_by_joint(appearance_change, last_joint[:-1], n) / size,
        spurious_by_joint=_sum_by_joint(spurious, _fill_nearest(last_joint), n) / size,
        missing_by_joint=_sum_by_joint(missing, last_joint, n) / size,
    )  # fmt: skip


def comparison_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns on which pictures of that size are compared."""
    scale = min(1.0, _GRID_SIZE / max(height, width))
    return max(2, round(height * scale)), max(2, round(width * scale))


def _lucas_kanade(
    error: Float[Tensor, "S 3 h w"], slope: tuple[Tensor, Tensor], robot: Tensor, window: int
) -> tuple[Float[Tensor, "S h w"], Float[Tensor, "S h w"]]:
    """What the difference of two pictures asks for beyond the step, of each of the robot's cells [cells^2].

    Returns:
        The squared motion that explains it best within a window about the cell (Lucas and Kanade, 1981), and what no
        motion of it explains, as motion along the brightness' slope.
    """
    along_u, along_v = slope

    def window_mean(product: Float[Tensor, "S 3 h w"]) -> Float[Tensor, "S h w"]:
        return F.avg_pool2d((product.mean(1) * robot)[:, None], window, 1, window // 2)[:, 0]

    share = F.avg_pool2d(robot[:, None].to(error), window, 1, window // 2)[:, 0].clamp(min=1 / window**2)
    uu, uv, vv = window_mean(along_u.square()), window_mean(along_u * along_v), window_mean(along_v.square())
    pull_u, pull_v = window_mean(along_u * error), window_mean(along_v * error)
    damped_uu, damped_vv = (x + _NOISE_STD**2 * share for x in (uu, vv))
    determinant = damped_uu * damped_vv - uv.square()
    u, v = (damped_vv * pull_u - uv * pull_v) / determinant, (damped_uu * pull_v - uv * pull_u) / determinant
    remaining = window_mean(error.square()) - u * pull_u - v * pull_v - _NOISE_STD**2 * share
    steep = uu + vv + _NOISE_STD**2 * share
    max_squared = _MAX_MOTION**2
    return (u.square() + v.square()).clamp(max=max_squared) * robot, (remaining.clamp(min=0) / steep).clamp(
        max=max_squared
    ) * robot


def _background(
    frames: Float[Tensor, "T 3 h w"], free: Tensor
) -> tuple[Float[Tensor, "3 h w"], Float[Tensor, "h w"], Tensor]:
    """Median colour of each cell while it is free, its usual distance from that, and whether it was free often enough."""
    nothing = torch.full_like(frames, torch.nan)
    seen = torch.where(free[:, None], frames, nothing)
    median = seen.nanmedian(0).values
    noise = (seen - median).abs().nanmedian(0).values.mean(0)
    return median.nan_to_num(0), noise.nan_to_num(0), free.sum(0) >= _MIN_FREE_FRAMES


def _last_moving_joint(jacobian: Float[Tensor, "T 2 n h w"], robot: Tensor) -> Int[Tensor, "T h w"]:
    """The last joint that moves each cell of the robot; -1 elsewhere and where none does."""
    size = jacobian.square().sum(1)
    moves = (size > (_MIN_RELATIVE_MOTION**2) * size.amax((1, 2, 3), keepdim=True)) & robot[:, None]
    index = torch.arange(1, size.shape[1] + 1, device=size.device)[:, None, None]
    return (moves * index).amax(1) - 1


def _connected_to_robot(cells: Tensor, robot: Tensor) -> Tensor:
    """Those cells that hang together with the robot: things may move elsewhere."""
    label, count = ndimage.label(cells.cpu().numpy(), _IN_FRAME_CONNECTIVITY)
    touched = torch.zeros(count + 1, dtype=torch.bool)
    labels = torch.from_numpy(label).long()
    touched[labels[_dilate(robot, 1).cpu()]] = True
    touched[0] = False
    return touched[labels].to(cells.device)


def _fill_nearest(last_joint: Int[Tensor, "T h w"]) -> Int[Tensor, "T h w"]:
    """Every cell's nearest owner of its frame; -1 in frames without a robot."""
    none = (last_joint < 0).cpu().numpy()
    # Frames are further apart than any two cells of one; where one has no robot, another's would be found.
    nearest = ndimage.distance_transform_edt(none, (4 * _GRID_SIZE, 1, 1), return_distances=False, return_indices=True)
    found = last_joint[tuple(torch.from_numpy(i).long().to(last_joint.device) for i in nearest)]
    return torch.where((last_joint >= 0).flatten(1).any(1)[:, None, None], found, last_joint)


def _sum_by_joint(amount: Float[Tensor, "T h w"], last_joint: Int[Tensor, "T h w"], n: int) -> Float[Tensor, "T n"]:
    flat = amount.new_zeros(len(amount), n + 1)
    return flat.scatter_add_(1, (last_joint + 1).flatten(1).long(), amount.flatten(1))[:, 1:]


def _dilate(mask: Tensor, cells: int) -> Tensor:
    return F.max_pool2d(mask[:, None].float(), 2 * cells + 1, 1, cells)[:, 0] > 0


def _erode(mask: Tensor) -> Tensor:
    return ~_dilate(~mask, 1)
