"""The joint step between two images by a learned field: accuracy, symmetries, external flow, regression, gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from step_fields import (
    GRID,
    SIDE,
    ExactStepField,
    LinearMotion,
    TwoPivots,
    ZeroFlowHead,
    numbered_frames,
    random_images,
    untrained,
)
from torch import Tensor
from torch.nn import functional as F

from jidm.estimation.kalman import Gaussian
from jidm.estimation.refinement import (
    REFINEMENT_STAGES,
    Crop,
    FieldEvaluation,
    JacobianPredictor,
    RefinementStage,
    measured_flow,
    photometric_error,
)
from jidm.estimation.step_estimation import StepEstimate, estimate_step, predict_steps, step_prior
from jidm.fields.free import LearnedField
from jidm.fields.free.blocks import downsample, luma
from jidm.flow import Flow
from jidm.video.warping import symmetric_flow


def weak_prior(mean: Tensor, std: float = 10.0) -> Gaussian:
    """A prior so wide that it only gives the start of the refinement."""
    return Gaussian(mean, std**2 * torch.eye(mean.shape[-1]).to(mean).expand(*mean.shape, -1))


def exact_step(field: ExactStepField, q: Tensor, q_next: Tensor, **options: object) -> StepEstimate:
    features = field.encode(numbered_frames(torch.stack([q, q_next])))
    at = FieldEvaluation.of(field, features, torch.stack([q, q_next]))
    return estimate_step(field, at[:1], at[1:], **{"refinement_stages": (), **options})  # type: ignore[arg-type]


def step_between(
    field: LearnedField, first: Tensor, second: Tensor, q: Tensor, q_next: Tensor, **options: object
) -> StepEstimate:
    features = field.encode(torch.cat([first, second]))
    at = FieldEvaluation.of(field, features, torch.cat([q, q_next]))
    return estimate_step(field, at[: len(first)], at[len(first) :], **options)  # type: ignore[arg-type]


# ---- accuracy --------------------------------------------------------------------------------------------------------


def test_exact_flow_through_a_fixed_field_gives_the_exact_step() -> None:
    field = ExactStepField(LinearMotion())
    q, step = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.12, -0.07]).double()
    found = exact_step(field, q, q + step)
    assert len(found.steps) == 1 and not found.photometric_measurements
    # The ridge shortens the step a little.
    torch.testing.assert_close(found.steps[0][0], step, rtol=0, atol=2e-4 * float(step.norm()))
    assert torch.equal(found.solution.delta_q, found.steps[-1])
    assert float(found.solution.explained_fraction) > 1 - 1e-6 and float(found.solution.residual) < 1e-2
    assert found.solution.observable.all() and found.solution.valid.all()


def errors_of_halved_steps(bidirectional: bool) -> list[float]:
    field = ExactStepField(TwoPivots())
    field.correlation.bidirectional = bidirectional
    q, step = torch.tensor([0.2, 0.5]).double(), torch.tensor([0.16, 0.12]).double()
    errors = []
    for scale in (1.0, 0.5, 0.25):
        found = exact_step(field, q, q + scale * step)
        errors.append(float((found.steps[-1][0] - scale * step).norm()))
    return errors


def test_the_error_of_both_directions_together_is_of_third_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jidm.estimation.step_estimation.RIDGE", 1e-9)  # its effect is of first order
    one, half, quarter = errors_of_halved_steps(True)
    assert 7 < one / half < 9 and 7 < half / quarter < 9
    alone = errors_of_halved_steps(False)
    assert 3.5 < alone[0] / alone[1] < 4.5 and 3.5 < alone[1] / alone[2] < 4.5
    assert one < 0.2 * alone[0]


class Rendered(ExactStepField):
    """Rendered images of the disc; matching measures zero flow, so that only brightness determines the step."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__(TwoPivots())
        self.correlation = ZeroFlowHead()
        self.scale = scale

    def evaluated(self, q: Tensor, q_next: Tensor) -> tuple[FieldEvaluation, FieldEvaluation]:
        poses = torch.stack([q, q_next]).double()
        image = torch.stack([self.motion_model.render(one, self.scale) for one in poses])
        features = replace(self.encode(image), gray_downsampled=downsample(luma(image), self.scale))
        at = FieldEvaluation.of(self, features, poses)
        return at[:1], at[1:]

    def between(self, q: Tensor, q_next: Tensor, **options: object) -> StepEstimate:
        return estimate_step(self, *self.evaluated(q, q_next), **options)  # type: ignore[arg-type]


