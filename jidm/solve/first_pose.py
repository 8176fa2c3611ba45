"""The first pose of a video where nobody states it: as a network reads it, then fitted to the picture's outlines."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.motion.pyramid import BrightnessPyramid
from jidm.solve.belief import Gaussian
from jidm.solve.least_squares import bounded_solve
from jidm.solve.outline import OutlineTerm

_REACHES = (8.0, 4.0, 2.5)  # [px] a reading is off by more than a step is
_ITERATIONS = 4
_CORRELATED = 8.0  # neighbouring points of outlines that share one error
_MAX_STEP = 0.1  # [rad or m] of one iteration


def first_pose(
    reading: Gaussian,
    frame: Float[Tensor, "3 H W"],
    outline: OutlineTerm,
    bounds: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
) -> Gaussian:
    """The pose near a reading at which the robot's lines lie on the frame's edges.

    Args:
        reading: (n,) the pose, inside the bounds, and how well it is known [rad or m]; joints that the outlines do not
            show stay there.
        frame: RGB in [0, 1].
        outline: of the robot in this camera.
        bounds: lowest and highest positions.
    """
    low, high = (b.to(reading.mean) for b in bounds)
    known = torch.linalg.inv(reading.covariance)
    pyramid = BrightnessPyramid.of(frame)
    q, information = reading.mean, known
    for reach in _REACHES:
        index = outline.field.visible_contour(q)
        for _ in range(_ITERATIONS):
            lines = outline.quadratic(q, pyramid, index, reach)
            if lines is None:
                break
            information = known + lines.matrix / _CORRELATED
            vector = known @ (reading.mean - q) + lines.vector / _CORRELATED
            lower, upper = (low - q).clamp(min=-_MAX_STEP), (high - q).clamp(max=_MAX_STEP)
            step, _ = bounded_solve(information, vector, lower, torch.maximum(lower, upper))
            q = q + step
    return Gaussian(q, torch.linalg.inv(information))
