"""Laws of the limited spline: no reference makes it exceed a limit at any instant, and a feasible reference is followed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jidm import embodiment_names, load_embodiment
from jidm.control import LimitedSpline, MotionLimits
from jidm.errors import InputError

KNOT, FINE = 0.02, 10


def limited_spline(
    limits: MotionLimits, q: object, *, knot: float = KNOT, horizon: float = 0.8, bandwidth: float = 4.0
) -> LimitedSpline:
    return LimitedSpline(limits, q, knot=knot, horizon=horizon, bandwidth=bandwidth)  # type: ignore[arg-type]


def limits_of(n: int = 2, **given: float) -> MotionLimits:
    values = {"lower": -1.0, "upper": 1.0, "velocity": 2.0, "acceleration": 5.0, "jerk": 60.0, **given}
    return MotionLimits(**{name: np.full(n, value) for name, value in values.items()})


def follow(spline: LimitedSpline, targets: np.ndarray, weight: float = 1.0) -> np.ndarray:
    """Positions sampled FINE times per knot while the reference jumps to each target in turn, 5 knots each."""
    sampled = []
    for target in targets:
        spline.replan(np.tile(target, (len(spline.planned_times), 1)), np.full(len(spline.planned_times), weight))
        for _ in range(5):
            sampled.append(spline.at(spline.time + KNOT * np.arange(FINE) / FINE).position)
            spline.advance()
    return np.concatenate(sampled)


def limit_usage(q: np.ndarray, limits: MotionLimits, dt: float) -> float:
    """Largest fraction of a limit that finite differences of the positions reach; above 1 a limit is exceeded."""
    worst = 0.0
    for order, limit in enumerate((limits.velocity, limits.acceleration, limits.jerk), start=1):
        worst = max(worst, float((np.abs(np.diff(q, order, axis=0)) / dt**order / limit).max()))
    span = limits.upper - limits.lower
    out = np.maximum(limits.lower - q, q - limits.upper)
    return max(worst, 1 + float(np.nan_to_num(out / np.where(np.isfinite(span), span, 1.0), neginf=-1.0).max()))


@pytest.mark.parametrize("name", embodiment_names())
def test_no_limit_of_any_robot_is_exceeded(name: str) -> None:
    robot = load_embodiment(name)
    limits = MotionLimits.from_embodiment(robot)
    rng = np.random.default_rng(0)
    low, high = np.nan_to_num(robot.lower, neginf=-3.0), np.nan_to_num(robot.upper, posinf=3.0)
    targets = rng.uniform(low - 0.3, high + 0.3, (40, robot.n))
    q = follow(limited_spline(limits, robot.home), targets)
    assert np.abs(np.diff(q, axis=0)).max() > 1e-3
    assert limit_usage(q, limits, KNOT / FINE) <= 1


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    velocity=st.floats(0.1, 50) | st.just(math.inf),
    acceleration=st.floats(0.5, 200) | st.just(math.inf),
    jerk=st.floats(5.0, 1e5) | st.just(math.inf),
    reach=st.floats(0.01, 10) | st.just(math.inf),
    weight=st.floats(0, 1),
)
def test_no_limit_is_exceeded(
    seed: int, velocity: float, acceleration: float, jerk: float, reach: float, weight: float
) -> None:
    limits = replace(
        limits_of(velocity=velocity, acceleration=acceleration, jerk=jerk, upper=reach), lower=np.array([-reach, -3.0])
    )
    rng = np.random.default_rng(seed)
    start = rng.uniform(-0.5, 0.5, 2).clip(limits.lower, limits.upper)
    q = follow(limited_spline(limits, start), rng.uniform(-2, 2, (12, 2)), weight)
    assert np.isfinite(q).all()
    assert limit_usage(q, limits, KNOT / FINE) <= 1 + 1e-6  # rounding of a jerk of 5 over (2 ms)^3


def test_the_check_of_these_tests_can_fail() -> None:
    limits = limits_of()
    t = np.arange(0, 1, 0.002)[:, None]
    assert limit_usage(np.repeat(0.1 * np.sin(5 * t), 2, 1), limits, 0.002) < 1
    for wrong in (1.05 * np.sin(t + 0.8), 0.9 * np.sin(5 * t), 0.1 * np.sin(9 * t)):
        assert limit_usage(np.repeat(wrong, 2, 1), limits, 0.002) > 1


def test_velocity_and_acceleration_are_derivatives() -> None:
    spline = limited_spline(limits_of(), [0.0, 0.3])
    follow(spline, np.random.default_rng(1).uniform(-1, 1, (3, 2)))
    at = np.linspace(spline.time, spline.time + 0.3, 3001)
    motion = spline.at(at)
    for value, slope in ((motion.position, motion.velocity), (motion.velocity, motion.acceleration)):
        np.testing.assert_allclose(np.gradient(value, at, axis=0)[1:-1], slope[1:-1], atol=1e-2)


def test_a_feasible_reference_is_followed() -> None:
    spline = limited_spline(limits_of(), [0.0, 0.0])
    off = []
    for _ in range(100):
        t = spline.planned_times[:, None]
        spline.replan(np.repeat(0.3 * (1 - np.cos(2 * t)), 2, 1), np.ones(len(t)))
        off.append(spline.at(spline.time).position[0] - 0.3 * (1 - np.cos(2 * spline.time)))
        spline.advance()
    assert np.abs(off).max() < 2e-3


def test_half_the_amplitude_is_left_at_the_bandwidth() -> None:
    free = MotionLimits(*(np.full(1, x) for x in (-math.inf, math.inf, math.inf, math.inf, math.inf)))
    spline = limited_spline(free, [0.0], bandwidth=3.0, horizon=2.0)
    q = []
    for _ in range(200):
        t = spline.planned_times[:, None]
        spline.replan(np.sin(2 * np.pi * 3.0 * t), np.ones(len(t)))
        q.append(spline.at(spline.time).position[0, 0])
        spline.advance()
    assert np.ptp(q[100:]) / 2 == pytest.approx(0.5, abs=0.1)


def test_it_comes_to_rest_without_a_new_reference() -> None:
    spline = limited_spline(limits_of(), [0.0, 0.0], horizon=0.8)
    follow(spline, np.array([[1.0, -1.0]] * 3))
    assert np.abs(spline.at(spline.time).velocity).max() > 0.5
    spline.advance(41)
    rest = spline.at(spline.time)
    assert np.array_equal(rest.velocity, 0 * rest.velocity) and np.array_equal(rest.acceleration, 0 * rest.velocity)
    spline.advance(100)
    assert np.array_equal(spline.at(spline.time + 3.0).position, rest.position)


def test_the_motion_beyond_a_plan_is_the_one_that_is_fixed_there() -> None:
    """A frame period may be longer than the horizon; at 1 kHz a step of 1e-12 rad is a jerk of .001 rad/s^3."""
    spline, rng = limited_spline(limits_of(), [0.0, 0.0], horizon=0.16), np.random.default_rng(0)
    for _ in range(200):
        spline.replan(np.tile(rng.uniform(-1, 1, 2), (8, 1)), np.full(8, rng.choice([1, 0.02])))
        at = spline.time + 0.2 - KNOT + np.arange(0.0, KNOT, 0.001)
        before = spline.at(at).position
        spline.advance(10)
        np.testing.assert_allclose(spline.at(at).position, before, rtol=0, atol=1e-15)


def test_a_joint_that_starts_outside_its_range_returns_into_it() -> None:
    limits = limits_of()
    q = follow(limited_spline(limits, [1.4, -1.2]), np.array([[2.0, -2.0]] * 20))
    np.testing.assert_allclose(q[0], [1.4, -1.2])
    out = np.abs(q)
    assert (out <= out[0] + 1e-9).all() and (np.diff(out, axis=0)[out[1:] > 1.01] <= 1e-9).all()
    np.testing.assert_allclose(q[-1], [1.0, -1.0], atol=1e-3)


def test_a_shift_changes_positions_and_no_velocities() -> None:
    spline = limited_spline(limits_of(), [0.0, 0.0])
    follow(spline, np.array([[0.5, -0.4]] * 2))
    before = spline.at(spline.time + 0.1)
    spline.shift([0.05, -0.02])
    after = spline.at(spline.time + 0.1)
    np.testing.assert_allclose(after.position - before.position, [[0.05, -0.02]])
    np.testing.assert_allclose(after.velocity, before.velocity, atol=1e-12)


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_no_shift_leads_a_moving_joint_out_of_its_range(direction: float) -> None:
    """The motion on its way from one end must not be moved to where it comes from."""
    spline = limited_spline(limits_of(), [-0.9 * direction, 0.0])
    follow(spline, np.array([[0.9 * direction, 0.0]] * 2))
    assert spline.shift([-3.0 * direction, 0.0])[0] * direction < -0.1
    at = np.linspace(spline.time - KNOT, spline.time + 0.8, 200)
    assert np.abs(spline.at(at).position[:, 0]).max() <= 1 + 1e-9


def test_replanning_keeps_the_fixed_part() -> None:
    spline = limited_spline(limits_of(), [0.0, 0.0])
    follow(spline, np.array([[0.5, -0.4]] * 2))
    at = np.linspace(spline.time - KNOT, spline.time, 7)
    before = spline.at(at)
    spline.replan(np.full((len(spline.planned_times), 2), -1.0), np.ones(len(spline.planned_times)))
    for name in ("position", "velocity", "acceleration"):
        assert np.array_equal(getattr(spline.at(at), name), getattr(before, name))


@pytest.mark.parametrize(
    ("shape", "weight", "words"),
    [
        ((3, 2), (3,), "reference must be"),
        (None, None, "finite"),
    ],
)
def test_an_invalid_reference_is_refused(shape: object, weight: object, words: str) -> None:
    spline = limited_spline(limits_of(), [0.0, 0.0])
    m = len(spline.planned_times)
    before = spline.at(spline.planned_times).position
    with pytest.raises(InputError, match=words):
        spline.replan(np.zeros(shape) if shape else np.full((m, 2), np.nan), np.ones(weight or m))  # type: ignore[call-overload]
    assert np.array_equal(spline.at(spline.planned_times).position, before)


def test_the_past_cannot_be_evaluated() -> None:
    spline = limited_spline(limits_of(), [0.0, 0.0])
    spline.advance(10)
    spline.at(spline.time - KNOT)
    with pytest.raises(InputError, match="known from"):
        spline.at(spline.time - 1.1 * KNOT)


@pytest.mark.parametrize(
    "wrong", [{"q": [0.0]}, {"q": [0.0, np.nan]}, {"knot": 0.0}, {"horizon": 0.01}, {"bandwidth": -1.0}]
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        limited_spline(limits_of(), **{"q": [0.0, 0.0], "knot": KNOT, **wrong})  # type: ignore[arg-type]


def test_wrong_limits_are_refused() -> None:
    for wrong in ({"lower": 2.0}, {"velocity": 0.0}, {"jerk": math.nan}, {"upper": math.nan}):
        with pytest.raises(InputError):
            limits_of(**wrong)
    with pytest.raises(InputError, match="scale"):
        MotionLimits.from_embodiment(load_embodiment("panda"), scale=1.5)
    half = MotionLimits.from_embodiment(load_embodiment("panda"), scale=0.5)
    np.testing.assert_allclose(half.velocity, load_embodiment("panda").velocity / 2)
