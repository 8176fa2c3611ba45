"""What is known of a robot's motion: Gaussians over steps, and over positions and velocities from frame to frame.

A joint keeps moving for a while as it moves (an Ornstein-Uhlenbeck process: Uhlenbeck and Ornstein 1930), so the frames
before a step tell something about it. How lively each joint is comes from the video itself: a robot that moves one joint
is soon known to hold the others still.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

_RANK_TOLERANCE = 1e-10  # share of the largest eigenvalue of a correlation below which one is rounding


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A batch of vectors that are known so well.

    Attributes:
        mean: (*batch, n). covariance: (*batch, n, n).
    """

    mean: Float[Tensor, "*batch n"]
    covariance: Float[Tensor, "*batch n n"]

    def condition(self, measurement: Gaussian, observation_matrix: Float[Tensor, "k n"] | None = None) -> Gaussian:
        """The same vectors x once `seen @ x` was measured, x itself if not given; in this one's dtype, solved in float64."""
        P, R = self.covariance.double(), measurement.covariance.double()
        identity = torch.eye(P.shape[-1]).to(P)
        H = identity if observation_matrix is None else observation_matrix.to(P)
        gain = torch.linalg.solve(H @ P @ H.mT + R, H @ P).mT
        innovation = measurement.mean.double()[..., None] - H @ self.mean.double()[..., None]
        joseph = identity - gain @ H
        covariance = joseph @ P @ joseph.mT + gain @ R @ gain.mT  # Joseph's form stays positive
        mean = self.mean.double() + (gain @ innovation)[..., 0]
        return Gaussian(mean.to(self.mean), ((covariance + covariance.mT) / 2).to(self.mean))


