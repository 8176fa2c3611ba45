"""What leaves toward a robot."""

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
    """M commands, one each control period, finite and inside the limits whatever came in.

    Attributes:
        joint_names: n names, the order of every joint axis.
        action_space: what `action` holds.
        time: (M,) end of each command's period, in the time of the motion [s].
        position: (M, n) joint positions at that time [rad or m].
        delta: (M, n) joint steps of the period [rad or m]; they add up to the positions.
        velocity: (M, n) delta divided by the period: held for the period, it leads to the position [rad/s or m/s].
        tracking_error: (M, n) how far the motion is behind what the frames show, because of limits or smoothing [rad or m].
        holding: (M,) whether nothing fresh and finite was there to follow: the robot is brought to rest inside its limits
            and kept there.
        reason: why it was, in words; empty where no command is held.
        gripper_joints: columns that open and close a gripper, and `gripper_range` (g, 2) where they are shut and open.
    """

    joint_names: tuple[str, ...]
    action_space: ActionSpace
    time: NDArray[np.float64]
    position: NDArray[np.float64]
    delta: NDArray[np.float64]
    velocity: NDArray[np.float64]
    tracking_error: NDArray[np.float64]
    holding: NDArray[np.bool_]
    reason: str = ""
    gripper_joints: tuple[int, ...] = ()
    gripper_range: NDArray[np.float64] | None = None

    @property
    def action(self) -> NDArray[np.float64]:
        """(M, n) in the action space: `velocity`, `position` or `delta`."""
        return {"joint_velocity": self.velocity, "joint_position": self.position, "joint_delta": self.delta}[
            self.action_space
        ]

    @property
    def gripper(self) -> NDArray[np.float64]:
        """(M, g) opening of each gripper joint, from 0, shut, to 1, open."""
        at = self.position[:, list(self.gripper_joints)]
        if self.gripper_range is None:
            return at
        shut, opened = self.gripper_range.T
        return np.clip((at - shut) / (opened - shut), 0.0, 1.0)

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, commands: slice) -> Commands:
        """Some of them, in order."""
        if not isinstance(commands, slice):
            raise InputError("commands are sliced: commands[start:stop]")
        rows = ("time", "position", "delta", "velocity", "behind", "held")
        return replace(self, **{name: getattr(self, name)[commands] for name in rows})


def as_action_space(name: str) -> ActionSpace:
    """The action space of that name.

    Raises:
        InputError: there is none.
    """
    if name not in ACTION_SPACES:
        raise InputError(f"no action space '{name}': {did_you_mean(name, ACTION_SPACES)}")
    return name  # type: ignore[return-value]
