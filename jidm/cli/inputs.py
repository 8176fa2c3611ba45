"""Command line values turned into robots, cameras, poses and videos. Every error names the remedy."""

from __future__ import annotations

import glob
import json
import re
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
    return check_pose(values, robot, source=str(path))


def check_pose(values: Any, robot: Embodiment, *, source: str) -> NDArray[Any]:
    """Joint positions (n,) of a robot [rad or m], or of the first row of a trajectory.

    Args:
        values: the numbers.
        robot: whose joints they are.
        source: where they come from, for messages.

    Raises:
        InputError: the number of values is wrong, a value is not a number, or it lies outside the joint's limits.
    """
    import numpy as np

    try:
        q0 = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{source}: must hold {robot.n} numbers") from None
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


def expand_videos(given: Sequence[Path]) -> tuple[list[Path], bool]:
    """The videos that paths and patterns name, and whether they may be many: not if one file or folder of images is named.

    Args:
        given: video files, folders of images (one video each), folders of videos, patterns like `clips/*.mp4`.

    Raises:
        InputError: a pattern or folder holds nothing, a folder holds both, a video is named twice, or none is.
    """
    from jidm.video.image_folder import IMAGE_SUFFIXES
    from jidm.video.io import list_videos

    videos, many = [], len(given) > 1
    for path in given:
        found = [path]
        if not path.exists() and re.search(r"[*?\[]", str(path)):
            found, many = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))], True
            if not found:
                raise InputError(f"{path}: no file fits this pattern")
        for video in found:
            inside = list_videos(video) if video.is_dir() else []
            images = video.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in video.iterdir())
            if inside and images:
                raise InputError(f"{video} holds videos and images; name the videos: '{video}/*{inside[0].suffix}'")
            if video.is_dir() and not inside and not images:
                raise InputError(f"{video} holds neither videos nor images")
            videos += inside or [video]
            many = many or bool(inside)
    if not videos:
        raise InputError("name at least one video, or a folder of videos")
    if len(set(videos)) < len(videos):
        twice = next(video for video in videos if videos.count(video) > 1)
        raise InputError(f"{twice} is given twice; name each video once")
    return videos, many


def result_names(videos: Sequence[Path]) -> list[str]:
    """A name of its own for each video: its stem; the whole file name, or that of its folder before it, where stems repeat.

    Raises:
        InputError: names of videos and their folders repeat.
    """
    for names in (
        [video.stem for video in videos],
        [video.name for video in videos],
        [f"{video.absolute().parent.name}_{video.name}" for video in videos],
    ):
        if len(set(names)) == len(names):
            return names
    raise InputError(
        "videos in different folders have the same names; decode the folders one by one, each to its own --out"
    )


def collect_videos(given: Sequence[Path]) -> list[Path]:
    """The videos of `expand_videos`."""
    return expand_videos(given)[0]
