"""Losses of a learned field, which vanish at the truth; calibration of its uncertainty; first-order motion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorded import numbered_dataset
from step_fields import FINGER, FLOW_GRID, GRID, SIDE, TwoPivots, random_images
from torch import Tensor

from jidm import Embodiment, load_embodiment
from jidm.errors import InputError
from jidm.estimation.refinement import FieldEvaluation, FlowMeasurement
from jidm.estimation.step_estimation import StepEstimate, estimate_step, step_prior
from jidm.fields.analytic import AnalyticField
from jidm.fields.free.blocks import downsample
from jidm.robot.kinematics import Kinematics
from jidm.training import uncertainty_calibration
from jidm.training.bidirectional import BidirectionalMotion
from jidm.training.data.batch import JointStats, PairBatch
from jidm.training.data.flow_cache import EstimatedFlow
from jidm.training.data.frame_store import load_frame_store
from jidm.training.data.geometric_flow import DepthView, exact_field, geometric_flow, link_poses
from jidm.training.data.pairs import PairSource, SampledPairs
from jidm.training.losses import (
    LossWeights,
    charbonnier,
    columns_loss,
    field_loss,
    flow_loss,
    mask_loss,
    photometric_loss,
    smoothness,
)
from jidm.training.trainable_field import TrainableField

STATS = JointStats((0.0, 0.0), (0.6, 0.6), (0.05, 0.05), (-1.2, -1.2), (1.2, 1.2))


def model(seed: int = 0) -> TrainableField:
    torch.manual_seed(seed)
    return TrainableField.from_data(FINGER, ("revolute", "revolute"), SIDE, SIDE, STATS)


def batch(count: int = 2, *, flow: bool = True, seed: int = 0) -> PairBatch:
    """Random images, and the exact motion of `TwoPivots` between random poses."""
    model, generator = TwoPivots(), torch.Generator().manual_seed(seed)
    q = torch.rand(count, 2, generator=generator) - 0.5
    q_next = q + 0.1 * torch.randn(count, 2, generator=generator)
    image = random_images(3 * count, seed)[: 2 * count]
    more: dict[str, Tensor] = {}
    for suffix, a, b in (("", q, q_next), ("_back", q_next, q)) if flow else ():
        more["flow" + suffix] = model.flow(a, b, FLOW_GRID).float()
        more["weight" + suffix] = model.robot_probability(a, FLOW_GRID).float()
        more["mask" + suffix] = (model.robot_probability(a) > 0.5).float()
        tangent = torch.einsum("bcnhw,bn->bchw", model.jacobian(a), (b - a).double()).float()
        more["tangent" + suffix] = downsample(tangent, 2)
        more["tangent_weight" + suffix], more["tangent_step" + suffix] = more["weight" + suffix], b - a
    return PairBatch(image[:count], image[count:], q, q_next, **more)


# ---- single losses ---------------------------------------------------------------------------------------------------


def coarse(field: torch.Tensor) -> torch.Tensor:
    """A field (b, 2, n, GRID, GRID) on the grid of flow."""
    return downsample(field.flatten(1, 2), GRID // FLOW_GRID).unflatten(1, field.shape[1:3])


def test_field_loss_is_minimal_at_the_exact_field() -> None:
    pairs = batch()
    motion = BidirectionalMotion.from_batch(pairs)
    assert motion is not None
    exact = coarse(TwoPivots().jacobian(torch.cat([pairs.q, pairs.q_next])).float()).requires_grad_()
    loss = field_loss(exact, motion)
    mean_motion = (motion.tangent.norm(dim=1) * motion.tangent_weight).sum() / motion.tangent_weight.sum()
    assert float(loss.detach()) == pytest.approx(0.01 / float(mean_motion), rel=1e-3)  # epsilon of the Charbonnier loss
    loss.backward()
    assert exact.grad is not None and exact.grad.abs().max() < 1e-4
    assert field_loss(exact.detach() * 1.1, motion) > 5 * loss
    assert field_loss(exact.detach() * 0, motion) == pytest.approx(1.0, rel=1e-2)
    # The whole motion includes the curvature of the paths, which the exact field does not explain.
    curved = replace(motion, tangent=motion.flow)
    assert field_loss(exact.detach(), curved) > 3 * loss


def test_without_first_order_motion_flow_is_used_in_both_directions() -> None:
    pairs = batch()
    bare = replace(pairs, **{k: None for k, _ in pairs.tensors() if k.startswith("tangent")})
    motion = BidirectionalMotion.from_batch(bare)
    assert motion is not None
    assert torch.equal(motion.tangent, torch.cat([pairs.flow, pairs.flow_back]))  # type: ignore[list-item]
    exact = coarse(TwoPivots().jacobian(torch.cat([pairs.q, pairs.q_next])).float())
    assert field_loss(exact, motion) < 0.3 * field_loss(0 * exact, motion)


def matched(flow: Tensor, back: Tensor, log_weight: float) -> tuple[FlowMeasurement, FlowMeasurement]:
    sure = torch.full_like(flow[:, 0], log_weight)
    return FlowMeasurement(flow, sure), FlowMeasurement(back, sure)


def test_flow_loss_is_minimal_at_the_right_flow_and_confidence() -> None:
    pairs = batch()
    motion = BidirectionalMotion.from_batch(pairs)
    assert motion is not None and pairs.flow is not None and pairs.flow_back is not None
    exact = flow_loss(matched(pairs.flow, pairs.flow_back, 0.0), motion)
    assert float(exact) == pytest.approx(0.01, rel=1e-4)
    off = matched(pairs.flow + 1, pairs.flow_back, 0.0)
    assert flow_loss(off, motion) > exact
    # The loss of an error e is minimal where half the log-weight is -log e.
    error = 0.2
    wrong = [pairs.flow.clone(), pairs.flow_back.clone()]
    for x in wrong:
        x[:, 0] += error
    at_best = -2 * torch.tensor((error**2 + 0.01**2) ** 0.5).log().item()
    costs = [float(flow_loss(matched(*wrong, w), motion)) for w in (at_best - 0.3, at_best, at_best + 0.3)]
    assert costs[1] < costs[0] and costs[1] < costs[2]


def test_flow_without_weight_is_ignored() -> None:
    pairs = batch()
    assert pairs.flow is not None and pairs.weight is not None
    motion, spoiled = (
        BidirectionalMotion.from_batch(x)
        for x in (pairs, replace(pairs, flow=pairs.flow + 100 * (pairs.weight < 1e-3)[:, None]))
    )
    assert motion is not None and spoiled is not None
    measurements = matched(pairs.flow, pairs.flow_back, 0.0)  # type: ignore[arg-type]
    assert flow_loss(measurements, spoiled) < flow_loss(measurements, motion) + 0.1
    empty = replace(motion, weight=0 * motion.weight, tangent_weight=0 * motion.tangent_weight)
    assert flow_loss(measurements, empty) == 0
    assert field_loss(torch.randn(4, 2, 2, FLOW_GRID, FLOW_GRID), empty) == 0


def test_photometric_loss_is_minimal_at_the_motion_of_the_images() -> None:
    first, shift = random_images(1), 4
    second = first.roll(shift, -1)  # what was at u is at u + 4
    field = torch.zeros(1, 2, 1, GRID, GRID)
    field[:, 0] = 40.0  # px per rad
    seen = FieldEvaluation(model().encode(first), field, torch.zeros(1, GRID, GRID))
    losses = {k: float(photometric_loss(seen, first, second, torch.tensor([[k / 40]]))) for k in (0, 3, 4, 5, -4)}
    assert min(losses, key=losses.get) == 4  # type: ignore[arg-type]


def test_smoothness_is_weaker_at_edges() -> None:
    flat, edge = torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE)
    edge[..., SIDE // 2 :] = 1.0
    field = torch.zeros(1, 2, 2, GRID, GRID)
    field[..., GRID // 2 :] = 3.0
    assert smoothness(field * 0 + 7, flat) == 0
    expected = 3.0 / (GRID - 1)  # one jump among GRID - 1 differences along u, none along v
    assert float(smoothness(field, flat)) == pytest.approx(expected)
    assert float(smoothness(field, edge)) == pytest.approx(expected * torch.tensor(-10.0).exp().item(), rel=1e-3)


def test_charbonnier_is_differentiable_at_zero() -> None:
    error = torch.zeros(1, 2, 3, 3, requires_grad=True)
    charbonnier(error).sum().backward()
    assert error.grad is not None and error.grad.isfinite().all()
    far = charbonnier(torch.tensor([3.0, 4.0])[None, :, None, None])
    assert float(far) == pytest.approx(5.0, rel=1e-5)


def test_mask_loss() -> None:
    pairs = batch()
    motion = BidirectionalMotion.from_batch(pairs)
    assert motion is not None and motion.mask is not None
    right = (2 * motion.mask - 1) * 20
    assert mask_loss(right, motion) < 1e-6 < mask_loss(-right, motion)
    unknown = BidirectionalMotion.from_batch(replace(pairs, mask=None, mask_back=None))
    assert unknown is not None
    moving = (motion.flow.norm(dim=1) > 0.5).float().repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert moving.shape == motion.mask.shape and mask_loss(20 * (2 * moving - 1), unknown) < 1e-6
    # A static cell may show the robot: predicting so costs a tenth of missing a moving one.
    weight = motion.weight.repeat_interleave(2, 1).repeat_interleave(2, 2)
    everything, nothing = (float(mask_loss(torch.full_like(moving, x), unknown)) for x in (20.0, -20.0))
    static_weight, moving_weight = (float((weight * x).sum()) for x in (1 - moving, moving))
    assert everything / nothing == pytest.approx(0.1 * static_weight / moving_weight, rel=1e-4)


def with_exact_field(pairs: PairBatch) -> PairBatch:
    model = TwoPivots()
    more = {"field": model.jacobian(pairs.q).float(), "field_back": model.jacobian(pairs.q_next).float()}
    more |= {
        "field_weight": model.robot_probability(pairs.q).float(),
        "field_weight_back": model.robot_probability(pairs.q_next).float(),
    }
    random = torch.rand(len(pairs), 2, 4, generator=torch.Generator().manual_seed(5))
    return replace(pairs, random=random, **more)


def test_columns_loss_trains_every_joint_by_itself() -> None:
    pairs, joint_scale = with_exact_field(batch()), torch.tensor([0.05, 0.1])[:, None, None]
    both = torch.cat([pairs.field, pairs.field_back])  # type: ignore[list-item]
    right = columns_loss(both, pairs, joint_scale)
    # A field that is right only along the executed steps has wrong columns, which costs.
    across = torch.cat([pairs.delta_q, -pairs.delta_q]).flip(-1) * torch.tensor([1.0, -1.0])
    wrong = both + 5 * across[:, None, :, None, None] / across.norm(dim=-1)[:, None, None, None, None]
    motion = BidirectionalMotion.from_batch(pairs)
    assert motion is not None
    torch.testing.assert_close(
        field_loss(coarse(wrong), motion), field_loss(coarse(both), motion), rtol=1e-3, atol=1e-4
    )
    assert columns_loss(wrong, pairs, joint_scale) > right + 0.05
    # The loss is relative: in larger images it is the same.
    large = replace(pairs, field=2 * pairs.field, field_back=2 * pairs.field_back)  # type: ignore[operator]
    torch.testing.assert_close(
        columns_loss(2 * wrong, large, joint_scale), columns_loss(wrong, pairs, joint_scale), rtol=0.05, atol=0
    )
    assert model().losses(pairs)["field"] != model().losses(batch())["field"]


def test_a_joint_that_moves_little_counts_in_the_loss() -> None:
    pairs, joint_scale = with_exact_field(batch()), torch.tensor([0.05, 0.1])[:, None, None]
    little = torch.tensor([1.0, 0.01])[:, None, None]
    pairs = replace(pairs, field=pairs.field * little, field_back=pairs.field_back * little)  # type: ignore[operator]
    both = torch.cat([pairs.field, pairs.field_back])  # type: ignore[list-item]
    costs = [
        columns_loss(both * torch.tensor(kept)[:, None, None], pairs, joint_scale)
        for kept in ([1.0, 1], [1, 0], [0, 1])
    ]
    unknown_small, unknown_large = float(costs[1] - costs[0]), float(costs[2] - costs[0])
    assert unknown_small > 0.03 * unknown_large > 0  # a hundredth of the motion, but not of the loss


def test_flow_in_one_direction_is_refused() -> None:
    with pytest.raises(InputError, match="both directions"):
        model().losses(replace(batch(), flow_back=None, weight_back=None))


# ---- the whole loss --------------------------------------------------------------------------------------------------


def with_given_poses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainableField, "_sample_poses", lambda self, *given: given[-2])


def test_the_field_is_evaluated_at_noisy_true_poses_and_at_clamped_predicted_ones() -> None:
    field, pairs = model(), batch(64)
    q, random = torch.cat([pairs.q, pairs.q_next]), torch.rand(64, 2, 4, generator=torch.Generator().manual_seed(1))
    pairs = replace(pairs, random=random)
    wrong, right = (
        field._sample_poses(pairs, q, q + off * field.q_std) - q for off in (torch.tensor([-7.0, 9.0]), 0.01)
    )
    predicted = pairs.random_numbers()[:, 0] < 0.5
    torch.testing.assert_close(
        right[predicted], (0.01 * field.q_std).expand(int(predicted.sum()), 2), rtol=1e-2, atol=0
    )
    torch.testing.assert_close(wrong[predicted], (torch.tensor([-0.3, 0.3]) * field.q_std).expand_as(wrong[predicted]))
    assert torch.equal(wrong[~predicted], right[~predicted])  # the others do not depend on the prediction
    torch.testing.assert_close(wrong[~predicted].std(0), 0.05 * field.q_std, rtol=0.25, atol=0)


def time_reversed(pairs: PairBatch) -> PairBatch:
    """The same pairs with first and second frame, and all that belongs to them, exchanged."""
    swapped = {name: getattr(pairs, name + "_back") for name, _ in pairs.tensors() if hasattr(pairs, name + "_back")}
    swapped |= {name + "_back": getattr(pairs, name) for name in swapped}
    return replace(
        pairs,
        first=pairs.second,
        second=pairs.first,
        q=pairs.q_next,
        q_next=pairs.q,
        random=pairs.random.flip(1),
        **swapped,
    )


def test_a_pair_backward_in_time_has_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    with_given_poses(monkeypatch)
    field, pairs = model(), replace(batch(), random=torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(3)))
    field.progress = 1.0
    one, other = field.losses(pairs), field.losses(time_reversed(pairs))
    assert set(one) == {"loss", "pose", "smooth", "step", "step_from_flow", "field", "flow", "mask", "step_regression"}
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_loss_is_the_weighted_sum_and_trains_every_parameter() -> None:
    field, pairs = model(), batch()
    field.weights = LossWeights(step=0.7)
    terms = field.losses(pairs)
    assert all(x.isfinite() and x.dim() == 0 for x in terms.values())
    total = sum(getattr(field.weights, name) * value for name, value in terms.items() if name != "loss")
    torch.testing.assert_close(terms["loss"], total)
    terms["loss"].backward()
    for name, p in field.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_step_from_flow_trains_field_and_mask_alone() -> None:
    field, pairs = model(), batch()
    before = field.losses(pairs)["step_from_flow"]
    before.backward(retain_graph=True)
    for layer in (field.field_out, field.field_fine, field.mask_out):
        assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in field.correlation.parameters())
    # With the right field and flow only the linearization error remains.
    two_pivots, q = TwoPivots(), torch.cat([pairs.q, pairs.q_next])
    with torch.no_grad():
        at = FieldEvaluation.of(field, field.encode(torch.cat([pairs.first, pairs.second])), q)
        probability = two_pivots.robot_probability(q).clamp(1e-4, 1 - 1e-4)
        exact = FieldEvaluation(at.features, two_pivots.jacobian(q).float(), torch.logit(probability).float())
        motion = BidirectionalMotion.from_batch(pairs)
        assert motion is not None
        assert field._step_from_flow_loss(pairs, exact, motion) < 0.2 * before


@pytest.mark.parametrize("flow", [True, False])
def test_steps_train_matching_and_late_in_training_a_field_that_is_not_known(flow: bool) -> None:
    pairs = batch(flow=flow)
    for progress in (0.0, 0.69, 0.71, 1.0):
        field = model()
        field.progress = progress
        terms = field.losses(pairs)
        assert set(terms) == {"loss", "pose", "smooth", "step", "step_regression"} | (
            {"field", "mask", "flow", "step_from_flow"} if flow else {"photometric"}
        )
        terms["step"].backward(retain_graph=True)
        assert (
            field.correlation.coarse_out.weight.grad is not None
            and field.correlation.coarse_out.weight.grad.abs().max() > 0
        )
        trained = field.field_out.weight.grad is not None and bool(field.field_out.weight.grad.abs().max() > 0)
        assert trained == (progress > 0.7)
        field.zero_grad()
        terms["loss"].backward()
        assert field.field_out.weight.grad is not None and field.field_out.weight.grad.abs().max() > 0


def test_with_an_exact_field_steps_are_solved_with_it_and_train_matching_alone() -> None:
    pairs = with_exact_field(batch())
    for progress in (0.31, 1.0):
        field = model()
        field.progress = progress
        field.losses(pairs)["step"].backward()
        assert field.coarse_in.weight.grad is not None and field.coarse_in.weight.grad.abs().max() > 0
        assert field.field_out.weight.grad is field.mask_out.weight.grad is None
        assert all(p.grad is None for p in field.encoder.parameters())
    field = model()
    one = field.losses(pairs)["step"]
    field.field_out.weight.data.mul_(3)
    other = field.losses(pairs)["step"]
    torch.testing.assert_close(one, other)


def test_without_flow_the_photometric_loss_trains_the_field() -> None:
    field = model()
    terms = field.losses(batch(flow=False))
    assert "photometric" in terms and "flow" not in terms and "field" not in terms
    terms["photometric"].backward()
    assert field.field_out.weight.grad is not None and field.field_out.weight.grad.abs().max() > 0


def test_losses_of_a_static_pair_without_flow_are_finite() -> None:
    field, pairs = model(), batch()
    none = {
        k: torch.zeros_like(v) for k, v in pairs.tensors() if "flow" in k or "weight" in k or k.startswith("tangent")
    }
    static = replace(pairs, second=pairs.first, q_next=pairs.q, **none)
    field.losses(static)["loss"].backward()
    for name, p in field.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


def test_a_few_steps_of_training_lower_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    with_given_poses(monkeypatch)
    field, pairs = model(), batch()
    optimizer = torch.optim.Adam(field.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        terms = field.losses(pairs)
        losses.append((float(terms["loss"].detach()), float(terms["pose"].detach())))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert losses[-1][0] < 0.8 * losses[0][0]
    assert losses[-1][1] < losses[0][1]


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_the_scale_of_gaussian_errors_is_their_standard_deviation() -> None:
    deviations = torch.randn(20000, 2, generator=torch.Generator().manual_seed(0)).abs() * torch.tensor([0.5, 3.0])
    spread = uncertainty_calibration._std_scale(deviations)
    torch.testing.assert_close(spread, torch.tensor([0.5, 3.0]), rtol=0.03, atol=0)
    for share, z in ((0.6827, 1.0), (0.95, 1.96)):
        covered = (deviations <= z * spread).float().mean(0)
        torch.testing.assert_close(covered, torch.full((2,), share), rtol=0, atol=0.015)
    assert uncertainty_calibration._std_scale(torch.zeros(10, 2)).tolist() == pytest.approx([1e-3, 1e-3])


def test_a_rarely_observable_joint_gets_the_scale_of_the_others() -> None:
    deviations = torch.randn(2000, 3, generator=torch.Generator().manual_seed(1)).abs() * torch.tensor([2.0, 8.0, 8.0])
    deviations[60:, 1] = torch.nan  # observable in 60 pairs: calibrated on those
    deviations[5:, 2] = torch.nan  # observable in 5: like the others
    spread = uncertainty_calibration._std_scale(deviations)
    assert spread[0] == pytest.approx(2.0, rel=0.05) and spread[1] == pytest.approx(8.0, rel=0.25)
    assert float(spread[2]) == pytest.approx(float(spread[0] * spread[1]) ** 0.5)
    assert torch.equal(uncertainty_calibration._std_scale(torch.full((40, 2), torch.nan)), torch.ones(2))


def test_pairs_in_which_a_joint_is_not_observable_do_not_count_for_it() -> None:
    field, pairs = model().eval(), batch(16, flow=False)
    seen = field.encode(torch.cat([pairs.first, pairs.second]))
    at = FieldEvaluation.of(field, seen, torch.cat([pairs.q, pairs.q_next]))
    field.delta_std[1] *= 1e-6  # a typical step of this joint moves no pixel visibly
    with torch.no_grad():
        _, deviations = uncertainty_calibration._evaluate_steps(
            field, [uncertainty_calibration._Pairs(at, pairs.delta_q)]
        )
    assert bool(deviations[:, 0].isfinite().any()) and bool(deviations[:, 1].isnan().all())


def test_calibration_scales_both_uncertainties_to_the_errors() -> None:
    field, generator = model().eval(), torch.Generator().manual_seed(0)
    pairs = batch(16, flow=False)
    with torch.no_grad():
        seen = field.encode(torch.cat([pairs.first, pairs.second]))
        q, std = field.predict_pose(seen)
        q = q + 4 * std * torch.randn(q.shape, generator=generator)
        pairs = replace(pairs, q=q[:16], q_next=q[16:])
    field.pose_std_scale.fill_(7.0)  # the previous value does not matter
    field.calibrate_uncertainty([pairs[:8], pairs[8:]])
    torch.testing.assert_close(field.pose_std_scale, torch.full((2,), 4.0), rtol=0.5, atol=0)
    with torch.no_grad():
        at = FieldEvaluation.of(field, seen, q)
        found = estimate_step(field, at[:16], at[16:], prior=step_prior(field, 16)).solution
        spread = found.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        ratio = (found.delta_q - pairs.delta_q).abs() / spread
    # The scale is the geometric mean of those that make either interval hold.
    at_68, at_95 = (ratio.quantile(s, dim=0) / z for s, z in ((0.6827, 1.0), (0.95, 1.96)))
    torch.testing.assert_close((at_68 * at_95).sqrt(), torch.ones(2), rtol=0.02, atol=0)
    assert torch.equal(field.flow_std_scale, field.step_std_scale)  # no flow was estimated


def test_steps_from_estimated_flow_are_calibrated_separately() -> None:
    field, pairs = model().eval(), batch(16)
    field.calibrate_uncertainty([pairs[:8], pairs[8:]])
    assert not torch.equal(field.flow_std_scale, field.step_std_scale)
    with torch.no_grad():
        at = FieldEvaluation.of(
            field, field.encode(torch.cat([pairs.first, pairs.second])), torch.cat([pairs.q, pairs.q_next])
        )
        motion = BidirectionalMotion.from_batch(pairs)
        assert motion is not None
        found = estimate_step(field, at[:16], at[16:], *motion.to_flow()).solution
        ratio = (found.delta_q - pairs.delta_q).abs() / found.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    at_68, at_95 = (ratio.quantile(s, dim=0) / z for s, z in ((0.6827, 1.0), (0.95, 1.96)))
    torch.testing.assert_close((at_68 * at_95).sqrt(), torch.ones(2), rtol=0.02, atol=0)
    # Exact flow is not estimated flow.
    field.calibrate_uncertainty([with_exact_field(pairs)])
    assert torch.equal(field.flow_std_scale, field.step_std_scale)


@pytest.mark.parametrize("helps", [True, False])
def test_calibration_selects_step_regression_if_it_helps(monkeypatch: pytest.MonkeyPatch, helps: bool) -> None:
    field, pairs = model().eval(), batch(32, flow=False)
    random = torch.Generator().manual_seed(0)
    off = (0.1 if helps else 30.0) * field.delta_std * torch.randn(32, 2, generator=random)

    def regress_step(self: TrainableField, *_: object) -> tuple[Tensor, Tensor]:
        return pairs.delta_q + off, (0.7 * field.delta_std * self.regression_std_scale).expand(32, 2)

    monkeypatch.setattr(TrainableField, "regress_step", regress_step)
    field.use_step_regression.fill_(not helps)
    field.calibrate_uncertainty([pairs])
    assert bool(field.use_step_regression) == helps
    if not helps:
        return
    with torch.no_grad():
        at = FieldEvaluation.of(
            field, field.encode(torch.cat([pairs.first, pairs.second])), torch.cat([pairs.q, pairs.q_next])
        )
        found = estimate_step(field, at[:32], at[32:], prior=step_prior(field, 32)).solution
    ratio = (found.delta_q - pairs.delta_q).abs() / found.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    at_68, at_95 = (ratio.quantile(s, dim=0) / z for s, z in ((0.6827, 1.0), (0.95, 1.96)))
    torch.testing.assert_close((at_68 * at_95).sqrt(), torch.ones(2), rtol=0.1, atol=0)


@pytest.mark.parametrize("helps", [True, False])
def test_calibration_selects_refinement_if_it_helps(monkeypatch: pytest.MonkeyPatch, helps: bool) -> None:
    field, pairs = model().eval(), batch(8, flow=False)
    original = uncertainty_calibration.estimate_pair_steps

    def spoiled(field: TrainableField, at: FieldEvaluation) -> StepEstimate:
        found = original(field, at)
        off = 0.0 if bool(field.use_refinement) == helps else 10.0
        return replace(found, steps=(*found.steps[:-1], pairs.delta_q + off + 0 * found.steps[-1]))

    monkeypatch.setattr(uncertainty_calibration, "estimate_pair_steps", spoiled)
    field.use_refinement.fill_(not helps)
    field.calibrate_uncertainty([pairs])
    assert bool(field.use_refinement) == helps


# ---- motion to first order -------------------------------------------------------------------------------------------


def finger_view(q: Tensor, name: str = "planar_finger_2") -> tuple[Embodiment, AnalyticField, DepthView, Kinematics]:
    """The coarse view of a robot, computed from its analytic field."""
    robot = load_embodiment(name)
    camera = robot.camera()
    camera = camera.resized(64, 64 * camera.height // camera.width)
    field = AnalyticField(robot, camera, points=4000, occluders=8000, seed=0)
    h, w = camera.height // 4, camera.width // 4
    kinematics = Kinematics.from_embodiment(robot)
    depth, link = depth_and_link(field, q, h, w)
    small = camera.resized(w, h)
    K = torch.stack([small.K[0, 0], small.K[1, 1], small.K[0, 2], small.K[1, 2]]).expand(len(q), 4)
    T = small.T_camera_base.expand(len(q), 4, 4)
    return robot, field, DepthView(depth, link, K, T, link_poses(kinematics, q)), kinematics


def depth_and_link(field: AnalyticField, q: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Depth and link in each cell, as `dense` computes them."""
    from jidm.fields.analytic import _splat

    camera, surface = field.camera.resized(w, h), field.surface.to(q)
    poses = field.kinematics.link_poses(q)
    p_base = field.kinematics.transform_points(poses, surface.link, surface.p_link)
    uv, depth = camera.project(p_base)
    depth, link = _splat(uv, depth, field._visible(poses, surface, p_base), surface.link, h, w)
    return depth.unflatten(-1, (h, w)), link.unflatten(-1, (h, w))


