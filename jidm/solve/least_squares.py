"""Weighted, robust, damped, bounded least squares from optical flow to a joint step, batched and differentiable.

    argmin_d  sum_i w_i rho(|J_i d - f_i|)  +  ridge * mean(diag(J'WJ)) * |d / unit|^2   subject to  lower <= d <= upper

`normal_equations` builds the problem in one pass over the Jacobian field, `solve_normal_equations` solves it, and
`solve_flow` does both with robust re-weighting. Problems of several cameras add up: `equations_a + equations_b`.

Normal equations square the condition number of J. They are formed in the input's dtype and solved in float64; at
cond(J) above 1e3 in float32 give float64 input.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jidm.errors import InputError

# Pixels a pass: small enough that the weighted copy of J stays in the processor's cache (J is then read once).
_CHUNK = 4096
# The residual scale (a median) is taken over at most about this many pixels.
_MEDIAN_SAMPLES = 4096
_RAYLEIGH_MEDIAN = 1.17741  # median length of a 2-vector with unit normal components
_TUKEY = 4.685  # 95 % efficiency at the normal distribution (Huber 1981)
_CAUCHY = 2.385  # likewise


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
        matrix: (*batch, n, n) sum of w J'J [px^2 per unit^2].
        vector: (*batch, n) sum of w J'f [px^2 per unit].
        energy: (*batch,) sum of w |f|^2 [px^2].
        total_weight: (*batch,) sum of w.
        count: (*batch,) number of pixels with w > 0.
    """

    matrix: Float[Tensor, "*batch n n"]
    vector: Float[Tensor, "*batch n"]
    energy: Float[Tensor, "*batch"]
    total_weight: Float[Tensor, "*batch"]
    count: Float[Tensor, "*batch"]

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Two problems about the same joints solved as one, for instance two cameras."""
        return NormalEquations(
            self.matrix + other.matrix,
            self.vector + other.vector,
            self.energy + other.energy,
            self.total_weight + other.total_weight,
            self.count + other.count,
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
        explained: (*batch,) share of the flow's energy the step explains, in [0, 1].
        motion: (*batch, n) root mean square image motion [px per unit] of each joint that no combination of the other
            joints can imitate: its observability.
        observable: (*batch, n) whether `motion` reaches the asked minimum.
        at_bound: (*batch, n) joints that stopped at a bound.
        status: (*batch,) `Status` values.
        valid: (*batch,) whether delta_q may be used (status OK or UNOBSERVABLE).
    """

    delta_q: Float[Tensor, "*batch n"]
    covariance: Float[Tensor, "*batch n n"]
    residual: Float[Tensor, "*batch"]
    explained: Float[Tensor, "*batch"]
    motion: Float[Tensor, "*batch n"]
    observable: Bool[Tensor, "*batch n"]
    at_bound: Bool[Tensor, "*batch n"]
    status: Int[Tensor, "*batch"]

    @property
    def valid(self) -> Bool[Tensor, "*batch"]:
        return self.status <= Status.UNOBSERVABLE


def normal_equations(jacobian: Tensor, flow: Tensor, weight: Tensor | None = None) -> NormalEquations:
    """Build the least-squares problem in one pass over the field.

    Args:
        jacobian: dense (*batch, 2, n, H, W) or at points (*batch, N, 2, n) [px per rad or m].
        flow: (*batch, 2, H, W) or (*batch, N, 2) [px].
        weight: (*batch, H, W) or (*batch, N), non-negative; 0 = ignore, also a NaN flow there. All 1 if not given.

    Dense input is told from points by its number of dimensions relative to `flow`.
    """
    batch, J, f, w = _as_rows(jacobian, flow, weight)
    return _unflatten(_accumulate(J, f, w), batch)


