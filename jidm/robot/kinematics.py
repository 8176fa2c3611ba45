"""Batched, differentiable forward kinematics and geometric Jacobians of a tree of links.

Every joint transform is linear in (1, sin q, 1 - cos q, q) with constant 4x4 coefficients (Rodrigues' formula about
a fixed axis), so all of them come from one matrix product; constant transforms of fixed joints are folded into those coefficients
and each movable joint then costs one 4x4 product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import InputError
from jidm.robot.model import RobotModel

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment


class Kinematics:
    """Moves the links of one robot.

    Frames: the base frame is the frame of the model's root link. Order: links as in `model.links`, columns as in
    `joint_names`. Works in the dtype and on the device of the `q` it is given.

    Args:
        model: links and joints.
        joint_names: the n actuated joints, the order of `q`.
        coupling: (A, b) of `q_full = A @ q + b`, shapes (m, n) and (m,), over `model.movable_joints`.
    """

    def __init__(
        self, model: RobotModel, joint_names: Sequence[str], coupling: tuple[NDArray[np.float64], NDArray[np.float64]]
    ) -> None:
        self.model = model
        self.joint_names = tuple(joint_names)
        self._A, self._b = (torch.as_tensor(np.array(x), dtype=torch.float64) for x in coupling)
        self._constants: dict[tuple[torch.dtype, torch.device], _Constants] = {}
        self._chains: dict[tuple[int, torch.dtype, torch.device], _Chain] = {}

    @classmethod
    def from_embodiment(cls, embodiment: Embodiment) -> Kinematics:
        return cls(embodiment.model, embodiment.joint_names, (embodiment.coupling_matrix, embodiment.coupling_offset))

    @property
    def n(self) -> int:
        """Number of actuated joints."""
        return len(self.joint_names)

    def link_poses(self, q: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch links 4 4"]:
        """Poses `T_base_link` of all links [m] at joint positions q [rad or m]."""
        self._check(q)
        constants = self._constants_on(q)
        q_full = q @ constants.A.T + constants.b
        features = torch.stack([torch.ones_like(q_full), q_full.sin(), 1 - q_full.cos(), q_full], dim=-2)
        # (*batch, 4, m) x (4, m, 16) -> T_parent_child of every movable joint
        local = torch.einsum("...fm,fmk->...mk", features, constants.features).unflatten(-1, (4, 4))
        batch = q.shape[:-1]
        # Chains of fixed joints fold into constants, so only movable joints cost a product.
        moved: list[Tensor] = []
        for m, parent in enumerate(self._tree.movable_parents):
            step = local[..., m, :, :]
            moved.append(step if parent is None else moved[parent] @ step)
        eye = torch.eye(4, dtype=q.dtype, device=q.device).expand(*batch, 4, 4)
        frames = torch.stack([eye, *moved], dim=-3)
        return frames[..., self._tree.link_frame, :, :] @ constants.T_frame_link

    def link_twists(self, poses: Float[Tensor, "*batch links 4 4"]) -> Float[Tensor, "*batch links 6 n"]:
        """Spatial velocity of every link per unit joint velocity, in the base frame.

        A point of link l at p_base moves with `v + w x p_base` per unit of joint k, where
        `v = twists[l, :3, k]` [m/rad or m/m] and `w = twists[l, 3:, k]` [rad/rad or 0].

        Args:
            poses: what `link_poses` returned for the same q.
        """
        constants = self._constants_on(poses)
        frames = poses[..., self._tree.joint_link, :, :]  # the child link's frame is the joint frame, moved
        axis = torch.einsum("...mij,mj->...mi", frames[..., :3, :3], constants.axis)
        origin = frames[..., :3, 3]
        w = axis * constants.is_revolute[:, None]
        v = torch.linalg.cross(origin, w, dim=-1) + axis * (1 - constants.is_revolute)[:, None]
        per_joint = torch.cat([v, w], dim=-1)  # (*batch, m, 6)
        # Column by column of A, which holds little but one entry a row: never the (links, m, n) product.
        per_entry = per_joint[..., constants.entry_joint, :] * constants.entry_value[:, None]
        twists = per_entry.mT.unsqueeze(-3) * constants.entry_carries[:, None, :]
        if constants.one_to_one:
            return twists
        return twists @ constants.entry_to_column

    def link_jacobians(self, q: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch links 6 n"]:
        """Geometric Jacobian at every link's origin in base axes: rows 0-2 linear [m/unit], 3-5 angular [rad/unit]."""
        poses = self.link_poses(q)
        twists = self.link_twists(poses)
        v, w = twists[..., :3, :], twists[..., 3:, :]
        origin = poses[..., :3, 3].unsqueeze(-1)
        return torch.cat([v + torch.linalg.cross(w, origin.expand_as(w), dim=-2), w], dim=-2)

    def link_pose_and_jacobian(
        self, q: Float[Tensor, "*batch n"], link: int
    ) -> tuple[Float[Tensor, "*batch 4 4"], Float[Tensor, "*batch 6 n"]]:
        """Pose `T_base_link` and geometric Jacobian of one link, as `link_poses` and `link_jacobians` would give them.

        Only the joints between the base and the link are computed, so that this suits control loops and large batches.

        Args:
            link: index into `model.links`.
        """
        self._check(q)
        chain = self._chain(link, q)
        flat = q.reshape(-1, self.n)
        # Joints in front: every joint's transforms then lie together in memory.
        x = torch.addmm(chain.b, chain.A, flat.T)
        features = torch.stack([x.sin(), x.cos(), x], dim=-1)
        local = torch.baddbmm(chain.constant, features, chain.features).unflatten(-1, (4, 4))
        T = torch.eye(4, dtype=q.dtype, device=q.device).expand(len(flat), 4, 4)
        frames: list[Tensor] = []
        for step in local.unbind(0):
            T = step if not frames else T @ step
            frames.append(T)
        pose = T @ chain.T_frame_link
        moved = torch.stack(frames) if frames else T[None][:0]
        axis = (moved[..., :3, :3] @ chain.axis).squeeze(-1)
        arm = pose[..., :3, 3] - moved[..., :3, 3]
        turns = torch.linalg.cross(axis, arm, dim=-1)
        v = turns if chain.all_revolute else torch.where(chain.is_revolute, turns, axis)
        w = axis if chain.all_revolute else axis * chain.is_revolute
        columns = torch.cat([v, w], dim=-1).permute(1, 2, 0) @ chain.A
        return pose.reshape(*q.shape[:-1], 4, 4), columns.reshape(*q.shape[:-1], 6, self.n)

    def transform_points(
        self,
        poses: Float[Tensor, "*batch links 4 4"],
        link: Int[Tensor, " points"],
        p_link: Float[Tensor, "points 3"],
    ) -> Float[Tensor, "*batch points 3"]:
        """Points fixed to links, from their link frames to the base frame [m]."""
        T = poses[..., link, :3, :]
        return torch.einsum("...pij,pj->...pi", T[..., :3], p_link) + T[..., 3]

    def _check(self, q: Tensor) -> None:
        if q.shape[-1:] != (self.n,):
            raise InputError(f"q must end in {self.n} joints ({', '.join(self.joint_names)}), got {tuple(q.shape)}")
        if not q.is_floating_point():
            raise InputError(f"q must be a floating-point tensor [rad or m], got {q.dtype}")

    def _chain(self, link: int, like: Tensor) -> _Chain:
        key = (link, like.dtype, like.device)
        if key not in self._chains:
            if not 0 <= link < len(self.model.links):
                raise InputError(f"link {link} is none of the {len(self.model.links)} links of '{self.model.name}'")
            with torch.inference_mode(False):
                self._chains[key] = _Chain(self._tree, self._constants_on(like), link)
        return self._chains[key]

    @cached_property
    def _tree(self) -> _Tree:
        return _Tree(self.model)

    def _constants_on(self, like: Tensor) -> _Constants:
        key = (like.dtype, like.device)
        if key not in self._constants:
            # Tensors made in inference mode could never take part in a gradient again.
            with torch.inference_mode(False):
                self._constants[key] = _Constants(self._tree, self._A, self._b, like)
        return self._constants[key]


