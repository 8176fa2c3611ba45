"""Laws of the limited spline: whatever is asked, no limit is exceeded at any instant, and what can be followed is."""

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


def _limits(n: int = 2, **given: float) -> MotionLimits:
    values = {"lower": -1.0, "upper": 1.0, "velocity": 2.0, "acceleration": 5.0, "jerk": 60.0, **given}
    return MotionLimits(**{name: np.full(n, value) for name, value in values.items()})


def _steered(spline: LimitedSpline, paths: np.ndarray, weight: float = 1.0) -> np.ndarray:
    """Positions FINE times a knot while the path jumps to each of these in turn, 5 knots each."""
    seen = []
    for wanted in paths:
        spline.replan(np.tile(wanted, (len(spline.planned_times), 1)), np.full(len(spline.planned_times), weight))
        for _ in range(5):
            seen.append(spline.at(spline.time + KNOT * np.arange(FINE) / FINE).position)
            spline.advance()
    return np.concatenate(seen)


def _exceeded(q: np.ndarray, limits: MotionLimits, dt: float) -> float:
    """The largest share of a limit that is used, by differences of positions; above 1 is too much."""
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
    paths = rng.uniform(low - 0.3, high + 0.3, (40, robot.n))
    q = _steered(LimitedSpline(limits, robot.home, knot=KNOT), paths)
    assert np.abs(np.diff(q, axis=0)).max() > 1e-3
    assert _exceeded(q, limits, KNOT / FINE) <= 1


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
        _limits(velocity=velocity, acceleration=acceleration, jerk=jerk, upper=reach), lower=np.array([-reach, -3.0])
    )
    rng = np.random.default_rng(seed)
    start = rng.uniform(-0.5, 0.5, 2).clip(limits.lower, limits.upper)
    q = _steered(LimitedSpline(limits, start, knot=KNOT), rng.uniform(-2, 2, (12, 2)), weight)
    assert np.isfinite(q).all()
    assert _exceeded(q, limits, KNOT / FINE) <= 1 + 1e-6  # of a jerk of 5 over (2 ms)^3, rounding is that much


def test_the_judge_of_these_tests_can_fail() -> None:
    limits = _limits()
    t = np.arange(0, 1, 0.002)[:, None]
    assert _exceeded(np.repeat(0.1 * np.sin(5 * t), 2, 1), limits, 0.002) < 1
    for wrong in (1.05 * np.sin(t + 0.8), 0.9 * np.sin(5 * t), 0.1 * np.sin(9 * t)):
        assert _exceeded(np.repeat(wrong, 2, 1), limits, 0.002) > 1


def test_what_its_instants_tell_are_each_others_derivatives() -> None:
    spline = LimitedSpline(_limits(), [0.0, 0.3], knot=KNOT)
    _steered(spline, np.random.default_rng(1).uniform(-1, 1, (3, 2)))
    at = np.linspace(spline.time, spline.time + 0.3, 3001)
    motion = spline.at(at)
    for value, slope in ((motion.position, motion.velocity), (motion.velocity, motion.acceleration)):
        np.testing.assert_allclose(np.gradient(value, at, axis=0)[1:-1], slope[1:-1], atol=1e-2)


def test_a_path_that_keeps_the_limits_is_followed() -> None:
    spline = LimitedSpline(_limits(), [0.0, 0.0], knot=KNOT)
    off = []
    for _ in range(100):
        t = spline.planned_times[:, None]
        spline.replan(np.repeat(0.3 * (1 - np.cos(2 * t)), 2, 1), np.ones(len(t)))
        off.append(spline.at(spline.time).position[0] - 0.3 * (1 - np.cos(2 * spline.time)))
        spline.advance()
    assert np.abs(off).max() < 2e-3


def test_at_the_bandwidth_half_the_amplitude_is_left() -> None:
    free = MotionLimits(*(np.full(1, x) for x in (-math.inf, math.inf, math.inf, math.inf, math.inf)))
    spline = LimitedSpline(free, [0.0], knot=KNOT, bandwidth=3.0, horizon=2.0)
    q = []
    for _ in range(200):
        t = spline.planned_times[:, None]
        spline.replan(np.sin(2 * np.pi * 3.0 * t), np.ones(len(t)))
        q.append(spline.at(spline.time).position[0, 0])
        spline.advance()
    assert np.ptp(q[100:]) / 2 == pytest.approx(0.5, abs=0.1)


