"""What a robot was sent, checked by finite differences: an oracle that shares no code with the planner of the motion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

RELATIVE_TOLERANCE = 1e-6  # of each limit
ROUNDING = 16 * np.finfo(float).eps  # of a position; a difference of order k is as uncertain as this times rate**k
CONTINUITY_TOLERANCE = 1e-12  # [rad or m] between the end of a message and the begin of the next
START_TOLERANCE = 0.1  # [rad or m] by which a start may be outside its range; the way back is not a violation
_ROWS = ("action", "position", "delta", "velocity", "tracking_error", "gripper", "time", "holding")


@dataclass(frozen=True)
class Violation:
    """One broken promise: which (a short word), and the numbers."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass
class CommandRecord:
    """The commands sent to one robot, one after the other, from rest.

    Args:
        limits: `lower`, `upper`, `velocity`, `acceleration`, `jerk`, each (n,).
        rate: commands per second.
        action_space: what the actions are.
    """

    limits: Mapping[str, NDArray[np.float64]]
    rate: float
    action_space: str
    violations: list[Violation] = field(default_factory=list)
    count: int = 0
    holding: int = 0
    segments: int = 0
    largest_share: dict[str, float] = field(default_factory=dict)
    _start: NDArray[np.float64] | None = None
    _sent: list[dict[str, Any]] = field(default_factory=list)
    _shifts: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """Before which of `_sent` the robot reported this distance from its last command (largest magnitudes, (n,))."""

    def broken(self, kind: str, text: str) -> None:
        """Note a violation."""
        self.violations.append(Violation(kind, text))

    def restart(self, q: NDArray[np.float64] | None) -> None:
        """The robot is at rest at q (n,), or at rest somewhere."""
        self.finish()
        self._start = None if q is None else np.array(q, dtype=np.float64)

    def reported(self, q: NDArray[np.float64]) -> None:
        """The robot reports this pose (n,), at which motions of velocities and steps may go on."""
        if self._sent and self.action_space != "joint_position":
            distance = np.abs(q - self._sent[-1]["position"][-1])
            self._shifts[len(self._sent)] = np.maximum(distance, self._shifts.get(len(self._sent), 0.0))

    def add(self, commands: Any, *, promised: int | None = None) -> None:
        """Commands that are sent: `Commands`, or a map with the same names.

        Args:
            promised: how many they must be.
        """
        get = commands.get if isinstance(commands, Mapping) else lambda name: getattr(commands, name)
        one: dict[str, Any] = {name: None if get(name) is None else np.asarray(get(name)) for name in _ROWS}
        number = len(one["action"])
        if promised is not None and number != promised:
            self.broken("count", f"{number} commands in place of {promised}")
        if not number:
            return
        for name, value in one.items():
            if value is None:
                continue
            if len(value) != number:
                self.broken("count", f"{len(value)} rows of {name} for {number} commands")
            if value.dtype != bool and not np.isfinite(value).all():
                self.broken("finite", f"{name} is not finite")
        if one["holding"].any() and not str(get("reason")).strip():
            self.broken("reason", f"{int(one['holding'].sum())} commands hold without a reason")
        self.count += number
        self.holding += int(one["holding"].sum())
        self._sent.append(one)

    def finish(self) -> list[Violation]:
        """Check what was sent since the last start; all violations so far."""
        sent, self._sent, shifts, self._shifts = self._sent, [], self._shifts, {}
        if sent and not any(v.kind == "finite" for v in self.violations):
            self.segments += 1
            self._check(sent, shifts)
        return self.violations

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _check(self, sent: list[dict[str, Any]], shifts: dict[int, NDArray[np.float64]]) -> None:
        position = np.concatenate([x["position"] for x in sent])
        delta = np.concatenate([x["delta"] if x["delta"] is not None else _steps(x, self) for x in sent])
        action, time = (np.concatenate([x[name] for x in sent]) for name in ("action", "time"))
        first = position[0] - delta[0]
        start = first if self._start is None else self._start
        slack = ROUNDING * max(1.0, float(np.abs(position).max()), float(np.abs(start).max()))
        self._check_consistency(sent, shifts, start, slack)
        if np.abs(np.diff(time) - 1 / self.rate).max(initial=0.0) > 1e-6 / self.rate:
            self.broken("time", f"the times of commands are not {1 / self.rate:g} s apart")
        # What the robot does with what it is sent.
        if self.action_space == "joint_position":
            step = np.diff(np.concatenate([start[None], action]), axis=0)
        else:
            step = action / self.rate if self.action_space == "joint_velocity" else action
        padded = np.concatenate([np.zeros((2, step.shape[1])), step])
        for order, name in enumerate(("velocity", "acceleration", "jerk")):
            value = np.abs(np.diff(padded, order, axis=0)[2 - order :]) * self.rate ** (order + 1)
            allowed = self.limits[name] * (1 + RELATIVE_TOLERANCE) + slack * self.rate ** (order + 1)
            share = float((value / allowed).max())
            self.largest_share[name] = max(self.largest_share.get(name, 0.0), share)
            if share > 1:
                row, joint = np.unravel_index(int((value / allowed).argmax()), value.shape)
                self.broken(
                    name, f"command {row} of {len(step)}, joint {joint}: {value[row, joint]:.6g}, limit {self.limits[name][joint]:.6g}"
                )  # fmt: skip
        lower, upper = self.limits["lower"], self.limits["upper"]
        if (start < lower - START_TOLERANCE - slack).any() or (start > upper + START_TOLERANCE + slack).any():
            self.broken("position", f"starts outside its range, at {np.round(start, 4).tolist()}")
        low, high = np.minimum(lower, start) - slack - 1e-9, np.maximum(upper, start) + slack + 1e-9
        outside = np.maximum(low - position, position - high)
        if outside.max() > 0:
            row, joint = np.unravel_index(int(outside.argmax()), outside.shape)
            self.broken("position", f"command {row}, joint {joint}: {position[row, joint]:.9g}, range {low[joint]:.9g} to {high[joint]:.9g}")  # fmt: skip

    def _check_consistency(
        self,
        sent: list[dict[str, Any]],
        shifts: dict[int, NDArray[np.float64]],
        start: NDArray[np.float64],
        slack: float,
    ) -> None:
        """Positions, steps, velocities and actions are of one motion, which goes on from message to message."""
        before = start
        for k, one in enumerate(sent):
            if one["delta"] is not None:
                path = np.concatenate([one["position"][:1] - one["delta"][:1], one["position"]])
                named = {"joint_position": "position", "joint_delta": "delta", "joint_velocity": "velocity"}
                same = (
                    (np.diff(path, axis=0), one["delta"]),
                    (one["delta"] * self.rate, one["velocity"]),
                    (one["action"], one[named[self.action_space]]),
                )
                if any(np.abs(x - y).max() > 4 * slack * max(1.0, self.rate) for x, y in same):
                    self.broken("consistency", f"message {k}: position, delta, velocity and action differ")
            step = one["delta"][0] if one["delta"] is not None else _steps(one, self)[0]
            jump = np.abs(one["position"][0] - step - before)
            known = self.action_space != "joint_position" or one["delta"] is not None
            if known and (jump > shifts.get(k, 0.0) + CONTINUITY_TOLERANCE + 4 * slack).any():
                self.broken("continuity", f"message {k} begins {jump.max():.3g} away from the end of the one before")
            before = one["position"][-1]


def _steps(one: Mapping[str, Any], record: CommandRecord) -> NDArray[np.float64]:
    """(M, n) the steps that the actions of a message mean; of positions those after the first."""
    action = one["action"]
    if record.action_space == "joint_position":
        return np.diff(action, axis=0, prepend=action[:1])
    return action / record.rate if record.action_space == "joint_velocity" else action
