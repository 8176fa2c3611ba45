"""Features: the columns of a data set as described in `info.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.errors import DatasetError, did_you_mean

STATE = "observation.state"
ACTION = "action"
IMAGE_PREFIX = "observation.images."
VISUAL_DTYPES = ("video", "image")
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns that every LeRobot data set has: when and where each frame is."""


@dataclass(frozen=True)
class Feature:
    """Type and shape of the value that each frame has under one key.

    Attributes:
        dtype: a NumPy name such as "float32", or "video", "image", "string".
        shape: of one frame's value, (1,) for a number; images are always (H, W, 3) here.
        names: names of the entries in any of the file's forms; None if there are none.
        info: further properties, for a video its codec and rate.
    """

    dtype: str
    shape: tuple[int, ...]
    names: Any = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, key: str, data: Any) -> Feature:
        """One entry of `features` in `info.json`.

        Raises:
            DatasetError: dtype or shape is absent or of the wrong kind.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("dtype"), str):
            raise DatasetError(f"feature '{key}' has no dtype; correct features in info.json")
        shape = data.get("shape")
        if not isinstance(shape, (list, tuple)) or not all(isinstance(x, int) and x >= 0 for x in shape):
            raise DatasetError(f"feature '{key}' has no shape but {shape!r}; correct features in info.json")
        shape, names = tuple(shape), data.get("names")
        if data["dtype"] in VISUAL_DTYPES:
            if len(shape) not in (2, 3):
                raise DatasetError(
                    f"feature '{key}' has shape {list(shape)}, images have [height, width, channels]; "
                    f"correct features in info.json"
                )
            shape, names = _channels_last(shape, names)
        return cls(data["dtype"], shape, names, data.get("info") or data.get("video_info") or {})

    def to_dict(self) -> dict[str, Any]:
        """The entry for `info.json`."""
        entry = {"dtype": self.dtype, "shape": list(self.shape), "names": self.names}
        return {**entry, "info": dict(self.info)} if self.info else entry

    @property
    def is_image(self) -> bool:
        """Whether it is a color image per frame (depth maps stored as video are not)."""
        depth = self.info.get("is_depth_map") or self.info.get("video.is_depth_map")
        return self.dtype in VISUAL_DTYPES and not depth


def flat_names(feature: Feature) -> tuple[str, ...] | None:
    """Names of the entries of a vector; None unless they are distinct and as many as the entries.

    Supported forms: a list, a list in a list, a mapping from group to list, and a mapping from name to index.
    """
    names = feature.names
    if isinstance(names, Mapping) and names and all(isinstance(x, int) for x in names.values()):
        names = sorted(names, key=lambda name: names[name])
    flat = tuple(_leaves(names))
    return flat if feature.shape == (len(flat),) and len(set(flat)) == len(flat) else None


def not_finite(key: str, feature: Feature, values: NDArray[Any]) -> str:
    """Which values (T, ...) of a feature are NaN or infinite: "observation.state of 'b' is nan in frame 5 (1 such frames)"."""
    flat = values.reshape(len(values), -1)
    frame, entry = np.argwhere(~np.isfinite(flat))[0]
    names = flat_names(feature) or (generic_joint_names(flat.shape[1]) if key == STATE else ())
    which = f" of '{names[entry]}'" if names else f" of entry {entry}" if flat.shape[1] > 1 else ""
    return (
        f"{key}{which} is {flat[frame, entry]} in frame {frame} ({int((~np.isfinite(flat)).any(1).sum())} such frames)"
    )


def generic_joint_names(count: int) -> tuple[str, ...]:
    """Names of joints that have none in the file: "joint_0", "joint_1", ..."""
    return tuple(f"joint_{k}" for k in range(count))


def geometry_keys(camera: str) -> tuple[str, str, str]:
    """Keys of depth, links and camera parameters, which simulated recordings have beside the images of a camera."""
    return f"observation.depth.{camera}", f"observation.links.{camera}", f"observation.camera.{camera}"


def camera_name(key: str) -> str:
    """ "observation.images.cam_high" -> "cam_high"."""
    return key.removeprefix(IMAGE_PREFIX).removeprefix("observation.")


def camera_keys(keys: Sequence[str]) -> dict[str, str]:
    """Camera -> key: short names where they are different, else whole keys."""
    short = [camera_name(key) for key in keys]
    return {name if short.count(name) == 1 else key: key for key, name in zip(keys, short, strict=True)}


def find_camera(cameras: Mapping[str, str], camera: str | None, source: Any) -> str:
    """The name among `cameras` (name -> key) that a name or key, or None for the only camera, means.

    Raises:
        DatasetError: no such camera, a name that two cameras share, or None with several; the message begins with the source.
    """
    if camera is None:
        if len(cameras) == 1:
            return next(iter(cameras))
        raise DatasetError(f"{source}: has {len(cameras)} cameras ({', '.join(cameras)}); name one")
    if camera in cameras:
        return camera
    if named := [name for name, key in cameras.items() if key == camera]:
        return named[0]
    if shared := [key for key in cameras.values() if camera_name(key) == camera_name(camera)]:
        if len(shared) == 1:
            return next(name for name, key in cameras.items() if key == shared[0])
        raise DatasetError(f"{source}: camera '{camera}' may be {' or '.join(shared)}; give one of these keys")
    raise DatasetError(f"{source}: has no camera '{camera}': {did_you_mean(camera, cameras)}")


def _leaves(names: Any) -> Iterator[str]:
    if isinstance(names, Mapping):
        names = list(names.values())
    if isinstance(names, (list, tuple)):
        for name in names:
            yield from _leaves(name)
    elif names is not None:
        yield str(names)


def _channels_last(shape: tuple[int, ...], names: Any) -> tuple[tuple[int, ...], Any]:
    first = str(names[0]) if isinstance(names, (list, tuple)) and names else ""
    if len(shape) == 3 and (first.startswith("channel") or (not first and shape[0] == 3 and shape[2] != 3)):
        return (shape[1], shape[2], shape[0]), ["height", "width", "channels"]
    return shape, names
