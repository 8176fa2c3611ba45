"""Residuals between a video and its decoded motion, frame by frame; all image terms of the reward use them.

The field at the decoded pose predicts where the robot is and how each step moves it. The residuals are what the video shows
beyond that: foreground beside the robot, background on the robot, image motion beyond the step, and changes of the
background. The camera is assumed to be static.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from jidm.fields.base import JacobianField
from jidm.fields.free import LearnedField
from jidm.video.warping import dilate, gradients, symmetric_flow, warp

_GRID_SIZE = 96
"""Cells along the longer side of the comparison grid: fine enough for a gripper, and fast."""

_MARGIN = 1  # [cells] tolerance of the robot's mask
_WINDOW = 5  # [cells] window of constant unexplained motion; single cells at edges are noise
_MASK_THRESHOLD = 0.5
_MIN_FREE_FRAMES = 3  # frames without robot after which the background of a cell is known
_FOREGROUND_THRESHOLD = 0.08  # color difference from the background, beyond its noise, that is foreground
_BACKGROUND_THRESHOLD = 0.04  # smaller differences are background
_NOISE_STD = 0.02  # brightness noise of a cell between frames
_MAX_MOTION = 4.0  # [cells] upper bound of the motion estimated from a brightness difference
_MIN_ROBOT_SIZE = 10.0  # [cells] lower bound of the robot's visible size
_IN_FRAME_CONNECTIVITY = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
_MIN_RELATIVE_MOTION = 0.02  # of a frame's largest motion: a joint that moves a cell less does not move it


@dataclass(frozen=True, eq=False)
class VideoResiduals:
    """Residuals of one video: T frames, T - 1 steps, n joints. Areas are relative to the median visible size of the robot.

    Attributes:
        motion: (T-1,) image motion of the robot by the decoded step [cells rms].
        unexplained: (T-1,) image motion beyond the decoded step [cells rms].
        appearance_change: (T-1,) brightness change that no motion explains, divided by the image gradient [cells rms].
        spurious: (T,) area of foreground beside the robot and connected to it.
        missing: (T,) area of background on the robot.
        background_change: (T-1,) mean color change away from the robot.
        unexplained_map: (T-1, h, w) unexplained motion of each cell [cells].
        misplaced_map: (T, h, w) 1 where a cell is spurious or missing.
        unexplained_by_joint, appearance_change_by_joint, spurious_by_joint, missing_by_joint: (T-1 or T, n) attribution to
            the joints. Each cell belongs to the last joint of the chain that moves it, or that of the nearest robot cell.
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
        field: the field of the decoder.
        video: RGB in [0, 1].
        q: decoded positions [rad or m].
    """
    height, width = comparison_grid(*video.shape[-2:])
    jacobian, mask = field.dense(q, height, width, video)
    jacobian, mask = jacobian.to(video), mask.to(video)
    frames = F.interpolate(video, (height, width), mode="area")
    robot = mask > _MASK_THRESHOLD
    last_joint = _last_moving_joint(jacobian, robot)
    near_robot = dilate(robot, _MARGIN)
    cells = robot.flatten(1).sum(1).to(video)
    size = cells.median().clamp(min=_MIN_ROBOT_SIZE)
    n = q.shape[-1]

    # Image motion beyond the decoded step.
    step = q.diff(dim=0).to(video)
    forward_flow = torch.einsum("tcnhw,tn->tchw", jacobian[:-1], step)
    backward_flow = torch.einsum("tcnhw,tn->tchw", jacobian[1:], step)
    flow = symmetric_flow(forward_flow, backward_flow, 1)
    warped = warp(frames[1:], flow)
    error, image_gradient = warped - frames[:-1], gradients((frames[:-1] + warped) / 2)
    unexplained, _ = _lucas_kanade(error, image_gradient, robot[:-1], _WINDOW)
    _, appearance_change = _lucas_kanade(error, image_gradient, robot[:-1], 1)
    motion = forward_flow.square().sum(1) * robot[:-1]

    # Foreground and background.
    background, noise, known = _background(frames, ~near_robot)
    difference = (frames - background).abs().amax(1)
    spurious = _connected_to_robot(
        (difference > _FOREGROUND_THRESHOLD + 3 * noise) & known & ~near_robot, near_robot
    ).to(video)
    missing = ((difference < _BACKGROUND_THRESHOLD) & known & ~dilate(~robot, 1)).to(video)
    change = (frames[1:] - frames[:-1]).abs().mean(1)
    free = ~(near_robot[1:] | near_robot[:-1])

    def rms(square: Tensor) -> Tensor:
        return (square.flatten(1).sum(1) / cells[:-1].clamp(min=_MIN_ROBOT_SIZE)).sqrt()

    return VideoResiduals(
        motion=rms(motion),
        unexplained=rms(unexplained),
        appearance_change=rms(appearance_change),
        spurious=spurious.flatten(1).sum(1) / size,
        missing=missing.flatten(1).sum(1) / size,
        background_change=(change * free).flatten(1).sum(1) / free.flatten(1).sum(1).clamp(min=1),
        unexplained_map=unexplained.sqrt(),
        misplaced_map=spurious + missing,
        unexplained_by_joint=_sum_by_joint(unexplained, last_joint[:-1], n) / size,
        appearance_change_by_joint=_sum_by_joint(appearance_change, last_joint[:-1], n) / size,
        spurious_by_joint=_sum_by_joint(spurious, _fill_nearest(last_joint), n) / size,
        missing_by_joint=_sum_by_joint(missing, last_joint, n) / size,
    )


def comparison_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the comparison grid for images of this size."""
    scale = min(1.0, _GRID_SIZE / max(height, width))
    return max(2, round(height * scale)), max(2, round(width * scale))


