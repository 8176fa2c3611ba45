"""Robust bounded least squares from flow to a joint step: symmetries, independent solvers, Monte Carlo, gradients, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from annotations import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from torch import Tensor

from jidm.errors import InputError
from jidm.estimation.box_qp import solve_box_qp
from jidm.estimation.factors.flow import normal_equations
from jidm.estimation.solver import Solution, Status, solve_flow, solve_normal_equations

N = 5


def problem(*batch: int, points: int = 400, n: int = N, noise: float = 0.0, seed: int = 0, dtype=torch.float64):
    """Jacobian (*batch, points, 2, n) of about 100 px per unit, the step, and the flow it makes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    J, d = 100 * normal(points, 2, n), 0.03 * normal(n)
    f = torch.einsum("...pak,...k->...pa", J, d) + noise * normal(points, 2)
    return J.to(dtype), d.to(dtype), f.to(dtype)


def dense(J: Tensor, f: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """The same pixels as images of that height."""
    return J.movedim(-3, -1).unflatten(-1, (height, -1)), f.movedim(-2, -1).unflatten(-1, (height, -1))


def same(a: Solution, b: Solution, tolerance: float = 1e-9) -> None:
    for key, value in vars(a).items():
        torch.testing.assert_close(value, getattr(b, key), rtol=tolerance, atol=tolerance * 1e-3, msg=key)


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("robust", [None, "cauchy", "tukey"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)])
def test_a_step_is_recovered_from_its_own_flow(batch, robust) -> None:
    J, d, f = problem(*batch)
    solution = solve_flow(J, f, robust=robust, ridge=0.0)
    torch.testing.assert_close(solution.delta_q, d, rtol=1e-9, atol=1e-12)
    assert solution.valid.all() and solution.observable.all() and (solution.status == Status.OK).all()
    assert solution.status.shape == batch and solution.covariance.shape == (*batch, N, N)
    assert (solution.residual < 1e-6).all() and (solution.explained_fraction > 1 - 1e-9).all()


def test_the_default_ridge_changes_the_solution_by_a_millionth() -> None:
    J, d, f = problem()
    assert (solve_flow(J, f).delta_q - d).abs().max() < 3e-6 * d.abs().max()


def test_zero_flow_gives_a_zero_step() -> None:
    J, _, f = problem(4)
    solution = solve_flow(J, torch.zeros_like(f))
    assert (solution.delta_q == 0).all() and solution.valid.all()


@pytest.mark.parametrize("robust", [None, "tukey"])
def test_order_number_and_unit_of_weight_of_the_pixels_do_not_matter(robust) -> None:
    J, _, f = problem(2, noise=0.5)
    w = torch.rand(2, 400, dtype=torch.float64)
    w[:, :20] = 0
    whole = solve_flow(J, f, w, robust=robust)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    same(solve_flow(J[:, order], f[:, order], w[:, order], robust=robust), whole)
    scaled = solve_flow(J, f, 7e-5 * w, robust=robust)
    for key in ("delta_q", "residual", "explained_fraction", "observability", "observable"):
        torch.testing.assert_close(getattr(scaled, key), getattr(whole, key), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled.covariance, whole.covariance, rtol=1e-9, atol=0)
    twice = solve_flow(J.repeat(1, 2, 1, 1), f.repeat(1, 2, 1), w.repeat(1, 2), robust=robust)
    for key in ("delta_q", "residual", "explained_fraction", "observability", "observable"):
        torch.testing.assert_close(getattr(twice, key), getattr(whole, key), rtol=1e-9, atol=1e-12)
    # Twice the data, half the variance (but for the n degrees of freedom).
    torch.testing.assert_close(twice.covariance * 2, whole.covariance, rtol=0.02, atol=0)


def test_pixels_of_zero_weight_have_no_influence_even_if_nan() -> None:
    J, _, f = problem(noise=0.3)
    w = torch.ones(400, dtype=torch.float64)
    w[::3] = 0
    f_broken = f.clone()
    f_broken[::3] = torch.nan
    f_broken[3] = torch.inf
    same(solve_flow(J, f_broken, w), solve_flow(J[w > 0], f[w > 0]))


