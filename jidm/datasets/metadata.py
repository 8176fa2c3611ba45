"""The files under `meta/` of a LeRobot data set (v3.0, v2.1), read and written: `info.json`, tasks, and the list of
episodes with the files of their rows and images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jidm.datasets import stats
from jidm.datasets.feature import Feature
from jidm.datasets.staging import StagingFolder
from jidm.datasets.table import column_names, read_columns, to_numpy
from jidm.datasets.video_file import VideoSegment, displayed_size
from jidm.errors import DatasetError
from jidm.git_lfs import refuse_lfs_pointer
from jidm.json_lines import format_json_lines, parse_json_lines

# Paths by the version that is written; reading takes them as defaults for v3.x and v2.x.
_DATA_PATHS = {
    "v3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
}
_VIDEO_PATHS = {
    "v3.0": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    "v2.1": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
_V30_VIDEO_COLUMNS = ("chunk_index", "file_index", "from_timestamp")
_V30_OWN_COLUMNS = ("stats/", "videos/", "data/", "meta/", "dataset_from_index", "dataset_to_index")
CHUNK_SIZE = 1000
"""Files per chunk folder."""


@dataclass(frozen=True)
class EpisodeMetadata:
    """One listed episode.

    Attributes:
        index: its number; numbers may have gaps.
        length: number of frames.
        tasks: descriptions of its tasks.
        table: file with its rows.
        shared_table: whether that file may contain other episodes too.
        videos: feature key -> video file and start.
        entries: what the list of episodes says of it besides.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    table: Path
    shared_table: bool
    videos: Mapping[str, VideoSegment]
    entries: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetMetadata:
    """`info.json` and the episodes of a data set.

    Attributes:
        root: folder.
        info: content of `info.json`.
        features: parsed features.
        episodes: the listed episodes whose table exists, by index.
        missing_tables: indices of listed episodes without a table.
        missing_videos: cameras in info.json without a video file (flat layout only).
    """

    root: Path
    info: Mapping[str, Any]
    features: Mapping[str, Feature]
    episodes: Mapping[int, EpisodeMetadata]
    missing_tables: tuple[int, ...]
    missing_videos: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """ "v3.0", "v2.1" or "v2.0"."""
        return str(self.info["codebase_version"])

    @property
    def meta_folder(self) -> Path:
        """Folder of the metadata files: `meta/`, or in the flat layout the data set's own."""
        return folder if ((folder := self.root / "meta") / "info.json").is_file() else self.root

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.info["fps"])


def read_metadata(path: str | Path) -> DatasetMetadata:
    """Metadata of a data set.

    Args:
        path: its folder, with the files in `meta/` or, in the flat layout, in the folder itself.

    Raises:
        DatasetError: it is no data set, of an unknown version, or its metadata files are damaged.
    """
    root = Path(path)
    meta = next((folder for folder in (root / "meta", root) if (folder / "info.json").is_file()), None)
    if meta is None:
        raise DatasetError(f"{root}: no data set: there is no meta/info.json; give the folder that contains meta/")
    info = _read_info(meta / "info.json")
    features = {key: Feature.from_dict(key, entry) for key, entry in info["features"].items()}
    if info["codebase_version"].startswith("v3"):
        listed = list(_episodes_v30(root, info, features))
    else:
        listed = list(_episodes_v2(root, meta, info, features))
        if meta == root:
            features, listed = _infer_flat_cameras(root, features, listed)
    present = [entry for entry in listed if entry.table.is_file()]
    episodes = {entry.index: entry for entry in sorted(present, key=lambda entry: entry.index)}
    if len(episodes) != len(present):
        raise DatasetError(f"{root}: an episode index is listed twice in {meta.name}/; correct the list")
    missing_tables = tuple(sorted({entry.index for entry in listed} - set(episodes)))
    missing_videos = tuple(set(info["features"]) - set(features))
    return DatasetMetadata(root, info, features, episodes, missing_tables, missing_videos)


def _read_info(path: Path) -> dict[str, Any]:
    info = _read_json(path)
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if not isinstance(version, str) or not version.startswith(("v3.", "v2.")):
        raise DatasetError(
            f"{path}: codebase_version is {version!r}; v3.0, v2.1 and v2.0 are read, convert others with LeRobot's tools"
        )
    if not isinstance(info.get("features"), dict):
        raise DatasetError(f"{path}: has no features; copy it again")
    fps = info.get("fps")
    if not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
        raise DatasetError(f"{path}: fps is {fps!r}; it must be a positive number")
    return info


