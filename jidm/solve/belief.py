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

_SINGULAR = 1e-10  # share of the largest eigenvalue of a correlation below which one is rounding


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A batch of vectors that are known so well.

    Attributes:
        mean: (*batch, n). covariance: (*batch, n, n).
    """

    mean: Float[Tensor, "*batch n"]
    covariance: Float[Tensor, "*batch n n"]

    def given(self, measured: Gaussian, seen: Float[Tensor, "k n"] | None = None) -> Gaussian:
        """The same vectors x once `seen @ x` was measured, x itself if not given; in this one's dtype, solved in float64."""
        P, R = self.covariance.double(), measured.covariance.double()
        one = torch.eye(P.shape[-1]).to(P)
        H = one if seen is None else seen.to(P)
        gain = torch.linalg.solve(H @ P @ H.mT + R, H @ P).mT
        off = measured.mean.double()[..., None] - H @ self.mean.double()[..., None]
        kept = one - gain @ H
        covariance = kept @ P @ kept.mT + gain @ R @ gain.mT  # Joseph's form stays positive
        mean = self.mean.double() + (gain @ off)[..., 0]
        return Gaussian(mean.to(self.mean), ((covariance + covariance.mT) / 2).to(self.mean))


@dataclass(frozen=True, eq=False)
class Belief:
    """A Gaussian over the positions and velocities of n joints: the state of a Kalman filter, in float64.

    Attributes:
        q: (n,) mean position [rad or m].
        velocity: (n,) mean [rad/s or m/s].
        covariance: (2n, 2n) of positions and velocities, in this order.
        power: (n,) mean square velocity that each joint is expected to have.
        together: (n, n) correlation of the joints' velocities, as far as it is known beforehand.
    """

    q: Float[Tensor, " n"]
    velocity: Float[Tensor, " n"]
    covariance: Float[Tensor, "m m"]
    power: Float[Tensor, " n"]
    together: Float[Tensor, "n n"]

    @classmethod
    def begin(
        cls, q: Float[Tensor, " n"], covariance: Float[Tensor, "n n"], speed: Float[Tensor, " n"],
        together: Float[Tensor, "n n"] | None = None,
    ) -> Belief:  # fmt: skip
        """At a position that is known so well, moving in any direction at that root mean square speed; independently
        where nothing is known of how the joints go together."""
        power = speed.double().square()
        together = torch.eye(len(power)).to(power) if together is None else together.to(power)
        both = torch.block_diag(covariance.double(), _spread(power, together))
        return cls(q.double(), torch.zeros_like(power), both, power, together)

    @property
    def position_covariance(self) -> Float[Tensor, "n n"]:
        """Of the positions alone."""
        return self.covariance[: len(self.q), : len(self.q)]

    def ahead(self, dt: float, persistence: float) -> Belief:
        """After dt [s] that nobody saw; `persistence` is the time in which a velocity forgets itself [s]."""
        kept = math.exp(-dt / persistence)
        one = torch.eye(len(self.q)).to(self.q)
        move = self.move(dt, persistence)
        into = torch.cat([dt * one, one])
        added = (1 - kept**2) * into @ _spread(self.power, self.together) @ into.mT
        velocity = kept * self.velocity
        return replace(
            self, q=self.q + dt * velocity, velocity=velocity, covariance=move @ self.covariance @ move.mT + added
        )

    def move(self, dt: float, persistence: float) -> Float[Tensor, "m m"]:
        """What dt [s] make of mean positions and velocities.

        A step is the new velocity times dt, so that a measured step measures that velocity.
        """
        kept = math.exp(-dt / persistence)
        one = torch.eye(len(self.q)).to(self.q)
        return torch.cat([torch.cat([one, kept * dt * one], 1), torch.cat([0 * one, kept * one], 1)])

    @property
    def state(self) -> Gaussian:
        """Of positions and velocities, in this order."""
        return Gaussian(torch.cat([self.q, self.velocity]), self.covariance)

    def step(self, dt: float) -> Gaussian:
        """The step that ends here and took dt [s]."""
        n = len(self.q)
        return Gaussian(self.velocity * dt, self.covariance[n:, n:] * dt**2)

    def stepped(self, step: Gaussian, dt: float, gate: float) -> Belief:
        """After measuring that step; one that is further off than `gate` standard deviations counts that much less."""
        n = len(self.q)
        seen = torch.eye(2 * n).to(self.q)[n:] * dt
        return self._given(seen, step, gate)

    def read(self, position: Gaussian, gate: float) -> Belief:
        """After a reading of the positions; joints read further off than `gate` standard deviations are not believed."""
        spread = position.covariance.diagonal().to(self.q) + self.position_covariance.diagonal()
        believed = (position.mean.to(self.q) - self.q).abs() <= gate * spread.sqrt()
        seen = torch.eye(2 * len(self.q)).to(self.q)[: len(self.q)][believed]
        reading = Gaussian(position.mean[believed], position.covariance[believed][:, believed])
        return self._given(seen, reading) if bool(believed.any()) else self

    def livelier(self, memory: float) -> Belief:
        """With the speed that was just seen counted in; `memory` is how many frames are remembered."""
        n = len(self.q)
        seen = self.velocity.square() + self.covariance.diagonal()[n:]
        return replace(self, power=self.power + (seen - self.power) / (memory + 1))

    def _given(self, seen: Float[Tensor, "k m"], measured: Gaussian, gate: float = math.inf) -> Belief:
        """After measuring `seen @ (q, velocity)`."""
        n = len(self.q)
        now, noise = self.state, measured.covariance.to(self.q)
        off = measured.mean.to(self.q) - seen @ now.mean
        far = float(off @ torch.linalg.solve(seen @ self.covariance @ seen.mT + noise, off)) / len(off)
        found = now.given(Gaussian(measured.mean.to(self.q), noise * max(1.0, far / gate**2)), seen)
        return replace(self, q=found.mean[:n], velocity=found.mean[n:], covariance=found.covariance)


def looking_back(expected: Sequence[Gaussian], known: Sequence[Gaussian], moves: Sequence[Tensor]) -> list[Gaussian]:
    """States given everything that was seen after them as well (Rauch, Tung and Striebel 1965).

    Args:
        expected: states before each frame but the first was looked at. known: of all frames, after they were.
        moves: (m, m) from each frame's state to the next one's expected mean.
    """
    later = [known[-1]]
    for before, after, move in zip(reversed(known[:-1]), reversed(expected), reversed(moves), strict=True):
        gain = before.covariance @ move.mT @ _inverse(after.covariance)
        mean = before.mean + gain @ (later[-1].mean - after.mean)
        covariance = before.covariance + gain @ (later[-1].covariance - after.covariance) @ gain.mT
        later.append(Gaussian(mean, (covariance + covariance.mT) / 2))
    return later[::-1]


def _inverse(covariance: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
    """Pseudo-inverse: from a first pose that is exactly known, the next one's error is that of the velocity alone."""
    unit = covariance.diagonal().clamp(min=1e-300).sqrt()
    together = covariance / unit[:, None] / unit
    return torch.linalg.pinv(together, rtol=_SINGULAR, hermitian=True) / unit[:, None] / unit


def _spread(power: Float[Tensor, " n"], together: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Covariance of velocities of that mean square and correlation."""
    return power.sqrt()[:, None] * together * power.sqrt()
