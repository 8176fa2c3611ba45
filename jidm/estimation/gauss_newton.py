"""Damped Gauss-Newton: one bounded step over all factors, and a large joint step from flow by re-linearization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.box_qp import solve_box_qp
from jidm.estimation.factors.flow import FlowFactor
from jidm.estimation.factors.prior import StudentTPrior
from jidm.estimation.problem import POSITION, NormalEquations, State, marginal
from jidm.estimation.solver import Solution, solve_flow
from jidm.fields.base import FieldAtPose


def bounded_step(
    state: State,
    equations: Sequence[NormalEquations],
    prior: StudentTPrior,
    *,
    bounds: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    damping: float,
    max_step: float,
) -> tuple[dict[str, Tensor], float]:
    """One damped Gauss-Newton step (Levenberg) of the joint positions inside bounds; other variables are marginalized.

    Args:
        state: the linearization point.
        equations: of the factors, over the positions and variables of their own, on one common scale.
        prior: of the positions.
        bounds: lower and upper joint positions [rad or m].
        damping: relative to the mean diagonal of H.
        max_step: largest motion of a joint [rad or m].

    Returns:
        The next state, and by how much the joint that moved most did [rad or m].
    """
    q = state[POSITION]
    total, recover = marginal(POSITION, equations)
    damped = total + prior.linearize(state)
    H = damped.H + damping * total.H.diagonal().mean() * torch.eye(len(q)).to(q)
    lower = torch.maximum(bounds[0] - q, torch.full_like(q, -max_step))
    upper = torch.minimum(bounds[1] - q, torch.full_like(q, max_step))
    step, _ = solve_box_qp(H.double(), damped.g.double(), lower.double(), torch.maximum(lower, upper).double())
    step = step.to(q)
    others = {name: state[name] + change if name in state else change for name, change in recover(step).items()}
    return {**state, POSITION: q + step, **others}, float(step.abs().max())


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
    """Joint step that explains the flow of a pose's points, by Gauss-Newton with exact kinematics at every iteration.

    Args:
        pose: field at the first frame's joint positions.
        flow: motion of each of its points [px].
        weight: confidence of each; 0 for hidden points.
        bounds: lower and upper bound of the whole step [rad or m].
        iterations: at most.
        tolerance: stop when no joint moves by more [rad or m].
        options: passed to `solve_flow`.

    Returns:
        Solution of the whole step; residual and covariance are those of the last linearization.
    """
    if weight.dim() == 1:  # a single problem: skip the hidden points, which are most of a robot
        index = (weight > 0).nonzero()[:, 0]
        pose, flow, weight = pose.keep(index), flow[index], weight[index]
    factor = FlowFactor(pose, flow, weight)
    total = torch.zeros_like(pose.q)
    for _ in range(iterations):
        jacobian, residual_flow = factor.residual(total)
        remaining_bounds = None if bounds is None else (bounds[0] - total, bounds[1] - total)
        solution = solve_flow(jacobian, residual_flow, weight, bounds=remaining_bounds, layout="points", **options)
        total = total + solution.delta_q
        if float(solution.delta_q.detach().abs().max()) < tolerance:
            break
    if bounds is not None:
        total = torch.minimum(torch.maximum(total, bounds[0]), bounds[1])  # against rounding of the sum
    safe = torch.where((weight > 0)[..., None], flow, torch.zeros_like(flow))
    energy = (weight * safe.square().sum(-1)).sum(-1) / weight.sum(-1).clamp(min=1e-30)
    explained_fraction = (1 - solution.residual**2 / energy.clamp(min=1e-30)).clamp(0, 1)
    explained_fraction = torch.where(solution.valid, explained_fraction, torch.zeros_like(explained_fraction))
    return replace(
        solution,
        delta_q=torch.where(solution.valid[..., None], total, 0 * total),
        explained_fraction=explained_fraction,
    )
