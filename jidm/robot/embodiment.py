"""Embodiment: the frozen description of one robot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.errors import CameraError, EmbodimentError, did_you_mean
from jidm.robot.convention import JointConvention
from jidm.robot.model import RobotModel

if TYPE_CHECKING:
    from jidm.camera.model import Camera

JOINT_VECTORS = ("lower", "upper", "velocity", "acceleration", "jerk", "effort", "home", "exploration_range")
"""The per-joint numbers of an embodiment, each of shape (n,)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Embodiment:
    """One robot: its links, its n actuated joints in a fixed order, their limits, and default cameras.

    The base frame is the frame of the root link. Every array is read-only; two embodiments are equal when their
    content hashes are. Make one with `load_embodiment`, `embodiment_from_urdf` or `compose` rather than by hand.

    Attributes:
        name: registry name.
        model: links and joints.
        joint_names: the order of `q`; mimic and locked joints are not in it.
        joint_types: revolute, continuous or prismatic.
        lower, upper: (n,) position limits [rad or m]; infinite where unlimited.
        velocity, acceleration, jerk: (n,) limits [rad or m per s, s^2, s^3]; infinite where unknown.
        effort: (n,) [N m or N]; infinite where unknown.
        control_dt: control period [s].
        coupling_matrix, coupling_offset: A (m, n) and b (m,) of `q_full = A @ q + b` over `model.movable_joints`.
        tip_links: the end-effector links (fingertips, tool).
        gripper_joints: joints of `joint_names` that open and close a gripper.
        home: (n,) a safe and typical pose [rad or m], where motions start.
        exploration_range: (n,) how far motor babbling moves each joint to either side of home [rad or m], within its
            limits.
        cameras: name -> look-at or matrix form of `Camera.from_dict`, in the base frame.
        conventions: name -> how external data order, orient and scale these joints.
        title, license, source: the robot's full name, the license of its files, where they come from.
        notes: key -> where a number comes from, or why it was chosen.
        content_hash: sha256 over URDF, meshes and descriptor; the same on every machine.
    """

    name: str
    model: RobotModel
    joint_names: tuple[str, ...]
    joint_types: tuple[str, ...]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    velocity: NDArray[np.float64]
    acceleration: NDArray[np.float64]
    jerk: NDArray[np.float64]
    effort: NDArray[np.float64]
    control_dt: float
    coupling_matrix: NDArray[np.float64]
    coupling_offset: NDArray[np.float64]
    tip_links: tuple[str, ...]
    gripper_joints: tuple[str, ...]
    home: NDArray[np.float64]
    exploration_range: NDArray[np.float64]
    content_hash: str
    cameras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    conventions: Mapping[str, JointConvention] = field(default_factory=dict)
    title: str = ""
    license: str = ""
    source: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._freeze()
        self._validate()

    @property
    def n(self) -> int:
        """Number of actuated joints."""
        return len(self.joint_names)

    @property
    def base_link(self) -> str:
        """The link whose frame is the base frame."""
        return self.model.root

    @property
    def gripper_mask(self) -> NDArray[np.bool_]:
        """(n,) True for gripper joints."""
        return np.array([name in self.gripper_joints for name in self.joint_names], dtype=bool)

    def joint_index(self, name: str) -> int:
        """Index of a joint in `q`.

        Raises:
            EmbodimentError: the robot has no such actuated joint.
        """
        if name not in self.joint_names:
            raise EmbodimentError(f"'{self.name}' has no joint '{name}': {did_you_mean(name, self.joint_names)}")
        return self.joint_names.index(name)

    def camera(self, source: str | Path | Camera = "front") -> Camera:
        """A camera of the robot by name, of a JSON file, or a `Camera`, whose values are checked.

        Raises:
            CameraError: it is none of these, or not a pinhole camera.
        """
        from jidm.camera.model import Camera

        if isinstance(source, Camera):
            return source.validated()
        found = self.find_camera(source)
        return Camera.load(found) if isinstance(found, Path) else Camera.from_dict(found)

    def find_camera(self, source: str | Path) -> Mapping[str, Any] | Path:
        """The values of a camera of the robot by name, or the path of an existing file; nothing heavy is imported.

        Raises:
            CameraError: it is neither.
        """
        if source in self.cameras:
            return self.cameras[str(source)]
        if Path(source).exists():
            return Path(source)
        if str(source).lower().endswith(".json"):
            raise CameraError(f"cannot read camera file {source}: No such file or directory")
        raise CameraError(
            f"'{source}' is neither a file nor a camera of '{self.name}': {did_you_mean(str(source), self.cameras)}"
        )

    def convention(self, name: str) -> JointConvention:
        """A joint convention by name.

        Raises:
            EmbodimentError: no convention of that name.
        """
        if name not in self.conventions:
            raise EmbodimentError(
                f"'{self.name}' has no joint convention '{name}': {did_you_mean(name, self.conventions)}"
            )
        return self.conventions[name]

    def within_limits(self, q: ArrayLike, *, tolerance: float = 1e-9) -> NDArray[np.bool_]:
        """Which of q (*batch, n) [rad or m] lie inside the position limits: (*batch, n)."""
        q = np.asarray(q, dtype=np.float64)
        return (q >= self.lower - tolerance) & (q <= self.upper + tolerance)

    # ---- value semantics ----------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return self.content_hash == other.content_hash if isinstance(other, Embodiment) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def __repr__(self) -> str:
        return f"Embodiment('{self.name}', n={self.n}, content_hash='{self.content_hash[:12]}')"

    def __deepcopy__(self, memo: dict[int, Any]) -> Embodiment:
        return self  # immutable

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            object.__setattr__(self, key, value)
        self._freeze()  # pickling drops numpy's read-only flag

    def _freeze(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in (*JOINT_VECTORS, "coupling_matrix", "coupling_offset"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.flags.writeable = False
            put(name, array)
        for name in ("joint_names", "joint_types", "tip_links", "gripper_joints"):
            put(name, tuple(getattr(self, name)))
        for name in ("cameras", "conventions", "notes"):
            put(name, _deep_freeze(getattr(self, name)))
        for joint in self.model.joints:
            joint.T_parent_joint.flags.writeable = joint.axis.flags.writeable = False
        for link in self.model.links:
            for shape in (*link.visuals, *link.collisions):
                shape.T_link_shape.flags.writeable = False

    def _validate(self) -> None:
        where, n = f"embodiment '{self.name}'", self.n
        if len(set(self.joint_names)) != n or len(self.joint_types) != n:
            raise EmbodimentError(f"{where}: joint names must be unique and each must have a type")
        for name in JOINT_VECTORS:
            value = getattr(self, name)
            if value.shape != (n,):
                raise EmbodimentError(f"{where}: {name} has {value.size} values, the robot has {n} joints")
            if np.isnan(value).any() or (name in ("home", "exploration_range") and not np.isfinite(value).all()):
                raise EmbodimentError(f"{where}: {name} holds a value that is not a number")
        m = len(self.model.movable_joints)
        if self.coupling_matrix.shape != (m, n) or self.coupling_offset.shape != (m,):
            raise EmbodimentError(f"{where}: the coupling map must be {m} x {n}")
        for k, joint in enumerate(self.joint_names):
            if self.lower[k] > self.upper[k]:
                raise EmbodimentError(f"{where}: joint '{joint}' has lower {self.lower[k]:g} > upper {self.upper[k]:g}")
            if not self.within_limits(self.home)[k]:
                raise EmbodimentError(
                    f"{where}: home of '{joint}' is {self.home[k]:g}, outside [{self.lower[k]:g}, {self.upper[k]:g}]"
                )
            for name in ("velocity", "acceleration", "jerk"):
                if getattr(self, name)[k] <= 0:
                    raise EmbodimentError(
                        f"{where}: {name} of '{joint}' must be positive, got {getattr(self, name)[k]:g}"
                    )
            for name in ("effort", "exploration_range"):
                if getattr(self, name)[k] < 0:
                    raise EmbodimentError(f"{where}: {name} of '{joint}' must not be negative")
        if not (np.isfinite(self.control_dt) and self.control_dt > 0):
            raise EmbodimentError(f"{where}: control_dt must be positive seconds, got {self.control_dt}")
        for name in self.gripper_joints:
            self.joint_index(name)
        links = tuple(link.name for link in self.model.links)
        for name in self.tip_links:
            if name not in links:
                raise EmbodimentError(f"{where}: tip link '{name}' is not in the URDF: {did_you_mean(name, links)}")
        for name, convention in self.conventions.items():
            if convention.joint_names != self.joint_names:
                raise EmbodimentError(f"{where}: convention '{name}' is for other joints: {convention.joint_names}")


class _FrozenDict(dict[str, Any]):
    """An immutable dictionary; unlike MappingProxyType it can be pickled and copied, and prints as a dictionary."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("an embodiment is frozen; make a new one with dataclasses.replace or from its descriptor")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return _FrozenDict, (dict(self),)


def _deep_freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _FrozenDict({key: _deep_freeze(item) for key, item in value.items()})
    return tuple(_deep_freeze(item) for item in value) if isinstance(value, list) else value
