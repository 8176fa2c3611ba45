"""The 30 numbers in which LingBot's models speak of two arms, from and to the joints of any robot with one arm or two.

Per arm: the pose of its end effector relative to the first one (3 + 4), up to seven joints, one gripper. Three orders of
these are in use, so an order is always named:

- `lingbot_va`: the code of LingBot-VA. Left pose, right pose, left joints, right joints, left gripper, right gripper.
- `paper_per_arm`: as its paper reads, (7 + 7 + 1) x 2. Left pose, joints and gripper, then the right arm's.
- `lingbot_vla`: LingBot-VLA. Joints of both arms one after another and then padded (6 + 6 + 2 zeros), poses of both, grippers
  of both; a single arm comes first.

A relative pose is the position minus the first position, in the base frame [m], and the quaternion (x, y, z, w) of the
rotation from the first orientation, `R_first.T @ R`, as LingBot-VA's client puts them together again. Joints are in rad,
grippers from 0, shut, to 1, open. What a robot has not is 0.
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
NUM_CHANNELS = 30
_POSE_SIZE, _MAX_JOINTS = 7, 7
_QUATERNION_NORM_RANGE = 0.5, 2.0  # lengths of what a network may mean by a unit quaternion


@dataclass(frozen=True)
class Arm:
    """One arm of a robot.

    Attributes:
        joints: columns of `q` that move its end effector, from the base on.
        gripper: column that opens it, if any.
        link: whose frame is the end effector's.
    """

    joints: tuple[int, ...]
    gripper: int | None
    link: str


def find_arms(embodiment: Embodiment) -> tuple[Arm, ...]:
    """The arms of a robot, in the order of their joints, by what moves its tips.

    The end effector is the tip that its gripper does not move, or the link that carries the gripper.

    Raises:
        InputError: two arms share a joint, or a joint is part of none.
    """
    moving = _moving_joints(embodiment)
    grippers = {embodiment.joint_index(name) for name in embodiment.gripper_joints}
    found: dict[tuple[int, ...], list[str]] = {}
    for tip in embodiment.tip_links:
        found.setdefault(tuple(k for k in moving[tip] if k not in grippers), []).append(tip)
    arms = []
    for joints, tips in found.items():
        arm_grippers = [
            k for k in sorted(grippers) if joints and set(moving[_parent_link(embodiment, k)]) == set(joints)
        ]
        if len(arm_grippers) > 1:
            raise InputError(f"'{embodiment.name}': several grippers on one arm; jidm's 30 numbers have room for one")
        fixed_tips = [tip for tip in tips if not grippers & set(moving[tip])]
        link = fixed_tips[0] if fixed_tips else _parent_link(embodiment, arm_grippers[0])
        arms.append(Arm(joints, arm_grippers[0] if arm_grippers else None, link))
    arms.sort(key=lambda arm: arm.joints)
    assigned = [k for arm in arms for k in (*arm.joints, *([] if arm.gripper is None else [arm.gripper]))]
    if sorted(assigned) != list(range(embodiment.n)):
        raise InputError(f"'{embodiment.name}' is not made of separate arms, each with joints and perhaps a gripper")
    return tuple(arms)


class LingBotFormat:
    """One robot's place in the 30 numbers.

    Args:
        embodiment: a robot of one arm or two, of up to seven joints each.
        layout: which order; there is no default, as guessing wrong moves the wrong arm.
        side: which arm a single one counts as. Needed for `lingbot_va` and `paper_per_arm`; of two arms the names of their
            joints must tell.

    Attributes:
        used: (30,) which of the numbers this robot has.

    Raises:
        InputError: the layout or side is not named or not known; the robot has no or more than two arms, or more joints.
    """

    def __init__(self, embodiment: Embodiment, *, layout: str | None, side: str | None = None) -> None:
        if layout not in LINGBOT_LAYOUTS:
            what = "name the layout: 30 numbers are read in three orders" if layout is None else f"no layout '{layout}'"
            raise InputError(f"{what}; {did_you_mean(layout or '', LINGBOT_LAYOUTS)}")
        self.embodiment, self.layout = embodiment, layout
        self._arms = _assign_sides(embodiment, find_arms(embodiment), side, layout)
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
        """The numbers that tell each arm's pose and gripper, arm by arm: what LingBot-VA's RoboTwin client takes."""
        found: list[int] = []
        for slots in self._slots.values():
            found += [*range(slots.pose.start, slots.pose.stop), slots.gripper]
        return tuple(found)

    def pack(self, q: ArrayLike, *, q0: ArrayLike | None = None) -> NDArray[np.float64]:
        """Joint positions as the 30 numbers.

        Args:
            q: (*batch, T, n) [rad or m]. q0: (*batch, n) pose that the others are relative to; `q[..., 0, :]` if not
                given.

        Returns:
            (*batch, T, 30).

        Raises:
            InputError: q has another shape or is not finite.
        """
        positions = self._checked(q, 2, "q", "(*batch, T, n)")
        start = positions[..., 0, :] if q0 is None else self._checked(q0, 1, "first", "(*batch, n)")
        out = np.zeros((*positions.shape[:-1], NUM_CHANNELS))
        poses, origin = (self._kinematics.link_poses(torch.tensor(x)) for x in (positions, start))
        for key, arm in self._arms.items():
            slots, link = self._slots[key], self._links[key]
            out[..., slots.pose] = _relative(poses[..., link, :, :], origin[..., None, link, :, :])
            out[..., slots.joints] = positions[..., list(arm.joints)]
            if arm.gripper is not None:
                shut, opened = self._gripper_range(arm.gripper)
                out[..., slots.gripper] = (positions[..., arm.gripper] - shut) / (opened - shut)
        return out

    def unpack(self, numbers: ArrayLike) -> NDArray[np.float64]:
        """Joint positions (*batch, n) out of the 30 numbers (*batch, 30): those of the joints and grippers.

        Raises:
            InputError: the numbers have another shape, are not finite, hold something where this robot has nothing, or a
                quaternion that is far from a unit one (none at all, four zeros, goes).
        """
        values = np.asarray(numbers, dtype=np.float64)
        if values.shape[-1:] != (NUM_CHANNELS,) or not np.isfinite(values).all():
            raise InputError(f"actions must be finite and (*batch, {NUM_CHANNELS}), got shape {values.shape}")
        unexpected = np.flatnonzero((values != 0).reshape(-1, NUM_CHANNELS).any(0) & ~self.channel_mask)
        if len(unexpected):
            raise InputError(
                f"numbers {unexpected.tolist()} are not zero, where '{self.embodiment.name}' has nothing in the layout "
                f"'{self.layout}': another layout, side or robot is meant, or they are still normalised"
            )
        for key, slots in self._slots.items():
            length = np.linalg.norm(values[..., slots.pose][..., 3:], axis=-1)
            if not (
                (length == 0) | ((length > _QUATERNION_NORM_RANGE[0]) & (length < _QUATERNION_NORM_RANGE[1]))
            ).all():
                raise InputError(
                    f"the {key} arm's pose holds no unit quaternion: another layout, side or robot is meant, or the numbers "
                    "are still normalised"
                )
        q = np.zeros((*values.shape[:-1], self.embodiment.n))
        for key, arm in self._arms.items():
            slots = self._slots[key]
            q[..., list(arm.joints)] = values[..., slots.joints]
            if arm.gripper is not None:
                shut, opened = self._gripper_range(arm.gripper)
                q[..., arm.gripper] = shut + values[..., slots.gripper] * (opened - shut)
        return q

    def end_effector_poses(self, numbers: ArrayLike, q0: ArrayLike) -> dict[str, NDArray[np.float64]]:
        """Where the end effectors are by the 30 numbers: side -> `T_base_link` (*batch, 4, 4) [m].

        Args:
            numbers: (*batch, 30). q0: (n,) joint positions that they are relative to [rad or m].
        """
        values = np.asarray(numbers, dtype=np.float64)
        origin = self._kinematics.link_poses(torch.tensor(self._checked(q0, 1, "first", "(n,)")))
        found = {}
        for key, slots in self._slots.items():
            T = origin[self._links[key]].expand(*values.shape[:-1], 4, 4).clone()
            pose = torch.tensor(values[..., slots.pose])
            T[..., :3, 3] += pose[..., :3]
            T[..., :3, :3] = T[..., :3, :3] @ roma.unitquat_to_rotmat(roma.quat_normalize(pose[..., 3:]))
            found[key] = np.asarray(T.numpy())
        return found

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
    """Where one arm's numbers stand."""

    pose: slice
    joints: slice
    gripper: int


