"""The joint step between two images by a learned field: least squares on matched flow, then direct alignment.

The network's matching or external flow gives a first estimate; Gauss-Newton on the brightness of the robot's pixels refines it
from coarse to fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.estimation.factors.learned import ImageAlignmentFactor, MatchedFlowFactor
from jidm.estimation.kalman import Gaussian
from jidm.estimation.problem import NormalEquations, add_up
from jidm.estimation.refinement import (
    REFINEMENT_STAGES,
    Crop,
    FieldEvaluation,
    FlowMeasurement,
    JacobianPredictor,
    PhotometricMeasurement,
    RefinementStage,
    photometric_error,
)
from jidm.estimation.solver import Solution, solve_normal_equations
from jidm.fields.free.config import FIELD_STRIDE, FLOW_STRIDE
from jidm.flow.base import Flow, mask_invalid

RIDGE = 1e-4
"""Relative damping of the solve, equal in training and decoding."""

_UNKNOWN_VARIANCE = 1e4  # [rad^2 or m^2] of joints that were not measured
_REGRESSION_GATE = 2.0  # standard deviations beyond which the covariance of a regressed step is inflated
_MIN_MOTION = (
    0.1  # [px rms] image motion that a typical step of an observable joint causes, see `solve_normal_equations`
)


@dataclass(frozen=True, eq=False)
class StepEstimate:
    """A step with all measurements that it was estimated from.

    Attributes:
        solution: of the last measurement without the prior, fused with the regressed step where the field has one. Its
            residual [px rms] and explained fraction are those of the flow, or of the brightness error on the robot converted
            to image motion.
        steps: (B, n) joint step after each measurement, with the prior [rad or m].
        flow_measurements: from the first image to the second, and back where there is backward flow.
        photometric_measurements: of each refinement stage, in both directions.
    """

    solution: Solution
    steps: tuple[Float[Tensor, "b n"], ...]
    flow_measurements: tuple[FlowMeasurement, ...]
    photometric_measurements: tuple[tuple[PhotometricMeasurement, PhotometricMeasurement], ...] = ()

    @property
    def last_measurement(self) -> tuple[FlowMeasurement, ...] | tuple[PhotometricMeasurement, PhotometricMeasurement]:
        """The measurement of the solution."""
        return self.photometric_measurements[-1] if self.photometric_measurements else self.flow_measurements


def estimate_step(
    field: JacobianPredictor, first: FieldEvaluation, second: FieldEvaluation, flow: Flow | None = None,
    backward_flow: Flow | None = None, *, prior: Gaussian | None = None,
    refinement_stages: Sequence[RefinementStage] = REFINEMENT_STAGES, unrolled: bool = False,
) -> StepEstimate:  # fmt: skip
    """The joint step from the first batch of images to the second, differentiable in fields, masks and matching.

    With a step regressor, the step is also regressed from the flow and fused with every measurement.

    Args:
        field: the network.
        first, second: the images with the field at their joint positions.
        flow: external flow from first to second, of any resolution [px]; replaces matching and refinement.
        backward_flow: external flow from second to first.
        prior: of the step [rad or m]. Each stage starts at the posterior mean of the stage before; the first refinement
            stage starts at the prior's mean where the images agree better there.
        refinement_stages: of the alignment, for fields that it improves (`use_refinement`).
        unrolled: whether gradients flow through all stages; otherwise the start of each stage is a constant.
    """
    if flow is not None:
        given = [_external_flow(flow, first)]
        if backward_flow is not None:
            given.append(_external_flow(backward_flow, second))
        solution = _solve(field, _flow_equations(first, second, given), field.flow_std_scale)
        solution = _fuse_regression(solution, _regress_step(field, first, second, given))
        step = _apply_prior(solution.delta_q, solution, prior)
        return StepEstimate(_with_flow_residual(solution, first, given[0]), (step,), tuple(given))
    matched = _match(field, first, second)
    regression = _regress_step(field, first, second, matched)
    solution = _solve(field, _flow_equations(first, second, matched), field.step_std_scale)
    solution = _fuse_regression(solution, regression)
    steps = [_apply_prior(solution.delta_q, solution, prior)]
    if not bool(field.use_refinement) or not refinement_stages:
        return StepEstimate(_with_flow_residual(solution, first, matched[0]), tuple(steps), matched)
    crops = Crop.around_robot(first.mask), Crop.around_robot(second.mask)
    step = steps[0] if unrolled else steps[0].detach()
    if prior is not None:
        mean = prior.mean.to(step)
        step = torch.where(_fits_better(first, second, crops, mean, step)[:, None], mean, step)
    photometric = []
    for stage in refinement_stages:
        forward = ImageAlignmentFactor(first, second, crops[0], stage)
        backward = ImageAlignmentFactor(second, first, crops[1], stage, sign=-1.0)
        measured = forward.measure(step), backward.measure(step)
        photometric.append(measured)
        equations = forward.equations(measured[0]) + backward.equations(measured[1])
        solution = _solve(field, equations, field.step_std_scale)
        solution = _fuse_regression(replace(solution, delta_q=step + solution.delta_q), regression)
        steps.append(_apply_prior(solution.delta_q, solution, prior))
        step = steps[-1] if unrolled else steps[-1].detach()
    solution = _with_photometric_residual(solution, first, second, crops[0])
    return StepEstimate(solution, tuple(steps), matched, tuple(photometric))


def estimate_pair_steps(
    field: JacobianPredictor, evaluation: FieldEvaluation, *flows: Flow, unrolled: bool = False
) -> StepEstimate:
    """Steps of unrelated pairs of images, with the prior of the training steps.

    Args:
        field: the network.
        evaluation: of all first images, then all second ones.
        flows: external flow, forward and optionally backward.
        unrolled: as for `estimate_step`.
    """
    count = len(evaluation.mask) // 2
    return estimate_step(
        field, evaluation[:count], evaluation[count:], *flows, prior=step_prior(field, count), unrolled=unrolled
    )


@torch.no_grad()
def predict_steps(
    field: JacobianPredictor, first: Float[Tensor, "b 3 H W"], second: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, "b n"]:
    """Joint steps of unrelated pairs of images [rad or m], with the field at the poses predicted from them."""
    features = field.encode(torch.cat([first, second]))
    return estimate_pair_steps(field, FieldEvaluation.of(field, features, field.predict_pose(features)[0])).steps[-1]


def step_prior(field: JacobianPredictor, count: int) -> Gaussian:
    """Prior of `count` steps: zero mean and the covariance of the training steps."""
    std = field.delta_std
    covariance = std[:, None] * field.delta_correlation.to(std) * std
    return Gaussian(std.new_zeros(count, len(std)), covariance.expand(count, -1, -1))


def finite_covariance(covariance: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The covariance with large finite numbers in place of infinite ones."""
    return covariance.nan_to_num(posinf=_UNKNOWN_VARIANCE).clamp(-_UNKNOWN_VARIANCE, _UNKNOWN_VARIANCE)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _match(
    field: JacobianPredictor, first: FieldEvaluation, second: FieldEvaluation
) -> tuple[FlowMeasurement, FlowMeasurement]:
    """Flow by the network's matching, in both directions."""
    a, b = first.features.coarse, second.features.coarse
    forward, backward = field.correlation.correlate(a, b)
    return (
        FlowMeasurement(*field.correlation.initial_flow(forward, a)),
        FlowMeasurement(*field.correlation.initial_flow(backward, b)),
    )


