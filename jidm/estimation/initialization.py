"""The first pose of a video where nobody states it: as a network reads it, then fitted to the picture's outlines."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.alignment import AlignOptions
from jidm.estimation.factors.contour import ContourFactor
from jidm.estimation.kalman import Gaussian
from jidm.estimation.solver import solve_box_qp
from jidm.video.pyramid import BrightnessPyramid

_INITIAL_SEARCH_RADIUS = 8.0  # [px] before those of the options: a reading is off by more than a step is
_ITERATIONS = 4  # a reach


def initialize_pose(
    prior: Gaussian,
    frame: Float[Tensor, "3 H W"],
    contour: ContourFactor,
    bounds: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    options: AlignOptions,
) -> Gaussian:
    """The pose near a reading at which the robot's lines lie on the frame's edges.

    Args:
        prior: (n,) the pose, inside the bounds, and how well it is known [rad or m]; joints that the outlines do not
            show stay there.
        frame: RGB in [0, 1].
        contour: of the robot in this camera.
        bounds: lowest and highest positions.
        options: how outlines are followed.
    """
    low, high = (b.to(prior.mean) for b in bounds)
    prior_information = torch.linalg.inv(prior.covariance)
    pyramid = BrightnessPyramid.from_frame(frame)
    q, information = prior.mean, prior_information
    for search_radius in (_INITIAL_SEARCH_RADIUS, *options.search_radii):
        index = contour.field.visible_contour(q)
        for _ in range(_ITERATIONS):
            # A reading is off a little everywhere; a part that is off by more is more often misled than left behind.
            equations = contour.linearize(q, pyramid, index, search_radius, part_scale=0.0)
            if equations is None:
                break
            information = prior_information + equations.H / options.correlated_contour_points
            vector = prior_information @ (prior.mean - q) + equations.g / options.correlated_contour_points
            lower, upper = (low - q).clamp(min=-options.max_step), (high - q).clamp(max=options.max_step)
            step, _ = solve_box_qp(information, vector, lower, torch.maximum(lower, upper))
            q = q + step
    return Gaussian(q, torch.linalg.inv(information))
