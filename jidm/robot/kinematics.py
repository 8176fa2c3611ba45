"""Batched, differentiable forward kinematics and geometric Jacobians of a tree of links.

Every joint transform is linear in (1, sin q, 1 - cos q, q) with constant 4x4 coefficients (Rodrigues' formula about a
fixed axis), so all of them come from one matrix product. The transforms of fixed joints are folded into these
coefficients, and each movable joint then costs one 4x4 product.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import InputError
from jidm.robot.model import RobotModel
from jidm.robot.transforms import skew

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

_Cached = TypeVar("_Cached", bound="_Constants | _Chain")


class Kinematics:
    """Forward kinematics and Jacobians of one robot.

    Frames: the base frame is the frame of the model's root link. Order: links as in `model.links`, columns as in
    `joint_names`. Works in the dtype and on the device of the `q` it is given, and under `torch.func` transforms
    (jacfwd, vmap, functional_call).

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
        A, b = (np.array(x, dtype=np.float64) for x in coupling)
        self._tree = _Tree(model, A)
        constants = _Constants.of_tree(self._tree, b)
        self._constants: dict[tuple[torch.dtype, torch.device], _Constants] = {
            (torch.float64, torch.device("cpu")): constants
        }
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
        constants = self._constants_like(q)
        q_full = q @ constants.A.T + constants.b
        basis = torch.stack([torch.ones_like(q_full), q_full.sin(), 1 - q_full.cos(), q_full], dim=-2)
        # (*batch, 4, m) x (4, m, 16) -> T_parent_child of every movable joint
        local = torch.einsum("...fm,fmk->...mk", basis, constants.coefficients).unflatten(-1, (4, 4))
        batch = q.shape[:-1]
        # Chains of fixed joints fold into constants, so only movable joints cost a product.
        moved: list[Tensor] = []
        for m, parent in enumerate(self._tree.movable_parents):
            step = local[..., m, :, :]
            moved.append(step if parent is None else moved[parent] @ step)
        eye = torch.eye(4, dtype=q.dtype, device=q.device).expand(*batch, 4, 4)
        frames = torch.stack([eye, *moved], dim=-3)
        return frames[..., constants.link_frame, :, :] @ constants.T_frame_link

    def link_twists(self, poses: Float[Tensor, "*batch links 4 4"]) -> Float[Tensor, "*batch links 6 n"]:
        """Spatial velocity of every link per unit joint velocity, in the base frame.

        A point of link l at p_base moves with `v + w x p_base` per unit of joint k, where
        `v = twists[l, :3, k]` [m/rad or m/m] and `w = twists[l, 3:, k]` [rad/rad or 0].

        Args:
            poses: what `link_poses` returned for the same q.
        """
        constants = self._constants_like(poses)
        frames = poses[..., constants.joint_link, :, :]  # the child link's frame is the joint frame, moved
        axis = torch.einsum("...mij,mj->...mi", frames[..., :3, :3], constants.axis)
        origin = frames[..., :3, 3]
        w = axis * constants.is_revolute[:, None]
        v = torch.linalg.cross(origin, w, dim=-1) + axis * (1 - constants.is_revolute)[:, None]
        per_joint = torch.cat([v, w], dim=-1)  # (*batch, m, 6)
        # Sum over the nonzero entries of A only, about one per row, instead of the (links, m, n) product.
        per_entry = per_joint[..., constants.entry_joint, :] * constants.entry_value[:, None]
        twists = per_entry.mT.unsqueeze(-3) * constants.entry_moves_link[:, None, :]
        if self._tree.one_to_one:
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
        # With the joint as the first axis, the transforms of one joint are contiguous in memory.
        x = torch.addmm(chain.b, chain.A, flat.T)
        basis = torch.stack([x.sin(), x.cos(), x], dim=-1)
        local = torch.baddbmm(chain.constant, basis, chain.coefficients).unflatten(-1, (4, 4))
        T = torch.eye(4, dtype=q.dtype, device=q.device).expand(len(flat), 4, 4)
        frames: list[Tensor] = []
        for step in local.unbind(0):
            T = step if not frames else T @ step
            frames.append(T)
        pose = T @ chain.T_frame_link
        moved = torch.stack(frames) if frames else T[None][:0]
        axis = (moved[..., :3, :3] @ chain.axis).squeeze(-1)
        arm = pose[..., :3, 3] - moved[..., :3, 3]
        rotational = torch.linalg.cross(axis, arm, dim=-1)
        v = rotational if chain.all_revolute else torch.where(chain.is_revolute, rotational, axis)
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
        if not 0 <= link < len(self.model.links):
            raise InputError(f"link {link} is none of the {len(self.model.links)} links of '{self.model.name}'")
        return _get_or_make(
            self._chains,
            (link, like.dtype, like.device),
            lambda: _Chain(self._tree, self._constants_like(like), link),
        )

    def _constants_like(self, like: Tensor) -> _Constants:
        return _get_or_make(
            self._constants,
            (like.dtype, like.device),
            lambda: self._constants[torch.float64, torch.device("cpu")].to(like.dtype, like.device),
        )


