"""Embodiments from a URDF file or a robot model; what the file does not state gets a documented default."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jidm.errors import EmbodimentError, did_you_mean
from jidm.robot.convention import JointConvention
from jidm.robot.embodiment import JOINT_VECTORS, Embodiment
from jidm.robot.model import Joint, RobotModel
from jidm.robot.transforms import skew
from jidm.robot.urdf.reader import read_urdf

DEFAULT_CONTROL_DT = 0.02
"""Control period of a robot whose descriptor states none [s]."""

METADATA_KEYS = (
    "control_dt", "tip_links", "gripper_joints", "cameras", "conventions", "title", "license", "source", "notes",
)  # fmt: skip
"""The attributes of an embodiment that are neither joint vectors nor come from the URDF."""


def embodiment_from_urdf(
    path: str | Path,
    *,
    mesh_roots: Sequence[str | Path] = (),
    name: str | None = None,
    joints: Sequence[str] | None = None,
    locked: Mapping[str, float] | None = None,
    **overrides: Any,
) -> Embodiment:
    """A usable embodiment from any URDF file.

    What the file does not state gets a default, and each default is written into `notes`:

    - joints: every movable joint that is not a mimic, in the file's depth-first order;
    - position limits: infinite for continuous joints;
    - velocity and effort: as in the file, infinite where it states none, 0 or -1;
    - acceleration and jerk: infinite (a URDF does not contain them);
    - control period: 0.02 s;
    - tip links: the leaves of the tree; gripper joints: none, they are never guessed;
    - home: zero where the limits allow it, else the middle of the range;
    - exploration range: a quarter of the range, at most 0.5 rad, 0.05 m for unlimited prismatic joints;
    - camera `front`: placed so that the robot's links stay in view over its range.

    Args:
        path: URDF file.
        mesh_roots: folders its meshes may lie in, besides the file's own.
        name: name of the embodiment; the URDF's robot name if not given.
        joints: the actuated joints in the order of `q`.
        locked: joints held at a value [rad or m] instead of being actuated.
        overrides: any of lower, upper, velocity, acceleration, jerk, effort, home, exploration_range ((n,) each),
            control_dt [s], tip_links, gripper_joints, cameras, conventions, title, license, source, notes.

    Raises:
        UrdfError: the file is malformed.
        EmbodimentError: an argument contradicts the file.
    """
    path = Path(path)
    model = read_urdf(path, mesh_roots=mesh_roots)
    arguments = {"name": name, "joints": joints, "locked": locked, **overrides}
    return embodiment_from_model(
        model,
        name=name or model.name,
        joints=joints,
        locked=locked,
        fingerprint=[urdf_fingerprint(path, model), arguments],
        **overrides,
    )


def embodiment_from_model(
    model: RobotModel,
    *,
    name: str,
    fingerprint: Any,
    joints: Sequence[str] | None = None,
    locked: Mapping[str, float] | None = None,
    coupling: tuple[ArrayLike, ArrayLike] | None = None,
    **overrides: Any,
) -> Embodiment:
    """An embodiment from a robot model; defaults as in `embodiment_from_urdf`.

    Args:
        model: links and joints.
        name: name of the embodiment.
        fingerprint: plain data (numbers, texts, lists, mappings) that stands for everything the content hash covers.
        joints, locked, overrides: as for `embodiment_from_urdf`.
        coupling: (A, b) of `q_full = A @ q + b` if it is known; else computed from mimics and locked joints.

    Raises:
        EmbodimentError: an argument is unknown or contradicts the model.
    """
    locked, where = dict(locked or {}), f"embodiment '{name}'"
    movable = {j.name: j for j in model.movable_joints}
    if joints is None:
        joints = [name for name, joint in movable.items() if joint.mimic is None and name not in locked]
    names = tuple(joints)
    for joint in (*names, *locked):
        if joint not in movable:
            raise EmbodimentError(f"{where}: no movable joint '{joint}' in the URDF: {did_you_mean(joint, movable)}")
    if both := [joint for joint in names if joint in locked]:
        raise EmbodimentError(f"{where}: joint '{both[0]}' is both actuated and locked; choose one")
    if not names:
        raise EmbodimentError(f"{where}: no joint moves; jidm needs at least one actuated joint")
    known = (*JOINT_VECTORS, *METADATA_KEYS)
    for key in overrides:
        if key not in known:
            raise EmbodimentError(f"{where}: unknown argument '{key}': {did_you_mean(key, known)}")
    actuated = [movable[joint] for joint in names]
    A, b = model.coupling(names, locked) if coupling is None else coupling
    given = {key: overrides[key] for key in JOINT_VECTORS if overrides.get(key) is not None}
    vectors, notes = _vectors(actuated, given, where)
    metadata = select_metadata(overrides)
    parents = {j.parent for j in model.joints}
    metadata.setdefault("tip_links", tuple(link.name for link in model.links if link.name not in parents))
    if "control_dt" not in metadata:
        metadata["control_dt"], notes["control_dt"] = DEFAULT_CONTROL_DT, "not stated; jidm's default"
    metadata["notes"] = {**notes, **metadata.get("notes", {})}
    embodiment = Embodiment(
        name=name, model=model, joint_names=names, joint_types=tuple(j.type for j in actuated), **vectors,
        coupling_matrix=np.asarray(A), coupling_offset=np.asarray(b), content_hash=digest(fingerprint),
        **{"gripper_joints": (), **metadata},
    )  # fmt: skip
    return embodiment if embodiment.cameras else replace(embodiment, cameras={"front": _default_camera(embodiment)})


def select_metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values whose keys are in `METADATA_KEYS`; lists become tuples."""
    return {key: tuple(v) if isinstance(v := values[key], list) else v for key in METADATA_KEYS if key in values}


