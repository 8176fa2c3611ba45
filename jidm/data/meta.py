"""The files under `meta/` that list what was written, in LeRobot's v3.0 and v2.1 forms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jidm.datasets import stats
from jidm.data.feature import Feature
from jidm.data.listing import V21_DATA, V21_VIDEO, V30_DATA, V30_VIDEO
from jidm.data.stage import StagingFolder

CHUNK_SIZE = 1000
"""Files per chunk folder."""


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode on disk.

    Attributes:
        index: its number. length: frames. task: in words. task_index: of the task. from_index: its first row among all.
        stats: per feature.
    """

    index: int
    length: int
    task: str
    task_index: int
    from_index: int
    stats: Mapping[str, stats.FeatureStats]

    @property
    def to_index(self) -> int:
        """One behind its last row."""
        return self.from_index + self.length


def data_path(version: str, index: int) -> str:
    """Where an episode's table goes, relative to the root."""
    return (V30_DATA if version == "v3.0" else V21_DATA).format(**_path_fields(index))


def video_path(version: str, index: int, key: str) -> str:
    """Where an episode's video goes, relative to the root."""
    return (V30_VIDEO if version == "v3.0" else V21_VIDEO).format(video_key=key, **_path_fields(index))


def _path_fields(index: int) -> dict[str, int]:
    chunk, file = divmod(index, CHUNK_SIZE)
    return {"chunk_index": chunk, "file_index": file, "episode_chunk": chunk, "episode_index": index}


def write_metadata(
    staging: StagingFolder, version: str, fps: float, robot_type: str, features: Mapping[str, Feature],
    recipe: Mapping[str, Any], episodes: Sequence[EpisodeRecord],
) -> None:  # fmt: skip
    """Write every file under `meta/`; info.json last, so that a reader never sees it before the others."""
    meta = staging.root / "meta"
    tasks = {e.task_index: e.task for e in episodes}
    videos = [key for key, feature in features.items() if feature.dtype == "video"]
    if version == "v3.0":
        _write_episodes_v30(staging, meta, videos, fps, episodes)
        _write_tasks_v30(staging, meta / "tasks.parquet", [tasks[k] for k in sorted(tasks)])
        _write_json(staging, meta / "stats.json", stats.aggregate_stats([e.stats for e in episodes]))
    else:
        lines = [{"episode_index": e.index, "tasks": [e.task], "length": e.length} for e in episodes]
        _write_json_lines(staging, meta / "episodes.jsonl", lines)
        _write_json_lines(
            staging, meta / "episodes_stats.jsonl", [{"episode_index": e.index, "stats": e.stats} for e in episodes]
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
        "data_path": V30_DATA if version == "v3.0" else V21_DATA,
        "video_path": (V30_VIDEO if version == "v3.0" else V21_VIDEO) if videos else None,
        "features": {key: feature.to_dict() for key, feature in features.items()},
    }
    if version == "v3.0":
        info |= {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
    else:
        chunks = len({e.index // CHUNK_SIZE for e in episodes})
        info |= {"total_videos": len(episodes) * len(videos), "total_chunks": chunks}
    if recipe:
        info["jidm"] = dict(recipe)
    _write_json(staging, meta / "info.json", info)


def _write_json(staging: StagingFolder, path: Path, data: Any) -> None:
    with staging.atomic_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=4, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _write_json_lines(staging: StagingFolder, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with staging.atomic_file(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_episodes_v30(
    staging: StagingFolder, meta: Path, videos: Sequence[str], fps: float, episodes: Sequence[EpisodeRecord]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def integers(values: Sequence[int]) -> Any:
        return pa.array(values, pa.int64())

    places = [_path_fields(e.index) for e in episodes]
    files = {name: integers([place[name] for place in places]) for name in ("chunk_index", "file_index")}
    columns: dict[str, Any] = {
        "episode_index": integers([e.index for e in episodes]),
        "tasks": pa.array([[e.task] for e in episodes], pa.list_(pa.string())),
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
    for key, feature_stats in episodes[0].stats.items() if episodes else ():
        for name in feature_stats:
            columns[f"stats/{key}/{name}"] = pa.array([e.stats[key][name] for e in episodes])
    zeros = integers([0] * len(episodes))
    columns |= {"meta/episodes/chunk_index": zeros, "meta/episodes/file_index": zeros}
    path = meta / "episodes" / "chunk-000" / "file-000.parquet"
    with staging.atomic_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def _write_tasks_v30(staging: StagingFolder, path: Path, tasks: Sequence[str]) -> None:
    """The task is the table's index to pandas, by which LeRobot looks it up; without this note it finds none."""
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
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    with staging.atomic_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata({b"pandas": json.dumps(pandas_metadata).encode()}), temporary)
