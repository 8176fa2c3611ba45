"""A joint step between two pictures by a learned field: match, solve, then compare brightness around the solution.

Both pictures have a field, so both directions are used: `J_first d = flow` and `-J_second d = flow_back`. The
second-order errors of the two linearisations cancel, which replaces re-linearising. The network's own matching begins;
closer looks are Gauss-Newton on the joint step over the brightness of the robot's pixels, from coarse to fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.estimation.dense_photometric import CellEquations
from jidm.estimation.kalman import Gaussian
from jidm.estimation.refinement import (
    REFINEMENT_STAGES,
    Crop,
    FieldEvaluation,
    FlowMeasurement,
    JacobianPredictor,
    PhotometricMeasurement,
    RefinementStage,
    measure_photometric,
    photometric_error,
)
from jidm.estimation.solver import NormalEquations, Solution, normal_equations, solve_normal_equations
from jidm.fields.free.config import FLOW_STRIDE
from jidm.flow.base import Flow, mask_invalid

RIDGE = 1e-4
"""Relative damping, the same in training and in decoding."""

_UNKNOWN_VARIANCE = 1e4  # variance of what nothing is known of [rad^2 or m^2]
_REGRESSION_GATE = 2.0  # standard deviations by which a guess may be off before it counts less
_MIN_MOTION = 0.1  # [px rms] a joint is observable if a typical step of it moves the picture by this much on its own


@dataclass(frozen=True, eq=False)
class StepEstimate:
    """A step and everything it was made of.

    Attributes:
        solution: what the last look measured, whatever was known before, and a guess where the field makes one; its residual [px rms] and `explained` are about
            brightness, that the pictures still differ by where the robot is seen, or about flow measured elsewhere.
        steps: (B, n) joint step after each look [rad or m], what was known before counted in.
        flow_measurements, photometric_measurements: what the first look saw and what closer ones did, each from first to second picture and back;
            flow measured elsewhere has a way back only where that was measured too.
    """

    solution: Solution
    steps: tuple[Float[Tensor, "b n"], ...]
    flow_measurements: tuple[FlowMeasurement, ...]
    photometric_measurements: tuple[tuple[PhotometricMeasurement, PhotometricMeasurement], ...] = ()

    @property
    def last_measurement(self) -> tuple[FlowMeasurement, ...] | tuple[PhotometricMeasurement, PhotometricMeasurement]:
        """The look that the solution comes from."""
        return self.photometric_measurements[-1] if self.photometric_measurements else self.flow_measurements


def estimate_step(
    field: JacobianPredictor, first: FieldEvaluation, second: FieldEvaluation, flow: Flow | None = None, backward_flow: Flow | None = None,
    *, prior: Gaussian | None = None, refinement_stages: Sequence[RefinementStage] = REFINEMENT_STAGES, unrolled: bool = False,
) -> StepEstimate:  # fmt: skip
    """The joint step from the first batch of pictures to the second, differentiable in fields, masks and matching.

    Args:
        flow: measured elsewhere, from first to second in the size of the pictures; the network looks itself if not given.
        backward_flow: likewise from second to first, where that was measured too.
        prior: what is known of the step before looking [rad or m]. Every look begins with the step that is most likely
            by it and the look before; the first closer one with its mean where by that the pictures look more alike.
        refinement_stages: the looks after the first, for a field that they help.
        unrolled: gradients run on through all looks; otherwise each is taken to begin where it happens to.

    A field that guesses well does so first, from the first look: its guess is a measurement beside every look's.
    """
    if not bool(field.use_refinement):
        refinement_stages = ()
    a, b = first.features, second.features
    if flow is not None:
        measured = (
            (_external_flow(flow, first),)
            if backward_flow is None
            else (_external_flow(flow, first), _external_flow(backward_flow, second))
        )
        solution = _solve(field, first, second, measured, field.flow_std_scale)
        solution = _fuse_regression(solution, _regress_step(field, first, second, measured))
        step = _apply_prior(solution.delta_q, solution, prior)
        return StepEstimate(_with_flow_residual(solution, first, measured[0]), (step,), measured)
    a, b = first.features, second.features
    forward, backward = field.correlation.correlate(a.coarse, b.coarse)
    initial = (
        FlowMeasurement(*field.correlation.initial_flow(forward, a.coarse)),
        FlowMeasurement(*field.correlation.initial_flow(backward, b.coarse)),
    )
    photometric = []
    regression = _regress_step(field, first, second, initial)
    solution = _fuse_regression(_solve(field, first, second, initial, field.step_std_scale), regression)
    steps = [_apply_prior(solution.delta_q, solution, prior)]
    crops = Crop.around_robot(first.mask), Crop.around_robot(second.mask)
    step = steps[0] if unrolled else steps[0].detach()
    if prior is not None and refinement_stages:
        prior_mean = prior.mean.to(step)
        step = torch.where(_fits_better(first, second, crops, prior_mean, step)[:, None], prior_mean, step)
    for stage in refinement_stages:
        measurement = measure_photometric(stage, first, second, crops[0], step)
        photometric.append((measurement, measure_photometric(stage, second, first, crops[1], -step)))
        solution = _solve(field, first, second, photometric[-1], field.step_std_scale)
        solution = _fuse_regression(replace(solution, delta_q=step + solution.delta_q), regression)
        steps.append(_apply_prior(solution.delta_q, solution, prior))
        step = steps[-1] if unrolled else steps[-1].detach()
    if refinement_stages:
        solution = _with_photometric_residual(solution, first, second, crops[0])
    else:
        solution = _with_flow_residual(solution, first, initial[0])
    return StepEstimate(solution, tuple(steps), initial, tuple(photometric))


def step_prior(field: JacobianPredictor, count: int) -> Gaussian:
    """What is known of `count` steps before anything is seen: how large those of the training were, and which joints
    moved together."""
    std = field.delta_std
    covariance = std[:, None] * field.delta_correlation.to(std) * std
    return Gaussian(std.new_zeros(count, len(std)), covariance.expand(count, -1, -1))


def _regress_step(
    field: JacobianPredictor, first: FieldEvaluation, second: FieldEvaluation, measurements: Sequence[FlowMeasurement]
) -> Gaussian | None:
    """The step that the field guesses from what was matched; None if it does not."""
    if not bool(field.use_step_regression):
        return None
    mean, std = field.regress_step(first.features, second.features, [(x.flow, x.log_weight) for x in measurements])
    return Gaussian(mean, torch.diag_embed(std.square()))


def _fuse_regression(solution: Solution, regression: Gaussian | None) -> Solution:
    """What was measured together with a guess, each counting by its covariance.

    A guess that contradicts the measurement by more than both allow counts that much less: then the robot does what it did
    not do in training, and measuring is what a field is for.
    """
    if regression is None:
        return solution
    solved, nothing = solution.valid[:, None], torch.zeros_like(solution.delta_q)
    identity = torch.eye(nothing.shape[-1]).to(nothing)
    measured = Gaussian(
        torch.where(solved, solution.delta_q, nothing),
        torch.where(solved[..., None], finite_covariance(solution.covariance), identity),
    )
    innovation = (measured.mean - regression.mean)[..., None]
    normalized_distance = (innovation.mT @ torch.linalg.solve(measured.covariance + regression.covariance, innovation))[
        :, 0
    ] / len(identity)
    gated = Gaussian(
        regression.mean, regression.covariance * (normalized_distance / _REGRESSION_GATE**2).clamp(min=1.0)[..., None]
    )
    fused = measured.condition(gated)
    return replace(
        solution,
        delta_q=torch.where(solved, fused.mean, solution.delta_q),
        covariance=torch.where(solved[..., None], fused.covariance, solution.covariance),
    )


def _apply_prior(step: Float[Tensor, "b n"], solution: Solution, prior: Gaussian | None) -> Float[Tensor, "b n"]:
    """The step once what was known before is counted in; items that were not solved stay as they are."""
    if prior is None:
        return step
    solved = solution.valid[:, None]
    identity = torch.eye(step.shape[-1]).to(step)
    covariance = torch.where(solved[..., None], finite_covariance(solution.covariance), identity)
    return torch.where(solved, prior.condition(Gaussian(torch.where(solved, step, 0), covariance)).mean.to(step), step)


def finite_covariance(covariance: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """A covariance of finite numbers: what is not known at all is known very badly."""
    return covariance.nan_to_num(posinf=_UNKNOWN_VARIANCE).clamp(-_UNKNOWN_VARIANCE, _UNKNOWN_VARIANCE)


@torch.no_grad()
def _fits_better(
    first: FieldEvaluation,
    second: FieldEvaluation,
    crops: tuple[Crop, Crop],
    one: Float[Tensor, "b n"],
    other: Float[Tensor, "b n"],
) -> Bool[Tensor, " b"]:
    """Whether the robot looks more alike in both pictures by one step than by the other, item by item."""

    def error(x: Tensor) -> Tensor:
        return photometric_error(first, second, crops[0], x)[0] + photometric_error(second, first, crops[1], -x)[0]

    return error(one) < error(other)


def estimate_pair_steps(
    field: JacobianPredictor, evaluation: FieldEvaluation, *flows: Flow, unrolled: bool = False
) -> StepEstimate:
    """Steps of pairs of unrelated pictures, all first ones and then all second ones; by flow there and back, if given."""
    count = len(evaluation.mask) // 2
    return estimate_step(
        field, evaluation[:count], evaluation[count:], *flows, prior=step_prior(field, count), unrolled=unrolled
    )


@torch.no_grad()
def predict_steps(
    field: JacobianPredictor, first: Float[Tensor, "b 3 H W"], second: Float[Tensor, "b 3 H W"]
) -> Tensor:
    """(b, n) joint steps of unrelated pairs of pictures [rad or m], the field bent by the poses the pictures show."""
    features = field.encode(torch.cat([first, second]))
    return estimate_pair_steps(field, FieldEvaluation.of(field, features, field.predict_pose(features)[0])).steps[-1]


def _solve(
    field: JacobianPredictor,
    first: FieldEvaluation,
    second: FieldEvaluation,
    measurements: Sequence[FlowMeasurement | PhotometricMeasurement],
    std_scale: Float[Tensor, " n"],
) -> Solution:
    """What the looks say of the step, counted from their guess; `std_scale` times less surely than they think."""
    equations = _equations(first, measurements[0], 1.0)
    for backward in measurements[1:]:
        equations = equations + _equations(second, backward, -1.0)
    solution = solve_normal_equations(equations, ridge=RIDGE, joint_scale=field.delta_std, min_motion=_MIN_MOTION)
    std_scale = std_scale.to(solution.covariance)
    return replace(solution, covariance=solution.covariance * std_scale[:, None] * std_scale)


def _equations(
    evaluation: FieldEvaluation, measurement: FlowMeasurement | PhotometricMeasurement, sign: float
) -> NormalEquations:
    if isinstance(measurement, PhotometricMeasurement):
        robot = measurement.crop.apply(evaluation.mask).sigmoid()
        return _photometric_equations(sign * measurement.crop.apply(evaluation.jacobian), robot, measurement.equations)
    jacobian, robot = evaluation.on_flow_grid
    return normal_equations(sign * jacobian, measurement.flow, measurement.log_weight.exp() * robot, layout="dense")


def _photometric_equations(
    jacobian: Float[Tensor, "b 2 n h w"], robot: Float[Tensor, "b h w"], cells: CellEquations
) -> NormalEquations:  # fmt: skip
    """Gauss-Newton on the joint step."""
    J = jacobian.flatten(-2)
    HJ = torch.einsum("bcdp,bdnp->bcnp", cells.hessian.flatten(-2), J)
    count = robot.flatten(1).sum(-1)
    return NormalEquations(
        H=J.movedim(2, 1).flatten(2) @ HJ.movedim(2, 1).flatten(2).mT,
        g=-torch.einsum("bcnp,bcp->bn", J, cells.gradient.flatten(-2)),
        cost=cells.cost.flatten(1).sum(-1),
        total_weight=count,
        num_observations=count,
    )


def _with_flow_residual(solution: Solution, first: FieldEvaluation, measurement: FlowMeasurement) -> Solution:
    """The solution with residual and explained share of the forward flow on the robot."""
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
    """The solution with what is left of the difference between the pictures, as motion along the brightness' slope."""
    step = solution.delta_q.detach()
    (error, gradient), (initial_error, _) = (
        photometric_error(first, second, crop, x) for x in (step, torch.zeros_like(step))
    )
    gradient = gradient.clamp(min=1e-12)
    return _with_residual(solution, error / gradient, initial_error / gradient)


def _with_residual(
    solution: Solution, residual_square: Float[Tensor, " b"], motion_square: Float[Tensor, " b"]
) -> Solution:
    """The solution with how much of a mean squared motion [px^2] it leaves."""
    explained_fraction = (1 - residual_square / motion_square.clamp(min=1e-12)).clamp(0, 1)
    # An item withdrawn for a NaN or an infinity says nothing rather than those.
    nothing, valid = torch.zeros_like(residual_square), solution.valid
    residual = torch.where(valid, residual_square.clamp(min=1e-12).sqrt(), nothing)
    return replace(solution, residual=residual, explained_fraction=torch.where(valid, explained_fraction, nothing))


def _external_flow(flow: Flow, first: FieldEvaluation) -> FlowMeasurement:
    """Flow from elsewhere on the grid of flow."""
    _, like = first.on_flow_grid
    b, h, w = like.shape
    resized = mask_invalid(flow.flow, flow.weight).resized(h, w)  # a NaN would spread even from where nothing counts
    vectors = (resized.flow * FLOW_STRIDE).reshape(b, 2, h, w).to(like)
    weight = resized.weight.reshape(b, h, w).to(like)
    return FlowMeasurement(vectors, weight.log())
