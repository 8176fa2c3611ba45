"""What a data set's own files say it holds: `info.json`, and every episode with where its rows and pictures lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jidm.data.feature import Feature
from jidm.data.film import VideoSegment
from jidm.data.table import read_columns, to_numpy
from jidm.errors import DatasetError

V30_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V30_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
V21_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V21_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


@dataclass(frozen=True)
class EpisodeMetadata:
    """One listed episode.

    Attributes:
        index: its number; numbers may have gaps.
        length: frames.
        tasks: what was done, in words.
        table: file with its rows.
        shared_table: whether that file may hold other episodes too.
        videos: feature key -> its pictures.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    table: Path
    shared_table: bool
    videos: Mapping[str, VideoSegment]


@dataclass(frozen=True)
class DatasetMetadata:
    """`info.json` and the episodes of a data set.

    Attributes:
        root: folder. info: `info.json` as it stands. features: as parsed.
        episodes: the listed episodes whose table exists, by index.
        missing_tables: indices of listed episodes without a table.
        missing_videos: cameras that info.json declares but no file holds (files laid out flat only).
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
    def fps(self) -> float:
        """Frames per second."""
        return float(self.info["fps"])


def read_metadata(path: str | Path) -> DatasetMetadata:
    """Read what a folder says of itself.

    Raises:
        DatasetError: it is no data set, of an unknown version, or its meta files are damaged.
    """
    root = Path(path)
    meta = next((folder for folder in (root / "meta", root) if (folder / "info.json").is_file()), None)
    if meta is None:
        raise DatasetError(f"{root}: no data set: there is no meta/info.json; give the folder that holds meta/")
    info = _read_info(meta / "info.json")
    features = {key: Feature.from_dict(key, entry) for key, entry in info["features"].items()}
    if info["codebase_version"].startswith("v3"):
        found = list(_episodes_v30(root, info, features))
    else:
        found = list(_episodes_v2(root, meta, info, features))
        if meta == root:
            features, found = _infer_flat_cameras(root, features, found)
    present = [entry for entry in found if entry.table.is_file()]
    episodes = {entry.index: entry for entry in sorted(present, key=lambda entry: entry.index)}
    if len(episodes) != len(present):
        raise DatasetError(f"{root}: an episode index is listed twice in {meta.name}/; mend the list")
    missing_tables = tuple(sorted({entry.index for entry in found} - set(episodes)))
    return DatasetMetadata(root, info, features, episodes, missing_tables, tuple(set(info["features"]) - set(features)))


def _read_info(path: Path) -> dict[str, Any]:
    info = _read_json(path)
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if not isinstance(version, str) or not version.startswith(("v3.", "v2.")):
        raise DatasetError(
            f"{path}: codebase_version is {version!r}; v3.0, v2.1 and v2.0 are read, convert others with LeRobot's tools"
        )
    if not isinstance(info.get("features"), dict):
        raise DatasetError(f"{path}: states no features; copy it again")
    fps = info.get("fps")
    if not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
        raise DatasetError(f"{path}: fps is {fps!r}; it must be a positive number")
    return info


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not readable as JSON ({error}); copy it again") from None


# ---- v2.0 and v2.1: one file per episode -----------------------------------------------------------------------------


def _episodes_v2(root: Path, meta: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> Iterator[EpisodeMetadata]:
    chunk_size = int(info.get("chunks_size") or 1000)
    data, video = str(info.get("data_path") or V21_DATA), str(info.get("video_path") or V21_VIDEO)
    flat = meta == root
    for line in _read_json_lines(meta / "episodes.jsonl"):
        try:
            index, length = int(line["episode_index"]), int(line["length"])
        except (KeyError, TypeError, ValueError):
            raise DatasetError(f"{meta / 'episodes.jsonl'}: {line} lacks episode_index or length; mend it") from None
        place = {"episode_index": index, "episode_chunk": index // chunk_size}
        table = root / _format_path(data, info, **place)
        videos = {
            key: VideoSegment(root / _format_path(video, info, video_key=key, **place))
            for key, feature in features.items()
            if feature.dtype == "video"
        }
        if flat:
            table = _first_existing(table, root / "data" / table.name)
            videos = {
                key: VideoSegment(_first_existing(film.path, root / "videos" / key / film.path.name, root / "videos" / film.path.name))
                for key, film in videos.items()
            }
        yield EpisodeMetadata(index, length, tuple(str(t) for t in line.get("tasks") or ()), table, False, videos)


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise DatasetError(f"{path}: this file is missing, so no episode is listed; copy the data set again")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DatasetError(f"{path}: line {number} is not JSON ({error}); copy it again") from None


def _first_existing(*candidates: Path) -> Path:
    return next((path for path in candidates if path.is_file()), candidates[0])


def _format_path(template: str, info: Mapping[str, Any], **place: Any) -> str:
    try:
        return template.format(**place)
    except (KeyError, IndexError, ValueError):
        raise DatasetError(
            f"info.json ({info['codebase_version']}): the path '{template}' cannot be filled in; mend it"
        ) from None


def _infer_flat_cameras(
    root: Path, features: Mapping[str, Feature], episodes: list[EpisodeMetadata]
) -> tuple[dict[str, Feature], list[EpisodeMetadata]]:
    """Where files lie flat, `videos/episode_000000.mp4` does not say which camera it is of: `modality.json` may, or
    the picture's size; cameras that are not there are left out."""
    from jidm.data.film import open_video_file

    keys = [key for key, feature in features.items() if feature.dtype == "video"]
    first = next((e for e in episodes if e.table.is_file()), None)
    if first is None or len(keys) < 2 or len({first.videos[key].path for key in keys}) == len(keys):
        return dict(features), episodes
    named = []
    if (root / "modality.json").is_file():
        videos = _read_json(root / "modality.json").get("video") or {}
        named = [key for key in keys if any(key == entry.get("original_key") for entry in videos.values())]
    with open_video_file(first.videos[keys[0]].path) as container:
        stream = container.streams.video[0]
        sized = [key for key in keys if features[key].shape[:2] == (stream.height, stream.width)]
    chosen = named if len(named) == 1 else sized
    if len(chosen) != 1:
        raise DatasetError(
            f"{root}: {first.videos[keys[0]].path.name} may be of any of {', '.join(keys)}; move the videos to "
            f"videos/<camera>/, or take the cameras that are not there out of info.json"
        )
    dropped = set(keys) - set(chosen)
    kept = [
        EpisodeMetadata(e.index, e.length, e.tasks, e.table, False, {k: f for k, f in e.videos.items() if k not in dropped})
        for e in episodes
    ]
    return {key: feature for key, feature in features.items() if key not in dropped}, kept


