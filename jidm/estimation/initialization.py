"""The first pose of a video: a predicted pose is aligned to the contours in the frame."""

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

_INITIAL_SEARCH_RADIUS = 8.0  # [px] before those of the options: predictions have larger errors than tracked poses
_ITERATIONS = 4  # per search radius


def initialize_pose(
    prior: Gaussian,
    frame: Float[Tensor, "3 H W"],
    contours: ContourMemory,
    bounds: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    options: AlignOptions,
) -> Gaussian:
    """Maximum a posteriori pose given a predicted one and the edges of a frame, by Gauss-Newton.

    Args:
        prior: the predicted pose, inside the bounds [rad or m]; joints that no contour constrains stay there.
        frame: RGB in [0, 1].
        contours: of the robot in this camera.
        bounds: lower and upper joint positions [rad or m].
        options: for their search radii.

    Returns:
        The pose and its covariance.
    """
    low, high = (b.to(prior.mean) for b in bounds)
    prior_information = torch.linalg.inv(prior.covariance)
    pyramid = BrightnessPyramid.from_frame(frame)
    q, information = prior.mean, prior_information
    for search_radius in (_INITIAL_SEARCH_RADIUS, *options.search_radii):
        # All parts of a prediction have similar errors: a part with larger residuals is more often mismatched than wrong.
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
