"""Smooths the velocities of a decoded video by a Kalman filter and a Rauch-Tung-Striebel smoother with a white-jerk model.

The state of each joint is its velocity and acceleration. The intensity of the jerk and the noise of the steps are estimated
from the video by maximum likelihood, with at most the noise that the covariance of the steps states; so jerky motion is kept.
The noise is white. A filter colors it, so the steps before the filter are smoothed where they are known.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.estimation.kalman import Gaussian, rts_smooth
from jidm.estimation.result import JointMotion

_PROCESS_NOISE_GRID = torch.logspace(-5, 3, 25, dtype=torch.float64)
"""Candidates of the variance that jerk adds to the velocity in one step, in variances of a measured step."""

_MIN_STEPS = 5  # with fewer, noise and motion cannot be distinguished
_INITIAL_VARIANCE = 1e8  # of velocity and acceleration before the first measurement, in variances of a measured step
_UNUSABLE_VARIANCE = 1e16  # of a step that is not usable, in the same unit


def smooth_motion(motion: JointMotion, measured: JointMotion | None = None) -> JointMotion:
    """Smooth the steps of a whole video, after decoding.

    Steps that are not valid are not used and stay invalid. Positions move by the accumulated changes of the steps, so that
    absolute corrections are kept. The part of the covariance that is not white noise is kept.

    Args:
        motion: filtered steps.
        measured: the same steps before the filter, with independent errors; they are smoothed in place of the filtered ones.

    Returns:
        A motion of the same shape; the given one if it has fewer than 5 steps.
    """
    *batch, steps, n = motion.delta_q.shape
    if steps < _MIN_STEPS:
        return motion
    dt = motion.time.diff().to(torch.float64)
    noisy = motion if measured is None else measured
    covariance = noisy.covariance.to(torch.float64)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    usable = motion.valid[..., None] & (variance > 0) & variance.isfinite() & (dt > 0)[:, None]

    def per_joint(x: Tensor) -> Tensor:
        return x.mT.reshape(-1, steps)

    velocity, smoothed_variance = _smooth_velocity(
        per_joint(noisy.velocity.to(torch.float64)), per_joint(variance / dt.square()[:, None]), per_joint(usable), dt
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
    """Smoothed velocity of each row and its variance, both per second.

    Args:
        velocity: of each step [1/s]. variance: of it. usable: whether it is used. dt: duration of each step [s].
    """
    finite_variance = torch.where(usable, variance, torch.nan)
    scale = finite_variance.nanmedian(dim=1, keepdim=True).values.nan_to_num(1.0)
    noise = torch.where(usable, variance / scale, torch.full_like(variance, torch.inf))
    measurements = torch.where(usable, velocity / scale.sqrt(), torch.zeros_like(velocity))
    interval = torch.cat([dt[:1], (dt[1:] + dt[:-1]) / 2]) / dt.mean()  # between the midpoints of steps, in mean steps
    interval = interval.clamp(min=1e-3)

    grid = len(_PROCESS_NOISE_GRID)
    repeated = tuple(x.repeat_interleave(grid, 0) for x in (measurements, noise, usable))
    log_likelihood = _VelocityFilter(
        repeated[0], repeated[1], repeated[2], interval, _PROCESS_NOISE_GRID.to(dt).repeat(len(measurements))
    ).log_likelihood.reshape(-1, grid)
    best = _VelocityFilter(measurements, noise, usable, interval, _PROCESS_NOISE_GRID.to(dt)[log_likelihood.argmax(1)])
    mean, smoothed_variance = best.smooth()
    noise_scale = best.noise_scale[:, None]
    # The part of the stated variance that is not white noise remains.
    systematic = torch.where(usable, noise * (1 - noise_scale).clamp(min=0), torch.zeros_like(noise))
    return mean * scale.sqrt(), (smoothed_variance * noise_scale + systematic) * scale


class _VelocityFilter:
    """Kalman filter over R rows of S steps; the state of a row is a velocity and its change per mean step.

    Attributes:
        noise_scale: (R,) maximum-likelihood factor on the stated variances, at most 1.
        log_likelihood: (R,) with that factor.
    """

    def __init__(
        self, measurements: Tensor, noise: Tensor, usable: Tensor, interval: Tensor, process_noise: Tensor
    ) -> None:
        rows = len(measurements)
        state = Gaussian(
            measurements.new_zeros(rows, 2), torch.eye(2).to(measurements).expand(rows, 2, 2) * _INITIAL_VARIANCE
        )
        observation = measurements.new_tensor([[1.0, 0.0]])
        self.transitions = [measurements.new_tensor([[1.0, h], [0.0, 1.0]]) for h in interval.tolist()]
        self.predicted: list[Gaussian] = []
        self.filtered: list[Gaussian] = []
        square, log_size, count, num_seen = measurements.new_zeros(4, rows)
        for t, h in enumerate(interval.tolist()):
            if t:
                F = self.transitions[t]
                # Integrated white noise of spectral density 3 `process_noise`, so that it adds `process_noise` to the
                # variance of a velocity in one mean step.
                noise_matrix = measurements.new_tensor([[h**3, 1.5 * h**2], [1.5 * h**2, 3 * h]])
                covariance = F @ state.covariance @ F.T + process_noise[:, None, None] * noise_matrix
                state = Gaussian(state.mean @ F.T, covariance)
            self.predicted.append(state)
            # A step that is not usable has so large a variance that its gain is zero.
            value = torch.where(usable[:, t], measurements[:, t], state.mean[:, 0])[:, None]
            measurement = Gaussian(value, noise[:, t, None, None].clamp(max=_UNUSABLE_VARIANCE))
            innovation, variance = (x.reshape(rows) for x in state.innovation(measurement, observation))
            state = state.condition(measurement, observation)
            self.filtered.append(state)
            # The first two measurements of a row only initialize it.
            counts = usable[:, t] & (num_seen >= 2)
            square = square + torch.where(counts, innovation.square() / variance, torch.zeros_like(variance))
            log_size = log_size + torch.where(counts, variance.log(), torch.zeros_like(variance))
            count, num_seen = count + counts, num_seen + usable[:, t]
        # The stated variance includes errors of all kinds, so the noise is at most that; what exceeds it is motion.
        self.noise_scale = (square / count.clamp(min=1)).clamp(1e-12, 1.0)
        self.log_likelihood = -0.5 * (log_size + count * self.noise_scale.log() + square / self.noise_scale)

    def smooth(self) -> tuple[Float[Tensor, "R S"], Float[Tensor, "R S"]]:
        """Velocity of each step given all measurements, and its variance before the noise scale."""
        states = rts_smooth(self.predicted[1:], self.filtered, self.transitions[1:])
        velocity = torch.stack([x.mean[:, 0] for x in states], 1)
        return velocity, torch.stack([x.covariance[:, 0, 0].clamp(min=0) for x in states], 1)
