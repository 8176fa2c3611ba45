"""A constant-velocity Kalman filter over joint positions and velocities, and the Rauch-Tung-Striebel smoother.

Velocities are Ornstein-Uhlenbeck processes (Uhlenbeck and Ornstein 1930): a joint that moves keeps moving for a while. The
process noise of each joint adapts to its recent motion, so that a resting joint is not moved by measurement noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_RANK_TOLERANCE = 1e-10  # eigenvalues of a correlation below this fraction of the largest are rounding errors


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A batch of normally distributed vectors.

    Attributes:
        mean: (*batch, n). covariance: (*batch, n, n).
    """

    mean: Float[Tensor, "*batch n"]
    covariance: Float[Tensor, "*batch n n"]

    def innovation(
        self, measurement: Gaussian, observation_matrix: Float[Tensor, "k n"] | None = None
    ) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch k k"]]:
        """Difference of a measurement of `observation_matrix @ x` (of x if not given) from its expected value, and the
        covariance of that difference; in float64."""
        P, R = self.covariance.double(), measurement.covariance.double()
        H = torch.eye(P.shape[-1]).to(P) if observation_matrix is None else observation_matrix.to(P)
        error = measurement.mean.double() - (H @ self.mean.double()[..., None])[..., 0]
        return error, H @ P @ H.mT + R

    def condition(self, measurement: Gaussian, observation_matrix: Float[Tensor, "k n"] | None = None) -> Gaussian:
        """The posterior given a measurement of `observation_matrix @ x` (of x if not given); solved in float64, returned in
        the dtype of the prior."""
        P, R = self.covariance.double(), measurement.covariance.double()
        identity = torch.eye(P.shape[-1]).to(P)
        H = identity if observation_matrix is None else observation_matrix.to(P)
        error, innovation_covariance = self.innovation(measurement, H)
        gain = torch.linalg.solve(innovation_covariance, H @ P).mT
        joseph = identity - gain @ H
        covariance = joseph @ P @ joseph.mT + gain @ R @ gain.mT  # Joseph's form keeps it positive semi-definite
        mean = self.mean.double() + (gain @ error[..., None])[..., 0]
        return Gaussian(mean.to(self.mean), ((covariance + covariance.mT) / 2).to(self.mean))


@dataclass(frozen=True)
class FilterOptions:
    """Options of the Kalman filter.

    Attributes:
        velocity_time_constant: time in which a velocity decorrelates [s].
        process_noise_window: number of frames over which the mean square velocity of a joint is averaged.
        process_noise_floor: standard deviation of a step that is added to the adapted process noise, as a fraction of the
            largest step of a joint.
        gate: where a measured step is more standard deviations than this away from the predicted one, its covariance is
            inflated; where a measured position is, it is rejected. None accepts everything.
    """

    velocity_time_constant: float = 0.5
    process_noise_window: float = 16.0
    process_noise_floor: float = 0.0
    gate: float | None = 4.0


