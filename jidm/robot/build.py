"""Making embodiments: from any URDF file, from parts mounted on one base, from a model and what is known about it."""

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
from jidm.robot import model as robot_model
from jidm.robot.convention import JointConvention
from jidm.robot.embodiment import VECTORS, Embodiment
from jidm.robot.model import Joint, RobotModel
from jidm.robot.urdf import read_urdf

DEFAULT_CONTROL_DT = 0.02
"""Control period of a robot whose descriptor states none [s]."""


def from_urdf(
    path: str | Path,
    *,
    mesh_roots: Sequence[str | Path] = (),
    name: str | None = None,
    joints: Sequence[str] | None = None,
    locked: Mapping[str, float] | None = None,
    **given: Any,
) -> Embodiment:
    """A usable embodiment from any URDF file.

    What the file does not say is filled in like this, and each default is written into `notes`:
    joints: every movable joint that is not a mimic, in the file's depth-first order; position limits: infinite for
    continuous joints; velocity and effort: the file's, infinite where it states none or zero; acceleration and jerk:
    infinite (a URDF has no place for them); control period: 0.02 s; tip links: the leaves of the tree; gripper
    joints: none (they are never guessed); home: zero where the limits allow it, else the middle of the range;
    amplitude: a quarter of the range, at most 0.5 rad, 0.05 m for unlimited prismatic joints; camera `front`: placed
    so that the robot's links stay in view over its range.

    Args:
        path: URDF file.
        mesh_roots: folders that its meshes may lie in, beside the file's own.
        name: name of the embodiment; the URDF's robot name if not given.
        joints: the actuated joints in the order wanted for `q`.
        locked: joints held at a value [rad or m] instead of being actuated.
        given: any of lower, upper, velocity, acceleration, jerk, effort, home, amplitude ((n,) each), control_dt [s],
            tip_links, gripper_joints, cameras, conventions, title, licence, source, notes.

    Raises:
        UrdfError: the file is malformed.
        EmbodimentError: what was given contradicts the file.
    """
    path = Path(path)
    model = read_urdf(path, mesh_roots=[Path(root) for root in mesh_roots])
    said = {"name": name, "joints": joints, "locked": locked, **given}
    return from_model(
        model, name=name or model.name, joints=joints, locked=locked, fingerprint=[urdf_fingerprint(path, model), said], **given
    )


def from_model(
    model: RobotModel,
    *,
    name: str,
    fingerprint: Any,
    joints: Sequence[str] | None = None,
    locked: Mapping[str, float] | None = None,
    coupling: tuple[ArrayLike, ArrayLike] | None = None,
    **given: Any,
) -> Embodiment:
    """An embodiment from a model that has been read; defaults as in `from_urdf`.

    Args:
        fingerprint: plain data (numbers, texts, lists, mappings) that stands for everything the content hash covers.
        coupling: (A, b) if it is already known; otherwise worked out from mimics and locked joints.
    """
    locked = dict(locked or {})
    where = f"embodiment '{name}'"
    movable = {j.name: j for j in model.movable_joints}
    names = _actuated(movable, locked) if joints is None else tuple(joints)
    for joint in (*names, *locked):
        if joint not in movable:
            raise EmbodimentError(f"{where}: no movable joint '{joint}' in the URDF: {did_you_mean(joint, movable)}")
    if both := [joint for joint in names if joint in locked]:
        raise EmbodimentError(f"{where}: joint '{both[0]}' is both actuated and locked; choose one")
    if not names:
        raise EmbodimentError(f"{where}: no joint moves; jidm needs at least one actuated joint")
    actuated = [movable[joint] for joint in names]
    A, b = model.coupling(names, locked) if coupling is None else coupling
    numbers, notes = _default_vectors(actuated, given)
    extra = {key: given.pop(key) for key in list(given) if key in _DESCRIPTIVE}
    if given:
        raise EmbodimentError(f"{where}: {did_you_mean(next(iter(given)), (*VECTORS, *_DESCRIPTIVE))}")
    parents = {j.parent for j in model.joints}
    extra.setdefault("tip_links", tuple(link.name for link in model.links if link.name not in parents))
    if "control_dt" not in extra:
        extra["control_dt"], notes["control_dt"] = DEFAULT_CONTROL_DT, "not stated; jidm's default"
    extra["notes"] = {**notes, **extra.get("notes", {})}
    made = Embodiment(
        name=name, model=model, joint_names=names, joint_types=tuple(j.type for j in actuated), **numbers,
        coupling_matrix=np.asarray(A), coupling_offset=np.asarray(b), content_hash=digest(fingerprint),
        **{"gripper_joints": (), **extra},
    )  # fmt: skip
    return made if made.cameras else replace(made, cameras={"front": _wide_view(made)})