@pytest.mark.parametrize("robust", [None, "tukey"])
def test_changing_a_joints_unit_changes_the_unit_of_its_step(robust) -> None:
    """Millimeters in place of meters: the Jacobian shrinks, the step grows; `joint_scale` adapts ridge and threshold."""
    J, _, f = problem(noise=0.3)
    scale = torch.tensor([1.0, 1e3, 57.3, 1.0, 1e-2], dtype=torch.float64)
    bounds = (torch.full((N,), -0.04, dtype=torch.float64), torch.full((N,), 0.01, dtype=torch.float64))
    a = solve_flow(J, f, robust=robust, bounds=bounds)
    b = solve_flow(J / scale, f, robust=robust, joint_scale=scale, bounds=(bounds[0] * scale, bounds[1] * scale))
    assert a.at_bound.any() and not a.at_bound.all()
    torch.testing.assert_close(b.delta_q, a.delta_q * scale, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(b.covariance, a.covariance * scale[:, None] * scale, rtol=1e-8, atol=0)
    torch.testing.assert_close(b.observability * scale, a.observability, rtol=1e-8, atol=0)
    assert torch.equal(a.observable, b.observable) and torch.equal(a.at_bound, b.at_bound)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_dense_fields_and_points_agree(batch) -> None:
    J, _, f = problem(*batch, noise=0.5)
    w = torch.rand(*batch, 400, dtype=torch.float64)
    for height in (1, 16, 400):
        same(solve_flow(*dense(J, f, height), w.unflatten(-1, (height, -1))), solve_flow(J, f, w), 1e-8)
    assert normal_equations(J, f).num_observations.shape == batch


def test_a_batch_is_its_items() -> None:
    J, _, f = problem(2, 3, noise=0.5)
    whole = solve_flow(J, f)
    for i in range(2):
        for j in range(3):
            one = solve_flow(J[i, j], f[i, j])
            torch.testing.assert_close(one.delta_q, whole.delta_q[i, j], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(one.covariance, whole.covariance[i, j], rtol=1e-9, atol=0)


def test_more_pixels_than_one_block_holds() -> None:
    J, d, f = problem(points=20_000, n=3, noise=0.5)
    plain = torch.linalg.lstsq(J.flatten(0, 1), f.flatten()).solution
    torch.testing.assert_close(solve_flow(J, f, robust=None, ridge=0.0).delta_q, plain, rtol=1e-9, atol=0)
    assert (solve_flow(J, f).delta_q - d).abs().max() < 1e-4


def test_a_small_robot_in_a_large_image_keeps_its_residual_scale() -> None:
    """The median is over the pixels with weight, however few they are."""
    J, d, f = problem(points=40_000, n=3, noise=0.5)
    w = torch.zeros(40_000, dtype=torch.float64)
    w[1:400:2] = 1
    same(solve_flow(J, f, w), solve_flow(J[w > 0], f[w > 0]), 1e-8)
    assert (solve_flow(J, f, w).delta_q - d).abs().max() < 3e-3


def test_float32_is_close_to_float64_and_stays_float32() -> None:
    J, _, f = problem(2, noise=0.5)
    a, b = solve_flow(J, f), solve_flow(J.float(), f.float())
    assert b.delta_q.dtype == b.covariance.dtype == b.residual.dtype == torch.float32
    assert a.delta_q.dtype == torch.float64
    torch.testing.assert_close(b.delta_q.double(), a.delta_q, rtol=0, atol=2e-6)
    assert solve_flow(J, f.float()).delta_q.dtype == torch.float64


# ---- independent oracles --------------------------------------------------------------------------------------------


def test_plain_least_squares_equals_lapack() -> None:
    J, _, f = problem(3, noise=2.0)
    w = torch.rand(3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    root = w.sqrt()[..., None]
    truth = torch.linalg.lstsq((J * root[..., None]).flatten(1, 2), (f * root).flatten(1, 2)[..., None]).solution[
        ..., 0
    ]
    solution = solve_flow(J, f, w, robust=None, ridge=0.0)
    # The absolute tolerance is for joints whose step happens to be nearly zero.
    torch.testing.assert_close(solution.delta_q, truth, rtol=1e-9, atol=1e-12 * float(truth.abs().max()))
    residual = f - torch.einsum("...pak,...k->...pa", J, truth)
    rms = ((w[..., None] * residual**2).sum((1, 2)) / w.sum(1)).sqrt()
    torch.testing.assert_close(solution.residual, rms, rtol=1e-9, atol=0)
    explained = 1 - (w[..., None] * residual**2).sum((1, 2)) / (w[..., None] * f**2).sum((1, 2))
    torch.testing.assert_close(solution.explained_fraction, explained, rtol=1e-9, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10), st.floats(0.01, 3.0), st.floats(0.0, 3.0))
def test_bounded_least_squares_equals_scipy(seed: int, n: int, tightness: float, skew: float) -> None:
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(3 * n, 2, n)) @ (np.eye(n) + skew * rng.normal(size=(n, n)))  # far from orthogonal
    f = rng.normal(size=(3 * n, 2)) + np.einsum("pak,k->pa", J, rng.normal(size=n))
    middle, half = rng.normal(size=n), tightness * rng.uniform(0.01, 1, n)
    lower, upper = middle - half, middle + half
    lower[rng.random(n) < 0.2], upper[rng.random(n) < 0.2] = -np.inf, np.inf
    truth = lsq_linear(J.reshape(-1, n), f.reshape(-1), (lower, upper), method="bvls", tol=1e-14, max_iter=10_000)
    bounds = (torch.from_numpy(lower), torch.from_numpy(upper))
    ours = solve_flow(torch.from_numpy(J), torch.from_numpy(f), robust=None, ridge=0.0, bounds=bounds, layout="points")
    x = ours.delta_q.numpy()
    assert (x >= lower).all() and (x <= upper).all()
    cost = 0.5 * np.square(J.reshape(-1, n) @ x - f.reshape(-1)).sum()
    assert cost <= truth.cost * (1 + 1e-9) + 1e-12
    assert (ours.at_bound.numpy() | ((x > lower) & (x < upper))).all()


def spread_matrices(count: int, n: int, generator: torch.Generator) -> Tensor:
    """Symmetric positive definite matrices of condition up to 1e6, for which changing several joints at once can cycle."""
    Q = torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=torch.float64)).Q
    spectrum = 10 ** (-6 * torch.rand(count, n, generator=generator, dtype=torch.float64))
    return Q @ torch.diag_embed(spectrum) @ Q.mT