Q, STEP = torch.tensor([0.2, 0.5]).double(), torch.tensor([0.16, 0.12]).double()


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_refinement_finds_the_step_where_matching_measures_zero(scale: int) -> None:
    field = Rendered(scale)
    found = field.between(Q, Q + STEP)
    assert len(found.steps) == 1 + len(found.photometric_measurements) == 1 + len(REFINEMENT_STAGES)
    assert not found.steps[0].any()
    error = (found.steps[-1][0] - STEP).norm() / STEP.norm()
    assert error < 0.02 and torch.equal(found.solution.delta_q, found.steps[-1])
    assert found.solution.valid.all() and found.solution.observable.all()
    assert float(found.solution.explained_fraction) > 0.99


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_the_residual_is_the_brightness_error_as_image_motion(scale: int) -> None:
    """A zero step explains nothing, and its residual is about the size of the motion."""
    field = Rendered(scale)
    found, (first, second) = field.between(Q, Q + STEP).solution, field.evaluated(Q, Q + STEP)
    crop = Crop.around_robot(first.mask)

    error, gradient = photometric_error(first, second, crop, found.delta_q)
    initial, _ = photometric_error(first, second, crop, torch.zeros(1, 2).double())
    torch.testing.assert_close(found.residual, (error / gradient).sqrt())
    torch.testing.assert_close(found.explained_fraction, 1 - error / initial)
    robot = field.motion_model.robot_probability(Q[None])
    motion = (field.motion_model.flow(Q[None], Q[None] + STEP) * robot[:, None]).norm() / robot.sum().sqrt()
    assert 0.3 < float((initial / gradient).sqrt() / motion) < 1.2


def test_each_stage_starts_at_the_step_of_the_one_before_and_reduces_the_error() -> None:
    found = Rendered(2).between(Q, Q + STEP)
    errors = [float((step[0] - STEP).norm()) for step in found.steps]
    assert errors[1] < errors[0] and errors[3] < 0.5 * errors[1] and errors[-1] < 0.1 * errors[1]
    field = Rendered(2)
    for step, (forward, backward) in zip(found.steps, found.photometric_measurements, strict=False):
        one, two = (
            torch.einsum("cnhw,n->chw", field.motion_model.jacobian(x[None])[0], step[0]) for x in (Q, Q + STEP)
        )
        torch.testing.assert_close(forward.flow, forward.crop.apply(symmetric_flow(one[None], two[None], 2)))
        torch.testing.assert_close(backward.flow, backward.crop.apply(symmetric_flow(-two[None], -one[None], 2)))


def test_the_flow_of_a_step_follows_the_curved_path() -> None:
    """Stages start from the symmetric flow of the last step, exact to third order; `J delta_q` is not."""
    field, errors = Rendered(), []
    for scale in (1.0, 0.5):
        step = scale * STEP
        # The prior makes the first stage start at the true step.
        measured = field.between(Q, Q + step, prior=weak_prior(step[None])).photometric_measurements[0][0]
        flow = measured.crop.apply(field.motion_model.flow(Q[None], Q[None] + step))
        robot = measured.crop.apply(field.motion_model.robot_probability(Q[None])[:, None])
        straight = measured.crop.apply(torch.einsum("cnhw,n->chw", field.motion_model.jacobian(Q[None])[0], step))
        errors.append(float(((measured.flow - flow) * robot).norm()))
        assert errors[-1] < 0.15 * float(((straight - flow) * robot).norm())
    assert errors[0] / errors[1] > 5


def test_a_predicted_step_is_the_start_only_where_the_images_agree_better_there() -> None:
    far = torch.tensor([-0.8, -0.8]).double()
    right, wrong = ((sign * far + torch.tensor([0.02, -0.03]).double())[None] for sign in (1, -1))
    fine = (RefinementStage(None, 0.05),) * 3  # these alone do not converge from zero
    lost, found, misled = (
        Rendered(2).between(Q, Q + far, prior=None if x is None else weak_prior(x), refinement_stages=fine).steps[-1][0]
        for x in (None, right, wrong)
    )
    assert (lost - far).norm() > 0.3 * far.norm()
    assert (found - far).norm() < 0.2 * far.norm()
    torch.testing.assert_close(misled, lost, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1, 2])
