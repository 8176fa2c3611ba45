"""Where `label_dataset` reads episodes from: a LeRobot data set, or a folder of video files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jidm.datasets import open_dataset
from jidm.datasets.feature import ACTION, INDEX_COLUMNS, STATE, VISUAL_DTYPES, Feature
from jidm.errors import DatasetError

if TYPE_CHECKING:
    from jidm.datasets import RecordedDataset

VALID, COVARIANCE = "action_valid", "action_covariance"
"""Columns that labeling adds."""

EpisodeData = tuple[dict[str, NDArray[np.uint8]], NDArray[Any] | None, dict[str, NDArray[Any]], str]
"""Frames (T, H, W, 3) by camera, recorded joint positions (T, n) if there are any, further columns, and the task."""


class DatasetEpisodes:
    """Episodes of a LeRobot data set.

    Args:
        dataset: the data set.
        image_key: the camera to decode; may be omitted if there is only one.

    Attributes:
        image_key: the camera to decode.
        fps: frame rate [1/s].
        robot_type: as recorded.
        indices: of the episodes.
        state_names: joint names of the recorded positions.
        cameras: name -> (width, height).
        extras: further columns that are kept.
        source: where the episodes come from, as JSON values.
    """

    def __init__(self, dataset: RecordedDataset, image_key: str | None) -> None:
        self._dataset = dataset
        key = dataset.camera_key(image_key)
        self.image_key = next(name for name in dataset.cameras if dataset.camera_key(name) == key)
        self.fps, self.robot_type, self.indices = dataset.fps, dataset.robot_type, dataset.episode_indices
        self.state_names = dataset.joint_names
        sizes = {name: dataset.features[dataset.camera_key(name)].shape for name in dataset.cameras}
        self.cameras = {name: (shape[1], shape[0]) for name, shape in sizes.items()}
        replaced = {STATE, ACTION, VALID, COVARIANCE, *INDEX_COLUMNS}
        self.extras = {
            name: feature for name, feature in dataset.features.items()
            if name not in replaced and not feature.is_image and feature.shape and feature.dtype not in ("string", *VISUAL_DTYPES)
        }  # fmt: skip
        self.source = {"dataset": Path(dataset.root).name, "content_hash": dataset.content_hash}

    def name(self, index: int) -> str:
        """What messages call this episode."""
        return f"episode {index}"

    def read(self, index: int) -> EpisodeData:
        """One episode."""
        episode = self._dataset.episode(index)
        frames = {name: episode.video(name) for name in self.cameras}
        state = episode.state if self.state_names else None
        return frames, state, {name: episode.column(name) for name in self.extras}, episode.task


class VideoFolder:
    """Video files of a folder, one episode each, sorted by name. Attributes and methods as of `DatasetEpisodes`.

    Args:
        folder: the folder.
        fps: frame rate [1/s]; that of the first file if not given.

    Raises:
        DatasetError: there are no videos, or the frame rate is unknown.
    """

    image_key, robot_type, state_names = "camera", "", ()

    def __init__(self, folder: Path, fps: float | None) -> None:
        from jidm.video.io import VIDEO_SUFFIXES, list_videos, open_video

        if not folder.is_dir():
            raise DatasetError(f"{folder}: neither a data set nor a folder of videos")
        self._files = list_videos(folder)
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
        """Name of the file."""
        return self._files[index].name

    def read(self, index: int) -> EpisodeData:
        """One video.

        Raises:
            DatasetError: its frame rate differs from the first file's.
        """
        from jidm.video.io import open_video

        video = open_video(self._files[index])
        if self._fps_override is None and video.fps is not None and abs(video.fps - self.fps) > 1e-3 * self.fps:
            raise DatasetError(
                f"{video.fps:g} frames per second, the first video has {self.fps:g}; label it separately"
            )
        frames = np.stack([pixels.permute(1, 2, 0).numpy() for _, pixels in video.pixels()])
        return {self.image_key: frames}, None, {}, ""


def open_episodes(source: str | Path, *, image_key: str | None, fps: float | None) -> DatasetEpisodes | VideoFolder:
    """Episodes of a LeRobot data set, or of a folder of videos.

    Args:
        source: folder.
        image_key: of a data set, see `DatasetEpisodes`.
        fps: of videos, see `VideoFolder`.

    Raises:
        DatasetError: it is neither, or cannot be read.
    """
    path = Path(source)
    if any((path / file).is_file() for file in ("meta/info.json", "info.json")):
        return DatasetEpisodes(open_dataset(path), image_key)
    return VideoFolder(path, fps)