class _Tree:
    """Static structure: which movable joint hangs on which, with which constant transforms in between."""

    def __init__(self, model: RobotModel) -> None:
        index = {link.name: k for k, link in enumerate(model.links)}
        frame_of_link: list[int | None] = [None]  # movable joint that carries the link; None = base
        T_frame_link: list[NDArray[np.float64]] = [np.eye(4)]
        self.movable_parents: list[int | None] = []
        self.local: list[NDArray[np.float64]] = []
        self.joints = model.movable_joints
        self.joint_link: list[int] = []
        ancestors: list[set[int]] = [set()]
        for k, joint in enumerate(model.joints, start=1):
            parent = index[joint.parent]
            T = T_frame_link[parent] @ joint.T_parent_joint
            if joint.movable:
                m = len(self.movable_parents)
                self.movable_parents.append(frame_of_link[parent])
                self.local.append(T)  # everything constant goes into the joint's own coefficients
                frame_of_link.append(m)
                T_frame_link.append(np.eye(4))
                ancestors.append(ancestors[parent] | {m})
                self.joint_link.append(k)
            else:
                frame_of_link.append(frame_of_link[parent])
                T_frame_link.append(T)
                ancestors.append(ancestors[parent])
        self.T_frame_link = np.stack(T_frame_link)
        self.link_frame = [0 if f is None else f + 1 for f in frame_of_link]
        self.ancestors = np.zeros((len(model.links), len(self.joints)))
        for k, chain in enumerate(ancestors):
            self.ancestors[k, sorted(chain)] = 1.0


