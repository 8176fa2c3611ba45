"""Smoothing of decoded velocities: less noise, no bias on smooth motion, calibrated covariance, against dense least squares."""

from __future__ import annotations

import pytest
import torch

from jidm.estimation.result import JointMotion
from jidm.estimation.smoother import _VelocityFilter, smooth_motion

FPS, STEPS = 16.0, 63


def motion_of(delta_q: torch.Tensor, std: float, valid: torch.Tensor | None = None) -> JointMotion:
    *batch, steps, n = delta_q.shape
    time = torch.arange(steps + 1, dtype=torch.float64) / FPS
    if valid is None:
        valid = torch.ones(*batch, steps, dtype=torch.bool)
    delta_q = delta_q * valid[..., None]
    zeros = delta_q.new_zeros(*batch, steps)
    position = torch.cat([delta_q.new_zeros(*batch, 1, n), delta_q.cumsum(-2)], -2)
    return JointMotion(
        joint_names=tuple("abcdefgh"[:n]), joint_types=("revolute",) * n, time=time, delta_q=delta_q,
        velocity=delta_q * FPS, position=position, position_std=torch.ones_like(position),
        covariance=(torch.eye(n) * std**2).expand(*batch, steps, n, n).to(delta_q), residual=zeros, explained_fraction=zeros,
        agreement=zeros,
        observable=valid[..., None].expand(*batch, steps, n), valid=valid, provenance={"seed": 3},
    )  # fmt: skip


def waves(*batch: int, n: int = 3, hertz: float = 0.6) -> torch.Tensor:
    """Steps of smooth motions [rad]."""
    g = torch.Generator().manual_seed(0)
    t = torch.arange(STEPS + 1, dtype=torch.float64)[:, None] / FPS
    rate, phase = (torch.rand(*batch, 1, n, generator=g, dtype=torch.float64) for _ in range(2))
    return (0.3 * torch.sin(6.2832 * (hertz * (0.5 + rate) * t + phase))).diff(dim=-2)


def noise_like(x: torch.Tensor, std: float, seed: int = 1) -> torch.Tensor:
    return std * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def std_of(motion: JointMotion) -> torch.Tensor:
    return motion.covariance.diagonal(dim1=-2, dim2=-1).sqrt()


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("stated", [0.01, 0.03])
def test_noise_and_stated_variance_fall_together(batch: tuple[int, ...], stated: float) -> None:
    truth = waves(*batch)
    raw = motion_of(truth + noise_like(truth, 0.01), stated)
    out = smooth_motion(raw)
    before, after = ((m.delta_q - truth).square().mean().sqrt() for m in (raw, out))
    assert after < 0.6 * before
    assert torch.allclose(out.velocity / FPS, out.delta_q)
    assert torch.allclose(out.position.diff(dim=-2), out.delta_q, atol=1e-12)
    assert out.provenance["smoothed"] and out.provenance["seed"] == 3
    if stated == 0.01:
        assert 0.6 < after / std_of(out).square().mean().sqrt() < 1.5


def test_systematic_error_stays_in_the_covariance() -> None:
    truth = waves(20)
    systematic = 0.02 * torch.sign(waves(20, hertz=0.2))  # nearly constant from step to step
    raw = motion_of(truth + systematic + noise_like(truth, 0.005), 0.021)
    out = smooth_motion(raw)
    z = (out.delta_q - truth).abs() / std_of(out)
    assert (z < 1.96).double().mean() > 0.9


def test_smooth_motion_without_noise_stays() -> None:
    truth = waves(5)
    out = smooth_motion(motion_of(truth, 0.01))
    assert (out.delta_q - truth).abs().max() < 0.02 * truth.abs().max()


def test_jerky_motion_is_kept() -> None:
    truth = waves(8) + noise_like(waves(8), 0.05)
    out = smooth_motion(motion_of(truth + noise_like(truth, 0.001, seed=2), 0.001))
    assert (out.delta_q - truth).abs().max() < 0.006


