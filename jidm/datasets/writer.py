"""Writer of LeRobot data sets for several processes at once, any of which may be killed at any moment.

Every episode has its own files. Its table appears last, and an episode exists if and only if its table does. The files
under `meta/`, which concern all episodes, are written by `finalize` from the tables.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.datasets import stats
from jidm.datasets.feature import ACTION, IMAGE_PREFIX, INDEX_COLUMNS, STATE, VISUAL_DTYPES, Feature, not_finite
from jidm.datasets.metadata import EpisodeRecord, data_path, video_path, write_metadata
from jidm.datasets.preserved import PreservedEpisode, PreservedSchema
from jidm.datasets.staging import StagingFolder, move
from jidm.datasets.table import read_columns, read_record, to_arrow, to_numpy, write_table
from jidm.datasets.video_file import NEAR_LOSSLESS_CRF, copy_segment, encode
from jidm.errors import DatasetError

VERSIONS = ("v3.0", "v2.1")
_SCALAR_SHAPE = (1,)
_RECORD_VERSION = 2
"""Of `EpisodeRecord` in the tables; a folder with others cannot be continued."""


class DatasetWriter:
    """Writes episodes into a folder, then the metadata files.

    Several writers, in one process or many, may share a folder: the files of an episode depend only on the arguments of
    `write_episode`, and those of `finalize`, called at the end, only on the episodes. A killed process leaves complete
    episodes only; its successor continues after `completed_episodes()`.

    Args:
        root: folder; created if absent.
        fps: frames per second.
        joint_names: names of the n entries of the state.
        cameras: name -> (width, height) [px], both even.
        action_names: names of the m entries of the action; those of the joints if None, no action if empty.
        robot_type: name of the robot.
        extras: further columns, key -> Feature; written losslessly.
        recipe: parameters of the recording, stored in info.json under "jidm" (any JSON value).
        version: "v3.0" or "v2.1".
        preserved: what the episodes keep of a source.

    Raises:
        DatasetError: an unknown version, odd image sizes, duplicate names, or a recipe that is no JSON.
    """

    def __init__(
        self, root: str | Path, *, fps: float, joint_names: Sequence[str], cameras: Mapping[str, tuple[int, int]],
        action_names: Sequence[str] | None = None, robot_type: str = "", extras: Mapping[str, Feature] | None = None,
        recipe: Mapping[str, Any] | None = None, version: str = "v3.0", preserved: PreservedSchema | None = None,
    ) -> None:  # fmt: skip
        self.root, self.version, self.fps, self.robot_type = Path(root), version, float(fps), robot_type
        if version not in VERSIONS:
            raise DatasetError(f"data sets of version {version!r} are not written; choose {' or '.join(VERSIONS)}")
        if not 0 < self.fps < float("inf"):
            raise DatasetError(f"fps={fps} must be a positive number of frames per second")
        self.joint_names = _check_unique("joint", joint_names)
        self.action_names = self.joint_names if action_names is None else _check_unique("action", action_names)
        self.extras = dict(extras or {})
        self.preserved = preserved or PreservedSchema()
        self.recipe = _as_json(recipe or {})
        self._camera_keys = {name: f"{IMAGE_PREFIX}{name}" for name in cameras}
        self.features = self._build_features(cameras)
        self._schema_hash = self._compute_schema_hash()
        self._staging = StagingFolder(self.root)

    def write_episode(
        self, index: int, frames: Mapping[str, NDArray[Any]], state: NDArray[Any],
        action: NDArray[Any] | None = None, time: NDArray[Any] | None = None,
        extras: Mapping[str, NDArray[Any]] | None = None, task: str = "", preserved: PreservedEpisode | None = None,
    ) -> tuple[str, ...]:  # fmt: skip
        """Write one episode: it is complete afterwards, or absent if the process dies. No effect if it exists.

        Args:
            index: its number, from 0; two processes must not use the same one unless they write the same data. Gaps are
                allowed here, but LeRobot's reader expects all numbers below the count; `finalize` can close them.
            frames: camera -> (T, H, W, 3) uint8 RGB.
            state: (T, n) joint positions [rad or m].
            action: (T, m); None if the data set has no actions.
            time: (T,) [s]; must equal k / fps within 0.1 ms, which is also the default.
            extras: key -> (T, ...) values of the extra features.
            task: description of its task.
            preserved: what it keeps of its source; its tasks take the place of `task`.

        Returns:
            Keys of the preserved videos that had to be encoded anew.

        Raises:
            DatasetError: an array is missing, of another shape, or not finite, or a preserved video cannot be read.
        """
        number = self._free_number(index)
        target = self.root / data_path(self.version, number)
        if target.is_file():
            return ()
        preserved = preserved or PreservedEpisode()
        columns = self._build_columns(index, state, action, time, dict(extras or {}))
        if preserved.task_index is not None:
            columns["task_index"] = preserved.task_index
        length = len(columns["timestamp"])
        self._check_frames(index, frames, length)
        # A guess of its first row among all, right if all episodes have one length; `finalize` corrects it.
        first = index * length
        columns["index"] = columns["frame_index"] + first
        own = {key: x for key, x in columns.items() if len(self.features[key].shape) == 1}
        kept = {
            key: numbers
            for key in preserved.columns
            if (numbers := self._preserved_numbers(index, key, preserved)) is not None
        }
        episode_stats = {key: x for key, values in {**own, **kept}.items() if (x := stats.value_stats(values))}
        episode_stats |= {self._camera_keys[name]: stats.image_stats(frames[name]) for name in self._camera_keys}
        numbered = preserved.task_index is not None
        record = EpisodeRecord(
            index,
            number,
            length,
            preserved.tasks or (task,),
            None if numbered else 0,
            first,
            episode_stats,
            preserved.entries,
        )
        try:
            with self._staging.temporary_folder(f"episode-{index:06d}") as folder:
                return self._write_files(folder, target, record, columns, frames, preserved)
        except FileNotFoundError:
            # Another process has finished the same episode and removed the folder; anything else is a fault.
            if not target.is_file():
                raise
            return ()

    def completed_episodes(self) -> set[int]:
        """Indices of the episodes on disk, all of which are complete.

        Raises:
            DatasetError: some have another schema (features, rate, recipe).
        """
        return {episode.index for _, episode in self._read_records()}

    def is_renumbered(self) -> bool:
        """Whether files are not where `write_episode` puts them, because `finalize` closed gaps."""
        return any(path != self.root / data_path(self.version, episode.index) for path, episode in self._read_records())

    def finalize(self, *, close_gaps: bool = False) -> None:
        """Write `meta/` for all episodes on disk. May be called again; the bytes depend on the episodes only.

        Args:
            close_gaps: number the episodes from 0 in the order of their indices, as LeRobot requires. In v2.1, where numbers
                are names of files, no other process may write into the folder meanwhile.

        Raises:
            DatasetError: some episodes have another schema (features, rate, recipe).
        """
        located, finalized, first = self._read_records(), [], 0
        numbers = {record.index: k if close_gaps else record.index for k, (_, record) in enumerate(located)}
        if self.version == "v2.1" and close_gaps:
            located = self._renumber_files(located, numbers)
        tasks: dict[str, int] = {}
        for path, record in located:
            final = replace(record, number=numbers[record.index], from_index=first)
            if record.task_index is not None:
                final = replace(final, task_index=tasks.setdefault(record.tasks[0], len(tasks)))
            index_stats = {key: stats.value_stats(values) for key, values in _index_columns(final).items()}
            final = replace(final, stats={**record.stats, **index_stats})
            if final != record:
                self._rewrite_indices(path, final)
            finalized.append(final)
            first = final.to_index
        texts = self.preserved.tasks or {number: text for text, number in tasks.items()}
        write_metadata(
            self._staging, self.version, self.fps, self.robot_type, self.features, self.recipe, finalized, texts
        )
        for file in self.preserved.files:
            with self._staging.atomic_file(self.root / "meta" / file.name) as temporary:
                shutil.copyfile(file, temporary)
        self._staging.remove_stale({record.index for record in finalized})

    def _write_files(
        self, folder: Path, target: Path, record: EpisodeRecord, columns: Mapping[str, NDArray[Any]],
        frames: Mapping[str, NDArray[np.uint8]], preserved: PreservedEpisode,
    ) -> tuple[str, ...]:  # fmt: skip
        """Write all files of an episode into the staging folder, then move them to their places."""
        for name, key in self._camera_keys.items():
            encode(folder / f"{key}.mp4", frames[name], self.fps)
        encoded, video_stats = [], {}
        for key, segment in preserved.videos.items():
            copied, images = copy_segment(segment, folder / f"{key}.mp4", record.length, self.fps)
            self._check_preserved_video(record.index, key, images, copied)
            video_stats[key] = stats.image_stats(images)
            encoded += [] if copied else [key]
        record = replace(record, stats={**record.stats, **video_stats})
        arrays = {key: to_arrow(values, self.features[key]) for key, values in columns.items()} | dict(
            preserved.columns
        )
        self._write_table(folder / "table.parquet", {key: arrays[key] for key in self._table_keys()}, record)
        for key in self._video_keys():
            move(folder / f"{key}.mp4", self.root / video_path(self.version, record.number, key))
        move(folder / "table.parquet", target)  # last: with it the episode exists
        return tuple(encoded)

    # ---- columns -----------------------------------------------------------------------------------------------------

    def _build_features(self, cameras: Mapping[str, tuple[int, int]]) -> dict[str, Feature]:
        features = {STATE: Feature("float64", (len(self.joint_names),), list(self.joint_names))}
        if self.action_names:
            features[ACTION] = Feature("float64", (len(self.action_names),), list(self.action_names))
        for name, (width, height) in cameras.items():
            if width < 2 or height < 2 or width % 2 or height % 2:
                raise DatasetError(
                    f"camera '{name}' is {width}x{height}; video needs even sizes, crop or pad by a pixel"
                )
            features[self._camera_keys[name]] = Feature(
                "video", (height, width, 3), ["height", "width", "channels"],
                {"video.height": height, "video.width": width, "video.codec": "h264", "video.pix_fmt": "yuv420p",
                 "video.is_depth_map": False, "video.fps": self.fps, "video.channels": 3, "has_audio": False},
            )  # fmt: skip
        if taken := sorted(self.preserved.features.keys() & {*features, *self.extras, *INDEX_COLUMNS}):
            raise DatasetError(f"'{taken[0]}' is written and kept of the source; leave one of them out")
        features |= self.preserved.features
        for key, feature in self.extras.items():
            if key in features or "/" in key or feature.dtype in VISUAL_DTYPES or not feature.shape:
                raise DatasetError(
                    f"extra feature '{key}' ({feature.dtype}, {feature.shape}) is reserved or cannot be a column"
                )
            features[key] = feature
        for key in INDEX_COLUMNS:
            features[key] = Feature("float32" if key == "timestamp" else "int64", _SCALAR_SHAPE)
        return features

    def _build_columns(
        self, index: int, state: NDArray[Any], action: NDArray[Any] | None, time: NDArray[Any] | None,
        extras: dict[str, NDArray[Any]],
    ) -> dict[str, NDArray[Any]]:  # fmt: skip
        if index < 0:
            raise DatasetError(f"episode {index}: numbers start at 0")
        values = {STATE: state, **({} if action is None else {ACTION: action}), **extras}
        keys = [key for key in self.features if key in (STATE, ACTION) or key in self.extras]
        if set(values) != set(keys):
            raise DatasetError(
                f"episode {index}: columns {sorted(set(values) ^ set(keys))} are missing or unknown; give {sorted(keys)}"
            )
        length = len(state)
        ticks = np.arange(length) / self.fps
        if length < 1:
            raise DatasetError(f"episode {index}: has no frames; leave it out")
        if time is not None and (np.shape(time) != (length,) or not np.abs(np.asarray(time) - ticks).max() <= 1e-4):
            raise DatasetError(f"episode {index}: times are not k / {self.fps:g} s; resample it to the rate of the set")
        columns = {key: self._validate_column(index, key, np.asarray(values[key]), length) for key in keys}
        counter = np.arange(length, dtype=np.int64)
        return columns | {
            "timestamp": ticks.astype(np.float32), "frame_index": counter, "episode_index": np.full_like(counter, index),
            "index": counter, "task_index": np.zeros_like(counter),
        }  # fmt: skip

    def _validate_column(self, index: int, key: str, values: NDArray[Any], length: int) -> NDArray[Any]:
        feature = self.features[key]
        if feature.shape == _SCALAR_SHAPE and values.shape == (length,):
            values = values[:, None]
        dtype = np.dtype(feature.dtype)
        if values.shape != (length, *feature.shape) or not np.can_cast(values.dtype, dtype, "same_kind"):
            raise DatasetError(
                f"episode {index}: {key} is {values.dtype} {values.shape}, must be {dtype} {(length, *feature.shape)}"
            )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise DatasetError(f"episode {index}: {not_finite(key, feature, values)}; leave the episode out")
        return values.astype(dtype)

    def _check_frames(self, index: int, frames: Mapping[str, NDArray[Any]], length: int) -> None:
        if set(frames) != set(self._camera_keys):
            raise DatasetError(f"episode {index}: images of {sorted(frames)}, must be of {sorted(self._camera_keys)}")
        for name, key in self._camera_keys.items():
            expected = (length, *self.features[key].shape)
            if frames[name].dtype != np.uint8 or frames[name].shape != expected:
                raise DatasetError(
                    f"episode {index}: images of '{name}' are {frames[name].dtype} {frames[name].shape}, "
                    f"must be uint8 {expected}"
                )

    def _preserved_numbers(self, index: int, key: str, preserved: PreservedEpisode) -> NDArray[Any] | None:
        """Values of a kept column of numbers, one or a vector per frame; None for others, which have no statistics."""
        feature = self.features[key]
        if feature.dtype in ("string", *VISUAL_DTYPES) or len(feature.shape) != 1:
            return None
        try:
            values = to_numpy(preserved.columns[key], f"episode {index}: {key}")
        except DatasetError:
            return None  # lists of unequal length or missing values, kept as they are
        return values if values.dtype.kind in "fiub" else None

    def _check_preserved_video(self, index: int, key: str, images: NDArray[np.uint8], copied: bool) -> None:
        feature, (height, width) = self.features[key], images.shape[1:3]
        if (height, width) != feature.shape[:2]:
            raise DatasetError(
                f"episode {index}: {key} is {width}x{height}, info.json says {feature.shape[1]}x{feature.shape[0]}; "
                f"correct the shape in info.json"
            )
        if not copied and not feature.is_image:
            raise DatasetError(
                f"episode {index}: {key} is depth, which encoding anew would change, and its file cannot be cut at the "
                f"episode; write it with a key frame at the first image of each episode"
            )

    # ---- episodes on disk --------------------------------------------------------------------------------------------

    def _table_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature.dtype != "video"]

    def _video_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature.dtype == "video"]

    def _write_table(self, path: Path, arrays: Mapping[str, Any], record: EpisodeRecord) -> None:
        images = [key for key, feature in self.features.items() if feature.dtype == "image"]
        write_table(path, arrays, self._encode_record(record), images)

    def _compute_schema_hash(self) -> str:
        schema = {
            "version": self.version, "fps": self.fps, "recipe": self.recipe, "robot_type": self.robot_type, "crf": NEAR_LOSSLESS_CRF,
            "features": {key: feature.to_dict() for key, feature in self.features.items()}, "record": _RECORD_VERSION,
            "tasks": sorted(self.preserved.tasks.items()),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()

    def _encode_record(self, episode: EpisodeRecord) -> bytes:
        return json.dumps({"schema_hash": self._schema_hash, **vars(episode)}, sort_keys=True, allow_nan=False).encode()

    def _read_records(self) -> list[tuple[Path, EpisodeRecord]]:
        """Table and record of every episode, by index; of an episode whose renumbering was interrupted, the new table."""
        pattern = "data/chunk-*/file-*.parquet" if self.version == "v3.0" else "data/chunk-*/episode_*.parquet"
        located: dict[int, tuple[Path, EpisodeRecord]] = {}
        for path in sorted(self.root.glob(pattern), reverse=True):
            fields = json.loads(read_record(path) or b"{}")
            if fields.pop("schema_hash", None) != self._schema_hash:
                raise DatasetError(
                    f"{path}: was not written with these features, rate and recipe; write into another folder, "
                    f"or delete this one to start again"
                )
            record = EpisodeRecord(**fields)
            located[record.index] = path, replace(record, tasks=tuple(record.tasks))
        return [located[index] for index in sorted(located)]

    def _free_number(self, index: int) -> int:
        """Number of the files of an episode: its index, unless another episode was moved there to close a gap."""
        path = self.root / data_path(self.version, index)
        if not path.is_file() or json.loads(read_record(path) or b"{}").get("index", index) == index:
            return index
        return max(_number_of(path) for path, _ in self._read_records()) + 1

    def _renumber_files(
        self, located: Sequence[tuple[Path, EpisodeRecord]], numbers: Mapping[int, int]
    ) -> list[tuple[Path, EpisodeRecord]]:
        """Move the files of each episode to its number, and remove tables that an interrupted run left twice."""
        keep = {path for path, _ in located}
        for path in self.root.glob("data/chunk-*/episode_*.parquet"):
            if path not in keep:
                path.unlink()
        at = {record.index: _number_of(path) for path, record in located}
        for index, number in numbers.items():
            if at[index] == number:
                continue
            if (occupant := next((k for k, x in at.items() if x == number), None)) is not None:
                self._move_files(number, free := max(at.values()) + 1)
                at[occupant] = free
            self._move_files(at[index], number)
            at[index] = number
        return [(self.root / data_path(self.version, at[record.index]), record) for _, record in located]

    def _move_files(self, number: int, target: int) -> None:
        """Copy the videos, move the table, remove the old videos: at any moment each table has its videos."""
        videos = {
            self.root / video_path(self.version, number, key): self.root / video_path(self.version, target, key)
            for key in self._video_keys()
        }
        for source, copy in videos.items():
            with self._staging.atomic_file(copy) as temporary:
                shutil.copyfile(source, temporary)
        move(self.root / data_path(self.version, number), self.root / data_path(self.version, target))
        for source in videos:
            source.unlink()

    def _rewrite_indices(self, path: Path, episode: EpisodeRecord) -> None:
        """Write the episode's table again with the final numbers of its rows, its task and itself."""
        arrays = read_columns(path, self._table_keys())
        for key, values in _index_columns(episode).items():
            arrays[key] = to_arrow(values, self.features[key])
        with self._staging.atomic_file(path) as temporary:
            self._write_table(temporary, arrays, episode)


def _number_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _index_columns(episode: EpisodeRecord) -> dict[str, NDArray[np.int64]]:
    """The columns that depend on the other episodes."""
    count = np.arange(episode.length, dtype=np.int64)
    columns = {"index": count + episode.from_index, "episode_index": np.full_like(count, episode.number)}
    return columns if episode.task_index is None else {**columns, "task_index": np.full_like(count, episode.task_index)}


def _as_json(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe after a round trip through JSON, as it will be read from the file."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(recipe), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DatasetError(f"the recipe cannot be stored as JSON ({error}); give numbers, text, lists, dicts") from None
    return plain


def _check_unique(what: str, names: Sequence[str]) -> tuple[str, ...]:
    names = tuple(str(name) for name in names)
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates or (what == "joint" and not names):
        raise DatasetError(f"{what} names must be distinct and not empty: {', '.join(duplicates) or 'there are none'}")
    return names
