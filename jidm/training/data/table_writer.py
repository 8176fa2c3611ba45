"""Decodes recorded episodes into memory-mapped tables, which a `FrameStore` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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
    tables: dict[str, NDArray[Any]] = {}
    size_in: tuple[int, int] | None = None
    row = 0
    for done, (index, length) in enumerate(zip(episodes, lengths)):
        episode = dataset.episode(index)
        video, state = episode.video(image_key), np.asarray(episode.state, dtype=np.float64)
        size_in = size_in or (video.shape[1], video.shape[2])
        _check_episode(index, video, state, length, size_in)
        values = {"frames": _resize(video, size, input_scale, downsampled), "state": state}
        if columns := _columns(episode, geometry_keys(image_key)):
            depth, link, cameras = columns
            values |= letterbox_geometry(depth, link, cameras, Letterbox(*size_in, *size))
        if row == 0:
            for name, value in values.items():
                shape = (sum(lengths), *value.shape[1:])
                tables[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", mode="w+", dtype=value.dtype, shape=shape
                )
        elif partial := sorted(values.keys() ^ tables.keys()):
            names = ", ".join(partial)
            raise DatasetError(f"some episodes have {names} and some have not; record all of them alike")
        for name, value in values.items():
            tables[name][row : row + length] = value
        row += length
        if (done + 1) % max(1, len(episodes) // 10) == 0:
            progress(f"decoded {done + 1} of {len(episodes)} episodes")
    for table in tables.values():
        table.flush()  # type: ignore[attr-defined]
    record = {"length": lengths, "episodes": list(episodes), "size": list(size_in or (0, 0))}
    (folder / "index.json").write_text(json.dumps(record), encoding="utf-8")


def _check_episode(index: int, video: NDArray[Any], state: NDArray[Any], length: int, size_in: tuple[int, int]) -> None:
    if len(video) != length or len(state) != length:
        raise DatasetError(
            f"episode {index}: {len(video)} images and {len(state)} states for {length} frames; "
            f"run `jidm dataset validate`"
        )
    if not np.isfinite(state).all():
        raise DatasetError(f"episode {index}: a joint position is not finite; run `jidm dataset validate`")
    if video.shape[1:3] != size_in:
        raise DatasetError(f"episode {index}: images are {video.shape[1:3]}, earlier ones {size_in}; split the set")


def _resize(video: NDArray[Any], size: tuple[int, int], input_scale: int, downsampled: bool) -> NDArray[Any]:
    """(T, 3, H, W) uint8 frames, letterboxed to `input_scale` times the size, then reduced to it if `downsampled`."""
    pixels = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)
    letterbox = Letterbox(video.shape[1], video.shape[2], *(side * input_scale for side in size))
    frames = []
    for chunk in pixels.split(_CHUNK_SIZE):
        resized = letterbox.apply_to_uint8(chunk)
        if downsampled and input_scale > 1:
            resized = downsample(resized.float(), input_scale).round().to(torch.uint8)
        frames.append(resized)
    return torch.cat(frames).numpy()


def _columns(episode: Any, keys: Sequence[str]) -> list[NDArray[Any]]:
    """The columns of that episode; none if one of them is not recorded."""
    try:
        return [np.asarray(episode.column(key)) for key in keys]
    except (KeyError, DatasetError):
        return []
