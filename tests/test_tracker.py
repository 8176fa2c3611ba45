"""The tracker, driven by a measurement model that returns given measurements: filter, gaps, limits, gates, smoothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from jidm.estimation.agreement import NOT_MEASURED, Agreement
from jidm.estimation.kalman import FilterOptions, Gaussian
from jidm.estimation.tracker import JointLimits, Measurement, MeasurementModel, PredictedState, TrackedStep, Tracker
from jidm.flow import Flow

N, DT = 2, 1 / 16
FRAME = torch.zeros(3, 4, 4).double()
FIXED_NOISE = FilterOptions(gate=None, process_noise_window=math.inf)
"""A linear filter with constant process noise."""

Reading = tuple[Gaussian, Gaussian | None] | None
"""A measured step and position, or nothing."""


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gaussian(mean: Tensor, std: float) -> Gaussian:
    return Gaussian(mean, std**2 * torch.eye(len(mean)).double())


@dataclass
class GivenMeasurements:
    """A measurement model that returns the given measurements, one per frame.

    Attributes:
        readings: of each frame after the first.
        maneuvers: frames in which the first joint is said to be in a maneuver.
        predictions, accepted, corrected: what it got from the tracker.
    """

    readings: Sequence[Reading]
    filter: FilterOptions = field(default_factory=FilterOptions)
    speed: Tensor = field(default_factory=lambda: vector(0.8, 0.8))
    valid: bool = True
    first: Gaussian | None = None
    maneuvers: frozenset[int] = frozenset()
    independent_errors: bool = False
    agreement: Agreement = NOT_MEASURED
    predictions: list[PredictedState] = field(default_factory=list)
    accepted: list[Tensor] = field(default_factory=list)
    corrected: list[Tensor] = field(default_factory=list)

    def start(self, frame: Tensor, q0: Tensor | None, limits: JointLimits) -> Gaussian:
        if q0 is not None:
            return Gaussian(q0, torch.zeros(N, N).double())
        assert self.first is not None
        return self.first

    def initial_velocity(self, dt: float, limits: JointLimits) -> tuple[Tensor, Tensor | None]:
        return self.speed, None

    def measure(
        self, frame: Tensor, prediction: PredictedState, limits: JointLimits, *flows: Flow
    ) -> Measurement | None:
        reading = self.readings[len(self.predictions)]
        self.predictions.append(prediction)
        if reading is None:
            return None
        maneuver = torch.tensor([len(self.predictions) in self.maneuvers, *[False] * (N - 1)])
        one = torch.ones(()).double()
        return Measurement(*reading, 0 * one, one, torch.ones(N, dtype=torch.bool), maneuver, self.valid)

    def accept(self, q: Tensor) -> None:
        self.accepted.append(q)

    def correct(self, q: Tensor) -> None:
        self.corrected.append(q)

    def inflate(self, covariance: Tensor) -> Tensor:
        return 4 * covariance


def limits(upper: float = 10.0, velocity: float = math.inf) -> JointLimits:
    one = torch.ones(N).double()
    return JointLimits(-upper * one, upper * one, velocity * one, one)


def tracker_of(model: GivenMeasurements, *, joint_limits: JointLimits | None = None, keep_history: bool = False,
               q0: Tensor | None = None) -> Tracker:  # fmt: skip
    assert isinstance(model, MeasurementModel)
    tracker = Tracker(model, joint_limits or limits(), keep_history=keep_history)
    tracker.start(FRAME, torch.zeros(N).double() if q0 is None and model.first is None else q0)
    return tracker


def track(tracker: Tracker, count: int, dt: float = DT) -> list[TrackedStep]:
    return [tracker.step(FRAME, dt) for _ in range(count)]


def stacked(steps: Sequence[TrackedStep], name: str) -> Tensor:
    return torch.stack([getattr(s, name) for s in steps])


# ---- the filter ------------------------------------------------------------------------------------------------------


def test_exact_steps_of_constant_velocity_add_up() -> None:
    step = vector(0.03, -0.02)
    model = GivenMeasurements([(gaussian(step, 1e-7), None)] * 20)
    steps = track(tracker_of(model), 20)
    torch.testing.assert_close(stacked(steps, "delta_q"), step.expand(20, -1), rtol=0, atol=1e-8)
    torch.testing.assert_close(steps[-1].position, 20 * step, rtol=0, atol=1e-8)
    assert all(s.valid and s.accepted for s in steps)
    torch.testing.assert_close(stacked(steps, "position"), torch.stack(model.accepted))


def test_a_moving_joint_is_predicted_to_keep_moving_and_a_resting_one_to_rest() -> None:
    step, options = vector(0.06, 0.0), FilterOptions(process_noise_window=2.0)
    model = GivenMeasurements([(gaussian(step, 1e-6), None)] * 8, options)
    track(tracker_of(model), 8)
    assert not model.predictions[0].step.mean.any()
    decay = math.exp(-DT / options.velocity_time_constant)
    last = model.predictions[-1]
    torch.testing.assert_close(last.step.mean, decay * step, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(last.q, 7 * step + decay * step, rtol=1e-4, atol=1e-7)
    std, first = (x.step.covariance.diagonal().sqrt() for x in (last, model.predictions[0]))
    assert float(std[0]) > 1.5 * float(std[1])  # the joint that moves is less certain
    assert float(std[1]) < 0.5 * float(first[1])
    assert last.dt == DT


def test_measured_positions_bound_the_drift_of_steps() -> None:
    truth = vector(0.03, -0.02)
    biased = gaussian(truth + 0.01, 0.01)
    free = track(tracker_of(GivenMeasurements([(biased, None)] * 40)), 40)
    held = track(tracker_of(GivenMeasurements([(biased, gaussian(k * truth, 0.01)) for k in range(1, 41)])), 40)
    error = [float((s[-1].position - 40 * truth).abs().max()) for s in (free, held)]
    assert error[0] > 0.3 and error[1] < 0.03
    assert (held[-1].position_covariance.diagonal() < free[-1].position_covariance.diagonal()).all()


@pytest.mark.parametrize("at_once", [False, True])
def test_a_joint_in_a_maneuver_is_followed_at_once(at_once: bool) -> None:
    rest, jump = gaussian(vector(0.0, 0.0), 1e-3), gaussian(vector(0.3, 0.3), 0.03)
    model = GivenMeasurements(
        [(rest, None)] * 30 + [(jump, None)] + [(rest, None)] * 2, maneuvers=frozenset({31} if at_once else ())
    )
    steps = track(tracker_of(model, keep_history=True), 33)
    first, second = (steps[30].delta_q / 0.3).tolist()
    assert first > 0.95 if at_once else first < 0.5  # otherwise the resting joint is expected to go on resting
    assert second < 0.5
    assert float(steps[32].delta_q[0]) < 0.03  # and when it stops, the measurements say so


def test_the_covariance_of_a_step_is_inflated_by_the_model() -> None:
    model = GivenMeasurements([(gaussian(vector(0.0, 0.0), 1e-3), None)])
    (step,) = track(tracker_of(model), 1)
    torch.testing.assert_close(step.covariance.diagonal(), torch.full((N,), 4e-6).double(), rtol=0.01, atol=0)


def test_without_q0_the_model_gives_the_first_pose() -> None:
    first = gaussian(vector(0.3, -0.4), 0.05)
    tracker = tracker_of(GivenMeasurements([(gaussian(vector(0.0, 0.0), 1e-6), None)], first=first))
    assert torch.equal(tracker.q, first.mean) and torch.equal(tracker.position_covariance, first.covariance)
    (step,) = track(tracker, 1)
    torch.testing.assert_close(step.position_covariance, first.covariance, rtol=1e-3, atol=1e-9)


def test_positions_do_not_depend_on_the_frame_rate() -> None:
    readings = [(gaussian(vector(0.02 * k, -0.01), 0.01), gaussian(vector(0.1 * k, 0.0), 0.05)) for k in range(8)]
    tracked = []
    for dt in (DT, 8 * DT):
        options = FilterOptions(velocity_time_constant=8 * dt)
        model = GivenMeasurements(readings, options, speed=vector(0.05, 0.05) / dt)
        tracked.append(stacked(track(tracker_of(model), 8, dt), "position"))
    torch.testing.assert_close(tracked[0], tracked[1])


# ---- frames without a measurement ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_model", [True, False])
def test_a_gap_holds_the_pose_and_the_next_measurement_spans_it(by_model: bool) -> None:
    """A frame is left out by the caller (`skip`), or by the model, which finds nothing to measure."""
    step, joint_limits = vector(0.03, -0.02), limits(velocity=2.0)
    spanning = [(gaussian(k * step, 1e-7), None) for k in (1, 1, 3, 1)]
    model = GivenMeasurements([*spanning[:2], *([None, None] if by_model else []), *spanning[2:]])
    tracker = tracker_of(model, joint_limits=joint_limits)
    steps = track(tracker, 2)
    steps += track(tracker, 2) if by_model else [tracker.skip(DT), tracker.skip(DT)]
    steps += track(tracker, 2)
    assert [s.accepted for s in steps] == [True, True, False, False, True, True]
    assert [s.valid for s in steps] == [True, True, False, False, False, True]
    for k, held in enumerate(steps[2:4], 1):
        assert torch.equal(held.position, steps[1].position)
        assert not held.delta_q.any() and not held.observable.any()
        torch.testing.assert_close(held.covariance, torch.diag(joint_limits.max_step(DT) ** 2))
        expected = steps[1].position_covariance + torch.diag(joint_limits.max_step(k * DT) ** 2)
        torch.testing.assert_close(held.position_covariance, expected)
    assert not steps[4].delta_q.any()  # motion over three intervals is not the step of one
    torch.testing.assert_close(steps[4].position, 5 * step, rtol=0, atol=1e-8)
    torch.testing.assert_close(steps[5].delta_q, step, rtol=0, atol=1e-8)
    assert len(model.accepted) == 4 and model.predictions[-2].dt == 3 * DT


def test_a_step_that_is_not_valid_is_reported_as_zero_but_moves_the_pose() -> None:
    step = vector(0.03, -0.02)
    (tracked,) = track(tracker_of(GivenMeasurements([(gaussian(step, 1e-7), None)], valid=False)), 1)
    assert tracked.accepted and not tracked.valid and not tracked.delta_q.any()
    torch.testing.assert_close(tracked.position, step, rtol=0, atol=1e-8)


# ---- corrections -----------------------------------------------------------------------------------------------------


def test_a_correction_moves_the_pose_by_its_std() -> None:
    still, truth = [(gaussian(vector(0.0, 0.0), 0.01), None)] * 3, vector(0.1, -0.1)
    for std, share in ((1e-6, 1.0), (None, 0.5)):
        model = GivenMeasurements(still, FIXED_NOISE)
        tracker = tracker_of(model)
        track(tracker, 2)
        before = tracker.position_covariance.diagonal()
        tracker.correct(truth, std or float(before[0].sqrt()))  # as certain as the pose
        torch.testing.assert_close(tracker.q, share * truth, rtol=1e-3, atol=1e-6)
        assert torch.equal(model.corrected[-1], tracker.q)
        assert (tracker.position_covariance.diagonal() <= share * before * 1.001).all()
        torch.testing.assert_close(track(tracker, 1)[0].position, tracker.q)


def test_a_correction_before_the_second_frame_replaces_the_first_pose() -> None:
    model = GivenMeasurements([(gaussian(vector(0.01, 0.0), 1e-7), None)], first=gaussian(vector(0.3, 0.3), 0.5))
    tracker = tracker_of(model)
    tracker.correct(vector(0.1, 0.2), 0.01)
    torch.testing.assert_close(tracker.q, vector(0.1, 0.2))
    torch.testing.assert_close(tracker.position_covariance, 1e-4 * torch.eye(N).double())
    (step,) = track(tracker, 1)
    torch.testing.assert_close(step.position, vector(0.11, 0.2), rtol=0, atol=1e-6)


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_positions_and_speeds_stay_inside_the_limits(sign: float) -> None:
    wild = [(gaussian(sign * vector(0.5, 7.0), 1e-3), gaussian(sign * vector(9.0, 2.0), 0.1))] * 12
    joint_limits = limits(0.8, velocity=2.0)
    model = GivenMeasurements(wild, FilterOptions(gate=None))
    steps = track(tracker_of(model, joint_limits=joint_limits, keep_history=True), 12)
    position, delta_q = stacked(steps, "position"), stacked(steps, "delta_q")
    assert position.abs().max() <= 0.8 and (position[:-1] + delta_q[1:]).abs().max() <= 0.8 + 1e-12
    assert delta_q.abs().max() <= 2.0 * DT + 1e-12
    assert float(steps[-1].position.abs().min()) == pytest.approx(0.8)
    for prediction in model.predictions:
        lower, upper = prediction.bounds
        assert (lower >= -0.8).all() and (upper <= 0.8).all() and (prediction.q.abs() <= 0.8).all()
        assert (upper - lower <= 2 * 2.0 * DT + 1e-12).all()


@pytest.mark.parametrize("first_std", [0.5, 1e-3])
def test_smoothed_positions_and_speeds_stay_inside_the_limits(first_std: float) -> None:
    """A last position far off pulls all earlier ones out if the first is uncertain; if not, it needs a large velocity."""
    sign = 1 if first_std > 0.1 else -1
    inward, start = (gaussian(vector(-0.01, 0.01), 1e-3), None), gaussian(vector(0.7, -0.7), first_std)
    far = (gaussian(vector(-0.01, 0.01), 1e-3 if sign > 0 else 1.0), gaussian(sign * vector(9.0, -9.0), 1e-3))
    model = GivenMeasurements([inward] * 6 + [far], FilterOptions(gate=None), first=start)
    tracker = tracker_of(model, joint_limits=limits(0.7, velocity=2.0), keep_history=True)
    smoothed = tracker.smooth(track(tracker, 7))
    assert stacked(smoothed, "position").abs().max() <= 0.7
    assert stacked(smoothed, "delta_q").abs().max() <= 2.0 * DT + 1e-12


def test_a_first_pose_outside_the_limits_is_accepted_and_may_only_move_back() -> None:
    readings = [(gaussian(vector(step, 0.0), 1e-7), None) for step in (0.1, -0.1, 0.1)]
    tracker = tracker_of(GivenMeasurements(readings), joint_limits=limits(0.8), q0=vector(1.0, 0.0))
    steps = track(tracker, 3)
    torch.testing.assert_close(stacked(steps, "position")[:, 0], vector(1.0, 0.9, 0.9), rtol=0, atol=1e-6)


def test_a_joint_without_speed_limit_moves_at_most_a_quarter_of_its_scale() -> None:
    unlimited = JointLimits(vector(-1.0, 0.0), vector(1.0, 1.0), vector(math.inf, 2.0), vector(1.0, 0.1))
    torch.testing.assert_close(unlimited.max_step(0.1), vector(0.25, 0.2))


# ---- gates -----------------------------------------------------------------------------------------------------------


def test_a_gate_rejects_positions_and_reduces_steps_that_are_implausible() -> None:
    still = (gaussian(vector(0.0, 0.0), 0.003), None)
    outlier = (gaussian(vector(0.5, 0.0), 0.02), gaussian(vector(3.0, 0.0), 0.02))
    moved = {}
    for name, gate in (("gated", 4.0), ("open", None)):
        model = GivenMeasurements([*[still] * 30, outlier], FilterOptions(gate=gate))
        moved[name] = float(track(tracker_of(model), 31)[-1].position[0])
    assert abs(moved["gated"]) < 0.05 < 0.3 < moved["open"]


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("history", [False, True])
def test_measured_steps_are_kept_for_smoothing_where_their_errors_are_independent(
    independent: bool, history: bool
) -> None:
    model = GivenMeasurements([(gaussian(vector(0.3, -0.01), 0.01), None)] * 3, independent_errors=independent)
    for step in track(tracker_of(model, joint_limits=limits(velocity=2.0), keep_history=history), 3):
        assert (step.measured is not None) == (independent and history)
        if step.measured is not None:  # within the speed limit
            assert torch.allclose(step.measured.mean, vector(2.0 * DT, -0.01))
            assert torch.equal(step.measured.covariance, model.readings[0][0].covariance)


# ---- smoothing against dense least squares ---------------------------------------------------------------------------


@dataclass
class BatchProblem:
    """The linear-Gaussian problem that filter and smoother solve, as one dense weighted least-squares problem.

    Unknowns: q_0 and v_0 .. v_T; position t is q_0 plus the sum of the velocities times their intervals.
    """

    q0: Gaussian
    speed: Tensor
    time_constant: float
    intervals: Sequence[float]

    def __post_init__(self) -> None:
        self.rows: list[Tensor] = []
        self.values: list[Tensor] = []
        self.information: list[Tensor] = []
        self.observe(self.position(0), self.q0)
        self.observe(self.velocity(0), Gaussian(torch.zeros(N).double(), torch.diag(self.speed**2)))
        for t, dt in enumerate(self.intervals, 1):
            decay = math.exp(-dt / self.time_constant)
            noise = (1 - decay**2) * torch.diag(self.speed**2)
            change = self.velocity(t) - decay * self.velocity(t - 1)
            self.observe(change, Gaussian(torch.zeros(N).double(), noise))

    def velocity(self, t: int) -> Tensor:
        block = torch.zeros(N, (len(self.intervals) + 2) * N).double()
        block[:, (t + 1) * N : (t + 2) * N] = torch.eye(N)
        return block

    def step(self, t: int) -> Tensor:
        return self.intervals[t - 1] * self.velocity(t)

    def position(self, t: int) -> Tensor:
        start = torch.zeros(N, (len(self.intervals) + 2) * N).double()
        start[:, :N] = torch.eye(N)
        return start + sum(self.step(s) for s in range(1, t + 1))

    def observe(self, row: Tensor, value: Gaussian) -> None:
        self.rows.append(row), self.values.append(value.mean), self.information.append(value.covariance.inverse())

    def solve(self) -> tuple[Tensor, Tensor]:
        root = torch.linalg.cholesky(torch.block_diag(*self.information)).mT
        A, b = root @ torch.cat(self.rows), root @ torch.cat(self.values)
        return torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0], torch.linalg.inv(A.mT @ A)


@pytest.mark.parametrize("correct_after", [None, 0, 4, 7])
def test_filtered_and_smoothed_steps_solve_the_dense_least_squares_problem(correct_after: int | None) -> None:
    """With a skipped frame, and with positions that the robot reported after some frame."""
    random, T = torch.Generator().manual_seed(0), 7
    speed, options = vector(0.7, 0.2), FIXED_NOISE

    def draw(scale: float) -> Tensor:
        return scale * torch.randn(N, generator=random, dtype=torch.float64)

    def spd(scale: float) -> Tensor:
        root = torch.randn(N, N, generator=random, dtype=torch.float64)
        return scale**2 * (root @ root.mT + 0.1 * torch.eye(N).double())

    first = Gaussian(draw(0.3), spd(0.1))
    intervals = [DT, DT, 2 * DT, DT, DT, DT, DT]  # a frame is skipped before the third measurement
    readings = [(Gaussian(draw(0.05), spd(0.02)), Gaussian(draw(0.2), spd(0.1)) if t % 2 else None) for t in range(T)]
    reported, std = draw(0.2), 0.03
    problem = BatchProblem(first, speed, options.velocity_time_constant, intervals)
    tracker = tracker_of(GivenMeasurements(readings, options, speed, first=first), keep_history=True)
    if correct_after == 0:  # replaces the first pose
        tracker.correct(reported, std)
        problem = BatchProblem(gaussian(reported, std), speed, options.velocity_time_constant, intervals)
    steps: list[TrackedStep] = []
    filtered: list[tuple[Tensor, Tensor]] = []
    for t, (step, position) in enumerate(readings, 1):
        if t == 3:
            steps.append(tracker.skip(DT))
        steps.append(tracker.step(FRAME, DT))
        problem.observe(problem.step(t), step)
        if position is not None:
            problem.observe(problem.position(t), position)
        filtered.append(problem.solve())
        if t == correct_after:
            tracker.correct(reported, std)
            problem.observe(problem.position(t), gaussian(reported, std))
    measured = [s for s in steps if s.accepted]
    smoothed = [s for s in tracker.smooth(steps) if s.accepted]
    final = problem.solve()
    for t in range(1, T + 1):
        for tracked, (mean, covariance) in ((measured[t - 1], filtered[t - 1]), (smoothed[t - 1], final)):
            row, step_row = problem.position(t), problem.step(t)
            torch.testing.assert_close(tracked.position, row @ mean, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(tracked.position_covariance, row @ covariance @ row.mT, rtol=1e-6, atol=1e-12)
            inflated = 4 * step_row @ covariance @ step_row.mT
            torch.testing.assert_close(tracked.covariance, inflated, rtol=1e-6, atol=1e-12)
            if tracked.valid:
                torch.testing.assert_close(tracked.delta_q, step_row @ mean, rtol=1e-6, atol=1e-9)
            else:
                assert t == 3 and not tracked.delta_q.any()


def test_smoothing_needs_history() -> None:
    model = GivenMeasurements([(gaussian(vector(0.1, 0.1), 0.01), None)] * 3)
    tracker = tracker_of(model)
    steps = track(tracker, 3)
    assert tracker.smooth(steps) == steps
