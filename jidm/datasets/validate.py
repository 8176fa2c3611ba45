"""Validation of a data set before it is used for training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jidm.datasets.feature import ACTION, INDEX_COLUMNS, STATE, flat_names, generic_joint_names, not_finite
from jidm.datasets.reader import Episode, RecordedDataset, image_problem, open_dataset
from jidm.datasets.table import column_names
from jidm.datasets.video_file import displayed_size, open_video_file
from jidm.errors import DatasetError, JidmError
from jidm.video.container import best_video_stream
from jidm.video.image_file import read_image_header

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

_TIMESTAMP_TOLERANCE = 0.02
"""Fraction of the frame interval by which a timestamp may deviate; 32-bit timestamps of long recordings need some."""

_COUNTERS = ("timestamp", "frame_index", "episode_index")

_LIMIT_TOLERANCE = 0.05
"""Fraction of a joint's range by which positions may exceed its limits, for the errors of sensors."""


_CORRECT_STARTS = "correct from_timestamp in meta/episodes: each episode is its length / fps long"


@dataclass(frozen=True)
class Problem:
    """One problem of a data set.

    Attributes:
        episode: its number; None if it concerns the whole data set.
        message: the problem, with names and numbers.
        remedy: how to correct it.
        is_note: whether jidm trains on the data set and labels it all the same.
    """

    episode: int | None
    message: str
    remedy: str
    is_note: bool = False

    def __str__(self) -> str:
        where = "" if self.episode is None else f"episode {self.episode}: "
        return f"{'note: ' * self.is_note}{where}{self.message}; {self.remedy}"


def validate_dataset(path: str | Path, *, embodiment: Embodiment | None = None, decode: bool = False) -> list[Problem]:
    """All problems of a data set; none, or notes only, if it can be used for training as it is.

    Checks the listed files, the lengths, shapes and values of columns, timestamps, and the number, times and size of
    images. A folder that is no data set is one problem, not an error.

    Args:
        path: folder of the data set.
        embodiment: also compare joint names, number of joints and limits with this robot.
        decode: also decode every image, which finds damage inside the videos; slow.
    """
    try:
        dataset = open_dataset(path)
    except DatasetError as error:
        return [_from_error(None, error)]
    _presentation_times.cache_clear()
    _table_columns.cache_clear()
    problems = [*_check_metadata(dataset), *_check_columns(dataset), *_check_numbers(dataset)]
    problems += _check_shared_videos(dataset)
    if embodiment is not None and dataset.joint_names:
        problems += _check_joints(dataset, embodiment)
    stored = [key for key, feature in dataset.features.items() if feature.dtype == "image"]
    for episode in dataset:
        problems += _collect(episode, _check_rows(episode))
        if STATE in dataset.features and not any(p.episode == episode.index and not p.is_note for p in problems):
            problems += _collect(episode, _check_positions(episode, embodiment))
        problems += _collect(episode, _check_other_columns(episode))
        for key in episode.metadata.videos:
            problems += _collect(episode, _check_videos(episode, key))
        for key in stored:
            problems += _collect(episode, _check_stored_images(episode, key))
        if decode:
            known = [p.message for p in problems if p.episode == episode.index]
            for camera in dataset.cameras:
                if not any(message.startswith(f"{dataset.camera_key(camera)} of frame") for message in known):
                    problems += _collect(episode, _check_decoding(episode, camera))
    return list(dict.fromkeys(problems))


# ---- data set --------------------------------------------------------------------------------------------------------


def _check_metadata(dataset: RecordedDataset) -> Iterator[Problem]:
    metadata = dataset.metadata
    for index in metadata.missing_tables:
        yield Problem(index, "is listed, but its table is missing", "copy it again, or remove it from the list")
    for key in metadata.missing_videos:
        yield Problem(None, f"'{key}' is declared, but it has no video", "remove it from info.json")
    if not dataset.episode_indices:
        yield Problem(None, "holds no episode", "record some, or run the last step of the recording")
    if STATE not in dataset.features:
        yield Problem(None, f"has no {STATE}: training needs joint positions", "record joint positions")
    elif flat_names(dataset.features[STATE]) is None and dataset.features[STATE].names:
        shape = dataset.features[STATE].shape
        yield Problem(
            None, f"the names of {STATE} are not {shape[0] if shape else 0} distinct ones", "correct them in info.json"
        )
    if not dataset.cameras:
        yield Problem(None, "has no camera", "record images as observation.images.<camera>")
    counted = len(metadata.episodes) + len(metadata.missing_tables)
    stated = metadata.info.get("total_episodes")
    if isinstance(stated, int) and stated != counted:
        yield Problem(
            None,
            f"info.json says {stated} episodes, {counted} are listed",
            "finish the recording, or correct total_episodes",
        )
    frames = sum(entry.length for entry in metadata.episodes.values())
    stated = metadata.info.get("total_frames")
    if isinstance(stated, int) and not metadata.missing_tables and stated != frames:
        yield Problem(
            None,
            f"info.json says {stated} frames, the episodes have {frames}",
            "finish the recording, or correct total_frames",
        )