@pytest.mark.parametrize("name", ["planar_finger_2", "panda"])
def test_the_exact_field_of_a_recording_is_the_analytic_one_and_the_motion_of_short_steps(name: str) -> None:
    n = load_embodiment(name).n
    q = torch.tensor(load_embodiment(name).home)[None].expand(2, n).double() + torch.tensor([[0.0], [0.2]]).double()
    _, field, view, kinematics = finger_view(q, name)
    h, w = view.depth.shape[1:]
    found, on_robot = exact_field(view, kinematics)
    J, mask = field.dense(q, h, w)
    assert torch.equal(on_robot, mask) and mask.sum() > 10 and J.abs().max() > 0.5
    torch.testing.assert_close(found, J, rtol=0, atol=1e-4 * float(J.abs().max()))
    for joint in range(n):
        step = 1e-5 * torch.eye(n).double()[joint]
        view_after = replace(view, poses=link_poses(kinematics, q + step))
        flow = geometric_flow(view, view_after)[0] * 1e5
        torch.testing.assert_close(flow, found[:, :, joint], rtol=0, atol=1e-3 * float(J.abs().max()))


def test_a_dilated_view_extends_one_cell_over_the_background() -> None:
    link, depth = torch.full((1, 5, 7), -1), torch.full((1, 5, 7), 9.0)
    link[0, 1, 1], depth[0, 1, 1] = 3, 2.0
    link[0, 3, 3], depth[0, 3, 3] = 5, 1.0
    unused = torch.zeros(1, 4), torch.zeros(1, 4, 4), torch.zeros(1, 1, 4, 4)
    dilated = DepthView(depth, link, *unused).dilated()
    expected = torch.full((5, 7), -1)
    expected[:3, :3] = 3
    expected[2:, 2:5] = 5  # the nearer one where they meet
    assert torch.equal(dilated.link[0], expected)
    assert torch.equal(dilated.depth[0], torch.where(expected == 3, 2.0, torch.where(expected == 5, 1.0, 9.0)))


