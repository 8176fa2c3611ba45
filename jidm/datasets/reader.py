"""Reader of LeRobot data sets: episodes one at a time, column by column."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8
from numpy.typing import NDArray

from jidm.datasets.feature import (
    ACTION,
    STATE,
    VISUAL_DTYPES,
    Feature,
    camera_keys,
    camera_name,
    find_camera,
    flat_names,
    generic_joint_names,
)
from jidm.datasets.metadata import DatasetMetadata, EpisodeMetadata, read_metadata
from jidm.datasets.table import SharedTableReader, read_columns, to_numpy
from jidm.datasets.video_file import decode
from jidm.errors import DatasetError, VideoError, did_you_mean
from jidm.video.image_file import ImageHeader, read_image, read_image_header


def open_dataset(path: str | Path) -> RecordedDataset:
    """A LeRobot data set of version 3.0, 2.1 or 2.0, with its metadata files in `meta/` or in the flat layout.

    Args:
        path: its folder.

    Raises:
        DatasetError: it is no data set, of an unknown version, or its metadata files are damaged.
    """
    return RecordedDataset(read_metadata(path))


class RecordedDataset:
    """A data set on disk.

    In memory are its list of episodes and, for files that many episodes share, the columns read last.

    Attributes:
        root: its folder.
        version: "v3.0", "v2.1" or "v2.0".
        fps: frames per second.
        robot_type: as recorded, or "".
        joint_names: names of the n entries of observation.state; "joint_0".. if the file has none.
        cameras: names of the cameras; "observation.images.cam_high" is "cam_high". Cameras whose short names are the same
            ("observation.image" and "observation.images.image") are named by their whole keys.
        features: every feature, as in info.json.
        recipe: parameters of a recording made by jidm (embodiment, embodiment_hash, seed, ...); else empty.
        episode_indices: the listed episodes whose table exists, ascending; there may be gaps.
    """

    def __init__(self, metadata: DatasetMetadata) -> None:
        self.metadata = metadata
        self.shared_tables = SharedTableReader()
        self.root, self.version, self.fps = metadata.root, metadata.version, metadata.fps
        self.robot_type = str(metadata.info.get("robot_type") or "")
        self.features: Mapping[str, Feature] = metadata.features
        self.recipe: Mapping[str, Any] = metadata.info.get("jidm") or {}
        self._camera_keys = camera_keys([key for key, f in self.features.items() if f.is_image])
        self.cameras = tuple(self._camera_keys)
        self.joint_names = self._joint_names()
        self.episode_indices = tuple(metadata.episodes)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over info.json, the episodes' lengths and all joint positions; images are not included."""
        digest = hashlib.sha256()
        info = {key: value for key, value in self.metadata.info.items() if not key.endswith("_path")}
        digest.update(json.dumps(info, sort_keys=True).encode())
        for episode in self:
            digest.update(f"{episode.index}:{episode.length}\n".encode())
            digest.update(np.ascontiguousarray(episode.state, dtype="<f8").tobytes())
        return digest.hexdigest()

    def episode(self, index: int) -> Episode:
        """The episode of that number.

        Raises:
            DatasetError: there is no such episode.
        """
        if index not in self.metadata.episodes:
            first = ", ".join(map(str, self.episode_indices[:8])) + (", ..." if len(self) > 8 else "")
            raise DatasetError(f"{self.root}: has no episode {index}; it has {len(self)}: {first}")
        return Episode(self, self.metadata.episodes[index])

    def camera_key(self, camera: str | None = None) -> str:
        """Feature key of a camera.

        Args:
            camera: name or key; None for the only camera.

        Raises:
            DatasetError: no such camera, a name that two cameras share, or None with several cameras.
        """
        return self._camera_keys[self.camera(camera)]

    def camera(self, camera: str | None = None) -> str:
        """The name in `cameras` of a camera. Arguments and errors as of `camera_key`."""
        return find_camera(self._camera_keys, camera, self.root)

    def __len__(self) -> int:
        return len(self.episode_indices)

    def __iter__(self) -> Iterator[Episode]:
        return (self.episode(index) for index in self.episode_indices)

    def __repr__(self) -> str:
        return f"RecordedDataset({str(self.root)!r}, {self.version}, {len(self)} episodes, {self.fps:g} fps)"

    def _joint_names(self) -> tuple[str, ...]:
        feature = self.features.get(STATE)
        if feature is None:
            return ()
        return flat_names(feature) or generic_joint_names(feature.shape[0] if feature.shape else 0)


