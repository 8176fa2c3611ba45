"""A belief about a motion: filtering is conditioning, stillness is learned, what cannot be counts less."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from jidm.estimation.kalman import Gaussian, KalmanState, rts_smooth

DT, PERSISTENCE, N = 1 / 16, 0.4, 2
OPEN = 1e9


def spd(generator: torch.Generator, n: int = N, scale: float = 1.0) -> Tensor:
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return scale * (root @ root.mT + 0.1 * torch.eye(n).double())


def test_a_measured_gaussian_adds_information() -> None:
    generator = torch.Generator().manual_seed(0)
    prior, seen = (
        Gaussian(
            torch.randn(3, N, generator=generator).double(), torch.stack([spd(generator) for _ in range(3)])
        )
        for _ in range(2)
    )  # fmt: skip
    found = prior.condition(seen)
    P, R = prior.covariance.inverse(), seen.covariance.inverse()
    wanted = (P + R).inverse()
    torch.testing.assert_close(found.covariance, wanted)
    torch.testing.assert_close(found.mean[..., None], wanted @ (P @ prior.mean[..., None] + R @ seen.mean[..., None]))


@pytest.mark.parametrize("sure", [1e-3, 1e-9])
@pytest.mark.parametrize("together", [0.0, -0.7])
def test_filtering_is_conditioning_on_everything_so_far_and_looking_back_on_all_of_it(
    together: float, sure: float
) -> None:
    """The oracle: positions and velocities of all times as one Gaussian, all measurements in one least squares."""
    generator = torch.Generator().manual_seed(1)
    T, speed = 7, torch.tensor([0.7, 0.2]).double()
    q0, start = torch.tensor([0.3, -0.1]).double(), spd(generator, scale=sure)
    correlation = torch.tensor([[1.0, together], [together, 1.0]]).double()
    belief = (
        KalmanState.initialize(q0, start, speed, correlation) if together else KalmanState.initialize(q0, start, speed)
    )
    kept = math.exp(-DT / PERSISTENCE)
    # Unknowns: q_0, v_0 .. v_T (n each); q_t = q_0 + DT sum of v_1 .. v_t.
    one = torch.eye(N).double()

    def velocity(t: int) -> Tensor:
        return torch.cat([torch.zeros(N, N).double()] + [one if s == t else 0 * one for s in range(T + 1)], 1)

    def position(t: int) -> Tensor:
        return torch.cat([one] + [DT * one if 1 <= s <= t else 0 * one for s in range(T + 1)], 1)

    rows, values, information = [position(0)], [q0], [start.inverse()]

    def told(row: Tensor, value: Tensor, covariance: Tensor) -> None:
        rows.append(row), values.append(value), information.append(covariance.inverse())

    nothing, power = torch.zeros(N).double(), torch.diag(speed) @ correlation @ torch.diag(speed)
    told(velocity(0), nothing, power)
    expected, known, passed = [], [belief.gaussian], []
    for t in range(1, T + 1):
        told(velocity(t) - kept * velocity(t - 1), nothing, (1 - kept**2) * power)
        passed.append(belief.transition(DT, PERSISTENCE))
        belief = belief.predict(DT, PERSISTENCE)
        expected.append(belief.gaussian)
        if t != 3:
            step = Gaussian(torch.randn(N, generator=generator).double() * 0.05, spd(generator, scale=1e-4))
            belief = belief.update_step(step, DT, OPEN)
            told(DT * velocity(t), step.mean, step.covariance)
        if t % 2:
            read = Gaussian(torch.randn(N, generator=generator).double() * 0.1, spd(generator, scale=1e-2))
            belief = belief.update_position(read, OPEN)
            told(position(t), read.mean, read.covariance)
        known.append(belief.gaussian)
    A, b, W = torch.cat(rows), torch.cat(values), torch.block_diag(*information)
    covariance = (A.mT @ W @ A).inverse()
    mean = covariance @ A.mT @ W @ b
    last = torch.cat([position(T), velocity(T)])
    torch.testing.assert_close(torch.cat([belief.q, belief.velocity]), last @ mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(belief.covariance, last @ covariance @ last.mT, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(belief.step_marginal(DT).covariance, belief.covariance[N:, N:] * DT**2)
    for t, state in enumerate(rts_smooth(expected, known, passed)):
        row = torch.cat([position(t), velocity(t)])
        torch.testing.assert_close(state.mean, row @ mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(state.covariance, row @ covariance @ row.mT, rtol=1e-6, atol=1e-8)


def test_looking_back_from_a_first_pose_that_is_exactly_known_leaves_it_there() -> None:
    belief = KalmanState.initialize(
        torch.tensor([0.3, -0.1]).double(), torch.zeros(N, N).double(), torch.ones(N).double()
    )
    expected, known, passed = [], [belief.gaussian], []
    for _ in range(5):
        passed.append(belief.transition(DT, PERSISTENCE))
        belief = belief.predict(DT, PERSISTENCE)
        expected.append(belief.gaussian)
        belief = belief.update_step(
            Gaussian(torch.tensor([0.01, 0.02]).double(), 1e-6 * torch.eye(N).double()), DT, OPEN
        )
        known.append(belief.gaussian)
    states = rts_smooth(expected, known, passed)
    torch.testing.assert_close(states[0].mean[:N], torch.tensor([0.3, -0.1]).double(), rtol=0, atol=1e-9)
    for before, after in pairwise(states):  # positions still move by the velocities
        torch.testing.assert_close(after.mean[:N] - before.mean[:N], DT * after.mean[N:], rtol=1e-6, atol=1e-9)


def test_unseen_joints_are_expected_to_move_as_usual_and_nothing_is_forgotten_at_once() -> None:
    speed = torch.tensor([0.5, 0.1]).double()
    belief = KalmanState.initialize(torch.zeros(N).double(), torch.zeros(N, N).double(), speed)
    far = belief
    for _ in range(50):
        far = far.predict(DT, PERSISTENCE)
        torch.testing.assert_close(far.covariance[N:, N:], torch.diag(speed**2))
    assert torch.equal(far.q, belief.q)
    fast = replace(belief, velocity=speed).predict(DT, PERSISTENCE)
    torch.testing.assert_close(fast.step_marginal(DT).mean, speed * DT * math.exp(-DT / PERSISTENCE))
    torch.testing.assert_close(fast.q, fast.step_marginal(DT).mean)


def test_a_joint_that_stays_still_is_soon_known_to() -> None:
    speed = torch.tensor([0.5, 0.5]).double()
    belief = KalmanState.initialize(torch.zeros(N).double(), torch.zeros(N, N).double(), speed)
    precise = torch.diag(torch.tensor([1e-3, 1e-3]).double() ** 2)
    for _ in range(60):
        step = Gaussian(torch.tensor([0.0, 1.2]).double() * DT, precise)
        belief = belief.predict(DT, PERSISTENCE).update_step(step, DT, OPEN).adapt_process_noise(8)
    assert belief.velocity_variance[0] < 0.01 * speed[0] ** 2
    assert float(belief.velocity_variance[1]) == pytest.approx(1.2**2, rel=0.01)
    # A poor measurement now moves the lively joint only.
    poor = Gaussian(torch.tensor([0.1, 0.2]).double(), torch.diag(torch.full((N,), 0.05**2).double()))
    moved = belief.predict(DT, PERSISTENCE).update_step(poor, DT, OPEN).step_marginal(DT).mean
    assert moved[0].abs() < 0.01


def test_steps_that_cannot_be_count_less_and_such_readings_not_at_all() -> None:
    start = KalmanState.initialize(
        torch.zeros(N).double(), 1e-6 * torch.eye(N).double(), torch.full((N,), 0.1).double()
    )
    belief = start.predict(DT, PERSISTENCE)
    precise, poor = 1e-8 * torch.eye(N).double(), 1e-4 * torch.eye(N).double()

    def pull(off: float, noise: Tensor) -> float:
        return float(
            belief.update_step(Gaussian(torch.tensor([off, 0.0]).double(), noise), DT, 3.0).step_marginal(DT).mean[0]
        )

    # A precise step is believed even if it is a surprise; a poor one must be one that could be.
    assert pull(0.01, precise) == pytest.approx(0.01, rel=1e-2)
    assert pull(0.01, poor) == pytest.approx(10 * pull(0.001, poor))
    assert pull(1.0, poor) < pull(0.01, poor)
    wild = belief.update_position(Gaussian(torch.tensor([3.0, 0.001]).double(), 1e-4 * torch.eye(N).double()), 4.0)
    assert abs(float(wild.q[0])) < 1e-12 and float(wild.q[1]) > 0
    assert belief.update_position(Gaussian(torch.full((N,), 9.0).double(), precise), 4.0) is belief