def _flow_equations(
    first: FieldEvaluation, second: FieldEvaluation, measurements: Sequence[FlowMeasurement]
) -> NormalEquations:
    factors = [MatchedFlowFactor(first, measurements[0])]
    factors += [MatchedFlowFactor(second, x, sign=-1.0) for x in measurements[1:]]
    return add_up([x.linearize({}) for x in factors])


def _solve(field: JacobianPredictor, equations: NormalEquations, std_scale: Float[Tensor, " n"]) -> Solution:
    """The step from the linearization point; `std_scale` is the calibrated factor on standard deviations."""
    solution = solve_normal_equations(equations, ridge=RIDGE, joint_scale=field.delta_std, min_motion=_MIN_MOTION)
    std_scale = std_scale.to(solution.covariance)
    return replace(solution, covariance=solution.covariance * std_scale[:, None] * std_scale)


def _regress_step(
    field: JacobianPredictor, first: FieldEvaluation, second: FieldEvaluation, measurements: Sequence[FlowMeasurement]
) -> Gaussian | None:
    """The step regressed from flow; None if the field does not use a regressor."""
    if not bool(field.use_step_regression):
        return None
    mean, std = field.regress_step(first.features, second.features, [(x.flow, x.log_weight) for x in measurements])
    return Gaussian(mean, torch.diag_embed(std.square()))


