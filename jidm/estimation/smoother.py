"""Steps of a whole video told better by their neighbours: robots move smoothly, errors of single steps do not.

Each joint's velocity is taken to drift by a white jerk, integrated twice; a Kalman filter forwards and a smoother
backwards (Rauch, Tung and Striebel 1965) give the best velocity of every step under that. How lively the joint is and
how noisy its steps are is read off the video itself, by maximum likelihood within what their covariance allows: a robot
that jerks stays as it was decoded.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.estimation.result import JointMotion

_PROCESS_NOISE_GRID = torch.logspace(-5, 3, 25, dtype=torch.float64)
"""Variance that the jerk adds to the velocity within a step, in variances of a measured step."""

_MIN_STEPS = 5  # fewer tell noise and motion not apart
_INITIAL_VARIANCE = 1e8  # variance of what nothing is known of yet, in variances of a measured step


def smooth_motion(motion: JointMotion) -> JointMotion:
    """The motion with every step told by its neighbours as well; for whole videos, after decoding.

    Steps that are not valid say nothing and stay not valid. Positions move by what the steps before them changed, so
    that what anchors them stays. The covariance keeps what of it is not noise from step to step.

    Returns:
        A motion of the same shape; the same one where it has fewer than 5 steps.
    """
    *batch, steps, n = motion.delta_q.shape
    if steps < _MIN_STEPS:
        return motion
    dt = motion.time.diff().to(torch.float64)
    covariance = motion.covariance.to(torch.float64)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    usable = motion.valid[..., None] & (variance > 0) & variance.isfinite() & (dt > 0)[:, None]

    def per_joint(x: Tensor) -> Tensor:
        return x.mT.reshape(-1, steps)

    velocity, smoothed_variance = _smooth_velocity(
        per_joint(motion.velocity.to(torch.float64)), per_joint(variance / dt.square()[:, None]), per_joint(usable), dt
    )  # fmt: skip
    velocity, smoothed_variance = (x.reshape(*batch, n, steps).mT for x in (velocity, smoothed_variance))
    delta_q = torch.where(usable, velocity * dt[:, None], motion.delta_q.to(torch.float64))
    shrink = torch.where(
        usable, (smoothed_variance * dt.square()[:, None] / variance).clamp(max=1), torch.ones_like(smoothed_variance)
    ).sqrt()
    correction = (delta_q - motion.delta_q).cumsum(-2)
    position = torch.cat([motion.position[..., :1, :], motion.position[..., 1:, :] + correction], -2)
    like = motion.delta_q
    return replace(
        motion,
        delta_q=delta_q.to(like),
        velocity=torch.where(usable, velocity, motion.velocity.to(torch.float64)).to(like),
        position=position.to(like),
        covariance=(covariance * shrink[..., None] * shrink[..., None, :]).to(like),
        provenance={**motion.provenance, "smoothed": True},
    )


def _smooth_velocity(
    velocity: Float[Tensor, "r s"], variance: Float[Tensor, "r s"], usable: Bool[Tensor, "r s"], dt: Float[Tensor, " s"]
) -> tuple[Float[Tensor, "r s"], Float[Tensor, "r s"]]:
    """Smoothed velocity of every row, and its variance, both per second."""
    finite_variance = torch.where(usable, variance, torch.nan)
    scale = finite_variance.nanmedian(dim=1, keepdim=True).values.nan_to_num(1.0)
    noise = torch.where(usable, variance / scale, torch.full_like(variance, torch.inf))
    measurements = torch.where(usable, velocity / scale.sqrt(), torch.zeros_like(velocity))
    interval = torch.cat([dt[:1], (dt[1:] + dt[:-1]) / 2]) / dt.mean()  # between the middles of steps, in mean steps
    interval = interval.clamp(min=1e-3)

    grid = len(_PROCESS_NOISE_GRID)
    repeated = tuple(x.repeat_interleave(grid, 0) for x in (measurements, noise, usable))
    log_likelihood = _VelocityFilter(
        repeated[0], repeated[1], repeated[2], interval, _PROCESS_NOISE_GRID.to(dt).repeat(len(measurements))
    ).log_likelihood.reshape(-1, grid)
    best = _VelocityFilter(measurements, noise, usable, interval, _PROCESS_NOISE_GRID.to(dt)[log_likelihood.argmax(1)])
    mean, smoothed_variance = best.smooth()
    noise_scale = best.noise_scale[:, None]
    # The stated variance covers errors of all kinds; what of it is not noise from step to step smoothing cannot take away.
    systematic = torch.where(usable, noise * (1 - noise_scale).clamp(min=0), torch.zeros_like(noise))
    return mean * scale.sqrt(), (smoothed_variance * noise_scale + systematic) * scale


class _VelocityFilter:
    """Forward pass over R rows of S steps; state: velocity and its rate per mean step.

    Attributes:
        likelihood: (R,) log-likelihood at the best noise scale. noise_scale: (R,) that scale, at most 1, on the stated
            variances.
    """

    def __init__(
        self, measurements: Tensor, noise: Tensor, usable: Tensor, interval: Tensor, process_noise: Tensor
    ) -> None:
        rows = len(measurements)
        mean = measurements.new_zeros(rows, 2)
        covariance = torch.eye(2).to(measurements).expand(rows, 2, 2) * _INITIAL_VARIANCE
        self.F = [torch.tensor([[1.0, float(h)], [0.0, 1.0]]).to(measurements) for h in interval]
        self.predicted, self.filtered = [], []
        square = log_size = measurements.new_zeros(rows)
        count = measurements.new_zeros(rows)
        num_seen = measurements.new_zeros(rows)
        for t, h in enumerate(interval.tolist()):
            if t:
                noise_matrix = measurements.new_tensor(
                    [[h**3, 1.5 * h**2], [1.5 * h**2, 3 * h]]
                )  # unit: 3 / the jerk's intensity
                mean = mean @ self.F[t].T
                covariance = self.F[t] @ covariance @ self.F[t].T + process_noise[:, None, None] * noise_matrix
            self.predicted.append((mean, covariance))
            innovation_variance = covariance[:, 0, 0] + noise[:, t]
            gain = covariance[:, :, 0] / innovation_variance[:, None]  # nothing where the noise is infinite
            innovation = measurements[:, t] - mean[:, 0]
            mean = mean + gain * torch.where(usable[:, t], innovation, torch.zeros_like(innovation))[:, None]
            covariance = covariance - gain[:, :, None] * covariance[:, None, 0, :]
            self.filtered.append((mean, covariance))
            # The first two measurements of a row only start it.
            counts = usable[:, t] & (num_seen >= 2)
            square = square + torch.where(
                counts, innovation.square() / innovation_variance, torch.zeros_like(innovation)
            )
            log_size = log_size + torch.where(counts, innovation_variance.log(), torch.zeros_like(innovation))
            count, num_seen = count + counts, num_seen + usable[:, t]
        # Noise may be less than the steps' stated variance, which covers more than noise, but not more: what goes beyond it
        # is motion.
        self.noise_scale = (square / count.clamp(min=1)).clamp(1e-12, 1.0)
        self.log_likelihood = -0.5 * (log_size + count * self.noise_scale.log() + square / self.noise_scale)

    def smooth(self) -> tuple[Float[Tensor, "R S"], Float[Tensor, "R S"]]:
        """Velocity of every step given all of them, and its variance before the noise scale."""
        mean, covariance = self.filtered[-1]
        out = [(mean[:, 0], covariance[:, 0, 0])]
        for t in range(len(self.filtered) - 2, -1, -1):
            (filtered, P), (predicted, P_ahead) = self.filtered[t], self.predicted[t + 1]
            gain = P @ self.F[t + 1].T @ torch.linalg.pinv(P_ahead, hermitian=True)
            mean = filtered + (gain @ (mean - predicted)[:, :, None])[:, :, 0]
            covariance = P + gain @ (covariance - P_ahead) @ gain.mT
            out.append((mean[:, 0], covariance[:, 0, 0].clamp(min=0)))
        values, variances = zip(*reversed(out))
        return torch.stack(values, 1), torch.stack(variances, 1)
