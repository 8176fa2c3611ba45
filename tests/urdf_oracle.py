"""Oracles for URDF files: pinocchio's reader, kinematics from scipy, and equality of models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from jidm.robot.model import Joint, RobotModel, Shape


def link_poses_scipy(model: RobotModel, q: Mapping[str, float]) -> dict[str, NDArray[np.float64]]:
    """T_base_link (4, 4) of every link at joint values by name [rad or m]; joints not named stay at zero."""
    poses = {model.root: np.eye(4)}
    for joint in model.joints:
        motion = np.eye(4)
        if joint.type == "prismatic":
            motion[:3, 3] = joint.axis * q.get(joint.name, 0.0)
        elif joint.movable:
            motion[:3, :3] = Rotation.from_rotvec(joint.axis * q.get(joint.name, 0.0)).as_matrix()
        poses[joint.child] = poses[joint.parent] @ joint.T_parent_joint @ motion
    return poses


class PinocchioModel:
    """A URDF file as read by pinocchio, whose exceptions pass through."""

    def __init__(self, path: Path, *, mimic: bool = False) -> None:
        import pinocchio as pin

        self._pin = pin
        self.model = pin.buildModelFromUrdf(str(path), mimic)
        self._data = self.model.createData()

    @property
    def movable(self) -> set[str]:
        """Joints of one degree of freedom."""
        joints = range(1, self.model.njoints)
        return {self.model.names[k] for k in joints if self.model.nvs[k] == 1}

    def limit(self, joint: str, key: str) -> float:
        """lower, upper [rad or m], velocity or effort of a joint with one coordinate."""
        k = self.model.getJointId(joint)
        lists = {"lower": "lowerPositionLimit", "upper": "upperPositionLimit"}
        at = self.model.idx_qs[k] if key in lists else self.model.idx_vs[k]
        return float(getattr(self.model, lists.get(key, f"{key}Limit"))[at])

    def link_poses(self, q: Mapping[str, float], names: Iterable[str]) -> dict[str, NDArray[np.float64]]:
        """T_base_link (4, 4) of the given links at joint values by name."""
        configuration = self._pin.neutral(self.model)
        for name, value in q.items():
            k = self.model.getJointId(name)
            at = self.model.idx_qs[k]
            # In pinocchio a continuous joint is a point on the unit circle.
            configuration[at : at + self.model.nqs[k]] = (
                [value] if self.model.nqs[k] == 1 else [np.cos(value), np.sin(value)]
            )
        self._pin.framesForwardKinematics(self.model, self._data, configuration)
        frames = {name: self.model.getFrameId(name, self._pin.FrameType.BODY) for name in names}
        return {name: self._data.oMf[k].homogeneous.copy() for name, k in frames.items()}


def random_joints(model: RobotModel, rng: np.random.Generator) -> dict[str, float]:
    """A value for every movable joint, mimics too, inside its limits [rad or m]."""
    values = {}
    for joint in model.movable_joints:
        low, high = joint.limit.lower, joint.limit.upper
        values[joint.name] = rng.uniform(-3 if low is None else max(low, -10), 3 if high is None else min(high, 10))
    return values


def disagreements(model: RobotModel, reference: PinocchioModel, *, poses: int = 5, seed: int = 0) -> dict[str, Any]:
    """Differences to pinocchio: joints, limits, and the largest differences of link poses [m, rad]."""
    mine = {joint.name for joint in model.movable_joints}
    found: dict[str, Any] = {"joints": sorted(mine ^ reference.movable), "limits": _limits(model, reference)}
    rng, meters, radians = np.random.default_rng(seed), 0.0, 0.0
    for _ in range(poses):
        q = random_joints(model, rng)
        ours, theirs = link_poses_scipy(model, q), reference.link_poses(q, [link.name for link in model.links])
        for name, pose in theirs.items():
            meters = max(meters, float(np.abs(ours[name][:3, 3] - pose[:3, 3]).max()))
            # For small angles the difference of two rotation matrices is the sine of the angle between them.
            radians = max(radians, float(np.linalg.norm(ours[name][:3, :3] - pose[:3, :3])) / np.sqrt(2))
    return found | {"meters": meters, "radians": radians}


def _limits(model: RobotModel, reference: PinocchioModel) -> list[str]:
    wrong = []
    for joint in model.movable_joints:
        if joint.name not in reference.movable:
            continue
        for key in ("lower", "upper", "velocity", "effort"):
            mine, theirs = getattr(joint.limit, key), reference.limit(joint.name, key)
            if joint.type == "continuous" and key in ("lower", "upper"):
                agree = mine is None
            elif (
                mine is None
            ):  # we read 0 as "not stated"; pinocchio keeps it, or has infinity where no limit is stated
                agree = theirs == 0 or np.isinf(theirs)
            else:
                agree = mine == theirs
            if not agree:
                wrong.append(f"{joint.name}.{key}: {mine} here, {theirs} there")
    return wrong


def assert_same(a: RobotModel, b: RobotModel, *, filenames: bool = True, tolerance: float = 1e-12) -> None:
    """Two models are equal, their poses and axes to `tolerance`; mesh spellings only if `filenames`."""
    assert a.name == b.name
    assert [link.name for link in a.links] == [link.name for link in b.links]
    for one, other in zip(a.joints, b.joints, strict=True):
        assert _plain(one) == _plain(other)
        np.testing.assert_allclose(one.T_parent_joint, other.T_parent_joint, rtol=0, atol=tolerance)
        np.testing.assert_allclose(one.axis, other.axis, rtol=0, atol=tolerance)
    for link, same in zip(a.links, b.links, strict=True):
        for shapes, others in ((link.visuals, same.visuals), (link.collisions, same.collisions)):
            assert [_shape(s, filenames) for s in shapes] == [_shape(s, filenames) for s in others]
            for s, t in zip(shapes, others, strict=True):
                np.testing.assert_allclose(s.T_link_shape, t.T_link_shape, rtol=0, atol=tolerance)


def _plain(joint: Joint) -> tuple[Any, ...]:
    return joint.name, joint.type, joint.parent, joint.child, joint.limit, joint.mimic


def _shape(shape: Shape, filenames: bool) -> tuple[Any, ...]:
    g = shape.geometry
    return g.kind, g.size, g.path, g.filename if filenames else None, shape.rgba