def _read_json(path: Path) -> Any:
    refuse_lfs_pointer(path, DatasetError)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not readable as JSON ({error}); copy it again") from None


def read_tasks(metadata: DatasetMetadata) -> dict[int, str]:
    """Number -> text of the tasks, from `tasks.jsonl` or `tasks.parquet`; empty if there is no such file.

    Raises:
        DatasetError: it is damaged.
    """
    lines, table = metadata.meta_folder / "tasks.jsonl", metadata.meta_folder / "tasks.parquet"
    if lines.is_file():
        try:
            return {int(line["task_index"]): str(line["task"]) for line in _read_json_lines(lines)}
        except (KeyError, TypeError, ValueError):
            raise DatasetError(f"{lines}: a line lacks task_index or task; correct it") from None
    if not table.is_file():
        return {}
    # pandas names the index, which holds the texts, by its own rule.
    text = next((key for key in ("task", "__index_level_0__") if key in column_names(table)), "task")
    arrays = read_columns(table, ["task_index", text])
    return {int(number): str(task) for number, task in zip(arrays["task_index"].to_pylist(), arrays[text].to_pylist())}


# ---- v2.0 and v2.1: one file per episode -----------------------------------------------------------------------------


def _episodes_v2(
    root: Path, meta: Path, info: Mapping[str, Any], features: Mapping[str, Feature]
) -> Iterator[EpisodeMetadata]:
    chunk_size = int(info.get("chunks_size") or CHUNK_SIZE)
    data, video = str(info.get("data_path") or _DATA_PATHS["v2.1"]), str(info.get("video_path") or _VIDEO_PATHS["v2.1"])
    flat = meta == root
    for line in _read_json_lines(meta / "episodes.jsonl"):
        try:
            index, length = int(line["episode_index"]), int(line["length"])
        except (KeyError, TypeError, ValueError):
            raise DatasetError(f"{meta / 'episodes.jsonl'}: {line} lacks episode_index or length; correct it") from None
        path_fields = {"episode_index": index, "episode_chunk": index // chunk_size}
        table = root / _format_path(data, info, **path_fields)
        videos = {
            key: VideoSegment(root / _format_path(video, info, video_key=key, **path_fields))
            for key, feature in features.items()
            if feature.dtype == "video"
        }
        if flat:
            table = _first_existing(table, root / "data" / table.name)
            videos = {
                key: VideoSegment(
                    _first_existing(x.path, root / "videos" / key / x.path.name, root / "videos" / x.path.name)
                )
                for key, x in videos.items()
            }
        tasks = tuple(str(t) for t in line.get("tasks") or ())
        entries = {key: value for key, value in line.items() if key not in ("episode_index", "length", "tasks")}
        yield EpisodeMetadata(index, length, tasks, table, False, videos, entries)


def _read_json_lines(path: Path) -> list[Any]:
    if not path.is_file():
        raise DatasetError(f"{path}: this file is missing, so no episode is listed; copy the data set again")
    refuse_lfs_pointer(path, DatasetError)
    try:
        return list(parse_json_lines(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: {error}; copy it again") from None


def _first_existing(*candidates: Path) -> Path:
    return next((path for path in candidates if path.is_file()), candidates[0])


def _format_path(template: str, info: Mapping[str, Any], **path_fields: Any) -> str:
    try:
        return template.format(**path_fields)
    except (KeyError, IndexError, ValueError):
        raise DatasetError(
            f"info.json ({info['codebase_version']}): the path '{template}' cannot be filled in; correct it"
        ) from None


def _infer_flat_cameras(
    root: Path, features: Mapping[str, Feature], episodes: list[EpisodeMetadata]
) -> tuple[dict[str, Feature], list[EpisodeMetadata]]:
    """Features and episodes of the flat layout, where `videos/episode_000000.mp4` does not name its camera.

    The camera is inferred from `modality.json` or from the size of the images; the other cameras are dropped.
    """
    keys = [key for key, feature in features.items() if feature.dtype == "video"]
    first = next((e for e in episodes if e.table.is_file()), None)
    if first is None or len(keys) < 2 or len({first.videos[key].path for key in keys}) == len(keys):
        return dict(features), episodes
    named = []
    if (root / "modality.json").is_file():
        videos = _read_json(root / "modality.json").get("video") or {}
        named = [key for key in keys if any(key == entry.get("original_key") for entry in videos.values())]
    size = displayed_size(first.videos[keys[0]].path)
    sized = [key for key in keys if features[key].shape[:2] == size]
    chosen = named if len(named) == 1 else sized
    if len(chosen) != 1:
        raise DatasetError(
            f"{root}: {first.videos[keys[0]].path.name} may be of any of {', '.join(keys)}; move the videos to "
            f"videos/<camera>/, or remove the missing cameras from info.json"
        )
    dropped = set(keys) - set(chosen)
    kept = {key: feature for key, feature in features.items() if key not in dropped}
    return kept, [replace(e, videos={k: x for k, x in e.videos.items() if k not in dropped}) for e in episodes]


# ---- v3.0: files of any number of episodes, and a table of their places ----------------------------------------------


def _episodes_v30(root: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> Iterator[EpisodeMetadata]:
    data, video = str(info.get("data_path") or _DATA_PATHS["v3.0"]), str(info.get("video_path") or _VIDEO_PATHS["v3.0"])
    video_keys = [key for key, feature in features.items() if feature.dtype == "video"]
    keys = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for key in video_keys:
        keys += [f"videos/{key}/{name}" for name in _V30_VIDEO_COLUMNS]
    files = sorted(f for f in (root / "meta" / "episodes").glob("*/*.parquet") if not f.name.startswith("."))
    if not files:
        raise DatasetError(f"{root}: meta/episodes/ holds no table, so no episode is listed; copy the data set again")
    for file in files:
        further = [
            key for key in column_names(file)
            if key not in (*keys, "tasks") and not key.startswith(_V30_OWN_COLUMNS)
        ]  # fmt: skip
        arrays = read_columns(file, [*keys, "tasks", *further])
        tasks = arrays.pop("tasks").to_pylist()
        entries = {key: arrays.pop(key).to_pylist() for key in further}
        rows = {key: to_numpy(array, f"{file}: {key}").tolist() for key, array in arrays.items()}
        for k, (index, length) in enumerate(zip(rows["episode_index"], rows["length"])):
            path_fields = {"chunk_index": rows["data/chunk_index"][k], "file_index": rows["data/file_index"][k]}
            table = root / _format_path(data, info, **path_fields)
            videos = {}
            for key in video_keys:
                chunk, number, start = (rows[f"videos/{key}/{name}"][k] for name in _V30_VIDEO_COLUMNS)
                video_file = _format_path(video, info, video_key=key, chunk_index=chunk, file_index=number)
                videos[key] = VideoSegment(root / video_file, float(start))
            words, more = tuple(str(t) for t in tasks[k] or ()), {key: values[k] for key, values in entries.items()}
            yield EpisodeMetadata(index, length, words, table, True, videos, more)


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode on disk.

    Attributes:
        index: number that it was written under, by which episodes are ordered.
        number: its number in the data set.
        length: number of frames.
        tasks: texts of its tasks.
        task_index: number of its only task; None if every frame has its own.
        from_index: index of its first row among the rows of all episodes.
        stats: statistics per feature.
        entries: further entries in the list of episodes.
    """

    index: int
    number: int
    length: int
    tasks: Sequence[str]
    task_index: int | None
    from_index: int
    stats: Mapping[str, stats.FeatureStats]
    entries: Mapping[str, Any]

    @property
    def to_index(self) -> int:
        """Index after its last row."""
        return self.from_index + self.length


def data_path(version: str, index: int) -> str:
    """Path of an episode's table, relative to the root."""
    return _DATA_PATHS[version].format(**_path_fields(index))


def video_path(version: str, index: int, key: str) -> str:
    """Path of an episode's video, relative to the root."""
    return _VIDEO_PATHS[version].format(video_key=key, **_path_fields(index))


def _path_fields(index: int) -> dict[str, int]:
    chunk, file = divmod(index, CHUNK_SIZE)
    return {"chunk_index": chunk, "file_index": file, "episode_chunk": chunk, "episode_index": index}


def write_metadata(
    staging: StagingFolder, version: str, fps: float, robot_type: str, features: Mapping[str, Feature],
    recipe: Mapping[str, Any], episodes: Sequence[EpisodeRecord], tasks: Mapping[int, str],
) -> None:  # fmt: skip
    """Write every file under `meta/`; info.json last, so that it never exists without the others."""
    meta = staging.root / "meta"
    videos = [key for key, feature in features.items() if feature.dtype == "video"]
    if version == "v3.0":
        _write_episodes_v30(staging, meta, videos, fps, episodes)
        _write_tasks_v30(staging, meta / "tasks.parquet", tasks)
        _write_json(staging, meta / "stats.json", stats.aggregate_stats([e.stats for e in episodes]))
    else:
        lines = [{"episode_index": e.number, "tasks": list(e.tasks), "length": e.length, **e.entries} for e in episodes]
        _write_json_lines(staging, meta / "episodes.jsonl", lines)
        _write_json_lines(
            staging, meta / "episodes_stats.jsonl", [{"episode_index": e.number, "stats": e.stats} for e in episodes]
        )
        _write_json_lines(staging, meta / "tasks.jsonl", [{"task_index": k, "task": tasks[k]} for k in sorted(tasks)])
    info: dict[str, Any] = {
        "codebase_version": version,
        "robot_type": robot_type or None,
        "total_episodes": len(episodes),
        "total_frames": sum(e.length for e in episodes),
        "total_tasks": len(tasks),
        "chunks_size": CHUNK_SIZE,
        "fps": int(fps) if fps == int(fps) else fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": _DATA_PATHS[version],
        "video_path": _VIDEO_PATHS[version] if videos else None,
        "features": {key: feature.to_dict() for key, feature in features.items()},
    }
    if version == "v3.0":
        info |= {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
    else:
        chunks = len({e.number // CHUNK_SIZE for e in episodes})
        info |= {"total_videos": len(episodes) * len(videos), "total_chunks": chunks}
    if recipe:
        info["jidm"] = dict(recipe)
    _write_json(staging, meta / "info.json", info)


def _write_json(staging: StagingFolder, path: Path, data: Any) -> None:
    with staging.atomic_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=4, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _write_json_lines(staging: StagingFolder, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with staging.atomic_file(path) as temporary:
        temporary.write_text(format_json_lines(rows), encoding="utf-8", newline="\n")


def _write_episodes_v30(
    staging: StagingFolder, meta: Path, videos: Sequence[str], fps: float, episodes: Sequence[EpisodeRecord]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def integers(values: Sequence[int]) -> Any:
        return pa.array(values, pa.int64())

    path_fields = [_path_fields(e.index) for e in episodes]
    files = {name: integers([fields[name] for fields in path_fields]) for name in ("chunk_index", "file_index")}
    columns: dict[str, Any] = {
        "episode_index": integers([e.number for e in episodes]),
        "tasks": pa.array([list(e.tasks) for e in episodes], pa.list_(pa.string())),
        "length": integers([e.length for e in episodes]),
        "data/chunk_index": files["chunk_index"],
        "data/file_index": files["file_index"],
        "dataset_from_index": integers([e.from_index for e in episodes]),
        "dataset_to_index": integers([e.to_index for e in episodes]),
    }
    for key in videos:
        columns[f"videos/{key}/chunk_index"] = files["chunk_index"]
        columns[f"videos/{key}/file_index"] = files["file_index"]
        columns[f"videos/{key}/from_timestamp"] = pa.array([0.0] * len(episodes), pa.float64())
        columns[f"videos/{key}/to_timestamp"] = pa.array([e.length / fps for e in episodes], pa.float64())
    for key in dict.fromkeys(key for e in episodes for key in e.entries):
        columns[key] = pa.array([e.entries.get(key) for e in episodes])
    for key, feature_stats in {key: x for e in episodes for key, x in e.stats.items()}.items():
        for name in feature_stats:
            columns[f"stats/{key}/{name}"] = pa.array([e.stats.get(key, {}).get(name) for e in episodes])
    zeros = integers([0] * len(episodes))
    columns |= {"meta/episodes/chunk_index": zeros, "meta/episodes/file_index": zeros}
    path = meta / "episodes" / "chunk-000" / "file-000.parquet"
    with staging.atomic_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def _write_tasks_v30(staging: StagingFolder, path: Path, tasks: Mapping[int, str]) -> None:
    """Write the tasks with pandas metadata that makes the task the index, which LeRobot requires."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(name: str, kind: str, dtype: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}

    pandas_metadata = {
        "index_columns": ["task"],
        "column_indexes": [{**column("", "unicode", "object"), "name": None, "field_name": None, "metadata": {"encoding": "UTF-8"}}],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }  # fmt: skip
    numbers = sorted(tasks)
    texts = pa.array([tasks[number] for number in numbers], pa.string())
    table = pa.table({"task_index": pa.array(numbers, pa.int64()), "task": texts})
    with staging.atomic_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata({b"pandas": json.dumps(pandas_metadata).encode()}), temporary)
