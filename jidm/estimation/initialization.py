"""The first pose of a video when it is not given: predicted by a network, then aligned to the frame's contours."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.alignment import CORRELATED_CONTOUR_POINTS, MAX_STEP, AlignOptions
from jidm.estimation.box_qp import solve_box_qp
from jidm.estimation.factors.contour import ContourMemory
from jidm.estimation.kalman import Gaussian
from jidm.estimation.problem import POSITION
from jidm.video.pyramid import BrightnessPyramid

_INITIAL_SEARCH_RADIUS = 8.0  # [px] before those of the options: a prediction is off by more than a step is
_ITERATIONS = 4  # for each search radius


def initialize_pose(
    prior: Gaussian,
    frame: Float[Tensor, "3 H W"],
    contours: ContourMemory,
    bounds: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    options: AlignOptions,
) -> Gaussian:
    """The maximum a posteriori pose given a predicted one and the frame's edges, by Gauss-Newton.

    Args:
        prior: (n,) the predicted pose, inside the bounds [rad or m]; joints that no contour constrains stay there.
        frame: RGB in [0, 1].
        contours: of the robot in this camera.
        bounds: lowest and highest positions.
        options: search radii.
    """
    low, high = (b.to(prior.mean) for b in bounds)
    prior_information = torch.linalg.inv(prior.covariance)
    pyramid = BrightnessPyramid.from_frame(frame)
    q, information = prior.mean, prior_information
    for search_radius in (_INITIAL_SEARCH_RADIUS, *options.search_radii):
        # A prediction is off a little everywhere; a part that is off by more is more often mismatched than left behind.
        factor = replace(contours.factor(q, pyramid, search_radius), part_scale=0.0)
        for _ in range(_ITERATIONS):
            equations = factor.linearize({POSITION: q})
            if equations is None:
                break
            information = prior_information + equations.H / CORRELATED_CONTOUR_POINTS
            g = prior_information @ (prior.mean - q) + equations.g / CORRELATED_CONTOUR_POINTS
            lower, upper = (low - q).clamp(min=-MAX_STEP), (high - q).clamp(max=MAX_STEP)
            step, _ = solve_box_qp(information, g, lower, torch.maximum(lower, upper))
            q = q + step
    return Gaussian(q, torch.linalg.inv(information))
