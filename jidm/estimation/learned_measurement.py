"""Measures frames with a learned field: matching and direct alignment between frames, and a predicted pose per frame.

Steps are precise but add up to drift; the pose predicted from one frame is less accurate but does not drift.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.agreement import Agreement
from jidm.estimation.kalman import FilterOptions, Gaussian
from jidm.estimation.mask_agreement import MIN_SCORE, MaskAgreement
from jidm.estimation.refinement import REFINEMENT_STAGES, FieldEvaluation, JacobianPredictor, RefinementStage
from jidm.estimation.step_estimation import StepEstimate, estimate_step, finite_covariance, predict_steps
from jidm.estimation.tracker import JointLimits, Measurement, PredictedState
from jidm.fields.free.config import LearnedFieldConfig
from jidm.flow import Flow, FlowEstimator, FlowSource
from jidm.video.letterbox import Letterbox

_RANGE_MARGIN = 0.25  # fraction of the training range by which a joint without known limits may leave it
_STEP_SCALE = 40.0
"""Scale of a joint of unknown type, in standard deviations of the training steps; a quarter of it is its largest step."""


@dataclass(frozen=True)
class LearnedOptions:
    """Options of measuring frames with a learned field.

    Attributes:
        use_pose_readings: update with the pose predicted from each frame.
        correlation_length: number of frames over which errors of predicted poses are correlated; their variance is multiplied
            by it.
        max_unexplained: a step is not valid if it leaves more than this fraction of the image motion unexplained ...
        min_image_motion: ... and there is at least this much motion [px rms].
        min_agreement: a frame in which the border of the predicted mask lies less clearly on edges does not show the robot, and
            is not measured (see `MaskAgreement`); None measures every frame.
        refinement_stages: of the alignment after matching, for fields that it improves; fewer are faster and less precise.
            Steps between frames of a video are smaller than those of unrelated pairs, so that one coarse stage is enough.
        filter: of the tracker.
    """

    use_pose_readings: bool = True
    correlation_length: float = 16.0
    max_unexplained: float = 0.9
    min_image_motion: float = 0.5
    min_agreement: float | None = MIN_SCORE
    refinement_stages: tuple[RefinementStage, ...] = REFINEMENT_STAGES[2:]
    filter: FilterOptions = field(default_factory=FilterOptions)


class LearnedMeasurement:
    """A `MeasurementModel` of one video by a learned field.

    Args:
        field: the network.
        options: of the measurement.
    """

    def __init__(self, field: JacobianPredictor, options: LearnedOptions) -> None:
        self.field, self.options, self.filter = field, options, options.filter
        self._agreement = MaskAgreement()

    requires_embodiment = False
    requires_flow = False
    independent_errors = False  # the field is wrong by about the same in the frames of a video
    predicts_pose = True

    @property
    def joint_types(self) -> tuple[str, ...]:
        """Joint types as recorded in training."""
        return self.field.config.joint_types

    def training_limits(self, like: Tensor) -> JointLimits:
        """Limits for a robot without an embodiment, from the training data."""
        return training_limits(self.field.config, like)

    def predict_steps(self, first: Float[Tensor, "b 3 H W"], second: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n"]:
        """Joint steps of unrelated pairs of frames [rad or m]."""
        return predict_steps(self.field, self.letterbox(first), self.letterbox(second))

    # ---- frames and flow as the network needs them --------------------------------------------------------------------

    def dtype_of(self, frame: Tensor) -> Tensor:
        """A tensor with the dtype and device of the computation, here the network's."""
        return self.field.delta_std

    def letterbox(self, frame: Float[Tensor, "*batch 3 H W"]) -> Float[Tensor, "*batch 3 h w"]:
        """Frames in the size and precision, and on the device, of the network."""
        height, width = frame.shape[-2:]
        return Letterbox(height, width, *self.field.config.input_size).apply(frame).to(self.field.delta_std)

    def letterbox_flow(self, flow: Flow) -> Flow:
        """Flow of the video in pixels of the network's images."""
        height, width = flow.weight.shape[-2:]
        return Letterbox(height, width, self.field.config.height, self.field.config.width).apply_to_flow(flow)

    def flow_source(
        self, estimator: FlowEstimator | None, precomputed: Flow | Tensor | None, resolution: int
    ) -> FlowSource:
        """Source of external flow in both directions; it has none if neither an estimator nor flow is given."""
        return FlowSource(estimator, precomputed, bidirectional=True)

    # ---- measuring ----------------------------------------------------------------------------------------------------

    def start(self, frame: Float[Tensor, "3 H W"], q0: Float[Tensor, " n"] | None, limits: JointLimits) -> Gaussian:
        """Start at a frame: with the exact pose q0 [rad or m], or with the pose that the network predicts."""
        features = self.field.encode(frame[None])
        if q0 is None:
            pose, std = (x[0] for x in self.field.predict_pose(features))
            initial = Gaussian(torch.minimum(torch.maximum(pose, limits.lower), limits.upper), torch.diag(std**2))
        else:
            initial = Gaussian(q0, torch.diag(torch.zeros_like(q0)))
        self._previous = FieldEvaluation.of(self.field, features, initial.mean[None])
        self._agreement = MaskAgreement()
        self._shows_robot(self._previous)
        return initial

    @property
    def agreement(self) -> Agreement:
        """Agreement of the predicted mask of the robot with the edges of the frames."""
        return self._agreement.value

    def initial_velocity(self, dt: float, limits: JointLimits) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
        """Standard deviation [rad/s or m/s] and correlation of the velocities in training."""
        return torch.minimum(self.field.delta_std / dt, limits.velocity), self.field.delta_correlation

    def measure(
        self, frame: Float[Tensor, "3 H W"], prediction: PredictedState, limits: JointLimits, *flows: Flow
    ) -> Measurement | None:
        """Measure a frame; None if it does not show the robot or cannot be solved.

        Args:
            frame: finite, same size as the first.
            prediction: of the frame. limits: of the joints.
            flows: external flow from the last accepted frame to this one and optionally back; the network matches the
                frames itself if there is none.
        """
        features = self.field.encode(frame[None])
        current = FieldEvaluation.of(self.field, features, prediction.q[None])
        if not self._shows_robot(current):
            return None
        prior = Gaussian(prediction.step.mean[None], prediction.step.covariance[None])
        estimate = estimate_step(
            self.field, self._previous, current, *flows, prior=prior, refinement_stages=self.options.refinement_stages
        )
        solution = estimate.solution
        if not bool(solution.valid[0]):
            return None
        self._features, position = features, None
        if self.options.use_pose_readings:
            pose, std = (x[0] for x in self.field.predict_pose(features))
            position = Gaussian(pose, torch.diag(std**2 * self.options.correlation_length))
        return Measurement(
            step=Gaussian(solution.delta_q[0], finite_covariance(solution.covariance[0])),
            position=position,
            residual=solution.residual[0],
            explained_fraction=solution.explained_fraction[0],
            observable=solution.observable[0],
            maneuver=torch.zeros_like(solution.observable[0]),
            valid=not self._is_lost(estimate),
        )

    def accept(self, q: Float[Tensor, " n"]) -> None:
        """Make the frame that was measured last the reference of the next one."""
        self._previous = FieldEvaluation.of(self.field, self._features, q[None])

    def correct(self, q: Float[Tensor, " n"]) -> None:
        """Replace the joint positions in the last accepted frame."""
        self._previous = FieldEvaluation.of(self.field, self._previous.features, q[None])

    def inflate(self, covariance: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """Covariance of a step with the factors calibrated on videos, where errors are correlated over frames."""
        std_scale = self.field.video_std_scale.to(covariance)
        return covariance * std_scale[:, None] * std_scale

    def _shows_robot(self, frame: FieldEvaluation) -> bool:
        """Whether a frame may show the robot; updates the agreement with it."""
        if self.options.min_agreement is None:
            return True
        score = self._agreement.update(frame.features.gray_downsampled, frame.mask)
        # A single frame of noise may look like the robot; one amid many of noise is not believed.
        return score is None or (score >= self.options.min_agreement and not self._agreement.value.unrelated)

    def _is_lost(self, estimate: StepEstimate) -> bool:
        """Whether there is image motion that the step mostly does not explain."""
        residual = float(estimate.solution.residual[0])
        explained_fraction = float(estimate.solution.explained_fraction[0])
        motion = residual / max(1e-6, 1 - explained_fraction) ** 0.5
        return motion > self.options.min_image_motion and explained_fraction < 1 - self.options.max_unexplained


def training_limits(config: LearnedFieldConfig, like: Tensor) -> JointLimits:
    """Joint limits from the training data: its range with a margin, and no speed limit."""
    lower, upper = (torch.tensor(x).to(like) for x in (config.q_lower, config.q_upper))
    margin = _RANGE_MARGIN * (upper - lower)
    return JointLimits(
        lower - margin,
        upper + margin,
        torch.full_like(lower, torch.inf),
        _STEP_SCALE * torch.tensor(config.delta_std).to(like),
    )
