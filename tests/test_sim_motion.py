"""Smooth random motion keeps the robot's limits, whatever the seed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jidm.errors import InputError, MissingExtraError
from jidm.robot.embodiment import Embodiment
from jidm.robot.registry import load_embodiment
from jidm.sim.motion import random_motion

SEEDS = st.integers(0, 2**31)


@dataclass
class Limits:
    """The part of an embodiment that motions depend on, with every kind of limit: tight, loose, none."""

    name: str = "limits"
    joint_names: tuple[str, ...] = ("free", "tight", "slow", "jerky", "fixed")
    n: int = 5
    lower: np.ndarray = field(default_factory=lambda: np.array([-np.inf, -0.1, -2.0, -2.0, 0.0]))
    upper: np.ndarray = field(default_factory=lambda: np.array([np.inf, 0.2, 2.0, 2.0, 0.0]))
    velocity: np.ndarray = field(default_factory=lambda: np.array([np.inf, np.inf, 0.05, 9.0, 1.0]))
    acceleration: np.ndarray = field(default_factory=lambda: np.array([np.inf, np.inf, np.inf, 0.4, 1.0]))
    jerk: np.ndarray = field(default_factory=lambda: np.array([np.inf, np.inf, np.inf, 0.5, 1.0]))
    home: np.ndarray = field(default_factory=lambda: np.array([0.3, 0.19, 0.0, -1.9, 0.0]))
    exploration_range: np.ndarray = field(default_factory=lambda: np.array([0.5, 0.5, 0.5, 0.5, 0.5]))

    def within_limits(self, q):
        return Embodiment.within_limits(self, q)  # type: ignore[arg-type]


def check(robot, q: np.ndarray, dt: float) -> None:
    slack = 1e-9
    assert (q >= robot.lower - slack).all() and (q <= robot.upper + slack).all()
    # A difference quotient is a mean of the derivative, so it cannot exceed the derivative's bound.
    for order, limit in ((1, robot.velocity), (2, robot.acceleration), (3, robot.jerk)):
        assert (np.abs(np.diff(q, n=order, axis=0)) / dt**order <= limit + 1e-6).all()


@given(seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_limits_hold_by_construction(seed: int):
    robot = replace(Limits(), exploration_range=np.full(5, 1.5))
    check(robot, random_motion(robot, 400, 0.01, seed), 0.01)


@pytest.mark.parametrize("name", ["panda", "allegro_right"])
@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_limits_of_real_robots_hold(name: str, seed: int):
    robot = _load(name)
    q = random_motion(robot, 200, 1 / 16, seed)
    check(robot, q, 1 / 16)
    assert (np.ptp(q, axis=0) > 0.02 * robot.exploration_range).all()


@given(seed=SEEDS, share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_starts_at_the_given_position(seed: int, share: float):
    robot = Limits()
    low, high = np.maximum(robot.lower, -3), np.minimum(robot.upper, 3)
    start = low + share * (high - low)
    q = random_motion(robot, 300, 0.01, seed, start=start)
    assert np.abs(q[0] - start).max() < 1e-9
    check(robot, q, 0.01)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_motion_is_a_function_of_seed_and_time(seed: int):
    robot = Limits()
    long, short = random_motion(robot, 60, 0.1, seed), random_motion(robot, 20, 0.1, seed)
    finer = random_motion(robot, 119, 0.05, seed)
    assert (long[:20] == short).all() and np.abs(finer[::2] - long).max() < 1e-12
    assert (random_motion(robot, 20, 0.1, seed + 1) != short).any()


def test_joints_without_exploration_range_rest_at_home_or_start():
    robot = replace(Limits(), exploration_range=np.array([0.0, 0.0, 0.5, 0.0, 0.0]))
    q = random_motion(robot, 50, 0.1, 0)
    assert (np.ptp(q, axis=0) > 0).tolist() == [False, False, True, False, False]
    assert (q[:, 0] == robot.home[0]).all() and (q[:, 3] == robot.home[3]).all()
    start = np.array([1.0, 0.0, 0.5, 0.25, 0.0])
    q = random_motion(robot, 50, 0.1, 0, start=start)
    assert (q[:, [0, 1, 3, 4]] == start[[0, 1, 3, 4]]).all()


def test_exploration_range_is_nearly_reached_and_never_exceeded():
    robot = replace(Limits(), exploration_range=np.full(5, 0.1))
    deviation = np.abs(random_motion(robot, 20_000, 0.05, 1)[:, 0] - 0.3).max()
    assert 0.07 < deviation <= 0.1


def test_wrong_arguments_are_rejected():
    robot = Limits()
    with pytest.raises(InputError, match="inside the limits"):
        random_motion(robot, 5, 0.1, 0, start=np.full(5, 9.0))
    with pytest.raises(InputError, match="inside the limits"):
        random_motion(robot, 5, 0.1, 0, start=np.zeros(3))
    for wrong in ({"frames": 0}, {"dt": 0.0}, {"dt": float("nan")}):
        with pytest.raises(InputError, match="random_motion needs"):
            random_motion(robot, **{"frames": 5, "dt": 0.1, "seed": 0, **wrong})


def _load(name: str) -> Embodiment:
    try:
        return load_embodiment(name)
    except MissingExtraError as missing:
        pytest.skip(str(missing))