@pytest.mark.parametrize("n", [2, 3, 7, 16, 30])
def test_solutions_in_a_box_meet_the_karush_kuhn_tucker_conditions(n: int) -> None:
    """On a thousand ill-conditioned problems with many joints at their bounds."""
    generator = torch.Generator().manual_seed(n)
    H = spread_matrices(1000, n, generator)
    g = torch.randn(1000, n, generator=generator, dtype=torch.float64)
    half = 10 ** (3 * torch.rand(1000, n, generator=generator, dtype=torch.float64) - 2)
    x, at_bound = solve_box_qp(H, g, -half, half)
    pull = g - torch.einsum("bij,bj->bi", H, x)
    size = torch.einsum("bij,bj->bi", H.abs(), x.abs()) + g.abs()
    assert (x.abs() <= half).all()
    assert (pull.abs() <= 1e-8 * size)[~at_bound].all(), "the gradient of a free joint must be zero"
    assert (x.abs() == half)[at_bound].all() and (pull * x.sign() >= -1e-8 * size)[at_bound].all()
    assert 0.05 < at_bound.double().mean() < 0.98


def test_equal_bounds_fix_a_joint_and_the_others_are_optimal() -> None:
    J, _, f = problem(noise=0.3)
    fixed = torch.tensor([torch.nan, 0.01, torch.nan, -0.02, torch.nan], dtype=torch.float64)
    bounds = (fixed.nan_to_num(-torch.inf), fixed.nan_to_num(torch.inf))
    held, free = ~fixed.isnan(), fixed.isnan()
    rest = f - torch.einsum("pak,k->pa", J[..., held], fixed[held])
    truth = torch.linalg.lstsq(J[..., free].flatten(0, 1), rest.flatten()).solution
    solution = solve_flow(J, f, robust=None, ridge=0.0, bounds=bounds)
    assert torch.equal(solution.delta_q[held], fixed[held])
    torch.testing.assert_close(solution.delta_q[free], truth, rtol=1e-9, atol=0)
    # Clipping the unbounded solution is not the same; the bounds must be inside the solve.
    clipped = solve_flow(J[:4], f[:4], robust=None).delta_q.clamp(*bounds)
    inside = solve_flow(J[:4], f[:4], robust=None, bounds=bounds).delta_q
    assert (clipped - inside).abs().max() > 1e-4