def _fuse_regression(solution: Solution, regression: Gaussian | None) -> Solution:
    """The measured step conditioned on the regressed one.

    The covariance of a regressed step that contradicts the measurement is inflated, since the motion is then unlike those in
    training.
    """
    if regression is None:
        return solution
    solved, zero = solution.valid[:, None], torch.zeros_like(solution.delta_q)
    identity = torch.eye(zero.shape[-1]).to(zero)
    measured = Gaussian(
        torch.where(solved, solution.delta_q, zero),
        torch.where(solved[..., None], finite_covariance(solution.covariance), identity),
    )
    error = (measured.mean - regression.mean)[..., None]
    mahalanobis = (error.mT @ torch.linalg.solve(measured.covariance + regression.covariance, error))[:, 0]
    inflation = (mahalanobis / len(identity) / _REGRESSION_GATE**2).clamp(min=1.0)
    fused = measured.condition(Gaussian(regression.mean, regression.covariance * inflation[..., None]))
    return replace(
        solution,
        delta_q=torch.where(solved, fused.mean, solution.delta_q),
        covariance=torch.where(solved[..., None], fused.covariance, solution.covariance),
    )


def _apply_prior(step: Float[Tensor, "b n"], solution: Solution, prior: Gaussian | None) -> Float[Tensor, "b n"]:
    """The posterior mean given the prior; items that were not solved are unchanged."""
    if prior is None:
        return step
    solved = solution.valid[:, None]
    identity = torch.eye(step.shape[-1]).to(step)
    covariance = torch.where(solved[..., None], finite_covariance(solution.covariance), identity)
    return torch.where(solved, prior.condition(Gaussian(torch.where(solved, step, 0), covariance)).mean.to(step), step)


@torch.no_grad()
def _fits_better(
    first: FieldEvaluation, second: FieldEvaluation, crops: tuple[Crop, Crop], one: Float[Tensor, "b n"],
    other: Float[Tensor, "b n"],
) -> Bool[Tensor, " b"]:  # fmt: skip
    """Whether the brightness error on the robot is smaller for one step than for the other, per item."""

    def error(x: Tensor) -> Tensor:
        return photometric_error(first, second, crops[0], x)[0] + photometric_error(second, first, crops[1], -x)[0]

    return error(one) < error(other)


def _with_flow_residual(solution: Solution, first: FieldEvaluation, measurement: FlowMeasurement) -> Solution:
    """The solution with residual and explained fraction of the forward flow."""
    jacobian, robot = first.on_flow_grid
    weight = (measurement.log_weight.exp() * robot).detach()
    predicted = torch.einsum("bcnhw,bn->bchw", jacobian, solution.delta_q)
    total = weight.flatten(1).sum(-1).clamp(min=1e-12)
    residual = (weight * (measurement.flow - predicted).square().sum(1)).flatten(1).sum(-1) / total
    motion = (weight * measurement.flow.square().sum(1)).flatten(1).sum(-1) / total
    return _with_residual(solution, residual, motion)


def _with_photometric_residual(
    solution: Solution, first: FieldEvaluation, second: FieldEvaluation, crop: Crop
) -> Solution:
    """The solution with the brightness error as residual, converted to image motion by the mean brightness gradient."""
    step = solution.delta_q.detach()
    (error, gradient), (initial_error, _) = (
        photometric_error(first, second, crop, x) for x in (step, torch.zeros_like(step))
    )
    gradient = gradient.clamp(min=1e-12)
    return _with_residual(solution, error / gradient, initial_error / gradient)


def _with_residual(
    solution: Solution, residual_square: Float[Tensor, " b"], motion_square: Float[Tensor, " b"]
) -> Solution:
    """The solution with a mean square residual and a mean square motion [px^2]."""
    explained_fraction = (1 - residual_square / motion_square.clamp(min=1e-12)).clamp(0, 1)
    # Zero rather than NaN for items that are not valid.
    zero, valid = torch.zeros_like(residual_square), solution.valid
    residual = torch.where(valid, residual_square.clamp(min=1e-12).sqrt(), zero)
    return replace(solution, residual=residual, explained_fraction=torch.where(valid, explained_fraction, zero))


def _external_flow(flow: Flow, first: FieldEvaluation) -> FlowMeasurement:
    """External flow on the grid of flow."""
    b, (h, w) = len(first.mask), (side * FIELD_STRIDE // FLOW_STRIDE for side in first.mask.shape[1:])
    resized = mask_invalid(flow.flow, flow.weight).resized(h, w)  # resizing would spread NaN of zero weight
    vectors = (resized.flow * FLOW_STRIDE).reshape(b, 2, h, w).to(first.mask)
    weight = resized.weight.reshape(b, h, w).to(first.mask)
    return FlowMeasurement(vectors, weight.log())