def solve_normal_equations(
    equations: NormalEquations,
    *,
    ridge: float = 1e-6,
    unit: Float[Tensor, " n"] | None = None,
    bounds: tuple[Float[Tensor, "*#batch n"], Float[Tensor, "*#batch n"]] | None = None,
    prior: Prior | None = None,
    min_motion: float = 2.0,
    correlated_pixels: float = 1.0,
) -> Solution:
    """Solve `equations` with damping, prior and bounds.

    Args:
        ridge: damping relative to the mean diagonal of J'WJ (in `unit`s), so the answer does not depend on how many
            pixels there are or how weights are scaled.
        unit: (n,) a typical motion of each joint, to compare rad with m; 1 if not given.
        bounds: lower and upper bound of delta_q, applied inside the solve (`joint_bounds` makes them).
        prior: Gaussian prior on the step.
        min_motion: a joint is observable if moving it by its `unit` moves the image by this much [px rms over the
            weighted pixels] in a way the other joints cannot imitate.
        correlated_pixels: how many neighbouring pixels share one flow error; scales the covariance.
    """
    out = equations.vector.dtype
    A, g = equations.matrix.double(), equations.vector.double()
    energy, total, count = equations.energy.double(), equations.total_weight.double(), equations.count.double()
    n = g.shape[-1]
    finite = A.isfinite().flatten(-2).all(-1) & g.isfinite().all(-1) & energy.isfinite() & total.isfinite()
    usable = finite & (total > 0)
    A = torch.where(usable[..., None, None], A, torch.zeros_like(A))
    g = torch.where(usable[..., None], g, torch.zeros_like(g))
    energy, total = (torch.where(usable, x, torch.zeros_like(x)) for x in (energy, total))
    count = torch.where(usable, count, torch.zeros_like(count))

    unit = torch.ones(n, dtype=A.dtype, device=A.device) if unit is None else unit.to(A)
    A, g = A * unit[:, None] * unit, g * unit  # from here on joints are counted in units
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    mean_diagonal = A.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    # The absolute term only keeps an all-zero problem regular; its answer is zero (or the prior's mean).
    damped = A + (ridge * mean_diagonal + torch.finfo(A.dtype).tiny ** 0.5) * eye
    if prior is not None:
        stiffness = (prior.flow_std * unit / prior.std.to(A)) ** 2
        damped, g = damped + torch.diag_embed(stiffness.expand_as(g)), g + stiffness * prior.mean.to(A) / unit
    lower, upper = (None, None) if bounds is None else (b.to(A) / unit for b in bounds)
    x, at_bound = bounded_solve(damped, g, lower, upper)

    # `g` may hold the prior's pull, so the residual is taken from the data terms alone.
    data_vector = equations.vector.double() * unit
    data_vector = torch.where(usable[..., None], data_vector, torch.zeros_like(data_vector))
    left = (energy - 2 * (x * data_vector).sum(-1) + torch.einsum("...i,...ij,...j->...", x, A, x)).clamp(min=0)
    variance = left / (2 * count - n).clamp(min=1) * correlated_pixels
    inverse = torch.linalg.inv(damped)
    covariance = variance[..., None, None] * inverse * unit[:, None] * unit
    covariance = torch.where(usable[..., None, None], covariance, torch.diag(torch.full_like(unit, torch.inf)))
    motion = _independent_motion(A, total, mean_diagonal, eye)
    observable = (motion >= min_motion) & usable[..., None]
    status = torch.where(observable.all(-1), Status.OK, Status.UNOBSERVABLE)
    status = torch.where(finite & (total <= 0), int(Status.NO_DATA), status)
    status = torch.where(finite, status, int(Status.NOT_FINITE))
    delta_q = torch.where(finite[..., None], x * unit, torch.zeros_like(x))
    return Solution(
        delta_q=delta_q.to(out),
        covariance=covariance.to(out),
        residual=(left / total.clamp(min=1e-30)).clamp(min=1e-30).sqrt().to(out) * (total > 0),
        explained=(1 - left / energy.clamp(min=1e-30)).clamp(0, 1).to(out) * usable,
        motion=(motion / unit).to(out),
        observable=observable,
        at_bound=at_bound & usable[..., None],
        status=status,
    )