def test_bounds_in_any_batch_shape() -> None:
    for batch in ((), (0,), (2, 3)):
        J, d, f = problem(*batch)
        solution = solve_flow(J, f, bounds=(d - 1e-3, d - 5e-4))
        torch.testing.assert_close(solution.delta_q, (d - 5e-4).clamp(d - 1e-3, d - 5e-4), rtol=0, atol=5.1e-4)
        assert solution.at_bound.shape == d.shape and solution.at_bound.any(-1).all()


# ---- robustness -----------------------------------------------------------------------------------------------------


def test_thirty_percent_of_random_flow_hardly_change_the_step() -> None:
    trials, points = 20, 2000
    J, d, f = problem(trials, points=points, n=7, noise=0.5)
    generator = torch.Generator().manual_seed(1)
    f_bad = f.clone()
    hit = torch.rand(trials, points, generator=generator) < 0.3
    f_bad[hit] = 20 * torch.randn(int(hit.sum()), 2, generator=generator, dtype=torch.float64)

    def error(flow: Tensor, robust) -> float:
        return float((solve_flow(J, flow, robust=robust).delta_q - d).square().mean().sqrt())

    clean = error(f, "tukey")
    assert error(f_bad, "tukey") <= 1.5 * clean
    assert error(f_bad, None) > 5 * clean, "plain least squares must fail on this"
    assert clean <= 1.1 * error(f, None), "clean data must lose little efficiency"


def test_coherent_outliers_are_ignored() -> None:
    """A moving background: a quarter of the pixels have one common motion. Tukey's weight ignores it."""
    J, d, f = problem(points=2000, noise=0.3)
    f[:500] = torch.tensor([6.0, -3.0], dtype=torch.float64)
    tukey, plain = (solve_flow(J, f, robust=r).delta_q for r in ("tukey", None))
    assert (tukey - d).abs().max() < 5e-4 < (plain - d).abs().max()


# ---- covariance and observability ------------------------------------------------------------------------------------


@pytest.mark.parametrize("robust", [None, "cauchy", "tukey"])
def test_covariance_equals_that_of_monte_carlo_trials(robust) -> None:
    trials, points, n = 1500, 300, 3
    generator = torch.Generator().manual_seed(3)
    J = 100 * torch.randn(points, 2, n, generator=generator, dtype=torch.float64)
    J[..., 2] = 0.9 * J[..., 1] + 0.3 * J[..., 2]  # correlated steps
    f = 0.4 * torch.randn(trials, points, 2, generator=generator, dtype=torch.float64)
    w = 1.0 if robust else 0.3
    solution = solve_flow(J.expand(trials, -1, -1, -1), f, torch.full((trials, points), w).double(), robust=robust)
    sampled, stated = torch.cov(solution.delta_q.T), solution.covariance.mean(0)
    ratio = torch.linalg.eigvals(torch.linalg.solve(stated, sampled)).real  # in every direction, not only the diagonal
    assert ((ratio > 0.8) & (ratio < 1.2)).all(), ratio


def test_outliers_do_not_reduce_the_covariance() -> None:
    trials, points, n = 600, 400, 3
    generator = torch.Generator().manual_seed(3)
    J = 100 * torch.randn(points, 2, n, generator=generator, dtype=torch.float64)
    f = 0.4 * torch.randn(trials, points, 2, generator=generator, dtype=torch.float64)
    f[:, :120] += 60 * torch.randn(trials, 120, 2, generator=generator, dtype=torch.float64)
    solution = solve_flow(J.expand(trials, -1, -1, -1), f)
    ratio = torch.cov(solution.delta_q.T).diagonal() / solution.covariance.mean(0).diagonal()
    assert ((ratio > 0.75) & (ratio < 1.3)).all(), ratio


