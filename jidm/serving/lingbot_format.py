"""LingBot's action format: 30 numbers for two arms, converted from and to the joint positions of a robot with one or two.

Per arm: the pose of its end effector relative to the initial one (3 + 4), up to seven joints, one gripper. Three channel
orders are in use, so the order must always be stated:

- `lingbot_va`: the code of LingBot-VA. Left pose, right pose, left joints, right joints, left gripper, right gripper.
- `paper_per_arm`: its paper, (7 + 7 + 1) x 2. Pose, joints and gripper of the left arm, then of the right arm.
- `lingbot_vla`: LingBot-VLA. Joints of both arms one after another, then padding (6 + 6 + 2 zeros), poses of both, grippers
  of both; a single arm comes first.

A relative pose is the position minus the initial position, in the base frame [m], and the quaternion (x, y, z, w) of the
rotation from the initial orientation, `R_initial.T @ R`, as LingBot-VA's client composes them. Joints are in rad, grippers
from 0 (closed) to 1 (open). Channels that a robot lacks are 0.

LingBot-VA's client takes fewer numbers (`CHANNEL_SETS`): pose and gripper of each arm, 16 for two arms, or the absolute pose
with Euler angles in place of the quaternion, 14 for two arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import roma
import torch
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError, did_you_mean
from jidm.robot.kinematics import Kinematics

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

LingBotLayout = Literal["lingbot_va", "paper_per_arm", "lingbot_vla"]
Side = Literal["left", "right"]
LINGBOT_LAYOUTS: tuple[str, ...] = get_args(LingBotLayout)
SIDES: tuple[str, ...] = get_args(Side)
ChannelSet = Literal["quaternion", "euler", "all"]
CHANNEL_SETS: tuple[str, ...] = get_args(ChannelSet)
NUM_CHANNELS = 30
_POSE_SIZE, _MAX_JOINTS = 7, 7
_MIN_QUATERNION_NORM, _MAX_QUATERNION_NORM = 0.5, 2.0  # of a network's unit quaternions


@dataclass(frozen=True)
class Arm:
    """One arm of a robot.

    Attributes:
        joints: columns of `q` that move its end effector, from the base outward.
        gripper: column of its gripper, if any.
        link: link whose frame is the end effector's.
    """

    joints: tuple[int, ...]
    gripper: int | None
    link: str


def find_arms(embodiment: Embodiment) -> tuple[Arm, ...]:
    """The arms of a robot in the order of their joints, found from the joints that move its tip links.

    The end effector is the tip that the gripper does not move, or else the link that carries the gripper.

    Raises:
        InputError: two arms share a joint, or a joint belongs to none.
    """
    moving = _moving_joints(embodiment)
    grippers = {embodiment.joint_index(name) for name in embodiment.gripper_joints}
    tips_of: dict[tuple[int, ...], list[str]] = {}
    for tip in embodiment.tip_links:
        tips_of.setdefault(tuple(k for k in moving[tip] if k not in grippers), []).append(tip)
    arms = []
    for joints, tips in tips_of.items():
        arm_grippers = [
            k for k in sorted(grippers) if joints and set(moving[_parent_link(embodiment, k)]) == set(joints)
        ]
        if len(arm_grippers) > 1:
            raise InputError(f"'{embodiment.name}': several grippers on one arm; LingBot's format has room for one")
        fixed_tips = [tip for tip in tips if not grippers & set(moving[tip])]
        link = fixed_tips[0] if fixed_tips else _parent_link(embodiment, arm_grippers[0])
        arms.append(Arm(joints, arm_grippers[0] if arm_grippers else None, link))
    arms.sort(key=lambda arm: arm.joints)
    assigned = [k for arm in arms for k in (*arm.joints, arm.gripper) if k is not None]
    if sorted(assigned) != list(range(embodiment.n)):
        raise InputError(
            f"'{embodiment.name}' does not consist of separate arms, each with joints and at most one gripper"
        )
    return tuple(arms)


class LingBotFormat:
    """The mapping between one robot's joint positions and the 30 numbers.

    Args:
        embodiment: a robot with one or two arms of up to seven joints each.
        layout: channel order; there is no default, because a wrong guess moves the wrong arm.
        side: the side that a robot's only arm takes; needed for `lingbot_va` and `paper_per_arm`. The joint names of a
            robot with two arms must contain `left` and `right`.

    Attributes:
        channel_mask: (30,) which channels this robot has.

    Raises:
        InputError: layout or side is missing or unknown; the robot has no or more than two arms, or more joints, or a
            gripper without a range.
    """

    def __init__(self, embodiment: Embodiment, *, layout: str | None, side: str | None = None) -> None:
        if layout not in LINGBOT_LAYOUTS:
            missing = "name the layout: three orders of the 30 numbers are in use"
            problem = missing if layout is None else f"no layout '{layout}'"
            raise InputError(f"{problem}; {did_you_mean(layout or '', LINGBOT_LAYOUTS)}")
        self.embodiment, self.layout = embodiment, layout
        self._arms = _assign_sides(embodiment, find_arms(embodiment), side, layout)
        for arm in self._arms.values():
            if arm.gripper is not None and not 0 < np.diff(self._gripper_range(arm.gripper))[0] < np.inf:
                raise InputError(
                    f"'{embodiment.name}': gripper joint '{embodiment.joint_names[arm.gripper]}' has no range between closed "
                    "and open; give its limits in the URDF or in [joints] of embodiment.toml"
                )
        self._slots = _slots(layout, self._arms)
        self._kinematics = Kinematics.from_embodiment(embodiment)
        self._links = {key: embodiment.model.link_index(arm.link) for key, arm in self._arms.items()}
        self.channel_mask = np.zeros(NUM_CHANNELS, dtype=bool)
        for key, slots in self._slots.items():
            self.channel_mask[slots.pose] = self.channel_mask[slots.joints] = True
            if self._arms[key].gripper is not None:
                self.channel_mask[slots.gripper] = True
        self.channel_mask.flags.writeable = False

    @property
    def end_effector_channels(self) -> tuple[int, ...]:
        """Channels of pose and gripper, arm by arm, as LingBot-VA's RoboTwin client expects."""
        return tuple(
            channel for x in self._slots.values() for channel in (*range(x.pose.start, x.pose.stop), x.gripper)
        )

    def select(self, q: ArrayLike, channels: str, *, q0: ArrayLike | None = None) -> NDArray[np.float64]:
        """Convert joint positions to the numbers that a client takes.

        Args:
            q: (*batch, T, n) [rad or m].
            channels: "all" for the 30 numbers; "quaternion" for `end_effector_channels` of them; "euler" for the absolute
                position in the base frame [m], angles about the fixed axes x, y and z in this order [rad], and gripper, arm
                by arm.
            q0: as for `pack`.

        Returns:
            (*batch, T, C), C = 30, or 8 or 7 per arm.

        Raises:
            InputError: q has another shape or is not finite.
        """
        numbers = self.pack(q, q0=q0)
        if channels == "all":
            return numbers
        if channels == "quaternion":
            return numbers[..., list(self.end_effector_channels)]
        poses = self._kinematics.link_poses(torch.tensor(np.asarray(q, dtype=np.float64)))
        parts = []
        for key, slots in self._slots.items():
            pose = poses[..., self._links[key], :, :]
            angles = roma.rotmat_to_euler("xyz", pose[..., :3, :3])
            parts += [pose[..., :3, 3].numpy(), angles.numpy(), numbers[..., [slots.gripper]]]
        return np.concatenate(parts, axis=-1)

    def pack(self, q: ArrayLike, *, q0: ArrayLike | None = None) -> NDArray[np.float64]:
        """Convert joint positions to the 30 numbers.

        Args:
            q: (*batch, T, n) [rad or m].
            q0: (*batch, n) joint positions of the initial pose [rad or m]; `q[..., 0, :]` if not given.

        Returns:
            (*batch, T, 30).

        Raises:
            InputError: q has another shape or is not finite.
        """
        positions = self._checked(q, 2, "q", "(*batch, T, n)")
        start = positions[..., 0, :] if q0 is None else self._checked(q0, 1, "q0", "(*batch, n)")
        out = np.zeros((*positions.shape[:-1], NUM_CHANNELS))
        poses, origin = (self._kinematics.link_poses(torch.tensor(x)) for x in (positions, start))
        for key, arm in self._arms.items():
            slots, link = self._slots[key], self._links[key]
            out[..., slots.pose] = _relative_pose(poses[..., link, :, :], origin[..., None, link, :, :])
            out[..., slots.joints] = positions[..., list(arm.joints)]
            if arm.gripper is not None:
                closed, opened = self._gripper_range(arm.gripper)
                out[..., slots.gripper] = (positions[..., arm.gripper] - closed) / (opened - closed)
        return out

    def unpack(self, numbers: ArrayLike) -> NDArray[np.float64]:
        """Convert the 30 numbers (*batch, 30) to joint positions (*batch, n) [rad or m], from joint and gripper channels.

        Raises:
            InputError: the numbers have another shape, are not finite, are not zero in channels this robot lacks, or hold a
                quaternion whose norm is far from 1 (four zeros are accepted).
        """
        values = np.asarray(numbers, dtype=np.float64)
        if values.shape[-1:] != (NUM_CHANNELS,) or not np.isfinite(values).all():
            raise InputError(f"actions must be finite and (*batch, {NUM_CHANNELS}), got shape {values.shape}")
        unexpected = np.flatnonzero((values != 0).reshape(-1, NUM_CHANNELS).any(0) & ~self.channel_mask)
        if len(unexpected):
            raise InputError(
                f"channels {unexpected.tolist()} are not zero, but '{self.embodiment.name}' lacks them in the layout "
                f"'{self.layout}': wrong layout, side or robot, or the numbers are still normalized"
            )
        for key, slots in self._slots.items():
            norm = np.linalg.norm(values[..., slots.pose][..., 3:], axis=-1)
            if not ((norm == 0) | ((norm > _MIN_QUATERNION_NORM) & (norm < _MAX_QUATERNION_NORM))).all():
                raise InputError(
                    f"the {key} arm's pose holds no unit quaternion: wrong layout, side or robot, or the numbers are "
                    "still normalized"
                )
        q = np.zeros((*values.shape[:-1], self.embodiment.n))
        for key, arm in self._arms.items():
            slots = self._slots[key]
            q[..., list(arm.joints)] = values[..., slots.joints]
            if arm.gripper is not None:
                closed, opened = self._gripper_range(arm.gripper)
                q[..., arm.gripper] = closed + values[..., slots.gripper] * (opened - closed)
        return q

    def _gripper_range(self, gripper: int) -> tuple[float, float]:
        return float(self.embodiment.lower[gripper]), float(self.embodiment.upper[gripper])

    def _checked(self, q: ArrayLike, least: int, name: str, shape: str) -> NDArray[np.float64]:
        values = np.asarray(q, dtype=np.float64)
        if values.ndim < least or values.shape[-1] != self.embodiment.n or not np.isfinite(values).all():
            raise InputError(
                f"{name} must be finite and {shape} with n = {self.embodiment.n}, got shape {values.shape}"
            )
        return values