def _vectors(joints: Sequence[Joint], given: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The (n,) vectors: as given, else from the URDF, else the default; and a note on every default."""
    out: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for name in JOINT_VECTORS:
        if name in given:
            out[name] = np.asarray(given[name], dtype=np.float64)
            if out[name].shape != (len(joints),):
                raise EmbodimentError(
                    f"{where}: {name} has {out[name].size} values, the robot has {len(joints)} joints"
                )
        elif name in ("lower", "upper", "velocity", "effort"):
            out[name], unlimited = _from_limits(joints, name)
            if unlimited:
                unstated = "not stated" if name in ("lower", "upper") else "not stated (none, 0 or -1)"
                notes[name] = f"{unstated} for {', '.join(unlimited)}; taken as unlimited"
        elif name in ("acceleration", "jerk"):
            out[name], notes[name] = np.full(len(joints), math.inf), "not stated; taken as unlimited"
    # Both follow from the limits.
    if "home" not in out:
        out["home"], notes["home"] = _default_home(out["lower"], out["upper"]), "not stated; derived from the limits"
    if "exploration_range" not in out:
        out["exploration_range"] = _default_exploration_range(joints, out["lower"], out["upper"])
        notes["exploration_range"] = "not stated; derived from the limits"
    return out, notes


def _from_limits(joints: Sequence[Joint], field: str) -> tuple[NDArray[np.float64], list[str]]:
    """One limit of every joint, and the names of the joints that state none."""
    infinite = -math.inf if field == "lower" else math.inf
    values, unlimited = [], []
    for joint in joints:
        value = getattr(joint.limit, field)
        unstated = value is None or (field in ("lower", "upper") and joint.type == "continuous")
        if unstated:
            value = infinite
            unlimited.append(joint.name)
        values.append(value)
    return np.array(values, dtype=np.float64), unlimited


def _default_home(lower: NDArray[np.float64], upper: NDArray[np.float64]) -> NDArray[np.float64]:
    """Zero where the limits allow it, else the middle of the range (the nearer end if one side is unlimited)."""
    with np.errstate(invalid="ignore"):
        middle = np.where(np.isfinite(lower) & np.isfinite(upper), (lower + upper) / 2, np.clip(0.0, lower, upper))
    return np.where((lower <= 0) & (upper >= 0), 0.0, middle)


def _default_exploration_range(
    joints: Sequence[Joint], lower: NDArray[np.float64], upper: NDArray[np.float64]
) -> NDArray[np.float64]:
    prismatic = np.array([joint.type == "prismatic" for joint in joints])
    quarter = (upper - lower) / 4
    limited = np.where(prismatic, quarter, np.minimum(quarter, 0.5))
    return np.where(np.isfinite(quarter), limited, np.where(prismatic, 0.05, 0.5))


# ---- cameras --------------------------------------------------------------------------------------------------------


_CAMERA_POSES = 64
"""Random poses whose link origins the default camera keeps in view."""


def _default_camera(e: Embodiment) -> dict[str, Any]:
    """A look-at camera from the front and above that keeps the link origins of random poses in view.

    A margin of a quarter is left all around, because link origins, not shapes, are framed.
    """
    rng = np.random.default_rng(0)
    low, high = (
        np.clip(x, e.home - 2 * e.exploration_range, e.home + 2 * e.exploration_range) for x in (e.lower, e.upper)
    )
    q = np.vstack([e.home, rng.uniform(low, high, size=(_CAMERA_POSES, e.n))])
    points = _link_origins(e, q).reshape(-1, 3)
    center = (points.min(axis=0) + points.max(axis=0)) / 2
    radius = max(1.25 * float(np.linalg.norm(points - center, axis=1).max()), 0.05)
    fov_y = 45.0
    direction = np.array([1.0, 0.6, 0.5]) / np.linalg.norm([1.0, 0.6, 0.5])
    eye = center + direction * radius / math.sin(math.radians(fov_y) / 2)
    return {
        "eye": eye.round(3).tolist(),
        "target": center.round(3).tolist(),
        "fov_y": fov_y,
        "width": 320,
        "height": 240,
    }


def _link_origins(e: Embodiment, q: NDArray[np.float64]) -> NDArray[np.float64]:
    """(poses, links, 3) link origins in the base frame [m] at q (poses, n).

    In numpy, not by `Kinematics`, because loading an embodiment must not import torch.
    """
    q_full = q @ e.coupling_matrix.T + e.coupling_offset
    value = {j.name: q_full[:, k] for k, j in enumerate(e.model.movable_joints)}
    pose = {e.model.root: np.tile(np.eye(4), (len(q), 1, 1))}
    for joint in e.model.joints:
        motion = np.tile(np.eye(4), (len(q), 1, 1))
        if joint.type == "prismatic":
            motion[:, :3, 3] = joint.axis * value[joint.name][:, None]
        elif joint.movable:
            K = skew(joint.axis)
            s, c = (f(value[joint.name])[:, None, None] for f in (np.sin, np.cos))
            motion[:, :3, :3] += s * K + (1 - c) * K @ K
        pose[joint.child] = pose[joint.parent] @ joint.T_parent_joint @ motion
    return np.stack([T[:, :3, 3] for T in pose.values()], axis=1)


# ---- content hash ---------------------------------------------------------------------------------------------------


def urdf_fingerprint(path: Path, model: RobotModel) -> list[Any]:
    """Digests of the URDF and of every mesh, under the reference as written so that no path of this machine counts."""
    meshes: dict[str, str] = {}
    for link in model.links:
        for shape in (*link.visuals, *link.collisions):
            reference, file = shape.geometry.filename, shape.geometry.path
            if reference is not None and reference not in meshes:
                meshes[reference] = "absent" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
    # Line endings depend on the checkout, not on the robot.
    text = path.read_bytes().replace(b"\r\n", b"\n")
    return [hashlib.sha256(text).hexdigest(), sorted(meshes.items())]


def digest(fingerprint: Any) -> str:
    """sha256 of plain data, independent of the order of mapping keys; arrays count as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)):
            return value.tolist()
        if isinstance(value, JointConvention):
            return vars(value)
        raise EmbodimentError(
            f"a descriptor holds {type(value).__name__}, which has no content hash; give numbers and texts"
        )

    text = json.dumps(fingerprint, sort_keys=True, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
