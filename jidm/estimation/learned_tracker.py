"""A pose followed through a video by a learned field: steps between frames, and what each frame shows of the pose.

Streaming, two frames at a time. Steps are precise but add up to drift; the pose read off one picture is coarse but does
not drift. A Kalman filter takes both at what they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.analytic_tracker import JointLimits, TrackedStep
from jidm.estimation.factors.learned import StepEstimate, estimate_step, finite_covariance
from jidm.estimation.kalman import Gaussian, KalmanState, rts_smooth
from jidm.estimation.refinement import REFINEMENT_STAGES, FieldEvaluation, JacobianPredictor, RefinementStage
from jidm.fields.free.config import LearnedFieldConfig
from jidm.flow.base import Flow

_MIN_DT = 1e-3  # frames are never closer in time than this [s]
_RANGE_MARGIN = 0.25  # of the trained range, by which a joint without known limits may leave it
_STEP_SCALE = 40.0
"""A joint of unknown type counts by this many of its typical steps: a quarter of it is the largest step believed."""


@dataclass(frozen=True)
class LearnedTrackerOptions:
    """How a pose is followed with a learned field.

    Attributes:
        velocity_time_constant: a velocity is expected to last about so long [s].
        process_noise_window: the usual speed of a joint is that of about so many frames back.
        use_pose_readings: whether the pose read off each picture is used.
        correlation_length: for so many frames the errors of the pose read off pictures are alike, so each counts that much less.
        gate: readings further than this from the expected pose [standard deviations of both] are not believed, and
            steps that are further off count less.
        max_unexplained: a picture is not measured where the step leaves more than this share of the motion unexplained ...
        min_image_motion: ... of at least this much motion [px rms].
        refinement_stages: how pictures are compared once they are matched, if that is better for this field; fewer looks are faster
            and less precise. Frames of a video begin nearer than unrelated pairs do, so one coarse look is enough.
    """

    velocity_time_constant: float = 0.5
    process_noise_window: float = 16.0
    use_pose_readings: bool = True
    correlation_length: float = 16.0
    gate: float = 4.0
    max_unexplained: float = 0.9
    min_image_motion: float = 0.5
    refinement_stages: tuple[RefinementStage, ...] = REFINEMENT_STAGES[2:]


@dataclass(frozen=True, eq=False)
class _FilterStep:
    """A frame that was looked at.

    Attributes:
        predicted, filtered: positions and velocities before and after it was. transition: (2n, 2n) from the last frame's to the
            expected. dt: time since the last frame [s].
    """

    predicted: Gaussian
    filtered: Gaussian
    transition: Float[Tensor, "m m"]
    dt: float


class LearnedTracker:
    """Follows one robot in one video with a learned or hybrid field.

    Args:
        field: what reads the pictures.
        limits: of the joints; positions and the speed of steps stay inside.
        options: how.
        remembers: whether everything is kept that `looking_back` needs, (2n)^2 numbers a frame.
    """

    def __init__(
        self,
        field: JacobianPredictor,
        limits: JointLimits,
        options: LearnedTrackerOptions,
        *,
        keep_history: bool = False,
    ) -> None:
        self.field, self.limits, self.options, self.keep_history = field, limits, options, keep_history

    def start(self, frame: Float[Tensor, "3 H W"], q0: Float[Tensor, " n"] | None) -> None:
        """Begin at a frame; without q0 [rad or m] at the pose that the frame shows."""
        features = self.field.encode(frame[None])
        pose, std = self.field.predict_pose(features)
        # A stated pose outside the limits is believed; from there the way is only back.
        self._lower = self.limits.lower if q0 is None else torch.minimum(self.limits.lower, q0)
        self._upper = self.limits.upper if q0 is None else torch.maximum(self.limits.upper, q0)
        self.q = self._clamp_to_limits(pose[0]) if q0 is None else q0
        self.position_covariance = torch.diag(std[0] ** 2) if q0 is None else torch.zeros_like(torch.diag(std[0]))
        self._state: KalmanState | None = None
        self._elapsed = 0.0
        self._previous = FieldEvaluation.of(self.field, features, self.q[None])
        self._initial_state: Gaussian | None = None
        self._history: list[_FilterStep] = []

    def skip(self, dt: float) -> TrackedStep:
        """A frame that shows nothing: hold the pose; the next good frame is measured from the last good one."""
        self._elapsed += dt
        zero = torch.zeros_like(self.q)
        unknown = zero.new_zeros(())
        step_covariance = torch.diag(self.limits.max_step(self._elapsed) ** 2)
        observable = torch.zeros_like(zero, dtype=torch.bool)
        inflated = self.position_covariance + step_covariance
        return TrackedStep(
            zero,
            self.q,
            inflated,
            torch.diag(self.limits.max_step(dt) ** 2),
            unknown,
            unknown,
            observable,
            False,
            False,
        )

    def step(
        self, frame: Float[Tensor, "3 H W"], dt: float, flow: Flow | None = None, backward_flow: Flow | None = None
    ) -> TrackedStep:
        """Follow the robot into the next frame.

        Args:
            frame: finite, same size as the first.
            dt: time since the previous frame [s].
            flow: measured elsewhere, from the last good frame to this one; the network matches the pictures if not given.
            backward_flow: likewise from this frame to the last good one.
        """
        gap, interval = self._elapsed, max(self._elapsed + dt, _MIN_DT)
        state = self._state
        if state is None:
            velocity_std = self.field.delta_std / max(dt, _MIN_DT)
            velocity_std = torch.minimum(velocity_std, self.limits.velocity)
            state = KalmanState.initialize(self.q, self.position_covariance, velocity_std, self.field.delta_correlation)
        self._initial_state = self._initial_state or state.gaussian
        transition = state.transition(interval, self.options.velocity_time_constant)
        state = predicted = state.predict(interval, self.options.velocity_time_constant)
        features = self.field.encode(frame[None])
        current = FieldEvaluation.of(self.field, features, self._clamp_to_limits(state.q.to(self.q))[None])
        predicted_step = state.step_marginal(interval)
        prior = Gaussian(predicted_step.mean[None].to(self.q), predicted_step.covariance[None].to(self.q))
        estimate = estimate_step(
            self.field,
            self._previous,
            current,
            flow,
            backward_flow,
            prior=prior,
            refinement_stages=self.options.refinement_stages,
        )
        solution = estimate.solution
        if not bool(solution.valid[0]):
            return self.skip(dt)
        measurement = Gaussian(
            self._limit_speed(solution.delta_q[0], interval), finite_covariance(solution.covariance[0])
        )
        state = state.update_step(measurement, interval, self.options.gate)
        if self.options.use_pose_readings:
            position, std = (x[0] for x in self.field.predict_pose(features))
            state = state.update_position(
                Gaussian(position, torch.diag(std**2 * self.options.correlation_length)), self.options.gate
            )
        step = self._feasible_step(state, interval)
        self.q = self._clamp_to_limits(state.q.to(self.q))
        self._state = replace(state, q=self.q.double()).adapt_process_noise(self.options.process_noise_window)
        self.position_covariance = state.position_covariance.to(self.q)
        if self.keep_history:
            self._history.append(_FilterStep(predicted.gaussian, self._state.gaussian, transition, interval))
        self._lower = torch.minimum(self.limits.lower, self.q)
        self._upper = torch.maximum(self.limits.upper, self.q)
        self._elapsed = 0.0
        self._previous = FieldEvaluation.of(self.field, features, self.q[None])
        valid = gap == 0.0 and not self._is_lost(estimate)
        return TrackedStep(
            step if valid else torch.zeros_like(step), self.q, self.position_covariance,
            self._inflate(state.step_marginal(interval).covariance.to(self.q)), solution.residual[0], solution.explained_fraction[0],
            solution.observable[0], valid,
        )  # fmt: skip

    def correct(self, q: Float[Tensor, " n"], std: float) -> None:
        """What the robot itself says its joints were in the last frame that was looked at [rad or m], to within std."""
        measurement = Gaussian(q.to(self.q), torch.diag(torch.full_like(self.q, std**2)))
        if self._state is None:
            self.q, self.position_covariance = measurement.mean, measurement.covariance
        else:
            self._state = self._state.update_position(measurement, math.inf)
            self.q = self._state.q.to(self.q)
            self.position_covariance = self._state.position_covariance.to(self.q)
        self._lower = torch.minimum(self.limits.lower, self.q)
        self._upper = torch.maximum(self.limits.upper, self.q)
        self._previous = FieldEvaluation.of(self.field, self._previous.features, self.q[None])

    def smooth(self, steps: Sequence[TrackedStep]) -> list[TrackedStep]:
        """The steps since `start`, all of them, told by the frames after them as well.

        Steps that are not valid say nothing and stay so; the pose at a frame that showed nothing is held as before it.
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
            interval = record.dt
            q, velocity = (x.to(self.q) for x in (state.mean[:n], state.mean[n:]))
            position, position_covariance = self._clamp_to_limits(q), state.covariance[:n, :n].to(self.q)
            covariance = self._inflate((state.covariance[n:, n:] * interval**2).to(self.q))
            delta_q = self._limit_speed(velocity * interval, interval) if step.valid else step.delta_q
            smoothed.append(
                replace(
                    step,
                    delta_q=delta_q,
                    position=position,
                    position_covariance=position_covariance,
                    covariance=covariance,
                )
            )
        return smoothed

    def _inflate(self, covariance: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """Covariance of a step that knows of errors lasting over frames."""
        std_scale = self.field.video_std_scale.to(covariance)
        return covariance * std_scale[:, None] * std_scale

    def _feasible_step(self, state: KalmanState, interval: float) -> Float[Tensor, " n"]:
        """The step that is believed in, no faster than the joints move and no further than they reach."""
        step = self._limit_speed(state.step_marginal(interval).mean.to(self.q), interval)
        return self._clamp_to_limits(self.q + step) - self.q

    def _limit_speed(self, step: Float[Tensor, " n"], interval: float) -> Float[Tensor, " n"]:
        """The step, no faster than the joints move."""
        max_step = self.limits.velocity * interval
        return step.clamp(-max_step, max_step)

    def _is_lost(self, estimate: StepEstimate) -> bool:
        """Whether there was motion and hardly any of it was the robot's."""
        residual = float(estimate.solution.residual[0])
        explained_fraction = float(estimate.solution.explained_fraction[0])
        motion = residual / max(1e-6, 1 - explained_fraction) ** 0.5
        return motion > self.options.min_image_motion and explained_fraction < 1 - self.options.max_unexplained

    def _clamp_to_limits(self, q: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(q, self._lower), self._upper)


def training_limits(config: LearnedFieldConfig, like: Tensor) -> JointLimits:
    """Limits of joints of which only a recording is known: its range, a little widened, and any speed."""
    lower, upper = (torch.tensor(x).to(like) for x in (config.q_lower, config.q_upper))
    margin = _RANGE_MARGIN * (upper - lower)
    return JointLimits(
        lower - margin,
        upper + margin,
        torch.full_like(lower, torch.inf),
        _STEP_SCALE * torch.tensor(config.delta_std).to(like),
    )