def _check_numbers(dataset: RecordedDataset) -> Iterator[Problem]:
    """LeRobot's rule: it finds an episode by its place in the list, so numbers must count from 0 without gaps."""
    metadata = dataset.metadata
    numbers = sorted({*metadata.episodes, *metadata.missing_tables})
    off = next((k for k, number in enumerate(numbers) if k != number), None)
    if off is not None:
        yield Problem(
            None,
            f"episode {off} is not listed, {numbers[-1]} is: LeRobot reads only sets whose episodes count from 0 without gaps",
            "jidm reads it as it is; for LeRobot, number the episodes anew",
            is_note=True,
        )


def _check_shared_videos(dataset: RecordedDataset) -> Iterator[Problem]:
    """Episodes that lie over each other in a file of several, and images of such a file that belong to none."""
    half = 0.5 / dataset.fps
    segments: dict[tuple[str, Path], list[tuple[float, float, int]]] = {}
    for entry in dataset.metadata.episodes.values():
        for key, segment in entry.videos.items():
            if segment.start is not None:
                stop = segment.start + entry.length / dataset.fps
                segments.setdefault((key, segment.path), []).append((segment.start, stop, entry.index))
    for (key, path), parts in segments.items():
        end, before = 0.0, None
        for start, stop, index in sorted(parts):
            if start < end - half and before is not None:
                yield Problem(
                    index,
                    f"{key}: begins at {start:.4f} s in {path.name}, where episode {before} lasts until {end:.4f} s: "
                    f"they overlap",
                    _CORRECT_STARTS,
                )
            elif start > end + half and not dataset.metadata.missing_tables:
                yield Problem(
                    index,
                    f"{key}: begins at {start:.4f} s in {path.name}, the images from {end:.4f} s belong to no episode",
                    _CORRECT_STARTS,
                )
            if stop > end:
                end, before = stop, index
        try:
            last = float(_presentation_times(path)[0].max(initial=-1.0))
        except DatasetError:
            continue  # reported by each of its episodes
        if last > end - half and not dataset.metadata.missing_tables:
            yield Problem(
                before,
                f"{key}: ends at {end:.4f} s in {path.name}, the images until {last:.4f} s belong to no episode",
                _CORRECT_STARTS,
            )


def _check_joints(dataset: RecordedDataset, robot: Embodiment) -> Iterator[Problem]:
    recorded, joints = dataset.joint_names, robot.joint_names
    if len(recorded) != len(joints):
        yield Problem(
            None,
            f"has {len(recorded)} joints, '{robot.name}' has {len(joints)}",
            "give the robot that was recorded, or describe one with these joints",
        )
    elif recorded != joints and recorded != generic_joint_names(len(joints)):
        pair = next((a, b) for a, b in zip(recorded, joints) if a != b)
        yield Problem(
            None,
            f"its joints are not those of '{robot.name}': '{pair[0]}' is in the place of '{pair[1]}'",
            f"correct the names of {STATE} in info.json, or the order of its columns",
        )


def _check_columns(dataset: RecordedDataset) -> Iterator[Problem]:
    """Declared columns that tables lack; state, action and counters are checked episode by episode."""
    declared = {key for key, f in dataset.features.items() if f.dtype != "video"} - {STATE, ACTION, *_COUNTERS}
    lacked_by: dict[str, list[int]] = {}
    for episode in dataset:
        try:
            present = _table_columns(episode.metadata.table)
        except DatasetError:
            continue  # reported where its rows are read
        for key in sorted(declared.difference(present)):
            lacked_by.setdefault(key, []).append(episode.index)
    for key, episodes in lacked_by.items():
        if len(episodes) == len(dataset):
            yield Problem(None, f"'{key}' is declared, but no table has it", "remove it from info.json")
        else:
            for index in episodes:
                yield Problem(
                    index,
                    f"its table has no '{key}', others have",
                    "leave the episode out, or remove the column from info.json",
                )


# ---- one episode -----------------------------------------------------------------------------------------------------


def _check_rows(episode: Episode) -> Iterator[Problem]:
    """Lengths, counters and times."""
    features, fps, index = episode.dataset.features, episode.dataset.fps, episode.index
    if episode.length < 2:
        yield Problem(index, f"has {episode.length} frame(s), motion needs two", "leave it out")
        return
    if "timestamp" not in features:
        yield Problem(None, "has no timestamp column", "record it again with times")
        return
    steps = np.diff(episode.time)
    off = np.flatnonzero(~(np.abs(steps - 1 / fps) <= _TIMESTAMP_TOLERANCE / fps))
    if len(off):
        k = int(off[0])
        yield Problem(
            index,
            f"frames {k} and {k + 1} are {steps[k]:.4f} s apart, {fps:g} frames per second are {1 / fps:.4f} s "
            f"({len(off)} such steps)",
            "resample the episode to the declared rate, or correct fps",
        )
    elif episode.metadata.shared_table and abs(episode.time[0]) > 0.5 / fps:
        yield Problem(index, f"its times start at {episode.time[0]:.4f} s, not 0", "subtract the first time")
    expected = {"frame_index": np.arange(episode.length), "episode_index": np.full(episode.length, index)}
    for key, values in expected.items():
        if key in features and not np.array_equal(episode.column(key), values):
            k = int(np.flatnonzero(episode.column(key) != values)[0])
            yield Problem(
                index, f"{key} is {episode.column(key)[k]} in row {k}, must be {values[k]}", "write the table again"
            )


