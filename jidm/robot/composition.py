"""Several robots mounted on one base link as one robot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.errors import EmbodimentError
from jidm.robot import model as robot_model
from jidm.robot.convention import JointConvention
from jidm.robot.embodiment import JOINT_VECTORS, Embodiment
from jidm.robot.factory import embodiment_from_model


def compose(name: str | None = None, **parts: Any) -> Embodiment:
    """Mount several robots on one new base link as one robot.

    Joints, links, cameras and tips become `<part>_<name>`; `q` is the parts' joints one after the other; the control
    period is the slowest part's. Joint conventions that every part has are joined. A camera `front` that sees all of
    it is added.

    Args:
        name: name of the new robot; the parts' names joined by "+" if not given.
        parts: prefix -> embodiment, or (embodiment, T_base_part (4, 4) [m]).

    Raises:
        EmbodimentError: no part, a part that is no embodiment, or a transform that is not rigid.
    """
    if not parts:
        raise EmbodimentError(
            "compose needs at least one part, for instance compose(left=arm, right=(arm, T_base_right))"
        )
    mounted = {prefix: _resolve_part(prefix, part) for prefix, part in parts.items()}
    embodiments = [e for e, _ in mounted.values()]
    name = name or "+".join(e.name for e in embodiments)
    model = robot_model.compose(name, {prefix: (e.model, T) for prefix, (e, T) in mounted.items()})

    def prefixed(field: str) -> tuple[str, ...]:
        return tuple(f"{prefix}_{x}" for prefix, (e, _) in mounted.items() for x in getattr(e, field))

    shared = [key for key in embodiments[0].conventions if all(key in e.conventions for e in embodiments)]
    vectors: dict[str, Any] = {v: np.concatenate([getattr(e, v) for e in embodiments]) for v in JOINT_VECTORS}
    composed = embodiment_from_model(
        model,
        name=name,
        joints=prefixed("joint_names"),
        coupling=(
            _block_diagonal([e.coupling_matrix for e in embodiments]),
            np.concatenate([e.coupling_offset for e in embodiments]),
        ),
        fingerprint=[name, [[prefix, e.content_hash, T.tolist()] for prefix, (e, T) in mounted.items()]],
        **vectors,
        control_dt=max(e.control_dt for e in embodiments),
        tip_links=prefixed("tip_links"),
        gripper_joints=prefixed("gripper_joints"),
        conventions={
            key: JointConvention.compose({p: e.conventions[key] for p, (e, _) in mounted.items()}) for key in shared
        },
        title=" + ".join(e.title or e.name for e in embodiments),
        license="; ".join(dict.fromkeys(e.license for e in embodiments if e.license)),
        source="; ".join(dict.fromkeys(e.source for e in embodiments if e.source)),
        notes={f"{prefix}.{key}": text for prefix, (e, _) in mounted.items() for key, text in e.notes.items()},
    )
    part_cameras = {
        f"{prefix}_{key}": _transform_camera(form, T)
        for prefix, (e, T) in mounted.items()
        for key, form in e.cameras.items()
    }
    return replace(composed, cameras={**composed.cameras, **part_cameras})


def rigid_transform(
    xyz: Sequence[float] = (0.0, 0.0, 0.0), rpy: Sequence[float] = (0.0, 0.0, 0.0)
) -> NDArray[np.float64]:
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


def _resolve_part(prefix: str, part: Any) -> tuple[Embodiment, NDArray[np.float64]]:
    embodiment, T = part if isinstance(part, tuple) and len(part) == 2 else (part, np.eye(4))
    if not isinstance(embodiment, Embodiment):
        raise EmbodimentError(
            f"compose: part '{prefix}' must be an embodiment or (embodiment, 4x4 transform), got {embodiment!r}; "
            "load a robot by its name with load_embodiment"
        )
    T = np.array(T, dtype=np.float64)
    is_homogeneous = T.shape == (4, 4) and np.isfinite(T).all() and np.allclose(T[3], (0, 0, 0, 1))
    if not (
        is_homogeneous and np.allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3), atol=1e-6) and np.linalg.det(T[:3, :3]) > 0
    ):
        raise EmbodimentError(f"compose: transform of part '{prefix}' must be a rigid 4x4 matrix T_base_{prefix}")
    return embodiment, T


def _block_diagonal(blocks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    out = np.zeros((sum(x.shape[0] for x in blocks), sum(x.shape[1] for x in blocks)))
    row = column = 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out


def _transform_camera(camera: Mapping[str, Any], T_base_part: NDArray[np.float64]) -> dict[str, Any]:
    """A part's camera in the base frame of the whole."""
    R, t, out = T_base_part[:3, :3], T_base_part[:3, 3], dict(camera)
    if "eye" not in camera:
        T_part_base = np.linalg.inv(T_base_part)
        return {**out, "T_camera_base": (np.array(camera["T_camera_base"], dtype=float) @ T_part_base).tolist()}
    for key in ("eye", "target"):
        out[key] = tuple((R @ np.array(camera[key], dtype=float) + t).tolist())
    return {**out, "up": tuple((R @ np.array(camera.get("up", (0.0, 0.0, 1.0)), dtype=float)).tolist())}
