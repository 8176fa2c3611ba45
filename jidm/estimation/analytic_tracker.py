"""A robot's pose followed through a video, frame by frame, from a known start or one that the field reads.

Each frame is aligned to the frame before and to what was first seen of the robot's surface, its silhouette and its
outlines to the picture. Streaming: the tracker holds two appearances and the background, never the video.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.estimation.alignment import Alignment, AlignOptions, align
from jidm.estimation.factors.contour import ContourFactor
from jidm.estimation.factors.photometric import SurfaceAppearance
from jidm.estimation.factors.silhouette import SilhouetteFactor
from jidm.estimation.gauss_newton import gauss_newton_step
from jidm.estimation.initialization import initialize_pose
from jidm.estimation.kalman import Gaussian
from jidm.estimation.reference_appearance import ReferenceAppearance
from jidm.estimation.solver import Solution
from jidm.fields.base import ContourField, FieldAtPose, JacobianField, PosePredictor
from jidm.flow import Flow
from jidm.video.pyramid import BrightnessPyramid

Refine = Literal["none", "photometric"]

_MIN_REFERENCE_POINTS = 50  # fewer points that were seen before are no reference


@dataclass(frozen=True)
class AnalyticTrackerOptions:
    """How a pose is followed.

    Attributes:
        refine: "photometric" aligns brightness and outlines; "none" trusts the flow alone.
        use_contours: match outlines and silhouette (where the field has them), which keeps steps from adding up to drift.
        use_reference_appearance: align to the robot's surface as it was first seen, besides the previous frame.
        min_motion: image motion [px rms over the robot, per radian or 0.1 m] that a joint must cause on its own to be
            called observable.
        velocity_time_constant: a velocity is expected to last about so long [s].
        process_noise_window: the usual speed of a joint is that of about so many frames back, so that a joint that rests soon is not moved
            by noise.
        initial_speed: that speed before anything was seen, as a share of the joint's reach in a second (see `JointLimits.reach`).
        process_noise_floor: standard deviation of a joint's step around the expected one beyond what its usual speed allows, as a
            share of its reach. It steadies joints that the picture hardly shows and is nothing to the others.
        lost_cost, lost_explained_fraction: where brightness costs more than the first (0 to 9, see `BrightnessTerm.cost`) and the step
            explains less than the second of the flow, the frame shows nothing that was there before, a cut say: the
            pose is held and later frames are measured from the last one that fitted.
        align: of one frame.
    """

    refine: Refine = "photometric"
    use_contours: bool = True
    use_reference_appearance: bool = True
    min_motion: float = 2.5
    velocity_time_constant: float = 0.5
    process_noise_window: float = 16.0
    initial_speed: float = 0.4
    process_noise_floor: float = 0.05
    lost_cost: float = 5.0
    lost_explained_fraction: float = 0.3
    align: AlignOptions = field(default_factory=AlignOptions)


@dataclass(frozen=True, eq=False)
class JointLimits:
    """What the joints can do: positions [rad or m], speed [rad/s or m/s], and a unit that compares rad with m."""

    lower: Float[Tensor, " n"]
    upper: Float[Tensor, " n"]
    velocity: Float[Tensor, " n"]
    joint_scale: Float[Tensor, " n"]

    def max_step(self, dt: float) -> Float[Tensor, " n"]:
        """Largest step within dt seconds [rad or m]; a joint without a speed limit may go a quarter of its unit."""
        return torch.where(self.velocity.isfinite(), self.velocity * dt, self.joint_scale * 0.25)


@dataclass(frozen=True, eq=False)
class TrackedStep:
    """One step: everything (n,) or (n, n) or scalar; see `JointMotion` for the meaning of each."""

    delta_q: Tensor
    position: Tensor
    position_covariance: Tensor
    covariance: Tensor
    residual: Tensor
    explained_fraction: Tensor
    observable: Tensor
    valid: bool
    accepted: bool = True
    """Whether the frame was looked at: the next step starts from it. False for a frame that shows nothing known."""


class AnalyticTracker:
    """Follows one robot in one video.

    Args:
        field: one robot seen by one camera.
        limits: of its joints; bounds are kept inside the solve.
        options: how.
    """

    def __init__(self, field: JacobianField, limits: JointLimits, options: AnalyticTrackerOptions) -> None:
        self.field = field
        self.limits = limits
        self.options = options
        self._contour_factor: ContourFactor | None = None
        if options.refine == "photometric" and options.use_contours and isinstance(field, ContourField):
            self._contour_factor = ContourFactor(field)
        self._started = False

    def start(self, frame: Float[Tensor, "3 H W"], q0: Float[Tensor, " n"] | None) -> None:
        """Begin at a frame whose joint positions are known; without q0 [rad or m] at the pose that the field reads."""
        known = q0 is not None
        if q0 is None:
            initial = self._initialize_pose(frame)
            self.q, self.position_covariance = initial.mean, initial.covariance
        else:
            self.q, self.position_covariance = q0, torch.zeros(len(q0), len(q0)).to(q0)
        self._velocity = torch.zeros_like(self.q)
        self._velocity_variance = (self.options.initial_speed * self.limits.max_step(1.0)).square()
        self._frame, self._pose = frame, self.field.at(self.q, frame)
        self._elapsed = 0.0
        self._started = True
        if self.options.refine == "photometric":
            self._pyramid = BrightnessPyramid.from_frame(frame)
            self._previous = SurfaceAppearance.of(self._pose, self._pyramid)
            self._reference_appearance = ReferenceAppearance(self._previous, self._pose.visible.shape[-1])
            if self._contour_factor is not None:
                self._contour_factor.update(self._pose, self._pyramid, known_pose=known)

    def skip(self, dt: float) -> TrackedStep:
        """A frame that shows nothing: hold the pose; the next good frame is measured from the last good one."""
        self._elapsed += dt
        n = len(self.q)
        zero, unknown = torch.zeros_like(self.q), torch.zeros((), dtype=self.q.dtype)
        inflated = self.position_covariance + torch.diag(self.limits.max_step(self._elapsed) ** 2)
        observable = torch.zeros(n, dtype=torch.bool, device=self.q.device)
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

    def step(self, frame: Float[Tensor, "3 H W"], dt: float, flow: Flow) -> TrackedStep:
        """Follow the robot into the next frame.

        Args:
            frame: finite, same size as the first.
            dt: time since the previous frame, skipped ones included through `skip` [s].
            flow: from the last good frame to this one.
        """
        assert self._started, "call start first"
        gap = self._elapsed
        max_step = self.limits.max_step(dt + gap)
        low = torch.maximum(self.limits.lower.minimum(self.q), self.q - max_step)
        high = torch.minimum(self.limits.upper.maximum(self.q), self.q + max_step)
        point_flow, weight = self._flow_at_points(flow)
        flow_solution = gauss_newton_step(
            self._pose,
            point_flow,
            weight,
            bounds=(low - self.q, high - self.q),
            unit=self.limits.joint_scale,
            min_motion=self.options.min_motion,
        )
        q, covariance, fused, cost = self._refine(frame, flow_solution, (low, high), max_step, dt)
        explained_fraction, residual = self._explained_fraction(point_flow, weight, q)
        if cost > self.options.lost_cost and float(explained_fraction) < self.options.lost_explained_fraction:
            return self.skip(dt)
        self._elapsed = 0.0
        step = q - self.q
        self._velocity = step / (dt + gap)
        self._velocity_variance = self._velocity_variance + (self._velocity.square() - self._velocity_variance) / (
            self.options.process_noise_window + 1
        )
        self.q, self.position_covariance = q, fused
        self._frame, self._pose = frame, self.field.at(q, frame)
        valid = bool(flow_solution.valid) and gap == 0.0
        if self.options.refine == "photometric":
            self._update_appearance()
        return TrackedStep(
            step if valid else torch.zeros_like(step),
            q,
            fused,
            covariance,
            residual,
            explained_fraction,
            flow_solution.observable,
            valid,
        )

    def correct(self, q: Float[Tensor, " n"], std: float) -> None:
        """What the robot itself says its joints were in the last frame that was looked at [rad or m], to within std.

        What was seen of its surface before stays with the pose it was seen at.
        """
        self.q = q.to(self.q)
        self.position_covariance = torch.diag(torch.full_like(self.q, std**2))
        self._pose = self.field.at(self.q, self._frame)
        if self.options.refine == "photometric":
            self._previous = SurfaceAppearance.of(self._pose, self._pyramid)

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _initialize_pose(self, frame: Tensor) -> Gaussian:
        assert isinstance(self.field, PosePredictor), "without q0 the field must read the pose"
        q, std = self.field.predict_pose(frame)
        q = q.clamp(self.limits.lower.to(q), self.limits.upper.to(q))
        estimate = Gaussian(q, torch.diag(std**2))
        if self._contour_factor is not None:
            bounds = self.limits.lower, self.limits.upper
            estimate = initialize_pose(estimate, frame, self._contour_factor, bounds, self.options.align)
        return Gaussian(estimate.mean.to(frame), estimate.covariance.to(frame))

    def _refine(
        self, frame: Tensor, flow_solution: Solution, bounds: tuple[Tensor, Tensor], max_step: Tensor, dt: float
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """Pose, covariance of the step, covariance of the position, and what brightness cost (0 where not asked)."""
        # Joints nobody sees are known only to within their reach.
        prior = torch.diag(max_step**-2)
        if self.options.refine == "none":
            step_covariance = flow_solution.covariance.nan_to_num(posinf=1e6).clamp(-1e6, 1e6)
            step_covariance = _inverse(_inverse(step_covariance) + prior)
            return self.q + flow_solution.delta_q, step_covariance, self.position_covariance + step_covariance, 0.0
        pyramid = BrightnessPyramid.from_frame(frame)
        decay = math.exp(-dt / self.options.velocity_time_constant)
        predicted = (self.q + decay * self._velocity * dt).clamp(*bounds)
        process_std = (
            self._velocity_variance * (1 - decay**2)
        ).sqrt() * dt + self.options.process_noise_floor * max_step
        starts = [self.q, self.q + flow_solution.delta_q]
        if float(self._velocity.abs().max()) > 0:
            starts.append(predicted)
        alignment: Alignment = align(
            pyramid,
            self._references(),
            starts,
            contour=self._contour_factor,
            silhouette=self._silhouette_factor(pyramid),
            bounds=bounds,
            prior=(predicted, process_std),
            options=self.options.align,
        )
        self._pyramid = pyramid
        step_covariance = _inverse(alignment.relative_information + prior)
        return alignment.q, step_covariance, self._fuse(step_covariance, alignment.absolute_information), alignment.cost

    def _fuse(self, step_covariance: Tensor, absolute: Tensor) -> Tensor:
        """Covariance of the position after a step and a look at the outlines.

        The outlines' errors hardly change from frame to frame, so looking again tells little: they are fused by
        covariance intersection (Julier and Uhlmann 1997), which holds whatever the correlation, where that helps.
        """
        predicted = self.position_covariance + step_covariance
        fused = _inverse((_inverse(predicted) + absolute) / 2)
        traces = [(c.diagonal() / self.limits.joint_scale**2).sum() for c in (fused, predicted)]
        return fused if traces[0] < traces[1] else predicted

    def _references(self) -> list[SurfaceAppearance]:
        reference = self._reference_appearance.appearance_at(self._pose)
        if self.options.use_reference_appearance and len(reference) > _MIN_REFERENCE_POINTS:
            return [self._previous, reference]
        return [self._previous]

    def _silhouette_factor(self, pyramid: BrightnessPyramid) -> SilhouetteFactor | None:
        foreground_score = (
            None if self._contour_factor is None else self._contour_factor.background.foreground_score(pyramid)
        )
        return None if foreground_score is None else SilhouetteFactor(self.field, foreground_score)

    def _update_appearance(self) -> None:
        self._previous = SurfaceAppearance.of(self._pose, self._pyramid)
        self._reference_appearance.add(self._previous)
        if self._contour_factor is not None:
            self._contour_factor.update(self._pose, self._pyramid)

    def _flow_at_points(self, flow: Flow) -> tuple[Float[Tensor, "N 2"], Float[Tensor, " N"]]:
        """Flow and its confidence at the pose's points; weight 0 where a point is hidden or out of the picture."""
        surface = self._pose.surface()
        height, width = flow.flow.shape[-2:]
        scale = torch.tensor([width, height]).to(surface.points)
        grid = ((surface.points + 0.5) * 2 / scale - 1)[None, None]
        stacked = torch.cat([flow.flow, flow.weight[None]]).to(grid)[None]
        values = F.grid_sample(stacked, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0]
        u, v = surface.points.unbind(-1)
        inside: Bool[Tensor, " N"] = (u > -0.5) & (v > -0.5) & (u < width - 0.5) & (v < height - 0.5)
        return values[:2].T, values[2] * (surface.visible & inside)

    def _explained_fraction(self, flow: Tensor, weight: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the robot's image motion that the step explains, and what is left [px rms]."""
        pose: FieldAtPose = self._pose
        moved = pose.surface(q - self.q).points - pose.surface().points
        total = weight.sum().clamp(min=1e-12)
        residual_square = (weight * (flow - moved).square().sum(-1)).sum() / total
        motion = (weight * flow.square().sum(-1)).sum() / total
        return (1 - residual_square / motion.clamp(min=1e-12)).clamp(0, 1), residual_square.sqrt()


def _inverse(matrix: Tensor) -> Tensor:
    """Inverse of a positive semi-definite matrix, in float64, with a whisper of damping."""
    x = matrix.double()
    floor = 1e-12 * x.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.inv(x + floor * torch.eye(len(x), dtype=x.dtype, device=x.device)).to(matrix)
