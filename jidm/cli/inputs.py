"""Command line values turned into robots, cameras, poses and videos. Every error names the remedy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jidm.errors import CameraError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jidm.camera.model import Camera
    from jidm.robot.embodiment import Embodiment


def resize_camera(camera: Camera, width: int, height: int) -> Camera:
    """The camera for the video's resolution, if the aspect ratio is the same.

    Args:
        camera: calibrated at any resolution.
        width, height: of the video [px].

    Raises:
        CameraError: the aspect ratios differ, so the video was cropped or is from another camera.
    """
    if (camera.width, camera.height) == (width, height):
        return camera
    if abs(camera.width * height - camera.height * width) > 0.01 * camera.width * height:
        raise CameraError(
            f"the camera is {camera.width}x{camera.height}, the video is {width}x{height}: the aspect ratios differ; "
            "give the camera of this video, cropping included"
        )
    return camera.resized(width, height)


def read_q0(given: Sequence[str], robot: Embodiment) -> NDArray[Any]:
    """Initial joint positions (n,) [rad or m] from the command line.

    Args:
        given: n numbers (separated by commas or spaces), `home`, or the path of a .npy file with n numbers or a (T, n)
            trajectory whose first row is used, or of a .json file with a list of n numbers or an object
            joint -> number.
        robot: whose joints they are.

    Raises:
        InputError: the number of values is wrong, a value is not a number, or it lies outside the joint's limits.
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
                "angles are in radians, lengths in meters"
            )
    return q0


def _read_numbers(path: Path) -> Any:
    """Content of a .npy or .json file."""
    import numpy as np

    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not a {path.suffix} file of plain numbers ({error})") from None


def _q0_file(path: Path, robot: Embodiment) -> Any:
    values = _read_numbers(path)
    if isinstance(values, dict):
        for name in values:
            robot.joint_index(name)  # its error names the alternatives
        absent = [name for name in robot.joint_names if name not in values]
        if absent:
            raise InputError(f"{path}: lacks {', '.join(absent)}")
        return [values[name] for name in robot.joint_names]
    return values


def read_poses(given: Sequence[str]) -> dict[str, list[float]] | None:
    """Initial joint positions of many videos: a .json file with an object file name -> numbers. None for other forms.

    Raises:
        InputError: the file cannot be read.
    """
    if len(given) != 1 or not given[0].lower().endswith(".json"):
        return None
    path = Path(given[0])
    content = _read_numbers(path)
    if not isinstance(content, dict) or not any(isinstance(values, list) for values in content.values()):
        return None  # one pose: a list, or an object joint -> number
    try:
        return {str(name): [float(x) for x in values] for name, values in content.items()}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} must hold an object of file name -> joint positions ({error})") from None


def video_size(video: Path, fps: float | None) -> tuple[int, int]:
    """Width and height of a video file or folder of images [px].

    Raises:
        VideoError: it cannot be opened.
    """
    from jidm.video.io import open_video

    stream = open_video(video, fps=fps if video.is_dir() else None)
    return stream.width, stream.height


def collect_videos(given: tuple[Path, ...]) -> list[Path]:
    """The video files given, and those in the folders given.

    Raises:
        InputError: there are none.
    """
    from jidm.video.io import list_videos

    videos = [video for path in given for video in (list_videos(path) if path.is_dir() else [path])]
    if not videos:
        raise InputError("name at least one video, or a folder of videos")
    return videos