class _Constants:
    """The tree's constants in one dtype on one device."""

    def __init__(self, tree: _Tree, A: Tensor, b: Tensor, like: Tensor) -> None:
        def on(x: NDArray[np.float64] | Tensor) -> Tensor:
            return torch.as_tensor(x).to(dtype=like.dtype, device=like.device)

        m = len(tree.joints)
        features = np.zeros((4, m, 4, 4))
        for k, (joint, T) in enumerate(zip(tree.joints, tree.local, strict=True)):
            a = joint.axis
            K = np.array([[0, -a[2], a[1]], [a[2], 0, -a[0]], [-a[1], a[0], 0]])
            features[0, k] = T
            if joint.type == "prismatic":
                features[3, k, :3, 3] = T[:3, :3] @ a
            else:
                features[1, k, :3, :3] = T[:3, :3] @ K
                features[2, k, :3, :3] = T[:3, :3] @ K @ K
        self.features = on(features.reshape(4, m, 16))
        self.T_frame_link = on(tree.T_frame_link)
        # The entries of A, by column: which full joint, which actuated joint, how much, and which links they carry.
        columns, rows = np.nonzero(A.numpy().T)
        self.entry_joint = torch.as_tensor(rows, device=like.device)
        self.entry_to_column = on(np.eye(A.shape[1])[columns])
        self.entry_value = on(A.numpy()[rows, columns])
        self.entry_carries = on(tree.ancestors[:, rows])
        self.one_to_one = np.array_equal(columns, np.arange(A.shape[1]))
        self.axis = on(np.stack([j.axis for j in tree.joints]) if m else np.zeros((0, 3)))
        self.is_revolute = on(np.array([float(j.type != "prismatic") for j in tree.joints]))
        self.A, self.b = on(A), on(b)


class _Chain:
    """The constants of the joints between the base and one link."""

    def __init__(self, tree: _Tree, constants: _Constants, link: int) -> None:
        joints = np.flatnonzero(tree.ancestors[link]).tolist()
        one, sine, versine, position = constants.features[:, joints]
        self.A, self.b = constants.A[joints], constants.b[joints, None]
        self.constant = (one + versine)[:, None]
        self.features = torch.stack([sine, -versine, position], dim=1)
        self.T_frame_link = constants.T_frame_link[link]
        self.axis = constants.axis[joints, None, :, None]
        self.is_revolute = constants.is_revolute[joints, None, None] > 0
        self.all_revolute = bool(self.is_revolute.all())