def _lucas_kanade(
    error: Float[Tensor, "S 3 h w"], image_gradient: tuple[Tensor, Tensor], robot: Tensor, window: int
) -> tuple[Float[Tensor, "S h w"], Float[Tensor, "S h w"]]:
    """Lucas-Kanade motion (1981) in a window around each robot cell, from the difference of two images.

    Returns:
        The squared motion of least squares [cells^2], and the remaining squared difference divided by the squared image
        gradient [cells^2].
    """
    gradient_u, gradient_v = image_gradient

    def window_mean(product: Float[Tensor, "S 3 h w"]) -> Float[Tensor, "S h w"]:
        return F.avg_pool2d((product.mean(1) * robot)[:, None], window, 1, window // 2)[:, 0]

    robot_fraction = F.avg_pool2d(robot[:, None].to(error), window, 1, window // 2)[:, 0].clamp(min=1 / window**2)
    uu, uv, vv = (
        window_mean(gradient_u.square()),
        window_mean(gradient_u * gradient_v),
        window_mean(gradient_v.square()),
    )
    rhs_u, rhs_v = window_mean(gradient_u * error), window_mean(gradient_v * error)
    damped_uu, damped_vv = (x + _NOISE_STD**2 * robot_fraction for x in (uu, vv))
    determinant = damped_uu * damped_vv - uv.square()
    u, v = (damped_vv * rhs_u - uv * rhs_v) / determinant, (damped_uu * rhs_v - uv * rhs_u) / determinant
    remaining = window_mean(error.square()) - u * rhs_u - v * rhs_v - _NOISE_STD**2 * robot_fraction
    gradient_energy = uu + vv + _NOISE_STD**2 * robot_fraction
    squares = u.square() + v.square(), remaining.clamp(min=0) / gradient_energy
    squared_motion, squared_rest = (x.clamp(max=_MAX_MOTION**2) * robot for x in squares)
    return squared_motion, squared_rest


def _background(
    frames: Float[Tensor, "T 3 h w"], free: Tensor
) -> tuple[Float[Tensor, "3 h w"], Float[Tensor, "h w"], Tensor]:
    """Median color of each cell in frames without robot, its median deviation, and whether there were enough frames."""
    free_frames = torch.where(free[:, None], frames, torch.full_like(frames, torch.nan))
    median = free_frames.nanmedian(0).values
    noise = (free_frames - median).abs().nanmedian(0).values.mean(0)
    return median.nan_to_num(0), noise.nan_to_num(0), free.sum(0) >= _MIN_FREE_FRAMES


def _last_moving_joint(jacobian: Float[Tensor, "T 2 n h w"], robot: Tensor) -> Int[Tensor, "T h w"]:
    """Index of the last joint that moves each robot cell; -1 elsewhere and where none does."""
    size = jacobian.square().sum(1)
    moves = (size > (_MIN_RELATIVE_MOTION**2) * size.amax((1, 2, 3), keepdim=True)) & robot[:, None]
    index = torch.arange(1, size.shape[1] + 1, device=size.device)[:, None, None]
    return (moves * index).amax(1) - 1


def _connected_to_robot(cells: Tensor, robot: Tensor) -> Tensor:
    """The cells connected to the robot; objects elsewhere may move."""
    components, count = ndimage.label(cells.cpu().numpy(), _IN_FRAME_CONNECTIVITY)
    labels = torch.from_numpy(components).long()
    connected = torch.zeros(count + 1, dtype=torch.bool)
    connected[labels[dilate(robot, 1).cpu()]] = True
    connected[0] = False
    return connected[labels].to(cells.device)


def _fill_nearest(last_joint: Int[Tensor, "T h w"]) -> Int[Tensor, "T h w"]:
    """Value of the nearest robot cell in the same frame; -1 in frames without robot."""
    unknown = (last_joint < 0).cpu().numpy()
    # Frames are spaced wider than any two cells of one frame; a frame without robot would get another frame's, so it keeps -1.
    spacing = (4 * _GRID_SIZE, 1, 1)
    nearest = ndimage.distance_transform_edt(unknown, spacing, return_distances=False, return_indices=True)
    filled = last_joint[tuple(torch.from_numpy(i).long().to(last_joint.device) for i in nearest)]
    return torch.where((last_joint >= 0).flatten(1).any(1)[:, None, None], filled, last_joint)


def _sum_by_joint(amount: Float[Tensor, "T h w"], last_joint: Int[Tensor, "T h w"], n: int) -> Float[Tensor, "T n"]:
    sums = amount.new_zeros(len(amount), n + 1)
    return sums.scatter_add_(1, (last_joint + 1).flatten(1).long(), amount.flatten(1))[:, 1:]
