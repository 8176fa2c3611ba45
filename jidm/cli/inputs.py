"""What the command line is told, turned into a robot, a camera and a start pose; every refusal names the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jidm.errors import CameraError, InputError, VideoError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jidm.camera.model import Camera
    from jidm.robot.embodiment import Embodiment


def find_robot(given: str) -> Embodiment:
    """A robot by registered name, URDF file or descriptor folder.

    Raises:
        EmbodimentError: no such name, or the descriptor is wrong.
        UrdfError: the URDF is malformed.
    """
    from jidm.robot.registry import load_embodiment

    return load_embodiment(given)


def resize_camera(camera: Camera, width: int, height: int, video: Path) -> Camera:
    """The camera at the video's size, if the video shows the same view at another resolution.

    Raises:
        CameraError: the shapes differ, so the video was cropped or belongs to another camera.
    """
    if (camera.width, camera.height) == (width, height):
        return camera
    if abs(camera.width * height - camera.height * width) > 0.01 * camera.width * height:
        raise CameraError(
            f"the camera is {camera.width}x{camera.height}, {video} is {width}x{height}: another shape of picture; "
            "give the camera of this video, cropping included"
        )
    return camera.resized(width, height)


def read_q0(given: tuple[str, ...], robot: Embodiment) -> NDArray[Any]:
    """Start positions (n,) [rad or m] from the command line.

    Args:
        given: n numbers (commas or spaces between them), `home`, or the path of a .npy file with n numbers or a
            (T, n) trajectory whose first row counts, or a .json file with a list of n numbers or an object
            joint -> number.

    Raises:
        InputError: the number of values is wrong, a value is no number, or it lies outside the joint's limits.
    """
    import numpy as np

    words = [word for text in given for word in text.replace(",", " ").split()]
    if words == ["home"]:
        return np.array(robot.home)
    path = Path(given[0]) if len(given) == 1 else None
    if path is not None and path.suffix.lower() in (".npy", ".json"):
        values = _q0_file(path, robot)
    else:
        try:
            values = [float(word) for word in words]
        except ValueError:
            raise InputError(
                f"--q0 '{' '.join(given)}' must be {robot.n} numbers, 'home', or a .npy or .json file"
            ) from None
    try:
        q0 = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{path}: must hold {robot.n} numbers") from None
    q0 = q0[0] if q0.ndim == 2 and len(q0) else q0
    if q0.shape != (robot.n,):
        raise InputError(
            f"--q0 has {q0.size} values, '{robot.name}' has {robot.n} joints: {', '.join(robot.joint_names)}"
        )
    for k, name in enumerate(robot.joint_names):
        if not robot.within_limits(q0, tolerance=1e-3)[k]:
            raise InputError(
                f"--q0 of '{name}' is {q0[k]:g}, outside [{robot.lower[k]:g}, {robot.upper[k]:g}]; "
                "angles are in radians, lengths in metres"
            )
    return q0


def _q0_file(path: Path, robot: Embodiment) -> Any:
    import numpy as np

    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not a {path.suffix} file of plain numbers ({error})") from None
    if isinstance(values, dict):
        for name in values:
            robot.joint_index(name)  # names the alternatives when it is wrong
        absent = [name for name in robot.joint_names if name not in values]
        if absent:
            raise InputError(f"{path}: lacks {', '.join(absent)}")
        return [values[name] for name in robot.joint_names]
    return values


def choose_frame_rate(given: float | None, stated: float | None, video: Path) -> float:
    """The frame rate to use [1/s].

    Raises:
        VideoError: nobody knows it.
    """
    rate = given or stated
    if rate is None:
        raise VideoError(f"{video}: its frame rate is unknown; give --fps")
    return rate
