"""Several robots mounted on one base link as one robot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.errors import EmbodimentError
from jidm.robot.convention import JointConvention
from jidm.robot.embodiment import JOINT_VECTORS, Embodiment
from jidm.robot.factory import embodiment_from_model
from jidm.robot.model import join_models


def compose(name: str | None = None, **parts: Any) -> Embodiment:
    """Mount several robots on one new base link as one robot.

    Joints, links, cameras and tips become `<part>_<name>`. `q` is the parts' joints one after the other. The control
    period is that of the slowest part. Joint conventions that every part has are joined. A camera `front` that sees the
    whole robot is added.

    Args:
        name: name of the new robot; the parts' names joined by "+" if not given.
        parts: prefix -> embodiment, or (embodiment, T_base_part (4, 4) [m]).

    Raises:
        EmbodimentError: no part, a part that is no embodiment, or a transform that is not rigid.
    """
    from scipy.linalg import block_diag

    if not parts:
        raise EmbodimentError(
            "compose needs at least one part, for instance compose(left=arm, right=(arm, T_base_right))"
        )
    mounted = {prefix: _resolve_part(prefix, part) for prefix, part in parts.items()}
    embodiments = [e for e, _ in mounted.values()]
    name = name or "+".join(e.name for e in embodiments)
    model = join_models(name, {prefix: (e.model, T) for prefix, (e, T) in mounted.items()})

    def prefixed(field: str) -> tuple[str, ...]:
        return tuple(f"{prefix}_{x}" for prefix, (e, _) in mounted.items() for x in getattr(e, field))

    shared = [key for key in embodiments[0].conventions if all(key in e.conventions for e in embodiments)]
    vectors: dict[str, Any] = {v: np.concatenate([getattr(e, v) for e in embodiments]) for v in JOINT_VECTORS}
    composed = embodiment_from_model(
        model,
        name=name,
        joints=prefixed("joint_names"),
        coupling=(
            block_diag(*(e.coupling_matrix for e in embodiments)),
            np.concatenate([e.coupling_offset for e in embodiments]),
        ),
        fingerprint=[name, [[prefix, e.content_hash, T.tolist()] for prefix, (e, T) in mounted.items()]],
        **vectors,
        control_dt=max(e.control_dt for e in embodiments),
        tip_links=prefixed("tip_links"),
        gripper_joints=prefixed("gripper_joints"),
        conventions={
            key: JointConvention.join({p: e.conventions[key] for p, (e, _) in mounted.items()}) for key in shared
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


def _transform_camera(camera: Mapping[str, Any], T_base_part: NDArray[np.float64]) -> dict[str, Any]:
    """A part's camera in the base frame of the composed robot."""
    if "eye" not in camera:
        T_part_base = np.linalg.inv(T_base_part)
        return {**camera, "T_camera_base": (np.array(camera["T_camera_base"], dtype=float) @ T_part_base).tolist()}
    R, t = T_base_part[:3, :3], T_base_part[:3, 3]
    eye, target, up = (np.array(x, float) for x in (camera["eye"], camera["target"], camera.get("up", (0, 0, 1))))
    moved = {"eye": R @ eye + t, "target": R @ target + t, "up": R @ up}
    return {**camera, **{key: tuple(vector.tolist()) for key, vector in moved.items()}}
