"""The constant-velocity Kalman filter and the Rauch-Tung-Striebel smoother, against one dense least-squares problem."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from jidm.estimation.kalman import Gaussian, KalmanState, rts_smooth

DT, TIME_CONSTANT, N = 1 / 16, 0.4, 2
NO_GATE = 1e9


def spd(generator: torch.Generator, n: int = N, scale: float = 1.0) -> Tensor:
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return scale * (root @ root.mT + 0.1 * torch.eye(n).double())


def gaussians(generator: torch.Generator, *batch: int, n: int = N) -> Gaussian:
    root = torch.randn(*batch, n, n, generator=generator, dtype=torch.float64)
    mean = torch.randn(*batch, n, generator=generator, dtype=torch.float64)
    return Gaussian(mean, root @ root.mT + 0.1 * torch.eye(n).double())


# ---- one Gaussian ----------------------------------------------------------------------------------------------------


def test_conditioning_adds_information() -> None:
    generator = torch.Generator().manual_seed(0)
    prior, measured = gaussians(generator, 3), gaussians(generator, 3)
    posterior = prior.condition(measured)
    P, R = prior.covariance.inverse(), measured.covariance.inverse()
    expected = (P + R).inverse()
    mean = expected @ (P @ prior.mean[..., None] + R @ measured.mean[..., None])
    torch.testing.assert_close(posterior.covariance, expected)
    torch.testing.assert_close(posterior.mean[..., None], mean)


def test_conditioning_on_part_of_a_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    prior, measured = gaussians(generator, 2, n=3), gaussians(generator, 2, n=1)
    H = torch.tensor([[0.5, -1.0, 2.0]]).double()
    posterior = prior.condition(measured, H)
    information = prior.covariance.inverse() + H.mT @ measured.covariance.inverse() @ H
    torch.testing.assert_close(posterior.covariance, information.inverse())
    error, variance = prior.innovation(measured, H)
    torch.testing.assert_close(error, measured.mean - (H @ prior.mean[..., None])[..., 0])
    torch.testing.assert_close(variance, H @ prior.covariance @ H.mT + measured.covariance)


# ---- filter and smoother against dense least squares -----------------------------------------------------------------


@pytest.mark.parametrize("initial_scale", [1e-3, 1e-9])
@pytest.mark.parametrize("correlation", [0.0, -0.7])
def test_filter_and_smoother_equal_dense_least_squares(correlation: float, initial_scale: float) -> None:
    """The oracle: positions and velocities of all times as one Gaussian, all measurements in one least-squares problem."""
    generator = torch.Generator().manual_seed(1)
    T, speed = 7, torch.tensor([0.7, 0.2]).double()
    q0, covariance0 = torch.tensor([0.3, -0.1]).double(), spd(generator, scale=initial_scale)
    matrix = torch.tensor([[1.0, correlation], [correlation, 1.0]]).double()
    state = KalmanState.initialize(q0, covariance0, speed, matrix if correlation else None)
    intervals = [DT, 2 * DT, DT, 0.5 * DT, DT, 3 * DT, DT]
    # Unknowns: q_0, v_0 .. v_T (n each); q_t = q_0 + dt_1 v_1 + .. + dt_t v_t.
    eye = torch.eye(N).double()

    def velocity(t: int) -> Tensor:
        return torch.cat([torch.zeros(N, N).double()] + [eye if s == t else 0 * eye for s in range(T + 1)], 1)

    def position(t: int) -> Tensor:
        return torch.cat([eye] + [intervals[s - 1] * eye if 1 <= s <= t else 0 * eye for s in range(T + 1)], 1)

    rows, values, information = [position(0)], [q0], [covariance0.inverse()]

    def observe(row: Tensor, value: Tensor, covariance: Tensor) -> None:
        rows.append(row), values.append(value), information.append(covariance.inverse())

    zero, velocity_covariance = torch.zeros(N).double(), torch.diag(speed) @ matrix @ torch.diag(speed)
    observe(velocity(0), zero, velocity_covariance)
    predicted, filtered, transitions = [], [state.gaussian], []
    for t, dt in enumerate(intervals, 1):
        decay = math.exp(-dt / TIME_CONSTANT)
        observe(velocity(t) - decay * velocity(t - 1), zero, (1 - decay**2) * velocity_covariance)
        transitions.append(state.transition(dt, TIME_CONSTANT))
        state = state.predict(dt, TIME_CONSTANT)
        predicted.append(state.gaussian)
        if t != 3:
            step = Gaussian(torch.randn(N, generator=generator).double() * 0.05, spd(generator, scale=1e-4))
            state = state.update_step(step, dt, NO_GATE)
            observe(dt * velocity(t), step.mean, step.covariance)
        if t % 2:
            pose = Gaussian(torch.randn(N, generator=generator).double() * 0.1, spd(generator, scale=1e-2))
            state = state.update_position(pose, NO_GATE)
            observe(position(t), pose.mean, pose.covariance)
        filtered.append(state.gaussian)
    A, b, W = torch.cat(rows), torch.cat(values), torch.block_diag(*information)
    covariance = (A.mT @ W @ A).inverse()
    mean = covariance @ A.mT @ W @ b
    last = torch.cat([position(T), velocity(T)])
    torch.testing.assert_close(torch.cat([state.q, state.velocity]), last @ mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(state.covariance, last @ covariance @ last.mT, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(state.step_marginal(DT).covariance, state.covariance[N:, N:] * DT**2)
    for t, smoothed in enumerate(rts_smooth(predicted, filtered, transitions)):
        row = torch.cat([position(t), velocity(t)])
        torch.testing.assert_close(smoothed.mean, row @ mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(smoothed.covariance, row @ covariance @ row.mT, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_smoothing_a_batch_is_smoothing_its_items(batch: tuple[int, ...]) -> None:
    """Any linear-Gaussian model: the means and covariances need not come from `KalmanState`."""
    generator, m, T = torch.Generator().manual_seed(2), 3, 5
    F = [torch.eye(m).double() + 0.2 * torch.randn(m, m, generator=generator).double() for _ in range(T - 1)]
    state, noise = gaussians(generator, *batch, n=m), spd(generator, m, 0.1)
    predicted, filtered = [], [state]
    for transition in F:
        mean = (transition @ state.mean[..., None])[..., 0]
        state = Gaussian(mean, transition @ state.covariance @ transition.mT + noise)
        predicted.append(state)
        state = state.condition(gaussians(generator, *batch, n=m))
        filtered.append(state)
    smoothed = rts_smooth(predicted, filtered, F)
    assert [x.mean.shape for x in smoothed] == [(*batch, m)] * T
    for i in product(*map(range, batch)):
        one = rts_smooth(*([Gaussian(x.mean[i], x.covariance[i]) for x in xs] for xs in (predicted, filtered)), F)
        for whole, alone in zip(smoothed, one, strict=True):
            torch.testing.assert_close(whole.mean[i], alone.mean)
            torch.testing.assert_close(whole.covariance[i], alone.covariance)
    assert smoothed[-1] is filtered[-1]
    for before, after in zip(filtered, smoothed, strict=True):
        assert (
            after.covariance.diagonal(dim1=-2, dim2=-1) <= before.covariance.diagonal(dim1=-2, dim2=-1) + 1e-12
        ).all()


def test_smoothing_keeps_a_first_pose_that_is_exactly_known() -> None:
    state = KalmanState.initialize(
        torch.tensor([0.3, -0.1]).double(), torch.zeros(N, N).double(), torch.ones(N).double()
    )
    predicted, filtered, transitions = [], [state.gaussian], []
    for _ in range(5):
        transitions.append(state.transition(DT, TIME_CONSTANT))
        state = state.predict(DT, TIME_CONSTANT)
        predicted.append(state.gaussian)
        step = Gaussian(torch.tensor([0.01, 0.02]).double(), 1e-6 * torch.eye(N).double())
        state = state.update_step(step, DT, NO_GATE)
        filtered.append(state.gaussian)
    smoothed = rts_smooth(predicted, filtered, transitions)
    torch.testing.assert_close(smoothed[0].mean[:N], torch.tensor([0.3, -0.1]).double(), rtol=0, atol=1e-9)
    for before, after in pairwise(smoothed):  # positions still are the sums of the velocities
        torch.testing.assert_close(after.mean[:N] - before.mean[:N], DT * after.mean[N:], rtol=1e-6, atol=1e-9)


# ---- the motion model ------------------------------------------------------------------------------------------------


def test_velocity_decays_and_its_variance_is_stationary() -> None:
    speed = torch.tensor([0.5, 0.1]).double()
    state = KalmanState.initialize(torch.zeros(N).double(), torch.zeros(N, N).double(), speed)
    far = state
    for _ in range(50):
        far = far.predict(DT, TIME_CONSTANT)
        torch.testing.assert_close(far.covariance[N:, N:], torch.diag(speed**2))
    assert torch.equal(far.q, state.q)
    fast = replace(state, velocity=speed).predict(DT, TIME_CONSTANT)
    torch.testing.assert_close(fast.step_marginal(DT).mean, speed * DT * math.exp(-DT / TIME_CONSTANT))
    torch.testing.assert_close(fast.q, fast.step_marginal(DT).mean)


def test_a_minimal_step_std_widens_the_step_and_the_position() -> None:
    speed, floor = torch.tensor([0.5, 0.1]).double(), torch.tensor([0.02, 0.0]).double()
    state = KalmanState.initialize(torch.zeros(N).double(), torch.zeros(N, N).double(), speed)
    plain, wide = state.predict(DT, TIME_CONSTANT), state.predict(DT, TIME_CONSTANT, floor)
    for a, b in (
        (plain.step_marginal(DT).covariance, wide.step_marginal(DT).covariance),
        (plain.position_covariance, wide.position_covariance),
    ):
        torch.testing.assert_close(b - a, torch.diag(floor**2))


def test_process_noise_adapts_to_a_joint_that_rests_and_to_one_that_moves() -> None:
    speed = torch.tensor([0.5, 0.5]).double()
    state = KalmanState.initialize(torch.zeros(N).double(), torch.zeros(N, N).double(), speed)
    precise = torch.diag(torch.tensor([1e-3, 1e-3]).double() ** 2)
    for _ in range(60):
        step = Gaussian(torch.tensor([0.0, 1.2]).double() * DT, precise)
        state = state.predict(DT, TIME_CONSTANT).update_step(step, DT, NO_GATE).adapt_process_noise(8)
    assert state.velocity_variance[0] < 0.01 * speed[0] ** 2
    assert float(state.velocity_variance[1]) == pytest.approx(1.2**2, rel=0.01)
    # An inaccurate measurement now hardly moves the joint that rests.
    inaccurate = Gaussian(torch.tensor([0.1, 0.2]).double(), torch.diag(torch.full((N,), 0.05**2).double()))
    moved = state.predict(DT, TIME_CONSTANT).update_step(inaccurate, DT, NO_GATE).step_marginal(DT).mean
    assert moved[0].abs() < 0.01


# ---- gates -----------------------------------------------------------------------------------------------------------


def test_gates_inflate_implausible_steps_and_reject_implausible_positions() -> None:
    start = KalmanState.initialize(
        torch.zeros(N).double(), 1e-6 * torch.eye(N).double(), torch.full((N,), 0.1).double()
    )
    state = start.predict(DT, TIME_CONSTANT)
    accurate, inaccurate = 1e-8 * torch.eye(N).double(), 1e-4 * torch.eye(N).double()

    def pull(offset: float, covariance: Tensor) -> float:
        step = Gaussian(torch.tensor([offset, 0.0]).double(), covariance)
        return float(state.update_step(step, DT, 3.0).step_marginal(DT).mean[0])

    # An accurate step within the gate is followed; an inaccurate one far outside has less influence than one inside.
    assert pull(0.01, accurate) == pytest.approx(0.01, rel=1e-2)
    assert pull(0.01, inaccurate) == pytest.approx(10 * pull(0.001, inaccurate))
    assert pull(1.0, inaccurate) < pull(0.01, inaccurate)
    wild = state.update_position(Gaussian(torch.tensor([3.0, 0.001]).double(), inaccurate), 4.0)
    assert abs(float(wild.q[0])) < 1e-12 and float(wild.q[1]) > 0
    assert state.update_position(Gaussian(torch.full((N,), 9.0).double(), accurate), 4.0) is state
    unlimited = state.update_position(Gaussian(torch.full((N,), 9.0).double(), accurate))
    assert float(unlimited.q.min()) > 1
