"""A Jacobian field as a forward model: the frame after joint steps, by forward warping and inpainting.

The robot's pixels are moved by exact kinematics where the field has geometry, else by `jacobian @ delta_q` in short substeps,
and splatted over the rest of the frame; the pixels that they vacate are inpainted (Telea 2004). Shadows, objects in the robot's
hand and surfaces that come into view are not modeled, so it is a prediction for a fraction of a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.errors import InputError
from jidm.fields.analytic import AnalyticField
from jidm.fields.base import JacobianField
from jidm.fields.free import LearnedField
from jidm.video.letterbox import Letterbox
from jidm.video.warping import dilate

_ROBOT_THRESHOLD = 0.5  # robot probability of the pixels that are moved
_DEPTH_TOLERANCE = 0.02  # [m] a pixel that is further behind another one is hidden
_MAX_SUBSTEP = 4.0  # [px] longer motions are split
_DILATION_RADIUS = 2  # [px]
_MIN_COVERAGE = 0.3  # fraction of a pixel that splats must cover to be drawn
_INPAINT_RADIUS = 3.0  # [px]


def warp_frame(
    field: JacobianField | LearnedField, frame: Float[Tensor, "3 H W"], q: Float[Tensor, " n"],
    steps: Tensor,
) -> Float[Tensor, "3 H W"]:  # fmt: skip
    """The frame after joint steps.

    Args:
        field: of the robot in this camera.
        frame: RGB in [0, 1].
        q: joint positions in the frame [rad or m].
        steps: (k, n) successive joint steps, short ones as between frames of a video [rad or m].

    Raises:
        InputError: an argument is not finite, or steps has another shape.
    """
    if not (frame.isfinite().all() and q.isfinite().all() and steps.isfinite().all()):
        raise InputError("frame, q and steps must be finite")
    if steps.dim() != 2 or steps.shape[1:] != q.shape:
        raise InputError(f"steps must be (k, {len(q)}), got {tuple(steps.shape)}")
    if not bool(steps.any()):
        return frame
    if isinstance(field, AnalyticField):
        return _warp_by_geometry(field, frame, q, q + steps.sum(0))
    return _warp_by_jacobian(field, frame, q, steps)


def _warp_by_geometry(
    field: AnalyticField, frame: Float[Tensor, "3 H W"], q: Float[Tensor, " n"], q_next: Float[Tensor, " n"]
) -> Float[Tensor, "3 H W"]:
    height, width = frame.shape[-2:]
    number, surface_points = field.visible_surface(q, height, width)
    robot = number >= 0
    uv, depth = field.project_surface(q_next, surface_points, height, width)
    row, column = torch.nonzero(robot, as_tuple=True)
    u, v = uv[number[robot]].to(frame).unbind(-1)
    return _PixelSplats(row, column, u, v, depth[number[robot]].to(frame)).render(frame)


def _warp_by_jacobian(
    field: JacobianField | LearnedField,
    frame: Float[Tensor, "3 H W"],
    q: Float[Tensor, " n"],
    steps: Float[Tensor, "k n"],
) -> Float[Tensor, "3 H W"]:
    """Warp in short substeps, with the Jacobian of the image that was rendered so far."""
    image, points = frame, None
    for step in steps:
        flow, robot = _dense_flow(field, image, q, step)
        longest = float(flow[:, robot].abs().amax()) if bool(robot.any()) else 0.0
        substeps = max(1, math.ceil(longest / _MAX_SUBSTEP))
        for substep in range(substeps):
            if substep:
                flow, robot = _dense_flow(field, image, q, step)
            if points is None:
                points = _PixelSplats.from_mask(frame, robot)
            points = points.advect(flow / substeps)
            image = points.render(frame)
            q = q + step / substeps
    return image


@dataclass(frozen=True, eq=False)
class _PixelSplats:
    """The robot's N pixels: their row and column in the frame, present position (u, v) [px], and depth [m] if known."""

    row: Tensor
    column: Tensor
    u: Tensor
    v: Tensor
    depth: Tensor | None = None

    @classmethod
    def from_mask(cls, frame: Float[Tensor, "3 H W"], robot: Tensor) -> _PixelSplats:
        row, column = torch.nonzero(robot, as_tuple=True)
        return cls(row, column, column.to(frame), row.to(frame))

    def advect(self, flow: Float[Tensor, "2 H W"]) -> _PixelSplats:
        """Moved by the flow at their positions [px]."""
        height, width = flow.shape[-2:]
        grid = torch.stack([(2 * self.u + 1) / width - 1, (2 * self.v + 1) / height - 1], -1)[None, None]
        displacement = torch.nn.functional.grid_sample(
            flow[None].to(grid), grid, padding_mode="border", align_corners=False
        )[0, :, 0]
        return replace(self, u=self.u + displacement[0], v=self.v + displacement[1])

    def _visible(self, height: int, width: int) -> Bool[Tensor, " N"]:
        """Which of them are not hidden by others."""
        if self.depth is None:
            return torch.ones_like(self.u, dtype=torch.bool)
        column, row = self.u.round().clamp(0, width - 1), self.v.round().clamp(0, height - 1)
        index = (row * width + column).long()
        nearest = torch.full((height * width,), math.inf).to(self.depth)
        nearest.scatter_reduce_(0, index, self.depth, "amin")
        return self.depth < nearest[index] + _DEPTH_TOLERANCE

    def render(self, frame: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
        """Splat them bilinearly over the frame, and inpaint the pixels that they have vacated."""
        height, width = frame.shape[-2:]
        color = frame[:, self.row, self.column]
        total, visible = torch.zeros(4, height * width).to(frame), self._visible(height, width)
        for du in (0, 1):
            for dv in (0, 1):
                column, row = self.u.floor() + du, self.v.floor() + dv
                weight = ((1 - (self.u - column).abs()) * (1 - (self.v - row).abs())).clamp(min=0)
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & visible
                index = (row * width + column).long()[inside]
                total.index_add_(1, index, torch.cat([color * weight, weight[None]])[:, inside])
        total = total.reshape(4, height, width)
        covered = total[3] > _MIN_COVERAGE
        vacated = torch.zeros_like(covered)
        vacated[self.row, self.column] = True
        composite = torch.where(covered, total[:3] / total[3].clamp(min=_MIN_COVERAGE), frame).clamp(0, 1)
        # Boundary pixels of the robot have mixed colors, so the vacated area is dilated; gaps are pixels that moved apart.
        gaps = ~dilate(~dilate(covered, _DILATION_RADIUS), _DILATION_RADIUS)
        return _inpaint(composite, (dilate(vacated & ~covered, _DILATION_RADIUS) | gaps) & ~covered)


def _dense_flow(
    field: JacobianField | LearnedField,
    frame: Float[Tensor, "3 H W"],
    q: Float[Tensor, " n"],
    step: Float[Tensor, " n"],
) -> tuple[Float[Tensor, "2 H W"], Bool[Tensor, "H W"]]:
    """Flow of every pixel of the frame [px], and the robot mask."""
    height, width = frame.shape[-2:]
    letterbox = Letterbox(height, width, height, width)
    if isinstance(field, LearnedField):
        letterbox = Letterbox(height, width, *field.config.input_size)
    jacobian, mask = field.dense(q, letterbox.height, letterbox.width, letterbox.apply(frame[None])[0])
    flow = torch.einsum("cnhw,n->chw", jacobian, step.to(jacobian))
    both = torch.cat([flow, mask[None].to(flow)])
    inner = both[
        :,
        letterbox.top : letterbox.top + letterbox.inner_height,
        letterbox.left : letterbox.left + letterbox.inner_width,
    ]
    full = torch.nn.functional.interpolate(inner[None], (height, width), mode="bilinear", align_corners=False)[0]
    scale = full.new_tensor([letterbox.scale_u, letterbox.scale_v])[:, None, None]
    return full[:2] / scale, full[2] > _ROBOT_THRESHOLD


def _inpaint(frame: Float[Tensor, "3 H W"], hole: Tensor) -> Float[Tensor, "3 H W"]:
    """Inpaint the pixels of a mask (Telea 2004)."""
    if not bool(hole.any()):
        return frame
    import cv2

    pixels = (frame.detach().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    filled = cv2.inpaint(
        np.ascontiguousarray(pixels), hole.cpu().to(torch.uint8).numpy(), _INPAINT_RADIUS, cv2.INPAINT_TELEA
    )
    return torch.where(hole, torch.from_numpy(filled).permute(2, 0, 1).to(frame) / 255, frame)