def solve_flow(
    jacobian: Tensor,
    flow: Tensor,
    weight: Tensor | None = None,
    *,
    robust: Literal["tukey", "cauchy"] | None = "tukey",
    iterations: int = 6,
    ridge: float = 1e-6,
    unit: Float[Tensor, " n"] | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    prior: Prior | None = None,
    min_motion: float = 2.0,
    correlated_pixels: float = 1.0,
) -> Solution:
    """Joint step that best explains a flow field.

    Args:
        jacobian, flow, weight: as for `normal_equations`. Give weight 0 off the robot: those pixels say nothing about
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
    batch, J, f, w = _as_rows(jacobian, flow, weight)
    flat_bounds = None if bounds is None else tuple(_flat(b, batch, J.shape[-2]) for b in bounds)
    flat_prior = prior and Prior(
        _flat(prior.mean, batch, J.shape[-2]), _flat(prior.std, batch, J.shape[-2]), prior.flow_std
    )

    def solved(equations: NormalEquations) -> Solution:
        return solve_normal_equations(
            equations,
            ridge=ridge,
            unit=unit,
            bounds=flat_bounds,  # type: ignore[arg-type]
            prior=flat_prior,
            min_motion=min_motion,
            correlated_pixels=correlated_pixels,
        )

    equations = _accumulate(J, f, w)
    solution = solved(equations)
    bad = solution.status == Status.NOT_FINITE
    if bad.any():
        # Emptied here, so that a NaN of one item reaches nobody's gradient.
        J = torch.where(bad[:, None, None, None], torch.zeros_like(J), J)
        f = torch.where(bad[:, None, None], torch.zeros_like(f), f)
        w = torch.where(bad[:, None], torch.zeros_like(w), w)
    if robust is not None:
        for k in range(iterations):
            r = _residual(J, f, solution.delta_q)
            tukey = robust == "tukey" and k >= iterations // 2
            w_robust = w * _robust_weight(r, w, tukey)
            equations = _accumulate(J, f, w_robust)
            solution = solved(equations)
    if bad.any():
        solution = _with_status(solution, bad, Status.NOT_FINITE)
    return _unflatten(solution, batch)


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


def _as_rows(
    jacobian: Tensor, flow: Tensor, weight: Tensor | None
) -> tuple[torch.Size, Float[Tensor, "B 2 n P"], Float[Tensor, "B 2 P"], Float[Tensor, "B P"]]:
    """One layout for dense fields and points, as views: batch flattened, pixels last."""
    if jacobian.dim() == flow.dim() + 1 and flow.dim() >= 3 and jacobian.shape[-2:] == flow.shape[-2:]:
        dense = flow.shape[-3] == 2 and jacobian.shape[-4] == 2
    else:
        dense = False
    if dense:
        batch = flow.shape[:-3]
        J, f = jacobian.flatten(-2), flow.flatten(-2)
        expected_weight = (*batch, *flow.shape[-2:])
    elif jacobian.dim() == flow.dim() + 1 and flow.shape[-1] == 2 and jacobian.shape[:-1] == flow.shape:
        batch = flow.shape[:-2]
        J, f = jacobian.movedim(-3, -1), flow.transpose(-1, -2)
        expected_weight = flow.shape[:-1]
    else:
        raise InputError(
            "jacobian and flow must be (*batch, 2, n, H, W) with (*batch, 2, H, W), or (*batch, N, 2, n) with "
            f"(*batch, N, 2); got {tuple(jacobian.shape)} and {tuple(flow.shape)}"
        )
    if jacobian.shape[: len(batch)] != batch:
        raise InputError(f"jacobian {tuple(jacobian.shape)} and flow {tuple(flow.shape)} differ in batch shape")
    if weight is None:
        weight = torch.ones(expected_weight, dtype=flow.dtype, device=flow.device)
    if tuple(weight.shape) != tuple(expected_weight):
        raise InputError(f"weight must be {tuple(expected_weight)} for this flow, got {tuple(weight.shape)}")
    w = weight.to(f.dtype).reshape(-1, f.shape[-1])
    f = f.reshape(-1, 2, f.shape[-1])
    f = torch.where((w > 0)[:, None], f, torch.zeros_like(f))  # 0 * NaN is NaN
    return batch, J.to(f.dtype).reshape(-1, *J.shape[-3:]), f, w


def _accumulate(J: Float[Tensor, "B 2 n P"], f: Float[Tensor, "B 2 P"], w: Float[Tensor, "B P"]) -> NormalEquations:
    matrix: Tensor | float = 0.0
    vector: Tensor | float = 0.0
    for start in range(0, max(J.shape[-1], 1), _CHUNK):
        part = slice(start, start + _CHUNK)
        x = J[..., part]
        weighted = x * w[:, None, None, part]
        matrix = matrix + (weighted @ x.transpose(-1, -2)).sum(1)
        vector = vector + (weighted @ f[:, :, part, None]).sum((1, 3))
    assert isinstance(matrix, Tensor) and isinstance(vector, Tensor)
    return NormalEquations(matrix, vector, (w[:, None] * f**2).sum((1, 2)), w.sum(-1), (w > 0).sum(-1).to(w.dtype))


def _residual(J: Tensor, f: Tensor, delta_q: Float[Tensor, "B n"]) -> Float[Tensor, "B P"]:
    """Length of the flow left unexplained at every pixel [px]."""
    r = f - (delta_q.to(J)[:, None, None, :] @ J).squeeze(-2)
    return (r.square().sum(1) + torch.finfo(r.dtype).tiny ** 0.5).sqrt()  # sqrt'(0) is infinite


def _robust_weight(r: Float[Tensor, "B P"], w: Float[Tensor, "B P"], tukey: bool) -> Float[Tensor, "B P"]:
    stride = max(1, r.shape[-1] // _MEDIAN_SAMPLES)
    sampled = torch.where(w[:, ::stride] > 0, r[:, ::stride], torch.nan)
    scale = sampled.nanmedian(dim=-1, keepdim=True).values.nan_to_num(0.0) / _RAYLEIGH_MEDIAN
    # Below a thousandth of a pixel every residual is as good as zero.
    t = r / scale.clamp(min=1e-3)
    if tukey:
        return (1 - (t / _TUKEY) ** 2).clamp(min=0) ** 2
    return 1 / (1 + (t / _CAUCHY) ** 2)


def bounded_solve(
    H: Float[Tensor, "*batch n n"], g: Float[Tensor, "*batch n"], lower: Tensor | None, upper: Tensor | None
) -> tuple[Float[Tensor, "*batch n"], Bool[Tensor, "*batch n"]]:
    """argmin x'Hx/2 - g'x in a box, by an active set; differentiable with the final set held (exact almost everywhere).

    Each sweep fixes joints that left the box at the bound they crossed and frees those whose gradient points back in;
    for the well-conditioned, damped H here it settles in a few sweeps, and the last clamp only guards rounding.
    """
    if lower is None or upper is None:
        return torch.linalg.solve(H, g), torch.zeros_like(g, dtype=torch.bool)
    lower, upper = lower.expand_as(g), upper.expand_as(g)
    n = g.shape[-1]
    with torch.no_grad():
        side = torch.zeros_like(g)  # -1 held at lower, +1 at upper
        for _ in range(3 * n):
            x = _solve_with_held(H, g, side, lower, upper)
            pull = g - torch.einsum("...ij,...j->...i", H, x)  # > 0 wants to grow
            stays = side * pull > 0
            new = torch.where(side != 0, side * stays, (x > upper).to(g) - (x < lower).to(g))
            if torch.equal(new, side):
                break
            side = new
    x = _solve_with_held(H, g, side, lower, upper)
    return torch.minimum(torch.maximum(x, lower), upper), side != 0


def _solve_with_held(H: Tensor, g: Tensor, side: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    held = side != 0
    value = torch.where(side > 0, upper, torch.where(side < 0, lower, torch.zeros_like(g)))
    free = (~held).to(H)
    H_free = H * free[..., :, None] * free[..., None, :] + torch.diag_embed(held.to(H))
    right = torch.where(held, value, g - torch.einsum("...ij,...j->...i", H, value))
    return torch.linalg.solve(H_free, right)


def _independent_motion(A: Tensor, total: Tensor, mean_diagonal: Tensor, eye: Tensor) -> Tensor:
    """Root mean square image motion of each joint that the others cannot imitate: sqrt(1 / inv(A)_kk / sum w)."""
    # A whisper of damping (a 1e-12 part) keeps the inverse defined; a truly unseen joint then reports about 1e-6 of
    # the mean motion.
    inverse = torch.linalg.inv(A + (1e-12 * mean_diagonal + torch.finfo(A.dtype).tiny ** 0.5) * eye)
    information = 1 / inverse.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(A.dtype).tiny)
    return (information / total[..., None].clamp(min=1e-30)).clamp(min=1e-30).sqrt()


def _flat(x: Tensor, batch: torch.Size, n: int) -> Tensor:
    return x.expand(*batch, n).reshape(-1, n)


_Record = TypeVar("_Record", bound="NormalEquations | Solution")


def _unflatten(record: _Record, batch: torch.Size) -> _Record:
    """The same record with the flat batch axis of every field unfolded again."""
    return type(record)(**{name: x.reshape((*batch, *x.shape[1:])) for name, x in vars(record).items()})


def _with_status(solution: Solution, where: Bool[Tensor, " B"], status: Status) -> Solution:
    n = solution.delta_q.shape[-1]
    unknown = torch.diag(torch.full((n,), torch.inf)).to(solution.covariance)
    return Solution(
        delta_q=torch.where(where[:, None], torch.zeros_like(solution.delta_q), solution.delta_q),
        covariance=torch.where(where[:, None, None], unknown, solution.covariance),
        residual=solution.residual,
        explained=solution.explained,
        motion=solution.motion,
        observable=solution.observable & ~where[:, None],
        at_bound=solution.at_bound & ~where[:, None],
        status=torch.where(where, int(status), solution.status),
    )