# ---- first-order motion from estimated flow --------------------------------------------------------------------------

SLOPE = torch.tensor([[30.0, 10.0], [-5.0, 20.0]])


@pytest.fixture
def measured(tmp_path: Path):
    """Two episodes (5 and 4 frames, joints moving unevenly) and flow with curvature, filled in by hand.

    From row s to row t the motion is `J (q_t - q_s) + c (t - s)^2`, with c the curvature of the paths.
    """
    store = load_frame_store(
        numbered_dataset(tmp_path / "measured", {0: 5, 1: 4}), (0, 1), height=16, width=16, cache=tmp_path / "cache"
    )
    q = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).double() * 0.1
    store = replace(store, state=q)
    curvature, strides = torch.tensor([0.7, -0.4]), (1, 2)
    flow, weight = torch.zeros(9, 2, 2, 2, 4, 4), torch.zeros(9, 2, 2, 4, 4, dtype=torch.uint8)
    for first, length in ((0, 5), (5, 4)):
        for row in range(first, first + length):
            for column, k in enumerate(strides):
                if row + k < first + length:
                    step = SLOPE @ (q[row + k] - q[row]).float()
                    flow[row, column, 0] = (step + curvature * k**2)[:, None, None]
                    flow[row, column, 1] = (-step + curvature * k**2)[:, None, None]
                    weight[row, column, 0], weight[row, column, 1] = 200, 100
    return store, EstimatedFlow(strides, flow.half().float(), weight), curvature


