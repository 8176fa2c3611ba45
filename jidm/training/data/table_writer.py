"""Decodes recorded episodes into memory-mapped tables, which a `FrameStore` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jidm.datasets.feature import geometry_keys
from jidm.errors import DatasetError
from jidm.fields.free.blocks import downsample
from jidm.training.data.recorded_geometry import letterbox_geometry
from jidm.video.letterbox import Letterbox

_CHUNK_SIZE = 64  # frames that are resized at once


def write_tables(
    folder: Path,
    dataset: Any,
    episodes: Sequence[int],
    image_key: str,
    size: tuple[int, int],
    *,
    input_scale: int,
    downsampled: bool,
    progress: Callable[[str], None],
) -> None:
    """Decode episodes into an empty folder; arguments as for `load_frame_store`.

    Raises:
        DatasetError: an episode contradicts itself or the others.
    """
    lengths = [int(dataset.episode(i).length) for i in episodes]
    writer = _TableWriter(folder, sum(lengths), *size, input_scale, downsampled)
    for done, (index, length) in enumerate(zip(episodes, lengths)):
        writer.add(dataset.episode(index), image_key, length)
        if (done + 1) % max(1, len(episodes) // 10) == 0:
            progress(f"decoded {done + 1} of {len(episodes)} episodes")
    writer.close({"length": lengths, "episodes": list(episodes), "size": list(writer.size_in)})


class _TableWriter:
    """Memory-mapped tables, filled episode by episode."""

    def __init__(self, folder: Path, count: int, height: int, width: int, input_scale: int, downsampled: bool) -> None:
        self.folder, self.count, self.size, self.input_scale = folder, count, (height, width), input_scale
        self.downsampled = downsampled
        self.row = 0
        self.size_in: tuple[int, int] = (0, 0)
        self.tables: dict[str, NDArray[Any]] = {}

    def add(self, episode: Any, image_key: str, length: int) -> None:
        video, state = episode.video(image_key), np.asarray(episode.state, dtype=np.float64)
        self._check(episode.index, video, state, length)
        pixels = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)
        enlarged = Letterbox(*self.size_in, *(side * self.input_scale for side in self.size))
        frames = [self._maybe_downsample(enlarged.apply_to_uint8(part)) for part in pixels.split(_CHUNK_SIZE)]
        self._append("frames", torch.cat(frames).numpy())
        self._append("state", state)
        if columns := _columns(episode, geometry_keys(image_key)):
            depth, links, cameras = columns
            letterbox = Letterbox(*self.size_in, *self.size)
            for name, value in letterbox_geometry(depth, links, cameras, letterbox).items():
                self._append(name, value)
        self.row += length

    def _check(self, index: int, video: NDArray[Any], state: NDArray[Any], length: int) -> None:
        if len(video) != length or len(state) != length:
            raise DatasetError(
                f"episode {index}: {len(video)} images and {len(state)} states for {length} frames; "
                f"run `jidm dataset validate`"
            )
        if not np.isfinite(state).all():
            raise DatasetError(f"episode {index}: a joint position is not finite; run `jidm dataset validate`")
        size_in = (video.shape[1], video.shape[2])
        if self.size_in not in ((0, 0), size_in):
            raise DatasetError(f"episode {index}: images are {size_in}, earlier ones {self.size_in}; split the set")
        self.size_in = size_in

    def _maybe_downsample(self, pixels: Tensor) -> Tensor:
        if not self.downsampled or self.input_scale == 1:
            return pixels
        return downsample(pixels.float(), self.input_scale).round().to(torch.uint8)

    def _append(self, name: str, values: NDArray[Any]) -> None:
        if name not in self.tables:
            if self.row:
                raise DatasetError(f"some episodes have {name} and some have not; record all of them alike")
            shape = (self.count, *values.shape[1:])
            self.tables[name] = np.lib.format.open_memmap(
                self.folder / f"{name}.npy", mode="w+", dtype=values.dtype, shape=shape
            )
        self.tables[name][self.row : self.row + len(values)] = values

    def close(self, index: dict[str, Any]) -> None:
        for table in self.tables.values():
            table.flush()  # type: ignore[attr-defined]
        self.tables.clear()
        (self.folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _columns(episode: Any, keys: Sequence[str]) -> list[NDArray[Any]]:
    """The columns of that episode; none if one of them is not recorded."""
    try:
        return [np.asarray(episode.column(key)) for key in keys]
    except (KeyError, DatasetError):
        return []
