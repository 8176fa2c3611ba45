"""Commands for a robot controller."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError, did_you_mean

ActionSpace = Literal["joint_velocity", "joint_position", "joint_delta"]
ACTION_SPACES: tuple[str, ...] = get_args(ActionSpace)


@dataclass(frozen=True, eq=False)
class Commands:
    """M commands, one per control period; always finite and inside the limits, whatever the frames show.

    Attributes:
        joint_names: n names, the order of every joint axis.
        action_space: what `action` holds.
        time: (M,) end of each command's period, in trajectory time [s].
        position: (M, n) joint positions at that time [rad or m].
        delta: (M, n) joint steps of the period [rad or m]; they sum to the positions.
        velocity: (M, n) delta divided by the period; constant over the period, it leads to the position [rad/s or m/s].
        tracking_error: (M, n) distance from the reference that the frames give, due to limits or smoothing [rad or m].
        holding: (M,) whether there was no new valid frame to follow. The robot then brakes inside its limits and stays
            at rest.
        reason: why, as text; empty if no command holds.
        gripper_joints: columns that open and close a gripper.
        gripper_range: (g, 2) their positions when closed and when open [rad or m].
    """

    joint_names: tuple[str, ...]
    action_space: ActionSpace
    time: NDArray[np.float64]
    position: NDArray[np.float64]
    delta: NDArray[np.float64]
    velocity: NDArray[np.float64]
    tracking_error: NDArray[np.float64]
    holding: NDArray[np.bool_]
    reason: str
    gripper_joints: tuple[int, ...]
    gripper_range: NDArray[np.float64]

    @property
    def action(self) -> NDArray[np.float64]:
        """(M, n) in the action space: `velocity`, `position` or `delta`."""
        by_space = {"joint_velocity": self.velocity, "joint_position": self.position, "joint_delta": self.delta}
        return by_space[self.action_space]

    @property
    def gripper(self) -> NDArray[np.float64]:
        """(M, g) opening of each gripper joint, from 0 (closed) to 1 (open)."""
        position = self.position[:, list(self.gripper_joints)]
        closed, opened = self.gripper_range.T
        return np.clip((position - closed) / (opened - closed), 0.0, 1.0)

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, commands: slice) -> Commands:
        """A slice of the commands."""
        if not isinstance(commands, slice):
            raise InputError("index commands with a slice: commands[start:stop]")
        rows = ("time", "position", "delta", "velocity", "tracking_error", "holding")
        return replace(self, **{name: getattr(self, name)[commands] for name in rows})


def as_action_space(name: str) -> ActionSpace:
    """The action space with this name.

    Raises:
        InputError: there is none.
    """
    if name not in ACTION_SPACES:
        raise InputError(f"no action space '{name}': {did_you_mean(name, ACTION_SPACES)}")
    return name  # type: ignore[return-value]
