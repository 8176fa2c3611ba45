"""Runs for the viewer: from a decode folder, a decoder and a video, or an episode of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import ArrayLike
from torch import Tensor

from jidm.camera.model import Camera
from jidm.errors import InputError, JidmError, VideoError
from jidm.estimation.result import JointMotion
from jidm.fields.analytic import AnalyticField
from jidm.fields.free import LearnedField
from jidm.flow import DisFlow
from jidm.robot.registry import load_embodiment
from jidm.video.io import open_video
from jidm.video.preparation import rotated, undistorted
from jidm.visualization.viewer.viewed_run import ViewedRun, recorded_motion, reduced

if TYPE_CHECKING:
    from jidm.datasets import RecordedDataset
    from jidm.datasets.reader import Episode
    from jidm.fields.base import JacobianField
    from jidm.idm import JacobianIDM
    from jidm.robot.embodiment import Embodiment

MOTION_FILE, SUMMARY_FILE = "motion.npz", "summary.json"
"""The files of a decode folder that are read."""

_POINTS, _OCCLUDERS = 12000, 40000  # surface points of an exact field that are drawn, and that fill its grid
_MAX_BYTES = 4 * 2**30  # of the reduced frames of one video


def load_decode(
    folder: str | Path,
    *,
    video: str | Path | None = None,
    embodiment: str | Path | None = None,
    checkpoint: str | Path | None = None,
    camera: str | Path | None = None,
) -> ViewedRun:
    """The run in a folder that `jidm decode` wrote.

    Args:
        folder: with motion.npz and summary.json; truth.npy, which `jidm demo` writes, is shown if it is there.
        video: where the video lies now; where it was decoded if not given.
        embodiment, checkpoint, camera: in place of those that were used to decode.

    Raises:
        InputError: files are missing, damaged or of different runs.
        VideoError: the video cannot be read.
    """
    folder = Path(folder)
    absent = [name for name in (MOTION_FILE, SUMMARY_FILE) if not (folder / name).is_file()]
    if absent:
        raise InputError(
            f"{folder}: is no decode folder, it lacks {' and '.join(absent)}; 'jidm decode VIDEO --out {folder}' makes one"
        )
    motion = JointMotion.load(folder / MOTION_FILE)
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        recorded_video, fps = str(summary["video"]), float(summary["fps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / SUMMARY_FILE}: is not a summary written by jidm decode ({error}); decode again"
        ) from None
    robot = _load_robot(embodiment or summary.get("embodiment_file") or summary.get("embodiment"))
    path = Path(video or _find_video(folder, recorded_video))
    stream = rotated(open_video(path, fps=fps if path.is_dir() else None), motion.provenance.get("rotated", 0))
    view = _camera(robot, camera or summary.get("camera"), stream.width, stream.height)
    if view is not None and (distortion := motion.provenance.get("undistorted")):
        stream = undistorted(stream, view.K, distortion)
    frames, width, height = collect_frames(pixels for _, pixels in stream.pixels())
    source = checkpoint or _checkpoint_name(motion)
    field = exact_field(robot, view) or _learned_field(source)
    truth = _read_truth(folder / "truth.npy", motion)
    flow = None if isinstance(field, LearnedField) else DisFlow()
    method = str(summary.get("method", ""))
    return ViewedRun(
        f"{folder.name}: {Path(recorded_video).name}, {method}",
        frames,
        width,
        height,
        motion,
        robot,
        view,
        field,
        flow,
        truth,
    )


def decode_run(
    frames: list[UInt8[Tensor, "3 h w"]], width: int, height: int, motion: JointMotion, idm: JacobianIDM, title: str,
    **more: Any,
) -> ViewedRun:  # fmt: skip
    """A run that was decoded in this process.

    Args:
        frames: of `read_frames`.
        width, height: of the video [px].
        motion: decoded from it.
        idm: the decoder.
        title: one line.
        more: further attributes of `ViewedRun`.
    """
    camera = getattr(idm.field, "camera", None)
    field: JacobianField | LearnedField = idm.field
    flow = idm.flow or (None if isinstance(field, LearnedField) else DisFlow())
    return ViewedRun(title, frames, width, height, motion, idm.embodiment, camera, field, flow, **more)


def load_episode(
    dataset: RecordedDataset, index: int, *, image_key: str | None = None, embodiment: str | Path | None = None,
    camera: str | Path | None = None,
) -> ViewedRun:  # fmt: skip
    """A recorded episode with its recorded joint positions.

    Args:
        dataset: a LeRobot data set.
        index: of the episode.
        image_key: which camera; may be omitted if there is only one.
        embodiment: the robot; that of the recipe if not given and the data set was recorded by jidm.
        camera: its calibration; that of the recording if jidm made it.

    Raises:
        DatasetError: no such episode or camera, or its files are damaged.
        InputError: the robot has other joints.
    """
    episode = dataset.episode(index)
    frames, width, height = collect_frames(torch.from_numpy(x).permute(2, 0, 1) for x in episode.frames(image_key))
    name = dataset.recipe.get("embodiment")
    robot = load_embodiment(embodiment) if embodiment is not None else _load_robot(name, required=False)
    joints, q = dataset.joint_names, episode.state
    if robot is not None and len(robot.joint_names) == q.shape[1]:
        joints = robot.joint_names
    elif robot is not None and embodiment is not None:
        raise InputError(
            f"{dataset.root}: records {q.shape[1]} joints, '{robot.name}' has {robot.n}; give its own --embodiment"
        )
    else:
        robot = None
    types = robot.joint_types if robot is not None else ("revolute",) * q.shape[1]
    motion = recorded_motion(joints, types, episode.time, q)
    view = (
        _camera(robot, camera, width, height)
        if camera is not None
        else _recorded_camera(episode, image_key, width, height)
    )
    title = f"{dataset.root.name}: episode {index}{f', {episode.task}' if episode.task else ''}"
    return ViewedRun(
        title, frames, width, height, motion, robot, view, exact_field(robot, view), DisFlow(), decoded=False
    )


def decode_episode(
    recorded: ViewedRun, episode: Episode, idm: JacobianIDM, *, image_key: str | None = None, smooth: bool = False
) -> ViewedRun:
    """A recorded episode decoded, with the recorded positions as truth where they are of the same joints.

    Args:
        recorded: from `load_episode`.
        episode: the same.
        idm: the decoder. It starts from the recorded pose if it cannot estimate one.
        image_key: which camera; may be omitted if there is only one.
        smooth: estimate each frame from later frames too.
    """
    q, n = recorded.motion.position.numpy(), len(idm.joint_names)
    same_joints = q.shape[1] == n
    starts_itself = hasattr(idm.field, "predict_pose_from_frame") or isinstance(idm.field, LearnedField)
    q0 = None if starts_itself or not same_joints else q[0]
    video = episode.video(image_key)
    motion = idm.decode(video, q0=q0, fps=episode.dataset.fps, layout="THWC", smooth=smooth, progress=True)
    return decode_run(
        list(recorded.frames), recorded.width, recorded.height, motion, idm, f"{recorded.title}, decoded",
        truth=q if same_joints else None,
    )  # fmt: skip


def read_frames(path: str | Path, fps: float | None = None) -> tuple[list[UInt8[Tensor, "3 h w"]], int, int]:
    """The frames of a video file or folder of images, reduced for the viewer, and its width and height [px].

    Raises:
        VideoError: it cannot be read, or is too long for memory.
    """
    stream = open_video(path, fps=fps if Path(path).is_dir() else None)
    return collect_frames(pixels for _, pixels in stream.pixels())


def collect_frames(pixels: Iterable[UInt8[Tensor, "3 H W"]]) -> tuple[list[UInt8[Tensor, "3 h w"]], int, int]:
    """As `read_frames`, of frames of one size."""
    frames: list[Tensor] = []
    width = height = size = 0
    for frame in pixels:
        height, width = frame.shape[-2:]
        frames.append(reduced(frame))
        size += frames[-1].nbytes
        if size > _MAX_BYTES:
            raise VideoError(
                f"the first {len(frames)} frames already take {_MAX_BYTES / 2**30:.0f} GiB; view a shorter video"
            )
    if not frames:
        raise VideoError("the video has no frames")
    return frames, width, height


def exact_field(robot: Embodiment | None, camera: Camera | None) -> AnalyticField | None:
    """The field of a robot in a camera, if both are known."""
    return (
        None if robot is None or camera is None else AnalyticField(robot, camera, points=_POINTS, occluders=_OCCLUDERS)
    )


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _load_robot(source: Any, *, required: bool = True) -> Embodiment | None:
    """The robot; a file or folder that was moved is refused unless it is only recorded, not asked for."""
    if not source:
        return None
    try:
        return load_embodiment(source)
    except JidmError as error:
        if not required:
            return None
        raise InputError(f"the robot '{source}' cannot be loaded ({error}); name it with --embodiment") from None


def _find_video(folder: Path, recorded: str) -> Path:
    """The video as it was named when it was decoded, from here or beside the results."""
    for path in (Path(recorded), folder / Path(recorded).name, folder.parent / Path(recorded).name):
        if path.exists():
            return path
    raise VideoError(f"{folder}: its video {recorded} is not there any more; say where it lies with --video")


def _camera(robot: Embodiment | None, source: Any, width: int, height: int) -> Camera | None:
    if source is None or source == "trained":
        return None
    if isinstance(source, dict):
        camera = Camera.from_dict(source)
    else:
        camera = robot.camera(source) if robot is not None else Camera.load(source)
    return camera if (camera.width, camera.height) == (width, height) else camera.resized(width, height)


def _recorded_camera(episode: Episode, image_key: str | None, width: int, height: int) -> Camera | None:
    """The camera that a simulated recording holds beside its images, that of the first frame."""
    from jidm.datasets.feature import camera_name, geometry_keys
    from jidm.training.data.recorded_geometry import unpack_cameras

    dataset = episode.dataset
    key = geometry_keys(camera_name(dataset.camera_key(image_key)))[2]
    if key not in dataset.features:
        return None
    (fx, fy, cx, cy), T = (x[0] for x in unpack_cameras(episode.column(key)[:1]))
    K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
    return Camera.from_dict({"width": width, "height": height, "K": K, "T_camera_base": T.tolist()})


def _checkpoint_name(motion: JointMotion) -> str | None:
    """Name or path of the checkpoint that decoded this motion, as `load_checkpoint` takes it."""
    recorded = motion.provenance.get("checkpoint")
    source = str(recorded["source"]) if isinstance(recorded, dict) and "source" in recorded else None
    if source is None:
        return None
    return source.removeprefix("bundled '").removesuffix("'") if source.startswith("bundled '") else source


def _learned_field(source: str | Path | None) -> LearnedField | None:
    """The field of a checkpoint; None if it is not there any more or is of another kind."""
    if source is None:
        return None
    from jidm.idm import JacobianIDM

    field = JacobianIDM.from_pretrained(source).field
    return field if isinstance(field, LearnedField) else None


def _read_truth(path: Path, motion: JointMotion) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        truth: ArrayLike = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not an array of numbers ({error}); remove it") from None
    truth = np.asarray(truth, np.float64)
    if truth.shape != tuple(motion.position.shape):
        raise InputError(
            f"{path}: is {truth.shape}, the motion {tuple(motion.position.shape)}; remove it or decode again"
        )
    return truth