def _check_positions(episode: Episode, robot: Embodiment | None) -> Iterator[Problem]:
    """Values of state and action."""
    names = episode.dataset.joint_names
    for key, values in ((STATE, episode.state), (ACTION, episode.action)):
        if values is not None and not np.isfinite(values).all():
            yield Problem(episode.index, not_finite(key, episode.dataset.features[key], values), "leave it out")
    if robot is None or len(names) != len(robot.joint_names):
        return
    lower, upper = episode.state.min(0), episode.state.max(0)
    slack = np.where(np.isfinite(robot.upper - robot.lower), _LIMIT_TOLERANCE * (robot.upper - robot.lower), 0.0)
    for k in np.flatnonzero((lower < robot.lower - slack) | (upper > robot.upper + slack)):
        yield Problem(
            episode.index,
            f"'{names[k]}' goes from {lower[k]:.3f} to {upper[k]:.3f}, the limits are {robot.lower[k]:.3f} to "
            f"{robot.upper[k]:.3f}",
            "convert the recording to rad and m, or correct its signs and offsets",
        )


def _check_other_columns(episode: Episode) -> Iterator[Problem]:
    """Values of the further columns, which labeling and training do not need."""
    for key, feature in episode.dataset.features.items():
        if key in (STATE, ACTION, *INDEX_COLUMNS) or not feature.dtype.startswith("float"):
            continue
        if key not in _table_columns(episode.metadata.table):
            continue  # reported for all tables together
        values = episode.column(key)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            yield Problem(
                episode.index,
                not_finite(key, feature, values),
                "training and labeling do not use it; leave the episode out where it matters",
                is_note=True,
            )


def _check_stored_images(episode: Episode, key: str) -> Iterator[Problem]:
    """Size and channels of images in the table or in files of their own, without decoding them."""
    wrong: dict[str, list[int]] = {}
    for k, (source, name) in enumerate(episode.stored_images(key)):
        if problem := image_problem(read_image_header(source, name), episode.dataset.features[key]):
            wrong.setdefault(problem, []).append(k)
    for problem, frames in wrong.items():
        yield Problem(
            episode.index,
            f"{key} of frame {frames[0]} is {problem} ({len(frames)} such frames)",
            "correct the shape in info.json, or leave the episode out",
        )


def _check_videos(episode: Episode, key: str) -> Iterator[Problem]:
    """Number, times and size of the images, without decoding them."""
    segment, fps, length = episode.metadata.videos[key], episode.dataset.fps, episode.length
    times, size = _presentation_times(segment.path)
    if segment.start is not None:
        times = times[(times > segment.start - 0.5 / fps) & (times < segment.start + (length - 0.5) / fps)]
    if len(times) != length:
        yield Problem(
            episode.index,
            f"{key} has {len(times)} images, the table has {length} rows ({segment.path.name})",
            "leave the episode out, or write its video again",
        )
        return
    begin = times[0] if segment.start is None else segment.start
    off = np.abs(times - begin - np.arange(length) / fps)
    if off.max() > 0.25 / fps:
        k = int(off.argmax())
        yield Problem(
            episode.index,
            f"{key}: image {k} is presented {off[k]:.4f} s away from its row's time ({segment.path.name})",
            "write the video again at the rate of the data set",
        )
    height, width = episode.dataset.features[key].shape[:2]
    if size != (height, width):
        yield Problem(
            episode.index,
            f"{key} is {size[1]}x{size[0]}, info.json says {width}x{height} ({segment.path.name})",
            "correct the shape in info.json, or scale the video",
        )


@lru_cache(maxsize=8)  # several episodes may lie in one file
def _table_columns(path: Path) -> frozenset[str]:
    return frozenset(column_names(path))


@lru_cache(maxsize=8)
def _presentation_times(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """Presentation times [s] of all images, ascending, and (height, width) as they are read."""
    with open_video_file(path) as container:
        stream = best_video_stream(container)
        stamps = [packet.pts for packet in container.demux(stream) if packet.size and packet.pts is not None]
        times = np.sort(np.array(stamps, dtype=np.float64)) * float(stream.time_base)
    return times, displayed_size(path)


def _check_decoding(episode: Episode, camera: str) -> Iterator[Problem]:
    """Nothing by itself: damage raises an error, which `_collect` turns into a problem."""
    for _ in episode.frames(camera):
        yield from ()


def _collect(episode: Episode, check: Iterator[Problem]) -> list[Problem]:
    """The problems that a running check finds; an error that stops it is one more."""
    problems: list[Problem] = []
    try:
        problems.extend(check)
    except JidmError as error:
        problems.append(_from_error(episode.index, error))
    return problems


def _from_error(episode: int | None, error: JidmError) -> Problem:
    what, _, remedy = str(error).rpartition("; ")
    return Problem(episode, what or remedy, remedy if what else "see the message")
