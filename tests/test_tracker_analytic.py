"""The tracker and the re-linearised step: limits, gaps, what is remembered."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from rendered import FPS, HEIGHT, WIDTH, Clip, clip

from jidm import AnalyticField, load_embodiment
from jidm.estimation.alignment import Alignment, AlignOptions, align
from jidm.estimation.analytic_tracker import AnalyticTracker, AnalyticTrackerOptions, JointLimits
from jidm.estimation.factors.contour import ContourFactor
from jidm.estimation.factors.photometric import SurfaceAppearance
from jidm.estimation.gauss_newton import gauss_newton_step
from jidm.flow import DisFlow, Flow
from jidm.sim import Appearance, Scene
from jidm.video.pyramid import BrightnessPyramid


@pytest.fixture(scope="module")
def finger() -> Clip:
    return clip("planar_finger_3", frames=8, seed=1)


@pytest.fixture(scope="module")
def field(finger: Clip) -> AnalyticField:
    return AnalyticField(finger.robot, finger.camera, points=1500, occluders=10000, contour_points=5000)


def limits(c: Clip) -> JointLimits:
    lower, upper, velocity = (torch.from_numpy(x.copy()) for x in (c.robot.lower, c.robot.upper, c.robot.velocity))
    return JointLimits(lower, upper, velocity, torch.ones(c.robot.n).double())


def tracker(c: Clip, field: AnalyticField, **options: object) -> AnalyticTracker:
    made = AnalyticTracker(field, limits(c), AnalyticTrackerOptions(**options))  # type: ignore[arg-type]
    made.start(c.frames[0], torch.from_numpy(c.q[0]))
    return made


# ---- one large step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.02, 0.1, 0.25])
def test_a_large_step_is_found_by_linearising_again(size: float, finger: Clip, field: AnalyticField) -> None:
    pose = field.at(torch.from_numpy(finger.q[0]))
    step = size * torch.tensor([1.0, -0.7, 0.5]).double()
    flow = pose.surface(step).points - pose.surface().points
    weight = pose.visible.double()
    again = gauss_newton_step(pose, flow, weight)
    once = gauss_newton_step(pose, flow, weight, iterations=1)
    assert float((again.delta_q - step).abs().max()) < 1e-6
    assert float((once.delta_q - step).abs().max()) > 10 * float((again.delta_q - step).abs().max())
    assert float(again.residual) < 1e-4
    assert float(again.explained_fraction) > 0.9999


def test_steps_of_a_batch_do_not_mix(finger: Clip, field: AnalyticField) -> None:
    q = torch.from_numpy(finger.q[[0, 3, 6]])
    pose = field.at(q)
    step = 0.05 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()
    flow = pose.surface(step).points - pose.surface().points
    flow[1] = torch.nan
    together = gauss_newton_step(pose, flow, pose.visible.double())
    assert together.valid.tolist() == [True, False, True]
    torch.testing.assert_close(together.delta_q[[0, 2]], step[[0, 2]], rtol=0, atol=1e-5)
    assert float(together.delta_q[1].abs().max()) == 0.0
    assert float(together.explained_fraction[1]) == 0.0


def test_bounds_hold_for_the_whole_step(finger: Clip, field: AnalyticField) -> None:
    pose = field.at(torch.from_numpy(finger.q[0]))
    step = torch.tensor([0.2, -0.15, 0.1]).double()
    flow = pose.surface(step).points - pose.surface().points
    bound = torch.tensor([0.05, 1.0, 1.0], dtype=torch.float64)
    found = gauss_newton_step(pose, flow, pose.visible.double(), bounds=(-bound, bound)).delta_q
    assert float(found[0]) == pytest.approx(0.05, abs=1e-12)
    assert (found.abs() <= bound).all()
    assert float(found[1]) > float(step[1])  # the others make up for it, as a solve inside the bounds must


# ---- the tracker -----------------------------------------------------------------------------------------------------


def test_must_be_started(finger: Clip, field: AnalyticField) -> None:
    made = AnalyticTracker(field, limits(finger), AnalyticTrackerOptions())
    with pytest.raises(AssertionError, match="start"):
        made.step(finger.frames[1], 1 / FPS, finger.flow[0])


def test_exact_flow_is_followed(finger: Clip, field: AnalyticField) -> None:
    made = tracker(finger, field, refine="none")
    for t in range(7):
        step = made.step(finger.frames[t + 1], 1 / FPS, finger.flow[t])
        assert step.valid
        np.testing.assert_allclose(step.delta_q.numpy(), finger.steps[t], atol=2e-4)
        assert float(step.residual) < 0.15  # flow read across the robot's rim
        assert float(step.explained_fraction) > 0.95
    np.testing.assert_allclose(made.q.numpy(), finger.q[-1], atol=5e-4)


def test_a_gap_widens_the_reach_and_is_not_a_step(finger: Clip, field: AnalyticField) -> None:
    made = tracker(finger, field, refine="none")
    dt = 1 / FPS
    held = made.skip(dt)
    assert not held.valid
    assert torch.equal(held.position, torch.from_numpy(finger.q[0]))
    assert float(held.delta_q.abs().max()) == 0.0
    assert not held.observable.any()
    twice = made.skip(dt)
    one, two = held.position_covariance.diagonal().sqrt(), twice.position_covariance.diagonal().sqrt()
    torch.testing.assert_close(one, limits(finger).velocity * dt)
    torch.testing.assert_close(two, 2 * one)
    flow = Flow(finger.flow.flow[:3].sum(0), finger.flow.weight[0])  # about the flow from frame 0 to frame 3
    after = made.step(finger.frames[3], dt, flow)
    assert not after.valid  # it spans three intervals, so it is no step of one
    assert float(after.delta_q.abs().max()) == 0.0
    np.testing.assert_allclose(after.position.numpy(), finger.q[3], atol=2e-2)
    clean = made.step(finger.frames[4], dt, finger.flow[3])
    assert clean.valid


def test_nothing_seen_is_not_valid_and_as_wide_as_the_speed_allows(finger: Clip, field: AnalyticField) -> None:
    made = tracker(finger, field, refine="none")
    blind = Flow(finger.flow.flow[0], torch.zeros_like(finger.flow.weight[0]))
    step = made.step(finger.frames[1], 1 / FPS, blind)
    assert not step.valid
    assert not step.observable.any()
    std = step.position_covariance.diagonal().sqrt()
    torch.testing.assert_close(std, limits(finger).velocity / FPS, rtol=1e-3, atol=0)
    assert all(x.isfinite().all() for x in (step.delta_q, step.covariance, step.residual, step.explained_fraction))


def test_uncertainty_grows_with_flow_and_is_held_by_outlines(finger: Clip, field: AnalyticField) -> None:
    ends = {}
    for name, options in {
        "flow": {"refine": "none"},
        "free": {"use_contours": False},
        "anchored": {"use_contours": True},
    }.items():
        made = tracker(finger, field, **options)
        spread = [
            float(made.step(finger.frames[t + 1], 1 / FPS, finger.flow[t]).position_covariance.trace())
            for t in range(4)
        ]
        ends[name] = spread[-1]
        if name != "anchored":
            assert all(b > a for a, b in pairwise(spread))
    assert ends["anchored"] < ends["free"]


def test_what_was_seen_first_holds_back_drift(finger: Clip, field: AnalyticField) -> None:
    """There and back again: aligned to the surface as it was first seen, the pose at the end is the one at the start."""
    order = [0, 3, 6, 3, 0]
    flow = DisFlow()

    def end(lasting: bool) -> float:
        made = tracker(finger, field, use_contours=False, use_reference_appearance=lasting)
        for a, b in pairwise(order):
            made.step(finger.frames[b], 3 / FPS, flow(finger.frames[a], finger.frames[b]))
        return float((made.q - torch.from_numpy(finger.q[0])).abs().mean())

    assert end(True) < end(False)
    assert end(True) < 2e-3


def test_a_lost_pose_is_found_by_the_silhouette(finger: Clip, field: AnalyticField) -> None:
    """Lost means that what brightness compares with was taken from the wrong places."""

    def error(anchor: bool) -> float:
        made = tracker(finger, field, use_contours=anchor)
        for t in range(3):  # uncovers some of the background
            made.step(finger.frames[t + 1], 1 / FPS, finger.flow[t])
        made.q = made.q + torch.tensor([0.16, -0.2, 0.0]).double()
        made._pose = field.at(made.q)
        made._previous = SurfaceAppearance.of(made._pose, BrightnessPyramid.from_frame(finger.frames[3]))
        made.step(finger.frames[4], 1 / FPS, finger.flow[3])
        return float((made.q - torch.from_numpy(finger.q[4])).abs().max())

    assert error(True) < 0.05
    assert error(False) > 0.08


def test_a_joint_without_speed_limit_reaches_a_quarter_of_its_unit() -> None:
    unlimited = JointLimits(
        torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([torch.inf, 2.0]), torch.tensor([1.0, 0.1])
    )
    torch.testing.assert_close(unlimited.max_step(0.1), torch.tensor([0.25, 0.2]))


# ---- what is expected of a frame -------------------------------------------------------------------------------------


def test_a_joint_goes_on_as_it_moved_and_one_that_rests_is_expected_to_rest(
    finger: Clip, field: AnalyticField, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, dt = tracker(finger, field, process_noise_window=2.0), 1 / FPS
    step = torch.tensor([0.06, 0.0, 0.0]).double()
    start, priors = made.q, []

    def found(*_: object, prior: tuple[torch.Tensor, torch.Tensor], **__: object) -> Alignment:
        priors.append(prior)
        one = torch.eye(3).double()
        return Alignment(start + len(priors) * step, one, one, 0.0)

    monkeypatch.setattr("jidm.estimation.analytic_tracker.align", found)
    for t in range(7):
        made.step(finger.frames[t + 1], dt, finger.flow[t])
    before = start + 6 * step
    expected, spread = priors[-1]
    torch.testing.assert_close(expected, before + math.exp(-dt / made.options.velocity_time_constant) * step)
    assert float(spread[0]) > 1.5 * float(spread[1])  # it moved, the others did not
    assert float(spread[1]) < 0.9 * float(priors[0][1][1])  # and are known better than at first


@pytest.mark.parametrize(("name", "size"), [("planar_finger_3", 0.2), ("planar_finger_5", 0.1)])
def test_one_link_that_moves_alone_is_followed(name: str, size: float) -> None:
    """Everything else fits perfectly, and on that scale all of the moving link's points are outliers."""
    robot = load_embodiment(name)
    camera = robot.camera().resized(WIDTH, HEIGHT)
    q = np.stack([robot.home, robot.home])
    q[1, -1] += size
    with Scene(robot, seed=0, appearance=Appearance.plain()) as world:
        rgb = torch.from_numpy(world.render_video(q, camera).rgb)
    before, after = (BrightnessPyramid.from_frame(frame) for frame in rgb.movedim(-1, 1).double() / 255)
    first, truth = torch.from_numpy(q)
    field = AnalyticField(robot, camera, points=1500, occluders=10000, contour_points=5000)
    pose, outline = field.at(first), ContourFactor(field)
    outline.update(pose, before, known_pose=True)
    rests = (first, torch.full_like(first, 0.05))
    got = align(
        after, [SurfaceAppearance.of(pose, before)], [first], contour=outline, bounds=(first - 1, first + 1), prior=rests,
        options=AlignOptions(),
    )  # fmt: skip
    assert float((got.q - truth).abs().max()) < 0.01


def test_a_start_that_is_right_is_not_lost_on_blurred_levels(
    finger: Clip, field: AnalyticField, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dragged(self: object, terms: object, q: torch.Tensor, levels: object) -> torch.Tensor:
        return q - 0.3

    monkeypatch.setattr("jidm.estimation.alignment._Problem.descend", dragged)
    first, truth = (torch.from_numpy(finger.q[t]) for t in (0, 1))
    reference = SurfaceAppearance.of(field.at(first), BrightnessPyramid.from_frame(finger.frames[0]))
    wide = torch.ones(3).double()
    got = align(
        BrightnessPyramid.from_frame(finger.frames[1]), [reference], [truth], bounds=(truth - wide, truth + wide),
        prior=(truth, wide), options=AlignOptions(),
    )  # fmt: skip
    assert float((got.q - truth).abs().max()) < 0.02
