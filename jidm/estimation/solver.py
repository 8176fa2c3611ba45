"""Weighted, robust, damped, bounded least squares from optical flow to a joint step, batched and differentiable.

    argmin_d  sum_i w_i rho(|J_i d - f_i|)  +  ridge * mean(diag(J'WJ)) * |d / unit|^2   subject to  lower <= d <= upper

`normal_equations` builds the problem in one pass over the Jacobian field, `solve_normal_equations` solves it, and
`solve_flow` does both with robust re-weighting. Problems of several cameras add up: `equations_a + equations_b`.

Normal equations square the condition number of J. They are formed in the input's dtype and solved in float64; at
cond(J) above 1e3 in float32 give float64 input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jidm.errors import InputError
from jidm.estimation.box_qp import solve_box_qp
from jidm.estimation.field_layout import FieldLayout, flatten_field
from jidm.estimation.robust import TUKEY

# Numbers a pass: small enough that its copies stay in the processor's cache (J is then read from memory once).
_BLOCK = 2**19
# The residual scale (a median) is taken over all pixels that have weight, or over at least this many of them.
_MEDIAN_SAMPLES = 4096
_RAYLEIGH_MEDIAN = 1.17741  # median length of a 2-vector with unit normal components
_CAUCHY = 2.385  # 95 % efficiency at the normal distribution, as TUKEY
# Re-weighting shortens residuals. At normal noise a weighted residual variance times this is the variance to multiply
# inv(J'WJ) with: (E[w^2 t^2] / E[w + w' t / 2]^2) E[w]^2 / E[w t^2] for a Rayleigh distributed length t.
_VARIANCE_FACTOR = {"tukey": 1.0935, "cauchy": 1.0209}


class Status(IntEnum):
    """What became of one item of a batch."""

    OK = 0
    UNOBSERVABLE = 1
    """Solved; at least one joint cannot be seen, see `Solution.observable`."""
    NO_DATA = 2
    """All weights are zero; the step is the prior's mean or zero."""
    NOT_FINITE = 3
    """A Jacobian, flow or weight is NaN or infinite; the step is zero and must not be used."""


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """`matrix @ delta_q = vector`, before damping.

    Attributes:
        H: (*batch, n, n) sum of w J'J [px^2 per unit^2].
        g: (*batch, n) sum of w J'f [px^2 per unit].
        cost: (*batch,) sum of w |f|^2 [px^2].
        total_weight: (*batch,) sum of w.
        num_observations: (*batch,) number of pixels with w > 0; after robust re-weighting, what they are worth.
    """

    H: Float[Tensor, "*batch n n"]
    g: Float[Tensor, "*batch n"]
    cost: Float[Tensor, "*batch"]
    total_weight: Float[Tensor, "*batch"]
    num_observations: Float[Tensor, "*batch"]

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Two problems about the same joints solved as one, for instance two cameras."""
        return NormalEquations(
            self.H + other.H,
            self.g + other.g,
            self.cost + other.cost,
            self.total_weight + other.total_weight,
            self.num_observations + other.num_observations,
        )


@dataclass(frozen=True, eq=False)
class Prior:
    """Gaussian knowledge about the step: mean (*batch, n) [rad or m] and standard deviation (*batch, n), with the
    standard deviation of one pixel's flow error [px] that puts it on the scale of the data."""

    mean: Float[Tensor, "*#batch n"]
    std: Float[Tensor, "*#batch n"]
    flow_std: float = 0.5