def test_invalid_steps_have_no_influence_and_stay_invalid() -> None:
    truth = waves(3)
    noisy = truth + noise_like(truth, 0.01)
    valid = torch.ones(3, STEPS, dtype=torch.bool)
    valid[:, 10:14] = False
    valid[2] = False
    wild = noisy.clone()
    wild[:, 10:14] = 50.0
    one, two = smooth_motion(motion_of(noisy, 0.01, valid)), smooth_motion(motion_of(wild, 0.01, valid))
    assert torch.equal(one.delta_q, two.delta_q)
    assert (one.delta_q[~valid] == 0).all() and torch.equal(one.valid, valid)
    assert one.delta_q.isfinite().all() and one.covariance.isfinite().all() and one.position.isfinite().all()


def test_unevenly_spaced_frames_and_short_videos() -> None:
    raw = motion_of(waves(2), 0.01)
    time = raw.time + 0.3 / FPS * torch.sin(torch.arange(STEPS + 1.0))
    speed = 0.7
    uneven = motion_of(torch.zeros_like(raw.delta_q), 0.01)
    delta_q = (speed * time.diff())[:, None].expand_as(raw.delta_q)
    uneven = JointMotion(
        **{**uneven.__dict__, "time": time, "delta_q": delta_q, "velocity": torch.full_like(delta_q, speed)}
    )
    assert torch.allclose(smooth_motion(uneven).velocity, torch.full_like(delta_q, speed), atol=1e-6)
    short = raw[:4]
    assert smooth_motion(short) is short


def test_against_dense_least_squares() -> None:
    """The smoother minimizes the squared errors of all measurements and all transitions together."""
    steps, process_noise = 12, 0.3
    g = torch.Generator().manual_seed(5)
    measured = torch.randn(1, steps, generator=g, dtype=torch.float64)
    noise = 0.5 + torch.rand(1, steps, generator=g, dtype=torch.float64)
    interval = 0.5 + torch.rand(steps, generator=g, dtype=torch.float64)
    found = _VelocityFilter(
        measured, noise, torch.ones(1, steps, dtype=torch.bool), interval, torch.tensor([process_noise]).double()
    )
    rows, right = [], []
    for t in range(steps):
        row = torch.zeros(2 * steps, dtype=torch.float64)
        row[2 * t] = 1
        rows.append(row / noise[0, t].sqrt())
        right.append(measured[0, t] / noise[0, t].sqrt())
        if t:
            h = float(interval[t])
            F = torch.tensor([[1, h], [0, 1]]).double()
            Q = process_noise * 3 * torch.tensor([[h**3 / 3, h**2 / 2], [h**2 / 2, h]]).double()
            root = torch.linalg.inv(torch.linalg.cholesky(Q))
            block = torch.zeros(2, 2 * steps, dtype=torch.float64)
            block[:, 2 * t : 2 * t + 2], block[:, 2 * t - 2 : 2 * t] = root, -root @ F
            rows += list(block)
            right += [torch.zeros((), dtype=torch.float64)] * 2
    A, b = torch.stack(rows), torch.stack(right)
    x = torch.linalg.lstsq(A, b).solution[0::2]
    covariance = torch.linalg.inv(A.T @ A).diagonal()[0::2]
    mean, variance = found.smooth()
    assert torch.allclose(mean[0], x, atol=1e-5) and torch.allclose(variance[0], covariance, atol=1e-5)


def test_steps_before_a_filter_are_smoothed_in_place_of_filtered_ones() -> None:
    """A filter colors the noise, and colored noise looks like motion."""
    truth = waves(20)
    measured = motion_of(truth + noise_like(truth, 0.01), 0.01)
    steps = [measured.delta_q[..., 0, :]]
    for step in measured.delta_q.unbind(-2)[1:]:
        steps.append(0.6 * steps[-1] + 0.4 * step)
    filtered = motion_of(torch.stack(steps, -2), 0.005)
    out, alone = smooth_motion(filtered, measured), smooth_motion(measured)
    assert torch.equal(out.delta_q, alone.delta_q) and torch.equal(out.covariance, alone.covariance)
    moved = (out.delta_q - filtered.delta_q).cumsum(-2)
    assert torch.allclose(out.position[..., 1:, :], filtered.position[..., 1:, :] + moved)
    error, without = ((m.delta_q - truth).square().mean().sqrt() for m in (out, smooth_motion(filtered)))
    assert error < 0.8 * without