def sampled(first: list[int], stride: list[int], episode: list[int]) -> SampledPairs:
    t, k = torch.tensor(first), torch.tensor(stride)
    return SampledPairs(before=t, first=t, second=t + k, stride=k, episode=torch.tensor(episode))


def test_the_curvature_of_paths_cancels_in_central_differences(measured) -> None:
    store, estimated, _ = measured
    source = PairSource(store, estimated_flow=estimated)
    # Frames 1, 6 and 2 have neighbors on both sides, and so have their partners 2, 7 (stride 1).
    pairs = source.batch(sampled([1, 6, 2], [1, 1, 1], [0, 1, 0]))
    for suffix in ("", "_back"):
        tangent, step = getattr(pairs, "tangent" + suffix), getattr(pairs, "tangent_step" + suffix)
        expected = (step @ SLOPE.T)[..., None, None].expand_as(tangent)
        torch.testing.assert_close(tangent, expected, rtol=0, atol=0.01)
        weight = getattr(pairs, "tangent_weight" + suffix)
        torch.testing.assert_close(weight, torch.full_like(weight, 200 * 100 / 255**2))
        assert weight.shape == (3, 4, 4) and step.abs().max() > 0.01
    q = store.q
    for i, t in enumerate((1, 6, 2)):
        torch.testing.assert_close(pairs.tangent_step[i], ((q[t + 1] - q[t - 1]) / 2).float())
        torch.testing.assert_close(pairs.tangent_step_back[i], (-(q[t + 2] - q[t]) / 2).float())
    wide = source.batch(sampled([2], [2], [0]))
    torch.testing.assert_close(wide.tangent_step[0], ((q[4] - q[0]) / 2).float())
    torch.testing.assert_close(wide.tangent[0, :, 0, 0], SLOPE @ wide.tangent_step[0], rtol=0, atol=0.01)


