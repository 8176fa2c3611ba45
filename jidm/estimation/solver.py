"""Robust, damped, bounded least squares for a joint step from flow or normal equations, batched and differentiable.

    argmin_d  sum_i w_i rho(|J_i d - f_i|)  +  ridge * mean(diag(J'WJ)) * |d / joint_scale|^2   with  lower <= d <= upper

`solve_flow` builds and solves the problem by iteratively reweighted least squares; `solve_normal_equations` solves one that
is given. Problems of several cameras add up: `equations_a + equations_b`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jidm.errors import InputError
from jidm.estimation.box_qp import solve_box_qp
from jidm.estimation.factors.flow import accumulate, zero_nonfinite_items
from jidm.estimation.field_layout import FieldLayout, flatten_field, unflatten
from jidm.estimation.problem import NormalEquations
from jidm.estimation.robust import Kind, flow_weight

# Robust weights reduce the weighted residual variance. For normal noise, this factor makes it the variance to multiply
# inv(J'WJ) with: (E[w^2 t^2] / E[w + w' t / 2]^2) E[w]^2 / E[w t^2] for a Rayleigh distributed length t.
_VARIANCE_FACTOR = {"tukey": 1.0935, "cauchy": 1.0209}


class Status(IntEnum):
    """Status of one item of a batch."""

    OK = 0
    UNOBSERVABLE = 1
    """Solved; at least one joint is not observable, see `Solution.observable`."""
    NO_DATA = 2
    """All weights are zero; the step is zero."""
    NOT_FINITE = 3
    """A Jacobian, flow or weight is NaN or infinite; the step is zero and must not be used."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A joint step with its uncertainty.

    Attributes:
        delta_q: (*batch, n) [rad or m], inside the bounds, always finite.
        covariance: (*batch, n, n) of delta_q; variances of unobservable joints are infinite.
        residual: (*batch,) weighted root mean square of the flow that the step does not explain [px].
        explained_fraction: (*batch,) fraction of the flow's energy that the step explains, in [0, 1].
        observability: (*batch, n) root mean square of the part of each joint's image motion that no combination of the other
            joints can produce [px per rad or m].
        observable: (*batch, n) whether `observability` reaches the minimum.
        at_bound: (*batch, n) joints held at a bound.
        status: (*batch,) `Status` values.
        valid: (*batch,) whether delta_q may be used (status OK or UNOBSERVABLE).
    """

    delta_q: Float[Tensor, "*batch n"]
    covariance: Float[Tensor, "*batch n n"]
    residual: Float[Tensor, "*batch"]
    explained_fraction: Float[Tensor, "*batch"]
    observability: Float[Tensor, "*batch n"]
    observable: Bool[Tensor, "*batch n"]
    at_bound: Bool[Tensor, "*batch n"]
    status: Int[Tensor, "*batch"]

    @property
    def valid(self) -> Bool[Tensor, "*batch"]:
        return self.status <= Status.UNOBSERVABLE


def solve_normal_equations(
    equations: NormalEquations,
    *,
    ridge: float = 1e-6,
    joint_scale: Float[Tensor, " n"] | None = None,
    bounds: tuple[Float[Tensor, "*#batch n"], Float[Tensor, "*#batch n"]] | None = None,
    min_motion: float = 2.0,
) -> Solution:
    """Solve normal equations of a joint step with damping and bounds.

    Args:
        equations: of one variable, the joint step.
        ridge: damping relative to the mean diagonal of J'WJ in units of `joint_scale`, so that the solution does not depend on
            the number of pixels or the scale of their weights.
        joint_scale: (n,) a typical motion of each joint, to compare rad with m; 1 if not given.
        bounds: lower and upper bound of delta_q, which hold inside the solve. They do not reduce the covariance.
        min_motion: a joint is observable if moving it by its `joint_scale` moves the image by this much [px rms over the
            weighted pixels] in a way that the other joints cannot produce.

    Raises:
        InputError: a lower bound is above its upper bound, or a scale is not positive.
    """
    out, shape = equations.g.dtype, equations.g.shape
    best = _minimize(equations, ridge, joint_scale, bounds)
    x, joint_scale, A, g, floor = best.x, best.joint_scale, best.A, best.g, best.floor
    usable = best.finite & (best.total_weight > 0)
    eye = torch.eye(shape[-1], dtype=A.dtype, device=A.device)

    residual_cost = best.cost - 2 * (x * g).sum(-1) + torch.einsum("...i,...ij,...j->...", x, A, x)
    residual_cost = residual_cost.clamp(min=0)
    variance = residual_cost / (2 * best.num_observations - shape[-1]).clamp(min=1)
    inverse = torch.linalg.inv(A + floor[..., None] * eye)
    observability = _observability(inverse, best.total_weight)
    # A joint that is held by the numerical floor alone is unknown.
    variance_factor = inverse.diagonal(dim1=-2, dim2=-1)
    covariance = variance[..., None, None] * inverse
    covariance = _mark_unknown((variance_factor <= 0) | (variance_factor > 0.1 / floor), covariance)
    observable = (observability >= min_motion) & usable[..., None]
    status = torch.where(observable.all(-1), Status.OK, Status.UNOBSERVABLE)
    status = torch.where(best.finite & (best.total_weight <= 0), int(Status.NO_DATA), status)
    mean_square = (residual_cost / best.total_weight.clamp(min=1e-30)).clamp(min=1e-30)
    solution = Solution(
        delta_q=(x * joint_scale).to(out),
        covariance=(covariance * joint_scale[:, None] * joint_scale).to(out),
        residual=mean_square.sqrt().to(out) * (best.total_weight > 0),
        explained_fraction=(1 - residual_cost / best.cost.clamp(min=1e-30)).clamp(0, 1).to(out) * usable,
        observability=(observability / joint_scale).to(out),
        observable=observable,
        at_bound=best.at_bound & usable[..., None],
        status=status,
    )
    return _mark_not_finite(solution, ~best.finite)


@dataclass(frozen=True, eq=False)
class _Minimizer:
    """The minimizer x in units of `joint_scale`, and the problem in those units in float64."""

    x: Tensor
    at_bound: Tensor
    joint_scale: Tensor
    A: Tensor
    g: Tensor
    floor: Tensor
    cost: Tensor
    total_weight: Tensor
    num_observations: Tensor
    finite: Tensor


def _minimize(
    equations: NormalEquations, ridge: float, joint_scale: Tensor | None, bounds: tuple[Tensor, Tensor] | None
) -> _Minimizer:
    """The step without its covariance, which is all that a re-weighting needs."""
    out, n = equations.g.dtype, equations.g.shape[-1]
    A, g, cost, total, count, finite = _to_float64(equations)
    joint_scale = torch.ones(n, dtype=A.dtype, device=A.device) if joint_scale is None else joint_scale.to(A)
    if not ((joint_scale > 0) & joint_scale.isfinite()).all():
        raise InputError("every joint_scale must be a positive number")
    A, g = A * joint_scale[:, None] * joint_scale, g * joint_scale  # from here on in units of joint_scale
    lower, upper, bounded = _scale_bounds(g, joint_scale, bounds)
    mean_diagonal = A.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
    # For J = 0 the solution is zero; the 1 only keeps that problem regular and its gradients finite.
    scale = torch.where(mean_diagonal > 0, mean_diagonal, torch.ones_like(mean_diagonal))
    # Minimal damping that keeps problems with equal columns regular in spite of rounding.
    floor = max(1e-12, 4 * torch.finfo(out).eps) * scale
    damping = torch.maximum(ridge * scale, floor)
    x, at_bound = solve_box_qp(A + torch.diag_embed(damping.expand_as(g)), g, lower, upper)
    return _Minimizer(x, at_bound, joint_scale, A, g, floor, cost, total, count, finite & bounded)


def solve_flow(
    jacobian: Tensor,
    flow: Tensor,
    weight: Tensor | None = None,
    *,
    robust: Kind | None = "tukey",
    iterations: int = 6,
    ridge: float = 1e-6,
    joint_scale: Float[Tensor, " n"] | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    min_motion: float = 2.0,
    layout: FieldLayout | None = None,
) -> Solution:
    """Joint step that explains a flow field, by iteratively reweighted least squares.

    Args:
        jacobian, flow, weight, layout: as for `normal_equations`. Pixels off the robot must have weight 0, or their zero
            residuals would make the residual scale too small.
        robust: M-estimator with the median absolute deviation as scale. "tukey" starts with Cauchy's weights, which tolerate
            a poor start, and ends with Tukey's biweight, which ignores outliers altogether. None = plain least squares.
        iterations: number of re-weightings, none for robust=None.
        ridge, joint_scale, bounds, min_motion: as for `solve_normal_equations`.

    Gradients flow to jacobian, flow and weight through every re-weighting and stay finite at rank loss.

    Raises:
        InputError: shapes do not fit together, or a bound or scale is wrong.
    """
    if robust not in (None, "tukey", "cauchy"):
        raise InputError(f"robust must be 'tukey', 'cauchy' or None, got {robust!r}")
    batch, J, f, w = flatten_field(jacobian, flow, weight, layout)
    n = J.shape[-2]
    flat_bounds = None
    if bounds is not None:
        flat_bounds = bounds[0].expand(*batch, n).reshape(-1, n), bounds[1].expand(*batch, n).reshape(-1, n)

    J, f, w, bad, equations = zero_nonfinite_items(J, f, w)
    for k in range(iterations if robust else 0):
        best = _minimize(equations, ridge, joint_scale, flat_bounds)
        step = torch.where(best.finite[:, None], best.x * best.joint_scale, torch.zeros_like(best.x)).to(J)
        kind: Kind = "tukey" if robust == "tukey" and k >= iterations // 2 else "cauchy"
        w_robust = flow_weight(_residual(J, f, step), w, kind)
        num_observations = torch.where(w > 0, w_robust, torch.zeros_like(w)).sum(-1) / _VARIANCE_FACTOR[kind]
        equations = replace(accumulate(J, f, w * w_robust), num_observations=num_observations)
    solution = solve_normal_equations(
        equations, ridge=ridge, joint_scale=joint_scale, bounds=flat_bounds, min_motion=min_motion
    )
    return unflatten(_mark_not_finite(solution, bad), batch)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _residual(J: Tensor, f: Tensor, delta_q: Float[Tensor, "B n"]) -> Float[Tensor, "B P"]:
    """Length of the residual flow at every pixel [px]."""
    r = f - (delta_q.to(J)[:, None, None, :] @ J).squeeze(-2)
    return (r.square().sum(1) + torch.finfo(r.dtype).tiny ** 0.5).sqrt()  # sqrt'(0) is infinite


def _to_float64(equations: NormalEquations) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Bool[Tensor, "*batch"]]:
    """H, g, cost, weight and count in float64, zero for items that are not usable; and which items are finite."""
    e = equations
    A, g, energy, total, count = (x.double() for x in (e.H, e.g, e.cost, e.total_weight, e.num_observations))
    finite = A.isfinite().flatten(-2).all(-1) & g.isfinite().all(-1) & energy.isfinite() & total.isfinite()
    usable = finite & (total > 0)
    A = torch.where(usable[..., None, None], A, torch.zeros_like(A))
    g = torch.where(usable[..., None], g, torch.zeros_like(g))
    energy, total, count = (torch.where(usable, x, torch.zeros_like(x)) for x in (energy, total, count))
    return A, g, energy, total, count, finite


def _scale_bounds(
    g: Tensor, joint_scale: Tensor, bounds: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor | None, Bool[Tensor, "*batch"]]:
    """Lower and upper bound, each (*batch, n) in units of `joint_scale`; and which items have no NaN in them."""
    if bounds is None:
        return None, None, torch.ones_like(g[..., 0], dtype=torch.bool)
    if (bounds[0] > bounds[1]).any():
        raise InputError("a lower bound is above its upper bound; clamp them so that lower <= upper for every joint")
    lower, upper = ((b.to(g) / joint_scale).expand_as(g) for b in bounds)
    finite = ~(lower.isnan() | upper.isnan())
    lower, upper = (torch.where(finite, x, torch.zeros_like(x)) for x in (lower, upper))
    return lower, upper, finite.all(-1)


def _mark_unknown(unknown: Bool[Tensor, "*batch n"], covariance: Tensor) -> Tensor:
    """The covariance with infinite variance of unknown joints and no covariance with the others."""
    off = unknown[..., :, None] | unknown[..., None, :]
    covariance = torch.where(off, torch.zeros_like(covariance), covariance)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    return covariance + torch.diag_embed(torch.where(unknown, torch.full_like(diagonal, torch.inf), 0.0))


def _observability(inverse: Tensor, total: Tensor) -> Tensor:
    """Root mean square image motion of each joint that the others cannot produce: sqrt(1 / inv(A)_kk / sum w)."""
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    # Rounding can make an eigenvalue of a singular matrix negative; such a joint is unknown as well.
    information = torch.where(diagonal > 0, 1 / diagonal.clamp(min=1e-300), torch.zeros_like(diagonal))
    return (information / total[..., None].clamp(min=1e-30)).clamp(min=1e-30).sqrt()


def _mark_not_finite(solution: Solution, where: Bool[Tensor, "*batch"]) -> Solution:
    """The same solution with the items `where` marked as not finite."""
    if not where.any():
        return solution
    all_joints = torch.ones_like(solution.observable)
    return replace(
        solution,
        delta_q=torch.where(where[..., None], torch.zeros_like(solution.delta_q), solution.delta_q),
        covariance=torch.where(
            where[..., None, None], _mark_unknown(all_joints, solution.covariance), solution.covariance
        ),
        observable=solution.observable & ~where[..., None],
        at_bound=solution.at_bound & ~where[..., None],
        status=torch.where(where, int(Status.NOT_FINITE), solution.status),
    )
