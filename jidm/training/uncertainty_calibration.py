"""How sure a trained field may be, and what helps it: measured on recordings that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.factors.learned import estimate_pair_steps, estimate_step
from jidm.estimation.learned_tracker import LearnedTracker, LearnedTrackerOptions, training_limits
from jidm.estimation.refinement import FieldEvaluation
from jidm.fields.free import LearnedField
from jidm.flow.base import Flow
from jidm.training.bidirectional import BidirectionalMotion, matched_flows
from jidm.training.data.batch import PairBatch
from jidm.training.data.clips import Clip

_MIN_SAMPLES = 30  # of a joint, by which its spread is told


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs whose steps are known.

    Attributes:
        evaluation: all first pictures, then all second ones, at their true poses.
        delta_q: (B, n) the true steps [rad or m].
        flows: there and back, for steps that are solved from flow.
    """

    evaluation: FieldEvaluation
    delta_q: Float[Tensor, "B n"]
    flows: tuple[Flow, ...] = ()


@torch.no_grad()
def calibrate_uncertainty(field: LearnedField, batches: Iterable[PairBatch], rounds: int = 2) -> None:
    """Scale a field's uncertainties to the errors it makes on pairs, and see whether closer looks and guesses help it.

    The looser a look's say is, the more the next one begins with what was known before; so it takes two rounds to be
    exact, and one to watch a run by.

    One factor per joint: the geometric mean of what the 68 % and the 95 % interval of a normal distribution ask for.
    Where no batch brings flow that was measured, such flow is trusted as far as the network's own looks.
    """
    matched_pairs, flow_pairs, pose_deviations, regression_deviations = [], [], [], []
    for std_scale in (field.step_std_scale, field.flow_std_scale, field.pose_std_scale, field.regression_std_scale):
        std_scale.fill_(1.0)
    field.use_step_regression.fill_(False)
    for batch in batches:
        features = field.encode(torch.cat([batch.first, batch.second]))
        q, (q_predicted, std) = torch.cat([batch.q, batch.q_next]), field.predict_pose(features)
        pose_deviations.append((q_predicted - q).abs() / std)
        pairs = _Pairs(FieldEvaluation.of(field, features, q), batch.delta_q)
        matched_pairs.append(pairs)
        motion = BidirectionalMotion.from_batch(batch) if batch.field is None else None
        if motion is not None:
            flow_pairs.append(_Pairs(pairs.evaluation, batch.delta_q, motion.to_flow()))
        if field.config.step_regression:
            regression_deviations.append(_regression_errors(field, pairs, motion))
    field.pose_std_scale.copy_(_std_scale(torch.cat(pose_deviations)))
    results = {}
    for refine in (False, True):
        field.use_refinement.fill_(refine)
        results[refine] = _evaluate_steps(field, matched_pairs)
    better = results[True][0] <= results[False][0]
    field.use_refinement.fill_(better)
    field.step_std_scale.mul_(_std_scale(results[better][1]))
    for _ in range(rounds - 1):
        field.step_std_scale.mul_(_std_scale(_evaluate_steps(field, matched_pairs)[1]))
    field.flow_std_scale.copy_(
        _std_scale(_evaluate_steps(field, flow_pairs)[1]) if flow_pairs else field.step_std_scale
    )
    if regression_deviations:
        field.regression_std_scale.copy_(_std_scale(torch.cat(regression_deviations)))
        _select_step_regression(field, flow_pairs or matched_pairs)


@torch.no_grad()
def calibrate_video_uncertainty(field: LearnedField, clips: Iterable[Clip]) -> None:
    """Scale the uncertainties of steps in videos to the errors made in following some.

    Errors last: a field that is wrong at a pose is wrong there in the next frame too, and taking them for independent
    makes a filter too sure.
    """
    field.video_std_scale.fill_(1.0)
    limits = training_limits(field.config, field.delta_std)
    found = []
    for clip in clips:
        tracker = LearnedTracker(field, limits, LearnedTrackerOptions())
        tracker.start(clip.frames[0], clip.q[0])
        for t, delta_q in enumerate(clip.q.diff(dim=0)):
            step = tracker.step(clip.frames[t + 1], clip.dt, *(flow[t] for flow in clip.flows))
            if step.valid:
                found.append((step.delta_q - delta_q).abs() / step.covariance.diagonal().sqrt())
    if len(found) >= _MIN_SAMPLES:
        field.video_std_scale.copy_(_std_scale(torch.stack(found)))


def _regression_errors(field: LearnedField, pairs: _Pairs, motion: BidirectionalMotion | None) -> Float[Tensor, "B n"]:
    """Of guesses, in their standard deviations; from flow that was measured, if it was."""
    count, evaluation = len(pairs.delta_q), pairs.evaluation
    flows = (
        matched_flows(estimate_step(field, evaluation[:count], evaluation[count:], refinement_stages=()))
        if motion is None
        else motion.regression_inputs()
    )
    step, std = field.regress_step(evaluation.features[:count], evaluation.features[count:], flows)
    return (step - pairs.delta_q).abs() / std


def _select_step_regression(field: LearnedField, batches: Sequence[_Pairs]) -> None:
    """See whether guesses help. Their errors and those of steps have much in common, which widens both."""
    alone = _evaluate_steps(field, batches)[0]
    field.use_step_regression.fill_(True)
    error, deviations = _evaluate_steps(field, batches)
    field.use_step_regression.fill_(error < alone)
    for std_scale in (field.step_std_scale, field.flow_std_scale, field.regression_std_scale) if error < alone else ():
        std_scale.mul_(_std_scale(deviations))


def _evaluate_steps(field: LearnedField, batches: Sequence[_Pairs]) -> tuple[float, Float[Tensor, "N n"]]:
    """Mean error of the steps [typical steps], and errors of what was measured in their standard deviations, NaN for joints
    that a pair does not show."""
    errors, deviations = [], []
    for pairs in batches:
        found = estimate_pair_steps(field, pairs.evaluation, *pairs.flows)
        errors.append((found.steps[-1] - pairs.delta_q) / field.delta_std)
        std = found.solution.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        error = (found.solution.delta_q - pairs.delta_q).abs()
        deviations.append(torch.where(found.solution.observable, error / std, torch.nan))
    return float(torch.cat(errors).abs().mean()), torch.cat(deviations)


def _std_scale(deviation: Float[Tensor, "N n"]) -> Float[Tensor, " n"]:
    """Factor per joint; NaN is left out. A joint that was hardly ever seen gets what is usual of the others."""
    quantiles = torch.tensor([0.6827, 0.95], dtype=deviation.dtype, device=deviation.device)
    found = deviation.nanquantile(quantiles, dim=0) / torch.tensor([[1.0], [1.96]]).to(deviation)
    scale = found.log().mean(0).exp().clamp(1e-3, 1e3)
    enough = deviation.isfinite().sum(0) >= min(_MIN_SAMPLES, len(deviation))
    typical = scale[enough].log().mean().exp() if bool(enough.any()) else torch.ones_like(scale[0])
    return torch.where(enough, scale, typical)
