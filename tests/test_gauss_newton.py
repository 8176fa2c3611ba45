"""Gauss-Newton: large joint steps from flow by re-linearization, and bounded steps over positions and other variables."""

from __future__ import annotations

import pytest
import torch
from rendered import clip
from torch import Tensor

from jidm import AnalyticField
from jidm.estimation.factors.prior import StudentTPrior
from jidm.estimation.gauss_newton import bounded_step, gauss_newton_step
from jidm.estimation.problem import POSITION, NormalEquations
from jidm.fields.base import FieldAtPose

# ---- a large step from flow ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def field() -> AnalyticField:
    c = clip("planar_finger_3", frames=8, seed=1)
    return AnalyticField(c.robot, c.camera, points=1500, occluders=10000, contour_points=5000)


@pytest.fixture(scope="module")
def q() -> Tensor:
    return torch.from_numpy(clip("planar_finger_3", frames=8, seed=1).q)


def exact_flow(pose: FieldAtPose, step: Tensor) -> Tensor:
    return pose.surface(step).points - pose.surface().points


@pytest.mark.parametrize("size", [0.02, 0.1, 0.25])
def test_a_large_step_is_found_by_linearizing_again(size: float, q: Tensor, field: AnalyticField) -> None:
    pose = field.at(q[0])
    step = size * torch.tensor([1.0, -0.7, 0.5]).double()
    flow, weight = exact_flow(pose, step), pose.visible.double()
    solution = gauss_newton_step(pose, flow, weight)
    once = gauss_newton_step(pose, flow, weight, iterations=1)
    assert float((solution.delta_q - step).abs().max()) < 1e-6
    assert float((once.delta_q - step).abs().max()) > 10 * float((solution.delta_q - step).abs().max())
    assert float(solution.residual) < 1e-4
    assert float(solution.explained_fraction) > 0.9999


def test_items_of_a_batch_are_independent(q: Tensor, field: AnalyticField) -> None:
    pose = field.at(q[[0, 3, 6]])
    step = 0.05 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()
    flow = exact_flow(pose, step)
    flow[1] = torch.nan
    solution = gauss_newton_step(pose, flow, pose.visible.double())
    assert solution.valid.tolist() == [True, False, True]
    torch.testing.assert_close(solution.delta_q[[0, 2]], step[[0, 2]], rtol=0, atol=1e-5)
    assert float(solution.delta_q[1].abs().max()) == 0.0
    assert float(solution.explained_fraction[1]) == 0.0


def test_bounds_hold_for_the_whole_step(q: Tensor, field: AnalyticField) -> None:
    pose = field.at(q[0])
    step = torch.tensor([0.2, -0.15, 0.1]).double()
    bound = torch.tensor([0.05, 1.0, 1.0], dtype=torch.float64)
    found = gauss_newton_step(pose, exact_flow(pose, step), pose.visible.double(), bounds=(-bound, bound)).delta_q
    assert float(found[0]) == pytest.approx(0.05, abs=1e-12)
    assert (found.abs() <= bound).all()
    assert float(found[1]) > float(step[1])  # the other joints compensate, as a solve inside the bounds must


# ---- one step over several variables ---------------------------------------------------------------------------------


def two_variables(seed: int = 0) -> tuple[Tensor, Tensor, NormalEquations]:
    """A dense linear problem A x = b over positions (3) and a light (2), and its normal equations around zero."""
    generator = torch.Generator().manual_seed(seed)
    A, b = (torch.randn(20, k, generator=generator).double() for k in (5, 1))
    one = torch.ones(()).double()
    equations = NormalEquations(
        A.T @ A, (A.T @ b)[:, 0], b.square().sum(), 20 * one, 20 * one, ((POSITION, 3), ("light", 2))
    )
    return A, b[:, 0], equations


def step_from(
    equations: NormalEquations, prior: StudentTPrior, bound: float = 100.0, max_step: float = 100.0
) -> dict[str, Tensor]:
    limit = torch.full((3,), bound).double()
    following, moved = bounded_step(
        {POSITION: torch.zeros(3).double()}, [equations], prior, bounds=(-limit, limit), damping=0.0, max_step=max_step
    )
    assert moved == float(following[POSITION].abs().max())
    return following


def test_one_step_solves_a_linear_problem_in_all_variables() -> None:
    A, b, equations = two_variables()
    flat = StudentTPrior(POSITION, torch.zeros(3).double(), torch.full((3,), 1e6).double())
    following = step_from(equations, flat)
    truth = torch.linalg.lstsq(A, b).solution
    torch.testing.assert_close(following[POSITION], truth[:3], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(following["light"], truth[3:], rtol=1e-6, atol=1e-9)


def test_a_shared_variable_is_eliminated_once() -> None:
    """Two factors with one light are one problem, not two with a light each."""
    (A, b, one), (C, d, two) = two_variables(0), two_variables(1)
    flat = StudentTPrior(POSITION, torch.zeros(3).double(), torch.full((3,), 1e6).double())
    limit = torch.full((3,), 100.0).double()
    state = {POSITION: torch.zeros(3).double()}
    following, _ = bounded_step(state, [one, two], flat, bounds=(-limit, limit), damping=0.0, max_step=100.0)
    truth = torch.linalg.lstsq(torch.cat([A, C]), torch.cat([b, d])).solution
    torch.testing.assert_close(following[POSITION], truth[:3], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(following["light"], truth[3:], rtol=1e-6, atol=1e-9)


def test_bounds_and_the_largest_step_hold() -> None:
    _, _, equations = two_variables()
    flat = StudentTPrior(POSITION, torch.zeros(3).double(), torch.full((3,), 1e6).double())
    free = step_from(equations, flat)[POSITION]
    half = 0.5 * float(free.abs().max())
    for limited in (step_from(equations, flat, bound=half), step_from(equations, flat, max_step=half)):
        assert float(limited[POSITION].abs().max()) == pytest.approx(half)
        assert not torch.equal(limited[POSITION], free.clamp(-half, half))  # solved inside the bounds, not clipped


def test_a_narrow_prior_holds_the_positions() -> None:
    _, _, equations = two_variables()
    mean = torch.tensor([0.02, -0.01, 0.03]).double()
    narrow = StudentTPrior(POSITION, mean, torch.full((3,), 1e-3).double())
    position, following = torch.zeros(3).double(), {}
    limit = torch.full((3,), 100.0).double()
    for _ in range(60):  # iteratively reweighted: the pull of a Student-t prior grows as the mean comes near
        following, _ = bounded_step(
            {POSITION: position}, [equations], narrow, bounds=(-limit, limit), damping=0.0, max_step=100.0
        )
        position = following[POSITION]
    torch.testing.assert_close(position, mean, rtol=0, atol=1e-3)
