"""The field as a forward model: what a frame will look like once the joints have moved.

Pixels of the robot are carried by `jacobian @ delta_q`, step by step, each at the pose the last one led to, and laid over the
rest of the picture; what the robot leaves free is filled in from its surroundings (Telea 2004). It knows nothing of shadows,
of what the robot carries, nor of what was hidden: a guess at pixels, good for a fraction of a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError
from jidm.field.base import JacobianField
from jidm.field.learned import LearnedField
from jidm.motion.fit import Fit

_ROBOT = 0.5  # probability from which a pixel counts as the robot's
_FAR = 4.0  # [px] a longer motion is taken in parts
_COVERED = 0.3  # share of a pixel that carried ones must cover to be seen there
_AROUND = 3.0  # [px] how far around a hole its filling is taken from


def carried(
    field: JacobianField | LearnedField, frame: Float[Tensor, "3 H W"], q: Float[Tensor, " n"],
    steps: Float[Tensor, "k n"],
) -> Float[Tensor, "3 H W"]:  # fmt: skip
    """The frame after these steps.

    Args:
        field: of the robot in this camera.
        frame: RGB in [0, 1].
        q: joint positions it shows [rad or m].
        steps: of the joints, one after the other [rad or m]; short ones, as between frames of a video.

    Raises:
        InputError: something is not finite or has another shape.
    """
    if not (frame.isfinite().all() and q.isfinite().all() and steps.isfinite().all()):
        raise InputError("frame, q and steps must be finite")
    if steps.dim() != 2 or steps.shape[1:] != q.shape:
        raise InputError(f"steps must be (k, {len(q)}), got {tuple(steps.shape)}")
    picture, points = frame, None
    for step in steps:
        if bool(step.any()):
            picture, points, q = _after(field, frame, picture, points, q, step)
    return picture


def _after(
    field: JacobianField | LearnedField, frame: Float[Tensor, "3 H W"], picture: Float[Tensor, "3 H W"],
    points: _Points | None, q: Float[Tensor, " n"], step: Float[Tensor, " n"],
) -> tuple[Float[Tensor, "3 H W"], _Points, Float[Tensor, " n"]]:  # fmt: skip
    """The picture after one step, in so many parts that none of them is long: J changes on the way."""
    parts = done = 1
    while done <= parts:
        flow, mask = _motion(field, picture, q, step / parts)
        if done == 1 and parts == 1:
            parts = max(1, math.ceil(float(flow[:, mask > _ROBOT].abs().amax().nan_to_num()) / _FAR)) if bool((mask > _ROBOT).any()) else 1
            flow = flow / parts
        if points is None:
            points = _Points.of(frame, mask > _ROBOT)
        points = points.moved(flow)
        picture = points.drawn(frame)
        q = q + step / parts
        done += 1
    assert points is not None
    return picture, points, q


@dataclass(frozen=True, eq=False)
class _Points:
    """The robot's pixels: where they were (N,), and where they are now [px]."""

    row: Tensor
    column: Tensor
    u: Tensor
    v: Tensor

    @classmethod
    def of(cls, frame: Float[Tensor, "3 H W"], robot: Tensor) -> _Points:
        row, column = torch.nonzero(robot, as_tuple=True)
        return cls(row, column, column.to(frame), row.to(frame))

    def moved(self, flow: Float[Tensor, "2 H W"]) -> _Points:
        """As the flow at their places takes them."""
        height, width = flow.shape[-2:]
        at = torch.stack([(2 * self.u + 1) / width - 1, (2 * self.v + 1) / height - 1], -1)[None, None]
        by = torch.nn.functional.grid_sample(flow[None].to(at), at, padding_mode="border", align_corners=False)[0, :, 0]
        return replace(self, u=self.u + by[0], v=self.v + by[1])

    def drawn(self, frame: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
        """They at their places, over the frame without them; each is shared out among the four pixels around it."""
        height, width = frame.shape[-2:]
        colour = frame[:, self.row, self.column]
        total = torch.zeros(4, height * width).to(frame)
        for du in (0, 1):
            for dv in (0, 1):
                column, row = self.u.floor() + du, self.v.floor() + dv
                share = ((1 - (self.u - column).abs()) * (1 - (self.v - row).abs())).clamp(min=0)
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                index = (row * width + column).long()[inside]
                total.index_add_(1, index, torch.cat([colour * share, share[None]])[:, inside])
        total = total.reshape(4, height, width)
        covered = total[3] > _COVERED
        left = torch.zeros_like(covered)
        left[self.row, self.column] = True
        over = torch.where(covered, total[:3] / total[3].clamp(min=_COVERED), frame).clamp(0, 1)
        return _without(over, left & ~covered)


def _motion(
    field: JacobianField | LearnedField, frame: Float[Tensor, "3 H W"], q: Float[Tensor, " n"], step: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "2 H W"], Float[Tensor, "H W"]]:
    """Motion of every pixel of the frame [px], and how likely it shows the robot."""
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
    return full[:2] / unit, full[2]


def _without(frame: Float[Tensor, "3 H W"], hole: Tensor) -> Float[Tensor, "3 H W"]:
    """The frame with a hole filled in from around it."""
    if not bool(hole.any()):
        return frame
    import cv2

    pixels = (frame.detach().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    filled = cv2.inpaint(np.ascontiguousarray(pixels), hole.cpu().to(torch.uint8).numpy(), _AROUND, cv2.INPAINT_TELEA)
    return torch.where(hole, torch.from_numpy(filled).permute(2, 0, 1).to(frame) / 255, frame)
