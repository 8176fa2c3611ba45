"""Self-play motions: limits, coverage, variety, free space, rest. None of it needs the simulator."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sim_motion import Limits, check

from jidm.errors import InputError
from jidm.robot.registry import load_embodiment
from jidm.sim.babble_motion import babble_motion, minimum_jerk_motion, usable_range

SEEDS = st.integers(0, 2**31)
FINGER = load_embodiment("planar_finger_3")


@given(seed=SEEDS, speed=st.sampled_from([0.3, 1.0, 8.0]), at_rest=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_limit_holds_at_every_speed(seed: int, speed: float, at_rest: bool):
    robot = Limits()
    q = babble_motion(robot, 600, 0.02, seed, speed=speed, at_rest=at_rest)
    check(robot, q, 0.02)
    if at_rest:
        steps = np.abs(np.diff(q, axis=0))
        assert (steps[[0, -1]] <= 0.05 * steps.max(axis=0) + 1e-12).all()


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_starting_and_stopping_keeps_tight_limits(seed: int):
    """In two seconds, at an acceleration and a jerk that the waves alone would reach."""
    robot = replace(Limits(), velocity=np.full(5, 3.0), acceleration=np.full(5, 2.0), jerk=np.full(5, 6.0))
    check(robot, babble_motion(robot, 400, 0.005, seed, speed=3.0, at_rest=True), 0.005)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_what_is_not_free_is_never_entered(seed: int):
    """A wall through the middle of the range and a ball taken out of it."""

    def is_free(q: np.ndarray) -> bool:
        return bool(q[0] > 0.1 and np.linalg.norm(q - [0.6, 0.3, 0.3]) > 0.4)

    q = babble_motion(FINGER, 64, 1 / 16, seed, is_free=is_free)
    assert all(is_free(row) for row in q)
    check(FINGER, q, 1 / 16)
    assert (q == babble_motion(FINGER, 64, 1 / 16, seed, is_free=is_free)).all()


def test_motions_cover_the_range_evenly_at_many_sizes_and_some_move_one_joint():
    seeds = range(300)
    q = np.stack([babble_motion(FINGER, 64, 1 / 16, seed) for seed in seeds])
    low, high = usable_range(FINGER)
    share = (q - low) / (high - low)
    assert share.min() >= 0 and share.max() <= 1
    for joint in range(FINGER.n):
        count = np.histogram(share[..., joint], bins=10, range=(0, 1))[0]
        assert count.min() > 0.5 * count.mean()
    extent = np.ptp(q, axis=1)
    moving = (extent > 1e-6).sum(axis=1)
    assert 0.06 < (moving == 1).mean() < 0.25 and 0.6 < (moving == FINGER.n).mean() < 0.9
    size, pace = extent[extent > 1e-6], np.abs(np.diff(q, axis=1)).mean(axis=(1, 2))
    assert np.quantile(size, 0.9) > 4 * np.quantile(size, 0.1)
    assert np.quantile(pace, 0.9) > 4 * np.quantile(pace, 0.1)


def test_amplitude_narrows_the_range_about_home_and_speed_quickens():
    wide, narrow = usable_range(FINGER), usable_range(FINGER, 0.5)
    assert np.allclose(narrow[0] - FINGER.home, 0.5 * (wide[0] - FINGER.home))
    assert (wide[0] > FINGER.lower).all() and (wide[1] < FINGER.upper).all()
    for seed in range(20):
        q = babble_motion(FINGER, 64, 1 / 16, seed, range_fraction=0.5)
        assert (q >= narrow[0]).all() and (q <= narrow[1]).all()
    slow, fast = (
        np.mean([np.abs(np.diff(babble_motion(FINGER, 64, 0.02, s, speed=x), axis=0)).mean() for s in range(30)])
        for x in (0.2, 1.0)
    )
    assert 2.5 < fast / slow < 6


def test_joints_without_limits_turn_about_home():
    low, high = usable_range(Limits())
    assert low[0] == pytest.approx(0.3 - 0.95 * np.pi) and high[0] == pytest.approx(0.3 + 0.95 * np.pi)
    assert high[1] == pytest.approx(0.1925)  # nineteen twentieths of [-0.1, 0.2]; home at 0.19 is inside
    assert low[4] == high[4] == 0


def test_seeds_decide():
    a, b, c = (babble_motion(FINGER, 16, 0.1, seed) for seed in (3, 3, 4))
    assert (a == b).all() and not np.allclose(a, c)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"frames": 0}, "frames >= 1"),
        ({"dt": -1.0}, "dt > 0"),
        ({"amplitude": 1.5}, "amplitude in"),
        ({"speed": 0.0}, "speed > 0"),
        ({"is_free": lambda q: False}, "no free motion of 'planar_finger_3'"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict, words: str):
    given = {"frames": 8, "dt": 0.1} | arguments
    with pytest.raises(InputError, match=words):
        babble_motion(FINGER, seed=0, **given)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_travel_goes_from_rest_to_rest_at_a_limit(seed: int):
    rng, robot, dt = np.random.default_rng(seed), FINGER, 0.002
    start, goal = rng.uniform(robot.lower, robot.upper, (2, robot.n))
    q = minimum_jerk_motion(robot, start, goal, dt)
    check(robot, q, dt)
    assert (q[0] == start).all() and np.allclose(q[-1], goal, rtol=0, atol=1e-12)
    peaks = [
        (np.abs(np.diff(q, n=order, axis=0)) / dt**order / limit).max()
        for order, limit in ((1, robot.velocity), (2, robot.acceleration), (3, robot.jerk))
    ]
    assert 0.8 < max(peaks) <= 0.9 + 1e-6  # as fast as nine tenths of the limits allow
    assert np.allclose(q[:2], q[0], atol=1e-6)


def test_travel_refuses_outside_and_blocked():
    with pytest.raises(InputError, match="goal must be 3 joint positions"):
        minimum_jerk_motion(FINGER, FINGER.home, FINGER.upper + 1, 0.01)
    with pytest.raises(InputError, match="way from start to goal is not free"):
        minimum_jerk_motion(FINGER, FINGER.lower, FINGER.upper, 0.01, is_free=lambda q: abs(q[0]) > 0.1)
    assert len(minimum_jerk_motion(FINGER, FINGER.home, FINGER.home, 0.01)) == 2


def test_a_robot_runs_it_without_the_simulator():
    code = """
import sys
sys.modules["pybullet"] = None
from jidm.robot.embodiment import Embodiment
from jidm.robot.registry import load_embodiment
from jidm.sim.babble_motion import babble_motion
robot = load_embodiment("planar_finger_2")
print(babble_motion(robot, 500, 0.02, 1, at_rest=True, is_free=lambda q: q[0] < 0.5)[:, 0].max() < 0.5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_limits_in_use_are_those_of_the_robot():
    """A joint told to be slow is slow: the motion reads the descriptor and nothing else."""
    quick, slow = Limits(), replace(Limits(), velocity=np.full(5, 0.01))
    paces = [np.abs(np.diff(babble_motion(robot, 200, 0.05, 5), axis=0)).max() / 0.05 for robot in (quick, slow)]
    assert paces[0] > 0.1 and paces[1] <= 0.009 + 1e-9