def _slots(layout: str, arms: dict[str, Arm]) -> dict[str, _Slots]:
    found, before = {}, 0
    for place, (key, arm) in enumerate(arms.items()):
        count, side = len(arm.joints), SIDES.index(key)
        if layout == "lingbot_va":
            starts = side * _POSE_SIZE, 2 * _POSE_SIZE + side * _MAX_JOINTS, 28 + side
        elif layout == "paper_per_arm":
            starts = side * 15, side * 15 + _POSE_SIZE, side * 15 + 14
        else:
            starts, before = (2 * _MAX_JOINTS + place * _POSE_SIZE, before, 28 + place), before + count
        found[key] = _Slots(slice(starts[0], starts[0] + _POSE_SIZE), slice(starts[1], starts[1] + count), starts[2])
    return found


def _assign_sides(robot: Embodiment, arms: Sequence[Arm], side: str | None, layout: str) -> dict[str, Arm]:
    """Left arm before right."""
    if not 1 <= len(arms) <= 2:
        raise InputError(f"'{robot.name}' has {len(arms)} arms; the 30 numbers are for one or two")
    if (longest := max(len(arm.joints) for arm in arms)) > _MAX_JOINTS:
        raise InputError(f"'{robot.name}' has {longest} joints in an arm; the 30 numbers have room for {_MAX_JOINTS}")
    if side is not None and side not in SIDES:
        raise InputError(f"no side '{side}': {did_you_mean(side, SIDES)}")
    if len(arms) == 1:
        if side is None and layout != "lingbot_vla":
            raise InputError(f"'{robot.name}' has one arm: name the side it counts as, left or right")
        return {side or "left": arms[0]}
    if side is not None:
        raise InputError(f"'{robot.name}' has two arms; side is for robots with one")
    by_side = {}
    for arm in arms:
        names = [robot.joint_names[k].lower() for k in arm.joints]
        for key in SIDES:
            if all(key in name for name in names):
                by_side[key] = arm
    if len(by_side) != 2:
        raise InputError(f"'{robot.name}': its joints' names do not tell which arm is left and which is right")
    return {key: by_side[key] for key in SIDES}


def _moving_joints(robot: Embodiment) -> dict[str, tuple[int, ...]]:
    """For every link the columns of `q` that move it, from the base on; through mimics too."""
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


def _relative(T_base_link: torch.Tensor, T_base_first: torch.Tensor) -> Any:
    """(*batch, 7) position and quaternion, with the sign that keeps w positive."""
    moved = T_base_link[..., :3, 3] - T_base_first[..., :3, 3]
    turn = roma.rotmat_to_unitquat(T_base_first[..., :3, :3].mT @ T_base_link[..., :3, :3])
    return torch.cat([moved, torch.where(turn[..., 3:] < 0, -turn, turn)], dim=-1).numpy()
