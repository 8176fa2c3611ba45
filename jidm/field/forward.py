"""The field as a forward model: what a frame will look like once the joints have moved.

The robot's pixels are carried along, by exact kinematics where the field knows the robot's shape, else by
`jacobian @ delta_q` in short parts, and laid over the rest of the picture; what the robot leaves free is filled in from its
surroundings (Telea 2004). It knows nothing of shadows, of what the robot carries, nor of what was hidden: a guess at pixels,
good for a fraction of a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.errors import InputError
from jidm.field.analytic import AnalyticField
from jidm.field.base import JacobianField
from jidm.field.learned import LearnedField
from jidm.motion.fit import Fit

_ROBOT = 0.5  # probability from which a pixel counts as the robot's
_BEHIND = 0.02  # [m] what is further behind something else is hidden
_FAR = 4.0  # [px] a longer motion is taken in parts
_RIM = 2  # [px]
_COVERED = 0.3  # share of a pixel that carried ones must cover to be seen there
_AROUND = 3.0  # [px] how far around a hole its filling is taken from


def carried(
    field: JacobianField | LearnedField, frame: Float[Tensor, "3 H W"], q: Float[Tensor, " n"],
    steps: Tensor,
) -> Float[Tensor, "3 H W"]:  # fmt: skip
    """The frame after these steps.

    Args:
        field: of the robot in this camera.
        frame: RGB in [0, 1].
        q: joint positions it shows [rad or m].
        steps: (k, n) of the joints, one after the other [rad or m]; short ones, as between frames of a video.

    Raises:
        InputError: something is not finite or has another shape.
    """
    if not (frame.isfinite().all() and q.isfinite().all() and steps.isfinite().all()):
        raise InputError("frame, q and steps must be finite")
    if steps.dim() != 2 or steps.shape[1:] != q.shape:
        raise InputError(f"steps must be (k, {len(q)}), got {tuple(steps.shape)}")
    if not bool(steps.any()):
        return frame
    if isinstance(field, AnalyticField):
        return _by_geometry(field, frame, q, q + steps.sum(0))
    return _by_jacobian(field, frame, q, steps)


def _by_geometry(
    field: AnalyticField, frame: Float[Tensor, "3 H W"], q: Float[Tensor, " n"], after: Float[Tensor, " n"]
) -> Float[Tensor, "3 H W"]:
    height, width = frame.shape[-2:]
    number, skin = field.pixels(q, height, width)
    robot = number >= 0
    uv, depth = field.seen_from(after, skin, height, width)
    row, column = torch.nonzero(robot, as_tuple=True)
    u, v = uv[number[robot]].to(frame).unbind(-1)
    return _Points(row, column, u, v, depth[number[robot]].to(frame)).drawn(frame)


def _by_jacobian(
    field: JacobianField | LearnedField,
    frame: Float[Tensor, "3 H W"],
    q: Float[Tensor, " n"],
    steps: Float[Tensor, "k n"],
) -> Float[Tensor, "3 H W"]:
    """In so many parts that none of them is long: the Jacobian changes on the way. It is read off what was drawn so far."""
    picture, points = frame, None
    for step in steps:
        flow, robot = _motion(field, picture, q, step)
        longest = float(flow[:, robot].abs().amax()) if bool(robot.any()) else 0.0
        parts = max(1, math.ceil(longest / _FAR))
        for part in range(parts):
            if part:
                flow, robot = _motion(field, picture, q, step)
            if points is None:
                points = _Points.on(frame, robot)
            points = points.moved(flow / parts)
            picture = points.drawn(frame)
            q = q + step / parts
    return picture


@dataclass(frozen=True, eq=False)
class _Points:
    """The robot's pixels: where they were (N,), where they are now [px], and how far from the camera [m] if that is known."""

    row: Tensor
    column: Tensor
    u: Tensor
    v: Tensor
    depth: Tensor | None = None

    @classmethod
    def on(cls, frame: Float[Tensor, "3 H W"], robot: Tensor) -> _Points:
        row, column = torch.nonzero(robot, as_tuple=True)
        return cls(row, column, column.to(frame), row.to(frame))

    def moved(self, flow: Float[Tensor, "2 H W"]) -> _Points:
        """As the flow at their places takes them."""
        height, width = flow.shape[-2:]
        at = torch.stack([(2 * self.u + 1) / width - 1, (2 * self.v + 1) / height - 1], -1)[None, None]
        by = torch.nn.functional.grid_sample(flow[None].to(at), at, padding_mode="border", align_corners=False)[0, :, 0]
        return replace(self, u=self.u + by[0], v=self.v + by[1])

    def _in_front(self, height: int, width: int) -> Bool[Tensor, " N"]:
        """Which of them no other one hides."""
        if self.depth is None:
            return torch.ones_like(self.u, dtype=torch.bool)
        column, row = self.u.round().clamp(0, width - 1), self.v.round().clamp(0, height - 1)
        index = (row * width + column).long()
        nearest = torch.full((height * width,), math.inf).to(self.depth)
        nearest.scatter_reduce_(0, index, self.depth, "amin")
        return self.depth < nearest[index] + _BEHIND

    def drawn(self, frame: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
        """They at their places, over the frame without them; each is shared out among the four pixels around it."""
        height, width = frame.shape[-2:]
        colour = frame[:, self.row, self.column]
        total, seen = torch.zeros(4, height * width).to(frame), self._in_front(height, width)
        for du in (0, 1):
            for dv in (0, 1):
                column, row = self.u.floor() + du, self.v.floor() + dv
                share = ((1 - (self.u - column).abs()) * (1 - (self.v - row).abs())).clamp(min=0)
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & seen
                index = (row * width + column).long()[inside]
                total.index_add_(1, index, torch.cat([colour * share, share[None]])[:, inside])
        total = total.reshape(4, height, width)
        covered = total[3] > _COVERED
        left = torch.zeros_like(covered)
        left[self.row, self.column] = True
        over = torch.where(covered, total[:3] / total[3].clamp(min=_COVERED), frame).clamp(0, 1)
        # The rim of where it was is mixed with its colours; gaps in it now are pixels that moved apart.
        gaps = ~_grown(~_grown(covered, _RIM), _RIM)
        return _without(over, (_grown(left & ~covered, _RIM) | gaps) & ~covered)


def _motion(
    field: JacobianField | LearnedField,
    frame: Float[Tensor, "3 H W"],
    q: Float[Tensor, " n"],
    step: Float[Tensor, " n"],
) -> tuple[Float[Tensor, "2 H W"], Bool[Tensor, "H W"]]:
    """Motion of every pixel of the frame [px], and whether it shows the robot."""
    height, width = frame.shape[-2:]
    fit = Fit(height, width, height, width)
    if isinstance(field, LearnedField):
        fit = Fit(height, width, *field.config.picture)
    jacobian, mask = field.dense(q, fit.height, fit.width, fit.frames(frame[None])[0])
    flow = torch.einsum("cnhw,n->chw", jacobian, step.to(jacobian))
    both = torch.cat([flow, mask[None].to(flow)])
    inner = both[:, fit.top : fit.top + fit.inner_height, fit.left : fit.left + fit.inner_width]
    full = torch.nn.functional.interpolate(inner[None], (height, width), mode="bilinear", align_corners=False)[0]
    unit = full.new_tensor([fit.scale_u, fit.scale_v])[:, None, None]
    return full[:2] / unit, full[2] > _ROBOT


def _grown(area: Bool[Tensor, "H W"], by: int) -> Bool[Tensor, "H W"]:
    """With everything within so many pixels."""
    return torch.nn.functional.max_pool2d(area[None].float(), 2 * by + 1, stride=1, padding=by)[0] > 0


def _without(frame: Float[Tensor, "3 H W"], hole: Tensor) -> Float[Tensor, "3 H W"]:
    """The frame with a hole filled in from around it."""
    if not bool(hole.any()):
        return frame
    import cv2

    pixels = (frame.detach().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    filled = cv2.inpaint(np.ascontiguousarray(pixels), hole.cpu().to(torch.uint8).numpy(), _AROUND, cv2.INPAINT_TELEA)
    return torch.where(hole, torch.from_numpy(filled).permute(2, 0, 1).to(frame) / 255, frame)
