"""Action labels for video without actions: every frame gets the action its video shows, with a covariance.

Each episode is decoded as a whole, or in overlapping windows whose results are averaged frame by frame, as DreamGen does
with the chunks of its inverse dynamics model. Episodes are written one by one; an interrupted run resumes with the missing
ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jidm.atomic_io import atomic_write
from jidm.control.commands import ActionSpace, as_action_space
from jidm.control.episode_sources import COVARIANCE, SOURCE_INDEX, VALID, DatasetEpisodes, VideoFolder, open_episodes
from jidm.datasets import DatasetWriter
from jidm.datasets.feature import Feature, camera_keys
from jidm.errors import DatasetError, InputError, JidmError

if TYPE_CHECKING:
    from jidm.estimation.result import JointMotion
    from jidm.idm import JacobianIDM


@dataclass(frozen=True)
class LabelOptions:
    """How videos are labeled.

    Attributes:
        action_space: "joint_position" writes the position in the next frame [rad or m], as most data sets do;
            "joint_velocity" the mean velocity until then; "joint_delta" the step.
        window: frames decoded together; all if None.
        overlap: fraction of a window that the next one repeats.
        smooth: estimate each frame from later frames too (Rauch-Tung-Striebel smoothing).
    """

    action_space: str = "joint_position"
    window: int | None = None
    overlap: float = 0.5
    smooth: bool = True

    def __post_init__(self) -> None:
        as_action_space(self.action_space)
        if (self.window is not None and self.window < 2) or not 0 <= self.overlap < 1:
            raise InputError(
                f"window must be at least two frames and overlap in [0, 1), got {self.window}, {self.overlap}"
            )


@dataclass(frozen=True, eq=False)
class ActionLabels:
    """Labels of T frames and n joints. The last frame has no step after it and is not valid.

    Attributes:
        position: (T, n) [rad or m].
        action: (T, n) in the action space.
        covariance: (T, n, n) of the step to the next frame.
        valid: (T,) whether that step was measured.
    """

    position: NDArray[np.float64]
    action: NDArray[np.float64]
    covariance: NDArray[np.float64]
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class LabelingResult:
    """Outcome of `label_dataset`.

    Attributes:
        written: number of episodes in the data set.
        problems: episode -> why it could not be labeled.
    """

    written: int
    problems: Mapping[str, str]


def label_video(
    idm: JacobianIDM, video: NDArray[np.uint8], fps: float, *, q0: NDArray[np.float64] | None = None,
    options: LabelOptions | None = None,
) -> ActionLabels:  # fmt: skip
    """Action labels of one video.

    Args:
        idm: decodes the video.
        video: (T, H, W, 3) RGB.
        fps: frame rate [1/s].
        q0: (n,) joint positions in its first frame, if they are known [rad or m].
        options: the defaults if not given.
    """
    settings = options or LabelOptions()
    motions: list[tuple[int, JointMotion]] = []
    for start, stop in windows(len(video), settings.window, settings.overlap):
        if motions:
            previous_start, previous = motions[-1]
            q0 = previous.position[start - previous_start].double().numpy()
        motion = idm.decode(video[start:stop], q0=q0, fps=fps, layout="THWC", smooth=settings.smooth)
        motions.append((start, motion))
    return average_windows(motions, len(video), fps, as_action_space(settings.action_space))


def windows(length: int, window: int | None, overlap: float) -> Iterator[tuple[int, int]]:
    """Start and stop frame of each window, in order; the last one ends with the video."""
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
    """Average overlapping windows: positions over all windows of a frame, steps over the windows that measured them.

    The errors of overlapping windows are correlated because they share frames. So their covariances are averaged as well,
    and do not shrink with the number of windows.

    Args:
        motions: first frame and decoded motion of each window.
        length: T, frames of the video.
        fps: frame rate [1/s].
        space: of the actions.
    """
    n = motions[0][1].position.shape[-1]
    position, frame_count = np.zeros((length, n)), np.zeros(length)
    step, covariance, valid_count = np.zeros((length, n)), np.zeros((length, n, n)), np.zeros(length)
    all_covariance, step_count = np.zeros((length, n, n)), np.zeros(length)
    for start, motion in motions:
        frames = slice(start, start + motion.frames)
        steps = slice(start, start + motion.frames - 1)
        position[frames] += motion.position.double().numpy()
        frame_count[frames] += 1
        is_valid, window_covariance = motion.valid.numpy(), motion.covariance.double().numpy()
        step[steps] += np.where(is_valid[:, None], motion.delta_q.double().numpy(), 0.0)
        covariance[steps] += np.where(is_valid[:, None, None], window_covariance, 0.0)
        all_covariance[steps] += window_covariance
        valid_count[steps] += is_valid
        step_count[steps] += 1
    position /= frame_count[:, None]
    valid = valid_count > 0
    step = np.where(valid[:, None], step / np.maximum(1, valid_count)[:, None], 0.0)
    covariance = np.where(
        valid[:, None, None], covariance / np.maximum(1, valid_count)[:, None, None],
        all_covariance / np.maximum(1, step_count)[:, None, None],
    )  # fmt: skip
    next_position = np.concatenate([position[1:], position[-1:]])
    action = {"joint_position": next_position, "joint_velocity": step * fps, "joint_delta": step}[space]
    return ActionLabels(position, action, covariance, valid)


def label_dataset(
    source: str | Path, idm: JacobianIDM, out: str | Path, *, image_key: str | None = None,
    options: LabelOptions | None = None, version: str = "v3.0", modality: bool = False,
    q0: NDArray[np.float64] | None = None, fps: float | None = None, shard: tuple[int, int] = (0, 1),
    progress: Callable[[str], None] = lambda line: None,
) -> LabelingResult:  # fmt: skip
    """Label a data set without actions, or a folder of videos, and write the result as a LeRobot data set.

    All that the source holds besides is kept (columns as they are stored, videos without encoding them anew where their
    files can be cut, tasks of each frame); what is not kept is reported. A recorded `action` is replaced. Episodes are
    numbered from 0 without gaps; `source_episode_index` has the number in the source. The initial pose is the source's first
    recorded joint positions, else `q0`, else estimated from the first frame by a learned field. The columns
    `action_valid` and `action_covariance` state the quality of each action.

    Args:
        source: a LeRobot data set (v3.0, v2.1, v2.0), or a folder of videos of one size and frame rate.
        idm: decodes the videos.
        out: folder of the new data set; episodes already there are kept.
        image_key: the camera of the source to decode; may be omitted if there is only one.
        options: the defaults if not given.
        version: layout to write, "v3.0" or "v2.1".
        modality: also write `meta/modality.json` for GR00T.
        q0: (n,) joint positions in the first frame of every episode [rad or m].
        fps: frame rate of videos whose files state none [1/s].
        shard: (i, N): do every N-th episode starting at the i-th. Shards may run concurrently; the last one to finish
            writes the metadata of all.
        progress: called with one line per episode, and one on what is not kept.

    Raises:
        DatasetError: the source cannot be read, or `out` was labeled with other settings, or (v2.1 in shards) is complete.
    """
    settings, n = options or LabelOptions(), len(idm.joint_names)
    episodes = open_episodes(source, image_key=image_key, fps=fps)
    added = {VALID: Feature("bool", (1,)), COVARIANCE: Feature("float32", (n, n)), SOURCE_INDEX: Feature("int64", (1,))}
    writer = DatasetWriter(
        out, fps=episodes.fps, joint_names=episodes.state_names or idm.joint_names, cameras=episodes.encoded_cameras,
        action_names=idm.joint_names, robot_type=episodes.robot_type, version=version,
        extras=added, recipe=_recipe(idm, settings, episodes), preserved=episodes.preserved,
    )  # fmt: skip
    # In v2.1 numbers are names of files, which one process changes at the end.
    in_shards = version == "v2.1" and shard[1] > 1
    if in_shards and writer.is_renumbered():
        raise DatasetError(f"{out}: is labeled and its episodes are numbered anew; continue it without shards")
    if episodes.preserved.lost:
        progress(f"not kept: {', '.join(episodes.preserved.lost)}")
    done, problems = writer.completed_episodes(), {}
    for index in episodes.indices[shard[0] :: shard[1]]:
        if index in done:
            continue
        try:
            episode = episodes.read(index)
            start = q0 if episode.state is None else _initial_pose(idm, episodes.state_names, episode.state)
            labels = label_video(idm, episode.pixels, episodes.fps, q0=start, options=settings)
            columns = {
                VALID: labels.valid, COVARIANCE: labels.covariance.astype(np.float32),
                SOURCE_INDEX: np.full(len(labels.valid), index),
            }  # fmt: skip
            encoded = writer.write_episode(
                index, dict.fromkeys(episodes.encoded_cameras, episode.pixels),
                labels.position if episode.state is None else episode.state, labels.action,
                extras=columns, task=episode.task, preserved=episode.preserved,
            )  # fmt: skip
            note = f"; encoded anew: {', '.join(encoded)}" if encoded else ""
            progress(f"episode {index}: {labels.valid.sum()} of {len(labels.valid) - 1} steps measured{note}")
        except JidmError as error:
            problems[episodes.name(index)] = str(error)
            progress(f"{episodes.name(index)}: {error}")
    writer.finalize(close_gaps=not in_shards)
    if in_shards and sorted(done := writer.completed_episodes()) != list(range(len(done))):
        progress("the numbers of episodes have gaps, which LeRobot refuses: run once more without shards to close them")
    if modality:
        _write_modality(Path(out), writer)
    return LabelingResult(len(writer.completed_episodes()), problems)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _recipe(idm: JacobianIDM, options: LabelOptions, episodes: DatasetEpisodes | VideoFolder) -> dict[str, Any]:
    robot, checkpoint = idm.embodiment, dict(idm.checkpoint)
    if checkpoint and Path(checkpoint["source"]).is_absolute():  # data sets are published: no path of this machine
        checkpoint["source"] = Path(checkpoint["source"]).name
    return {
        "labeled_by": checkpoint or type(idm.field).__name__,
        "embodiment": None if robot is None else robot.name,
        "embodiment_hash": None if robot is None else robot.content_hash,
        "options": asdict(options),
        "image_key": episodes.image_key,
        "source": episodes.source,
    }


def _initial_pose(idm: JacobianIDM, names: Sequence[str], state: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The recorded joint positions in the first frame; None if the recording lacks some of the field's joints."""
    if not set(idm.joint_names) <= set(names):
        return None
    return np.asarray(state[0, [list(names).index(name) for name in idm.joint_names]])


def _write_modality(root: Path, writer: DatasetWriter) -> None:
    """GR00T's description of the columns' parts."""
    videos = camera_keys([key for key, feature in writer.features.items() if feature.is_image])
    modality = {
        "state": {"joints": {"start": 0, "end": len(writer.joint_names)}},
        "action": {"joints": {"start": 0, "end": len(writer.action_names)}},
        "video": {name: {"original_key": key} for name, key in videos.items()},
        "annotation": {"human.task_description": {"original_key": "task_index"}},
    }
    with atomic_write(root / "meta" / "modality.json") as temporary:
        temporary.write_text(json.dumps(modality, indent=2), encoding="utf-8")
