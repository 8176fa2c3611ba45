"""The first pose of a video where nobody states it: as a network reads it, then fitted to the picture's outlines."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.motion.pyramid import BrightnessPyramid
from jidm.solve.align import AlignOptions
from jidm.solve.belief import Gaussian
from jidm.solve.least_squares import bounded_solve
from jidm.solve.outline import OutlineTerm

_REACH = 8.0  # [px] before those of the options: a reading is off by more than a step is
_ITERATIONS = 4  # a reach


def first_pose(
    reading: Gaussian,
    frame: Float[Tensor, "3 H W"],
    outline: OutlineTerm,
    bounds: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    options: AlignOptions,
) -> Gaussian:
    """The pose near a reading at which the robot's lines lie on the frame's edges.

    Args:
        reading: (n,) the pose, inside the bounds, and how well it is known [rad or m]; joints that the outlines do not
            show stay there.
        frame: RGB in [0, 1].
        outline: of the robot in this camera.
        bounds: lowest and highest positions.
        options: how outlines are followed.
    """
    low, high = (b.to(reading.mean) for b in bounds)
    known = torch.linalg.inv(reading.covariance)
    pyramid = BrightnessPyramid.of(frame)
    q, information = reading.mean, known
    for reach in (_REACH, *options.reaches):
        index = outline.field.visible_contour(q)
        for _ in range(_ITERATIONS):
            # A reading is off a little everywhere; a part that is off by more is more often misled than left behind.
            lines = outline.quadratic(q, pyramid, index, reach, excused=0.0)
            if lines is None:
                break
            information = known + lines.matrix / options.correlated_lines
            vector = known @ (reading.mean - q) + lines.vector / options.correlated_lines
            lower, upper = (low - q).clamp(min=-options.max_step), (high - q).clamp(max=options.max_step)
            step, _ = bounded_solve(information, vector, lower, torch.maximum(lower, upper))
            q = q + step
    return Gaussian(q, torch.linalg.inv(information))