class Episode:
    """One episode of T frames; columns are read on demand.

    Attributes:
        index: its number.
        length: T.
        task: description of its task, or "".
    """

    def __init__(self, dataset: RecordedDataset, metadata: EpisodeMetadata) -> None:
        self.dataset, self.metadata = dataset, metadata
        self.index, self.length = metadata.index, metadata.length
        self.task = next((task for task in metadata.tasks if task), "")

    @cached_property
    def time(self) -> Float64[np.ndarray, " T"]:
        """(T,) time of each frame [s] as recorded."""
        return self.column("timestamp").astype(np.float64).reshape(self.length)

    @cached_property
    def state(self) -> Float64[np.ndarray, "T n"]:
        """(T, n) joint positions as recorded [rad or m, unless the recording deviates], in the order of joint_names."""
        return self._float_vectors(STATE)

    @cached_property
    def action(self) -> Float64[np.ndarray, "T m"] | None:
        """(T, m) recorded actions; None if there are none."""
        return self._float_vectors(ACTION) if ACTION in self.dataset.features else None

    def column(self, key: str) -> NDArray[Any]:
        """(T, ...) values of any feature that is not an image; a feature of shape (1,) gives (T,).

        Raises:
            DatasetError: there is no such column, or its length or shape differs from the metadata.
        """
        feature = self.dataset.features.get(key)
        if feature is None:
            known = [k for k, f in self.dataset.features.items() if not f.is_image]
            raise DatasetError(f"{self.dataset.root}: has no feature '{key}': {did_you_mean(key, known)}")
        if feature.dtype in VISUAL_DTYPES:
            raise DatasetError(f"'{key}' holds images; read them with frames('{camera_name(key)}')")
        values = to_numpy(self.arrow_column(key), f"{self._where()}: {key}")
        expected = () if feature.shape == (1,) else feature.shape
        if values.shape[1:] not in (expected, feature.shape):
            raise DatasetError(
                f"{self._where()}: {key} is {values.shape[1:]} per frame, info.json says {feature.shape}"
            )
        return values.reshape(self.length, *expected)

    def frames(self, camera: str | None = None) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """The T images of a camera in order, RGB.

        Args:
            camera: name of the camera; None for the only one.

        Raises:
            DatasetError: no such camera, or its video is absent, damaged or of another length.
        """
        key = self.dataset.camera_key(camera)
        if self.dataset.features[key].dtype == "image":
            return self._decode_images(key)
        return decode(self.metadata.videos[key], self.length, self.dataset.fps)

    def video(self, camera: str | None = None) -> UInt8[np.ndarray, "T H W 3"]:
        """All images of a camera; see `frames`."""
        return np.stack(list(self.frames(camera)))

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"Episode({self.index}, {self.length} frames, {self.task!r})"

    def _float_vectors(self, key: str) -> NDArray[np.float64]:
        values = self.column(key)
        if values.dtype.kind not in "fiub":
            raise DatasetError(f"{self._where()}: {key} holds {values.dtype}, not numbers; record it again")
        return values.astype(np.float64).reshape(self.length, -1)

    def arrow_column(self, key: str) -> Any:
        """The T values of any column of the table as an Arrow array, as stored.

        Raises:
            DatasetError: there is no such column, or it is of another length.
        """
        if self.metadata.shared_table:
            array = self.dataset.shared_tables.column(self.metadata.table, key, self.index)
        else:
            array = read_columns(self.metadata.table, [key])[key]
        if len(array) != self.length:
            raise DatasetError(
                f"{self._where()}: {self.metadata.table.name} has {len(array)} rows, the list of episodes says "
                f"{self.length}; leave the episode out or correct the list"
            )
        return array

    def stored_images(self, key: str) -> Iterator[tuple[Path | bytes, str]]:
        """The T images of a feature of dtype "image" as stored, each with what messages call it.

        Raises:
            DatasetError: the column is absent or of another length, or a row has no image.
        """
        for k, cell in enumerate(self.arrow_column(key).to_pylist()):
            name = f"{self._where()}: {key} of frame {k}"
            data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
            if isinstance(data, str):
                data, path = None, data
            if data:
                yield data, name
            elif path:
                found = next((p for p in self._image_paths(path) if p.is_file()), None)
                if found is None:
                    raise DatasetError(f"{name}: the image {path} is missing; copy the data set again")
                yield found, f"{name} ({path})"
            else:
                raise DatasetError(f"{name} is empty; record it again or leave the episode out")

    def _image_paths(self, path: str) -> Iterator[Path]:
        """Where an image may lie: paths are relative to the data set or to the table, or absolute."""
        for folder in (self.dataset.root, self.metadata.table.parent):
            yield folder / path

    def _decode_images(self, key: str) -> Iterator[NDArray[np.uint8]]:
        for source, name in self.stored_images(key):
            try:
                if problem := image_problem(read_image_header(source, name), self.dataset.features[key]):
                    raise DatasetError(f"{name} is {problem}; correct the shape in info.json, or leave the episode out")
                yield read_image(source, name)
            except VideoError as error:
                raise DatasetError(str(error)) from None

    def _where(self) -> str:
        return f"{self.dataset.root}: episode {self.index}"


def image_problem(header: ImageHeader, feature: Feature) -> str:
    """How a stored image differs from info.json: "32x24, info.json says 64x48"; empty if it does not."""
    height, width, channels = (*feature.shape, 1)[:3]
    if (header.height, header.width) != (height, width):
        return f"{header.width}x{header.height}, info.json says {width}x{height}"
    if header.channels != channels:
        return f"of {header.channels} channel(s), info.json says {channels}"
    return ""
