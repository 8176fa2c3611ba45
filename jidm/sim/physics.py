"""A robot in a PyBullet physics client of its own, posed by its joint positions. No dynamics are simulated."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError, MissingExtraError
from jidm.robot.urdf.writer import write_urdf

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment
    from jidm.robot.model import RobotModel

Client = TypeVar("Client", bound="PhysicsClient")


class PhysicsClient:
    """One robot with a fixed base, whose base frame is the world frame.

    Use as a context manager or call `close`. Several clients can live in one process. One client must not be used by
    two threads at once.

    Args:
        embodiment: the robot.
        export: writes the meshes that are to be loaded into a folder and returns the model that names them.

    Attributes:
        body: PyBullet's number of the robot.
        link_table: (L,) index into `embodiment.model.links` of PyBullet's links -1 (the base), 0, 1, ...

    Raises:
        MissingExtraError: PyBullet is not installed.
        EmbodimentError: a mesh is missing or unreadable.
    """

    def __init__(self, embodiment: Embodiment, export: Callable[[RobotModel, Path], RobotModel]) -> None:
        self.embodiment = embodiment
        self.bullet = load_pybullet()
        self._client: int | None = self.bullet.connect(self.bullet.DIRECT)
        try:
            self.body = self._load(export)
            self._joint_indices, self.link_table = self._map_joints()
        except BaseException:
            self.close()
            raise

    def __enter__(self: Client) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Disconnect the physics client. A second call does nothing."""
        client, self._client = getattr(self, "_client", None), None
        if client is not None:
            self.bullet.disconnect(client)

    def call(self, function: str, *args: Any, **options: Any) -> Any:
        """The result of a PyBullet function on this client.

        Raises:
            InputError: the client is closed.
        """
        if self._client is None:
            raise InputError(f"this {type(self).__name__} is closed; create a new one")
        return getattr(self.bullet, function)(*args, physicsClientId=self._client, **options)

    def set_configuration(self, q: ArrayLike | torch.Tensor) -> None:
        """Put the robot at actuated joint positions q (n,) [rad or m]; mimic and locked joints follow.

        Raises:
            InputError: q has another shape or is not finite.
        """
        q = check_positions(q, self.embodiment, "q (n,)", 1)
        q_full = self.embodiment.coupling_matrix @ q + self.embodiment.coupling_offset
        for joint, value in zip(self._joint_indices, q_full.tolist(), strict=True):
            self.call("resetJointState", self.body, joint, value)

    def link_poses(self, q: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
        """Poses `T_base_link` (L, 4, 4) [m] of all links at q (n,), computed by PyBullet, in order of `model.links`."""
        self.set_configuration(q)
        return self.current_link_poses()

    def current_link_poses(self) -> NDArray[np.float64]:
        """Poses `T_base_link` (L, 4, 4) [m] of all links at the joint positions that are set."""
        poses = np.tile(np.eye(4), (len(self.link_table), 1, 1))
        states = self.call(
            "getLinkStates", self.body, list(range(len(self.link_table) - 1)), computeForwardKinematics=True
        )
        for k, state in zip(self.link_table[1:], states, strict=True):
            poses[k, :3, 3] = state[4]
            poses[k, :3, :3] = np.reshape(self.bullet.getMatrixFromQuaternion(state[5]), (3, 3))
        return poses

    def _load(self, export: Callable[[RobotModel, Path], RobotModel]) -> int:
        # PyBullet would keep every file it has read for the life of the process. These are read once and deleted.
        self.call("setPhysicsEngineParameter", enableFileCaching=0)
        with tempfile.TemporaryDirectory(prefix="jidm-sim-") as folder:
            path = Path(folder) / "robot.urdf"
            write_urdf(export(self.embodiment.model, Path(folder)), path)
            with suppressed_output():
                body: int = self.call("loadURDF", str(path), useFixedBase=True)
        return body

    def _map_joints(self) -> tuple[list[int], NDArray[np.int32]]:
        """PyBullet's index of every movable joint, and the link table: PyBullet has its own order, names are the key."""
        model = self.embodiment.model
        joints, links = {}, [model.link_index(model.root)]
        for k in range(self.call("getNumJoints", self.body)):
            info = self.call("getJointInfo", self.body, k)
            joints[info[1].decode()] = k
            links.append(model.link_index(info[12].decode()))
        return [joints[joint.name] for joint in model.movable_joints], np.array(links, dtype=np.int32)


def check_positions(q: ArrayLike | torch.Tensor, embodiment: Embodiment, what: str, axes: int) -> NDArray[np.float64]:
    """Joint positions as an array with so many axes, the last of them n.

    Raises:
        InputError: q has another shape or is not finite.
    """
    array = np.asarray(q.detach().cpu() if isinstance(q, torch.Tensor) else q, dtype=np.float64)
    if array.ndim != axes or array.shape[-1] != embodiment.n:
        raise InputError(f"{what} of '{embodiment.name}' has n = {embodiment.n} joints, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{what} of '{embodiment.name}' must be finite")
    return array


@lru_cache(maxsize=1)
def load_pybullet() -> ModuleType:
    """The module pybullet.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        with suppressed_output():  # it prints its build time when imported
            import pybullet
    except ImportError:
        raise MissingExtraError("simulation", "pybullet", "sim") from None
    return pybullet


@contextlib.contextmanager
def suppressed_output() -> Iterator[None]:
    """Discard what C code prints: PyBullet writes notes to both standard streams and has no switch for it."""
    saved = [os.dup(1), os.dup(2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        yield
    finally:
        for stream, copy in enumerate(saved, start=1):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(sink)
