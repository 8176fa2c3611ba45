"""What a new data set keeps of the one it is made from: columns as they are stored, videos packet by packet, tasks.

The columns that a new data set computes anew (state, action, times and counters) are no part of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.datasets.feature import ACTION, INDEX_COLUMNS, STATE, Feature
from jidm.datasets.metadata import read_tasks
from jidm.datasets.reader import Episode, RecordedDataset
from jidm.datasets.table import column_names, plain_array
from jidm.datasets.video_file import VideoSegment
from jidm.errors import DatasetError
from jidm.video.image_file import read_image_header

_WRITTEN_ANEW = {
    "info.json", "episodes", "episodes.jsonl", "episodes_stats.jsonl", "stats.json", "tasks.jsonl", "tasks.parquet",
}  # fmt: skip
_COPIED = ("subtasks.parquet", "subtasks.jsonl")


@dataclass(frozen=True)
class PreservedSchema:
    """What all episodes keep.

    Attributes:
        features: key -> Feature of the kept columns and videos.
        tasks: number -> text of the source's tasks; empty if it has no table of them.
        files: files under meta/ that are copied.
        lost: what is not kept, each with the reason.
    """

    features: Mapping[str, Feature] = field(default_factory=dict)
    tasks: Mapping[int, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PreservedEpisode:
    """What one episode keeps.

    Attributes:
        columns: key -> Arrow array of T values.
        videos: key -> where the video lies.
        task_index: (T,) number of each frame's task; None if the source does not say.
        tasks: texts of the episode's tasks.
        entries: further entries in the list of episodes, JSON values.
    """

    columns: Mapping[str, Any] = field(default_factory=dict)
    videos: Mapping[str, VideoSegment] = field(default_factory=dict)
    task_index: NDArray[np.int64] | None = None
    tasks: tuple[str, ...] = ()
    entries: Mapping[str, Any] = field(default_factory=dict)


def preserved_schema(dataset: RecordedDataset, *, replaced: Collection[str]) -> PreservedSchema:
    """What can be kept of a data set.

    Args:
        dataset: the source.
        replaced: further columns that the new data set computes itself.

    Raises:
        DatasetError: its table of tasks is damaged.
    """
    anew, lost = {STATE, ACTION, *INDEX_COLUMNS, *replaced}, []
    declared = {key: feature for key, feature in dataset.features.items() if key not in anew}
    stored, undeclared = _table_columns(dataset)
    kept = {key: f for key, f in declared.items() if f.dtype == "video" or key in stored}
    lost += [f"'{key}', which a table lacks" for key in declared if key not in kept]
    lost += [f"'{key}', which info.json does not declare" for key in sorted(undeclared - anew - set(declared))]
    meta = dataset.metadata.meta_folder
    beside = sorted(meta.iterdir()) if meta != dataset.root else []
    files = tuple(path for path in beside if path.name in _COPIED)
    lost += [f"meta/{path.name}" for path in beside if path.name not in (*_WRITTEN_ANEW, *_COPIED)]
    entries = sorted({key for entry in dataset.metadata.episodes.values() for key in _unstorable(entry.entries)})
    lost += [f"'{key}' in the list of episodes, which JSON cannot hold" for key in entries]
    tasks = read_tasks(dataset.metadata) if "task_index" in stored & set(dataset.features) else {}
    return PreservedSchema(kept, tasks, files, tuple(lost))


def preserved_episode(episode: Episode, schema: PreservedSchema) -> PreservedEpisode:
    """What an episode keeps.

    Raises:
        DatasetError: a column is absent or of another length, an image is missing, or a task has no text.
        VideoError: a file in the place of an image is none.
    """
    columns, videos = {}, {}
    for key, feature in schema.features.items():
        if feature.dtype == "video":
            videos[key] = episode.metadata.videos[key]
        elif feature.dtype == "image":
            columns[key] = _stored_images(episode, key)
        else:
            columns[key] = plain_array(episode.arrow_column(key))
    task_index = None
    if schema.tasks:
        task_index = episode.column("task_index").astype(np.int64)
        if unknown := sorted(set(task_index.tolist()) - set(schema.tasks)):
            raise DatasetError(
                f"episode {episode.index}: task {unknown[0]} is in no table of tasks; correct task_index"
            )
    entries = {k: x for k, x in episode.metadata.entries.items() if k not in _unstorable(episode.metadata.entries)}
    return PreservedEpisode(columns, videos, task_index, episode.metadata.tasks, entries)


def _table_columns(dataset: RecordedDataset) -> tuple[set[str], set[str]]:
    """Columns that all readable tables have, and those that any has."""
    tables = []
    for path in {entry.table for entry in dataset.metadata.episodes.values()}:
        try:
            tables.append(set(column_names(path)))
        except DatasetError:
            continue  # its episodes are reported when they are read
    return (set.intersection(*tables), set.union(*tables)) if tables else (set(), set())


def _unstorable(entries: Mapping[str, Any]) -> set[str]:
    keys = set()
    for key, value in entries.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            keys.add(key)
    return keys


def _stored_images(episode: Episode, key: str) -> Any:
    """The images in the form of LeRobot's tables, bytes unchanged; those in files of their own are taken in."""
    import pyarrow as pa

    cells: list[dict[str, Any]] = []
    for source, name in episode.stored_images(key):
        if isinstance(source, bytes):
            cells.append({"bytes": source, "path": None})
        else:
            read_image_header(source, name)  # else a path to any other file would publish it
            cells.append({"bytes": source.read_bytes(), "path": source.name})
    return pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
