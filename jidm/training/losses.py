"""How a learned field is trained: forward and inverse together, on pairs of frames and the joint steps between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.errors import InputError
from jidm.estimation.dense_photometric import warp
from jidm.estimation.factors.learned import StepEstimate, estimate_pair_steps, estimate_step, predict_steps, step_prior
from jidm.estimation.refinement import FieldEvaluation, FlowMeasurement
from jidm.fields.free import LearnedField, LearnedFieldConfig
from jidm.fields.free.config import STRIDE
from jidm.training.bidirectional import BidirectionalMotion, Flows, matched_flows
from jidm.training.data.batch import JointStats, PairBatch, normal_from_uniform
from jidm.training.data.clips import Clip
from jidm.training.distributed import all_reduce_mean, weighted_mean
from jidm.training.uncertainty_calibration import calibrate_uncertainty, calibrate_video_uncertainty

_FLOW_EPS = 1e-2  # [px] below this a flow error counts as its square (Charbonnier)
_STEP_BETA = 0.05  # [standard deviations of the training steps] likewise for the inverse loss (smooth L1)
_POSE_BETA = 0.05  # [standard deviations of the training poses]
_MAX_SQUARED_DEVIATION = 50.0  # squared deviations beyond this teach the uncertainty nothing
_POSE_NOISE = 0.05  # [standard deviations of the training poses] of the poses the field is asked at
_MAX_POSE_ERROR = (
    0.3  # likewise, the most by which a pose read off the picture may be wrong for the field to be asked there
)
_FIELD_GRADIENT_START = 0.7
"""Share of the training from which on solved steps bend a field that nobody knows: poor matches would spoil it."""
_MIN_RELATIVE_MOTION = 0.01  # of the mean motion: a joint that moves less is not worth more to be learned
_MIN_MOTION = 0.1  # [px] mean motion a batch is counted with at least, so that still batches do not blow up


@dataclass(frozen=True)
class LossWeights:
    """What each part of the loss counts.

    Attributes:
        field: the field against the exact one, or times the executed step against the motion seen; relative to either.
        flow: of the pair head, with the confidence that its errors deserve.
        step: joint steps solved through the least squares, in standard deviations of the training steps.
        step_from_flow: the same solved from the flow that was measured, where nobody knows the field: so it learns what such
            flow is worth to each joint.
        intermediate: share of the looks before the last in `step`.
        mask: where the robot is.
        pose: absolute joint positions, and their uncertainty.
        compose: two steps one after the other add up to the step over both.
        smooth: total variation of the field where the picture has no edges.
        step_regression: joint steps by regression; teaches nothing but its own head.
        photometric: brightness carried by the field and the executed step; used where nothing measured the flow.
    """

    field: float = 1.0
    flow: float = 0.15
    step: float = 0.5
    step_from_flow: float = 0.5
    intermediate: float = 0.3
    mask: float = 1.0
    pose: float = 0.5
    compose: float = 0.0
    smooth: float = 0.02
    step_regression: float = 0.5
    photometric: float = 1.0


class TrainableField(LearnedField):
    """A `LearnedField` that knows its own loss.

    Every pair is used in both directions: swapping the frames flips the sign of the step, and the solver sees the flow
    both ways, so the two are trained to agree.
    """

    weights = LossWeights()
    progress = 1.0
    """Share of the training that is over."""

    @classmethod
    def from_data(
        cls, joint_names: Sequence[str], joint_types: Sequence[str], height: int, width: int, stats: JointStats,
        pretrained: bool = False, **options: Any,
    ) -> TrainableField:  # fmt: skip
        """An untrained field for recordings of that size and those joint statistics.

        Args:
            pretrained: begin with the backbone's pretrained weights.
            options: further entries of `LearnedFieldConfig`.
        """
        config = LearnedFieldConfig(
            tuple(joint_names), tuple(joint_types), height, width, stats.q_mean, stats.q_std, stats.delta_std,
            stats.q_lower, stats.q_upper, **{"delta_correlation": stats.delta_correlation, **options},
        )  # fmt: skip
        return cls(config, pretrained=pretrained)

    def losses(self, batch: PairBatch) -> dict[str, Tensor]:
        """Scalar parts of the loss; "loss" is what to minimise.

        Args:
            batch: with flow, exact or estimated, or without any: then the field learns from the joint steps and the
                brightness alone.
        """
        weight, count = self.weights, len(batch)
        features = self.encode(torch.cat([batch.first, batch.second]))
        q = torch.cat([batch.q, batch.q_next])
        q_predicted, q_std = self.predict_pose(features)
        evaluation = FieldEvaluation.of(self, features, self._sample_poses(batch, q, q_predicted))
        parts = {
            "state": self._pose_loss(q, q_predicted, q_std),
            "smooth": smoothness(evaluation.jacobian * self._typical_step, features.gray_downsampled),
        }
        motion = BidirectionalMotion.from_batch(batch)
        if motion is not None:
            exact = batch.field is not None
            parts["field"] = (
                columns_loss(evaluation.jacobian, batch, self._typical_step)
                if exact
                else field_loss(evaluation.on_flow_grid[0], motion)
            )
            parts["mask"] = motion.mask_loss(evaluation.mask)
        else:
            parts["photometric"] = photometric_loss(evaluation[:count], batch.first, batch.second, batch.delta_q)
        if batch.field is None and motion is not None:
            parts["measured"] = self._step_from_flow_loss(batch, evaluation, motion)
        field_gradient = batch.field is None and self.progress >= _FIELD_GRADIENT_START
        parts |= self._matching_losses(
            batch, evaluation if field_gradient else self._detached(evaluation, batch), motion
        )
        total = torch.zeros((), dtype=q.dtype, device=q.device)
        for name, value in parts.items():
            total = total + getattr(weight, name) * value
        return {"loss": total, **parts}

    def predict_steps(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"], before: Tensor | None = None
    ) -> Float[Tensor, "B n"]:
        """Joint steps of unrelated pairs of frames [rad or m]; `before` is not needed."""
        return predict_steps(self, first, second)

    @torch.no_grad()
    def calibrate_uncertainty(self, batches: Iterable[PairBatch], rounds: int = 2) -> None:
        """See `jidm.training.uncertainty_calibration.calibrate`."""
        calibrate_uncertainty(self, batches, rounds)

    @torch.no_grad()
    def calibrate_video_uncertainty(self, clips: Iterable[Clip]) -> None:
        """See `jidm.training.uncertainty_calibration.calibrate_videos`."""
        calibrate_video_uncertainty(self, clips)

    def _matching_losses(
        self, batch: PairBatch, evaluation: FieldEvaluation, motion: BidirectionalMotion | None
    ) -> dict[str, Tensor]:
        """What needs both pictures matched and the step solved. Closer looks have nothing to learn but the field, and a
        rough field learns nothing from them: what they see around a wrong guess is noise."""
        first, second = evaluation[: len(batch)], evaluation[len(batch) :]
        result = estimate_step(self, first, second, prior=step_prior(self, len(batch)), refinement_stages=())
        parts = {"step": self._step_loss(result, batch.delta_q)}
        if self.config.step_regression:
            parts["guess"] = self._regression_loss(batch, evaluation, self._regression_flows(result, batch, motion))
        if motion is not None:
            parts["flow"] = flow_loss(result.flow_measurements, motion)
        if self.weights.compose and batch.third is not None:
            parts["compose"] = self._compose_loss(batch, first, second, result)
        return parts

    def _step_from_flow_loss(
        self, batch: PairBatch, evaluation: FieldEvaluation, motion: BidirectionalMotion
    ) -> Tensor:
        return self._step_loss(estimate_pair_steps(self, evaluation, *motion.to_flow()), batch.delta_q)

    @staticmethod
    def _regression_flows(result: StepEstimate, batch: PairBatch, motion: BidirectionalMotion | None) -> Flows:
        """What the network matched; of half the pairs what was measured, if it was: decoding may begin with either."""
        matched = matched_flows(result)
        if batch.field is not None or motion is None:
            return matched
        one, other = batch.random_numbers()[:, 1].chunk(2)
        use_measured = (one + other) % 1 < 0.5  # the same in either order of the frames
        return [
            (
                torch.where(use_measured[:, None, None, None], flow, x),
                torch.where(use_measured[:, None, None], log_weight, y),
            )
            for (flow, log_weight), (x, y) in zip(motion.regression_inputs(), matched, strict=True)
        ]

    def _regression_errors(self, batch: PairBatch, evaluation: FieldEvaluation, flows: Flows) -> tuple[Tensor, Tensor]:
        """Errors of guesses and their log standard deviations, (B, n) each, both in typical steps."""
        step, std = self.regress_step(evaluation.features[: len(batch)], evaluation.features[len(batch) :], flows)
        return (step - batch.delta_q) / self.delta_std, (std / self.delta_std).log()

    def _regression_loss(self, batch: PairBatch, evaluation: FieldEvaluation, flows: Flows) -> Tensor:
        error, log_std = self._regression_errors(batch, evaluation, flows)
        return F.smooth_l1_loss(error, torch.zeros_like(error), beta=_STEP_BETA) + 0.05 * _gaussian_nll(error, log_std)

    @staticmethod
    def _detached(evaluation: FieldEvaluation, batch: PairBatch) -> FieldEvaluation:
        """A field that steps do not bend: the exact one where it is known."""
        if batch.field is None or batch.field_back is None:
            return evaluation.detach_jacobian()
        return FieldEvaluation(
            evaluation.features, torch.cat([batch.field, batch.field_back]), evaluation.mask.detach()
        )

    @property
    def _typical_step(self) -> Tensor:
        """(n, 1, 1) a typical step of each joint: the field times this is in pixels."""
        return self.delta_std[:, None, None]

    def _sample_poses(self, batch: PairBatch, q: Tensor, q_predicted: Tensor) -> Tensor:
        """Poses to bend the field with: half of them nearly right, as when tracking, half read off the picture, as far as
        that is not quite wrong: a field that is asked at poses that mean nothing learns to ignore them."""
        random = batch.random_numbers()
        noisy = q + _POSE_NOISE * self.q_std * normal_from_uniform(random[:, 2:])
        from_image = random[:, :1] < 0.5
        limit = _MAX_POSE_ERROR * self.q_std
        return torch.where(from_image, q + (q_predicted.detach() - q).clamp(-limit, limit), noisy)

    def _pose_loss(self, q: Tensor, q_predicted: Tensor, q_std: Tensor) -> Tensor:
        error = (q_predicted - q) / self.q_std
        std = q_std / self.q_std
        return F.smooth_l1_loss(error, torch.zeros_like(error), beta=_POSE_BETA) + 0.05 * _gaussian_nll(
            error, std.log()
        )

    def _step_loss(self, result: StepEstimate, delta_q: Tensor) -> Tensor:
        target = delta_q / self.delta_std
        step_losses = [F.smooth_l1_loss(step / self.delta_std, target, beta=_STEP_BETA) for step in result.steps]
        intermediate = torch.stack(step_losses[:-1]).mean() if len(step_losses) > 1 else 0.0
        return step_losses[-1] + self.weights.intermediate * intermediate

    def _compose_loss(
        self, batch: PairBatch, first: FieldEvaluation, second: FieldEvaluation, result: StepEstimate
    ) -> Tensor:
        assert batch.third is not None and batch.q_third is not None
        third = FieldEvaluation.of(self, self.encode(batch.third), batch.q_third)
        whole = estimate_step(self, first, third).solution.delta_q
        rest = estimate_step(self, second, third).solution.delta_q
        error = (result.solution.delta_q + rest - whole) / self.delta_std
        return F.smooth_l1_loss(error, torch.zeros_like(error), beta=_STEP_BETA)


def field_loss(jacobian: Float[Tensor, "b 2 n h w"], motion: BidirectionalMotion) -> Float[Tensor, ""]:
    """Charbonnier distance of `jacobian @ step` from the motion to first order, relative to the batch's mean motion."""
    predicted = torch.einsum("bcnhw,bn->bchw", jacobian, motion.tangent_step)
    weight = motion.tangent_weight
    mean_motion = all_reduce_mean(weighted_mean(motion.tangent.square().sum(1).sqrt(), weight)).clamp(min=_MIN_MOTION)
    return weighted_mean(charbonnier(predicted - motion.tangent), weight) / mean_motion


