"""jidm: joint velocities from robot video, by optical flow, a Jacobian field and its analytic inverse.

The names exported here are imported on first access, so that `import jidm` and the command line start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.errors import (
        CameraError,
        EmbodimentError,
        InputError,
        JidmError,
        MissingExtraError,
        UrdfError,
        VideoError,
    )
    from jidm.estimation.result import JointMotion
    from jidm.fields.analytic import AnalyticField
    from jidm.idm import JacobianIDM
    from jidm.robot.composition import compose
    from jidm.robot.embodiment import Embodiment
    from jidm.robot.factory import embodiment_from_urdf
    from jidm.robot.kinematics import Kinematics
    from jidm.robot.registry import embodiment_names, load_embodiment, register_embodiment
    from jidm.video.io import read_video, write_video

__version__ = "0.1.0"

_EXPORTS = {
    "AnalyticField": "jidm.fields.analytic",
    "Camera": "jidm.camera.model",
    "CameraError": "jidm.errors",
    "Embodiment": "jidm.robot.embodiment",
    "EmbodimentError": "jidm.errors",
    "InputError": "jidm.errors",
    "JacobianIDM": "jidm.idm",
    "JidmError": "jidm.errors",
    "JointMotion": "jidm.estimation.result",
    "Kinematics": "jidm.robot.kinematics",
    "MissingExtraError": "jidm.errors",
    "UrdfError": "jidm.errors",
    "VideoError": "jidm.errors",
    "compose": "jidm.robot.composition",
    "embodiment_from_urdf": "jidm.robot.factory",
    "embodiment_names": "jidm.robot.registry",
    "load_embodiment": "jidm.robot.registry",
    "read_video": "jidm.video.io",
    "register_embodiment": "jidm.robot.registry",
    "write_video": "jidm.video.io",
}

__all__ = [
    "AnalyticField",
    "Camera",
    "CameraError",
    "Embodiment",
    "EmbodimentError",
    "InputError",
    "JacobianIDM",
    "JidmError",
    "JointMotion",
    "Kinematics",
    "MissingExtraError",
    "UrdfError",
    "VideoError",
    "compose",
    "embodiment_from_urdf",
    "embodiment_names",
    "load_embodiment",
    "read_video",
    "register_embodiment",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'jidm' has no attribute '{name}'")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
