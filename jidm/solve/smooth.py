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

from jidm.joint_motion import JointMotion

_LIVELINESS = torch.logspace(-5, 3, 25, dtype=torch.float64)
"""Variance that the jerk adds to the velocity within a step, in variances of a measured step."""

_LEAST_STEPS = 5  # fewer tell noise and motion not apart
_UNKNOWN = 1e8  # variance of what nothing is known of yet, in variances of a measured step


def smoothed(motion: JointMotion) -> JointMotion:
    """The motion with every step told by its neighbours as well; for whole videos, after decoding.

    Steps that are not valid say nothing and stay not valid. Positions move by what the steps before them changed, so
    that what anchors them stays. The covariance keeps what of it is not noise from step to step.

    Returns:
        A motion of the same shape; the same one where it has fewer than 5 steps.
    """
    *batch, steps, n = motion.delta_q.shape
    if steps < _LEAST_STEPS:
        return motion
    dt = motion.time.diff().to(torch.float64)
    covariance = motion.covariance.to(torch.float64)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    usable = motion.valid[..., None] & (variance > 0) & variance.isfinite() & (dt > 0)[:, None]

    def rows(x: Tensor) -> Tensor:
        return x.mT.reshape(-1, steps)

    velocity, spread = _smooth(
        rows(motion.velocity.to(torch.float64)), rows(variance / dt.square()[:, None]), rows(usable), dt
    )  # fmt: skip
    velocity, spread = (x.reshape(*batch, n, steps).mT for x in (velocity, spread))
    delta_q = torch.where(usable, velocity * dt[:, None], motion.delta_q.to(torch.float64))
    shrink = torch.where(
        usable, (spread * dt.square()[:, None] / variance).clamp(max=1), torch.ones_like(spread)
    ).sqrt()
    moved = (delta_q - motion.delta_q).cumsum(-2)
    position = torch.cat([motion.position[..., :1, :], motion.position[..., 1:, :] + moved], -2)
    like = motion.delta_q
    return replace(
        motion,
        delta_q=delta_q.to(like),
        velocity=torch.where(usable, velocity, motion.velocity.to(torch.float64)).to(like),
        position=position.to(like),
        covariance=(covariance * shrink[..., None] * shrink[..., None, :]).to(like),
        provenance={**motion.provenance, "smoothed": True},
    )


def _smooth(
    velocity: Float[Tensor, "r s"], variance: Float[Tensor, "r s"], usable: Bool[Tensor, "r s"], dt: Float[Tensor, " s"]
) -> tuple[Float[Tensor, "r s"], Float[Tensor, "r s"]]:
    """Smoothed velocity of every row, and its variance, both per second."""
    known = torch.where(usable, variance, torch.nan)
    unit = known.nanmedian(dim=1, keepdim=True).values.nan_to_num(1.0)
    noise = torch.where(usable, variance / unit, torch.full_like(variance, torch.inf))
    measured = torch.where(usable, velocity / unit.sqrt(), torch.zeros_like(velocity))
    apart = torch.cat([dt[:1], (dt[1:] + dt[:-1]) / 2]) / dt.mean()  # between the middles of steps, in mean steps
    apart = apart.clamp(min=1e-3)

    grid = len(_LIVELINESS)
    wide = tuple(x.repeat_interleave(grid, 0) for x in (measured, noise, usable))
    likelihood = _Filter(wide[0], wide[1], wide[2], apart, _LIVELINESS.to(dt).repeat(len(measured))).likelihood.reshape(
        -1, grid
    )
    best = _Filter(measured, noise, usable, apart, _LIVELINESS.to(dt)[likelihood.argmax(1)])
    mean, spread = best.backwards()
    white = best.noise_scale[:, None]
    # The stated variance covers errors of all kinds; what of it is not noise from step to step smoothing cannot take away.
    lasting = torch.where(usable, noise * (1 - white).clamp(min=0), torch.zeros_like(noise))
    return mean * unit.sqrt(), (spread * white + lasting) * unit


class _Filter:
    """Forward pass over R rows of S steps; state: velocity and its rate per mean step.

    Attributes:
        likelihood: (R,) log-likelihood at the best noise scale. noise_scale: (R,) that scale, at most 1, on the stated
            variances.
    """

    def __init__(self, measured: Tensor, noise: Tensor, usable: Tensor, apart: Tensor, lively: Tensor) -> None:
        rows = len(measured)
        mean = measured.new_zeros(rows, 2)
        spread = torch.eye(2).to(measured).expand(rows, 2, 2) * _UNKNOWN
        self.F = [torch.tensor([[1.0, float(h)], [0.0, 1.0]]).to(measured) for h in apart]
        self.before, self.after = [], []
        square = log_size = measured.new_zeros(rows)
        count = measured.new_zeros(rows)
        seen = measured.new_zeros(rows)
        for t, h in enumerate(apart.tolist()):
            if t:
                added = measured.new_tensor([[h**3, 1.5 * h**2], [1.5 * h**2, 3 * h]])  # unit: 3 / the jerk's intensity
                mean = mean @ self.F[t].T
                spread = self.F[t] @ spread @ self.F[t].T + lively[:, None, None] * added
            self.before.append((mean, spread))
            size = spread[:, 0, 0] + noise[:, t]
            gain = spread[:, :, 0] / size[:, None]  # nothing where the noise is infinite
            error = measured[:, t] - mean[:, 0]
            mean = mean + gain * torch.where(usable[:, t], error, torch.zeros_like(error))[:, None]
            spread = spread - gain[:, :, None] * spread[:, None, 0, :]
            self.after.append((mean, spread))
            # The first two measurements of a row only start it.
            counts = usable[:, t] & (seen >= 2)
            square = square + torch.where(counts, error.square() / size, torch.zeros_like(error))
            log_size = log_size + torch.where(counts, size.log(), torch.zeros_like(error))
            count, seen = count + counts, seen + usable[:, t]
        # Noise may be less than the steps' stated variance, which covers more than noise, but not more: what goes beyond it
        # is motion.
        self.noise_scale = (square / count.clamp(min=1)).clamp(1e-12, 1.0)
        self.likelihood = -0.5 * (log_size + count * self.noise_scale.log() + square / self.noise_scale)

    def backwards(self) -> tuple[Float[Tensor, "R S"], Float[Tensor, "R S"]]:
        """Velocity of every step given all of them, and its variance before the noise scale."""
        mean, spread = self.after[-1]
        out = [(mean[:, 0], spread[:, 0, 0])]
        for t in range(len(self.after) - 2, -1, -1):
            (filtered, P), (ahead, P_ahead) = self.after[t], self.before[t + 1]
            gain = P @ self.F[t + 1].T @ torch.linalg.pinv(P_ahead, hermitian=True)
            mean = filtered + (gain @ (mean - ahead)[:, :, None])[:, :, 0]
            spread = P + gain @ (spread - P_ahead) @ gain.mT
            out.append((mean[:, 0], spread[:, 0, 0].clamp(min=0)))
        values, variances = zip(*reversed(out))
        return torch.stack(values, 1), torch.stack(variances, 1)
