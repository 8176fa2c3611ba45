"""Hostile episodes of benchmarks/hostile.py: nothing unsafe leaves toward a robot. The check of the benchmark can fail."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("clarabel")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from hostile import outcome
from hostile_episodes import LIMITS, POSE_FAULTS, robot
from motion_check import CommandRecord

EPISODES, RATE = 240, 50.0


def test_nothing_unsafe_leaves_toward_a_robot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder, control loop and session in turn; repeat one with `--seed 1 --cost 0.05 --episode NUMBER`."""
    monkeypatch.delitem(POSE_FAULTS, "a map")  # annotations are enforced while tests run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # casts of complex and NaN frames are meant
        found = [outcome(1, number, "", 0.05) for number in range(EPISODES)]
    assert [(x["number"], x["kind"], x["violations"]) for x in found if x["violations"]] == []
    assert {x["kind"] for x in found} == {"decoder", "controller", "session"}
    assert sum(x["counts"]["commands"] for x in found) > 5000
    assert max(x["share"].get("jerk", 0.0) for x in found) > 0.9  # limits are reached


# ---- the check ------------------------------------------------------------------------------------------------------


def smooth_motion() -> np.ndarray:
    """(400, 1) from rest, inside the limits of the finger."""
    t = np.arange(1, 401)[:, None] / RATE
    return 0.3 * (1 - np.cos(0.8 * t)) * (1 - np.exp(-((t / 0.8) ** 3)))


def commands(position: np.ndarray, space: str = "joint_position", **changed: Any) -> SimpleNamespace:
    """Commands along these positions, from 0 on."""
    delta = np.diff(position, axis=0, prepend=0 * position[:1])
    values: dict[str, Any] = {
        "position": position, "delta": delta, "velocity": delta * RATE, "tracking_error": 0 * position, "gripper": position[:, :0],
        "time": np.arange(1, len(position) + 1) / RATE, "holding": np.zeros(len(position), dtype=bool), "reason": "",
    }  # fmt: skip
    values["action"] = values[
        {"joint_position": "position", "joint_delta": "delta", "joint_velocity": "velocity"}[space]
    ]
    return SimpleNamespace(**{**values, **changed})


def kinds(*messages: Any, space: str = "joint_position") -> set[str]:
    """What is broken by these messages from rest at 0."""
    limits = robot("planar_finger_1").limits
    record = CommandRecord({name: getattr(limits, name) for name in LIMITS}, RATE, space)
    record.restart(np.zeros(1))
    for message in messages:
        record.add(message)
    return {violation.kind for violation in record.finish()}


@pytest.mark.parametrize("space", ["joint_position", "joint_delta", "joint_velocity"])
def test_a_smooth_motion_passes_and_a_step_in_it_does_not(space: str) -> None:
    q = smooth_motion()
    assert kinds(commands(q, space), space=space) == set()
    limits = robot("planar_finger_1").limits
    for kind, order in (("velocity", 1), ("acceleration", 2), ("jerk", 3)):
        bump = np.zeros_like(q)
        bump[200:] = 1.01 * getattr(limits, kind)[0] / RATE**order
        for _ in range(order - 1):
            bump = np.cumsum(bump, axis=0)
        assert kind in kinds(commands(q + bump, space), space=space)
    assert "position" in kinds(commands(q * 10, space), space=space)


def test_each_broken_promise_is_seen() -> None:
    q = smooth_motion()
    holding = np.arange(len(q)) > 390
    assert kinds(commands(q, holding=holding)) == {"reason"}
    assert kinds(commands(q, holding=holding, reason="no frame came")) == set()
    assert "finite" in kinds(commands(q, gripper=q * np.nan))
    assert "consistency" in kinds(commands(q, velocity=q))
    first, last = commands(q[:200]), commands(q)
    rows = ("action", "position", "delta", "velocity", "tracking_error", "gripper", "time", "holding")
    rest = SimpleNamespace(**{**vars(last), **{name: getattr(last, name)[200:] for name in rows}})
    assert kinds(first, rest) == set()
    lost = SimpleNamespace(**{**vars(last), **{name: getattr(last, name)[230:] for name in rows}})
    assert {"continuity", "time"} <= kinds(first, lost)
    assert {"acceleration", "jerk"} <= kinds(commands(q[50:]))  # it does not begin at rest