@dataclass(frozen=True, eq=False)
class Solution:
    """A joint step and how far it can be trusted.

    Attributes:
        delta_q: (*batch, n) [rad or m], inside the bounds, finite always.
        covariance: (*batch, n, n) of delta_q; infinite on the diagonal where nothing is known.
        residual: (*batch,) weighted root mean square of the flow left unexplained [px].
        explained_fraction: (*batch,) share of the flow's energy the step explains, in [0, 1].
        observability: (*batch, n) root mean square image motion [px per unit] of each joint that no combination of the other
            joints can imitate: its observability.
        observable: (*batch, n) whether `observability` reaches the asked minimum.
        at_bound: (*batch, n) joints that stopped at a bound.
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


def normal_equations(
    jacobian: Tensor, flow: Tensor, weight: Tensor | None = None, *, layout: FieldLayout | None = None
) -> NormalEquations:
    """Build the least-squares problem in one pass over the field.

    Args:
        jacobian: dense (*batch, 2, n, H, W) or at points (*batch, N, 2, n) [px per rad or m].
        flow: (*batch, 2, H, W) or (*batch, N, 2) [px].
        weight: (*batch, H, W) or (*batch, N), non-negative; 0 = ignore, also a NaN flow there (but not a NaN
            Jacobian). All 1 if not given.
        layout: "dense" or "points"; read off the shapes if not given. Only 2x2 pixels of a 2-joint robot fit both.

    Returns:
        The sums; NaN for items of the batch that hold a NaN or an infinity, which spoil nothing else.

    Raises:
        InputError: shapes do not fit together or fit both layouts, or a weight is negative.
    """
    batch, J, f, w = flatten_field(jacobian, flow, weight, layout)
    *_, bad, equations = _zero_nonfinite_items(J, f, w)
    if bad.any():
        nan = torch.full_like(equations.cost, torch.nan)
        equations = replace(
            equations,
            H=torch.where(bad[:, None, None], nan[:, None, None], equations.H),
            g=torch.where(bad[:, None], nan[:, None], equations.g),
            cost=torch.where(bad, nan, equations.cost),
        )
    return _unflatten(equations, batch)


def solve_normal_equations(
    equations: NormalEquations,
    *,
    ridge: float = 1e-6,
    joint_scale: Float[Tensor, " n"] | None = None,
    bounds: tuple[Float[Tensor, "*#batch n"], Float[Tensor, "*#batch n"]] | None = None,
    prior: Prior | None = None,
    min_motion: float = 2.0,
    correlated_pixels: float = 1.0,
) -> Solution:
    """Solve `equations` with damping, prior and bounds.

    Args:
        ridge: damping relative to the mean diagonal of J'WJ (in `joint_scale`s), so the answer does not depend on how many
            pixels there are or how weights are scaled. Pulls to the prior's mean, or to zero without a prior.
        joint_scale: (n,) a typical motion of each joint, to compare rad with m; 1 if not given.
        bounds: lower and upper bound of delta_q, applied inside the solve (`joint_bounds` makes them). They do not
            narrow the covariance.
        prior: Gaussian prior on the step.
        min_motion: a joint is observable if moving it by its `joint_scale` moves the image by this much [px rms over the
            weighted pixels] in a way the other joints cannot imitate.
        correlated_pixels: how many neighbouring pixels share one flow error; scales the covariance.

    Raises:
        InputError: a lower bound is above its upper bound, or a unit or the prior's deviation is not positive.
    """
    out, shape = equations.g.dtype, equations.g.shape
    best = _minimize(equations, ridge, joint_scale, bounds, prior)
    x, joint_scale, A, g, floor, stiffness = best.x, best.joint_scale, best.A, best.g, best.floor, best.stiffness
    energy, total, count, finite = best.cost, best.total, best.num_observations, best.finite
    usable = finite & (total > 0)
    eye = torch.eye(shape[-1], dtype=A.dtype, device=A.device)

    residual_cost = (energy - 2 * (x * g).sum(-1) + torch.einsum("...i,...ij,...j->...", x, A, x)).clamp(min=0)
    variance = residual_cost / (2 * count - shape[-1]).clamp(min=1) * correlated_pixels
    inverse = torch.linalg.inv(A + floor[..., None] * eye)
    observability = _observability(inverse, total)
    if prior is None:
        covariance = variance[..., None, None] * inverse
    else:
        inverse = torch.linalg.inv(A + torch.diag_embed(floor + stiffness))
        noise = variance[..., None, None] * A + prior.flow_std**2 * torch.diag_embed(stiffness)
        covariance = inverse @ noise @ inverse
    # A joint that only the floor holds in place may be anywhere.
    variance_factor = inverse.diagonal(dim1=-2, dim2=-1)
    covariance = _mark_unknown((variance_factor <= 0) | (variance_factor > 0.1 / floor), covariance)
    observable = (observability >= min_motion) & usable[..., None]
    status = torch.where(observable.all(-1), Status.OK, Status.UNOBSERVABLE)
    status = torch.where(finite & (total <= 0), int(Status.NO_DATA), status)
    solution = Solution(
        delta_q=(x * joint_scale).to(out),
        covariance=(covariance * joint_scale[:, None] * joint_scale).to(out),
        residual=(residual_cost / total.clamp(min=1e-30)).clamp(min=1e-30).sqrt().to(out) * (total > 0),
        explained_fraction=(1 - residual_cost / energy.clamp(min=1e-30)).clamp(0, 1).to(out) * usable,
        observability=(observability / joint_scale).to(out),
        observable=observable,
        at_bound=best.at_bound & usable[..., None],
        status=status,
    )
    return _mark_not_finite(solution, ~finite)


@dataclass(frozen=True, eq=False)
class _Minimizer:
    """The minimiser x of a problem in units, and the pieces of the problem."""

    x: Tensor
    at_bound: Tensor
    joint_scale: Tensor
    A: Tensor
    g: Tensor
    stiffness: Tensor
    floor: Tensor
    cost: Tensor
    total: Tensor
    num_observations: Tensor
    finite: Tensor


def _minimize(
    equations: NormalEquations,
    ridge: float,
    joint_scale: Tensor | None,
    bounds: tuple[Tensor, Tensor] | None,
    prior: Prior | None,
) -> _Minimizer:
    """The step alone, without what is known about its errors: all that a re-weighting needs."""
    out, n = equations.g.dtype, equations.g.shape[-1]
    A, g, energy, total, count, finite = _to_float64(equations)
    joint_scale = torch.ones(n, dtype=A.dtype, device=A.device) if joint_scale is None else joint_scale.to(A)
    _check_problem(joint_scale, bounds, prior)
    A, g = A * joint_scale[:, None] * joint_scale, g * joint_scale  # from here on joints are counted in units
    mean, stiffness, lower, upper, problem_finite = _scale_problem(g, joint_scale, bounds, prior)
    mean_diagonal = A.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
    # Without any motion in J the answer is zero (or the prior's mean); the 1 only keeps that problem regular, and its
    # gradients finite.
    scale = torch.where(mean_diagonal > 0, mean_diagonal, torch.ones_like(mean_diagonal))
    # Sums of squares are rounded, so duplicate columns need this much damping in any case to stay a regular problem.
    floor = max(1e-12, 4 * torch.finfo(out).eps) * scale
    damping = torch.maximum(ridge * scale, floor) + stiffness
    x, at_bound = solve_box_qp(A + torch.diag_embed(damping.expand_as(g)), g + damping * mean, lower, upper)
    return _Minimizer(x, at_bound, joint_scale, A, g, stiffness, floor, energy, total, count, finite & problem_finite)


def solve_flow(
    jacobian: Tensor,
    flow: Tensor,
    weight: Tensor | None = None,
    *,
    robust: Literal["tukey", "cauchy"] | None = "tukey",
    iterations: int = 6,
    ridge: float = 1e-6,
    joint_scale: Float[Tensor, " n"] | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    prior: Prior | None = None,
    min_motion: float = 2.0,
    correlated_pixels: float = 1.0,
    layout: FieldLayout | None = None,
) -> Solution:
    """Joint step that best explains a flow field.

    Args:
        jacobian, flow, weight, layout: as for `normal_equations`. Give weight 0 off the robot: those pixels say nothing about
            the joints but would drag the residual scale to zero.
        robust: re-weighting by the residual against its scale (MAD); "tukey" starts with Cauchy steps, which converge
            from anywhere, and ends with Tukey's biweight, which ignores outliers altogether. None = plain.
        iterations: number of re-weightings (ignored for robust=None).
        Others as for `solve_normal_equations`.

    Gradients flow to jacobian, flow and weight through every re-weighting and stay finite at rank loss.

    Raises:
        InputError: shapes do not fit together.
    """
    if robust not in (None, "tukey", "cauchy"):
        raise InputError(f"robust must be 'tukey', 'cauchy' or None, got {robust!r}")
    batch, J, f, w = flatten_field(jacobian, flow, weight, layout)
    flat_bounds = None if bounds is None else tuple(_flat(b, batch, J.shape[-2]) for b in bounds)
    flat_prior = prior and Prior(
        _flat(prior.mean, batch, J.shape[-2]), _flat(prior.std, batch, J.shape[-2]), prior.flow_std
    )

    J, f, w, bad, equations = _zero_nonfinite_items(J, f, w)
    for k in range(iterations if robust else 0):
        best = _minimize(equations, ridge, joint_scale, flat_bounds, flat_prior)  # type: ignore[arg-type]
        step = torch.where(best.finite[:, None], best.x * best.joint_scale, torch.zeros_like(best.x)).to(J)
        kind: Literal["tukey", "cauchy"] = "tukey" if robust == "tukey" and k >= iterations // 2 else "cauchy"
        w_robust = _robust_weight(_residual(J, f, step), w, kind)
        num_observations = torch.where(w > 0, w_robust, torch.zeros_like(w)).sum(-1) / _VARIANCE_FACTOR[kind]
        equations = replace(_accumulate(J, f, w * w_robust), num_observations=num_observations)
    solution = solve_normal_equations(
        equations,
        ridge=ridge,
        joint_scale=joint_scale,
        bounds=flat_bounds,  # type: ignore[arg-type]
        prior=flat_prior,
        min_motion=min_motion,
        correlated_pixels=correlated_pixels,
    )
    return _unflatten(_mark_not_finite(solution, bad), batch)


def joint_bounds(
    q: Float[Tensor, "*batch n"],
    lower: Float[Tensor, " n"],
    upper: Float[Tensor, " n"],
    velocity: Float[Tensor, " n"],
    dt: float,
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n"]]:
    """Bounds of a step of dt seconds from q that keep position and velocity limits.

    A q outside its limits may stay where it is and move back, never further out.
    """
    reach = velocity.to(q) * dt
    low = torch.maximum(lower.to(q) - q, -reach).clamp(max=0.0)
    high = torch.minimum(upper.to(q) - q, reach).clamp(min=0.0)
    return low, high


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _zero_nonfinite_items(
    J: Float[Tensor, "B 2 n P"], f: Float[Tensor, "B 2 P"], w: Float[Tensor, "B P"]
) -> tuple[Float[Tensor, "B 2 n P"], Float[Tensor, "B 2 P"], Float[Tensor, "B P"], Bool[Tensor, " B"], NormalEquations]:
    """The rows with items emptied that hold a NaN or infinity, which items those are, and the sums over the rest.

    Emptied before anything is derived from them, so that a NaN reaches nobody's gradient, not even its own.
    """
    equations = _accumulate(J, f, w)
    sums = torch.cat([equations.H.flatten(-2), equations.g, equations.cost[:, None]], dim=-1)
    bad = ~(sums.isfinite().all(-1) & equations.total_weight.isfinite())
    if bad.any():
        J = torch.where(bad[:, None, None, None], torch.zeros_like(J), J)
        f = torch.where(bad[:, None, None], torch.zeros_like(f), f)
        w = torch.where(bad[:, None], torch.zeros_like(w), w)
        equations = _accumulate(J, f, w)
    return J, f, w, bad, equations


def _accumulate(J: Float[Tensor, "B 2 n P"], f: Float[Tensor, "B 2 P"], w: Float[Tensor, "B P"]) -> NormalEquations:
    B, _, n, P = J.shape
    items = max(1, _BLOCK // max(1, 2 * (n + 1) * P))
    pixels = max(1, _BLOCK // (2 * (n + 1)))
    sums = []
    for first in range(0, max(B, 1), items):
        rows = slice(first, first + items)
        total: Tensor | float = 0.0
        for start in range(0, max(P, 1), pixels):
            part = slice(start, start + pixels)
            # The flow as one more row: one product then gives matrix, vector and energy.
            x = torch.cat([J[rows, :, :, part], f[rows, :, None, part]], dim=2)
            total = total + ((x * w[rows, None, None, part]) @ x.mT).sum(1)
        sums.append(total)
    S = torch.cat(sums)  # type: ignore[arg-type]
    return NormalEquations(S[:, :n, :n], S[:, :n, n], S[:, n, n], w.sum(-1), (w > 0).sum(-1).to(w.dtype))


def _residual(J: Tensor, f: Tensor, delta_q: Float[Tensor, "B n"]) -> Float[Tensor, "B P"]:
    """Length of the flow left unexplained at every pixel [px]."""
    r = f - (delta_q.to(J)[:, None, None, :] @ J).squeeze(-2)
    return (r.square().sum(1) + torch.finfo(r.dtype).tiny ** 0.5).sqrt()  # sqrt'(0) is infinite


def _robust_weight(
    r: Float[Tensor, "B P"], w: Float[Tensor, "B P"], kind: Literal["tukey", "cauchy"]
) -> Float[Tensor, "B P"]:
    """Factor on every pixel's weight, from its residual's length against the median of them all."""
    if not w.numel():
        return w
    has_weight = w > 0
    fewest = torch.where(has_weight.any(-1), has_weight.sum(-1), w.shape[-1]).min().item()
    stride = max(1, int(fewest) // _MEDIAN_SAMPLES) | 1  # odd, so that it walks all columns of an even image
    sampled = torch.where(has_weight, r, torch.nan)[:, ::stride]
    scale = sampled.nanmedian(dim=-1, keepdim=True).values.nan_to_num(0.0) / _RAYLEIGH_MEDIAN
    # Below a thousandth of a pixel every residual is as good as zero.
    t = r / scale.clamp(min=1e-3)
    if kind == "tukey":
        return (1 - (t / TUKEY) ** 2).clamp(min=0) ** 2
    return 1 / (1 + (t / _CAUCHY) ** 2)


def _to_float64(equations: NormalEquations) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Bool[Tensor, "*batch"]]:
    """Matrix, vector, energy, weight and count in float64, zero for items that are not finite; which items are."""
    e = equations
    A, g, energy, total, count = (x.double() for x in (e.H, e.g, e.cost, e.total_weight, e.num_observations))
    finite = A.isfinite().flatten(-2).all(-1) & g.isfinite().all(-1) & energy.isfinite() & total.isfinite()
    usable = finite & (total > 0)
    A = torch.where(usable[..., None, None], A, torch.zeros_like(A))
    g = torch.where(usable[..., None], g, torch.zeros_like(g))
    energy, total, count = (torch.where(usable, x, torch.zeros_like(x)) for x in (energy, total, count))
    return A, g, energy, total, count, finite


def _check_problem(joint_scale: Tensor, bounds: tuple[Tensor, Tensor] | None, prior: Prior | None) -> None:
    if not ((joint_scale > 0) & joint_scale.isfinite()).all():
        raise InputError("every unit must be a positive number")
    if bounds is not None and (bounds[0] > bounds[1]).any():
        raise InputError("a lower bound is above its upper bound; joint_bounds makes bounds that fit together")
    if prior is not None and (prior.std <= 0).any():
        raise InputError("the prior's standard deviation must be positive; to hold a joint give equal bounds")


def _scale_problem(
    g: Tensor, joint_scale: Tensor, bounds: tuple[Tensor, Tensor] | None, prior: Prior | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Bool[Tensor, "*batch"]]:
    """Prior mean and stiffness, lower and upper bound, each (*batch, n) in units; which items are free of NaN."""
    mean, stiffness, lower, upper = torch.zeros_like(g), torch.zeros_like(g), None, None
    finite = torch.ones_like(g, dtype=torch.bool)
    if prior is not None:
        mean = (prior.mean.to(g) / joint_scale).expand_as(g)
        stiffness = ((prior.flow_std * joint_scale / prior.std.to(g)) ** 2).expand_as(g)
        finite = mean.isfinite() & stiffness.isfinite()
        mean, stiffness = (torch.where(finite, x, torch.zeros_like(x)) for x in (mean, stiffness))
    if bounds is not None:
        lower, upper = ((b.to(g) / joint_scale).expand_as(g) for b in bounds)
        bounded = ~(lower.isnan() | upper.isnan())
        lower, upper = (torch.where(bounded, x, torch.zeros_like(x)) for x in (lower, upper))
        finite = finite & bounded
    return mean, stiffness, lower, upper, finite.all(-1)


def _mark_unknown(unknown: Bool[Tensor, "*batch n"], covariance: Tensor) -> Tensor:
    """The covariance with infinite variance, and no covariance, for joints of which nothing is known."""
    off = unknown[..., :, None] | unknown[..., None, :]
    covariance = torch.where(off, torch.zeros_like(covariance), covariance)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    return covariance + torch.diag_embed(torch.where(unknown, torch.full_like(diagonal, torch.inf), 0.0))


def _observability(inverse: Tensor, total: Tensor) -> Tensor:
    """Root mean square image motion of each joint that the others cannot imitate: sqrt(1 / inv(A)_kk / sum w)."""
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    # Rounding can leave a singular matrix with a negative eigenvalue: nothing is known of such a joint either.
    information = torch.where(diagonal > 0, 1 / diagonal.clamp(min=1e-300), torch.zeros_like(diagonal))
    return (information / total[..., None].clamp(min=1e-30)).clamp(min=1e-30).sqrt()


def _flat(x: Tensor, batch: torch.Size, n: int) -> Tensor:
    return x.expand(*batch, n).reshape(-1, n)


_Record = TypeVar("_Record", bound="NormalEquations | Solution")


def _unflatten(record: _Record, batch: torch.Size) -> _Record:
    """The same record with the flat batch axis of every field unfolded again."""
    return type(record)(**{name: x.reshape((*batch, *x.shape[1:])) for name, x in vars(record).items()})


def _mark_not_finite(solution: Solution, where: Bool[Tensor, "*batch"]) -> Solution:
    """The same solution with the items `where` withdrawn."""
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
