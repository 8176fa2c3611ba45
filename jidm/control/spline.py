"""A uniform cubic B-spline that follows a reference online and keeps joint limits at every instant.

Position, velocity, acceleration and jerk of a B-spline are convex combinations of its control points' differences, divided
by powers of the knot spacing (de Boor 1978, "A Practical Guide to Splines"). If the control points' differences obey the
limits, so does the motion, also between the knots.

Future control points solve a quadratic program as in model predictive control: least squared distance to the reference
plus least squared jerk, subject to the limits and to rest at the end of the horizon. The plan is replaced whenever the
reference changes. The old plan, extended at rest, is always feasible, so a solution always exists and no motion is clipped
afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from jidm.control.limits import MotionLimits
from jidm.errors import InputError, MissingExtraError

_PAST = 1  # control points kept so that the last knot can still be evaluated
_FIXED = 3  # control points before the free ones that influence the future motion
_REENTRY = 0.2  # fraction of the distance outside by which a joint aims inside
_MARGIN = 1e-6  # fraction of each limit left free against rounding


@dataclass(frozen=True, eq=False)
class TrajectoryState:
    """State of a motion at M instants, each (M, n) [rad or m, per s, per s^2]."""

    position: NDArray[np.float64]
    velocity: NDArray[np.float64]
    acceleration: NDArray[np.float64]


class LimitedSpline:
    """A motion of n joints, at rest at time 0.

    Args:
        limits: kept at every instant. A joint that starts outside its position range is led back into it.
        q: (n,) initial joint positions [rad or m].
        knot: spacing of the knots [s].
        horizon: length of the plan [s]; the motion can brake to rest within it.
        bandwidth: faster components of the reference are smoothed away [Hz]; at this frequency half the amplitude is left.

    Attributes:
        time: the motion is fixed up to this time [s].

    Raises:
        InputError: q is not n finite numbers, or knot, horizon and bandwidth are not positive with knot < horizon.
    """

    def __init__(self, limits: MotionLimits, q: ArrayLike, *, knot: float, horizon: float, bandwidth: float) -> None:
        start = limits.as_positions(q)
        if not (0 < knot < horizon < math.inf and bandwidth > 0):
            raise InputError(
                f"knot {knot}, horizon {horizon} and bandwidth {bandwidth} must be positive, and knot below horizon"
            )
        self.limits, self.knot, self.time = limits, knot, 0.0
        self._m = max(_FIXED, round(horizon / knot))
        self._control_points = np.tile(start, (_PAST + _FIXED + self._m, 1))
        self._qp = _SplineQP(limits, knot, self._m, bandwidth)

    @property
    def planned_times(self) -> NDArray[np.float64]:
        """(m,) times of the control points that are still free [s]: where `replan` takes the reference."""
        return self.time + self.knot * np.arange(2.0, self._m + 2)

    def replan(self, reference: ArrayLike, weight: ArrayLike) -> None:
        """Replace the plan; the old one is kept where the solver fails.

        Args:
            reference: (m, n) desired joint positions at `planned_times` [rad or m]; clipped to the position range.
            weight: (m,) weight of each in the objective, from 0 to 1.

        Raises:
            InputError: they have another shape, are not finite, or a weight is negative.
        """
        target, weights = np.asarray(reference, dtype=np.float64), np.asarray(weight, dtype=np.float64)
        past, plan = self._control_points[_PAST : -self._m], self._control_points[-self._m :]
        if target.shape != plan.shape or weights.shape != plan.shape[:1]:
            raise InputError(
                f"reference must be {plan.shape} and weight {plan.shape[:1]}, got {target.shape}, {weights.shape}"
            )
        if not (np.isfinite(target).all() and np.isfinite(weights).all() and (weights >= 0).all()):
            raise InputError("reference and weight must be finite, and no weight negative")
        # A joint on its way back into its range aims further inside, so that it does not swing out again.
        lower = self.limits.lower + _REENTRY * np.maximum(0, self.limits.lower - plan.min(0))
        upper = self.limits.upper - _REENTRY * np.maximum(0, plan.max(0) - self.limits.upper)
        target, bounds = np.clip(target, lower, upper), self._bounds(plan)
        solution = self._qp.solve(past, target, weights, bounds)
        if solution is not None:
            plan += self._feasible_fraction(solution - plan, bounds) * (solution - plan)

    def advance(self, knots: int = 1) -> None:
        """Fix the next knots of the plan; beyond its end the robot rests."""
        self._control_points = np.pad(self._control_points, ((0, knots), (0, 0)), mode="edge")[knots:]
        self.time += knots * self.knot

    def at(self, times: ArrayLike) -> TrajectoryState:
        """State of the motion: as planned after `time`, at rest beyond the plan.

        Args:
            times: (M,) not earlier than the last knot before `time` [s].

        Raises:
            InputError: a time is earlier.
        """
        knot_index = (np.atleast_1d(np.asarray(times, dtype=np.float64)) - self.time) / self.knot + _PAST
        if not (knot_index > -1e-6).all():
            raise InputError(f"the motion is known from {self.time - self.knot} s on, not at {np.min(times)} s")
        # Beyond the plan the motion is that of `advance`: the end of a plan is at rest to the solver's accuracy only.
        points = np.pad(self._control_points, ((0, _FIXED), (0, 0)), mode="edge")
        last = len(points) - _FIXED
        knot_index = np.clip(knot_index, 0, last)
        span = np.minimum(knot_index.astype(int), last - 1)
        u = (knot_index - span)[:, None]
        p0, p1, p2, p3 = (points[span + k] for k in range(4))
        position = ((1 - u) ** 3 * p0 + (3 * u**3 - 6 * u**2 + 4) * p1 + (-3 * u**3 + 3 * u**2 + 3 * u + 1) * p2 + u**3 * p3) / 6  # fmt: skip
        velocity = (-((1 - u) ** 2) * p0 + (3 * u**2 - 4 * u) * p1 + (-3 * u**2 + 2 * u + 1) * p2 + u**2 * p3) / 2
        acceleration = (1 - u) * p0 + (3 * u - 2) * p1 + (1 - 3 * u) * p2 + u * p3
        return TrajectoryState(position, velocity / self.knot, acceleration / self.knot**2)

    def shift(self, offset: ArrayLike) -> NDArray[np.float64]:
        """Move the whole motion by offset (n,) [rad or m], or less where it would leave its position range; its velocity stays.

        Returns:
            (n,) by how much it was moved [rad or m].
        """
        points = self._control_points  # the fixed ones as well: the motion up to the free ones depends on them
        low, high = self._bounds(points)
        applied = np.clip(np.asarray(offset, dtype=np.float64), (low - points).max(0), (high - points).min(0))
        self._control_points += applied
        return applied

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _bounds(self, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(k, n) lower and upper bounds of control points (k, n): the limits, or where the points are outside of them."""
        span = self.limits.upper - self.limits.lower
        margin = _MARGIN * np.where(np.isfinite(span), span, 0)
        return np.minimum(self.limits.lower + margin, points), np.maximum(self.limits.upper - margin, points)

    def _feasible_fraction(
        self, change: NDArray[np.float64], bounds: tuple[NDArray[np.float64], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """(n,) largest fraction in [0, 1] of a change of the plan that keeps every limit."""
        fraction = np.ones(self.limits.n)
        padded = np.concatenate([np.zeros_like(self._control_points[: -self._m]), change])
        low, high = bounds
        for order, limit in enumerate((None, *self._qp.difference_limits)):
            current, delta = (np.diff(x, order, axis=0)[-self._m :] for x in (self._control_points, padded))
            below, above = (low, high) if limit is None else (-limit, limit)
            with np.errstate(divide="ignore", invalid="ignore"):
                room = np.where(
                    delta > 0, (above - current) / delta, np.where(delta < 0, (below - current) / delta, np.inf)
                )
            fraction = np.minimum(fraction, np.nan_to_num(room, nan=np.inf, posinf=np.inf).min(0))
        return fraction.clip(0, 1)


class _SplineQP:
    """The quadratic program of one plan (Clarabel). Its structure is constant: it is built once and updated with new numbers.

    Unknowns are the m future control points of each joint, relative to its last fixed one and divided by `_joint_scale`,
    joint by joint.
    """

    def __init__(self, limits: MotionLimits, knot: float, m: int, bandwidth: float) -> None:
        try:
            import clarabel
        except ImportError:
            raise MissingExtraError("planning commands inside limits", "clarabel", "control") from None

        self.difference_limits = [
            (1 - _MARGIN) * x * knot**order
            for order, x in enumerate((limits.velocity, limits.acceleration, limits.jerk), start=1)
        ]
        self._joint_scale = np.where(np.isfinite(self.difference_limits[0]), self.difference_limits[0], knot)
        self._m, n = m, limits.n
        points = np.eye(m + _FIXED)
        differences = [sp.csr_array(np.diff(points, order, axis=0)[_FIXED - order :]) for order in range(4)]
        self._fixed_differences = sp.vstack([d[:, :_FIXED] for d in differences]).tocsr()
        free = sp.vstack([d[:, _FIXED:] for d in differences]).tocsr()
        has_limit = [np.isfinite(x) for x in self.difference_limits]
        # (4 m, n): which rows have a limit
        self._has_upper = np.repeat(np.stack([np.isfinite(limits.upper), *has_limit]), m, axis=0)
        self._has_lower = np.repeat(np.stack([np.isfinite(limits.lower), *has_limit]), m, axis=0)
        inequalities = [
            sp.vstack([free[up], -free[down]]) for up, down in zip(self._has_upper.T, self._has_lower.T, strict=True)
        ]
        terminal = sp.block_diag([differences[1][-2:, _FIXED:]] * n)
        matrix = sp.vstack([terminal, sp.block_diag(inequalities)]).tocsc()
        self._num_equalities = terminal.shape[0]
        # The minimizer of sum (x - r)^2 + c |third difference|^2 has half the amplitude where c (2 pi f knot)^6 = 1.
        self._jerk_gradient = 2 * (2 * math.pi * bandwidth * knot) ** -6 * differences[3][:, _FIXED:].T
        hessian = sp.triu(
            sp.block_diag([self._jerk_gradient @ differences[3][:, _FIXED:] + sp.eye_array(m)] * n)
        ).tocsc()
        hessian.sort_indices()
        column = np.repeat(np.arange(n * m), np.diff(hessian.indptr))
        self._diagonal = np.flatnonzero(hessian.indices == column)  # one entry per column
        self._hessian, self._fixed_jerk = hessian.data, differences[3][:, :_FIXED]
        settings = clarabel.DefaultSettings()
        settings.verbose = settings.presolve_enable = False
        settings.max_threads = 1
        cones = [
            clarabel.ZeroConeT(self._num_equalities),
            clarabel.NonnegativeConeT(matrix.shape[0] - self._num_equalities),
        ]
        zeros = np.zeros(n * m), np.zeros(matrix.shape[0])
        self._solver = clarabel.DefaultSolver(hessian, zeros[0], matrix, zeros[1], cones, settings)

    def solve(
        self, past: NDArray[np.float64], reference: NDArray[np.float64], weight: NDArray[np.float64],
        bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
    ) -> NDArray[np.float64] | None:  # fmt: skip
        """(m, n) control points; None if the solver fails."""
        last_point, n = past[-1], past.shape[1]
        fixed = (past - last_point) / self._joint_scale  # (3, n)
        linear = (
            self._jerk_gradient @ (self._fixed_jerk @ fixed)
            - 2 * weight[:, None] * (reference - last_point) / self._joint_scale
        )
        before = self._fixed_differences @ fixed  # (4 m, n): the fixed points' part of every difference
        scaled_limits = [x / self._joint_scale for x in self.difference_limits]
        low, high = ((x - last_point) / self._joint_scale for x in bounds)
        largest = np.repeat(np.stack(scaled_limits), self._m, axis=0)
        upper, lower = np.concatenate([high, largest]) - before, np.concatenate([low, -largest]) - before
        ends = [end for k in range(n) for end in (upper[self._has_upper[:, k], k], -lower[self._has_lower[:, k], k])]
        hessian = self._hessian.copy()
        hessian[self._diagonal] += 2 * np.tile(weight, n) - 1
        self._solver.update(P=hessian, q=linear.T.ravel(), b=np.concatenate([np.zeros(self._num_equalities), *ends]))
        solution = self._solver.solve()
        if str(solution.status) not in ("Solved", "AlmostSolved"):
            return None
        points = np.array(solution.x).reshape(n, self._m).T * self._joint_scale + last_point
        return points if np.isfinite(points).all() else None