@dataclass(frozen=True, eq=False)
class KalmanState:
    """A Gaussian over the positions and velocities of n joints: the state of a Kalman filter, in float64.

    Attributes:
        q: (n,) mean position [rad or m].
        velocity: (n,) mean [rad/s or m/s].
        covariance: (2n, 2n) of positions and velocities, in this order.
        velocity_variance: (n,) mean square velocity that each joint is expected to have.
        velocity_correlation: (n, n) correlation of the joints' velocities, as far as it is known beforehand.
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
        """At a position that is known so well, moving in any direction at that root mean square speed; independently
        where nothing is known of how the joints go together."""
        velocity_variance = velocity_std.double().square()
        velocity_correlation = (
            torch.eye(len(velocity_variance)).to(velocity_variance)
            if velocity_correlation is None
            else velocity_correlation.to(velocity_variance)
        )
        joint_covariance = torch.block_diag(
            covariance.double(), _velocity_covariance(velocity_variance, velocity_correlation)
        )
        return cls(
            q.double(), torch.zeros_like(velocity_variance), joint_covariance, velocity_variance, velocity_correlation
        )

    @property
    def position_covariance(self) -> Float[Tensor, "n n"]:
        """Of the positions alone."""
        return self.covariance[: len(self.q), : len(self.q)]

    def predict(self, dt: float, velocity_time_constant: float) -> KalmanState:
        """After dt [s] that nobody saw; `velocity_time_constant` is the time in which a velocity forgets itself [s]."""
        decay = math.exp(-dt / velocity_time_constant)
        identity = torch.eye(len(self.q)).to(self.q)
        transition = self.transition(dt, velocity_time_constant)
        noise_gain = torch.cat([dt * identity, identity])
        process_noise = (
            (1 - decay**2)
            * noise_gain
            @ _velocity_covariance(self.velocity_variance, self.velocity_correlation)
            @ noise_gain.mT
        )
        velocity = decay * self.velocity
        return replace(
            self,
            q=self.q + dt * velocity,
            velocity=velocity,
            covariance=transition @ self.covariance @ transition.mT + process_noise,
        )

    def transition(self, dt: float, velocity_time_constant: float) -> Float[Tensor, "m m"]:
        """What dt [s] make of mean positions and velocities.

        A step is the new velocity times dt, so that a measured step measures that velocity.
        """
        decay = math.exp(-dt / velocity_time_constant)
        identity = torch.eye(len(self.q)).to(self.q)
        return torch.cat(
            [torch.cat([identity, decay * dt * identity], 1), torch.cat([0 * identity, decay * identity], 1)]
        )

    @property
    def gaussian(self) -> Gaussian:
        """Of positions and velocities, in this order."""
        return Gaussian(torch.cat([self.q, self.velocity]), self.covariance)

    def step_marginal(self, dt: float) -> Gaussian:
        """The step that ends here and took dt [s]."""
        n = len(self.q)
        return Gaussian(self.velocity * dt, self.covariance[n:, n:] * dt**2)

    def update_step(self, measurement: Gaussian, dt: float, gate: float) -> KalmanState:
        """After measuring that step; one that is further off than `gate` standard deviations counts that much less."""
        n = len(self.q)
        observation_matrix = torch.eye(2 * n).to(self.q)[n:] * dt
        return self._update(observation_matrix, measurement, gate)

    def update_position(self, position: Gaussian, gate: float) -> KalmanState:
        """After a reading of the positions; joints read further off than `gate` standard deviations are not believed."""
        innovation_variance = position.covariance.diagonal().to(self.q) + self.position_covariance.diagonal()
        accepted = (position.mean.to(self.q) - self.q).abs() <= gate * innovation_variance.sqrt()
        observation_matrix = torch.eye(2 * len(self.q)).to(self.q)[: len(self.q)][accepted]
        gated = Gaussian(position.mean[accepted], position.covariance[accepted][:, accepted])
        return self._update(observation_matrix, gated) if bool(accepted.any()) else self

    def adapt_process_noise(self, window: float) -> KalmanState:
        """With the speed that was just seen counted in; `window` is how many frames are remembered."""
        n = len(self.q)
        mean_square = self.velocity.square() + self.covariance.diagonal()[n:]
        return replace(
            self, velocity_variance=self.velocity_variance + (mean_square - self.velocity_variance) / (window + 1)
        )

    def _update(
        self, observation_matrix: Float[Tensor, "k m"], measurement: Gaussian, gate: float = math.inf
    ) -> KalmanState:
        """After measuring `seen @ (q, velocity)`."""
        n = len(self.q)
        prior, noise = self.gaussian, measurement.covariance.to(self.q)
        innovation = measurement.mean.to(self.q) - observation_matrix @ prior.mean
        normalized_distance = float(
            innovation
            @ torch.linalg.solve(observation_matrix @ self.covariance @ observation_matrix.mT + noise, innovation)
        ) / len(innovation)
        posterior = prior.condition(
            Gaussian(measurement.mean.to(self.q), noise * max(1.0, normalized_distance / gate**2)), observation_matrix
        )
        return replace(self, q=posterior.mean[:n], velocity=posterior.mean[n:], covariance=posterior.covariance)


def rts_smooth(
    predicted: Sequence[Gaussian], filtered: Sequence[Gaussian], transitions: Sequence[Tensor]
) -> list[Gaussian]:
    """States given everything that was seen after them as well (Rauch, Tung and Striebel 1965).

    Args:
        predicted: states before each frame but the first was looked at. filtered: of all frames, after they were.
        transitions: (m, m) from each frame's state to the next one's expected mean.
    """
    smoothed = [filtered[-1]]
    for state, prediction, transition in zip(
        reversed(filtered[:-1]), reversed(predicted), reversed(transitions), strict=True
    ):
        gain = state.covariance @ transition.mT @ _pseudo_inverse(prediction.covariance)
        mean = state.mean + gain @ (smoothed[-1].mean - prediction.mean)
        covariance = state.covariance + gain @ (smoothed[-1].covariance - prediction.covariance) @ gain.mT
        smoothed.append(Gaussian(mean, (covariance + covariance.mT) / 2))
    return smoothed[::-1]


def _pseudo_inverse(covariance: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
    """Pseudo-inverse: from a first pose that is exactly known, the next one's error is that of the velocity alone."""
    std = covariance.diagonal().clamp(min=1e-300).sqrt()
    correlation = covariance / std[:, None] / std
    return torch.linalg.pinv(correlation, rtol=_RANK_TOLERANCE, hermitian=True) / std[:, None] / std


def _velocity_covariance(
    velocity_variance: Float[Tensor, " n"], velocity_correlation: Float[Tensor, "n n"]
) -> Float[Tensor, "n n"]:
    """Covariance of velocities of that mean square and correlation."""
    return velocity_variance.sqrt()[:, None] * velocity_correlation * velocity_variance.sqrt()
