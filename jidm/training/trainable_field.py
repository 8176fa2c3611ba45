"""A learned field with its losses: forward (flow) and inverse (joint steps through the solver) are trained together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.estimation.refinement import FieldEvaluation
from jidm.estimation.step_estimation import StepEstimate, estimate_pair_steps, estimate_step, predict_steps, step_prior
from jidm.fields.free import LearnedField, LearnedFieldConfig
from jidm.training.bidirectional import BidirectionalMotion, Flows, matched_flows
from jidm.training.data.batch import JointStats, PairBatch, normal_from_uniform
from jidm.training.data.clips import Clip
from jidm.training.losses import (
    LossWeights,
    columns_loss,
    field_loss,
    flow_loss,
    gaussian_nll,
    mask_loss,
    photometric_loss,
    smoothness,
)
from jidm.training.model import TrainableModel
from jidm.training.uncertainty_calibration import calibrate_uncertainty, calibrate_video_uncertainty

_STEP_BETA = 0.05  # [standard deviations of the training steps] of the smooth L1 loss of steps
_POSE_BETA = 0.05  # [standard deviations of the training poses] of the smooth L1 loss of poses
_UNCERTAINTY_WEIGHT = 0.05  # of a likelihood that trains standard deviations, beside the smooth L1 loss
_POSE_NOISE = 0.05  # [standard deviations of the training poses] of poses at which the field is evaluated
_MAX_POSE_ERROR = 0.3  # likewise, largest error of a predicted pose at which the field is evaluated
_FIELD_GRADIENT_START = 0.7
"""Fraction of the training after which solved steps train the field where it is not known exactly: the poor matches of
the beginning would spoil it."""


class TrainableField(LearnedField, TrainableModel):
    """A `LearnedField` with its losses.

    Every pair is used in both directions: swapping the frames flips the sign of the step, and the solver gets flow in
    both directions, so that the two are trained to agree.
    """

    Config: ClassVar[type[LearnedFieldConfig]] = LearnedFieldConfig
    weights = LossWeights()

    @classmethod
    def from_data(
        cls, joint_names: Sequence[str], joint_types: Sequence[str], height: int, width: int, stats: JointStats,
        pretrained: bool = False, **options: Any,
    ) -> TrainableField:  # fmt: skip
        """As `TrainableModel.from_data`.

        Args:
            pretrained: start from the backbone's pretrained weights.
        """
        options = {"delta_correlation": stats.delta_correlation, **options}
        return cls(cls.make_config(joint_names, joint_types, height, width, stats, **options), pretrained=pretrained)

    def losses(self, batch: PairBatch) -> dict[str, Tensor]:
        """Scalar terms of the loss, named as in `LossWeights`; "loss" is the weighted sum to minimize.

        Args:
            batch: with flow, exact or estimated, or without: then the field learns from joint steps and image
                brightness alone.
        """
        features = self.encode(torch.cat([batch.first, batch.second]))
        q = torch.cat([batch.q, batch.q_next])
        q_predicted, q_std = self.predict_pose(features)
        evaluation = FieldEvaluation.of(self, features, self._sample_poses(batch, q, q_predicted))
        terms = {
            "pose": _regression_loss((q_predicted - q) / self.q_std, (q_std / self.q_std).log(), _POSE_BETA),
            "smooth": smoothness(evaluation.jacobian * self._typical_step, features.gray_downsampled),
        }
        motion = BidirectionalMotion.from_batch(batch)
        if motion is None:
            terms["photometric"] = photometric_loss(evaluation[: len(batch)], batch.first, batch.second, batch.delta_q)
        elif batch.field is not None:
            terms["field"] = columns_loss(evaluation.jacobian, batch, self._typical_step)
            terms["mask"] = mask_loss(evaluation.mask, motion)
        else:
            terms["field"] = field_loss(evaluation.on_flow_grid[0], motion)
            terms["mask"] = mask_loss(evaluation.mask, motion)
            terms["step_from_flow"] = self._step_from_flow_loss(batch, evaluation, motion)
        if batch.field is not None or self.progress < _FIELD_GRADIENT_START:
            evaluation = self._detached(evaluation, batch)
        terms |= self._matching_losses(batch, evaluation, motion)
        total = torch.zeros((), dtype=q.dtype, device=q.device)
        for name, value in terms.items():
            total = total + getattr(self.weights, name) * value
        return {"loss": total, **terms}

    def predict_steps(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None,
    ) -> Float[Tensor, "B n"]:  # fmt: skip
        """Joint steps of unrelated pairs of frames [rad or m]; `before` is not used."""
        return predict_steps(self, first, second)

    def calibrate_uncertainty(self, batches: Iterable[PairBatch], rounds: int = 2) -> None:
        """See `jidm.training.uncertainty_calibration.calibrate_uncertainty`."""
        calibrate_uncertainty(self, batches, rounds)

    def calibrate_video_uncertainty(self, clips: Iterable[Clip]) -> None:
        """See `jidm.training.uncertainty_calibration.calibrate_video_uncertainty`."""
        calibrate_video_uncertainty(self, clips)

    def _matching_losses(
        self, batch: PairBatch, evaluation: FieldEvaluation, motion: BidirectionalMotion | None
    ) -> dict[str, Tensor]:
        """Losses of the correlation head and of the step solved from its flow.

        The step is solved without photometric refinement: that has no parameters of its own, and with an inaccurate
        field its gradients are noise.
        """
        first, second = evaluation[: len(batch)], evaluation[len(batch) :]
        result = estimate_step(self, first, second, prior=step_prior(self, len(batch)), refinement_stages=())
        terms = {"step": self._step_loss(result, batch.delta_q)}
        if self.config.step_regression:
            flows = self._regression_flows(result, batch, motion)
            step, std = self.regress_step(first.features, second.features, flows)
            error = (step - batch.delta_q) / self.delta_std
            terms["step_regression"] = _regression_loss(error, (std / self.delta_std).log(), _STEP_BETA)
        if motion is not None:
            terms["flow"] = flow_loss(result.flow_measurements, motion)
        return terms

    def _step_from_flow_loss(
        self, batch: PairBatch, evaluation: FieldEvaluation, motion: BidirectionalMotion
    ) -> Tensor:
        return self._step_loss(estimate_pair_steps(self, evaluation, *motion.to_flow()), batch.delta_q)

    @staticmethod
    def _regression_flows(result: StepEstimate, batch: PairBatch, motion: BidirectionalMotion | None) -> Flows:
        """The network's matches; for half the pairs estimated flow if there is any, since decoding may use either."""
        matched = matched_flows(result)
        if batch.field is not None or motion is None:
            return matched
        one, other = batch.random_numbers()[:, 1].chunk(2)
        use_estimated = (one + other) % 1 < 0.5  # symmetric: the same for either order of the frames
        where = use_estimated[:, None, None]
        return [
            (torch.where(where[..., None], flow, x), torch.where(where, log_weight, y))
            for (flow, log_weight), (x, y) in zip(motion.regression_inputs(), matched, strict=True)
        ]

    @staticmethod
    def _detached(evaluation: FieldEvaluation, batch: PairBatch) -> FieldEvaluation:
        """The evaluation with a field that steps do not train: the exact one where it is known."""
        if batch.field is None or batch.field_back is None:
            return evaluation.detach_jacobian()
        exact = torch.cat([batch.field, batch.field_back])
        return FieldEvaluation(evaluation.features, exact, evaluation.mask.detach())

    @property
    def _typical_step(self) -> Tensor:
        """(n, 1, 1) a typical step of each joint: the field times this is in pixels."""
        return self.delta_std[:, None, None]

    def _sample_poses(self, batch: PairBatch, q: Tensor, q_predicted: Tensor) -> Tensor:
        """Poses at which the field is evaluated: half of them true ones with noise, as in tracking, half predicted
        ones.

        Errors of predicted poses are clamped: a field that is evaluated at poses far from the truth learns to ignore
        them.
        """
        random = batch.random_numbers()
        noisy = q + _POSE_NOISE * self.q_std * normal_from_uniform(random[:, 2:])
        from_image = random[:, :1] < 0.5
        limit = _MAX_POSE_ERROR * self.q_std
        return torch.where(from_image, q + (q_predicted.detach() - q).clamp(-limit, limit), noisy)

    def _step_loss(self, result: StepEstimate, delta_q: Tensor) -> Tensor:
        target = delta_q / self.delta_std
        step_losses = [F.smooth_l1_loss(step / self.delta_std, target, beta=_STEP_BETA) for step in result.steps]
        intermediate = torch.stack(step_losses[:-1]).mean() if len(step_losses) > 1 else 0.0
        return step_losses[-1] + self.weights.intermediate * intermediate


def _regression_loss(error: Tensor, log_std: Tensor, beta: float) -> Float[Tensor, ""]:
    """Smooth L1 loss of a regression, and the likelihood that trains its standard deviation."""
    smooth_l1 = F.smooth_l1_loss(error, torch.zeros_like(error), beta=beta)
    return smooth_l1 + _UNCERTAINTY_WEIGHT * gaussian_nll(error, log_std)