@dataclass(frozen=True, eq=False)
class KalmanState:
    """State of the filter: a Gaussian over the positions and velocities of n joints, in float64.

    Attributes:
        q: (n,) mean position [rad or m].
        velocity: (n,) mean [rad/s or m/s].
        covariance: (2n, 2n) of positions and velocities, in this order.
        velocity_variance: (n,) stationary variance of each joint's velocity, which defines the process noise.
        velocity_correlation: (n, n) correlation of the joints' velocities in the process noise.
    """

    q: Float[Tensor, " n"]
    velocity: Float[Tensor, " n"]
    covariance: Float[Tensor, "m m"]
    velocity_variance: Float[Tensor, " n"]
    velocity_correlation: Float[Tensor, "n n"]

    @classmethod
    def initialize(
        cls, q: Float[Tensor, " n"], covariance: Float[Tensor, "n n"], velocity_std: Float[Tensor, " n"],
        velocity_correlation: Float[Tensor, "n n"] | None = None,
    ) -> KalmanState:  # fmt: skip
        """State with zero mean velocity.

        Args:
            q: joint positions [rad or m]. covariance: of them.
            velocity_std: [rad/s or m/s].
            velocity_correlation: of the joints; independent if not given.
        """
        variance = velocity_std.double().square()
        correlation = torch.eye(len(variance)) if velocity_correlation is None else velocity_correlation
        correlation = correlation.to(variance)
        joint_covariance = torch.block_diag(covariance.double(), _velocity_covariance(variance, correlation))
        return cls(q.double(), torch.zeros_like(variance), joint_covariance, variance, correlation)

    @property
    def position_covariance(self) -> Float[Tensor, "n n"]:
        """Marginal covariance of the positions."""
        return self.covariance[: len(self.q), : len(self.q)]

    @property
    def gaussian(self) -> Gaussian:
        """Joint distribution of positions and velocities, in this order."""
        return Gaussian(torch.cat([self.q, self.velocity]), self.covariance)

    def transition(self, dt: float, velocity_time_constant: float) -> Float[Tensor, "m m"]:
        """State transition matrix over dt [s].

        A step is the velocity after it times dt, so that a measured step is a measurement of the velocity.
        """
        decay = math.exp(-dt / velocity_time_constant)
        identity = torch.eye(len(self.q)).to(self.q)
        return torch.cat(
            [torch.cat([identity, decay * dt * identity], 1), torch.cat([0 * identity, decay * identity], 1)]
        )

    def predict(
        self, dt: float, velocity_time_constant: float, min_step_std: Float[Tensor, " n"] | None = None
    ) -> KalmanState:
        """Predict the state dt later.

        Args:
            dt: [s]. velocity_time_constant: see `FilterOptions`.
            min_step_std: standard deviation of the step that is added to the process noise [rad or m].
        """
        decay = math.exp(-dt / velocity_time_constant)
        identity = torch.eye(len(self.q)).to(self.q)
        transition = self.transition(dt, velocity_time_constant)
        noise_gain = torch.cat([dt * identity, identity])
        noise = (1 - decay**2) * _velocity_covariance(self.velocity_variance, self.velocity_correlation)
        if min_step_std is not None:
            noise = noise + torch.diag((min_step_std.to(noise) / dt).square())
        velocity = decay * self.velocity
        return replace(
            self,
            q=self.q + dt * velocity,
            velocity=velocity,
            covariance=transition @ self.covariance @ transition.mT + noise_gain @ noise @ noise_gain.mT,
        )

    def step_marginal(self, dt: float) -> Gaussian:
        """Distribution of the step of duration dt [s] that ends at this state."""
        n = len(self.q)
        return Gaussian(self.velocity * dt, self.covariance[n:, n:] * dt**2)

    def with_unknown_velocity(
        self, joints: Bool[Tensor, " n"], dt: float, step_std: Float[Tensor, " n"]
    ) -> KalmanState:
        """The prediction where the velocities of some joints changed more than was expected: process noise is raised.

        Adjustable process noise (Bar-Shalom, Li and Kirubarajan 2001, chapter 11).

        Args:
            joints: that changed their velocity. dt: time since the last frame [s].
            step_std: standard deviation of their step [rad or m].
        """
        identity = torch.eye(len(self.q)).to(self.q)
        noise_gain = torch.cat([dt * identity, identity])
        variance = torch.where(joints, step_std.to(self.q) / dt, 0.0).square()
        return replace(self, covariance=self.covariance + noise_gain * variance @ noise_gain.T)

    def update_step(self, measurement: Gaussian, dt: float, gate: float | None = None) -> KalmanState:
        """Update with a measured step [rad or m]; the covariance of one beyond `gate` standard deviations is inflated until it
        is at the gate."""
        observation_matrix = torch.eye(2 * len(self.q)).to(self.q)[len(self.q) :] * dt
        measurement = Gaussian(measurement.mean.to(self.q), measurement.covariance.to(self.q))
        if gate is not None:
            error, covariance = self.gaussian.innovation(measurement, observation_matrix)
            normalized_distance = float(error @ torch.linalg.solve(covariance, error)) / len(error)
            inflation = max(1.0, normalized_distance / gate**2)
            measurement = Gaussian(measurement.mean, measurement.covariance * inflation)
        return self._with(self.gaussian.condition(measurement, observation_matrix))

    def update_position(self, position: Gaussian, gate: float | None = None) -> KalmanState:
        """Update with measured positions [rad or m]; joints beyond `gate` standard deviations are left out."""
        n = len(self.q)
        observation_matrix = torch.eye(2 * n).to(self.q)[:n]
        position = Gaussian(position.mean.to(self.q), position.covariance.to(self.q))
        if gate is not None:
            variance = position.covariance.diagonal() + self.position_covariance.diagonal()
            accepted = (position.mean - self.q).abs() <= gate * variance.sqrt()
            if not bool(accepted.any()):
                return self
            observation_matrix = observation_matrix[accepted]
            position = Gaussian(position.mean[accepted], position.covariance[accepted][:, accepted])
        return self._with(self.gaussian.condition(position, observation_matrix))

    def adapt_process_noise(self, window: float) -> KalmanState:
        """Update the stationary velocity variance: a running mean of squared velocities over about `window` frames."""
        n = len(self.q)
        mean_square = self.velocity.square() + self.covariance.diagonal()[n:]
        return replace(
            self, velocity_variance=self.velocity_variance + (mean_square - self.velocity_variance) / (window + 1)
        )

    def _with(self, posterior: Gaussian) -> KalmanState:
        n = len(self.q)
        return replace(self, q=posterior.mean[:n], velocity=posterior.mean[n:], covariance=posterior.covariance)


def rts_smooth(
    predicted: Sequence[Gaussian], filtered: Sequence[Gaussian], transitions: Sequence[Tensor]
) -> list[Gaussian]:
    """Rauch-Tung-Striebel smoother (1965): states given all measurements, any batch shape.

    Args:
        predicted: states of all frames but the first, before their update.
        filtered: states of all frames, after their update.
        transitions: (m, m) matrices from each frame to the next.

    Returns:
        One state per frame.
    """
    smoothed = [filtered[-1]]
    for state, prediction, transition in zip(
        reversed(filtered[:-1]), reversed(predicted), reversed(transitions), strict=True
    ):
        gain = state.covariance @ transition.mT @ _pseudo_inverse(prediction.covariance)
        mean = state.mean + (gain @ (smoothed[-1].mean - prediction.mean)[..., None])[..., 0]
        covariance = state.covariance + gain @ (smoothed[-1].covariance - prediction.covariance) @ gain.mT
        smoothed.append(Gaussian(mean, (covariance + covariance.mT) / 2))
    return smoothed[::-1]


def _pseudo_inverse(covariance: Float[Tensor, "*batch m m"]) -> Float[Tensor, "*batch m m"]:
    """Pseudo-inverse, since the covariance is singular after a first pose that is exactly known."""
    std = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300).sqrt()
    scale = std[..., :, None] * std[..., None, :]
    return torch.linalg.pinv(covariance / scale, rtol=_RANK_TOLERANCE, hermitian=True) / scale


def _velocity_covariance(variance: Float[Tensor, " n"], correlation: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    return variance.sqrt()[:, None] * correlation * variance.sqrt()
