"""Calibration of a field's uncertainty, and choice of its measurements, on data that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.learned_measurement import LearnedMeasurement, LearnedOptions, training_limits
from jidm.estimation.refinement import FieldEvaluation
from jidm.estimation.step_estimation import estimate_pair_steps, estimate_step
from jidm.estimation.tracker import Tracker
from jidm.fields.free import LearnedField
from jidm.flow.base import Flow
from jidm.training.bidirectional import BidirectionalMotion, matched_flows
from jidm.training.data.batch import PairBatch
from jidm.training.data.clips import Clip

_MIN_SAMPLES = 30  # of a joint, to calibrate it by itself


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs with known steps.

    Attributes:
        evaluation: of the field at the true poses, all first images, then all second ones.
        delta_q: (B, n) the true steps [rad or m].
        flows: forward and backward, for steps that are solved from estimated flow; else empty.
    """

    evaluation: FieldEvaluation
    delta_q: Float[Tensor, "B n"]
    flows: tuple[Flow, ...] = ()


@torch.no_grad()
def calibrate_uncertainty(field: LearnedField, batches: Iterable[PairBatch], rounds: int = 2) -> None:
    """Scale a field's standard deviations to its errors, and decide whether refinement and regression improve its
    steps.

    One factor per joint: the geometric mean of those that make the 68 % and the 95 % interval of a Gaussian hold. Where
    no batch has estimated flow, steps from such flow get the factor of steps from the network's own matches.

    Args:
        field: is changed in place.
        batches: pairs of recordings that the field was not trained on.
        rounds: of scaling. The prior counts more the larger the standard deviations are, so the factor depends on
            itself; two rounds are accurate, one suffices to monitor a run.
    """
    for std_scale in (field.step_std_scale, field.flow_std_scale, field.pose_std_scale, field.regression_std_scale):
        std_scale.fill_(1.0)
    field.use_step_regression.fill_(False)
    matched, estimated, pose_deviations, regression_deviations = [], [], [], []
    for batch in batches:
        features = field.encode(torch.cat([batch.first, batch.second]))
        q, (q_predicted, std) = torch.cat([batch.q, batch.q_next]), field.predict_pose(features)
        pose_deviations.append((q_predicted - q).abs() / std)
        pairs = _Pairs(FieldEvaluation.of(field, features, q), batch.delta_q)
        matched.append(pairs)
        motion = BidirectionalMotion.from_batch(batch) if batch.field is None else None
        if motion is not None:
            estimated.append(_Pairs(pairs.evaluation, batch.delta_q, motion.to_flow()))
        if field.config.step_regression:
            regression_deviations.append(_regression_deviations(field, pairs, motion))
    field.pose_std_scale.copy_(_std_scale(torch.cat(pose_deviations)))
    _calibrate_steps(field, matched, rounds)
    field.flow_std_scale.copy_(_std_scale(_evaluate_steps(field, estimated)[1]) if estimated else field.step_std_scale)
    if regression_deviations:
        field.regression_std_scale.copy_(_std_scale(torch.cat(regression_deviations)))
        _select_step_regression(field, estimated or matched)


@torch.no_grad()
def calibrate_video_uncertainty(field: LearnedField, clips: Iterable[Clip]) -> None:
    """Scale the standard deviations of steps in videos to the errors of tracking some.

    Errors are correlated in time: a field that is wrong at a pose is wrong there in the next frame too. The filter
    assumes independent ones and would be overconfident.

    Args:
        field: is changed in place.
        clips: of recordings that the field was not trained on. Too few steps leave the factor at 1.
    """
    field.video_std_scale.fill_(1.0)
    limits = training_limits(field.config, field.delta_std)
    deviations = []
    for clip in clips:
        tracker = Tracker(LearnedMeasurement(field, LearnedOptions()), limits)
        tracker.start(clip.frames[0], clip.q[0])
        for t, delta_q in enumerate(clip.q.diff(dim=0)):
            step = tracker.step(clip.frames[t + 1], clip.dt, *(flow[t] for flow in clip.flows))
            if step.valid:
                deviations.append((step.delta_q - delta_q).abs() / step.covariance.diagonal().sqrt())
    if len(deviations) >= _MIN_SAMPLES:
        field.video_std_scale.copy_(_std_scale(torch.stack(deviations)))


def _calibrate_steps(field: LearnedField, matched: Sequence[_Pairs], rounds: int) -> None:
    """Decide whether photometric refinement lowers the error of steps, and scale their standard deviations."""
    results = {}
    for refine in (False, True):
        field.use_refinement.fill_(refine)
        results[refine] = _evaluate_steps(field, matched)
    better = results[True][0] <= results[False][0]
    field.use_refinement.fill_(better)
    field.step_std_scale.mul_(_std_scale(results[better][1]))
    for _ in range(rounds - 1):
        field.step_std_scale.mul_(_std_scale(_evaluate_steps(field, matched)[1]))


def _regression_deviations(
    field: LearnedField, pairs: _Pairs, motion: BidirectionalMotion | None
) -> Float[Tensor, "B n"]:
    """Errors of regressed steps in their standard deviations; from estimated flow where there is any."""
    count, evaluation = len(pairs.delta_q), pairs.evaluation
    flows = (
        matched_flows(estimate_step(field, evaluation[:count], evaluation[count:], refinement_stages=()))
        if motion is None
        else motion.regression_inputs()
    )
    step, std = field.regress_step(evaluation.features[:count], evaluation.features[count:], flows)
    return (step - pairs.delta_q).abs() / std


def _select_step_regression(field: LearnedField, batches: Sequence[_Pairs]) -> None:
    """Decide whether fusing the regressed step lowers the error, and widen both: their errors are correlated."""
    alone = _evaluate_steps(field, batches)[0]
    field.use_step_regression.fill_(True)
    error, deviations = _evaluate_steps(field, batches)
    field.use_step_regression.fill_(error < alone)
    for std_scale in (field.step_std_scale, field.flow_std_scale, field.regression_std_scale) if error < alone else ():
        std_scale.mul_(_std_scale(deviations))


def _evaluate_steps(field: LearnedField, batches: Sequence[_Pairs]) -> tuple[float, Float[Tensor, "N n"]]:
    """Mean absolute error of the steps [typical steps], and errors of the solutions in their standard deviations, NaN
    for joints that are not observable in a pair."""
    errors, deviations = [], []
    for pairs in batches:
        estimate = estimate_pair_steps(field, pairs.evaluation, *pairs.flows)
        errors.append((estimate.steps[-1] - pairs.delta_q) / field.delta_std)
        std = estimate.solution.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        error = (estimate.solution.delta_q - pairs.delta_q).abs()
        deviations.append(torch.where(estimate.solution.observable, error / std, torch.nan))
    return float(torch.cat(errors).abs().mean()), torch.cat(deviations)


def _std_scale(deviation: Float[Tensor, "N n"]) -> Float[Tensor, " n"]:
    """Factor per joint; NaN is ignored. A joint with too few samples gets the geometric mean of the others' factors."""
    quantiles = torch.tensor([0.6827, 0.95], dtype=deviation.dtype, device=deviation.device)
    ratio = deviation.nanquantile(quantiles, dim=0) / torch.tensor([[1.0], [1.96]]).to(deviation)
    scale = ratio.log().mean(0).exp().clamp(1e-3, 1e3)
    enough = deviation.isfinite().sum(0) >= min(_MIN_SAMPLES, len(deviation))
    typical = scale[enough].log().mean().exp() if bool(enough.any()) else torch.ones_like(scale[0])
    return torch.where(enough, scale, typical)
