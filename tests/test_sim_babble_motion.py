"""Babbling motions: limits, coverage, variety, collision checks. None of it needs the simulator."""

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
from jidm.sim.babble_motion import babble_motion, usable_range

SEEDS = st.integers(0, 2**31)
FINGER = load_embodiment("planar_finger_3")


@given(seed=SEEDS, speed=st.sampled_from([0.3, 1.0, 8.0]))
@settings(max_examples=60, deadline=None)
def test_every_limit_holds_at_every_speed(seed: int, speed: float):
    robot = Limits()
    check(robot, babble_motion(robot, 600, 0.02, seed, speed=speed), 0.02)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_motions_stay_in_free_space(seed: int):
    """A wall through the middle of the range and a ball are not free."""

    def is_free(q: np.ndarray) -> bool:
        return bool(q[0] > 0.1 and np.linalg.norm(q - [0.6, 0.3, 0.3]) > 0.4)

    q = babble_motion(FINGER, 64, 1 / 16, seed, is_free=is_free)
    assert all(is_free(row) for row in q)
    check(FINGER, q, 1 / 16)
    assert (q == babble_motion(FINGER, 64, 1 / 16, seed, is_free=is_free)).all()


def test_motions_cover_the_range_evenly_at_many_amplitudes_and_some_move_one_joint():
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
    size, velocity = extent[extent > 1e-6], np.abs(np.diff(q, axis=1)).mean(axis=(1, 2))
    assert np.quantile(size, 0.9) > 4 * np.quantile(size, 0.1)
    assert np.quantile(velocity, 0.9) > 4 * np.quantile(velocity, 0.1)


def test_range_fraction_narrows_the_range_about_home_and_speed_speeds_up():
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


def test_joints_without_limits_move_half_a_turn_about_home():
    low, high = usable_range(Limits())
    assert low[0] == pytest.approx(0.3 - 0.95 * np.pi) and high[0] == pytest.approx(0.3 + 0.95 * np.pi)
    assert high[1] == pytest.approx(0.1925)  # 95 % of [-0.1, 0.2]; home at 0.19 is inside
    assert low[4] == high[4] == 0


def test_same_seed_same_motion():
    a, b, c = (babble_motion(FINGER, 16, 0.1, seed) for seed in (3, 3, 4))
    assert (a == b).all() and not np.allclose(a, c)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"frames": 0}, "frames >= 1"),
        ({"dt": -1.0}, "dt > 0"),
        ({"range_fraction": 1.5}, "range_fraction in"),
        ({"speed": 0.0}, "speed > 0"),
        ({"is_free": lambda q: False}, "no free motion of 'planar_finger_3'"),
    ],
)
def test_invalid_arguments_are_rejected(arguments: dict, words: str):
    given = {"frames": 8, "dt": 0.1} | arguments
    with pytest.raises(InputError, match=words):
        babble_motion(FINGER, seed=0, **given)


def test_motions_need_no_simulator():
    code = """
import sys
sys.modules["pybullet"] = None
from jidm.robot.registry import load_embodiment
from jidm.sim.babble_motion import babble_motion
robot = load_embodiment("planar_finger_2")
print(babble_motion(robot, 500, 0.02, 1, is_free=lambda q: q[0] < 0.5)[:, 0].max() < 0.5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_embodiments_limits_are_used():
    """A joint with a low velocity limit is slow."""
    quick, slow = Limits(), replace(Limits(), velocity=np.full(5, 0.01))
    speeds = [np.abs(np.diff(babble_motion(robot, 200, 0.05, 5), axis=0)).max() / 0.05 for robot in (quick, slow)]
    assert speeds[0] > 0.1 and speeds[1] <= 0.009 + 1e-9
