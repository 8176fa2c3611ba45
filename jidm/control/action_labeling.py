"""Video without actions made into a data set with them: every frame gets the action its video shows, and how sure it is.

Each episode is decoded whole, or in overlapping windows whose answers are averaged frame by frame, as DreamGen's label dump
does with its model's chunks. Episodes are written one by one; a run that was stopped goes on with those that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jidm.atomic_io import atomic_write
from jidm.control.commands import ActionSpace, as_action_space
from jidm.datasets import DatasetWriter, open_dataset
from jidm.datasets.feature import ACTION, STATE, Feature
from jidm.errors import DatasetError, InputError, JidmError

if TYPE_CHECKING:
    from jidm.datasets import RecordedDataset
    from jidm.estimation.result import JointMotion
    from jidm.idm import JacobianIDM

VALID, COVARIANCE = "action_valid", "action_covariance"
_INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class LabelOptions:
    """How videos are labelled.

    Attributes:
        action_space: "joint_position" writes the position in the next frame [rad or m], as most data sets do,
            "joint_velocity" the velocity until then, "joint_delta" the step.
        window: frames decoded together; all if None. overlap: share of a window that the next one repeats.
        smooth: let later frames tell about earlier ones.
    """

    action_space: str = "joint_position"
    window: int | None = None
    overlap: float = 0.5
    smooth: bool = True

    def __post_init__(self) -> None:
        as_action_space(self.action_space)
        if (self.window is not None and self.window < 2) or not 0 <= self.overlap < 1:
            raise InputError(
                f"a window has two frames or more and overlaps by 0 to 1, got {self.window}, {self.overlap}"
            )


@dataclass(frozen=True, eq=False)
class ActionLabels:
    """Of T frames and n joints; the last frame, from which no step leads on, is not valid.

    Attributes:
        position: (T, n) [rad or m]. action: (T, n) in the action space.
        covariance: (T, n, n) of the step that follows. valid: (T,) whether it was measured.
    """

    position: NDArray[np.float64]
    action: NDArray[np.float64]
    covariance: NDArray[np.float64]
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class LabelingResult:
    """What became of the episodes: how many are in the data set, and episode -> why it is not."""

    written: int
    problems: Mapping[str, str]


def label_video(
    idm: JacobianIDM, video: NDArray[np.uint8], fps: float, *, q0: NDArray[np.float64] | None = None,
    options: LabelOptions | None = None,
) -> ActionLabels:  # fmt: skip
    """Actions of one video.

    Args:
        video: (T, H, W, 3) RGB. q0: (n,) joint positions in its first frame, where they are known [rad or m].
    """
    settings = options or LabelOptions()
    motions: list[tuple[int, JointMotion]] = []
    for start, stop in windows(len(video), settings.window, settings.overlap):
        initial = q0 if not motions else motions[-1][1].position[start - motions[-1][0]].double().numpy()
        clip = video[start:stop]
        if settings.smooth:
            motion = idm.decode_whole(clip, q0=initial, fps=fps, layout="THWC")[1]
        else:
            motion = idm.decode(clip, q0=initial, fps=fps, layout="THWC")
        motions.append((start, motion))
    return average_windows(motions, len(video), fps, as_action_space(settings.action_space))


def windows(length: int, window: int | None, overlap: float) -> Iterator[tuple[int, int]]:
    """Frames start to stop of each window, in order; the last one ends with the video."""
    if window is None or window >= length:
        yield 0, length
        return
    step = max(1, min(window - 1, round(window * (1 - overlap))))
    start = 0
    while start + window < length:
        yield start, start + window
        start += step
    yield length - window, length


def average_windows(
    motions: Sequence[tuple[int, JointMotion]], length: int, fps: float, space: ActionSpace
) -> ActionLabels:
    """Windows (first frame, motion) as one: positions and steps averaged over those that saw them, in their order.

    A step counts where it was measured. Errors of windows that saw the same pictures are alike, so their covariances are
    averaged too, and do not shrink.
    """
    n = motions[0][1].position.shape[-1]
    position, frame_count = np.zeros((length, n)), np.zeros(length)
    step, covariance, valid = np.zeros((length, n)), np.zeros((length, n, n)), np.zeros(length)
    all_covariance, step_count = np.zeros((length, n, n)), np.zeros(length)
    for start, motion in motions:
        frames = slice(start, start + motion.frames)
        steps = slice(start, start + motion.frames - 1)
        position[frames] += motion.position.double().numpy()
        frame_count[frames] += 1
        good = motion.valid.numpy()
        step[steps] += np.where(good[:, None], motion.delta_q.double().numpy(), 0.0)
        each = motion.covariance.double().numpy()
        covariance[steps] += np.where(good[:, None, None], each, 0.0)
        all_covariance[steps] += each
        valid[steps] += good
        step_count[steps] += 1
    position /= frame_count[:, None]
    measured = valid > 0
    step = np.where(measured[:, None], step / np.maximum(1, valid)[:, None], 0.0)
    covariance = np.where(
        measured[:, None, None], covariance / np.maximum(1, valid)[:, None, None],
        all_covariance / np.maximum(1, step_count)[:, None, None],
    )  # fmt: skip
    next_position = np.concatenate([position[1:], position[-1:]])
    action = {"joint_position": next_position, "joint_velocity": step * fps, "joint_delta": step}[space]
    return ActionLabels(position, action, covariance, measured)


def label_dataset(
    source: str | Path, idm: JacobianIDM, out: str | Path, *, image_key: str | None = None,
    options: LabelOptions | None = None, version: str = "v3.0", modality: bool = False,
    q0: NDArray[np.float64] | None = None, fps: float | None = None, shard: tuple[int, int] = (0, 1),
    progress: Callable[[str], None] = lambda line: None,
) -> LabelingResult:  # fmt: skip
    """A data set with actions out of one without, or out of a folder of videos.

    What the source holds besides is kept, a recorded `action` excepted. Where it has the joints' positions, its first ones
    are believed; else `q0`, else a trained field reads them off the picture. Columns `action_valid` and
    `action_covariance` tell how good each action is.

    Args:
        source: a LeRobot data set (v3.0, v2.1, v2.0), or a folder of videos of one size and rate.
        out: folder of the new data set; what is there already is kept.
        image_key: which of the source's cameras is decoded; may be left out where there is only one.
        version: of the layout written, "v3.0" or "v2.1".
        modality: write `meta/modality.json` as GR00T reads it.
        q0: (n,) joint positions in every first frame [rad or m].
        fps: frames a second of the videos, where the files do not know it.
        shard: (i, N): do every N-th episode from the i-th; parts may run at once, and the last one to end lists them all.
        progress: called with a line for each episode.

    Raises:
        DatasetError: the source cannot be read, or `out` was labelled by something else.
    """
    settings = options or LabelOptions()
    episodes = (
        _DatasetEpisodes(open_dataset(source), image_key)
        if _is_dataset(Path(source))
        else _VideoFolder(Path(source), fps)
    )
    writer = DatasetWriter(
        out, fps=episodes.fps, joint_names=episodes.state_names or idm.joint_names, cameras=episodes.cameras,
        action_names=idm.joint_names, robot_type=episodes.robot_type, version=version,
        extras={**episodes.extras, **_columns(idm)}, recipe=_recipe(idm, settings, episodes),
    )  # fmt: skip
    done, problems = writer.completed_episodes(), {}
    for index in episodes.indices[shard[0] :: shard[1]]:
        if index in done:
            continue
        try:
            frames, state, extras, task = episodes.read(index)
            start = _first_pose(idm, episodes.state_names, state) if state is not None else q0
            labels = label_video(idm, frames[episodes.image_key], episodes.fps, q0=start, options=settings)
            extras |= {VALID: labels.valid, COVARIANCE: labels.covariance.astype(np.float32)}
            writer.write_episode(
                index, frames, labels.position if state is None else state, labels.action, extras=extras, task=task
            )
            progress(f"episode {index}: {labels.valid.sum()} of {len(labels.valid) - 1} steps measured")
        except JidmError as error:
            problems[episodes.name(index)] = str(error)
            progress(f"{episodes.name(index)}: {error}")
    writer.finalize()
    if modality:
        _write_modality(Path(out), writer)
    return LabelingResult(len(writer.completed_episodes()), problems)


# ---- where episodes come from ----------------------------------------------------------------------------------------


class _DatasetEpisodes:
    """Episodes of a LeRobot data set."""

    def __init__(self, dataset: RecordedDataset, image_key: str | None) -> None:
        self._dataset = dataset
        key = dataset.camera_key(image_key)
        self.image_key = next(name for name in dataset.cameras if dataset.camera_key(name) == key)
        self.fps, self.robot_type, self.indices = dataset.fps, dataset.robot_type, dataset.episode_indices
        self.state_names = dataset.joint_names
        sizes = {name: dataset.features[dataset.camera_key(name)].shape for name in dataset.cameras}
        self.cameras = {name: (shape[1], shape[0]) for name, shape in sizes.items()}
        kept = {STATE, ACTION, VALID, COVARIANCE, *_INDEX_COLUMNS}
        self.extras = {
            name: feature for name, feature in dataset.features.items()
            if name not in kept and not feature.is_image and feature.shape and feature.dtype not in ("string", "video", "image")
        }  # fmt: skip
        self.source = {"dataset": Path(dataset.root).name, "content_hash": dataset.content_hash}

    def name(self, index: int) -> str:
        return f"episode {index}"

    def read(
        self, index: int
    ) -> tuple[dict[str, NDArray[np.uint8]], NDArray[Any] | None, dict[str, NDArray[Any]], str]:
        episode = self._dataset.episode(index)
        frames = {name: episode.video(name) for name in self.cameras}
        state = episode.state if self.state_names else None
        return frames, state, {name: episode.column(name) for name in self.extras}, episode.task


class _VideoFolder:
    """Video files of a folder, in the order of their names."""

    image_key, robot_type, state_names = "camera", "", ()

    def __init__(self, folder: Path, fps: float | None) -> None:
        from jidm.video.io import VIDEO_SUFFIXES, open_video

        if not folder.is_dir():
            raise DatasetError(f"{folder}: neither a data set nor a folder of videos")
        self._files = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
        if not self._files:
            raise DatasetError(f"{folder}: holds no videos ({', '.join(sorted(VIDEO_SUFFIXES))}) and is no data set")
        first = open_video(self._files[0])
        if (rate := fps or first.fps) is None:
            raise DatasetError(f"{self._files[0]}: states no frame rate; pass fps")
        self.fps, self.indices = float(rate), tuple(range(len(self._files)))
        self._fps_override = fps
        self.cameras = {self.image_key: (first.width, first.height)}
        self.extras: dict[str, Feature] = {}
        self.source = {"videos": [file.name for file in self._files]}

    def name(self, index: int) -> str:
        return self._files[index].name

    def read(
        self, index: int
    ) -> tuple[dict[str, NDArray[np.uint8]], NDArray[Any] | None, dict[str, NDArray[Any]], str]:
        from jidm.video.io import open_video

        video = open_video(self._files[index])
        if self._fps_override is None and video.fps is not None and abs(video.fps - self.fps) > 1e-3 * self.fps:
            raise DatasetError(f"{video.fps:g} frames a second, the first video has {self.fps:g}: label it apart")
        frames = np.stack([pixels.permute(1, 2, 0).numpy() for _, pixels in video.pixels()])
        return {self.image_key: frames}, None, {}, ""


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _is_dataset(path: Path) -> bool:
    return any((path / place).is_file() for place in ("meta/info.json", "info.json"))


def _columns(idm: JacobianIDM) -> dict[str, Feature]:
    n = len(idm.joint_names)
    return {VALID: Feature("bool", (1,)), COVARIANCE: Feature("float32", (n, n))}


def _recipe(idm: JacobianIDM, options: LabelOptions, episodes: _DatasetEpisodes | _VideoFolder) -> dict[str, Any]:
    from dataclasses import asdict

    robot = idm.embodiment
    return {
        "labelled_by": dict(idm.checkpoint) or type(idm.field).__name__,
        "embodiment": None if robot is None else robot.name,
        "embodiment_hash": None if robot is None else robot.content_hash,
        "options": asdict(options),
        "camera": episodes.image_key,
        "source": episodes.source,
    }


def _first_pose(idm: JacobianIDM, names: Sequence[str], state: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The recorded joint positions in the first frame; None where the recording does not name the field's joints."""
    if not set(idm.joint_names) <= set(names):
        return None
    return np.asarray(state[0, [list(names).index(name) for name in idm.joint_names]])


def _write_modality(root: Path, writer: DatasetWriter) -> None:
    """What each part of the columns is, as GR00T's loader wants to be told."""
    cameras = [key.removeprefix("observation.images.") for key, f in writer.features.items() if f.dtype == "video"]
    modality = {
        "state": {"joints": {"start": 0, "end": len(writer.joint_names)}},
        "action": {"joints": {"start": 0, "end": len(writer.action_names)}},
        "video": {name: {"original_key": f"observation.images.{name}"} for name in cameras},
        "annotation": {"human.task_description": {"original_key": "task_index"}},
    }
    with atomic_write(root / "meta" / "modality.json") as temporary:
        temporary.write_text(json.dumps(modality, indent=2), encoding="utf-8")