def test_at_the_ends_of_an_episode_the_difference_is_one_sided(measured) -> None:
    store, estimated, curvature = measured
    source = PairSource(store, estimated_flow=estimated)
    pairs = source.batch(sampled([0, 5, 3, 7], [1, 1, 1, 1], [0, 1, 0, 1]))
    q = store.q
    # At the first frames only the forward flow is known; its curvature remains.
    for i, t in ((0, 0), (1, 5)):
        torch.testing.assert_close(pairs.tangent_step[i], (q[t + 1] - q[t]).float())
        expected = SLOPE @ pairs.tangent_step[i] + curvature
        torch.testing.assert_close(pairs.tangent[i, :, 0, 0], expected, rtol=0, atol=0.01)
        assert (pairs.tangent_weight[i] == 200 / 255).all()
    # At the last frames (the partners of 3 and 7) only the backward flow.
    for i, t in ((2, 4), (3, 8)):
        torch.testing.assert_close(pairs.tangent_step_back[i], -(q[t] - q[t - 1]).float())
        expected = SLOPE @ pairs.tangent_step_back[i] + curvature
        torch.testing.assert_close(pairs.tangent_back[i, :, 0, 0], expected, rtol=0, atol=0.01)
        assert (pairs.tangent_weight_back[i] == 100 / 255).all()
    whole = source.batch(sampled([0], [2], [0]))
    assert whole.tangent is not None and whole.tangent.isfinite().all()