# ---- v3.0: files of any number of episodes, and a table that says where each lies -------------------------------------


def _episodes_v30(root: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> Iterator[EpisodeMetadata]:
    data, video = str(info.get("data_path") or V30_DATA), str(info.get("video_path") or V30_VIDEO)
    video_keys = [key for key, feature in features.items() if feature.dtype == "video"]
    keys = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for key in video_keys:
        keys += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    files = sorted(f for f in (root / "meta" / "episodes").glob("*/*.parquet") if not f.name.startswith("."))
    if not files:
        raise DatasetError(f"{root}: meta/episodes/ holds no table, so no episode is listed; copy the data set again")
    for file in files:
        arrays = read_columns(file, [*keys, "tasks"])
        tasks = arrays.pop("tasks").to_pylist()
        rows = {key: to_numpy(array, f"{file}: {key}").tolist() for key, array in arrays.items()}
        for k, (index, length) in enumerate(zip(rows["episode_index"], rows["length"])):
            place = {"chunk_index": rows["data/chunk_index"][k], "file_index": rows["data/file_index"][k]}
            table = root / _format_path(data, info, **place)
            videos = {
                key: VideoSegment(
                    root
                    / _format_path(
                        video,
                        info,
                        video_key=key,
                        chunk_index=rows[f"videos/{key}/chunk_index"][k],
                        file_index=rows[f"videos/{key}/file_index"][k],
                    ),
                    float(rows[f"videos/{key}/from_timestamp"][k]),
                )
                for key in video_keys
            }
            yield EpisodeMetadata(index, length, tuple(str(t) for t in tasks[k] or ()), table, True, videos)