def test_left_alone_it_comes_to_rest_and_stays() -> None:
    spline = LimitedSpline(_limits(), [0.0, 0.0], knot=KNOT, horizon=0.8)
    _steered(spline, np.array([[1.0, -1.0]] * 3))
    assert np.abs(spline.at(spline.time).velocity).max() > 0.5
    spline.advance(41)
    rest = spline.at(spline.time)
    assert np.array_equal(rest.velocity, 0 * rest.velocity) and np.array_equal(rest.acceleration, 0 * rest.velocity)
    spline.advance(100)
    assert np.array_equal(spline.at(spline.time + 3.0).position, rest.position)


def test_from_outside_its_range_a_joint_comes_back_in() -> None:
    limits = _limits()
    q = _steered(LimitedSpline(limits, [1.4, -1.2], knot=KNOT), np.array([[2.0, -2.0]] * 20))
    np.testing.assert_allclose(q[0], [1.4, -1.2])
    out = np.abs(q)
    assert (out <= out[0] + 1e-9).all() and (np.diff(out, axis=0)[out[1:] > 1.01] <= 1e-9).all()
    np.testing.assert_allclose(q[-1], [1.0, -1.0], atol=1e-3)


def test_moving_it_by_something_changes_where_it_is_and_not_how_it_moves() -> None:
    spline = LimitedSpline(_limits(), [0.0, 0.0], knot=KNOT)
    _steered(spline, np.array([[0.5, -0.4]] * 2))
    before = spline.at(spline.time + 0.1)
    spline.shift([0.05, -0.02])
    after = spline.at(spline.time + 0.1)
    np.testing.assert_allclose(after.position - before.position, [[0.05, -0.02]])
    np.testing.assert_allclose(after.velocity, before.velocity, atol=1e-12)


def test_what_is_fixed_stays() -> None:
    spline = LimitedSpline(_limits(), [0.0, 0.0], knot=KNOT)
    _steered(spline, np.array([[0.5, -0.4]] * 2))
    at = np.linspace(spline.time - KNOT, spline.time, 7)
    before = spline.at(at)
    spline.replan(np.full((len(spline.planned_times), 2), -1.0), np.ones(len(spline.planned_times)))
    for name in ("position", "velocity", "acceleration"):
        assert np.array_equal(getattr(spline.at(at), name), getattr(before, name))


@pytest.mark.parametrize(
    ("path", "weight", "words"),
    [
        ((3, 2), (3,), "path must be"),
        (None, None, "finite"),
    ],
)
def test_a_path_that_is_none_is_refused(path: object, weight: object, words: str) -> None:
    spline = LimitedSpline(_limits(), [0.0, 0.0], knot=KNOT)
    m = len(spline.planned_times)
    before = spline.at(spline.planned_times).position
    with pytest.raises(InputError, match=words):
        spline.replan(np.zeros(path) if path else np.full((m, 2), np.nan), np.ones(weight or m))  # type: ignore[call-overload]
    assert np.array_equal(spline.at(spline.planned_times).position, before)


def test_the_past_is_gone() -> None:
    spline = LimitedSpline(_limits(), [0.0, 0.0], knot=KNOT)
    spline.advance(10)
    spline.at(spline.time - KNOT)
    with pytest.raises(InputError, match="known from"):
        spline.at(spline.time - 1.1 * KNOT)


@pytest.mark.parametrize(
    "wrong", [{"q": [0.0]}, {"q": [0.0, np.nan]}, {"knot": 0.0}, {"ahead": 0.01}, {"bandwidth": -1.0}]
)
def test_wrong_beginnings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        LimitedSpline(_limits(), **{"q": [0.0, 0.0], "knot": KNOT, **wrong})  # type: ignore[arg-type]


def test_wrong_limits_are_refused() -> None:
    for wrong in ({"lower": 2.0}, {"velocity": 0.0}, {"jerk": math.nan}, {"upper": math.nan}):
        with pytest.raises(InputError):
            _limits(**wrong)
    with pytest.raises(InputError, match="share"):
        MotionLimits.from_embodiment(load_embodiment("panda"), scale=1.5)
    half = MotionLimits.from_embodiment(load_embodiment("panda"), scale=0.5)
    np.testing.assert_allclose(half.velocity, load_embodiment("panda").velocity / 2)