# ---- pieces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slots:
    """Channels of one arm."""

    pose: slice
    joints: slice
    gripper: int


def _slots(layout: str, arms: dict[str, Arm]) -> dict[str, _Slots]:
    slots, num_previous = {}, 0
    for index, (key, arm) in enumerate(arms.items()):
        count, side = len(arm.joints), SIDES.index(key)
        if layout == "lingbot_va":
            starts = side * _POSE_SIZE, 2 * _POSE_SIZE + side * _MAX_JOINTS, 28 + side
        elif layout == "paper_per_arm":
            starts = side * 15, side * 15 + _POSE_SIZE, side * 15 + 14
        else:
            starts = 2 * _MAX_JOINTS + index * _POSE_SIZE, num_previous, 28 + index
        num_previous += count
        slots[key] = _Slots(slice(starts[0], starts[0] + _POSE_SIZE), slice(starts[1], starts[1] + count), starts[2])
    return slots


def _assign_sides(robot: Embodiment, arms: Sequence[Arm], side: str | None, layout: str) -> dict[str, Arm]:
    """Side -> arm, left before right."""
    if not 1 <= len(arms) <= 2:
        raise InputError(f"'{robot.name}' has {len(arms)} arms; LingBot's format is for one or two")
    if (longest := max(len(arm.joints) for arm in arms)) > _MAX_JOINTS:
        raise InputError(f"'{robot.name}' has {longest} joints in an arm; LingBot's format has room for {_MAX_JOINTS}")
    if side is not None and side not in SIDES:
        raise InputError(f"no side '{side}': {did_you_mean(side, SIDES)}")
    if len(arms) == 1:
        if side is None and layout != "lingbot_vla":
            raise InputError(f"'{robot.name}' has one arm: name the side it takes, left or right")
        return {side or "left": arms[0]}
    if side is not None:
        raise InputError(f"'{robot.name}' has two arms; side is for robots with one")
    by_side = {
        key: arm for arm in arms for key in SIDES if all(key in robot.joint_names[k].lower() for k in arm.joints)
    }
    if len(by_side) != 2:
        raise InputError(f"'{robot.name}': its joint names do not say which arm is left and which is right")
    return {key: by_side[key] for key in SIDES}