def test_measured_flow_is_that_of_the_robots_pixels(scale: int) -> None:
    field = Rendered(scale)
    found = field.between(Q, Q + STEP)
    near = field.between(
        Q, Q + STEP, prior=weak_prior(0.9 * STEP[None]), refinement_stages=(RefinementStage(None, 0.05),)
    )
    flow, robot = field.motion_model.flow(Q[None], Q[None] + STEP), field.motion_model.robot_probability(Q[None])
    for estimate in (found, near):  # the second one starts a little off, which the cells' equations correct
        measured, weight = measured_flow(estimate.photometric_measurements[-1][0], (GRID, GRID))
        on = robot[0] > 0.3
        assert weight[0][on].mean() > 0.2 and weight.max() <= 1
        assert (measured - flow)[0][:, on].norm(dim=0).mean() < 0.1 * flow[0][:, on].norm(dim=0).mean()
        assert not measured[0][:, robot[0] < 1e-4].any() and not weight[0][robot[0] < 1e-4].any()
    first, weight = measured_flow(found.flow_measurements[0], (GRID, GRID))
    assert first.shape[-2:] == weight.shape[-2:] == (GRID, GRID) and weight.max() == 1
    torch.testing.assert_close(downsample(first, 2), found.flow_measurements[0].flow, rtol=0, atol=1e-6)