def columns_loss(
    jacobian: Float[Tensor, "b 2 n y x"], batch: PairBatch, joint_scale: Float[Tensor, "n 1 1"]
) -> Float[Tensor, ""]:  # fmt: skip
    """Charbonnier distance of every joint's column from the exact one, both for a typical step of that joint and relative
    to what joints move: to the geometric mean of this one and of all, so that a wrist that moves a few cells by little
    is learned as well as what moves the whole arm."""
    assert batch.field is not None and batch.field_weight is not None
    assert batch.field_back is not None and batch.field_weight_back is not None
    exact, weight = torch.cat([batch.field, batch.field_back]), torch.cat([batch.field_weight, batch.field_weight_back])
    target = joint_scale * exact

    def per_joint(x: Float[Tensor, "b n y x"]) -> Float[Tensor, " n"]:
        return torch.stack([weighted_mean(column, weight) for column in x.unbind(1)])

    mean_motion = all_reduce_mean(per_joint(target.square().sum(1).sqrt()))
    typical = mean_motion.mean().clamp(min=_MIN_MOTION)
    relative = (
        per_joint(charbonnier(joint_scale * jacobian - target))
        / (typical * mean_motion.maximum(_MIN_RELATIVE_MOTION * typical)).sqrt()
    )
    return relative.mean()