def _moving_joints(robot: Embodiment) -> dict[str, tuple[int, ...]]:
    """Link -> columns of `q` that move it, from the base outward, mimic joints included."""
    columns = {
        joint.name: np.flatnonzero(row).tolist()
        for joint, row in zip(robot.model.movable_joints, robot.coupling_matrix, strict=True)
    }
    moving: dict[str, tuple[int, ...]] = {robot.model.root: ()}
    for joint in robot.model.joints:
        more = [k for k in columns.get(joint.name, []) if k not in moving[joint.parent]]
        moving[joint.child] = (*moving[joint.parent], *more)
    return moving


def _parent_link(robot: Embodiment, column: int) -> str:
    """The link that carries a joint."""
    return next(joint.parent for joint in robot.model.joints if joint.name == robot.joint_names[column])


def _relative_pose(T_base_link: torch.Tensor, T_base_initial: torch.Tensor) -> Any:
    """(*batch, 7) relative position and quaternion with w >= 0."""
    translation = T_base_link[..., :3, 3] - T_base_initial[..., :3, 3]
    quaternion = roma.rotmat_to_unitquat(T_base_initial[..., :3, :3].mT @ T_base_link[..., :3, :3])
    quaternion = torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
    return torch.cat([translation, quaternion], dim=-1).numpy()