def _get_or_make(cache: dict[Any, _Cached], key: Hashable, make: Callable[[], _Cached]) -> _Cached:
    """The cached value, or a new one, which is cached unless a tracer owns its tensors.

    Inside a transform of torch.func or under torch.compile every new tensor is wrapped and dies with the transform.
    """
    if key in cache:
        return cache[key]
    # Tensors made in inference mode could never take part in a gradient again.
    with torch.inference_mode(False):
        value = make()
    if type(value.A) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(value.A):
        cache[key] = value
    return value


class _Tree:
    """Static structure of the links and the coupling map, in numpy: parents, ancestors, folded constant transforms."""

    def __init__(self, model: RobotModel, A: NDArray[np.float64]) -> None:
        index = {link.name: k for k, link in enumerate(model.links)}
        frame_of_link: list[int | None] = [None]  # movable joint whose frame the link is fixed to; None = base
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
        self.is_revolute = np.array([j.type != "prismatic" for j in self.joints], dtype=bool)
        self.A = A
        # The nonzero entries of A by column: which full joint (row) and which actuated joint (column).
        self.entry_column, self.entry_joint = np.nonzero(A.T)
        self.one_to_one = np.array_equal(self.entry_column, np.arange(A.shape[1]))

    def coefficients(self) -> NDArray[np.float64]:
        """(4, m, 16) coefficients of T_parent_child in the basis (1, sin q, 1 - cos q, q)."""
        c = np.zeros((4, len(self.joints), 4, 4))
        for k, (joint, T) in enumerate(zip(self.joints, self.local, strict=True)):
            R, K = T[:3, :3], skew(joint.axis)
            c[0, k] = T
            if joint.type == "prismatic":
                c[3, k, :3, 3] = R @ joint.axis
            else:
                c[1, k, :3, :3] = R @ K
                c[2, k, :3, :3] = R @ K @ K
        return c.reshape(4, len(self.joints), 16)


@dataclass(frozen=True)
class _Constants:
    """The tree's constants as tensors of one dtype on one device.

    Shapes, with m movable joints, n actuated joints and e nonzero entries of A: A (m, n), b (m,),
    coefficients (4, m, 16), axis (m, 3), is_revolute (m,), T_frame_link (links, 4, 4), entry_value (e,),
    entry_moves_link (links, e), entry_to_column (e, n); indices link_frame (links,), joint_link (m,), entry_joint (e,).
    """

    A: Tensor
    b: Tensor
    coefficients: Tensor
    axis: Tensor
    is_revolute: Tensor
    T_frame_link: Tensor
    entry_value: Tensor
    entry_moves_link: Tensor
    entry_to_column: Tensor
    link_frame: Tensor
    joint_link: Tensor
    entry_joint: Tensor

    @classmethod
    def of_tree(cls, tree: _Tree, b: NDArray[np.float64]) -> _Constants:
        """float64 on the CPU."""
        axes = [j.axis for j in tree.joints]
        arrays = {
            "A": tree.A,
            "b": b,
            "coefficients": tree.coefficients(),
            "axis": np.stack(axes) if axes else np.zeros((0, 3)),
            "is_revolute": tree.is_revolute.astype(np.float64),
            "T_frame_link": tree.T_frame_link,
            "entry_value": tree.A[tree.entry_joint, tree.entry_column],
            "entry_moves_link": tree.ancestors[:, tree.entry_joint],
            "entry_to_column": np.eye(tree.A.shape[1])[tree.entry_column],
            "link_frame": np.array(tree.link_frame, dtype=np.int64),
            "joint_link": np.array(tree.joint_link, dtype=np.int64),
            "entry_joint": tree.entry_joint,
        }
        with torch.inference_mode(False):
            return cls(**{name: torch.tensor(array) for name, array in arrays.items()})

    def to(self, dtype: torch.dtype, device: torch.device) -> _Constants:
        """The same in another dtype (indices stay integers) and on another device."""
        return _Constants(
            **{k: x.to(device=device, dtype=dtype if x.is_floating_point() else x.dtype) for k, x in vars(self).items()}
        )


class _Chain:
    """The constants of the joints between the base and one link."""

    def __init__(self, tree: _Tree, constants: _Constants, link: int) -> None:
        joints = np.flatnonzero(tree.ancestors[link]).tolist()
        one, sine, versine, position = constants.coefficients[:, joints]
        self.A, self.b = constants.A[joints], constants.b[joints, None]
        self.constant = (one + versine)[:, None]
        self.coefficients = torch.stack([sine, -versine, position], dim=1)
        self.T_frame_link = constants.T_frame_link[link]
        self.axis = constants.axis[joints, None, :, None]
        self.is_revolute = constants.is_revolute[joints, None, None] > 0
        self.all_revolute = bool(tree.is_revolute[joints].all())
