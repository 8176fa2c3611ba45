"""A motion that stays inside limits at every instant and is made up as it goes.

The motion is a uniform cubic B-spline. Its position, velocity, acceleration and jerk are averages, with positive weights,
of the differences of its control points, divided by powers of the knot spacing (de Boor 1978, "A Practical Guide to
Splines"). So control points whose differences obey the limits make a motion that does, between the knots too.

Control points to come are chosen by a quadratic program: near the path that is wanted, with little jerk, inside the
limits, at rest in the end. The plan is replaced whenever more is known of the path; as the old plan, held at its end, is
always one that keeps the limits, there always is one, and no motion has to be cut afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from jidm.control.limits import MotionLimits
from jidm.errors import InputError

_PAST = 1  # control points kept so that the last knot can still be asked for
_FIXED = 3  # control points before the free ones that bear on what is to come
_MARGIN = 1e-6  # share of each limit left free, so that rounding never reaches it


@dataclass(frozen=True, eq=False)
class TrajectoryState:
    """Where a motion is at M instants, each (M, n) [rad or m, per s, per s^2]."""

    position: NDArray[np.float64]
    velocity: NDArray[np.float64]
    acceleration: NDArray[np.float64]


class LimitedSpline:
    """A motion of n joints, at rest in the beginning.

    Args:
        limits: kept at every instant. A joint that begins outside its positions is let back in.
        q: (n,) where it begins [rad or m].
        knot: spacing of the knots [s].
        ahead: how far plans reach [s]; what is not braked within it is not begun.
        bandwidth: what is faster in the path is smoothed away [Hz], at half the amplitude there.
        time: of the beginning [s].

    Attributes:
        time: up to here the motion is fixed [s].
    """

    def __init__(
        self, limits: MotionLimits, q: ArrayLike, *, knot: float, horizon: float = 0.8, bandwidth: float = 4.0,
        time: float = 0.0,
    ) -> None:  # fmt: skip
        start = np.array(q, dtype=np.float64)
        if start.shape != (limits.n,) or not np.isfinite(start).all():
            raise InputError(f"the motion must begin at {limits.n} finite joint positions, got {start}")
        if not (0 < knot < horizon < math.inf and bandwidth > 0):
            raise InputError(
                f"knot {knot}, ahead {horizon} and bandwidth {bandwidth} must be positive, ahead the longest"
            )
        self.limits, self.knot, self.time = limits, knot, time
        self._m = max(_FIXED, round(horizon / knot))
        self._control_points = np.tile(start, (_PAST + _FIXED + self._m, 1))
        self._qp = _SplineQP(limits, knot, self._m, bandwidth)

    @property
    def planned_times(self) -> NDArray[np.float64]:
        """(m,) times at which the path to come is asked for: those of the control points that are still free [s]."""
        return self.time + self.knot * np.arange(2.0, self._m + 2)

    def replan(self, reference: ArrayLike, weight: ArrayLike) -> None:
        """Plan anew.

        Args:
            reference: (m, n) where the joints are wanted at the `planned` times [rad or m]; clipped to their range.
            weight: (m,) how much that counts, from 0 to 1.
        """
        target, weights = np.asarray(reference, dtype=np.float64), np.asarray(weight, dtype=np.float64)
        past, plan = self._control_points[_PAST : -self._m], self._control_points[-self._m :]
        if target.shape != plan.shape or weights.shape != plan.shape[:1]:
            raise InputError(
                f"path must be {plan.shape} and weight {plan.shape[:1]}, got {target.shape}, {weights.shape}"
            )
        if not (np.isfinite(target).all() and np.isfinite(weights).all() and (weights >= 0).all()):
            raise InputError("path and weight must be finite, and no weight negative")
        target = np.clip(target, self.limits.lower, self.limits.upper)
        bounds = self._bounds()
        found = self._qp.solve(past, target, weights, bounds)
        if found is not None:
            plan += self._feasible_fraction(found - plan, bounds) * (found - plan)

    def advance(self, knots: int = 1) -> None:
        """Fix so many knots more of the plan; beyond its end the robot rests."""
        for _ in range(knots):
            self._control_points = np.concatenate([self._control_points[1:], self._control_points[-1:]])
        self.time += knots * self.knot

    def at(self, times: ArrayLike) -> TrajectoryState:
        """The motion from the last knot before `time` on [s]: as planned after `time`, at rest beyond the plan.

        Raises:
            InputError: that is in the past.
        """
        knot_index = (np.atleast_1d(np.asarray(times, dtype=np.float64)) - self.time) / self.knot + _PAST
        if not (knot_index > -1e-6).all():
            raise InputError(f"the motion is known from {self.time - self.knot} s on, asked for {np.min(times)} s")
        last = len(self._control_points) - _FIXED
        knot_index = np.clip(knot_index, 0, last)
        span = np.minimum(knot_index.astype(int), last - 1)
        u = (knot_index - span)[:, None]
        p0, p1, p2, p3 = (self._control_points[span + k] for k in range(4))
        position = ((1 - u) ** 3 * p0 + (3 * u**3 - 6 * u**2 + 4) * p1 + (-3 * u**3 + 3 * u**2 + 3 * u + 1) * p2 + u**3 * p3) / 6  # fmt: skip
        velocity = (-((1 - u) ** 2) * p0 + (3 * u**2 - 4 * u) * p1 + (-3 * u**2 + 2 * u + 1) * p2 + u**2 * p3) / 2
        acceleration = (1 - u) * p0 + (3 * u - 2) * p1 + (1 - 3 * u) * p2 + u * p3
        return TrajectoryState(position, velocity / self.knot, acceleration / self.knot**2)

    def shift(self, offset: ArrayLike) -> None:
        """Believe the robot to be off by this much, (n,) [rad or m]: where it goes from is corrected, how it moves is not."""
        self._control_points += np.asarray(offset, dtype=np.float64)

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper limits of the positions, as wide as the plan at hand needs them."""
        margin = _MARGIN * np.where(
            np.isfinite(self.limits.upper - self.limits.lower), self.limits.upper - self.limits.lower, 0
        )
        low, high = self.limits.lower + margin, self.limits.upper - margin
        return np.minimum(low, self._control_points.min(0)), np.maximum(high, self._control_points.max(0))

    def _feasible_fraction(
        self, change: NDArray[np.float64], bounds: tuple[NDArray[np.float64], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """(n,) largest share of a change of the plan, up to 1, with which every limit is kept."""
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
    """The quadratic program of one plan. Its structure never changes, so it is built once and given new numbers each time.

    Unknowns are a joint's m control points to come, counted from its last one in a unit of its own; joint by joint.
    """

    def __init__(self, limits: MotionLimits, knot: float, m: int, bandwidth: float) -> None:
        import clarabel

        self.difference_limits = [
            (1 - _MARGIN) * x * knot**order
            for order, x in enumerate((limits.velocity, limits.acceleration, limits.jerk), start=1)
        ]
        self._joint_scale = np.where(np.isfinite(self.difference_limits[0]), self.difference_limits[0], knot)
        self._m, n = m, limits.n
        differences = [_difference_matrix(m + _FIXED, order)[_FIXED - order :] for order in range(4)]
        self._fixed_differences = sp.vstack([d[:, :_FIXED] for d in differences]).tocsr()
        free = sp.vstack([d[:, _FIXED:] for d in differences]).tocsr()
        has_limit = [np.isfinite(x) for x in self.difference_limits]
        # (4 m, n): rows with a limit
        self._has_upper = np.repeat(np.stack([np.isfinite(limits.upper), *has_limit]), m, axis=0)
        self._has_lower = np.repeat(np.stack([np.isfinite(limits.lower), *has_limit]), m, axis=0)
        inequalities = [
            sp.vstack([free[up], -free[down]]) for up, down in zip(self._has_upper.T, self._has_lower.T, strict=True)
        ]
        terminal = sp.block_diag([differences[1][-2:, _FIXED:]] * n)
        matrix = sp.vstack([terminal, sp.block_diag(inequalities)]).tocsc()
        self._num_equalities = terminal.shape[0]
        # sum (x - r)^2 + c |third difference|^2 passes half the amplitude where c (2 pi f knot)^6 = 1
        self._jerk_gradient = 2 * (2 * math.pi * bandwidth * knot) ** -6 * differences[3][:, _FIXED:].T
        hessian = sp.triu(
            sp.block_diag([self._jerk_gradient @ differences[3][:, _FIXED:] + sp.eye_array(m)] * n)
        ).tocsc()
        hessian.sort_indices()
        column = np.repeat(np.arange(n * m), np.diff(hessian.indptr))
        self._diagonal = np.flatnonzero(hessian.indices == column)  # by column, each has one
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
        """(m, n) control points; None where the solver finds none."""
        last_point, n = past[-1], past.shape[1]
        fixed = (past - last_point) / self._joint_scale  # (3, n)
        linear = (
            self._jerk_gradient @ (self._fixed_jerk @ fixed)
            - 2 * weight[:, None] * (reference - last_point) / self._joint_scale
        )
        before = self._fixed_differences @ fixed  # (4 m, n): what the past contributes to every difference
        scaled_limits = [x / self._joint_scale for x in self.difference_limits]
        above = (
            np.repeat(np.stack([(bounds[1] - last_point) / self._joint_scale, *scaled_limits]), self._m, axis=0)
            - before
        )
        below = (
            np.repeat(
                np.stack([(bounds[0] - last_point) / self._joint_scale, *(-x for x in scaled_limits)]), self._m, axis=0
            )
            - before
        )
        ends = [end for k in range(n) for end in (above[self._has_upper[:, k], k], -below[self._has_lower[:, k], k])]
        hessian = self._hessian.copy()
        hessian[self._diagonal] += 2 * np.tile(weight, n) - 1
        self._solver.update(P=hessian, q=linear.T.ravel(), b=np.concatenate([np.zeros(self._num_equalities), *ends]))
        solution = self._solver.solve()
        if str(solution.status) not in ("Solved", "AlmostSolved"):
            return None
        found = np.array(solution.x).reshape(n, self._m).T * self._joint_scale + last_point
        return found if np.isfinite(found).all() else None


def _difference_matrix(count: int, order: int) -> sp.csr_array:
    """(count - order, count) matrix of finite differences."""
    matrix = sp.eye_array(count, format="csr")
    for _ in range(order):
        matrix = matrix[1:] - matrix[:-1]
    return matrix.tocsr()