def test_hidden_and_indistinguishable_joints_are_not_observable() -> None:
    J, d, f = problem(2, noise=0.1)
    J[0, ..., 1] = 0  # hidden
    J[1, ..., 4] = -2 * J[1, ..., 0]  # joints 0 and 4 cannot be distinguished
    f = torch.einsum("...pak,...k->...pa", J, d)
    for dtype in (torch.float64, torch.float32):
        solution = solve_flow(J.to(dtype), f.to(dtype))
        assert solution.observable.tolist() == [[True, False, True, True, True], [False, True, True, True, False]]
        assert (solution.status == Status.UNOBSERVABLE).all() and solution.valid.all()
        assert solution.delta_q[0, 1] == 0 and solution.delta_q.isfinite().all()
        variance = solution.covariance.diagonal(dim1=-2, dim2=-1)
        assert torch.equal(variance.isinf(), ~solution.observable), "unobservable joints have infinite variance"
        observable = solution.observable
        torch.testing.assert_close(solution.delta_q[observable].double(), d[observable], rtol=1e-4, atol=1e-5)
    # Their common motion is measured.
    both = solution.delta_q[1, 0] - 2 * solution.delta_q[1, 4]
    torch.testing.assert_close(both.double(), d[1, 0] - 2 * d[1, 4], rtol=1e-3, atol=1e-5)


def test_observability_is_the_part_of_a_column_orthogonal_to_the_others() -> None:
    J, _, f = problem()
    rows = J.flatten(0, 1)
    solution = solve_flow(J, f, robust=None)
    for k in range(N):
        others = torch.cat([rows[:, :k], rows[:, k + 1 :]], dim=1)
        rest = rows[:, k] - others @ torch.linalg.lstsq(others, rows[:, k]).solution
        torch.testing.assert_close(solution.observability[k], (rest.square().sum() / 400).sqrt(), rtol=1e-6, atol=0)
    level = float(solution.observability.sort().values[1:3].mean())
    assert solve_flow(J, f, robust=None, min_motion=level).observable.sum() == N - 2


# ---- several cameras -------------------------------------------------------------------------------------------------