def test_cropping_to_the_robot_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cropped = Rendered(2).between(Q, Q + STEP)
    crop = cropped.photometric_measurements[-1][0].crop
    assert 12 <= crop.bottom - crop.top < GRID and 12 <= crop.right - crop.left < GRID
    whole = Crop(0, GRID, 0, GRID)
    monkeypatch.setattr(Crop, "around_robot", lambda mask: whole)
    full = Rendered(2).between(Q, Q + STEP)
    for one, other in zip(cropped.steps, full.steps, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    torch.testing.assert_close(cropped.solution.covariance, full.solution.covariance)
    torch.testing.assert_close(cropped.solution.residual, full.solution.residual)


def test_pixels_outside_the_mask_have_no_influence() -> None:
    field, poses = Rendered(), torch.stack([Q, Q + STEP])
    image = torch.stack([field.motion_model.render(one) for one in poses])
    at = FieldEvaluation.of(field, field.encode(image), poses)
    empty = FieldEvaluation(at.features, at.jacobian, torch.full_like(at.mask, -torch.inf))
    assert not estimate_step(field, empty[:1], empty[1:]).solution.valid.any()
    image[1, :, :24] = 1.0  # a white object appears outside the mask
    outside = (torch.arange(GRID) < 14)[:, None].expand(GRID, GRID)
    masked = FieldEvaluation(field.encode(image), at.jacobian, at.mask.masked_fill(outside, -torch.inf))
    found = estimate_step(field, masked[:1], masked[1:]).steps[-1][0]
    assert (found - STEP).norm() < 0.05 * STEP.norm()


def test_static_background_inside_the_mask_biases_the_step_less_if_it_is_rejected() -> None:
    field, poses = Rendered(2), torch.stack([Q, Q + STEP])
    image = torch.stack([field.motion_model.render(one, 2) for one in poses])
    at = FieldEvaluation.of(field, replace(field.encode(image), gray_downsampled=downsample(luma(image), 2)), poses)
    grown = F.max_pool2d(at.mask[:, None], 3, 1, 1)[:, 0].clamp(
        max=1.0
    )  # a cell too large on every side, and uncertain
    robot = torch.stack([field.motion_model.robot_probability(one[None])[0] > 0.5 for one in poses])
    texture = 0.3 * torch.rand(3, *image.shape[-2:], generator=torch.Generator().manual_seed(0)).double()
    background = ~F.interpolate(robot[:, None].double(), size=image.shape[-2:]).bool()
    image = torch.where(background, image + texture, image)
    at = FieldEvaluation(replace(field.encode(image), gray_downsampled=downsample(luma(image), 2)), at.jacobian, grown)
    errors = []
    for reject_static in (False, True):
        stages = (*REFINEMENT_STAGES[:-2], *(replace(x, reject_static=reject_static) for x in REFINEMENT_STAGES[-2:]))
        found = estimate_step(field, at[:1], at[1:], refinement_stages=stages).steps[-1][0]
        errors.append(float((found - STEP).norm() / STEP.norm()))
    assert errors[1] < 0.7 * errors[0], errors


# ---- symmetries ------------------------------------------------------------------------------------------------------


def test_swapping_the_images_negates_the_step_of_every_stage() -> None:
    field = untrained()
    image, q = random_images(4), 0.5 * torch.randn(4, 2)
    forwards = step_between(field, image[:2], image[2:], q[:2], q[2:])
    backwards = step_between(field, image[2:], image[:2], q[2:], q[:2])
    for one, other in zip(forwards.steps, backwards.steps, strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(one, -other, rtol=1e-3, atol=1e-5)


def test_pairs_of_a_batch_are_independent() -> None:
    field = untrained()
    image, q = random_images(6), 0.5 * torch.randn(6, 2)
    whole = step_between(field, image[:3], image[3:], q[:3], q[3:])
    for i in range(3):
        one = step_between(field, image[i : i + 1], image[i + 3 : i + 4], q[i : i + 1], q[i + 3 : i + 4])
        torch.testing.assert_close(one.solution.delta_q[0], whole.solution.delta_q[i], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one.solution.covariance[0], whole.solution.covariance[i], rtol=1e-2, atol=1e-8)
    pairs = predict_steps(field, image[:3], image[3:])
    assert pairs.shape == (3, 2) and not pairs.requires_grad
    torch.testing.assert_close(predict_steps(field, image[1:2], image[4:5])[0], pairs[1], rtol=1e-3, atol=1e-5)


def test_equal_images_give_a_zero_step() -> None:
    field = untrained()
    image, q = random_images(2), torch.zeros(2, 2)
    found = step_between(field, image, image, q, q)
    assert found.solution.delta_q.abs().max() < 1e-6


def test_a_corrupt_item_does_not_change_the_others() -> None:
    field = untrained()
    image, q = random_images(4), torch.zeros(4, 2)
    good = step_between(field, image[:2], image[2:], q[:2], q[2:]).solution
    q[1] = torch.nan
    bad = step_between(field, image[:2], image[2:], q[:2], q[2:]).solution
    torch.testing.assert_close(bad.delta_q[0], good.delta_q[0], rtol=1e-3, atol=1e-6)
    assert bad.valid.tolist() == [True, False]
    assert bad.delta_q.isfinite().all() and bad.residual.isfinite().all() and bad.explained_fraction.isfinite().all()


def test_std_scales_widen_the_covariance_joint_by_joint() -> None:
    field = untrained()
    image, q = random_images(2), torch.zeros(2, 2)
    narrow = step_between(field, image[:1], image[1:], q[:1], q[1:]).solution.covariance
    field.step_std_scale.copy_(torch.tensor([2.0, 5.0]))
    wide = step_between(field, image[:1], image[1:], q[:1], q[1:]).solution.covariance
    torch.testing.assert_close(wide / narrow, torch.tensor([[[4.0, 10.0], [10.0, 25.0]]]))


def test_the_step_prior_has_the_covariance_of_training() -> None:
    field = untrained(delta_correlation=((1.0, -0.8), (-0.8, 1.0)))
    field.delta_std.copy_(torch.tensor([0.1, 0.02]))
    prior = step_prior(field, 3)
    assert not prior.mean.any() and prior.mean.shape == (3, 2)
    torch.testing.assert_close(prior.covariance[2], torch.tensor([[0.01, -0.0016], [-0.0016, 0.0004]]))


def test_a_field_without_refinement_only_matches() -> None:
    field = untrained()
    image, q = random_images(2), torch.zeros(2, 2)
    estimate = partial(step_between, field, image[:1], image[1:], q[:1], q[1:])
    assert len(estimate().photometric_measurements) == len(REFINEMENT_STAGES)
    field.use_refinement.fill_(False)
    matched = estimate()
    assert not matched.photometric_measurements
    torch.testing.assert_close(matched.solution.delta_q, estimate(refinement_stages=()).solution.delta_q)


def test_learned_and_exact_fields_implement_the_protocol() -> None:
    assert isinstance(untrained(), JacobianPredictor) and isinstance(ExactStepField(LinearMotion()), JacobianPredictor)


# ---- external flow ---------------------------------------------------------------------------------------------------


def uniform_flow(value: float, count: int = 1) -> Flow:
    flow = torch.zeros(count, 2, SIDE, SIDE)
    flow[:, 0] = value
    return Flow(flow, torch.ones(count, SIDE, SIDE))


def test_external_flow_replaces_matching_and_refinement() -> None:
    field = ExactStepField(LinearMotion())
    field.correlation.drift = 7.0  # its own matching would be wrong
    q, step = torch.zeros(2).double(), torch.tensor([0.02, 0.01]).double()
    flow = torch.einsum("cn,n->c", field.motion_model.constant_jacobian[..., 0, 0], step)[None, :, None, None].expand(
        1, 2, SIDE, SIDE
    )
    found = exact_step(field, q, q + step, flow=Flow(flow, torch.ones(1, SIDE, SIDE).double()))
    torch.testing.assert_close(found.solution.delta_q[0], step, rtol=1e-3, atol=1e-6)
    assert len(found.steps) == 1
    assert len(found.flow_measurements) == 1  # there is no backward flow


def test_forward_and_backward_flow_are_solved_together() -> None:
    field = ExactStepField(LinearMotion())
    q, one, other = (torch.tensor(x).double() for x in ((0.0, 0.0), (0.02, 0.01), (0.04, -0.01)))
    forward, backward = (
        Flow(torch.einsum("cn,n->c", field.motion_model.constant_jacobian[..., 0, 0], x)[None, :, None, None].expand(1, 2, SIDE, SIDE),
             torch.ones(1, SIDE, SIDE).double())
        for x in (one, -other)
    )  # fmt: skip
    found = exact_step(field, q, q + one, flow=forward, backward_flow=backward)
    torch.testing.assert_close(found.solution.delta_q[0], (one + other) / 2, rtol=1e-3, atol=1e-6)
    assert len(found.flow_measurements) == 2
    alone = exact_step(field, q, q + one, flow=forward)
    variance = [x.solution.covariance.diagonal(dim1=-2, dim2=-1) for x in (alone, found)]
    assert (variance[1] != variance[0]).all()


def test_external_flow_has_its_own_std_scale() -> None:
    field, image, q = untrained(), random_images(2), torch.zeros(2, 2)
    between = partial(step_between, field, image[:1], image[1:], q[:1], q[1:])
    narrow = [between(**flow).solution.covariance for flow in ({}, {"flow": uniform_flow(3.0)})]
    field.flow_std_scale.copy_(torch.tensor([2.0, 5.0]))
    wide = [between(**flow).solution.covariance for flow in ({}, {"flow": uniform_flow(3.0)})]
    torch.testing.assert_close(wide[0], narrow[0])
    torch.testing.assert_close(wide[1] / narrow[1], torch.tensor([[[4.0, 10.0], [10.0, 25.0]]]))


def test_external_flow_is_in_pixels_of_the_image_at_any_resolution() -> None:
    field, image, q = untrained(), random_images(2), torch.zeros(2, 2)
    flow = uniform_flow(3.0)
    full = step_between(field, image[:1], image[1:], q[:1], q[1:], flow=flow)
    torch.testing.assert_close(full.flow_measurements[0].flow, flow.flow[..., ::4, ::4])
    twice = Flow(flow.flow.repeat_interleave(2, -1).repeat_interleave(2, -2) * 2, torch.ones(1, 128, 128))
    large = step_between(field, image[:1], image[1:], q[:1], q[1:], flow=twice)
    torch.testing.assert_close(large.solution.delta_q, full.solution.delta_q, rtol=1e-4, atol=1e-6)
    doubled = step_between(field, image[:1], image[1:], q[:1], q[1:], flow=uniform_flow(6.0))
    torch.testing.assert_close(doubled.solution.delta_q, 2 * full.solution.delta_q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [1e30, float("nan"), float("inf")])
def test_wild_flow_of_zero_weight_has_no_influence(value: float) -> None:
    field, image, q = untrained(), random_images(2), torch.zeros(2, 2)
    half = uniform_flow(3.0)
    half.weight[:, :, SIDE // 2 :] = 0
    expected = step_between(field, image[:1], image[1:], q[:1], q[1:], flow=half).solution
    wild = uniform_flow(3.0)
    wild.weight.copy_(half.weight)
    wild.flow[..., SIDE // 2 :] = value
    found = step_between(field, image[:1], image[1:], q[:1], q[1:], flow=wild).solution
    assert found.valid.all()
    torch.testing.assert_close(found.delta_q, expected.delta_q, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [1e30, float("nan"), -float("inf")])
def test_wild_flow_stays_finite(value: float) -> None:
    field, image, q = untrained(), random_images(4), torch.zeros(4, 2)
    flow = uniform_flow(3.0, 2)
    flow.flow[1, :, 20:30, 20:30] = value
    found = step_between(field, image[:2], image[2:], q[:2], q[2:], flow=flow).solution
    alone = step_between(field, image[:1], image[2:3], q[:1], q[2:3], flow=flow[:1]).solution
    for x in (found.delta_q, found.residual, found.explained_fraction):
        assert x.isfinite().all()
    torch.testing.assert_close(found.delta_q[0], alone.delta_q[0], rtol=1e-3, atol=1e-6)


def test_flow_without_any_weight_is_no_measurement() -> None:
    field, image, q = untrained(), random_images(2), torch.zeros(2, 2)
    without_weight = Flow(torch.zeros(1, 2, SIDE, SIDE), torch.zeros(1, SIDE, SIDE))
    found = step_between(field, image[:1], image[1:], q[:1], q[1:], flow=without_weight).solution
    assert not found.valid.any() and not found.observable.any()
    assert torch.equal(found.delta_q, torch.zeros(1, 2))


# ---- fusion with a regressed step ------------------------------------------------------------------------------------


def test_a_regressed_step_is_fused_by_its_covariance() -> None:
    field = ExactStepField(LinearMotion())
    field.correlation.noise = 0.5
    q, step = torch.zeros(2).double(), torch.tensor([0.02, 0.01]).double()
    alone = exact_step(field, q, q + step).solution
    std = alone.covariance[0].diagonal().sqrt()
    field.regressed_step = step + std * torch.tensor([1.0, -1.0]), std
    unused = exact_step(field, q, q + step).solution
    assert torch.equal(unused.delta_q, alone.delta_q)  # regression is not in use
    field.use_step_regression.fill_(True)
    both = exact_step(field, q, q + step)
    R, P = alone.covariance[0], torch.diag(std**2)
    expected = torch.linalg.inv(R.inverse() + P.inverse())
    mean = expected @ (R.inverse() @ alone.delta_q[0] + P.inverse() @ field.regressed_step[0])
    torch.testing.assert_close(both.solution.covariance[0], expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(both.solution.delta_q[0], mean, rtol=1e-5, atol=0)
    assert torch.equal(both.steps[-1], both.solution.delta_q)


def test_a_regressed_step_that_contradicts_the_measurement_has_little_influence() -> None:
    field = ExactStepField(LinearMotion())
    field.correlation.noise = 0.5
    q, step = torch.zeros(2).double(), torch.tensor([0.02, 0.01]).double()
    alone = exact_step(field, q, q + step).solution
    std = alone.covariance[0].diagonal().sqrt()
    field.use_step_regression.fill_(True)
    pulls = []
    for off in (1.0, 100.0, 1000.0):
        field.regressed_step = alone.delta_q[0] + off * std, std
        pulls.append(float(((exact_step(field, q, q + step).solution.delta_q - alone.delta_q) / std).abs().max()))
    assert pulls[0] == pytest.approx(0.5, rel=0.2) and pulls[2] < pulls[1] < 0.2


def test_regression_without_a_measurement_is_no_measurement() -> None:
    field, image, q = untrained(), random_images(2), torch.zeros(2, 2)
    field.use_step_regression.fill_(True)
    without_weight = Flow(torch.zeros(1, 2, SIDE, SIDE), torch.zeros(1, SIDE, SIDE))
    found = step_between(field, image[:1], image[1:], q[:1], q[1:], flow=without_weight).solution
    assert not found.valid.any() and torch.equal(found.delta_q, torch.zeros(1, 2))


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients_of_everything(field: LearnedField, mask_offset: float = 0.0) -> dict[str, Tensor | None]:
    """Gradients of the sum of all outputs."""
    image, q = random_images(4), 0.1 * torch.randn(4, 2)
    features = field.encode(image)
    pose, std = field.predict_pose(features)
    at = FieldEvaluation.of(field, features, q)
    at = FieldEvaluation(at.features, at.jacobian, at.mask + mask_offset)
    found = estimate_step(field, at[:2], at[2:])
    flows = [(x.flow, x.log_weight) for x in found.flow_measurements]
    outputs = [flow.square().mean() + log_weight.exp().mean() for flow, log_weight in flows]
    outputs += [x.sum() for x in field.regress_step(features[:2], features[2:], flows)]
    outputs += [*(s.square().sum() for s in found.steps), pose.sum(), std.sum(), at.mask.sigmoid().mean()]
    torch.stack(outputs).sum().backward()
    return {name: p.grad for name, p in field.named_parameters()}


def test_gradients_reach_every_parameter() -> None:
    for name, grad in gradients_of_everything(untrained()).items():
        assert grad is not None and grad.isfinite().all(), name
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize("stages", [(), REFINEMENT_STAGES])
def test_gradients_of_the_step_reach_field_and_mask_and_without_refinement_matching(
    stages: tuple[RefinementStage, ...],
) -> None:
    field = untrained()
    image, q = random_images(4), 0.1 * torch.randn(4, 2)
    found = step_between(field, image[:2], image[2:], q[:2], q[2:], refinement_stages=stages)
    (found.steps[-1] - 0.1).square().sum().backward()
    matching = (field.coarse_in, field.correlation.coarse_out)
    for layer in (field.field_out, field.mask_out, *(() if stages else matching)):
        grad = layer.weight.grad
        assert grad is not None and grad.isfinite().all() and grad.abs().max() > 0
    assert all((layer.weight.grad is None) == bool(stages) for layer in matching)
    detached = untrained()
    at = FieldEvaluation.of(detached, detached.encode(image), q).detach_jacobian()
    found = estimate_step(detached, at[:2], at[2:], refinement_stages=stages)
    (found.steps[-1] - 0.1).square().sum().backward()
    assert detached.field_out.weight.grad is None and detached.mask_out.weight.grad is not None


@pytest.mark.parametrize("case", ["no field", "one column twice", "no weights", "huge field", "all zero"])
def test_gradients_of_singular_problems_stay_finite(case: str) -> None:
    field = untrained()
    out = field.field_out
    with torch.no_grad():
        if case == "no field":
            out.weight.zero_(), out.bias.zero_()
        elif case == "one column twice":
            for channel in (0, 2):  # (u, v) x (joint 1, joint 2)
                out.weight[channel + 1], out.bias[channel + 1] = out.weight[channel], out.bias[channel]
        elif case == "huge field":
            out.weight.mul_(1e4)
        elif case == "all zero":
            for p in field.parameters():
                p.zero_()
    mask_offset = -torch.inf if case == "no weights" else 0.0
    for name, grad in gradients_of_everything(field, mask_offset).items():
        assert grad is None or grad.isfinite().all(), name


def test_joints_with_equal_columns_are_not_observable() -> None:
    field = untrained()
    with torch.no_grad():
        for out in (field.field_out, field.field_fine):
            for channel in (0, 2):
                out.weight[channel + 1], out.bias[channel + 1] = out.weight[channel], out.bias[channel]
    image, q = random_images(2), torch.zeros(2, 2)
    found = step_between(field, image[:1], image[1:], q[:1], q[1:]).solution
    assert found.valid.all() and not found.observable.any()
    torch.testing.assert_close(found.delta_q[:, 0], found.delta_q[:, 1], rtol=1e-3, atol=1e-6)  # they share the motion
