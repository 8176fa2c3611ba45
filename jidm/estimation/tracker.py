"""Tracks joint positions through a video with a constant-velocity Kalman filter: predict, measure, update.

The filter is the same for every kind of field; a measurement model turns each frame into a measured step and, where it can,
into measured positions. The tracker is streaming: its memory does not grow, unless a history is kept for smoothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.estimation.agreement import NOT_MEASURED, Agreement
from jidm.estimation.kalman import FilterOptions, Gaussian, KalmanState, rts_smooth
from jidm.flow.base import Flow

_MIN_DT = 1e-3  # frames are never closer in time than this [s]


@dataclass(frozen=True, eq=False)
class JointLimits:
    """Limits of the joints.

    Attributes:
        lower, upper: positions [rad or m].
        velocity: speed [rad/s or m/s], may be infinite.
        joint_scale: a typical motion of each joint, to compare rad with m [rad or m].
    """

    lower: Float[Tensor, " n"]
    upper: Float[Tensor, " n"]
    velocity: Float[Tensor, " n"]
    joint_scale: Float[Tensor, " n"]

    def max_step(self, dt: float) -> Float[Tensor, " n"]:
        """Largest step within dt [s]; a quarter of `joint_scale` for joints without a speed limit [rad or m]."""
        return torch.where(self.velocity.isfinite(), self.velocity * dt, self.joint_scale * 0.25)


@dataclass(frozen=True, eq=False)
class TrackedStep:
    """One step: vectors (n,), matrices (n, n) and scalars, see `JointMotion`."""

    delta_q: Tensor
    position: Tensor
    position_covariance: Tensor
    covariance: Tensor
    residual: Tensor
    explained_fraction: Tensor
    observable: Tensor
    valid: bool
    accepted: bool = True
    """Whether the frame was measured, so that the next step starts from it."""
    measured: Gaussian | None = None
    """The step before the filter, for smoothing; None if its error depends on those of other steps, or no history is kept."""
    agreement: Agreement = NOT_MEASURED
    """Of the last frames with robot, camera and pose."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """Measurement of one frame.

    Attributes:
        step: joint step since the last accepted frame [rad or m].
        position: joint positions in the frame [rad or m]; None if they were not measured.
        residual: image motion of the robot that the step does not explain [px rms].
        explained_fraction: fraction of the energy of the robot's image motion that the step explains.
        observable: (n,) joints whose motion can be distinguished from that of the others.
        maneuver: (n,) joints that changed their velocity by more than the prediction allows; the filter accepts the step.
        valid: whether the step may be used.
    """

    step: Gaussian
    position: Gaussian | None
    residual: Float[Tensor, ""]
    explained_fraction: Float[Tensor, ""]
    observable: Bool[Tensor, " n"]
    maneuver: Bool[Tensor, " n"]
    valid: bool


@dataclass(frozen=True, eq=False)
class PredictedState:
    """Predicted state of a frame before it is measured.

    Attributes:
        q: (n,) joint positions [rad or m]. step: since the last accepted frame.
        bounds: lower and upper joint positions that the joints can reach in that time [rad or m].
        dt: time since the last accepted frame [s].
    """

    q: Float[Tensor, " n"]
    step: Gaussian
    bounds: tuple[Float[Tensor, " n"], Float[Tensor, " n"]]
    dt: float


@runtime_checkable
class MeasurementModel(Protocol):
    """Measures frames with one kind of Jacobian field; stores what it needs of the last accepted frame."""

    @property
    def filter(self) -> FilterOptions:
        """Filter options for its measurements."""
        ...

    @property
    def independent_errors(self) -> bool:
        """Whether the errors of its steps are independent of each other."""
        ...

    @property
    def agreement(self) -> Agreement:
        """Agreement of the frames that were accepted with robot, camera and pose."""
        ...

    def start(self, frame: Float[Tensor, "3 H W"], q0: Float[Tensor, " n"] | None, limits: JointLimits) -> Gaussian:
        """Start at a frame: with the exact pose q0 [rad or m], or with a predicted one if it is None."""
        ...

    def initial_velocity(
        self, dt: float, limits: JointLimits
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"] | None]:
        """Standard deviation [rad/s or m/s] and correlation of the velocities before the first measurement."""
        ...

    def measure(
        self, frame: Float[Tensor, "3 H W"], prediction: PredictedState, limits: JointLimits, *flows: Flow
    ) -> Measurement | None:
        """Measure a frame relative to the last accepted one; None if that is not possible."""
        ...

    def accept(self, q: Float[Tensor, " n"]) -> None:
        """Make the frame that was measured last the reference of the next one, with joint positions q [rad or m]."""
        ...

    def correct(self, q: Float[Tensor, " n"]) -> None:
        """Replace the joint positions in the last accepted frame by q [rad or m]."""
        ...

    def inflate(self, covariance: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """Covariance of a step including errors that are correlated over frames."""
        ...


@dataclass(frozen=True, eq=False)
class _FilterStep:
    """An accepted frame: state before and after its update, transition from the frame before it, and time since that [s]."""

    predicted: Gaussian
    filtered: Gaussian
    transition: Float[Tensor, "m m"]
    dt: float


class Tracker:
    """Tracks one robot in one video.

    Args:
        model: measures the frames.
        limits: of the joints; positions and speeds stay inside.
        keep_history: store what `smooth` needs, three matrices (2n, 2n) per frame.
    """

    def __init__(self, model: MeasurementModel, limits: JointLimits, *, keep_history: bool = False) -> None:
        self.model, self.limits, self.keep_history = model, limits, keep_history

    def start(self, frame: Float[Tensor, "3 H W"], q0: Float[Tensor, " n"] | None) -> None:
        """Start at a frame, with joint positions q0 [rad or m] or the model's prediction if it is None."""
        # A given pose outside the limits is accepted; from there the joints may only move back.
        self._lower = self.limits.lower if q0 is None else torch.minimum(self.limits.lower, q0)
        self._upper = self.limits.upper if q0 is None else torch.maximum(self.limits.upper, q0)
        initial = self.model.start(frame, q0, self.limits)
        self.q, self.position_covariance = initial.mean, initial.covariance
        self._state: KalmanState | None = None
        self._initial_state: Gaussian | None = None
        self._elapsed = 0.0
        self._history: list[_FilterStep] = []

    def skip(self, dt: float) -> TrackedStep:
        """Leave out a frame, dt [s] after the previous one: hold the pose and measure the next frame from the last accepted
        one."""
        self._elapsed += dt
        zero = torch.zeros_like(self.q)
        inflated = self.position_covariance + torch.diag(self.limits.max_step(self._elapsed) ** 2)
        return TrackedStep(
            delta_q=zero,
            position=self.q,
            position_covariance=inflated,
            covariance=torch.diag(self.limits.max_step(dt) ** 2),
            residual=zero.new_zeros(()),
            explained_fraction=zero.new_zeros(()),
            observable=torch.zeros_like(zero, dtype=torch.bool),
            valid=False,
            accepted=False,
            agreement=self.model.agreement,
        )

    def step(self, frame: Float[Tensor, "3 H W"], dt: float, *flows: Flow) -> TrackedStep:
        """Track the robot into the next frame.

        Args:
            frame: finite, same size as the first.
            dt: time since the previous frame, skipped ones included [s].
            flows: external flow from the last accepted frame to this one, and optionally back.

        Returns:
            The step; that of `skip` if the model could not measure the frame.
        """
        gap, interval = self._elapsed, max(self._elapsed + dt, _MIN_DT)
        options = self.model.filter
        if self._state is None:
            std, correlation = self.model.initial_velocity(max(dt, _MIN_DT), self.limits)
            self._state = KalmanState.initialize(self.q, self.position_covariance, std, correlation)
            self._initial_state = self._state.gaussian
        max_step = self.limits.max_step(interval)
        floor = options.process_noise_floor * max_step if options.process_noise_floor else None
        transition = self._state.transition(interval, options.velocity_time_constant)
        state = self._state.predict(interval, options.velocity_time_constant, floor)
        measurement = self.model.measure(frame, self._prediction(state, interval, max_step), self.limits, *flows)
        if measurement is None:
            return self.skip(dt)
        measured_step = Gaussian(self._limit_speed(measurement.step.mean, interval), measurement.step.covariance)
        state = predicted = state.with_unknown_velocity(measurement.maneuver, interval, max_step)
        state = state.update_step(measured_step, interval, options.gate)
        if measurement.position is not None:
            state = state.update_position(measurement.position, options.gate)
        step = self._feasible_step(state, interval)
        self.q = self._clamp_to_limits(state.q.to(self.q))
        self._state = replace(state, q=self.q.double()).adapt_process_noise(options.process_noise_window)
        self.position_covariance = state.position_covariance.to(self.q)
        if self.keep_history:
            self._history.append(_FilterStep(predicted.gaussian, self._state.gaussian, transition, interval))
        self._widen_limits()
        self._elapsed = 0.0
        self.model.accept(self.q)
        agreement = self.model.agreement
        valid = gap == 0.0 and measurement.valid and not agreement.unrelated
        return TrackedStep(
            delta_q=step if valid else torch.zeros_like(step),
            position=self.q,
            position_covariance=self.position_covariance,
            covariance=self.model.inflate(state.step_marginal(interval).covariance.to(self.q)),
            residual=measurement.residual,
            explained_fraction=measurement.explained_fraction,
            observable=measurement.observable,
            valid=valid,
            measured=measured_step if self.keep_history and self.model.independent_errors else None,
            agreement=agreement,
        )

    def correct(self, q: Float[Tensor, " n"], std: float) -> None:
        """Update with joint positions of the last accepted frame that the robot reported.

        Args:
            q: [rad or m]. std: their standard deviation [rad or m].
        """
        measured = Gaussian(q.to(self.q), torch.diag(torch.full_like(self.q, std**2)))
        if self._state is None:
            self.q, self.position_covariance = measured.mean, measured.covariance
        else:
            self._state = self._state.update_position(measured)
            self.q = self._state.q.to(self.q)
            self.position_covariance = self._state.position_covariance.to(self.q)
            if self._history:
                self._history[-1] = replace(self._history[-1], filtered=self._state.gaussian)
            else:
                self._initial_state = self._state.gaussian
        self._widen_limits()
        self.model.correct(self.q)

    def smooth(self, steps: Sequence[TrackedStep]) -> list[TrackedStep]:
        """Rauch-Tung-Striebel smoother: all steps since `start`, given later frames as well; needs `keep_history`.

        Steps that are not valid stay invalid; at a frame that was not accepted, the pose before it is held.
        """
        if self._initial_state is None or not self._history:
            return list(steps)
        n, smoothed, position = len(self.q), [], steps[0].position
        states = rts_smooth(
            [x.predicted for x in self._history],
            [self._initial_state, *(x.filtered for x in self._history)],
            [x.transition for x in self._history],
        )
        remaining = zip(states[1:], self._history, strict=True)
        for step in steps:
            if not step.accepted:
                smoothed.append(replace(step, position=position))
                continue
            state, record = next(remaining)
            q, velocity = (x.to(self.q) for x in (state.mean[:n], state.mean[n:]))
            position = self._clamp_to_limits(q)
            smoothed.append(
                replace(
                    step,
                    delta_q=self._limit_speed(velocity * record.dt, record.dt) if step.valid else step.delta_q,
                    position=position,
                    position_covariance=state.covariance[:n, :n].to(self.q),
                    covariance=self.model.inflate((state.covariance[n:, n:] * record.dt**2).to(self.q)),
                )
            )
        return smoothed

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _prediction(self, state: KalmanState, interval: float, max_step: Float[Tensor, " n"]) -> PredictedState:
        step = state.step_marginal(interval)
        bounds = torch.maximum(self._lower, self.q - max_step), torch.minimum(self._upper, self.q + max_step)
        q = self._clamp_to_limits(state.q.to(self.q))
        return PredictedState(q, Gaussian(step.mean.to(self.q), step.covariance.to(self.q)), bounds, interval)

    def _feasible_step(self, state: KalmanState, interval: float) -> Float[Tensor, " n"]:
        """The filtered step, within speed and position limits."""
        step = self._limit_speed(state.step_marginal(interval).mean.to(self.q), interval)
        return self._clamp_to_limits(self.q + step) - self.q

    def _limit_speed(self, step: Float[Tensor, " n"], interval: float) -> Float[Tensor, " n"]:
        max_step = self.limits.velocity * interval
        return step.clamp(-max_step, max_step)

    def _clamp_to_limits(self, q: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return torch.minimum(torch.maximum(q, self._lower), self._upper)

    def _widen_limits(self) -> None:
        self._lower = torch.minimum(self.limits.lower, self.q)
        self._upper = torch.maximum(self.limits.upper, self.q)