def flow_loss(matches: Sequence[FlowMeasurement], motion: BidirectionalMotion) -> Float[Tensor, ""]:
    """Error of the matched flow under a Laplace distribution whose width is the confidence: large errors cost little
    where the head said so, and saying so costs."""
    flow = torch.cat([look.flow for look in matches])
    half = torch.cat([look.log_weight for look in matches]) / 2
    return weighted_mean(charbonnier(flow - motion.flow) * half.exp() - half, motion.weight)


def photometric_loss(
    first: FieldEvaluation,
    image: Float[Tensor, "b 3 H W"],
    other: Float[Tensor, "b 3 H W"],
    delta_q: Float[Tensor, "b n"],
) -> Float[Tensor, ""]:
    """Brightness of the second picture, carried back by the field and the executed step, against the first."""
    flow = torch.einsum("bcnhw,bn->bchw", first.jacobian, delta_q)
    scale = image.shape[-1] / (flow.shape[-1] * STRIDE)
    flow = F.interpolate(flow * scale, size=image.shape[-2:], mode="bilinear", align_corners=False)
    return charbonnier(warp(other, flow) - image).mean()


def smoothness(field: Float[Tensor, "b 2 n h w"], gray: Float[Tensor, "b 1 H W"]) -> Float[Tensor, ""]:
    """Total variation of the field [px per typical step], less where the picture has edges (Godard et al. 2017)."""
    h, w = field.shape[-2:]
    gray = F.interpolate(gray, size=(h, w), mode="area")
    flat = field.flatten(1, 2)
    total = torch.zeros((), dtype=field.dtype, device=field.device)
    for axis in (-1, -2):
        edge = gray.diff(dim=axis).abs()
        total = total + (flat.diff(dim=axis).abs() * (-10 * edge).exp()).mean()
    return total


def charbonnier(error: Float[Tensor, "b c *n h w"]) -> Float[Tensor, "b *n h w"]:
    """Smooth length of a vector field, or of several."""
    return (error.square().sum(1) + _FLOW_EPS**2).sqrt()


def _gaussian_nll(error: Tensor, log_std: Tensor) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of normal errors; teaches the standard deviations alone."""
    return ((error.detach() / log_std.exp()).square().clamp(max=_MAX_SQUARED_DEVIATION) / 2 + log_std).mean()


def make_loss_weights(options: Mapping[str, float]) -> LossWeights:
    """Weights by name, the others at their defaults.

    Raises:
        InputError: a name is unknown.
    """
    try:
        return LossWeights(**options)
    except TypeError as error:
        raise InputError(f"unknown part of the loss: {error}") from None
