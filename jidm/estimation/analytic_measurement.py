"""Measures frames with an exact field: flow as a start, then direct alignment to earlier frames, contours and silhouette."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.errors import InputError, VideoError
from jidm.estimation.agreement import NOT_MEASURED, Agreement
from jidm.estimation.alignment import AlignOptions, align
from jidm.estimation.contour_agreement import ContourAgreement
from jidm.estimation.factors.contour import ContourMemory
from jidm.estimation.factors.photometric import SurfaceAppearance
from jidm.estimation.factors.silhouette import SilhouetteFactor
from jidm.estimation.gauss_newton import gauss_newton_step
from jidm.estimation.initialization import initialize_pose
from jidm.estimation.kalman import FilterOptions, Gaussian
from jidm.estimation.reference_appearance import ReferenceAppearance
from jidm.estimation.solver import Solution
from jidm.estimation.tracker import JointLimits, Measurement, PredictedState
from jidm.fields.base import ContourField, JacobianField, PosePredictor
from jidm.flow import Flow, FlowEstimator, FlowSource
from jidm.video.pyramid import BrightnessPyramid

_MIN_REFERENCE_POINTS = 50  # a reference appearance with fewer visible points is not used
_INITIAL_SPEED = 0.4  # root mean square speed before the first measurement, as a fraction of the largest
_NO_PRIOR = 1e3  # standard deviation of a step before it is measured, in largest steps
_MIN_CONTRAST = 0.02  # between the brightest and the darkest value of a frame that shows anything
_FLOW_VARIANCE_LIMIT = 1e6  # [rad^2 or m^2] in place of infinite variances


@dataclass(frozen=True)
class AnalyticOptions:
    """Options of measuring frames with an exact field.

    Attributes:
        refine: "photometric" aligns brightness and contours; "none" uses the flow alone.
        use_contours: match contours and silhouette (where the field has them), which bounds the drift.
        use_reference_appearance: align to the robot's surface as it was first visible, besides the previous frame.
        min_motion: image motion that a joint must cause to be observable [px rms over the robot, per radian or 0.1 m], see
            `solve_normal_equations`.
        maneuver: a joint that the alignment moves further than this many standard deviations from its expected position has
            changed its velocity (see `Measurement.maneuver`).
        correlation_length: number of frames over which errors of contours are correlated; their information is divided by it.
        lost_error, lost_explained_fraction: a frame with a brightness error above the first (0 to 9, see
            `PhotometricFactor.error`) whose step explains less than the second of the flow is not accepted, for instance
            after a cut: the pose is held, and later frames are measured from the last accepted one.
        align: of one frame.
        filter: of the tracker, for aligned steps. Steps are not gated, since the alignment has robust weights of its own.
    """

    refine: Literal["none", "photometric"] = "photometric"
    use_contours: bool = True
    use_reference_appearance: bool = True
    min_motion: float = 2.5
    maneuver: float = 3.0
    correlation_length: float = 16.0
    lost_error: float = 5.0
    lost_explained_fraction: float = 0.3
    align: AlignOptions = field(default_factory=AlignOptions)
    filter: FilterOptions = field(default_factory=lambda: FilterOptions(process_noise_floor=0.05, gate=None))


class AnalyticMeasurement:
    """A `MeasurementModel` of one video by an exact field of one robot in one camera.

    Args:
        field: gives positions and Jacobians of surface points, and contours, at any joint positions.
        options: of the measurement.
    """

    def __init__(self, field: JacobianField, options: AnalyticOptions) -> None:
        self.field, self.options = field, options
        self._photometric = options.refine == "photometric"
        # Flow alone is not filtered: nothing is expected of a step before it is measured.
        self.filter = options.filter if self._photometric else replace(options.filter, process_noise_floor=_NO_PRIOR)
        self._contours: ContourMemory | None = None
        self._agreement: ContourAgreement | None = None

    requires_embodiment = True
    requires_flow = True
    independent_errors = True

    @property
    def predicts_pose(self) -> bool:
        """Whether the field predicts the first pose where it is not given."""
        return isinstance(self.field, PosePredictor)

    @property
    def joint_types(self) -> tuple[str, ...]:
        """Not known to the field.

        Raises:
            InputError: always; they are those of the embodiment.
        """
        raise InputError("an exact field does not know joint types; give the embodiment")

    def training_limits(self, like: Tensor) -> JointLimits:
        """Not known to the field.

        Raises:
            InputError: always; they are those of the embodiment.
        """
        raise InputError("an exact field does not know joint limits; give the embodiment")

    def predict_steps(self, first: Float[Tensor, "b 3 H W"], second: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n"]:
        """Not possible.

        Raises:
            InputError: always; an exact field needs the pose.
        """
        raise InputError("steps of unrelated pairs need a learned field; decode a video from a known first pose")

    # ---- frames and flow as the field needs them ----------------------------------------------------------------------

    def dtype_of(self, frame: Tensor) -> Tensor:
        """A tensor with the dtype and device of the computation, here the frame's."""
        return frame

    def letterbox(self, frame: Float[Tensor, "*batch 3 H W"]) -> Float[Tensor, "*batch 3 H W"]:
        """The frame itself, which must have the size of the camera.

        Raises:
            VideoError: it has another size.
        """
        height, width = frame.shape[-2:]
        camera = getattr(self.field, "camera", None)
        if camera is None or (camera.width, camera.height) == (width, height):
            return frame
        raise VideoError(
            f"the video is {width}x{height}, the camera {camera.width}x{camera.height}: "
            f"pass camera=camera.resized({width}, {height}) if the camera saw the whole image"
        )

    def letterbox_flow(self, flow: Flow) -> Flow:
        """The flow itself."""
        return flow

    def flow_source(
        self, estimator: FlowEstimator | None, precomputed: Flow | Tensor | None, resolution: int
    ) -> FlowSource:
        """Source of flow; at reduced resolution where it is only the start of the alignment."""
        return FlowSource(estimator, precomputed, resolution=resolution if self._photometric else None)

    # ---- measuring ----------------------------------------------------------------------------------------------------

    def start(self, frame: Float[Tensor, "3 H W"], q0: Float[Tensor, " n"] | None, limits: JointLimits) -> Gaussian:
        """Start at a frame: with the exact pose q0 [rad or m], or with the pose that the field predicts."""
        self._contours = self._agreement = None
        if self._photometric and self.options.use_contours and isinstance(self.field, ContourField):
            self._contours = ContourMemory(self.field)
            self._agreement = ContourAgreement(self.field, frame.shape[-1])
        initial = self._predict_pose(frame, limits) if q0 is None else Gaussian(q0, torch.diag(torch.zeros_like(q0)))
        self._frame, self._pose = frame, self.field.at(initial.mean, frame)
        if self._photometric:
            self._pyramid = BrightnessPyramid.from_frame(frame)
            self._previous = SurfaceAppearance.of(self._pose, self._pyramid)
            self._reference = ReferenceAppearance(self._previous, self._pose.visible.shape[-1])
            self._update_contours(known_pose=q0 is not None)
        return initial

    @property
    def agreement(self) -> Agreement:
        """Agreement of the robot's contours with the edges of the accepted frames; not measured without contours."""
        return NOT_MEASURED if self._agreement is None else self._agreement.value

    def initial_velocity(self, dt: float, limits: JointLimits) -> tuple[Float[Tensor, " n"], None]:
        """Standard deviation of the velocities before the first measurement [rad/s or m/s]; independent joints."""
        return _INITIAL_SPEED * limits.max_step(1.0), None

    def measure(
        self, frame: Float[Tensor, "3 H W"], prediction: PredictedState, limits: JointLimits, *flows: Flow
    ) -> Measurement | None:
        """Measure a frame; None if it is uniform, or has nothing in common with the last accepted one.

        Args:
            frame: finite, same size as the first.
            prediction: of the frame. limits: of the joints.
            flows: from the last accepted frame to this one.

        Raises:
            InputError: there is no flow.
        """
        if not flows:
            raise InputError("an exact field starts from optical flow; give a flow estimator or flow=")
        if self._photometric and float(frame.amax() - frame.amin()) < _MIN_CONTRAST:
            return None
        q, (low, high) = self._pose.q, prediction.bounds
        point_flow, weight = self._flow_at_points(flows[0])
        solution = gauss_newton_step(
            self._pose,
            point_flow,
            weight,
            bounds=(low - q, high - q),
            joint_scale=limits.joint_scale,
            min_motion=self.options.min_motion,
        )
        step, position, maneuver, error = self._refine(frame, solution, prediction, limits)
        explained_fraction, residual = self._explained_fraction(point_flow, weight, step.mean)
        if error > self.options.lost_error and float(explained_fraction) < self.options.lost_explained_fraction:
            return None
        self._next_frame = frame
        valid = bool(solution.valid)
        return Measurement(step, position, residual, explained_fraction, solution.observable, maneuver, valid)

    def accept(self, q: Float[Tensor, " n"]) -> None:
        """Make the frame that was measured last the reference of the next one."""
        self._frame, self._pose = self._next_frame, self.field.at(q, self._next_frame)
        if not self._photometric:
            return
        self._pyramid = self._next_pyramid
        self._previous = SurfaceAppearance.of(self._pose, self._pyramid)
        self._reference.add(self._previous)
        self._update_contours()

    def correct(self, q: Float[Tensor, " n"]) -> None:
        """Replace the joint positions in the last accepted frame; the reference appearance keeps the poses of its frames."""
        self._pose = self.field.at(q, self._frame)
        if self._photometric:
            self._previous = SurfaceAppearance.of(self._pose, self._pyramid)

    def inflate(self, covariance: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """The covariance itself."""
        return covariance

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _update_contours(self, *, known_pose: bool = False) -> None:
        """Update the memory of contours and their agreement with the frame that was accepted."""
        if self._contours is None or self._agreement is None:
            return
        visible = self._contours.update(self._pose, self._pyramid, known_pose=known_pose)
        self._agreement.update(self._pose.q, visible, self._pyramid)

    def _predict_pose(self, frame: Tensor, limits: JointLimits) -> Gaussian:
        assert isinstance(self.field, PosePredictor), "without q0 the field must predict the pose"
        q, std = self.field.predict_pose_from_frame(frame)
        lower, upper = limits.lower.to(q), limits.upper.to(q)
        estimate = Gaussian(q.clamp(lower, upper), torch.diag(std**2))
        if self._contours is not None:
            estimate = initialize_pose(estimate, frame, self._contours, (lower, upper), self.options.align)
        return Gaussian(estimate.mean.to(frame), estimate.covariance.to(frame))

    def _refine(
        self, frame: Tensor, solution: Solution, prediction: PredictedState, limits: JointLimits
    ) -> tuple[Gaussian, Gaussian | None, Tensor, float]:
        """Measured step and position, joints in a maneuver, and the remaining brightness error (0 without alignment)."""
        q = self._pose.q
        # Joints that the frame does not constrain are known to within their largest step.
        least = torch.diag(limits.max_step(prediction.dt) ** -2)
        if not self._photometric:
            limit = _FLOW_VARIANCE_LIMIT
            covariance = solution.covariance.nan_to_num(posinf=limit).clamp(-limit, limit)
            step = Gaussian(solution.delta_q, _inverse(_inverse(covariance) + least))
            return step, None, torch.zeros_like(solution.observable), 0.0
        pyramid = self._next_pyramid = BrightnessPyramid.from_frame(frame)
        expected = (q + prediction.step.mean).clamp(*prediction.bounds)
        starts = [q, q + solution.delta_q]
        if float(prediction.step.mean.abs().max()) > 0:
            starts.append(expected)
        expected_std = prediction.step.covariance.diagonal().sqrt()
        found = align(
            pyramid,
            self._references(),
            starts,
            contours=self._contours,
            silhouette=self._silhouette(pyramid),
            bounds=prediction.bounds,
            prior=(expected, expected_std),
            options=self.options.align,
        )
        maneuver = (found.q - expected).abs() > self.options.maneuver * expected_std
        step = Gaussian(found.data_only - q, _inverse(found.step_information + least))
        if not bool(found.absolute_information.any()):
            return step, None, maneuver, found.error
        absolute = found.absolute_information / self.options.correlation_length
        position = Gaussian(found.q, _inverse(absolute + torch.diag(limits.joint_scale**-2)))
        return step, position, maneuver, found.error

    def _references(self) -> list[SurfaceAppearance]:
        reference = self._reference.appearance_at(self._pose)
        if self.options.use_reference_appearance and len(reference) > _MIN_REFERENCE_POINTS:
            return [self._previous, reference]
        return [self._previous]

    def _silhouette(self, pyramid: BrightnessPyramid) -> SilhouetteFactor | None:
        score = None if self._contours is None else self._contours.background.foreground_score(pyramid)
        return None if score is None else SilhouetteFactor(self.field, score)

    def _flow_at_points(self, flow: Flow) -> tuple[Float[Tensor, "N 2"], Float[Tensor, " N"]]:
        """Flow and its confidence at the pose's points; the confidence is 0 at points that are hidden or outside the image."""
        surface = self._pose.surface()
        height, width = flow.flow.shape[-2:]
        scale = torch.tensor([width, height]).to(surface.points)
        grid = ((surface.points + 0.5) * 2 / scale - 1)[None, None]
        stacked = torch.cat([flow.flow, flow.weight[None]]).to(grid)[None]
        values = F.grid_sample(stacked, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0]
        u, v = surface.points.unbind(-1)
        inside: Bool[Tensor, " N"] = (u > -0.5) & (v > -0.5) & (u < width - 0.5) & (v < height - 0.5)
        return values[:2].T, values[2] * (surface.visible & inside)

    def _explained_fraction(self, flow: Tensor, weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Fraction of the energy of the robot's image motion that the step explains, and the residual [px rms]."""
        moved = self._pose.surface(step).points - self._pose.surface().points
        total = weight.sum().clamp(min=1e-12)
        residual_square = (weight * (flow - moved).square().sum(-1)).sum() / total
        motion = (weight * flow.square().sum(-1)).sum() / total
        return (1 - residual_square / motion.clamp(min=1e-12)).clamp(0, 1), residual_square.sqrt()


def _inverse(matrix: Tensor) -> Tensor:
    """Inverse of a positive semi-definite matrix, computed in float64 with minimal damping."""
    x = matrix.double()
    floor = 1e-12 * x.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.inv(x + floor * torch.eye(len(x), dtype=x.dtype, device=x.device)).to(matrix)