def test_equations_of_two_cameras_add_up_to_the_stacked_problem() -> None:
    (J_a, d, f_a), (J_b, _, _) = problem(3, noise=0.5), problem(3, points=150, seed=1)
    f_b = torch.einsum("...pak,...k->...pa", J_b, d)
    w_a, w_b = torch.rand(3, 400, dtype=torch.float64), torch.rand(3, 150, dtype=torch.float64)
    parts = normal_equations(J_a, f_a, w_a) + normal_equations(J_b, f_b, w_b)
    stacked = (torch.cat(pair, dim=1) for pair in ((J_a, J_b), (f_a, f_b), (w_a, w_b)))
    same(solve_normal_equations(parts), solve_flow(*stacked, robust=None))


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("robust", [None, "cauchy", "tukey"])
def test_gradients_to_jacobian_flow_and_weight(robust) -> None:
    J, _, f = problem(2, points=7, n=2, noise=2.0, seed=5)
    J = J / 20  # so that the finite differences of gradcheck are small against the residuals
    w = 0.2 + torch.rand(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = tuple(x.clone().requires_grad_() for x in (J, f, w))

    def outputs(J: Tensor, f: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        solution = solve_flow(J, f, w, robust=robust, iterations=3, ridge=1e-3)
        return solution.delta_q, solution.covariance, solution.residual, solution.observability

    assert torch.autograd.gradcheck(outputs, inputs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("width", [10.0, 0.6], ids=["bounds inactive", "bounds active"])
def test_gradients_through_bounds(width: float) -> None:
    J, _, f = problem(2, points=6, n=3, noise=2.0, seed=5)
    J = J / 100
    bound = width * torch.ones(3, dtype=torch.float64)
    f = f / 3

    def outputs(J: Tensor, f: Tensor, bound: Tensor) -> tuple[Tensor, ...]:
        solution = solve_flow(J, f, robust=None, bounds=(-bound, 1.5 * bound))
        return solution.delta_q, solution.residual, solution.explained_fraction

    inputs = tuple(x.clone().requires_grad_() for x in (J, f, bound))
    held = solve_flow(J, f, robust=None, bounds=(-bound, 1.5 * bound)).at_bound
    assert held.any() == (width < 1) and not held.all()
    assert torch.autograd.gradcheck(outputs, inputs, atol=1e-6, rtol=1e-4)


def corrupted(kind: str, J: Tensor, f: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    J, f, w = J.clone(), f.clone(), w.clone()
    if kind == "duplicate columns":
        J[0, ..., 1] = J[0, ..., 0]
    elif kind == "zero column":
        J[0, ..., 1] = 0
    elif kind == "zero jacobian":
        J[0] = 0
    elif kind == "zero weight":
        w[0] = 0
    elif kind == "one pixel":
        w[0, 1:] = 0
    elif kind == "no flow":
        f[0] = 0
    else:
        what, where = kind.split(" in ")
        {"jacobian": J, "flow": f, "weight": w}[where][0].view(-1)[3] = float(what)
    return J, f, w


SINGULAR = ["duplicate columns", "zero column", "zero jacobian", "zero weight", "one pixel", "no flow"]
NOT_FINITE = [f"{what} in {where}" for what in ("nan", "inf") for where in ("jacobian", "flow", "weight")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("robust", [None, "tukey"])
@pytest.mark.parametrize("kind", SINGULAR + NOT_FINITE)
def test_a_corrupt_item_does_not_change_the_others(kind: str, robust, dtype) -> None:
    """The other items are bit-equal, and all gradients are finite, those of the corrupt item included."""
    J, _, f = problem(3, noise=0.5, dtype=dtype)
    w = torch.rand(3, 400, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = tuple(x.requires_grad_() for x in corrupted(kind, J, f, w))
    solution, clean = solve_flow(*inputs, robust=robust), solve_flow(J, f, w, robust=robust)
    for key, value in vars(solution).items():
        assert torch.equal(value[1:], getattr(clean, key)[1:]), key
    assert solution.delta_q.isfinite().all() and solution.residual.isfinite().all()
    expected = {"zero weight": Status.NO_DATA, "no flow": Status.OK}
    expected |= dict.fromkeys(NOT_FINITE, Status.NOT_FINITE)
    assert solution.status[0] == expected.get(kind, Status.UNOBSERVABLE)
    assert solution.valid.tolist() == [kind in SINGULAR and kind != "zero weight", True, True]
    if not solution.valid[0]:
        assert (solution.delta_q[0] == 0).all() and not solution.observable[0].any()
        assert solution.covariance[0].diagonal().isinf().all()
    known = solution.covariance.isfinite()
    total = solution.delta_q.square().sum() + solution.residual.sum() + solution.covariance[known].sum()
    (total + solution.observability.sum() + solution.explained_fraction.sum()).backward()
    for name, x in zip(("jacobian", "flow", "weight"), inputs, strict=True):
        assert x.grad.isfinite().all(), name
    assert inputs[0].grad[1:].abs().max() > 0


@pytest.mark.parametrize("kind", NOT_FINITE)
def test_normal_equations_of_a_corrupt_item_are_nan(kind: str) -> None:
    J, _, f = problem(3)
    w = torch.ones(3, 400, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in corrupted(kind, J, f, w))
    equations = normal_equations(*inputs) + normal_equations(J, f, w)
    solution = solve_normal_equations(equations)
    assert solution.valid.tolist() == [False, True, True]
    solution.delta_q.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_nan_in_a_bound_affects_only_its_item() -> None:
    J, d, f = problem(3)
    J.requires_grad_()
    middle = d.clone()
    middle[1, 2] = torch.nan
    clean, solution = solve_flow(J, f), solve_flow(J, f, bounds=(middle - 1, middle + 1))
    assert solution.status.tolist() == [Status.OK, Status.NOT_FINITE, Status.OK]
    torch.testing.assert_close(solution.delta_q[[0, 2]], clean.delta_q[[0, 2]], rtol=1e-5, atol=1e-9)
    (gradient,) = torch.autograd.grad(solution.delta_q.sum(), J)
    assert gradient.isfinite().all()


# ---- input errors ----------------------------------------------------------------------------------------------------


def test_shapes_that_fit_two_layouts_need_the_layout() -> None:
    J, f = torch.randn(2, 2, 2, 2, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)
    with pytest.raises(InputError, match="layout='dense' or 'points'"):
        solve_flow(J, f)
    explicit = solve_flow(J, f, robust=None, ridge=0.0, layout="dense")
    truth = torch.linalg.lstsq(J.movedim(1, -1).reshape(-1, 2), f.reshape(-1)).solution
    torch.testing.assert_close(explicit.delta_q, truth, rtol=1e-8, atol=1e-12)
    assert explicit.status.shape == () and solve_flow(J, f, layout="points").status.shape == (2,)


@pytest.mark.parametrize("points", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("batch", [(), (2,), (1, 2), (2, 2)])
def test_few_points_are_never_mistaken_for_an_image(points: int, n: int, batch) -> None:
    J, _, f = problem(*batch, points=points, n=n)
    equations = normal_equations(J, f, layout="points")
    torch.testing.assert_close(equations.g, torch.einsum("...pan,...pa->...n", J, f))
    if batch and batch[-1] == points == n == 2:
        with pytest.raises(InputError, match="alike"):
            normal_equations(J, f)
    else:
        torch.testing.assert_close(normal_equations(J, f).g, equations.g)


@pytest.mark.parametrize("height", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_tiny_image_is_never_mistaken_for_points(height: int, width: int, n: int) -> None:
    J, _, f = problem(2, points=height * width, n=n)
    J, f = dense(J, f, height)
    equations = normal_equations(J, f, layout="dense")
    torch.testing.assert_close(equations.g, torch.einsum("banhw,bahw->bn", J, f))
    if height == width == n == 2:
        with pytest.raises(InputError, match="alike"):
            normal_equations(J, f)
    else:
        torch.testing.assert_close(normal_equations(J, f).g, equations.g)


def test_wrong_input_raises_and_names_it() -> None:
    J, d, f = problem(3)
    with pytest.raises(InputError, match=r"must be \(\*batch, 2, n, H, W\).*\(3, 400, 2, 5\) and \(3, 399, 2\)"):
        solve_flow(J, f[:, 1:])
    with pytest.raises(InputError, match="for layout='dense'"):
        solve_flow(J, f, layout="dense")
    with pytest.raises(InputError, match=r"weight must be \(3, 400\)"):
        solve_flow(J, f, torch.ones(3, 399).double())
    with pytest.raises(InputError, match="negative"):
        solve_flow(J, f, torch.full((3, 400), -1.0).double())
    # Without the checked annotations of the tests, the message is the library's own.
    with pytest.raises(InputError, match="robust must be"):
        unchecked(solve_flow)(J, f, robust="huber")
    with pytest.raises(InputError, match="above its upper"):
        solve_flow(J, f, bounds=(d, d - 1))
    with pytest.raises(InputError, match="joint_scale"):
        solve_flow(J, f, joint_scale=torch.zeros(N).double())


def test_no_points_are_no_data() -> None:
    solution = solve_flow(torch.zeros(2, 0, 2, N), torch.zeros(2, 0, 2))
    assert (solution.status == Status.NO_DATA).all() and (solution.delta_q == 0).all()


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    J, _, f = problem(4, noise=0.5)
    w = torch.rand(4, 400, dtype=torch.float64)
    bounds = (torch.full((N,), -0.02, dtype=torch.float64), torch.full((N,), 0.02, dtype=torch.float64))
    here = solve_flow(J, f, w, bounds=bounds)
    there = solve_flow(J.cuda(), f.cuda(), w.cuda(), bounds=tuple(b.cuda() for b in bounds))
    assert there.delta_q.is_cuda
    torch.testing.assert_close(there.delta_q.cpu(), here.delta_q, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(there.covariance.cpu(), here.covariance, rtol=1e-8, atol=0)
