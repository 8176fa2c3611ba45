"""A large joint step from flow: solve, carry the points by the step, solve for what is left, until nothing is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.solver import Solution, solve_flow
from jidm.fields.base import FieldAtPose


def gauss_newton_step(
    pose: FieldAtPose,
    flow: Float[Tensor, "*batch N 2"],
    weight: Float[Tensor, "*batch N"],
    *,
    bounds: tuple[Tensor, Tensor] | None = None,
    iterations: int = 8,
    tolerance: float = 1e-6,
    **options: Any,
) -> Solution:
    """Joint step that carries the pose's points to where the flow says they went.

    Args:
        pose: field at the first frame's joint positions.
        flow: motion of each of its points [px].
        weight: confidence of each; 0 for points that are hidden.
        bounds: of the whole step.
        iterations: of re-linearisation; stops when no joint moves by more than `tolerance` [rad or m].
        options: passed to `solve_flow`.

    Returns:
        Solution of the whole step: residual and covariance at the last linearisation, explained relative to `flow`.
    """
    if weight.dim() == 1:  # one problem: hidden points, most of a robot, need not be carried along
        index = (weight > 0).nonzero()[:, 0]
        pose, flow, weight = pose.keep(index), flow[index], weight[index]
    start = pose.surface()
    total = torch.zeros_like(pose.q)
    for _ in range(iterations):
        surface = pose.surface(total)
        residual_flow = flow - (surface.points - start.points)
        remaining_bounds = None if bounds is None else (bounds[0] - total, bounds[1] - total)
        solution = solve_flow(surface.jacobian, residual_flow, weight, bounds=remaining_bounds, **options)
        total = total + solution.delta_q
        if float(solution.delta_q.detach().abs().max()) < tolerance:
            break
    if bounds is not None:
        total = torch.minimum(torch.maximum(total, bounds[0]), bounds[1])  # rounding of the running sum
    safe = torch.where((weight > 0)[..., None], flow, torch.zeros_like(flow))
    energy = (weight * safe.square().sum(-1)).sum(-1) / weight.sum(-1).clamp(min=1e-30)
    explained_fraction = (1 - solution.residual**2 / energy.clamp(min=1e-30)).clamp(0, 1)
    explained_fraction = torch.where(solution.valid, explained_fraction, torch.zeros_like(explained_fraction))
    return replace(
        solution,
        delta_q=torch.where(solution.valid[..., None], total, 0 * total),
        explained_fraction=explained_fraction,
    )
