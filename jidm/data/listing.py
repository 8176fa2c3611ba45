"""What a data set's own files say it holds: `info.json`, and every episode with where its rows and pictures lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jidm.data.feature import Feature
from jidm.data.film import Film
from jidm.data.table import read_columns, to_numpy
from jidm.errors import DatasetError

V30_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V30_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
V21_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V21_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


@dataclass(frozen=True)
class Entry:
    """One listed episode.

    Attributes:
        index: its number; numbers may have gaps.
        length: frames.
        tasks: what was done, in words.
        table: file with its rows.
        shared: whether that file may hold other episodes too.
        films: feature key -> its pictures.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    table: Path
    shared: bool
    films: Mapping[str, Film]


@dataclass(frozen=True)
class Listing:
    """`info.json` and the episodes of a data set.

    Attributes:
        root: folder. info: `info.json` as it stands. features: as parsed.
        entries: the listed episodes whose table exists, by index.
        absent: indices of listed episodes without a table.
        undrawn: cameras that info.json declares but no file holds (files laid out flat only).
    """

    root: Path
    info: Mapping[str, Any]
    features: Mapping[str, Feature]
    entries: Mapping[int, Entry]
    absent: tuple[int, ...]
    undrawn: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """ "v3.0", "v2.1" or "v2.0"."""
        return str(self.info["codebase_version"])

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.info["fps"])


def read_listing(path: str | Path) -> Listing:
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
            features, found = _choose_flat_cameras(root, features, found)
    present = [entry for entry in found if entry.table.is_file()]
    entries = {entry.index: entry for entry in sorted(present, key=lambda entry: entry.index)}
    if len(entries) != len(present):
        raise DatasetError(f"{root}: an episode index is listed twice in {meta.name}/; mend the list")
    absent = tuple(sorted({entry.index for entry in found} - set(entries)))
    return Listing(root, info, features, entries, absent, tuple(set(info["features"]) - set(features)))


def _read_info(path: Path) -> dict[str, Any]:
    info = _json(path)
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


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not readable as JSON ({error}); copy it again") from None


# ---- v2.0 and v2.1: one file per episode -----------------------------------------------------------------------------


def _episodes_v2(root: Path, meta: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> Iterator[Entry]:
    chunk_size = int(info.get("chunks_size") or 1000)
    data, video = str(info.get("data_path") or V21_DATA), str(info.get("video_path") or V21_VIDEO)
    flat = meta == root
    for line in _json_lines(meta / "episodes.jsonl"):
        try:
            index, length = int(line["episode_index"]), int(line["length"])
        except (KeyError, TypeError, ValueError):
            raise DatasetError(f"{meta / 'episodes.jsonl'}: {line} lacks episode_index or length; mend it") from None
        place = {"episode_index": index, "episode_chunk": index // chunk_size}
        table = root / _filled(data, info, **place)
        films = {
            key: Film(root / _filled(video, info, video_key=key, **place))
            for key, feature in features.items()
            if feature.dtype == "video"
        }
        if flat:
            table = _found(table, root / "data" / table.name)
            films = {
                key: Film(_found(film.path, root / "videos" / key / film.path.name, root / "videos" / film.path.name))
                for key, film in films.items()
            }
        yield Entry(index, length, tuple(str(t) for t in line.get("tasks") or ()), table, False, films)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise DatasetError(f"{path}: this file is missing, so no episode is listed; copy the data set again")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DatasetError(f"{path}: line {number} is not JSON ({error}); copy it again") from None


def _found(*candidates: Path) -> Path:
    return next((path for path in candidates if path.is_file()), candidates[0])


def _filled(template: str, info: Mapping[str, Any], **place: Any) -> str:
    try:
        return template.format(**place)
    except (KeyError, IndexError, ValueError):
        raise DatasetError(
            f"info.json ({info['codebase_version']}): the path '{template}' cannot be filled in; mend it"
        ) from None


def _choose_flat_cameras(
    root: Path, features: Mapping[str, Feature], entries: list[Entry]
) -> tuple[dict[str, Feature], list[Entry]]:
    """Where files lie flat, `videos/episode_000000.mp4` does not say which camera it is of: `modality.json` may, or
    the picture's size; cameras that are not there are left out."""
    from jidm.data.film import open_film

    keys = [key for key, feature in features.items() if feature.dtype == "video"]
    first = next((e for e in entries if e.table.is_file()), None)
    if first is None or len(keys) < 2 or len({first.films[key].path for key in keys}) == len(keys):
        return dict(features), entries
    named = []
    if (root / "modality.json").is_file():
        videos = _json(root / "modality.json").get("video") or {}
        named = [key for key in keys if any(key == entry.get("original_key") for entry in videos.values())]
    with open_film(first.films[keys[0]].path) as container:
        stream = container.streams.video[0]
        sized = [key for key in keys if features[key].shape[:2] == (stream.height, stream.width)]
    chosen = named if len(named) == 1 else sized
    if len(chosen) != 1:
        raise DatasetError(
            f"{root}: {first.films[keys[0]].path.name} may be of any of {', '.join(keys)}; move the videos to "
            f"videos/<camera>/, or take the cameras that are not there out of info.json"
        )
    dropped = set(keys) - set(chosen)
    kept = [
        Entry(e.index, e.length, e.tasks, e.table, False, {k: f for k, f in e.films.items() if k not in dropped})
        for e in entries
    ]
    return {key: feature for key, feature in features.items() if key not in dropped}, kept


# ---- v3.0: files of any number of episodes, and a table that says where each lies -------------------------------------


def _episodes_v30(root: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> Iterator[Entry]:
    data, video = str(info.get("data_path") or V30_DATA), str(info.get("video_path") or V30_VIDEO)
    films = [key for key, feature in features.items() if feature.dtype == "video"]
    keys = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for key in films:
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
            table = root / _filled(data, info, **place)
            pictures = {
                key: Film(
                    root
                    / _filled(
                        video,
                        info,
                        video_key=key,
                        chunk_index=rows[f"videos/{key}/chunk_index"][k],
                        file_index=rows[f"videos/{key}/file_index"][k],
                    ),
                    float(rows[f"videos/{key}/from_timestamp"][k]),
                )
                for key in films
            }
            yield Entry(index, length, tuple(str(t) for t in tasks[k] or ()), table, True, pictures)