_DESCRIPTIVE = (
    "control_dt", "tip_links", "gripper_joints", "cameras", "conventions", "title", "licence", "source", "notes",
)  # fmt: skip


def _actuated(movable: Mapping[str, Joint], locked: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(name for name, joint in movable.items() if joint.mimic is None and name not in locked)


def _default_vectors(joints: Sequence[Joint], given: dict[str, Any]) -> tuple[dict[str, NDArray[np.float64]], dict[str, str]]:
    """The (n,) vectors, taken out of `given` or from the URDF, and notes on what had to be filled in."""
    notes: dict[str, str] = {}

    def limit(field: str, missing: float) -> NDArray[np.float64]:
        if given.get(field) is not None:
            return np.atleast_1d(np.asarray(given.pop(field), dtype=np.float64))
        given.pop(field, None)
        values = [getattr(j.limit, field) for j in joints]
        unknown = [v is None or (v == 0 and field in ("velocity", "effort")) for v in values]
        if field in ("lower", "upper"):
            unknown = [u or j.type == "continuous" for u, j in zip(unknown, joints, strict=True)]
        if any(unknown):
            lacking = ", ".join(j.name for j, u in zip(joints, unknown, strict=True) if u)
            notes[field] = f"not stated for {lacking}; taken as unlimited"
        return np.array([missing if u else v for v, u in zip(values, unknown, strict=True)], dtype=np.float64)

    out = {"lower": limit("lower", -math.inf), "upper": limit("upper", math.inf)}
    for name in ("velocity", "effort"):
        out[name] = limit(name, math.inf)
    for name in ("acceleration", "jerk"):
        value = given.pop(name, None)
        if value is None:
            value, notes[name] = [math.inf] * len(joints), "not stated; taken as unlimited"
        out[name] = np.atleast_1d(np.asarray(value, dtype=np.float64))
    for name, default in (("home", _default_home), ("amplitude", _default_amplitude)):
        value = given.pop(name, None)
        if value is None:
            lower, upper = (x if x.shape == (len(joints),) else np.full(len(joints), np.nan) for x in (out["lower"], out["upper"]))
            value, notes[name] = default(joints, lower, upper), "not stated; worked out from the limits"
        out[name] = np.atleast_1d(np.asarray(value, dtype=np.float64))
    return out, notes


def _default_home(joints: Sequence[Joint], lower: NDArray[np.float64], upper: NDArray[np.float64]) -> NDArray[np.float64]:
    """Zero where allowed, else the middle of the range (the nearer end if one side is unlimited)."""
    with np.errstate(invalid="ignore"):
        middle = np.where(np.isfinite(lower) & np.isfinite(upper), (lower + upper) / 2, np.clip(0.0, lower, upper))
    return np.where((lower <= 0) & (upper >= 0), 0.0, middle)


def _default_amplitude(
    joints: Sequence[Joint], lower: NDArray[np.float64], upper: NDArray[np.float64]
) -> NDArray[np.float64]:
    most = np.array([math.inf if j.type == "prismatic" else 0.5 for j in joints])
    quarter = (upper - lower) / 4
    unlimited = np.array([0.05 if j.type == "prismatic" else 0.5 for j in joints])
    return np.minimum(np.where(np.isfinite(quarter), quarter, unlimited), most)


# ---- several robots as one ------------------------------------------------------------------------------------------


def compose(name: str | None = None, **parts: Embodiment | str | tuple[Embodiment | str, ArrayLike]) -> Embodiment:
    """Mount several robots on one new base link as one robot.

    Joints, links, cameras and tips become `<part>_<name>`; `q` is the parts' joints one after the other; the control
    period is the slowest part's. Joint conventions that every part has are joined. A camera `front` that sees all of
    it is added.

    Args:
        name: name of the new robot; the parts' names joined by "+" if not given.
        parts: prefix -> embodiment (or registered name), or (embodiment, T_base_part (4, 4) [m]).

    Raises:
        EmbodimentError: no part, or a transform that is not rigid.
    """
    if not parts:
        raise EmbodimentError("compose needs at least one part, for instance compose(left=arm, right=(arm, T_base_right))")
    mounted = {prefix: _mounted(prefix, part) for prefix, part in parts.items()}
    bodies = [e for e, _ in mounted.values()]
    name = name or "+".join(e.name for e in bodies)
    model = robot_model.compose(name, {prefix: (e.model, T) for prefix, (e, T) in mounted.items()})

    def joined(field: str) -> tuple[str, ...]:
        return tuple(f"{prefix}_{x}" for prefix, (e, _) in mounted.items() for x in getattr(e, field))

    shared = [key for key in bodies[0].conventions if all(key in e.conventions for e in bodies)]
    names, vectors = joined("joint_names"), {v: np.concatenate([getattr(e, v) for e in bodies]) for v in VECTORS}
    made = from_model(
        model,
        name=name,
        joints=names,
        coupling=(_block_diagonal([e.coupling_matrix for e in bodies]), np.concatenate([e.coupling_offset for e in bodies])),
        fingerprint=[name, [[prefix, e.content_hash, T.tolist()] for prefix, (e, T) in mounted.items()]],
        **vectors,
        control_dt=max(e.control_dt for e in bodies),
        tip_links=joined("tip_links"),
        gripper_joints=joined("gripper_joints"),
        conventions={
            key: JointConvention.compose({p: e.conventions[key] for p, (e, _) in mounted.items()}) for key in shared
        },
        title=" + ".join(e.title or e.name for e in bodies),
        licence="; ".join(dict.fromkeys(e.licence for e in bodies if e.licence)),
        source="; ".join(dict.fromkeys(e.source for e in bodies if e.source)),
        notes={f"{prefix}.{key}": text for prefix, (e, _) in mounted.items() for key, text in e.notes.items()},
    )
    theirs = {
        f"{prefix}_{key}": _moved_camera(form, T) for prefix, (e, T) in mounted.items() for key, form in e.cameras.items()
    }
    return replace(made, cameras={**made.cameras, **theirs})


def rigid(xyz: Sequence[float] = (0.0, 0.0, 0.0), rpy: Sequence[float] = (0.0, 0.0, 0.0)) -> NDArray[np.float64]:
    """(4, 4) transform from a position [m] and URDF roll, pitch, yaw [rad] (R = Rz(yaw) Ry(pitch) Rx(roll))."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(np.asarray(rpy, float)), np.sin(np.asarray(rpy, float))
    T = np.eye(4)
    T[:3, :3] = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    T[:3, 3] = xyz
    return T


def _mounted(prefix: str, part: Any) -> tuple[Embodiment, NDArray[np.float64]]:
    body, T = part if isinstance(part, tuple) and len(part) == 2 else (part, np.eye(4))
    body = Embodiment.load(body) if isinstance(body, str) else body
    if not isinstance(body, Embodiment):
        raise EmbodimentError(f"compose: part '{prefix}' must be an embodiment, its name, or (embodiment, 4x4 transform)")
    T = np.array(T, dtype=np.float64)
    rigid_enough = T.shape == (4, 4) and np.isfinite(T).all() and np.allclose(T[3], (0, 0, 0, 1))
    if not (rigid_enough and np.allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3), atol=1e-6) and np.linalg.det(T[:3, :3]) > 0):
        raise EmbodimentError(f"compose: transform of part '{prefix}' must be a rigid 4x4 matrix T_base_{prefix}")
    return body, T


def _block_diagonal(blocks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    out = np.zeros((sum(x.shape[0] for x in blocks), sum(x.shape[1] for x in blocks)))
    row = column = 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out


# ---- cameras --------------------------------------------------------------------------------------------------------


def _moved_camera(form: Mapping[str, Any], T_base_part: NDArray[np.float64]) -> dict[str, Any]:
    """A part's camera in the base frame of the whole."""
    R, t, out = T_base_part[:3, :3], T_base_part[:3, 3], dict(form)
    if "eye" not in form:
        T_part_base = np.linalg.inv(T_base_part)
        return {**out, "T_camera_base": (np.array(form["T_camera_base"], dtype=float) @ T_part_base).tolist()}
    for key in ("eye", "target"):
        out[key] = tuple((R @ np.array(form[key], dtype=float) + t).tolist())
    return {**out, "up": tuple((R @ np.array(form.get("up", (0.0, 0.0, 1.0)), dtype=float)).tolist())}


def _wide_view(embodiment: Embodiment, poses: int = 64) -> dict[str, Any]:
    """A look-at camera from the front and above that keeps the link origins of random poses in view.

    Link origins, not shapes, are what is framed, so a quarter more room is left all around.
    """
    import torch

    from jidm.robot.kinematics import Kinematics

    e, rng = embodiment, np.random.default_rng(0)
    low, high = (np.clip(x, e.home - 2 * e.amplitude, e.home + 2 * e.amplitude) for x in (e.lower, e.upper))
    q = torch.as_tensor(np.vstack([e.home, rng.uniform(low, high, size=(poses, e.n))]))
    points = Kinematics.from_embodiment(e).link_poses(q)[..., :3, 3].reshape(-1, 3).numpy()
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    radius = max(1.25 * float(np.linalg.norm(points - centre, axis=1).max()), 0.05)
    fov_y = 45.0
    towards = np.array([1.0, 0.6, 0.5]) / np.linalg.norm([1.0, 0.6, 0.5])
    eye = centre + towards * radius / math.sin(math.radians(fov_y) / 2)
    return {"eye": eye.round(3).tolist(), "target": centre.round(3).tolist(), "fov_y": fov_y, "width": 320, "height": 240}


# ---- content hash ---------------------------------------------------------------------------------------------------


def urdf_fingerprint(path: Path, model: RobotModel) -> list[Any]:
    """Digests of the URDF's bytes and of every mesh it refers to, by the reference as written: no path of this machine."""
    meshes: dict[str, str] = {}
    for link in model.links:
        for shape in (*link.visuals, *link.collisions):
            reference, file = shape.geometry.filename, shape.geometry.path
            if reference is not None and reference not in meshes:
                meshes[reference] = "absent" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
    # Line endings are the checkout's business, not the robot's.
    text = path.read_bytes().replace(b"\r\n", b"\n")
    return [hashlib.sha256(text).hexdigest(), sorted(meshes.items())]


def digest(fingerprint: Any) -> str:
    """sha256 of plain data, the same whatever the order of mapping keys; arrays count as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)):
            return value.tolist()
        if isinstance(value, JointConvention):
            return vars(value)
        raise EmbodimentError(f"a descriptor holds {type(value).__name__}, which has no content hash; give numbers and texts")

    text = json.dumps(fingerprint, sort_keys=True, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
