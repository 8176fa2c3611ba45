"""Replaying commands: an executable motion is executed, one that is not is executed as far as limits let it."""

from __future__ import annotations

import numpy as np
import pytest

from jidm import Embodiment, load_embodiment
from jidm.errors import InputError
from jidm.sim.replay import replay

DT = 1 / 16


@pytest.fixture(scope="module")
def panda() -> Embodiment:
    return load_embodiment("panda")


def _sine(robot: Embodiment, share: float, frames: int = 33) -> np.ndarray:
    time = np.arange(frames)[:, None] * DT
    wave = 1 - np.cos(np.pi * time)  # from rest
    return robot.home + share * np.where(robot.gripper_mask, 0.0, 1 / np.pi) * wave


def test_what_the_robot_can_do_it_does(panda):
    q = _sine(panda, 0.5)
    done = replay(panda, q, DT)
    assert done.stop_frame is None
    assert np.abs(done.q - q).max() < 0.01  # commands change their pace at every frame


def test_limits_hold_whatever_is_commanded(panda):
    rng = np.random.default_rng(0)
    q = panda.home + rng.normal(0, 2.0, (20, panda.n))
    done = replay(panda, q, DT)
    assert (np.abs(np.diff(done.q, axis=0)) <= panda.velocity * DT + 1e-9).all()
    assert (done.q >= panda.lower).all() and (done.q <= panda.upper).all()
    change = np.abs(np.diff(done.q, 2, axis=0)) / DT**2
    # A mean speed over a frame and the next can change by no more than the acceleration over a frame; at the end of its
    # range a joint meets its stop.
    inside = ((done.q > panda.lower) & (done.q < panda.upper))[1:-1] & (
        (done.q > panda.lower) & (done.q < panda.upper)
    )[2:]
    assert inside.sum() > 50 and (change <= panda.acceleration * (1 + 1e-9))[inside].all()


def test_a_jump_is_not_executed_as_one(panda):
    q = np.repeat(np.array(panda.home)[None], 12, 0)
    q[5:, 0] += 1.0
    done = replay(panda, q, DT)
    assert done.q[5, 0] - done.q[4, 0] < 0.5
    assert (np.diff(done.q[:, 0]) >= -0.02).all() and done.q[-1, 0] <= q[-1, 0] + 0.02  # there, and hardly beyond


def test_it_stops_where_it_would_collide(panda):
    q = _sine(panda, 0.5)
    done = replay(panda, q, DT, is_free=lambda at: at[0] < q[20, 0])  # type: ignore[arg-type]
    assert done.stop_frame is not None
    assert (done.q[done.stop_frame :] == done.q[done.stop_frame - 1]).all()


@pytest.mark.parametrize(
    ("commands", "dt", "says"),
    [(np.zeros((4, 3)), DT, "shape"), (np.full((4, 9), np.nan), DT, "finite"), (np.zeros((4, 9)), 0.0, "positive")],
)
def test_bad_commands_are_refused(panda, commands, dt, says):
    if commands.shape[1] == 9:
        commands = np.resize(commands, (4, panda.n))
    with pytest.raises(InputError, match=says):
        replay(panda, commands, dt)
